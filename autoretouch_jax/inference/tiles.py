"""Runs a generator on an image of any size, in tiles of one shape. Images are uint8 `[H, W, 3]`, RGB."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from autoretouch_jax.config.networks import Generator
from autoretouch_jax.models.folder import Model
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.models.outputs import generator_output
from autoretouch_jax.models.pixels import to_float, to_uint8
from autoretouch_jax.runtime import devices

TILE = 512  # largest side of a tile without its halo, so that memory stays bounded whatever the photo's size
BLOCK_STEP = 128  # the sides of a block are multiples of this, so that few sizes are compiled
LARGEST_BLOCK = 1 << 20  # pixels of a block that is computed in one piece
TILE_STEP = 64  # tiles of smaller images have a multiple of this as their side, so that few shapes are compiled


def network_output(model: Model, image: np.ndarray, tile: int = TILE) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the network's own 8-bit output, before gate and dead zone, and its mask, float32 `[H, W]` in [0, 1], or None.

    The image is mirrored beyond its borders and cut into tiles with a halo of the receptive radius, so that the size of the
    tiles does not show in the result. Networks that look at the whole image at once get it whole.
    """
    height, width = image.shape[:2]
    # The halo is the receptive radius: with it, a tile's pixels see exactly what they would see in the whole image.
    grid, radius = model.config.grid, model.config.receptive_radius
    if radius is None:
        halo, tile_height, tile_width = 0, -(-height // grid) * grid, -(-width // grid) * grid
    else:
        halo = radius
        step = max(TILE_STEP, grid)
        tile_height = tile_width = min(-(-tile // grid) * grid, -(-max(height, width) // step) * step)
    rows, columns = -(-height // tile_height), -(-width // tile_width)
    padded = _mirror(image, halo, halo + rows * tile_height - height, halo + columns * tile_width - width)
    corners = [(top, left) for top in range(0, height, tile_height) for left in range(0, width, tile_width)]
    windows = [padded[top : top + tile_height + 2 * halo, left : left + tile_width + 2 * halo] for top, left in corners]
    output, mask = np.empty_like(image), None
    for (top, left), (patch, patch_mask) in zip(corners, _on_all_devices(model, windows), strict=True):
        inside = np.s_[halo : halo + min(tile_height, height - top), halo : halo + min(tile_width, width - left)]
        area = np.s_[top : top + tile_height, left : left + tile_width]
        output[area] = patch[inside]
        if patch_mask is not None:
            mask = np.empty((height, width), np.float32) if mask is None else mask
            mask[area] = patch_mask[inside]
    return output, mask


def block_output(model: Model, block: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the network's output and mask as `network_output` does, for a block that brings its own halo, in one piece.

    What lies within the receptive radius of its border is not what the network would see in the whole photograph. A block that
    is too large for one piece is cut into tiles.
    """
    height, width = block.shape[:2]
    if height * width > LARGEST_BLOCK:
        return network_output(model, block)
    # Few sizes, because each is compiled once.
    step = max(BLOCK_STEP, model.config.grid)
    filled = _mirror(block, 0, -height % step, -width % step)
    ((output, mask),) = _on_all_devices(model, [filled])
    return output[:height, :width], mask if mask is None else mask[:height, :width]


# Compiled once for each network and shape of a tile.
@functools.partial(jax.jit, static_argnums=0)
def _apply(config: Generator, variables: dict, tiles: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    module, images = make_generator(config), to_float(tiles)
    if config.test_mode == "train":
        # The same key for every photograph, so that a photograph comes out the same each time.
        rngs = {"dropout": jax.random.key(0)}
        output = generator_output(module.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0])
    else:
        output = generator_output(module.apply(variables, images))
    mask = None if output.mask_logits is None else jax.nn.sigmoid(output.mask_logits[..., 0])
    return to_uint8(output.image), mask


def _on_all_devices(model: Model, windows: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields the network's output and mask for each window. Each device computes one window at a time."""
    at_once = min(len(windows), devices.local_devices())
    for first in range(0, len(windows), at_once):
        group = windows[first : first + at_once]
        # The last group is filled up, because another number of tiles would be compiled again.
        filled = np.stack(group + [group[-1]] * (at_once - len(group)))
        patches, masks = _apply(model.config, model.variables, devices.spread_over_local_devices(filled))
        for i in range(len(group)):
            yield np.asarray(patches[i]), None if masks is None else np.asarray(masks[i])


def _mirror(image: np.ndarray, before: int, bottom: int, right: int) -> np.ndarray:
    """Mirrors the image beyond its borders. Where it is smaller than the margin, NumPy repeats the reflection."""
    margins = ((before, bottom), (before, right), (0, 0))
    return np.pad(image, margins, mode="reflect") if min(image.shape[:2]) > 1 else np.pad(image, margins, mode="edge")
