"""Crops in which nothing is to be retouched: from photographs of anything, and from drawn patterns that look like blemishes.

A network that has only seen faces before a grey wall takes all that is red, dark or small for a blemish. Images are uint8
`[H, W, 3]`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data.folders import PhotoSource
from autoretouch_jax.data.patterns import draw_pattern
from autoretouch_jax.errors import BadInput

ZOOM = (0.4, 2.5)  # the range of the resize factor of a photograph: a flower may be as small as a pimple
MIXED = 0.5  # share of the crops whose channels are mixed at random
FROM_PHOTOS = 0.6  # share of the negatives that are cut from photographs, where there are any


class Negatives:
    """Draws crops that must come back as they are. Without a folder all of them are drawn patterns."""

    def __init__(self, config: DataConfig) -> None:
        """Raises Refused, naming the fault, when the folder is missing, empty, or holds a broken image."""
        self.crop = config.crop
        self.photos = PhotoSource(Path(config.negatives), "--data.negatives") if config.negatives else None

    def draw(self, rng: np.random.Generator, note: Callable[[str, BadInput], None]) -> np.ndarray:
        """Returns one crop, `uint8[crop, crop, 3]`.

        A pattern takes the place of a photograph that cannot be read, of which `note(name, error)` is told.
        """
        image = None
        if self.photos is not None and rng.random() < FROM_PHOTOS:
            number = int(rng.integers(len(self.photos)))
            try:
                image = self._cut(self.photos[number].images["target"], rng)
            except BadInput as error:
                note(f"negatives: {self.photos.names[number]}", error)
        if image is None:
            image = draw_pattern(rng, self.crop)
        return mixed(rng, image) if rng.random() < MIXED else image

    def _cut(self, photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = photo.shape[:2]
        side = round(self.crop / float(np.exp(rng.uniform(*np.log(ZOOM)))))
        side = max(1, min(side, height, width))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        cut = Image.fromarray(np.ascontiguousarray(photo[top : top + side, left : left + side]))
        # Small photographs are enlarged: a crop has one size.
        return np.asarray(cut.resize((self.crop, self.crop), Image.Resampling.LANCZOS))


def mixed(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Returns the image with other hues: each channel becomes a random mean of the three, then its contrast is restored."""
    matrix = rng.dirichlet((0.5, 0.5, 0.5), 3).astype(np.float32)
    x = image.astype(np.float32)
    # A mean of channels is greyer than they are, so colours are drawn away from grey.
    y = x @ matrix.T
    grey = y.mean(-1, keepdims=True)
    y = grey + rng.uniform(0.8, 2.0) * (y - grey)
    return np.clip(np.rint(y), 0, 255).astype(np.uint8)


def open_negatives(config: DataConfig) -> Negatives | None:
    """Returns the negatives of a run, or None where it has none: see `data.negative_share`."""
    synthetic = bool(config.root) or config.extra_blemishes > 0
    return Negatives(config) if config.negative_share > 0 and (synthetic or config.negatives) else None
