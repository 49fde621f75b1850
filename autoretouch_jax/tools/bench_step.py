"""`autoretouch bench step`, `infer` and `e2e`: how fast this machine trains and retouches, beside its own ceiling.

Only `e2e` reads data. Times are medians of single steps, each waited for, after a warm-up. A step's FLOPs are counted on its
trace (`planning/gpu.py`). The ceiling is the speed of a product of two large matrices, measured in the same run in the type
that the network computes in.
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import EXIT_DONE, Refused
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.planning import gpu
from autoretouch_jax.planning.plan import plannable
from autoretouch_jax.runtime import devices, memory, storage
from autoretouch_jax.tools.operations import dearest_operations, operation_origins
from autoretouch_jax.training.compilation import batch_shapes, compiled_step, fresh_state
from autoretouch_jax.training.state import make_networks

WARM_UP = 3  # steps that are not counted: the first ones allocate memory and choose algorithms
PROFILED = 3  # steps in a trace; a trace of more is slow to open
# Sides of the matrices whose product is the ceiling: large enough to fill the device, small enough to take a second.
CEILING_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
CEILING_ROUNDS = 10


def step(config: Config, steps: int, profile: Path | None, out: Path | None) -> int:
    """Prints the figures of `autoretouch bench step` on one JSON line, and appends the line to `out`, if given."""
    # The figures are for this machine: a plan ignores how the config spreads the step.
    config = devices.with_precision(dataclasses.replace(plannable(config), parallel=config.parallel))
    compiled, once, compile_seconds = ready_step(config)
    seconds = _timed(once, steps)
    flops = gpu.estimate(config, devices.make_mesh(config.parallel, config.train.batch).size)["flops"]
    figures = {
        "bench": "step",
        "network": config.generator.network,
        "crop": config.data.crop,
        "batch": config.train.batch,
        **_speed(seconds, config.train.batch),
        "compile_seconds": compile_seconds,
        **_utilisation(flops, statistics.median(seconds), config.train.precision),
        **_machine(config.train.precision),
    }
    _finish(figures, out)
    return _trace(compiled, once, profile) if profile else EXIT_DONE


def ready_step(config: Config) -> tuple[Any, Callable[[], None], float]:
    """Returns the compiled step, a function that makes one step on noise and waits for it, and the seconds of compiling."""
    validate(config)
    memory.keep_freed_memory()  # as training does
    mesh = devices.make_mesh(config.parallel, config.train.batch)
    networks, frozen = make_networks(config)
    shapes, run_step = compiled_step(config, networks, mesh)
    constants = run_step.constants(devices.replicate(frozen, mesh))
    batch = devices.shard_batch(_noise(config), mesh, config.parallel.mode)
    state = devices.put(fresh_state(config, networks, mesh), devices.shardings_of(shapes))
    compiled, compile_seconds = _compiled(run_step.program.step, state, batch, constants)

    def once() -> None:
        nonlocal state
        # The step gives its buffers away, so each call takes the state that the last one returned.
        state, metrics = compiled(state, batch, constants)
        jax.block_until_ready(metrics)

    return compiled, once, compile_seconds


def infer(config: Config, sizes: Sequence[int], steps: int, profile: Path | None, out: Path | None) -> int:
    """Prints the figures of `autoretouch bench infer`, one JSON line for each size, and appends the lines to `out`, if given.

    The generator's weights are random. It runs on one device, on one square image of each size, in the config's type, or in
    float32 where that is `auto`.
    """
    config = plannable(config)
    grid, precision = config.generator.grid, config.train.precision
    if precision == "auto":
        precision = "float32"  # as in `retouch`, on every device
    if wrong := [size for size in sizes if size < 1 or size % grid]:
        raise Refused(f"--sizes {wrong[0]}: {config.generator.network} takes multiples of {grid}")
    module = make_generator(config.generator, jnp.dtype(precision))
    variables = random_weights(module, max(32, grid))
    for size in sizes:
        images = jax.device_put(np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32))
        compiled, compile_seconds = _compiled(jax.jit(module.apply), variables, images)

        def once(compiled: Any = compiled, images: jax.Array = images) -> None:
            jax.block_until_ready(compiled(variables, images))

        seconds = _timed(once, steps)
        median = statistics.median(seconds)
        figures = {
            "bench": "infer",
            "network": config.generator.network,
            "size": size,
            **_speed(seconds, 1),
            "megapixels_per_s": size * size / 1e6 / median,
            "compile_seconds": compile_seconds,
            **_utilisation(gpu.flops(module.apply, variables, images), median, precision),
            **_machine(precision),
        }
        _finish(figures, out)
        # One trace shows enough: that of the largest size.
        if profile and size == max(sizes):
            _trace(compiled, once, profile)
    return EXIT_DONE


def random_weights(module: Any, side: int) -> Any:
    """Returns the weights that a training would begin with. rbg keys compile in seconds where the default ones take minutes."""
    return jax.jit(module.init)(jax.random.key(0, impl="rbg"), np.zeros((1, side, side, 3), np.float32))


def e2e(config: Config, steps: int, out: Path | None) -> int:
    """Prints the figures of `autoretouch bench e2e`: training from the config's own data, and the wait for them."""
    # Imported here: a machine on which only steps are measured need not have what reads data.
    from autoretouch_jax.training.trainer import Trainer

    config = resolve(config)
    memory.keep_freed_memory()  # as training does
    trainer = Trainer(config)
    state, batches = trainer.init(), trainer.batches(0)
    total, waited, done = 0.0, 0.0, 0
    metrics: Any = None
    for number in range(WARM_UP + steps):
        # As in the training loop: the step is dispatched, and the next batch is asked for while it runs.
        asked = time.perf_counter()
        batch = trainer.put(next(batches))
        arrived = time.perf_counter()
        jax.block_until_ready(metrics)
        state, metrics = trainer.step(state, batch, trainer.frozen)
        if number >= WARM_UP:
            total, waited, done = total + time.perf_counter() - asked, waited + arrived - asked, done + 1
    jax.block_until_ready(metrics)
    figures = {
        "bench": "e2e",
        "network": config.generator.network,
        "crop": config.data.crop,
        "batch": config.train.batch,
        "steps": done,
        "images_per_s": done * config.train.batch / total,
        "input_share": waited / total,
        **_machine(trainer.config.train.precision),
    }
    return _finish(figures, out)


# ---- measuring --------------------------------------------------------------------------------------------------------------


def _compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Returns a jitted function compiled for its arguments, and the seconds that this took."""
    started = time.perf_counter()
    return function.lower(*arguments).compile(), time.perf_counter() - started


def _timed(once: Callable[[], None], steps: int) -> list[float]:
    """Returns the seconds of each of `steps` calls, after a warm-up."""
    for _ in range(WARM_UP):
        once()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return seconds


def _speed(seconds: list[float], images: int) -> dict[str, Any]:
    """The median time of a step, the tenth and ninetieth percentiles, and the images a second of the median."""
    low, median, high = np.percentile(seconds, (10, 50, 90))
    spread = {"seconds": float(median), "seconds_p10": float(low), "seconds_p90": float(high), "steps": len(seconds)}
    return spread | {"images_per_s": images / float(median)}


def _utilisation(flops: float, seconds: float, precision: str) -> dict[str, Any]:
    """The FLOPs of a step on one device, its speed, that of a matrix product measured now, and the share of the second."""
    ceiling, reached = _ceiling(precision), flops / seconds
    return {"flops": flops, "flop_per_s": reached, "ceiling_flop_per_s": ceiling, "utilisation": reached / ceiling}


def _ceiling(precision: str) -> float:
    """The FLOPs a second of a product of two large matrices on one device: the best of several."""
    side = CEILING_SIDE.get(jax.default_backend(), max(CEILING_SIDE.values()))
    matrix = jnp.full((side, side), 0.5, jnp.dtype(precision))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(matrix, matrix))
    best = float("inf")
    for _ in range(CEILING_ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def _machine(precision: str) -> dict[str, Any]:
    """What the figures hold for: the devices, their type, jax's version, and the largest memory taken so far."""
    stats = jax.local_devices()[0].memory_stats() or {}
    # A CPU's devices keep no statistics of their own: there it is the memory of the process, in kilobytes, on a Mac in bytes.
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "precision": precision,
        "devices": "; ".join(devices.describe_devices()),
        "peak_memory_bytes": stats.get("peak_bytes_in_use", process),
        "jax": jax.__version__,
    }


def _noise(config: Config) -> dict[str, np.ndarray]:
    """A batch of noise of the config's shape. No step takes longer for what its images show."""
    rng = np.random.default_rng(0)
    shapes = batch_shapes(config, config.train.batch)
    return {
        name: rng.integers(0, 255, x.shape).astype(x.dtype) if x.ndim > 1 else np.ones(x.shape, x.dtype)
        for name, x in shapes.items()
    }


def _finish(figures: dict[str, Any], out: Path | None) -> int:
    """Prints the figures on one line and appends them to `out`. Returns the exit status."""
    line = json.dumps(figures)
    print(line)
    if out:
        before = out.read_text() if out.is_file() else ""
        storage.write_output(out, before + line + "\n")
    return EXIT_DONE


def _trace(compiled: Any, once: Callable[[], None], folder: Path) -> int:
    """Traces a few steps into a folder, and prints the dearest operations with their place in the program."""
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED):
            once()
    origins = operation_origins(compiled.as_text())
    for operation in dearest_operations(folder):
        seconds, origin = operation.seconds / PROFILED, origins.get(operation.name, "")
        print(f"{operation.share:6.1%} {seconds:9.5f} s a step  {operation.name}  {origin}", file=sys.stderr)
    return EXIT_DONE
