"""`metrics.jsonl`, a line per logged step, and the measures of speed that go into it."""

import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.runtime import storage

UNLOGGED = ("stop", "guard/trouble", "guard/good")  # metrics for the loop alone


class MetricsLog:
    """Appends one JSON object per logged step. On resume it drops the lines of steps that will be repeated."""

    def __init__(self, path: Any, resume_step: int | None) -> None:
        """With a `resume_step` of None every line is kept."""
        self.path = path
        self._lines: list[str] = []  # all lines of a file in an object store, where nothing can be appended
        if not path.exists() or (resume_step is None and not is_remote(path)):
            return
        lines = path.read_text().splitlines()
        kept = lines if resume_step is None else [line for line in lines if _step(line) <= resume_step]
        if kept != lines:
            storage.write(path, "".join(line + "\n" for line in kept))
        self._lines = kept if is_remote(path) else []

    def records(self) -> list[dict[str, Any]]:
        """Returns what the file holds now."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. It is in the file, or in the store, when this returns. Values that are not finite become null."""
        line = json.dumps(_finite(record), allow_nan=False)
        if is_remote(self.path):
            self._lines.append(line)
            storage.write(self.path, "\n".join(self._lines) + "\n")
            return
        with self.path.open("a") as file:
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    # NaN is not JSON: a program that reads the file would fail at it.
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a kill may have cut the last line
        return float("inf")


class DeviceClock:
    """Notes when each step was done, in a thread of its own, because asking would make the host wait."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clock")

    def when_done(self, metrics: dict[str, jax.Array]) -> "Future[float]":
        """Returns the moment, still to come, at which a dispatched step is done."""
        return self._thread.submit(_wait, metrics)

    def close(self) -> None:
        """Ends the thread. Steps that are not done are not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _wait(metrics: dict[str, jax.Array]) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


class Window:
    """The steps since the last logged line: their metrics, and the time they took and the devices waited for input."""

    def __init__(self) -> None:
        self._metrics: list[dict[str, jax.Array]] = []
        self._waits: list[tuple[float, float, Future[float] | None]] = []
        self._started = time.perf_counter()

    def add_step(self, asked: float, arrived: float, previous: "Future[float] | None") -> None:
        """Counts a step, whose batch was asked for and arrived then. `previous` is when the step before is done."""
        self._waits.append((asked, arrived, previous))

    def add_metrics(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's metrics, which the devices may still be computing."""
        self._metrics.append(metrics)

    def newest(self) -> dict[str, jax.Array] | None:
        """The metrics added last, or None."""
        return self._metrics[-1] if self._metrics else None

    def close(self, batch: int, newest: dict[str, jax.Array]) -> dict[str, float]:
        """Returns the means of the metrics, and the speed with `batch` images a step, and starts a new window.

        `newest` is used where no step's metrics have been added yet. Values that are not finite are left out of a mean; a
        metric without a finite value is NaN.
        """
        now = time.perf_counter()
        fetched = jax.device_get(self._metrics or [newest])
        names = [name for name in fetched[0] if name not in UNLOGGED]
        means = {name: _mean_of_finite([metrics[name] for metrics in fetched]) for name in names}
        if "guard/skipped" in means:  # a count, of which the last one is wanted
            means["guard/skipped"] = float(fetched[-1]["guard/skipped"])
        seconds = now - self._started
        means["images_per_s"] = round(len(self._waits) * batch / seconds, 3)
        means["input_wait_share"] = round(sum(map(_stood_still, self._waits)) / seconds, 4)
        self._metrics, self._waits, self._started = [], [], now
        return means


def _stood_still(wait: tuple[float, float, "Future[float] | None"]) -> float:
    """The seconds for which the devices had nothing to do while the host waited for a batch."""
    asked, arrived, previous = wait
    # The host waits while the step before is still computed, too. That costs nothing.
    done = previous.result() if previous else asked
    return max(0.0, arrived - max(asked, done))


def _mean_of_finite(values: list[Any]) -> float:
    finite = [float(value) for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
