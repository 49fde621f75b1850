"""Being asked to stop: SIGTERM, SIGINT or the end of the time given, noted so that what runs can finish its step and save.

Nothing heavy is imported here, so that a signal is caught from a command's first moment on.
"""

import contextlib
import re
import signal
import time
from typing import Any

from autoretouch_jax.errors import Refused

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_REQUEUE, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered, as often as one likes. A second SIGINT stops at once.

    `max_seconds` counts from its making; 0 is without end.
    """

    def __init__(self, max_seconds: float = 0.0) -> None:
        self._noted: int | None = None
        self._ends = time.monotonic() + max_seconds if max_seconds else float("inf")
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> "StopRequest":
        self._depth += 1
        if self._depth > 1:
            return self
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self._noted == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        self._noted = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE

    @property
    def exit_code(self) -> int | None:
        """The exit status asked for, or None to go on."""
        if self._noted is None and time.monotonic() > self._ends:
            self._noted = EXIT_REQUEUE
        return self._noted


def seconds(text: str) -> float:
    """`11h50m`, `90m`, `45s` or plain seconds as a number. Raises Refused for anything else."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise Refused(f"{text}: not a time; write it as 11h50m, 90m, 45s or a number of seconds")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
