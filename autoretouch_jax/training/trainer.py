"""The parts that a run needs before its first step: checked data, networks, and the step. Creating them writes nothing."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.config.validation import validate
from autoretouch_jax.data import pipeline
from autoretouch_jax.data.negatives import open_negatives
from autoretouch_jax.data.opening import open_source, typical_face_size
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.runtime import devices, processes, storage
from autoretouch_jax.training.checkpoints import read_discriminator
from autoretouch_jax.training.compilation import compiled_step, fresh_state, sharded_batch_shapes
from autoretouch_jax.training.manifest import Manifest, take_manifest
from autoretouch_jax.training.resuming import read_data
from autoretouch_jax.training.state import State, check_start, make_networks, start_from


class Trainer:
    """The parts of a run. `config.train` has its steps and its precision; `start` is the model it starts from, or None."""

    def __init__(self, config: Config, resumed: bool = False) -> None:
        """A `resumed` run restores its checkpoint, and does not read the model of `train.start_from`.

        Raises Refused when the config, the data, a weight file or the model do not fit.
        """
        validate(config)
        self.mesh = devices.make_mesh(config.parallel, config.train.batch)
        self.source, self.negatives = open_source(config.data), open_negatives(config.data)
        self.config = config = devices.with_precision(_with_steps(config, len(self.source)))
        start = None if resumed else config.train.start_from
        self.start = load_model(start) if start else None
        if self.start:
            check_start(self.start, config)
        self.networks, frozen = make_networks(config)
        # A model without its run, such as the one in the box, has no discriminator.
        has_discriminator = start and self.networks.discriminator
        self._start_discriminator = read_discriminator(storage.open_path(start) / "checkpoints") if has_discriminator else {}
        self.frozen = devices.replicate(frozen, self.mesh)
        self.shapes, self.step = compiled_step(config, self.networks, self.mesh)
        self.shardings = devices.shardings_of(self.shapes)

    @functools.cached_property
    def face_size(self) -> float | None:
        """The usual size of the faces that the network sees in training, in pixels, or None: see `typical_face_size`."""
        return typical_face_size(self.source, self.config.data)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The names and marks of all data, taken once for each start."""
        return take_manifest(self.source, self.negatives)

    def compile_ahead(self) -> None:
        """Begins to compile the step in the background."""
        batch = sharded_batch_shapes(self.config, self.mesh)
        if processes.count() > 1:
            batch["stop"] = batch["weight"]  # see `put`
        # What pmap compiles ahead, it would compile again when it is called.
        if self.config.parallel.mode == "jit":
            self.step.compile_ahead(batch, self.frozen)

    def start_license(self, workdir: Any) -> str | None:
        """The licence of the data that the model to start from was trained on, if any. A resumed run's `workdir` states it."""
        return self.start.data_license if self.start else read_data(workdir).get("start_license")

    def init(self) -> State:
        """Returns a fresh state on the devices. Its weights are those of the run or model to start from, if any."""
        state = fresh_state(self.config, self.networks, self.mesh)
        if self.start:
            state = start_from(state, self.start, self._start_discriminator, self.config)
        return devices.put(state, self.shardings)

    def batches(self, first_step: int, faults: pipeline.Faults | None = None) -> Iterator[Any]:
        """Yields this process's share of each batch, from a step on. Examples that cannot be read are noted in `faults`."""
        share = pipeline.Share(processes.index(), processes.count())
        return pipeline.batches(self.source, self.config, first_step, share=share, faults=faults, negatives=self.negatives)

    def put(self, batch: Any, stop_requested: bool = False) -> Any:
        """Puts this process's share of a batch on its devices.

        Among several processes the batch also says whether this one was asked to stop: see `agreed_to_stop` in `loop.py`.
        """
        if processes.count() > 1:
            batch = batch | {"stop": np.full(len(batch["source"]), stop_requested, np.float32)}
        return devices.shard_batch(batch, self.mesh, self.config.parallel.mode)


def _with_steps(config: Config, images: int) -> Config:
    """Fills in `train.steps` from `train.epochs`, where it is 0."""
    if config.train.steps:
        return config
    steps = math.ceil(config.train.epochs * images / config.train.batch)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
