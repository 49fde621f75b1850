"""Checks every pair by itself: in worker processes, with a limit on what is in memory, and whatever a decoder raises.

This module does not import JAX, so that a worker process stays small.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.audit import copies
from autoretouch_jax.audit.checks import CheckedPair, Reason, check_pair
from autoretouch_jax.audit.inputs import Pair
from autoretouch_jax.audit.journal import Section
from autoretouch_jax.errors import first_line
from autoretouch_jax.runtime.cores import cores
from autoretouch_jax.runtime.worker import end_with_parent

FEWEST_FOR_PROCESSES = 64  # number of pairs from which worker processes are worth their start
AHEAD = 2  # pairs given to the pool for each worker, so that none waits
SHARE = 25e6  # pixels of a pair that one worker may hold; a larger pair takes the shares of several workers

Packed = dict[str, Any]  # a checked pair as JSON


def check_all(pairs: Mapping[str, Pair], known: Section, workers: int) -> dict[str, CheckedPair]:
    """Returns what each pair shows by itself. `workers` is the number of processes, 0 for one per core."""
    packed = {name: known.get(name) for name in pairs}
    rest = {name: pair for name, pair in pairs.items() if packed[name] is None}
    progress = {"total": len(pairs), "initial": len(pairs) - len(rest), "desc": "checking", "unit": "pair"}
    with tqdm(**progress, dynamic_ncols=True, disable=None) as bar:
        for name, result in _results(rest, workers or cores()):
            packed[name] = known[name] = result
            bar.update()
    return {name: _unpack(packed.pop(name)) for name in pairs}


def _results(pairs: Mapping[str, Pair], workers: int) -> Iterator[tuple[str, Packed]]:
    """Yields the results as they come, in any order."""
    waiting = deque(pairs.items())
    while waiting:
        running: dict[Future[Packed], tuple[str, Pair]] = {}
        pool = _pool(workers, len(pairs))
        try:
            while waiting or running:
                while waiting and len(running) < AHEAD * workers:
                    running[pool.submit(check, *waiting[0])] = waiting[0]
                    waiting.popleft()
                done = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done
                # Results first, so that a failure does not lose what was ready with it.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    result = future.result()
                    yield running.pop(future)[0], result
        except BrokenExecutor:
            # A process has died: a decoder crashed, or the system ran out of memory. One of these pairs is the cause.
            for name, pair in running.values():
                yield name, _alone(name, pair)
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(name: str, pair: Pair) -> Packed:
    """Checks a pair in a process of its own, which it may take down with it."""
    with _processes(1) as pool:
        try:
            return pool.submit(check, name, pair).result()
        except BrokenExecutor:
            return _pack(_failed(name, pair, "the process that read it died: out of memory, or a fault of the decoder"))


def _pool(workers: int, pairs: int) -> Executor:
    if workers > 1 and pairs >= FEWEST_FOR_PROCESSES:
        return _processes(workers)
    # Pillow and NumPy release the GIL, so threads are enough for few pairs. Processes would take longer to start.
    return concurrent.futures.ThreadPoolExecutor(workers, initializer=_start, initargs=(_Shares(threading, workers),))


def _processes(workers: int) -> Executor:
    context = multiprocessing.get_context("spawn")  # a forked JAX can hang
    return concurrent.futures.ProcessPoolExecutor(workers, context, _start_process, (_Shares(context, workers),))


# ---- in a worker ------------------------------------------------------------------------------------------------------------


class _Shares:
    """Lets as many pairs be in memory as there are workers, and fewer when they are large. `context` makes its locks."""

    def __init__(self, context: Any, number: int) -> None:
        self._number, self._free, self._turn = number, context.Semaphore(number), context.Lock()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for a pair of images of this size."""
        taken = max(1, min(self._number, round(pixels / SHARE)))
        # One at a time: two pairs that each wait for the rest of their shares would wait for ever.
        with self._turn:
            for _ in range(taken):
                self._free.acquire()
        try:
            yield
        finally:
            for _ in range(taken):
                self._free.release()


_shares = _Shares(threading, 1)


def _start(shares: _Shares) -> None:
    global _shares
    _shares = shares


def _start_process(shares: _Shares) -> None:
    _start(shares)
    end_with_parent()


def check(name: str, pair: Pair) -> Packed:
    """Checks a pair. It raises nothing: whatever a decoder or a check raises becomes the pair's fault."""
    files: tuple[Path, ...] = ()
    try:
        with pair.files() as files, _shares.of(_pixels(files[0])):
            checked = check_pair(name, *files)
    except Exception as error:
        checked = _failed(name, pair, f"{type(error).__name__}: {first_line(error)}")
    # Temporary files have names that say nothing.
    for reason in checked.reasons:
        for path, shown in zip(files, pair.shown(), strict=False):
            reason.message = reason.message.replace(str(path), shown)
    return _pack(checked)


def _pixels(path: Path) -> int:
    # The headers themselves are checked later. A file without a readable one is not decoded.
    with contextlib.suppress(Exception), Image.open(path) as image:
        return image.width * image.height
    return 0


def _failed(name: str, pair: Pair, why: str) -> CheckedPair:
    checked = CheckedPair(name)
    source, target = pair.shown()
    checked.flag("unreadable", f"{source} or {target} cannot be checked ({why}); replace or remove it")
    return checked


def _pack(checked: CheckedPair) -> Packed:
    small = None if checked.thumbnail is None else copies.small(checked.thumbnail)
    packed = dataclasses.asdict(dataclasses.replace(checked, thumbnail=None))
    measures = {key: float(value) for key, value in checked.measures.items()}
    return packed | {"measures": measures, "thumbnail": None if small is None else base64.b64encode(small.tobytes()).decode()}


def _unpack(packed: Packed) -> CheckedPair:
    """Returns a checked pair whose thumbnail is `copies.small` of what the check made."""
    reasons = [Reason(**reason) for reason in packed["reasons"]]
    data = packed["thumbnail"]
    thumbnail = None if data is None else np.frombuffer(base64.b64decode(data), np.uint8)
    return CheckedPair(**packed | {"reasons": reasons, "thumbnail": thumbnail})
