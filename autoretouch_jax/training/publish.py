"""The model as training has it now, and what is written of it: `model/`, `model-best/`, pictures of samples."""

import dataclasses
from typing import Any

import numpy as np

from autoretouch_jax.data import pipeline
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


def publish(trainer: Trainer, workdir: Any, state: State, folder: str) -> None:
    """Writes the model into a folder of the work directory, with the licences of all data that it was trained on."""
    if not processes.is_first():
        return
    licenses = [trainer.source.license, trainer.start_license(workdir)]
    data_license = "; ".join(dict.fromkeys(filter(None, licenses))) or None
    model = dataclasses.replace(current_model(trainer, state), data_license=data_license)
    save_model(workdir / folder, model, int(state.step))


def sample_examples(trainer: Trainer, faults: pipeline.Faults) -> dict[str, np.ndarray]:
    """Returns a few training crops, the same for the whole life of the run, so that pictures can be compared."""
    collected: list[dict[str, np.ndarray]] = []
    batches = pipeline.batches(trainer.source, trainer.config, 0, seed_offset=1, faults=faults, negatives=trainer.negatives)
    while sum(len(batch["source"]) for batch in collected) < SAMPLES:
        collected.append(next(batches))
    return {name: np.concatenate([batch[name] for batch in collected])[:SAMPLES] for name in collected[0]}


def sample(trainer: Trainer, state: State, path: Any, examples: dict[str, np.ndarray]) -> None:
    """Writes a picture: source, output, target and difference of each sample."""
    model = current_model(trainer, state)
    output = np.stack([retouch_array(model, image, faces="off") for image in examples["source"]])
    rows = report.comparison(examples["source"], output, examples["target"])
    report.save_picture(path, rows.reshape(-1, *rows.shape[2:]))
