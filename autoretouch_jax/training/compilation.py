"""The step as a program for a mesh: where each leaf of the state lives, the compiled step, and the shapes of its arguments."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from autoretouch_jax.config import Config
from autoretouch_jax.runtime import devices
from autoretouch_jax.training.state import Networks, State, init_state, state_specs
from autoretouch_jax.training.step import train_step


def compiled_step(config: Config, networks: Networks, mesh: Mesh) -> tuple[State, Any]:
    """Returns the sharding of each leaf of the state, and `step(state, batch, frozen) -> (state, metrics)`.

    The step is compiled when it is first called.
    """
    specs = state_specs(_abstract_state(config, networks), _optimizer_shards(config, mesh.size))
    step = functools.partial(train_step, networks=networks, config=config)
    return devices.shardings(specs, mesh), devices.wrap_step(step, mesh, config.parallel.mode, specs)


def _optimizer_shards(config: Config, device_count: int) -> int:
    return device_count if config.parallel.optimizer_state == "sharded" else 1


def lowered_step(config: Config, networks: Networks, frozen: Any, mesh: Mesh) -> Any:
    """Returns the step for a mesh whose devices need not be here, lowered and ready to be compiled. It makes no arrays."""
    shardings, step = compiled_step(config, networks, mesh)
    state = devices.abstract(_abstract_state(config, networks), shardings)
    frozen = devices.abstract(frozen, jax.tree.map(lambda _: devices.replicated(mesh), frozen))
    batch = batch_shapes(config, config.train.batch)
    return step.lower(state, devices.abstract(batch, devices.batch_shardings(batch, mesh)), frozen)


def batch_shapes(config: Config, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of so many images."""
    image = jax.ShapeDtypeStruct((images, config.data.crop, config.data.crop, 3), np.uint8)
    return {"source": image, "target": image, "weight": jax.ShapeDtypeStruct((images,), np.float32)}


def _abstract_state(config: Config, networks: Networks) -> State:
    return jax.eval_shape(lambda: init_state(config, networks))
