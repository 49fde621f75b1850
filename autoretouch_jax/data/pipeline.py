"""The Grain graph: source → decode → crop, flip, blemishes → batch → threads that work ahead.

The batch of step k is a function of (seed, k) alone: there is no position to save but k itself.
"""

from collections.abc import Iterator

import grain
import numpy as np
from PIL import Image

from autoretouch_jax.config import Config, DataConfig
from autoretouch_jax.data.blemish import add_blemishes, skin_mask
from autoretouch_jax.data.sources import Example, FaceSource, PairSource

SKIN_TRIES = 4  # places looked at for a crop with skin in it


class Augment(grain.transforms.RandomMap):
    """One decoded example → one training pair `{"source", "target"}: uint8[crop, crop, 3]`."""

    def __init__(self, config: DataConfig):
        self.config = config

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The same crop, zoom and flip for both images; fresh blemishes where the example has no source."""
        config = self.config
        if config.resize:
            square = (config.resize, config.resize)
            element = {
                name: np.asarray(Image.fromarray(image).resize(square, Image.Resampling.BICUBIC))
                for name, image in element.items()
            }
        box = self._box(element, rng)
        pair = {name: _cut(image, box, config.crop) for name, image in element.items()}
        if config.flip and rng.random() < 0.5:
            pair = {name: image[:, ::-1] for name, image in pair.items()}
        target = np.ascontiguousarray(pair["target"])
        source = pair["source"] if "source" in pair else add_blemishes(rng, target, config.blemish)
        return {"source": np.ascontiguousarray(source), "target": target}

    def _box(self, element: Example, rng: np.random.Generator) -> tuple[int, int, int]:
        """Top, left and side of the crop, in the image's pixels.

        For pairs, a share `edit_crops` is centred on an edited pixel; faces are cut where there is skin, if tries find any.
        """
        image, synthetic = element["target"], "source" not in element
        height, width = image.shape[:2]
        low, high = np.log(self.config.zoom)
        side = round(self.config.crop / float(np.exp(rng.uniform(low, high))))
        side = min(side, height, width)
        if not synthetic and rng.random() < self.config.edit_crops:
            edited = np.flatnonzero((element["source"] != image).any(-1))
            if edited.size:
                row, column = divmod(int(rng.choice(edited)), width)
                top = min(max(row - int(rng.integers(side)), 0), height - side)
                left = min(max(column - int(rng.integers(side)), 0), width - side)
                return top, left, side
        for _ in range(SKIN_TRIES if synthetic else 1):
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            step = max(1, side // 16)
            if synthetic and skin_mask(image[top : top + side : step, left : left + side : step]).mean() > 0.3:
                break
        return top, left, side


def _cut(image: np.ndarray, box: tuple[int, int, int], crop: int) -> np.ndarray:
    top, left, side = box
    cut = image[top : top + side, left : left + side]
    if side == crop:
        return cut
    return np.asarray(Image.fromarray(cut).resize((crop, crop), Image.Resampling.LANCZOS))


def batches(source: FaceSource | PairSource, config: Config, first_step: int, seed_offset: int = 0) -> Iterator[Example]:
    """Batches `{"source", "target"}: uint8[N, crop, crop, 3]` from `first_step` on, without end.

    Another `seed_offset` gives other crops and blemishes of the same images.
    """
    seed = config.train.seed + seed_offset
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(Augment(config.data))
    start = first_step * config.train.batch
    options = grain.ReadOptions(
        num_threads=config.parallel.input_threads,
        prefetch_buffer_size=config.parallel.prefetch * config.parallel.input_threads,
    )
    return iter(examples[start:].to_iter_dataset(options).batch(config.train.batch))
