"""The step as a program for a mesh: where each leaf of the state lives, the compiled step, and the shapes of its arguments.

A process keeps the programs that it used last, so that the trials of a sweep, which differ in scalars, share one.
"""

import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from autoretouch_jax.config import Config
from autoretouch_jax.config.resume import to_json
from autoretouch_jax.runtime import devices
from autoretouch_jax.training.scalars import Scalars, scalars, with_scalars, without_scalars
from autoretouch_jax.training.state import Networks, State, init_state, state_specs
from autoretouch_jax.training.step import train_step

KEPT = 4  # programs; a sweep may go back and forth between a few networks


class Step:
    """`step(state, batch, frozen) -> (state, metrics)`: a program with a run's scalars, compiled when it is first called."""

    def __init__(self, program: Any, shapes: State, scalars: Scalars) -> None:
        self.program, self._shapes, self._scalars = program, shapes, scalars
        self._compiling: threading.Thread | None = None

    def __call__(self, state: State, batch: Any, frozen: Any) -> tuple[State, dict[str, jax.Array]]:
        """Makes a step. The state's buffers are donated."""
        if self._compiling:
            self._compiling.join()
            self._compiling = None
        return self.program(state, batch, self.constants(frozen))

    def constants(self, frozen: Any) -> tuple[Any, Scalars]:
        """The program's third argument: what it reads and does not change."""
        return frozen, self._scalars

    def lower(self, state: Any, batch: Any, frozen: Any) -> Any:
        """Returns the program for arguments of these shapes, lowered and ready to be compiled."""
        return self.program.lower(state, batch, self.constants(frozen))

    def compile_ahead(self, batch: Any, frozen: Any) -> None:
        """Traces the step for batches of these shapes, and begins to compile it, or to read it from the cache, in a thread.

        Meanwhile the caller can read its state. Tracing is done when this returns, for it would hold Python's lock.
        """
        with _no_garbage_collection():
            lowered = self.lower(self._shapes, batch, frozen)

        def compile_it() -> None:
            # An error, such as too little memory, is raised again by the first step.
            with contextlib.suppress(Exception):
                lowered.compile()

        self._compiling = threading.Thread(target=compile_it, name="compile")
        self._compiling.start()


@dataclasses.dataclass(frozen=True)
class _Key:
    """What decides which program a step is. Two keys are equal when their texts and their meshes are."""

    text: str
    mesh: Mesh
    config: Config = dataclasses.field(compare=False)  # without scalars
    networks: Networks = dataclasses.field(compare=False)


def compiled_step(config: Config, networks: Networks, mesh: Mesh) -> tuple[State, Step]:
    """Returns the state's leaves as shapes with their shardings, and the step."""
    program = _program(_key(config, networks, mesh))
    return program.shapes, Step(program.step, program.shapes, devices.replicate(scalars(config), mesh))


def fresh_state(config: Config, networks: Networks, mesh: Mesh) -> State:
    """Returns the state of `init_state`, made by one program instead of many small ones."""
    return _program(_key(config, networks, mesh)).init(scalars(config)["train.seed"])


def lowered_step(config: Config, networks: Networks, frozen: Any, mesh: Mesh) -> Any:
    """Returns the step for a mesh whose devices need not be here, lowered and ready to be compiled. It makes no arrays."""
    program = _program(_key(config, networks, mesh))
    frozen, values = (_replicated(tree, mesh) for tree in (frozen, scalars(config)))
    batch = sharded_batch_shapes(config, mesh)
    return Step(program.step, program.shapes, values).lower(program.shapes, batch, frozen)


def sharded_batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a run's batches, with their shardings."""
    batch = batch_shapes(config, config.train.batch)
    return devices.abstract(batch, devices.batch_shardings(batch, mesh))


def batch_shapes(config: Config, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of so many images."""
    image = jax.ShapeDtypeStruct((images, config.data.crop, config.data.crop, 3), np.uint8)
    return {"source": image, "target": image, "weight": jax.ShapeDtypeStruct((images,), np.float32)}


def _key(config: Config, networks: Networks, mesh: Mesh) -> _Key:
    config = without_scalars(config)
    # As text, because a config file may hold lists, which have no hash. A VGG also depends on its file, so it is part of it.
    return _Key(f"{to_json(config)}{networks}", mesh, config, networks)


class _Program(NamedTuple):
    init: Callable[[np.ndarray], State]  # from the seed
    shapes: State
    step: Any  # step(state, batch, (frozen, scalars))


@functools.lru_cache(maxsize=KEPT)
def _program(key: _Key) -> _Program:
    config, networks, mesh = key.config, key.networks, key.mesh

    @jax.jit
    def init(seed: jax.Array) -> State:
        return init_state(with_scalars(config, {"train.seed": seed}), networks)

    def step(state: State, batch: Any, constants: tuple[Any, Scalars]) -> tuple[State, Any]:
        frozen, values = constants
        return train_step(state, batch, frozen, networks=networks, config=with_scalars(config, values))

    state = init.eval_shape(jax.ShapeDtypeStruct((), np.int32))
    specs = state_specs(state, mesh.size if config.parallel.optimizer_state == "sharded" else 1)
    shapes = devices.abstract(state, devices.shardings(specs, mesh))
    return _Program(init, shapes, devices.wrap_step(step, mesh, config.parallel.mode, specs))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects and hardly any cycles. Without searching for them it takes a sixth less time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _replicated(tree: Any, mesh: Mesh) -> Any:
    return devices.abstract(tree, jax.tree.map(lambda _: devices.replicated(mesh), tree))
