"""The request to stop: SIGTERM, SIGINT or the end of `--max-time`, noted so that a run can finish its step and save.

Nothing heavy is imported here, so that a signal is caught from a command's first moment on.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from autoretouch_jax.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, Refused


class StopRequest:
    """Records SIGTERM and SIGINT within its `with` block, which may be nested. A second SIGINT stops at once.

    `max_seconds` counts from the creation of the object; 0 means no limit.
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        self._requested: int | None = None
        self._deadline = time.monotonic() + max_seconds if max_seconds else float("inf")
        self._previous_handlers: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> "StopRequest":
        # The command enters it before the imports, and the loop enters it again: only the outermost block sets handlers.
        self._depth += 1
        if self._depth == 1:
            with contextlib.suppress(ValueError):  # outside the main thread, the caller handles signals
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Whoever presses Ctrl-C twice does not want to wait for the step and the checkpoint.
        if number == signal.SIGINT and self._requested == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        self._requested = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE

    @property
    def exit_code(self) -> int | None:
        """The exit status to stop with, or None to go on."""
        if self._requested is None and time.monotonic() > self._deadline:
            self._requested = EXIT_REQUEUE
        return self._requested


@contextlib.contextmanager
def requeue_on_sigterm() -> Iterator[None]:
    """Exits with status 75 on SIGTERM while nothing has been started, so that nothing needs saving.

    A scheduler may stop a job while Python is still importing; without this it would count as a crash.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # outside the main thread, the caller handles signals
            previous = signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_REQUEUE))
            stack.callback(signal.signal, signal.SIGTERM, previous)
        yield


def parse_duration(text: str) -> float:
    """Returns the seconds in a duration such as `11h50m`, `90m`, `45s` or `45`. Raises Refused for anything else."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise Refused(f"{text}: not a time; write it as 11h50m, 90m, 45s or a number of seconds")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
