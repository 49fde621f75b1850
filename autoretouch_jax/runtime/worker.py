"""What a worker process does at its start, so that it ends when its parent does and not before. JAX is not imported here."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

_siblings = 1


def start(total: int) -> None:
    """Makes this process one of `total` workers that end with their parent, and only with it.

    SIGINT and SIGTERM are ignored. A terminal or a scheduler sends them to all processes, and the parent needs its workers
    until it has stopped.
    """
    global _siblings
    _siblings = total
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


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
