"""Packs and unpacks a small square of a pair, losslessly and each tile by itself. The only importer of Zstandard.

A pixel is predicted from the one above it, red and blue from green, and the target from its source. The residuals go through
Zstandard. Each tile uses the predictions that make it smallest. Arithmetic is modulo 256 throughout, so that every 8-bit image
comes back exactly. Only the neighbour above is used, because this prediction is undone by adding whole rows at a time.

A tile is `[source's method, target's method: uint8] [source's length: uint32, little-endian] [source] [target]`. A target equal
to its source takes no bytes. benchmarks/RESULTS.md says why this codec was chosen.
"""

import math
import struct
import threading
from collections.abc import Sequence

import numpy as np
import zstandard

SIDE = 128  # of a tile, in pixels; a random 256² crop overlaps nine
LEVELS = (1, 9)  # of Zstandard: noise packs best at 1, smooth skin at 9, and both unpack equally fast
HEADER = struct.Struct("<BBI")

ABOVE, GREEN, SOURCE = 1, 2, 4  # the bits of a method: what a pixel is predicted from
WITHIN_IMAGE = (ABOVE, ABOVE | GREEN)
FROM_SOURCE = (SOURCE, SOURCE | GREEN, SOURCE | ABOVE, SOURCE | ABOVE | GREEN)

_local = threading.local()  # a Zstandard context must not be shared between threads, nor must the scratch memory below


def encode(source: np.ndarray, target: np.ndarray) -> bytes:
    """Packs one tile of source and target, `uint8[side, side, 3]` each."""
    a, b = (np.ascontiguousarray(image.swapaxes(1, 2)) for image in (source, target))
    # Trying all predictions costs time when records are made, and none when they are read.
    source_method, source_bytes = min((_pack(a, method, a) for method in WITHIN_IMAGE), key=_cost)
    target_method, target_bytes = SOURCE, b""
    if not np.array_equal(a, b):
        target_method, target_bytes = min((_pack(b, method, a) for method in FROM_SOURCE + WITHIN_IMAGE), key=_cost)
    return HEADER.pack(source_method, target_method, len(source_bytes)) + source_bytes + target_bytes


def decode(tiles: Sequence[bytes], columns: int, side: int, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks tiles, row by row with `columns` in each, and returns a box of source and target, `uint8[h, w, 3]` each.

    `box` is (top, left, height, width). Raises ValueError when the bytes are no tiles of that side.
    """
    rows = len(tiles) // columns
    source, target = (_scratch(name, (rows, side, columns, 3, side)) for name in ("source", "target"))
    methods = np.empty((rows, columns, 2), np.uint8)
    packed: list[tuple[int, int, memoryview]] = []
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        if len(tile) < HEADER.size:
            raise ValueError("not a tile (too short)")
        *methods[row, column], length = HEADER.unpack_from(tile)
        view = memoryview(tile)[HEADER.size :]
        source[row, :, column] = _unpack(view[:length], side)
        if length < len(view):
            packed.append((row, column, view[length:]))
    for y in range(1, side):  # every source is predicted from above, so one addition serves a row of all tiles
        np.add(source[:, y], source[:, y - 1], out=source[:, y])
    for row, column in np.argwhere(methods[..., 0] & GREEN):
        _add_green(source[row, :, column])
    pair = np.empty((2, box[2], box[3], 3), np.uint8)
    _interleave(source, box, pair[0])
    # Where no tile was edited, the target is the source.
    if packed:
        np.copyto(target, source)
        for row, column, data in packed:
            target[row, :, column] = _decode_target(data, methods[row, column, 1], source[row, :, column])
        _interleave(target, box, pair[1])
    else:
        pair[1] = pair[0]
    return pair[0], pair[1]


def _scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns this thread's scratch memory of that name. It is kept, because fresh pages cost as much as decoding does."""
    size = math.prod(shape)
    memory = getattr(_local, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        setattr(_local, name, memory)
    return memory[:size].reshape(shape)


def _decode_target(data: memoryview, method: int, source: np.ndarray) -> np.ndarray:
    """Unpacks one target, `[side, 3, side]`, into scratch memory."""
    planes, values = _scratch("tile", source.shape), _unpack(data, len(source))
    if method & ABOVE:
        np.add.accumulate(values, axis=0, out=planes)
    else:
        np.copyto(planes, values)
    if method & GREEN:
        _add_green(planes)
    return np.add(planes, source, out=planes) if method & SOURCE else planes


def _add_green(planes: np.ndarray) -> None:
    planes[:, 0] += planes[:, 1]
    planes[:, 2] += planes[:, 1]


def _interleave(tiles: np.ndarray, box: tuple[int, int, int, int], out: np.ndarray) -> None:
    """Copies a box of `[rows, side, columns, 3, side]` to `out[h, w, 3]`."""
    rows, side, columns = tiles.shape[:3]
    top, left, height, width = box
    exact = (height, width) == (rows * side, columns * side)
    image = out if exact else _scratch("image", (rows * side, columns * side, 3))
    split = image.reshape(rows, side, columns, side, 3)
    for channel in range(3):  # one plane at a time is four times faster than one transposing copy
        split[..., channel] = tiles[:, :, :, channel]
    if not exact:
        np.copyto(out, image[top : top + height, left : left + width])


def _pack(planes: np.ndarray, method: int, source: np.ndarray) -> tuple[int, bytes]:
    """Packs `uint8[side, 3, side]` minus what the method predicts, at the level that makes it smallest."""
    residual = planes - source if method & SOURCE else planes.copy()
    if method & GREEN:
        residual[:, 0] -= residual[:, 1]
        residual[:, 2] -= residual[:, 1]
    if method & ABOVE:
        residual = np.diff(residual, axis=0, prepend=np.uint8(0))
    return method, min((zstandard.ZstdCompressor(level=level).compress(residual.tobytes()) for level in LEVELS), key=len)


def _cost(packed: tuple[int, bytes]) -> float:
    """The number of bytes, and 3 % more for each prediction whose undoing takes time."""
    method, data = packed
    return len(data) * (1 + 0.03 * (method & ABOVE > 0) + 0.03 * (method & GREEN > 0))


def _unpack(data: memoryview, side: int) -> np.ndarray:
    if not hasattr(_local, "zstd"):
        _local.zstd = zstandard.ZstdDecompressor()
    try:
        raw = _local.zstd.decompress(data, max_output_size=3 * side * side)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a tile ({error})") from error
    return np.frombuffer(raw, np.uint8).reshape(side, 3, side)
