"""Where a run's compiled step is kept for later processes, and reading it while the rest of the program is imported.

This file imports neither networks nor data, so that reading can begin a second after the process.
"""

import contextlib
from pathlib import Path

from jax.sharding import Mesh

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.config.resume import in_its_precision, to_json
from autoretouch_jax.config.schema import LossConfig
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import devices, kept_programs, processes, storage
from autoretouch_jax.runtime.memory import keep_freed_memory
from autoretouch_jax.training.scalars import without_scalars


def kept(config: Config, mesh: Mesh, signature: str = "") -> kept_programs.Kept:
    """Returns the step of a run among the kept programs."""
    description = f"step {to_json(without_scalars(config))}{_vgg_file(config.loss)}"
    return kept_programs.Kept(description, list(mesh.devices.flat), signature)


def read_ahead(config: Config, workdir: str = "") -> None:
    """Begins to read a run's step in the background, where it is kept and the run has one process.

    `workdir` may hold the run already. Raises what JAX raises where a device cannot be started. Everything else is left to the
    run to say.
    """
    mesh = None
    with contextlib.suppress(Refused):
        validate(config)  # for a run that will be refused, reading would only put off its end
        if processes.alone(config.parallel):
            # Asked a second time after an error, JAX would go on with CPUs.
            mesh = devices.make_mesh(config.parallel, config.train.batch)
    if mesh is None:
        return
    with contextlib.suppress(Exception):
        stored = Path(workdir, "config.json")
        config = in_its_precision(config, stored) if stored.is_file() else config
        step = kept(devices.with_precision(resolve(config)), mesh)
        if step.is_there():
            keep_freed_memory()
            step.read_ahead()


def _vgg_file(loss: LossConfig) -> str:
    # The weights are arguments of the step, but how images are scaled for them is part of it.
    file = Path(loss.vgg_weights)
    return storage.stamp(file) if loss.perceptual_weight > 0 and file.is_file() else loss.vgg_weights
