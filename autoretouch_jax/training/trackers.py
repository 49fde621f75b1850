"""TensorBoard, Weights & Biases and MLflow: copies of the logged metrics for those who watch runs there.

A tracker is never worth a run. Each one works in a thread of its own, so that a server that hangs does not stop the
training, and one that fails says so once and is left out from then on.
"""

import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.errors import first_line
from autoretouch_jax.runtime import storage
from autoretouch_jax.training.history import number

START_TIMEOUT, CLOSE_TIMEOUT = 30, 30  # seconds that a run waits at most, for all of its trackers together
WAITING = 1000  # records that a slow tracker may be behind
UPLOAD_EVERY = 60  # seconds between two uploads of the event file to an object store
PROJECT = "autoretouch"
FIXES = {
    "tensorboard": "free space on the disk, or make {workdir}/tensorboard a folder that can be written",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline and upload later with `wandb sync`",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers",
}

Values = dict[str, float | None]


class Tracker(Protocol):
    """What the three have in common. Its methods are called from one thread, and may raise anything."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs finite values of a step."""

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """Logs a picture, uint8 `[H, W, 3]`."""

    def close(self) -> None:
        """Makes sure that all that was logged has arrived."""


class Trackers:
    """The trackers of a run, for its first process only. No method raises, and none waits longer than half a minute.

    `names` are among `tensorboard`, `wandb` and `mlflow`. `warn` is called with one sentence for each tracker that fails.
    A run that resumes from `resume_step` continues what it logged; TensorBoard hides the later steps.
    """

    def __init__(
        self, workdir: Any, names: tuple[str, ...], config_json: dict[str, Any], warn: Callable[[str], None], resume_step: int
    ) -> None:
        kinds: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}

        def starter(name: str) -> Callable[[], Tracker]:
            # Looked up in the worker, so that a name without a tracker fails softly too.
            return lambda: kinds[name](workdir, config_json, resume_step)

        self._workers = [_Worker(name, str(workdir), starter(name), warn) for name in names]
        deadline = time.monotonic() + START_TIMEOUT
        for worker in self._workers:
            worker.wait_for_start(deadline)

    def write(self, step: int, values: Values) -> None:
        """Logs the values of a step. Those that are None or not finite are left out."""
        known = {name: number(value) for name, value in values.items()}
        finite = {name: float(value) for name, value in known.items() if value is not None}
        for worker in self._workers:
            worker.submit(lambda tracker: tracker.write(step, finite))

    def image(self, name: str, step: int, array: np.ndarray) -> None:
        """Logs a picture, uint8 `[H, W, 3]`, under a name."""
        for worker in self._workers:
            worker.submit(lambda tracker: tracker.image(name, step, array))

    def close(self) -> None:
        """Waits until all has arrived, but not for longer than half a minute."""
        deadline = time.monotonic() + CLOSE_TIMEOUT
        # All are told first: they finish side by side within the same half minute.
        for worker in self._workers:
            worker.submit(None)
        for worker in self._workers:
            worker.join(deadline)


class _Worker:
    """A tracker and its thread. Errors are kept there, and reported by the thread that calls `submit`."""

    def __init__(self, name: str, workdir: str, start: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._workdir, self._warn = name, workdir, warn
        self._jobs: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self._started, self._dropped = threading.Event(), False
        self._error: BaseException | None = None
        # A daemon: a server that never answers must not keep the process alive.
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def _work(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
            self._started.set()
            while (job := self._jobs.get()) is not None:
                job(tracker)
            tracker.close()
        # These libraries raise errors of their own, and wandb even SystemExit: none of them may end a run.
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    def wait_for_start(self, deadline: float) -> None:
        """Waits until the tracker is ready, has failed, or the time is over."""
        if not self._started.wait(max(0.0, deadline - time.monotonic())):
            self._drop(f"did not start within {START_TIMEOUT} s")
        self._check()

    def submit(self, job: Callable[[Tracker], None] | None) -> None:
        """Gives the thread something to do. None closes the tracker."""
        self._check()
        if self._dropped:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._drop(f"is {WAITING} records behind")

    def join(self, deadline: float) -> None:
        """Waits until the tracker is closed, has failed, or the time is over."""
        if not self._dropped:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._drop(f"did not finish within {CLOSE_TIMEOUT} s")
        self._check()

    def _check(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, ModuleNotFoundError):
            self._drop(f"needs {self._error.name}", f"pip install 'autoretouch-jax[{self._name}]'")
        elif isinstance(self._error, KeyError) and self._name not in FIXES:
            self._drop("is no known tracker", f"the trackers are {', '.join(FIXES)}")
        else:
            self._drop(f"failed ({first_line(self._error)})")

    def _drop(self, what: str, fix: str = "") -> None:
        """Gives the tracker up, and says so the first time."""
        if self._dropped:
            return
        self._dropped = True
        fix = fix or FIXES[self._name].format(workdir=self._workdir)
        self._warn(f"{self._name} {what}; the training goes on without it: {fix}")


# ---- the three --------------------------------------------------------------------------------------------------------------


class _TensorBoard:
    """An event file in `tensorboard/`, written without a thread of tensorboardX, whose errors could not be caught."""

    def __init__(self, workdir: Any, _config: dict[str, Any], resume_step: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._summary, self._event = summary, event_pb2.Event
        self._store = workdir / "tensorboard" if is_remote(workdir) else None
        # An object store cannot append: the file grows on this machine and is uploaded whole.
        folder = Path(tempfile.mkdtemp(prefix="tensorboard-")) if self._store else workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        # The suffix keeps two starts within a second from writing the same file.
        self._writer = EventsWriter(str(folder / "events"), f".{resume_step}.{os.getpid()}")
        self._path = (set(folder.iterdir()) - before).pop()
        self._uploaded = time.monotonic()
        # TensorBoard hides the events of earlier files from this step on, which will be repeated.
        if resume_step:
            status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=resume_step + 1, session_log=status))
        self._flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(step, self._summary.scalar(name, value))
        self._flush()

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        self._add(step, self._summary.image(name, image, dataformats="HWC"))
        self._flush()

    def close(self) -> None:
        self._writer.close()
        self._upload()

    def _add(self, step: int, summary: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def _flush(self) -> None:
        self._writer.flush()
        if time.monotonic() - self._uploaded > UPLOAD_EVERY:
            self._upload()

    def _upload(self) -> None:
        if self._store is not None:
            self._store.mkdir(parents=True, exist_ok=True)
            storage.write(self._store / self._path.name, self._path.read_bytes())
            self._uploaded = time.monotonic()


class _Wandb:
    """A run of Weights & Biases in the project WANDB_PROJECT, or `autoretouch`."""

    def __init__(self, workdir: Any, config: dict[str, Any], resume_step: int) -> None:
        import wandb

        # wandb reads the variable itself: offline and disabled runs need neither a key nor a server.
        offline = os.environ.get("WANDB_MODE", "online") != "online"
        # Without a key wandb would ask for one on the terminal, and wait.
        if not offline and not wandb.login(prompt=False):
            raise PermissionError("no API key")
        # No console and no git: the run's own output stays as it is, and nothing of the machine is uploaded.
        settings = wandb.Settings(
            init_timeout=START_TIMEOUT - 5,
            finish_timeout=CLOSE_TIMEOUT - 5,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
        )
        known = _run_id(workdir, "wandb", resume_step)
        folder = str(workdir) if not is_remote(workdir) else tempfile.mkdtemp(prefix="wandb-")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            dir=folder,
            id=known,
            resume="allow",
            config=config,
            settings=settings,
        )
        _keep_run_id(workdir, "wandb", self._run.id)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow in the experiment MLFLOW_EXPERIMENT_NAME, or `autoretouch`."""

    def __init__(self, workdir: Any, config: dict[str, Any], resume_step: int) -> None:
        # MLflow's own limits, two minutes and seven attempts a request, would hide for long that a server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        import mlflow

        self._client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self._id = _run_id(workdir, "mlflow", resume_step)
        if self._id is None:
            experiment = self._client.get_experiment_by_name(name)
            group = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self._id = self._client.create_run(group, run_name=workdir.name).info.run_id
            parameters = [mlflow.entities.Param(key, value[:500]) for key, value in _flat(config)]
            # The server takes at most 100 parameters at once.
            for first in range(0, len(parameters), 100):
                self._client.log_batch(self._id, params=parameters[first : first + 100])
            _keep_run_id(workdir, "mlflow", self._id)
        else:
            # The stop before this start has marked it as finished.
            self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()])

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        self._client.log_image(self._id, image, key=name, step=step)

    def close(self) -> None:
        # Without this the server would show a finished run as running.
        self._client.set_terminated(self._id)


def _run_id(workdir: Any, name: str, resume_step: int) -> str | None:
    """The run that an earlier start of this work directory opened, or None: a fresh start opens a new one."""
    path = workdir / "trackers.json"
    return json.loads(path.read_text()).get(name) if resume_step and path.is_file() else None


# wandb and MLflow start at the same time, and both add a line to the same file.
_ids = threading.Lock()


def _keep_run_id(workdir: Any, name: str, value: str) -> None:
    with _ids:
        path = workdir / "trackers.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        storage.write(path, json.dumps(known | {name: value}))


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in config.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return pairs
