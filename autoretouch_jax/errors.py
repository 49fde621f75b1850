"""Errors as the user sees them: exit statuses, the two exceptions, and the wording of their messages.

A message says what was wrong, names the file or the key, and says what to do.
"""

import contextlib
import difflib
from collections.abc import Iterator, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1  # some items failed; the rest is written
EXIT_REFUSED = 2  # refused before anything was started
EXIT_REQUEUE = 75  # stopped early with a checkpoint; EX_TEMPFAIL of sysexits.h, which schedulers restart on
EXIT_INTERRUPTED = 130  # interrupted from the keyboard: 128 + SIGINT, as shells report it

NAMED_FAULTS = 12  # faults that a message lists before it counts the rest


# Two exceptions for what a user can fix. Everything else but an OSError is a bug, and keeps its traceback.
class Refused(Exception):
    """The request cannot be carried out as given, and nothing has been started or written.

    The command line prints the message on one line and exits with status 2.
    """


class BadInput(Exception):
    """A file broke in the middle of a job. The job keeps what it has and exits with status 1."""


@contextlib.contextmanager
def needing(extra: str) -> Iterator[None]:
    """Refuses where the block imports a package of this extra that is not installed, and says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: pip install 'autoretouch-jax[{extra}]'") from error


def summarise(faults: Sequence[str]) -> str:
    """Joins the first faults of a list and counts the rest: `a, b, …, and 7 more`."""
    rest = f", and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
    return ", ".join(faults[:NAMED_FAULTS]) + rest


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns `; did you mean …?` with the known word closest to this one, or nothing where none is close."""
    # A cutoff of 0.5 finds `steps` for `stpes` and nothing for an unrelated word.
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, shortened; the name of its class where it has no message."""
    text = str(error).strip()
    return text.splitlines()[0][:limit] if text else type(error).__name__
