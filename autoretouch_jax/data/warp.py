"""Bends a crop at random: turns it, and moves its parts against each other. So a few people give many faces.

Images are uint8 `[H, W, channels]`.
"""

import numpy as np
from PIL import Image

from autoretouch_jax.data.crops import Box
from autoretouch_jax.data.sources import Images

# What is bent reaches beyond the crop on each side, in units of its side, so that the photograph's next pixels move in. Beyond
# that, and beyond the photograph, the last pixels repeat.
MARGIN = 0.125
TURN = 2.0  # the largest turn in radians, in units of the strength
NODES, CELLS = 4, 8  # points a side that are moved; cells a side into which the crop is cut for it

Mesh = list[tuple[tuple[int, int, int, int], tuple[float, ...]]]


def with_margin(box: Box, height: int, width: int) -> Box:
    """Returns the box with a margin of `MARGIN` of its sides, as far as an image of this size has one."""
    top, left, rows, columns = box
    down, right = round(MARGIN * rows), round(MARGIN * columns)
    first, start = max(0, top - down), max(0, left - right)
    return first, start, min(height, top + rows + down) - first, min(width, left + columns + right) - start


def warp(rng: np.random.Generator, images: Images, at: tuple[float, float], side: int, strength: float) -> Images:
    """Returns a square of images of one size, all bent in the same way, `uint8[side, side, channels]`.

    `at` is its top and left. Points move by up to about `strength` of the side, after a turn by up to `TURN` · `strength`.
    """
    height, width = next(iter(images.values())).shape[:2]
    mesh = _mesh(rng, (height, width), at, side, strength)
    return {name: _bent(image, mesh, side) for name, image in images.items()}


def _mesh(rng: np.random.Generator, size: tuple[int, int], at: tuple[float, float], side: int, strength: float) -> Mesh:
    """Which quadrilateral of the images each cell of the square comes from, in the form that Pillow takes."""
    angle = TURN * strength * rng.uniform(-1, 1)
    moves = strength * rng.uniform(-1, 1, (2, NODES, NODES)).astype(np.float32)
    count = (CELLS + 1, CELLS + 1)
    down, right = (np.asarray(Image.fromarray(move).resize(count, Image.Resampling.BICUBIC)) for move in moves)
    y, x = np.meshgrid(*2 * [np.linspace(-0.5, 0.5, CELLS + 1)], indexing="ij")
    rows = at[0] + side * (0.5 + np.cos(angle) * y - np.sin(angle) * x + down)
    columns = at[1] + side * (0.5 + np.sin(angle) * y + np.cos(angle) * x + right)
    # Outside the image Pillow paints black.
    rows, columns = (np.clip(place, 0, last - 0.5) for place, last in zip((rows, columns), size, strict=True))
    ends = np.rint(np.linspace(0, side, CELLS + 1)).astype(int)
    corners = ((0, 0), (1, 0), (1, 1), (0, 1))  # upper left, lower left, lower right, upper right
    return [
        (
            (int(ends[j]), int(ends[i]), int(ends[j + 1]), int(ends[i + 1])),
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
