"""Reads photographs at a reduced scale: what is looked for there is as large as in a photograph of one to two megapixels."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from autoretouch_jax.data.colour import srgb
from autoretouch_jax.data.edits import read_pair
from autoretouch_jax.data.images import orientation_of, read_rgb, upright
from autoretouch_jax.errors import BadInput, first_line

LONGEST = 1500  # pixels of the longer side; 6000 × 4000 is read at a quarter, which a JPEG's decoder does by itself
THREADS = 2  # Pillow and XLA release the GIL
AVERAGED = 2  # reduced so many times, an image shows hardly anything of what saving it with losses has changed
AHEAD = 2  # photographs, or pairs, that are done ahead

Key = TypeVar("Key")
Value = TypeVar("Value")


def read_reduced(path: Path, longest: int = LONGEST) -> tuple[np.ndarray, float]:
    """Returns an image as `read_rgb` does, but at most `longest` pixels long, and how many times it was reduced.

    Raises BadInput, naming it, for a file that cannot be decoded.
    """
    try:
        with Image.open(path) as opened:
            full = opened.size
            if opened.format in ("JPEG", "MPO"):
                # The decoder computes only the low frequencies of a JPEG, which is several times faster.
                opened.draft("RGB", _fitting(full, longest))
                pixels = upright(np.asarray(_reduced(srgb(opened), full, longest)), orientation_of(opened))
            else:
                pixels = np.asarray(_reduced(Image.fromarray(read_rgb(path)), full, longest))
    except BadInput:
        raise
    except Exception as error:  # decoders raise all sorts of exceptions for damaged files
        raise BadInput(f"{path}: cannot be decoded ({first_line(error)}); replace or remove it") from error
    return pixels, max(1.0, max(full) / longest)


def read_reduced_pair(source: Path, target: Path, longest: int = LONGEST) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Returns source and target as `read_reduced` does, and how many times they were reduced. They differ only in the edit.

    Raises BadInput, naming it, for a file that cannot be decoded.
    """
    with Image.open(source) as opened:
        full = max(opened.size)
    if full >= AVERAGED * longest:
        (a, reduced), (b, _) = (read_reduced(path, longest) for path in (source, target))
        return (a, b), reduced
    a, b = (
        np.asarray(_reduced(Image.fromarray(image), (image.shape[1], image.shape[0]), longest))
        for image in read_pair(source, target)
    )
    return (a, b), max(1.0, full / longest)


def _reduced(image: Image.Image, full: tuple[int, int], longest: int) -> Image.Image:
    # The size follows from the file's, so that a pair's images have one size, whatever their decoders have reduced.
    width, height = _fitting(full, longest)
    if (full[0] > full[1]) != (image.width > image.height):  # an image that was turned upright
        width, height = height, width
    if (width, height) == image.size:
        return image
    halved = 2 * width <= image.width
    return image.resize((width, height), Image.Resampling.BOX if halved else Image.Resampling.HAMMING)


def _fitting(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Returns a size (width, height) reduced so that its longer side is at most `longest`."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def ahead(keys: Iterable[Key], work: Callable[[Key], Value]) -> Iterator[tuple[Key, Value]]:
    """Yields `(key, work(key))` in order. Threads do the next ones meanwhile."""
    waiting: collections.deque[tuple[Key, concurrent.futures.Future[Value]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for key in keys:
            waiting.append((key, pool.submit(work, key)))
            if len(waiting) > AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
