"""`metrics.jsonl`, a line per logged step, and the measures of speed that go into it."""

import json
import time
from typing import Any

import jax
import numpy as np

from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.runtime import storage


class MetricsLog:
    """Appends one JSON object per logged step. On resume it drops the lines of steps that will be repeated.

    Of several processes only the first one writes; the logs of the others are `silent`.
    """

    def __init__(self, path: Any, resume_step: int, silent: bool = False) -> None:
        self.path, self.silent = path, silent
        self._lines: list[str] = []  # all lines of a file in an object store, where nothing can be appended
        if not silent and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resume_step]
            storage.write(path, "".join(line + "\n" for line in kept))
            self._lines = kept if is_remote(path) else []

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. It is in the file, or in the store, when this returns."""
        if self.silent:
            return
        if is_remote(self.path):
            self._lines.append(json.dumps(record))
            storage.write(self.path, "\n".join(self._lines) + "\n")
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a kill may have cut the last line
        return float("inf")


class Window:
    """The steps since the last logged line: their metrics, and the time they took and waited for input."""

    def __init__(self) -> None:
        self._metrics: list[dict[str, jax.Array]] = []
        self._steps = 0
        self._input_wait = 0.0
        self._started = time.perf_counter()

    def add_step(self, input_wait: float) -> None:
        """Counts a dispatched step, which waited so many seconds for its batch."""
        self._steps += 1
        self._input_wait += input_wait

    def add_metrics(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's metrics, which the devices may still be computing."""
        self._metrics.append(metrics)

    def newest(self) -> dict[str, jax.Array] | None:
        """The metrics added last, or None."""
        return self._metrics[-1] if self._metrics else None

    def close(self, batch: int, newest: dict[str, jax.Array]) -> dict[str, float]:
        """Returns the means of the metrics, and the speed with `batch` images a step, and starts a new window.

        `newest` is used where no step's metrics have been added yet.
        """
        now = time.perf_counter()
        fetched = jax.device_get(self._metrics or [newest])
        names = [name for name in fetched[0] if name != "stop"]
        means = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in names}
        seconds = now - self._started
        means["images_per_s"] = round(self._steps * batch / seconds, 3)
        means["input_wait_share"] = round(self._input_wait / seconds, 4)
        self._metrics, self._steps, self._input_wait, self._started = [], 0, 0.0, now
        return means
