"""What a run writes for people to read: metrics, events, validations, pictures and the report. None of it can end a run.

The files in the work directory, all written by the first process:

* `metrics.jsonl`, a line per logged step; `validation.jsonl`, one per validation; `events.jsonl`, one per event.
* `validation/NAME/`: source, target, and the output at each validation.
* `report.html`, and `tensorboard/`.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from autoretouch_jax.config import Config
from autoretouch_jax.errors import first_line
from autoretouch_jax.evaluation import report as pictures
from autoretouch_jax.runtime import processes
from autoretouch_jax.training.log import MetricsLog
from autoretouch_jax.training.report import write_report
from autoretouch_jax.training.trackers import Trackers
from autoretouch_jax.training.verdicts import Line, Verdict, judge

REPORT_EVERY = 60.0  # seconds between two reports, at least: a run of 100,000 steps would write thousands


class Journal:
    """The journal of a run, from a step on. In the other processes it does nothing."""

    def __init__(self, workdir: Any, config: Config, step: int) -> None:
        self.workdir, self.config, self.active = workdir, config, processes.is_first()
        self._config_json = json.loads(json.dumps(dataclasses.asdict(config)))
        self._failed: set[str] = set()
        self._said: list[Verdict] = []
        self._reported = 0.0
        self.lines: list[Line] = []
        if not self.active:
            return
        with self.softly("metrics.jsonl"):
            self._metrics = MetricsLog(workdir / "metrics.jsonl", step)
            self.lines = self._metrics.records()
        with self.softly("validation.jsonl"):
            self._validations = MetricsLog(workdir / "validation.jsonl", step)
        self._trackers = Trackers(workdir, config.train.trackers, self._config_json, self._warn, step)

    def rewind(self, step: int) -> None:
        """Drops what was written about steps after this one, to which the run has gone back. Events stay."""
        if not self.active:
            return
        self.lines = [line for line in self.lines if line["step"] <= step]
        with self.softly("metrics.jsonl"):
            self._metrics = MetricsLog(self.workdir / "metrics.jsonl", step)
        with self.softly("validation.jsonl"):
            self._validations = MetricsLog(self.workdir / "validation.jsonl", step)

    def event(self, step: int, kind: str, text: str, level: str = "note") -> None:
        """Adds an event, and prints it where it is more than a note."""
        if not self.active:
            return
        with self.softly("events.jsonl"):
            record = {"step": step, "time": round(time.time(), 3), "kind": kind, "text": text, "level": level}
            MetricsLog(self.workdir / "events.jsonl", None).write(record)
        if level in ("warning", "bad"):
            tqdm.write(f"step {step}: {text}", file=sys.stderr)

    def metrics(self, record: Line) -> None:
        """Adds a line of metrics."""
        if not self.active:
            return
        # A year of training would not fit into memory; the verdicts look at the last lines only.
        self.lines = [*self.lines[-2000:], record]
        with self.softly("metrics.jsonl"):
            self._metrics.write(record)
        self._trackers.write(record["step"], {key: value for key, value in record.items() if key != "step"})

    def validation(self, row: Line) -> None:
        """Adds a validation."""
        if not self.active:
            return
        with self.softly("validation.jsonl"):
            self._validations.write(row)
        both: dict[str, float | None] = {}
        for prefix, values in (("validation/", row["model"]), ("validation/identity_", row["identity"])):
            both |= {prefix + key: value for key, value in values.items() if isinstance(value, float)}
        self._trackers.write(row["step"], both)
        if row["best"]:
            score = pictures.cell(row["metric"], row["model"])
            self.event(row["step"], "best", f"The best validation so far: {row['metric']} {score}.", "good")

    def preview(self, step: int, name: str, source: np.ndarray, output: np.ndarray, target: np.ndarray) -> None:
        """Keeps a small picture of a validation image's output, and, the first time, of source and target."""
        if not self.active:
            return
        with self.softly("validation/"):
            folder = self.workdir / "validation" / name.replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            for file, image in (("source", source), ("target", target)):
                if not (folder / f"{file}.webp").exists():
                    pictures.save_preview(folder / f"{file}.webp", image)
            pictures.save_preview(folder / f"{step:08d}.webp", output)

    def verdicts(self, step: int, rows: Sequence[Line]) -> None:
        """Says how the run is doing, where that has changed."""
        if not self.active:
            return
        verdicts = judge(self.lines, rows, self.config)
        # The figures in a sentence change all the time. What it is about is in its first words.
        if [(v.level, v.text[:24]) for v in verdicts] != [(v.level, v.text[:24]) for v in self._said]:
            for verdict in verdicts:
                self.event(step, "verdict", verdict.text, verdict.level)
            self._said = verdicts

    def report(self, always: bool = False) -> None:
        """Renews the report, once a minute at most."""
        if not self.active or (not always and time.monotonic() - self._reported < REPORT_EVERY):
            return
        with self.softly("report.html"):
            write_report(self.workdir, self._config_json)
        self._reported = time.monotonic()

    def close(self) -> None:
        """Writes the last report and closes the trackers."""
        self.report(always=True)
        if self.active:
            self._trackers.close()

    @contextlib.contextmanager
    def softly(self, name: str) -> Iterator[None]:
        """Says once, and only says, that a file could not be written."""
        try:
            yield
        except Exception as error:  # whatever it is, a run of days must not end for a picture
            if name not in self._failed:
                self._failed.add(name)
                self._warn(f"{self.workdir / name} could not be written ({first_line(error)}); training goes on without it")

    def _warn(self, text: str) -> None:
        tqdm.write(f"autoretouch: {text}", file=sys.stderr)


def read_rows(path: Any) -> list[Line]:
    """Returns the JSON lines of a file; [] where there is none. A cut line is left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows
