"""The starts of a run that led nowhere: launchers start a stopped run again, and someone must tell them when to give up.

The launchers set AUTORETOUCH_GIVE_UP. Then `starts.json` in the work directory holds the step of the newest checkpoint when the
run was last started, and how many starts in a row have begun at that step.
"""

import json
import os
from typing import Any

from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import processes, storage

VARIABLE = "AUTORETOUCH_GIVE_UP"  # how many starts in a row may make no checkpoint
FILE = "starts.json"


def note_start(workdir: Any, step: int, timeout: float, until: int | None = None) -> None:
    """Records a start from the checkpoint of `step` (0: none), or raises Refused after too many from the same step.

    Process 0 reads and writes. Every process must call this, once in a run, and all raise Refused together. Without the
    variable nothing is written, nor for a run that ends at step `until` and has reached it.
    """
    refusal = ""
    # A finished run makes no checkpoint, however often it is started.
    finished = until is not None and step >= until
    if processes.is_first() and not finished and (limit := _limit()):
        with storage.reachable(f"--workdir {workdir}"):
            refusal = _record(workdir, step, limit)
    # The other processes do not look: they may see an older file, and all must decide alike.
    if refusal := processes.gather("starts without a checkpoint", refusal, timeout)[0]:
        raise Refused(refusal)


def _limit() -> int:
    """The value of the variable; 0 where it is not set."""
    text = os.environ.get(VARIABLE, "")
    # A typing error must not turn the count off: the run would be started again without end.
    if text and not (text.isdecimal() and int(text)):
        raise Refused(f"{VARIABLE}={text}: must be a number of starts, at least 1; leave it out to try again without end")
    return int(text or 0)


def _record(workdir: Any, step: int, limit: int) -> str:
    """Counts this start in the file. Returns the refusal, and leaves the file as it is, where there were `limit` before it."""
    # Steps only grow, so the same step means that no start since then has written a checkpoint.
    before = _earlier_starts(workdir / FILE, step)
    if before >= limit:
        return (
            f"--workdir {workdir}: {before} start(s) in a row began at step {step}, and none of them wrote a checkpoint; the "
            f"last log says why. To try again, delete {workdir / FILE}, or choose another --workdir"
        )
    storage.write(workdir / FILE, json.dumps({"step": step, "starts": before + 1}) + "\n")
    return ""


def _earlier_starts(path: Any, step: int) -> int:
    """How many starts in a row have begun at this step before. A damaged file counts as none."""
    if not path.is_file():
        return 0
    # Whoever cannot be counted is let in: a start too many does less harm than a run that cannot be started.
    try:
        stored = json.loads(path.read_text())
        return int(stored["starts"]) if stored["step"] == step else 0
    except (ValueError, KeyError, TypeError):
        return 0
