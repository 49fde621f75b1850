"""The guard of the compiled step: an update that would do harm is not applied, and a run that has gone astray is noticed.

It judges each step by what the step computes anyway: the norms of the gradients and the generator's objective. Its memory is a
part of the state, so a resumed run judges as the undisturbed one would. `loop.py` acts on its verdict: see `trouble`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from autoretouch_jax.config import GuardConfig

# Updates before the first verdict on sizes: the averages mean nothing before. Values that are not finite are refused at once.
FIRST_NORMS, FIRST_OBJECTIVES = 50, 200
SLOW, FAST = 1000.0, 20.0  # updates over which the objective is averaged: its history, and its present
RISE = 3.0  # an objective counts as this many times its history at most
NORMS = 100.0  # updates over which the norms of the gradients are averaged
SKIPPING, ASTRAY = 1.0, 2.0  # values of the metric guard/trouble; 0 is none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the guard remembers. All are scalars but `norms`."""

    seen: jax.Array  # updates that were applied
    norms: jax.Array  # float32[2]: averages of the norms of the generator's and the discriminator's gradients
    slow: jax.Array  # averages of the objective's absolute value
    fast: jax.Array
    in_a_row: jax.Array  # updates skipped since the last one that was applied
    skipped: jax.Array  # updates skipped since the run began
    # The next three change when the run goes back to a checkpoint.
    rollbacks: jax.Array
    offset: jax.Array  # batches that were left out
    rate: jax.Array  # factor of the learning rate


def initial() -> Guard:
    """The memory of a run that begins."""
    # Every leaf is an array of its own: the step donates their buffers, and a buffer can be donated only once.
    return Guard(
        seen=jnp.zeros((), jnp.int32),
        norms=jnp.zeros(2, jnp.float32),
        slow=jnp.zeros((), jnp.float32),
        fast=jnp.zeros((), jnp.float32),
        in_a_row=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        rollbacks=jnp.zeros((), jnp.int32),
        offset=jnp.zeros((), jnp.int32),
        rate=jnp.ones((), jnp.float32),
    )


def judge(
    guard: Guard, config: GuardConfig, norms: jax.Array, objective: jax.Array, others: jax.Array
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
    """Returns whether the update is sound, the guard's new memory, and its metrics.

    `norms` are float32[2], `objective` is the generator's, and `others` are values that only have to be finite.
    """
    finite = jnp.isfinite(norms).all() & jnp.isfinite(objective) & jnp.isfinite(others).all()
    # A network without gradients so far, such as one that is frozen at first, has no size to compare with.
    known = (guard.seen >= FIRST_NORMS) & (guard.norms > 0) & (config.spike > 0)
    limit = jnp.where(known, config.spike * guard.norms, jnp.inf)
    sound = finite & (norms <= limit).all()
    seen, in_a_row = guard.seen + sound, jnp.where(sound, 0, guard.in_a_row + 1)

    def average(old: jax.Array, value: jax.Array, window: float) -> jax.Array:
        # A plain mean at first, and exponential once it has seen `window` updates.
        rate = 1.0 / jnp.minimum(window, guard.seen + 1.0)
        return jnp.where(finite, old + rate * (jnp.where(finite, value, 0.0) - old), old)

    # A jump counts up to its limit only: one of them does not move the average much, and a lasting change does. Likewise the
    # history of the objective follows a rise slowly. Else, early in a run, one huge value would become the history at once.
    size = jnp.abs(objective)
    expected = jnp.where(guard.seen >= FIRST_NORMS, jnp.minimum(size, RISE * guard.slow), size)
    slow, fast = average(guard.slow, expected, SLOW), average(guard.fast, size, FAST)
    judging = (seen >= FIRST_OBJECTIVES) & (config.diverged > 0)
    trouble = jnp.where(judging & (fast > config.diverged * slow), ASTRAY, 0.0)
    trouble = jnp.where(in_a_row >= config.patience, SKIPPING, trouble)
    good = finite & ~(judging & (size > config.diverged * slow))
    norms = average(guard.norms, jnp.minimum(norms, limit), NORMS)
    memory = dataclasses.replace(guard, seen=seen, norms=norms, slow=slow, fast=fast, in_a_row=in_a_row)
    memory = dataclasses.replace(memory, skipped=guard.skipped + ~sound)
    metrics = {"trouble": trouble, "good": good, "skipped": memory.skipped, "rate": guard.rate}
    return sound, memory, {f"guard/{name}": value.astype(jnp.float32) for name, value in metrics.items()}


def select(sound: jax.Array, new: Any, old: Any) -> Any:
    """Returns the tree `new` where the update is sound, and else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)


# ---- on the host ------------------------------------------------------------------------------------------------------------


def trouble(metrics: Mapping[str, jax.Array] | None) -> float:
    """The guard's verdict on a step that is done: 0, SKIPPING or ASTRAY."""
    return float(metrics["guard/trouble"]) if metrics and "guard/trouble" in metrics else 0.0


def good(metrics: Mapping[str, jax.Array]) -> bool:
    """Whether a step leaves a state that is worth a checkpoint: its objective is finite and near its own history."""
    return "guard/good" not in metrics or float(metrics["guard/good"]) > 0


def after_rollback(restored: Guard, failed: Guard, left_out: int, config: GuardConfig) -> Guard:
    """The memory of a run that has gone back: that of the checkpoint, with the failed attempt's batches left out."""
    return dataclasses.replace(
        restored,
        rollbacks=failed.rollbacks + 1,
        offset=failed.offset + left_out,
        rate=failed.rate * config.rate_factor,
    )


def reason(trouble: float, config: GuardConfig) -> str:
    """What went wrong, in words."""
    if trouble == SKIPPING:
        return f"{config.patience} updates in a row were not finite, or {config.spike:g} times as large as usual"
    return f"the generator's objective is {config.diverged:g} times as large as it was"


def advice(trouble: float, rate: float) -> str:
    """What to do when the run gives up. `rate` is a learning rate that has not been tried."""
    if trouble == SKIPPING:
        return (
            f"Give the same command with --optim.generator-lr {rate:.1g} and --optim.clip-norm 1; if it ends so again, look at "
            "the data with `autoretouch data audit`, and train with --train.precision float32"
        )
    return (
        f"The learning rate is too high: give the same command with --optim.generator-lr {rate:.1g} and a lower "
        "--optim.discriminator-lr, or with --optim.clip-norm 1"
    )
