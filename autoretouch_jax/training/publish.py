"""The model as training has it now, and what is written of it: `model/`, `model-best/`, pictures of samples."""

import dataclasses
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from autoretouch_jax.data import pipeline
from autoretouch_jax.errors import first_line
from autoretouch_jax.evaluation import report
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.models.folder import Model, save_model
from autoretouch_jax.runtime import devices, processes
from autoretouch_jax.training.state import State
from autoretouch_jax.training.trainer import Trainer

SAMPLES = 6  # crops in a picture of samples


def current_model(trainer: Trainer, state: State) -> Model:
    """Returns the model as it is now: the generator's moving average, or its weights where there is none."""
    params, batch_stats = state.ema, state.ema_stats
    if params is None:
        params, batch_stats = state.generator.params, state.generator.batch_stats
    variables = devices.to_host({"params": params} | ({"batch_stats": batch_stats} if batch_stats else {}))
    threshold = getattr(trainer.source, "edit_threshold", 0.0)  # drawn blemishes are exact
    return Model(trainer.config.generator, variables, face_size=trainer.face_size, edit_threshold=threshold)


class Publisher:
    """Writes models into folders of the work directory in the background. Use it as a context manager: leaving it waits."""

    def __init__(self, trainer: Trainer, workdir: Any) -> None:
        self._trainer, self._workdir = trainer, workdir
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._writing: dict[str, Future[None]] = {}  # the newest write of each folder, until it has been checked

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._thread.shutdown()

    def publish(self, state: State, folder: str) -> None:
        """Copies the model off the devices, and begins to write it, with the licences of all data that it was trained on."""
        if not processes.is_first():
            return
        licenses = [self._trainer.source.license, self._trainer.start_license(self._workdir)]
        data_license = "; ".join(dict.fromkeys(filter(None, licenses))) or None
        model = current_model(self._trainer, state)
        # On a CPU host arrays share the state's memory. Without a copy the next step could not use it again.
        variables = jax.tree.map(np.array, model.variables)
        model = dataclasses.replace(model, variables=variables, data_license=data_license)
        futures.wait(self._writing.values())  # so that at most one copy of the model waits
        self._writing[folder] = self._thread.submit(save_model, self._workdir / folder, model, int(state.step))

    def check(self) -> None:
        """Raises OSError, once, for a folder whose newest write has failed."""
        for folder in [name for name, writing in self._writing.items() if writing.done()]:
            try:
                self._writing.pop(folder).result()
            except Exception as error:  # an object store has errors of its own
                raise OSError(f"{self._workdir / folder}: the model could not be written ({first_line(error)})") from error

    def wait(self) -> None:
        """Returns when everything published so far is written. Raises as `check` does."""
        futures.wait(self._writing.values())
        self.check()


def sample_examples(trainer: Trainer, faults: pipeline.Faults) -> dict[str, np.ndarray]:
    """Returns a few training crops, the same for the whole life of the run, so that pictures can be compared."""
    collected: list[dict[str, np.ndarray]] = []
    # Processes would take longer to start than these few crops take.
    parallel = dataclasses.replace(trainer.config.parallel, input_processes=0)
    config = dataclasses.replace(trainer.config, parallel=parallel)
    batches = pipeline.batches(trainer.source, config, 0, seed_offset=1, faults=faults, negatives=trainer.negatives)
    while sum(len(batch["source"]) for batch in collected) < SAMPLES:
        collected.append(next(batches))
    return {name: np.concatenate([batch[name] for batch in collected])[:SAMPLES] for name in collected[0]}


def sample(trainer: Trainer, state: State, path: Any, examples: dict[str, np.ndarray]) -> None:
    """Writes a picture: source, output, target and difference of each sample."""
    model = current_model(trainer, state)
    output = np.stack([retouch_array(model, image, faces="off") for image in examples["source"]])
    rows = report.comparison(examples["source"], output, examples["target"])
    report.save_picture(path, rows.reshape(-1, *rows.shape[2:]))
