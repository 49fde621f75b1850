"""What a worker process does at its start, so that it ends when its parent does and not before.

This module does not import JAX. Workers may, but they use no device.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # those that a terminal or a scheduler sends to all processes of a run

_siblings = 1


def start(total: int) -> None:
    """Makes this process one of `total` workers that end with their parent, and only with it.

    SIGINT and SIGTERM are ignored, because the parent needs its workers until it has stopped.
    """
    global _siblings
    _siblings = total
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Lets this thread, and the processes that it starts within the block, get SIGINT and SIGTERM only at its end.

    A worker that a signal ended while it imports would leave its parent waiting for ever.
    """
    # It lets the signals through when it starts, which the first worker would have it do.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def siblings() -> int:
    """How many workers share what this process may use, itself included. 1 where it is no worker."""
    return _siblings


def end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, however that came about."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    # The workers of a killed process would otherwise wait for ever for what it wants next.
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)
