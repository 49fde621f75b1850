"""Computes in threads, ahead of whoever takes the results: in order, with a bounded look-ahead and bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from autoretouch_jax.runtime.cores import cores

MOST_THREADS = 8
LOOK_AHEAD = 2  # items that are taken early, in units of the threads: one photograph may take much longer than its neighbours

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """Returns how many photographs are worked on at once: one for each core, and one that waits for the devices."""
    return min(MOST_THREADS, cores() + 1)


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Yields `function(item)` of every item, in order. Threads compute a few results ahead, and no item is taken earlier.

    What the function or the items raise is raised here in its turn, and ends the iteration.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads(), "retouch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                # A result that is ready is not held back until the next item comes: items may come slowly.
                while waiting and (waiting[0].done() or len(waiting) > LOOK_AHEAD * threads()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Room:
    """A number of units, pixels for example, that threads share. Whoever wants more than are free waits for them."""

    def __init__(self, units: int) -> None:
        self._all = self._free = units
        self._turn = threading.Lock()
        self._given_back = threading.Condition()

    @contextmanager
    def taken(self, units: int | None) -> Iterator[None]:
        """Takes units for the time of the block. None, and more than there are, takes all of them."""
        wanted = self._all if units is None else min(units, self._all)
        # One after another: else a large photograph would wait for as long as small ones come.
        with self._turn, self._given_back:
            self._given_back.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._given_back:
                self._free += wanted
                self._given_back.notify_all()
