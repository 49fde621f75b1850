"""`metrics.jsonl`: what a run measured, a line per logged step."""

import json
from pathlib import Path
from typing import Any

from autoretouch_jax import files


class MetricsLog:
    """Appends one JSON object per logged step. On resume, lines of steps that will be made again are dropped.

    Of several processes only the first one writes; the others' logs are `silent`.
    """

    def __init__(self, path: Path, resume_step: int, silent: bool = False):
        self.path, self.silent = path, silent
        self._lines: list[str] = []  # of an object store's file, which cannot be appended to
        if not silent and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resume_step]
            files.write(path, "".join(line + "\n" for line in kept))
            self._lines = kept if files.is_remote(path) else []

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and flush it."""
        if self.silent:
            return
        if files.is_remote(self.path):
            self._lines.append(json.dumps(record))
            files.write(self.path, "\n".join(self._lines) + "\n")
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
        return float("inf")
