"""What a run has written into its work directory, read back for its report and for comparisons.

A run may be killed while it writes, and somebody may look while it trains. So a file that is missing or cut never raises:
what can be read is returned.
"""

import json
import math
import numbers
from dataclasses import dataclass
from typing import Any

Points = list[tuple[float, float | None]]  # of a curve: step and value; None where the value was not finite
ENDINGS = ("stopped", "done", "gave_up")  # kinds of event after which the run no longer trains


@dataclass(frozen=True)
class History:
    """A run's files. Records come in the order of their steps, one for each step."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    license: str | None

    @property
    def step(self) -> int:
        """The newest step that any file names."""
        return int(max((record["step"] for record in [*self.metrics, *self.validations, *self.events]), default=0))

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """All verdicts of the newest step that has any."""
        verdicts = [event for event in self.events if event.get("kind") == "verdict"]
        newest = max((event["step"] for event in verdicts), default=0)
        return [event for event in verdicts if event["step"] == newest]

    @property
    def ending(self) -> dict[str, Any] | None:
        """The event with which the run ended, or None: it trains, or it was killed."""
        last = [event for event in self.events if event.get("kind") in ("started", "resumed", *ENDINGS)][-1:]
        return last[0] if last and last[0]["kind"] in ENDINGS else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The best validation so far, or None."""
        return next((record for record in reversed(self.validations) if record.get("best")), None)

    def curve(self, key: str) -> Points:
        """The values of a metric of `metrics.jsonl`. Lines without it are left out."""
        return [(record["step"], number(record[key])) for record in self.metrics if key in record]

    def validation(self, key: str, row: str = "model") -> Points:
        """The values of a metric of the validations, of the row `model` or `identity`."""
        found = [(record["step"], scores(record, row)) for record in self.validations]
        return [(step, number(values[key])) for step, values in found if key in values]

    def last(self, key: str) -> float | None:
        """The newest finite value of a metric of `metrics.jsonl`, or None."""
        return next((value for _, value in reversed(self.curve(key)) if value is not None), None)


def read(workdir: Any) -> History:
    """Returns what can be read in a work directory, a `Path` or one in an object store."""
    events = records(workdir / "events.jsonl")
    license = _object(workdir / "model" / "model.json").get("data_license")
    return History(
        _object(workdir / "config.json"),
        _one_for_each_step(records(workdir / "metrics.jsonl")),
        _one_for_each_step(records(workdir / "validation.jsonl")),
        sorted(events, key=lambda event: event["step"]),
        str(license) if license else None,
    )


def records(path: Any) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines that name their step. Other lines, such as a cut one, are left out."""
    found = []
    for line in text(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a kill may have cut the last line
            continue
        if isinstance(record, dict) and number(record.get("step")) is not None:
            found.append(record)
    return found


def text(path: Any) -> str:
    """Returns the text of a file, or nothing where it cannot be read."""
    return (read_bytes(path) or b"").decode(errors="replace")


def read_bytes(path: Any) -> bytes | None:
    """Returns the bytes of a file, or None where it cannot be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except Exception:  # an object store raises errors of its own; a report is never worth a run
        return None


def number(value: Any) -> float | None:
    """Returns a finite number as it is, and None for anything else."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def scores(validation: dict[str, Any], row: str) -> dict[str, Any]:
    """Returns the metrics of a row of a validation, `model` or `identity`."""
    values = validation.get(row)
    return values if isinstance(values, dict) else {}


def items(validation: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Returns the images or the photographs to be left alone of a validation, those with a name."""
    listed = (validation or {}).get(key)
    found = listed if isinstance(listed, list) else []
    return [item for item in found if isinstance(item, dict) and isinstance(item.get("name"), str)]


def _object(path: Any) -> dict[str, Any]:
    try:
        value = json.loads(text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _one_for_each_step(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # A run that was killed repeats steps when it resumes: the newest line of a step holds.
    return [record for _, record in sorted({record["step"]: record for record in found}.items())]
