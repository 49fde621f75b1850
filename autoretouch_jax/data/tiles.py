"""The tile codec: a small square of a pair → bytes and back, without loss, each tile on its own.

A pixel is predicted from the one above it, red and blue from green, the target from its source; what prediction leaves over
goes through Zstandard. Which predictions pay is chosen tile by tile, by size. Arithmetic is modulo 256 throughout, so every
8-bit image comes back exactly. Only neighbours above are used because undoing that adds whole rows at a time.

A tile is `[source's method, target's method: uint8] [source's length: uint32, little-endian] [source] [target]`; a target
equal to its source takes no bytes at all. Why these and not another codec: benchmarks/README.md.
"""

import math
import struct
import threading
from collections.abc import Sequence

import numpy as np
import zstandard

SIDE = 128  # of a tile: a random 256² crop touches nine
LEVELS = (1, 9)  # Zstandard's: noise packs best at 1, smooth skin at 9; they unpack alike
HEADER = struct.Struct("<BBI")

ABOVE, GREEN, SOURCE = 1, 2, 4  # the bits of a method
OWN = (ABOVE, ABOVE | GREEN)
FROM_SOURCE = (SOURCE, SOURCE | GREEN, SOURCE | ABOVE, SOURCE | ABOVE | GREEN)

_local = threading.local()  # a Zstandard context must not be shared between threads, nor must the scratch memory below


def encode(source: np.ndarray, target: np.ndarray) -> bytes:
    """`uint8[side, side, 3]` twice → one tile's bytes."""
    a, b = (np.ascontiguousarray(image.swapaxes(1, 2)) for image in (source, target))
    source_method, source_bytes = min((_pack(a, method, a) for method in OWN), key=_cost)
    target_method, target_bytes = SOURCE, b""
    if not np.array_equal(a, b):
        target_method, target_bytes = min((_pack(b, method, a) for method in FROM_SOURCE + OWN), key=_cost)
    return HEADER.pack(source_method, target_method, len(source_bytes)) + source_bytes + target_bytes


def decode(tiles: Sequence[bytes], columns: int, side: int, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tiles, row by row with `columns` in each, → the `box` (top, left, height, width) of source and target, `uint8[h, w, 3]`.

    Raises ValueError when the bytes are no tiles of that side.
    """
    rows = len(tiles) // columns
    source, target = (_scratch(name, (rows, side, columns, 3, side)) for name in ("source", "target"))
    methods = np.empty((rows, columns, 2), np.uint8)
    packed: list[tuple[int, int, memoryview]] = []
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        *methods[row, column], length = HEADER.unpack_from(tile)
        view = memoryview(tile)[HEADER.size :]
        source[row, :, column] = _unpack(view[:length], side)
        if length < len(view):
            packed.append((row, column, view[length:]))
    for y in range(1, side):  # all tiles at once: every source is predicted from above
        np.add(source[:, y], source[:, y - 1], out=source[:, y])
    for row, column in np.argwhere(methods[..., 0] & GREEN):
        _add_green(source[row, :, column])
    pair = np.empty((2, box[2], box[3], 3), np.uint8)
    _interleave(source, box, pair[0])
    if packed:
        np.copyto(target, source)
        for row, column, data in packed:
            target[row, :, column] = _decode_target(data, methods[row, column, 1], source[row, :, column])
        _interleave(target, box, pair[1])
    else:
        pair[1] = pair[0]
    return pair[0], pair[1]


def _scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """This thread's memory of that name, made once: fresh pages cost as much as decoding does."""
    size = math.prod(shape)
    memory = getattr(_local, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        setattr(_local, name, memory)
    return memory[:size].reshape(shape)


def _decode_target(data: memoryview, method: int, source: np.ndarray) -> np.ndarray:
    """One target, `[side, 3, side]`, in scratch memory."""
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
    """The box of `[rows, side, columns, 3, side]` into `out[h, w, 3]`."""
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
    """`uint8[side, 3, side]` less what the method predicts, packed at the level that makes it smallest."""
    left = planes - source if method & SOURCE else planes.copy()
    if method & GREEN:
        left[:, 0] -= left[:, 1]
        left[:, 2] -= left[:, 1]
    if method & ABOVE:
        left = np.diff(left, axis=0, prepend=np.uint8(0))
    return method, min((zstandard.ZstdCompressor(level=level).compress(left.tobytes()) for level in LEVELS), key=len)


def _cost(packed: tuple[int, bytes]) -> float:
    """Bytes, and a little for each prediction that must be undone."""
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
