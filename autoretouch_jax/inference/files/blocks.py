"""A JPEG's own compressed blocks, wherever no pixel of theirs has changed.

Encoding pixels again changes some of those that were left alone: with the same tables about one in twenty, by up to four
levels. So the blocks of 8×8 coefficients come from the photograph's file, and only those with a changed pixel from the encoder.
Where colours are subsampled, a block of theirs covers up to 16×16 pixels.
"""

import functools
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 8  # of a block
COMPONENTS = ("Y", "Cb", "Cr")
# jpeglib brings many libraries. Of these, mozjpeg writes progressive files from coefficients, and only such files.
SEQUENTIAL, PROGRESSIVE = "turbo210", "mozjpeg403"

_turn = threading.Lock()  # jpeglib keeps the library that it uses for all threads together


@functools.cache
def _library() -> Any:
    """jpeglib, or None on a machine for which it has no wheel."""
    try:
        import jpeglib
    except ImportError:
        return None
    return jpeglib


def with_own_blocks(own: bytes, new: bytes, changed: np.ndarray) -> bytes:
    """Returns the JPEG `new` with the blocks of the JPEG `own`, except for those with a pixel that is `changed`, bool `[H, W]`.

    `new` comes back as it is where its form is another one, such as that of a CMYK photograph.
    """
    if _library() is None:
        return new
    with _turn, tempfile.TemporaryDirectory(prefix="autoretouch-jpeg-") as folder:
        paths = [Path(folder, name) for name in ("own.jpg", "new.jpg", "mixed.jpg")]
        for path, data in zip(paths, (own, new), strict=False):
            path.write_bytes(data)
        try:
            _library().version.set(SEQUENTIAL)
            before, after = (_library().read_dct(str(path)) for path in paths[:2])
            if not _mix(before, after, changed):
                return new
            if before.progressive_mode:
                _library().version.set(PROGRESSIVE)
            # jpeglib copies what it writes: three bytes a pixel are freed before.
            del before
            # Codes that fit the photograph: without the flag it could grow by a tenth.
            after.write_dct(str(paths[2]), flags=["+OPTIMIZE_CODING"])
        except OSError:  # jpeglib's word for a file that it cannot read
            return new
        return paths[2].read_bytes()


def _mix(before: Any, after: Any, changed: np.ndarray) -> bool:
    """Puts blocks of the one file into the other, in place. Returns False, and does nothing, where their forms differ."""
    components = COMPONENTS[: after.num_components]
    same = before.num_components == after.num_components and after.num_components in (1, 3)
    if not same or not np.array_equal(before.samp_factor, after.samp_factor) or not _same_tables(before, after, components):
        return False
    factors = np.asarray(after.samp_factor)
    covered = [SIDE * factors.max(0) // factor for factor in factors[: len(components)]]
    parts = [
        (getattr(before, name), getattr(after, name), ~_blocks(changed, *size))
        for name, size in zip(components, covered, strict=True)
    ]
    if any(own.shape != new.shape or kept.shape != new.shape[:2] for own, new, kept in parts):
        return False
    for own, new, kept in parts:
        new[kept] = own[kept]
    return True


def _same_tables(before: Any, after: Any, components: tuple[str, ...]) -> bool:
    tables = [[np.asarray(file.get_component_qt(i)) for i in range(len(components))] for file in (before, after)]
    return all(np.array_equal(a, b) for a, b in zip(*tables, strict=True))


def _blocks(changed: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """bool `[H, W]` → whether a block of so many rows and columns has a pixel that changed, with the last blocks cut short."""
    down = np.logical_or.reduceat(changed, np.arange(0, changed.shape[0], rows), axis=0)
    return np.logical_or.reduceat(down, np.arange(0, changed.shape[1], columns), axis=1)
