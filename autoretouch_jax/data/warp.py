"""Bends a crop at random: turns it, and moves its parts against each other. So a few people give many faces.

Images are uint8 `[H, W, channels]`.
"""

import numpy as np
from PIL import Image

from autoretouch_jax.data.sources import Images

MARGIN = 1.25  # how much wider than the crop the square is that is bent, so that its borders stay outside the crop
TURN = 2.0  # the largest turn in radians, in units of the strength
NODES, CELLS = 4, 8  # points a side that are moved; cells a side into which the crop is cut for it

Mesh = list[tuple[tuple[int, int, int, int], tuple[float, ...]]]


def warp(rng: np.random.Generator, images: Images, side: int, strength: float) -> Images:
    """Returns the middle of square images of one size, bent in the same way, `uint8[side, side, channels]`.

    Points move by up to `strength` of the crop's side, after a turn by up to `TURN` · `strength` radians.
    """
    mesh = _mesh(rng, next(iter(images.values())).shape[0], side, strength)
    return {name: _bent(image, mesh, side) for name, image in images.items()}


def _mesh(rng: np.random.Generator, size: int, side: int, strength: float) -> Mesh:
    """Which quadrilateral of an image of `size` pixels each cell of the crop comes from, in the form that Pillow takes."""
    angle = TURN * strength * rng.uniform(-1, 1)
    moves = strength * rng.uniform(-1, 1, (2, NODES, NODES)).astype(np.float32)
    count = (CELLS + 1, CELLS + 1)
    down, right = (np.asarray(Image.fromarray(move).resize(count, Image.Resampling.BICUBIC)) for move in moves)
    y, x = np.meshgrid(*2 * [np.linspace(-0.5, 0.5, CELLS + 1)], indexing="ij")
    # From the middle, in units of the crop's side; then in pixels of the image, whose middle is the crop's.
    scale = size / MARGIN
    rows = np.clip(size / 2 + scale * (np.cos(angle) * y - np.sin(angle) * x + down), 0, size)
    columns = np.clip(size / 2 + scale * (np.sin(angle) * y + np.cos(angle) * x + right), 0, size)
    at = np.rint(np.linspace(0, side, CELLS + 1)).astype(int)
    corners = ((0, 0), (1, 0), (1, 1), (0, 1))  # upper left, lower left, lower right, upper right
    return [
        (
            (int(at[j]), int(at[i]), int(at[j + 1]), int(at[i + 1])),
            tuple(float(v) for di, dj in corners for v in (columns[i + di, j + dj], rows[i + di, j + dj])),
        )
        for i in range(CELLS)
        for j in range(CELLS)
    ]


def _bent(image: np.ndarray, mesh: Mesh, side: int) -> np.ndarray:
    if image.shape[-1] == 3:
        return _transformed(image, mesh, side, Image.Resampling.BICUBIC)
    # Regions: Pillow would take a second channel for transparency.
    channels = [_transformed(image[..., i], mesh, side, Image.Resampling.BILINEAR) for i in range(image.shape[-1])]
    return np.stack(channels, -1)


def _transformed(image: np.ndarray, mesh: Mesh, side: int, filter: Image.Resampling) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.transform((side, side), Image.Transform.MESH, mesh, filter))
