"""The step as a program for a mesh: where each leaf of the state lives, the compiled step, and its arguments' shapes."""

import functools
from typing import Any

import jax
import numpy as np

from autoretouch_jax import parallel
from autoretouch_jax.config import Config
from autoretouch_jax.training.state import Networks, State, init_state, state_specs
from autoretouch_jax.training.step import train_step


def compiled_step(config: Config, networks: Networks, mesh: Any) -> tuple[State, Any]:
    """Where each leaf of the state lives on the mesh, and `step(state, batch, frozen) -> (state, metrics)`, to be compiled."""
    specs = state_specs(_abstract(config, networks), mesh.size if config.parallel.optimizer_state == "sharded" else 1)
    step = functools.partial(train_step, networks=networks, config=config)
    return parallel.shardings(specs, mesh), parallel.wrap_step(step, mesh, config.parallel.mode, specs)


def lowered_step(config: Config, networks: Networks, frozen: Any, mesh: Any) -> Any:
    """The step for a mesh whose devices need not be here, lowered and ready to be compiled; no array is made for it."""
    shardings, step = compiled_step(config, networks, mesh)
    state = parallel.shapes(_abstract(config, networks), shardings)
    frozen = parallel.shapes(frozen, jax.tree.map(lambda _: parallel.replicated(mesh), frozen))
    batch = batch_shapes(config, config.train.batch)
    return step.lower(state, parallel.shapes(batch, parallel.split(batch, mesh)), frozen)


def batch_shapes(config: Config, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of so many images."""
    image = jax.ShapeDtypeStruct((images, config.data.crop, config.data.crop, 3), np.uint8)
    return {"source": image, "target": image, "weight": jax.ShapeDtypeStruct((images,), np.float32)}


def _abstract(config: Config, networks: Networks) -> State:
    return jax.eval_shape(lambda: init_state(config, networks))
