"""What cameras and phones do to a picture: blur, sharpening, noise, JPEG, the same to a clean crop and to its blemished copy.

A network that has only seen sharp studio pictures takes noise for pores and JPEG's blocks for patches. All randomness comes
from the generator passed in. Images are uint8 `[H, W, 3]`.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

# The chance of each step, in the order in which a camera does them.
SOFTENED, NOISY, SHARPENED, COMPRESSED = 0.5, 0.6, 0.4, 0.6


def degrade(rng: np.random.Generator, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and target after the same steps. Where they were equal, away from every edit, they still are."""
    edit = (source != target).any(-1)
    pair = [source, target]
    reach = 1
    if rng.random() < SOFTENED:
        # Half of them as a small picture that was enlarged.
        factor = float(np.exp(rng.uniform(0.1, 1.3)))
        reach += int(np.ceil(factor))
        if rng.random() < 0.5:
            pair = [_enlarged(image, factor) for image in pair]
        else:
            pair = [_filtered(image, ImageFilter.GaussianBlur(0.4 * factor)) for image in pair]
    if rng.random() < NOISY:
        grain = _grain(rng, target.shape)
        pair = [np.clip(np.rint(image + grain), 0, 255).astype(np.uint8) for image in pair]
    if rng.random() < SHARPENED:
        radius, percent = rng.uniform(0.6, 2.0), int(rng.integers(30, 160))
        reach += 2
        pair = [_filtered(image, ImageFilter.UnsharpMask(radius, percent, 0)) for image in pair]
    if rng.random() < COMPRESSED:
        quality, subsampling = int(rng.integers(45, 97)), int(rng.choice([0, 2]))
        pair = [_jpeg(image, quality, subsampling) for image in pair]
    # JPEG changes a whole block around a blemish. Only what lies at the blemish is to be learned as an edit.
    near = Image.fromarray(edit).convert("L").filter(ImageFilter.MaxFilter(2 * reach + 1))
    return np.where(np.asarray(near)[..., None] > 0, pair[0], pair[1]), pair[1]


def _enlarged(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(1, round(width / factor)), max(1, round(height / factor))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def _filtered(image: np.ndarray, by: ImageFilter.Filter) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(by))


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A sensor's noise: `float32[H, W, 3]` in levels, partly shared by the channels."""
    height, width = shape[:2]
    strength = float(np.exp(rng.uniform(-0.7, 1.6)))
    grain = rng.standard_normal((height, width, 1), np.float32) + 0.6 * rng.standard_normal((height, width, 3), np.float32)
    # A camera's own noise reduction leaves soft grains.
    if rng.random() < 0.5:
        grain = (grain + np.roll(grain, 1, 0) + np.roll(grain, 1, 1) + np.roll(grain, (1, 1), (0, 1))) / 2
    return strength * grain


def _jpeg(image: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, format="JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(packed))
