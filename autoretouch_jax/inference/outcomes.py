"""What became of each photograph of a `retouch` job: the `--report` file, and the words at the end."""

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from autoretouch_jax.errors import summarise
from autoretouch_jax.runtime import storage

# `existing`: with --skip-existing, the result was there. `stopped`: a signal came before it was written.
Status = Literal["retouched", "unchanged", "existing", "failed", "skipped", "stopped"]
WRITTEN = ("retouched", "unchanged")


@dataclass(frozen=True)
class Outcome:
    """What became of one file. The share of pixels that changed is in [0, 1]; the time is that of one thread."""

    source: Path
    destination: Path | None
    status: Status
    faces: int | None = None
    """How many faces were edited; None where the network saw the whole photograph, or nothing."""
    changed: float | None = None
    seconds: float | None = None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """Returns the outcome as a line of the report holds it."""
        return {
            "source": str(self.source),
            "destination": None if self.destination is None else str(self.destination),
            "status": self.status,
            "faces": self.faces,
            "changed": self.changed,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "reason": self.reason,
        }


class Report:
    """The report's file: a line of JSON for each photograph, as soon as it is known. Threads may share it.

    Without a path nothing is written. `keep` keeps the lines of an earlier report whose results are still there, so that a job
    in several starts has one whole report. Raises Refused when the file cannot be written.
    """

    def __init__(self, path: Path | None, keep: bool) -> None:
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._kept: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        with storage.reachable(f"--report {path}"):
            if keep and path.is_file():
                self._kept = {record["destination"]: record for record in _written_records(path)}
            storage.write_output(path, "".join(map(_line, self._kept.values())))
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Writes the line of a file, unless an earlier start has, or a later one will."""
        known = outcome.status == "existing" and str(outcome.destination) in self._kept
        if self._file is None or known or outcome.status == "stopped":
            return
        with self._lock:
            self._file.write(_line(outcome.record()))
            self._file.flush()


def summary(outcomes: Sequence[Outcome], total: int, out: Path) -> None:
    """Prints what was not done and why, each file by its name, and how many photographs were written."""
    by_status: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_status[outcome.status].append(outcome)
    for outcome in by_status["failed"]:
        print(f"left out: {outcome.reason}", file=sys.stderr)
    if faceless := [outcome.source.name for outcome in outcomes if outcome.faces == 0]:
        print(f"no face found, written unchanged: {summarise(faceless)}; --faces off retouches a photograph as a whole")
    skipped: dict[str, list[str]] = defaultdict(list)
    for outcome in by_status["skipped"]:
        skipped[outcome.reason].append(outcome.source.name)
    for reason, names in skipped.items():
        print(f"skipped {len(names)} file(s), {reason}: {summarise(names)}")
    there = f", {len(by_status['existing'])} were there" if by_status["existing"] else ""
    written = sum(len(by_status[status]) for status in WRITTEN)
    print(f"{written} of {total} photo(s) written to {out}{there}")
    if by_status["stopped"]:
        print("stopped; the same command with --skip-existing does the rest", file=sys.stderr)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _written_records(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier report whose results are there. A line that was cut short by a kill is none of them."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["status"] in WRITTEN and Path(record["destination"]).is_file():
                records.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return records
