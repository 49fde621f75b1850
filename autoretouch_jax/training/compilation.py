"""The step as a program for a mesh: where each leaf of the state lives, the compiled step, and the shapes of its arguments.

A process keeps the programs that it used last, so that the trials of a sweep, which differ in scalars, share one.
"""

import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from autoretouch_jax.config import Config
from autoretouch_jax.config.resume import to_json
from autoretouch_jax.runtime import devices, kept_programs
from autoretouch_jax.training import kept_step
from autoretouch_jax.training.scalars import Scalars, scalars, with_scalars, without_scalars
from autoretouch_jax.training.state import Networks, State, init_state, state_specs
from autoretouch_jax.training.step import train_step

KEPT = 4  # programs; a sweep may go back and forth between a few networks


class Step:
    """`step(state, batch, frozen) -> (state, metrics)`: a program with a run's scalars, compiled when it is first called."""

    def __init__(self, program: "_Program", scalars: Scalars, config: Config) -> None:
        self.program, self._scalars, self._config = program, scalars, config
        self._ready: threading.Event | None = None

    def __call__(self, state: State, batch: Any, frozen: Any) -> tuple[State, dict[str, jax.Array]]:
        """Makes a step. The state's buffers are donated."""
        if self._ready:
            self._ready.wait()
        compiled, arguments = self.program.compiled, (state, batch, self.constants(frozen))
        if compiled is None:
            return self.program.step(*arguments)
        try:
            results = compiled(*arguments)
        except (TypeError, ValueError):
            # Arguments of other shapes or places, which are refused before any buffer is given away.
            return self.program.step(*arguments)
        except jax.errors.JaxRuntimeError:
            self._forget()
            raise
        if self._ready:
            self._ready = None
            threading.Thread(target=self._forget_if_it_fails, args=results[1:], name="first step").start()
        return results

    def _forget_if_it_fails(self, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step, whose errors are raised where its metrics are read."""
        try:
            jax.block_until_ready(metrics)
        except jax.errors.JaxRuntimeError:
            self._forget()

    def _forget(self) -> None:
        # If it is the kept program that is at fault, the next start must not read it again.
        if self.program.kept:
            self.program.kept.forget()

    def constants(self, frozen: Any) -> tuple[Any, Scalars]:
        """The program's third argument: what it reads and does not change."""
        return frozen, self._scalars

    def lower(self, state: Any, batch: Any, frozen: Any) -> Any:
        """Returns the program for arguments of these shapes, lowered and ready to be compiled."""
        return self.program.step.lower(state, batch, self.constants(frozen))

    def compile_ahead(self, batch: Any, frozen: Any) -> None:
        """Begins to compile the step for batches of these shapes, or to read it, in a thread.

        Meanwhile the caller can read its state. A step that must be traced has been traced when this returns, for tracing would
        hold Python's lock.
        """
        program = self.program
        if program.compiled:
            return
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (program.shapes, batch, self.constants(frozen)))
        signature = f"{program.networks}{shapes}{devices.CPU_OPTIONS}"  # a program's text does not have its options
        program.kept = kept = kept_step.kept(self._config, program.mesh, signature)
        if kept.is_there():
            self._begin(kept.read)
            return
        with _no_garbage_collection():
            lowered = self.lower(program.shapes, batch, frozen)
        if kept.is_there_as(lowered):
            self._begin(kept.read)
        else:
            self._begin(lambda: kept.compile(lowered), kept.write)

    def _begin(self, make: Callable[[], Any], then: Callable[[Any], None] = lambda _: None) -> None:
        """Makes the compiled program in a thread, and does something with it while the first step runs."""
        self._ready = ready = threading.Event()

        def work() -> None:
            try:
                # An error, such as too little memory, is raised again by the first step.
                with contextlib.suppress(Exception):
                    self.program.compiled = make()
            finally:
                ready.set()
            if self.program.compiled:
                then(self.program.compiled)

        threading.Thread(target=work, name="compile").start()


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
    return program.shapes, Step(program, devices.replicate(scalars(config), mesh), config)


def fresh_state(config: Config, networks: Networks, mesh: Mesh) -> State:
    """Returns the state of `init_state`, made by one program instead of many small ones."""
    return _program(_key(config, networks, mesh)).init(scalars(config)["train.seed"])


def lowered_step(config: Config, networks: Networks, frozen: Any, mesh: Mesh) -> Any:
    """Returns the step for a mesh whose devices need not be here, lowered and ready to be compiled. It makes no arrays."""
    program = _program(_key(config, networks, mesh))
    frozen, values = (_replicated(tree, mesh) for tree in (frozen, scalars(config)))
    batch = sharded_batch_shapes(config, mesh)
    return Step(program, values, config).lower(program.shapes, batch, frozen)


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


@dataclasses.dataclass
class _Program:
    networks: str  # as text
    mesh: Mesh
    init: Callable[[np.ndarray], State]  # from the seed
    shapes: State
    step: Any  # step(state, batch, (frozen, scalars))
    compiled: Any = None  # the same for the shapes of a run's batches; None until it is compiled or read
    kept: kept_programs.Kept | None = None  # among the programs kept for later processes


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
    return _Program(str(networks), mesh, init, shapes, devices.wrap_step(step, mesh, config.parallel.mode, specs))


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
