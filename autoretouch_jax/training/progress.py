"""What a run prints: its first line, its messages and the progress bar; and the line that it logs."""

import sys
from typing import Any

from tqdm import tqdm

from autoretouch_jax.config import Config
from autoretouch_jax.data import pipeline
from autoretouch_jax.runtime import processes
from autoretouch_jax.training.state import State, parameter_count
from autoretouch_jax.training.trainer import Trainer


def say(message: str, error: bool = False) -> None:
    """Prints a message on the first of several processes, or on every process if it is an error."""
    if message and (error or processes.is_first()):
        print(message, file=sys.stderr if error else sys.stdout, flush=True)


def bar(first: int, steps: int) -> tqdm:
    """Returns a progress bar with the time left. In a log file it prints a line every half minute."""
    interval = 0.1 if sys.stdout.isatty() else 30.0
    return tqdm(
        total=steps,
        initial=first,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        file=sys.stdout,
        mininterval=interval,
        disable=not processes.is_first(),
    )


def record(step: int, means: dict[str, float], config: Config, faults: pipeline.Faults, seconds: float) -> dict[str, Any]:
    """Returns a line of `metrics.jsonl`."""
    progress = {"step": step, "images": step * config.train.batch}
    return progress | means | {"bad_examples": len(faults.messages), "seconds": round(seconds, 3)}


def describe(trainer: Trainer, state: State, first: int) -> str:
    """Returns the first line that a run prints: networks, devices, data, steps."""
    config, device = trainer.config, trainer.mesh.devices.flat[0]
    networks = f"generator {parameter_count(state.generator.params):,} parameters"
    if state.discriminator is not None:
        networks += f", discriminator {parameter_count(state.discriminator.params):,}"
    return (
        f"{networks}; batch {config.train.batch} on {trainer.mesh.size} {device.platform} device(s) of "
        f"{processes.count()} process(es) ({config.parallel.mode}, {config.train.precision}); "
        f"{len(trainer.source)} images, crop {config.data.crop}; steps {first} → {config.train.steps}"
    )
