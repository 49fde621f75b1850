"""Cuts one training crop from an example and varies it. All randomness comes from `rng`."""

import numpy as np
from PIL import Image

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data import crops
from autoretouch_jax.data.blemishes import add_blemishes, skin_mask
from autoretouch_jax.data.sources import Decoded, Example, Images, whole

SKIN_TRIES = 4  # random positions that are tried to find a crop with skin in it
SKIN_SHARE = 0.3  # share of skin among a crop's pixels above which it counts as a crop with skin


def augment(example: Example, config: DataConfig, rng: np.random.Generator) -> Images:
    """Returns one crop: `{"source", "target": uint8[crop, crop, 3], "weight": float32[]}`.

    Position, zoom, flip and colours are the same for both images. Clean faces get blemishes on the source. With
    `extra_blemishes`, so do the sources of some pairs. The weight is the crop's weight in the loss.
    """
    # pix2pix resizes the whole photograph and then crops: its networks see faces of one size.
    if config.resize:
        square = (config.resize, config.resize)
        resized = {name: _resize(image, square, Image.Resampling.BICUBIC) for name, image in whole(example).items()}
        example = Decoded(example.name, resized, example.weight)
    clean_faces = bool(config.root)
    side = _side(example, config, rng)
    if clean_faces:
        (top, left), weight = _place_on_skin(example, side, rng), 1.0
    else:
        edits = example.edits() if config.edit_crops else np.zeros((1, 1), np.uint8)
        top, left, weight = crops.draw(rng, example.height, example.width, edits, side, config.edit_crops)
    crop = (config.crop, config.crop)
    pair = {
        name: image if side == config.crop else _resize(image, crop, Image.Resampling.LANCZOS)
        for name, image in example.cut((top, left, side, side)).items()
    }
    if config.flip and rng.random() < 0.5:
        pair = {name: image[:, ::-1] for name, image in pair.items()}
    if config.colour:
        table = _colour_table(rng, config.colour)
        pair = {name: table[np.arange(3), image] for name, image in pair.items()}
    pair = {name: np.ascontiguousarray(image) for name, image in pair.items()}
    # Blemishes come last, so that zoom and colours do not change their sizes and hues.
    if clean_faces:
        pair["source"] = add_blemishes(rng, pair["target"], config.blemish)
    elif config.extra_blemishes and rng.random() < config.extra_blemishes:
        pair["source"] = add_blemishes(rng, pair["source"], config.blemish)
    return pair | {"weight": np.asarray(weight * example.weight, np.float32)}


def _side(example: Example, config: DataConfig, rng: np.random.Generator) -> int:
    """The side of the square to cut, in the example's pixels: the crop's side divided by a log-uniform zoom."""
    low, high = np.log(config.zoom)
    side = round(config.crop / float(np.exp(rng.uniform(low, high))))
    return min(side, example.height, example.width)


def _place_on_skin(example: Example, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Returns top and left of a crop with skin in it, or of the last try when no try finds one."""
    # A grid of about 16 × 16 pixels is enough to recognise skin.
    step = max(1, side // 16)
    for _ in range(SKIN_TRIES):
        top, left = int(rng.integers(example.height - side + 1)), int(rng.integers(example.width - side + 1))
        if skin_mask(example.cut((top, left, side, side))["target"][::step, ::step]).mean() > SKIN_SHARE:
            break
    return top, left


def _colour_table(rng: np.random.Generator, strength: float) -> np.ndarray:
    """`uint8[3, 256]`: a gamma and a gain for each channel, within ± strength, mostly shared by the three."""
    gamma, gain = np.exp(strength * (rng.uniform(-1, 1, (2, 1)) + 0.3 * rng.uniform(-1, 1, (2, 3))))
    levels = np.linspace(0, 1, 256)
    return np.clip(np.rint(255 * gain[:, None] * levels ** gamma[:, None]), 0, 255).astype(np.uint8)


def _resize(image: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, filter))
