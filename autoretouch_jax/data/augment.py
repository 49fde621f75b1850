"""Cuts one training crop from an example and varies it. All randomness comes from `rng`."""

import numpy as np
from PIL import Image

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data import crops
from autoretouch_jax.data.blemishes import add_blemishes, skin_mask
from autoretouch_jax.data.crops import Box
from autoretouch_jax.data.degrade import degrade
from autoretouch_jax.data.sources import Decoded, Example, Images, whole
from autoretouch_jax.data.warp import warp, with_margin

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
        (top, left), weight = _place(example, side, config.on_skin, rng), 1.0
    else:
        edits = example.edits() if config.edit_crops else np.zeros((1, 1), np.uint8)
        share, limit = config.edit_crops, config.edit_crops_limit
        top, left, weight = crops.draw(rng, example.height, example.width, edits, side, share, limit)
    pair = _cut(rng, example, (top, left, side, side), config)
    if config.flip and rng.random() < 0.5:
        pair = {name: image[:, ::-1] for name, image in pair.items()}
    # Where the face's skin is, as an image that is cut and mirrored like the others.
    parts = pair.pop("regions", None)
    pair = _coloured(rng, pair, config)
    # Blemishes come after zoom and colours, so that these do not change their sizes and hues.
    if clean_faces:
        pair["source"] = add_blemishes(rng, pair["target"], config.blemish, parts)
    elif config.extra_blemishes and rng.random() < config.extra_blemishes:
        pair["source"] = add_blemishes(rng, pair["source"], config.blemish)
    return _degraded(rng, pair, config) | {"weight": np.asarray(weight * example.weight, np.float32)}


def _cut(rng: np.random.Generator, example: Example, box: Box, config: DataConfig) -> Images:
    """Returns a square box of an example at the crop's size, bent at random."""
    top, left, side, _ = box
    first, start, rows, columns = with_margin(box, example.height, example.width) if config.warp else box
    factor = config.crop / side
    size = (round(columns * factor), round(rows * factor))
    images = {
        name: image if side == config.crop else _resize(image, size, Image.Resampling.LANCZOS)
        for name, image in example.cut((first, start, rows, columns)).items()
    }
    if not config.warp:
        return images
    return warp(rng, images, (factor * (top - first), factor * (left - start)), config.crop, config.warp)


def augment_negative(crop: np.ndarray, config: DataConfig, rng: np.random.Generator) -> Images:
    """Returns what `augment` does for a crop in which nothing is to be retouched: source and target are the same."""
    pair = _coloured(rng, {"source": crop, "target": crop}, config)
    return _degraded(rng, pair, config) | {"weight": np.asarray(1.0, np.float32)}


def _coloured(rng: np.random.Generator, pair: Images, config: DataConfig) -> Images:
    if config.colour:
        table = _colour_table(rng, config.colour)
        pair = {name: table[np.arange(3), image] for name, image in pair.items()}
    if config.light:
        ramp, saturation = _light(rng, config.crop, config.light)
        pair = {name: _lit(image, ramp, saturation) for name, image in pair.items()}
    return {name: np.ascontiguousarray(image) for name, image in pair.items()}


def _degraded(rng: np.random.Generator, pair: Images, config: DataConfig) -> Images:
    if config.degrade and rng.random() < config.degrade:
        source, target = degrade(rng, pair["source"], pair["target"])
        return {"source": source, "target": target}
    return pair


def _side(example: Example, config: DataConfig, rng: np.random.Generator) -> int:
    """The side of the square to cut, in the example's pixels: the crop's side divided by a log-uniform zoom."""
    low, high = np.log(config.zoom)
    side = round(config.crop / float(np.exp(rng.uniform(low, high))))
    return min(side, example.height, example.width)


def _place(example: Example, side: int, on_skin: float, rng: np.random.Generator) -> tuple[int, int]:
    """Returns top and left of a crop: for a share `on_skin`, with skin in it, or of the last try when no try finds any."""
    # A grid of about 16 × 16 pixels is enough to recognise skin.
    step = max(1, side // 16)
    tries = SKIN_TRIES if rng.random() < on_skin else 1
    for _ in range(tries):
        top, left = int(rng.integers(example.height - side + 1)), int(rng.integers(example.width - side + 1))
        cut = example.cut((top, left, side, side))
        # Skin by the face that was found, else by its colour.
        skin = cut["regions"][::step, ::step, 0] > 127 if "regions" in cut else skin_mask(cut["target"][::step, ::step])
        if skin.mean() > SKIN_SHARE:
            break
    return top, left


def _colour_table(rng: np.random.Generator, strength: float) -> np.ndarray:
    """`uint8[3, 256]`: a gamma and a gain for each channel, within ± strength, mostly shared by the three."""
    gamma, gain = np.exp(strength * (rng.uniform(-1, 1, (2, 1)) + 0.3 * rng.uniform(-1, 1, (2, 3))))
    levels = np.linspace(0, 1, 256)
    return np.clip(np.rint(255 * gain[:, None] * levels ** gamma[:, None]), 0, 255).astype(np.uint8)


def _light(rng: np.random.Generator, side: int, strength: float) -> tuple[np.ndarray, float]:
    """A factor of exposure, float32 `[side, side, 1]` around 1, that grows in one direction; and a factor of saturation."""
    angle, reach = rng.uniform(0, 2 * np.pi), strength * rng.random()
    across = np.linspace(-1, 1, side, dtype=np.float32)
    ramp = np.exp(reach * (np.sin(angle) * across[:, None] + np.cos(angle) * across[None, :]))
    # A few crops are black and white.
    saturation = 0.0 if rng.random() < 0.04 else float(np.exp(strength * rng.uniform(-1, 0.6)))
    return ramp[..., None], saturation


def _lit(image: np.ndarray, ramp: np.ndarray, saturation: float) -> np.ndarray:
    x = image.astype(np.float32) * ramp
    grey = x.mean(-1, keepdims=True)
    return np.clip(np.rint(grey + saturation * (x - grey)), 0, 255).astype(np.uint8)


def _resize(image: np.ndarray, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    if image.shape[-1] != 3:  # regions: Pillow would take a second channel for transparency
        channels = [np.ascontiguousarray(image[..., i]) for i in range(image.shape[-1])]
        return np.stack(
            [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR)) for channel in channels], -1
        )
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, filter))
