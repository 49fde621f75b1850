"""Adam and Muon, the learning-rate schedule, clipping, and the moving average of the generator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from autoretouch_jax.config import OptimConfig
from autoretouch_jax.training.scalars import is_off

ADAM_RMS = 0.2  # RMS of Adam's steps at unit learning rate (Liu et al. 2025, "Muon is scalable for LLM training")
IMAGE_CHANNELS = 12  # the most channels that an image has: 3, or 12 where pixels are folded into channels


def optimizer(config: OptimConfig, kind: str = "adam") -> optax.GradientTransformation:
    """Returns Adam or Muon at unit learning rate. The step subtracts their updates times `learning_rate`.

    Muon (Jordan et al. 2024) orthogonalises each kernel's averaged gradient, viewed as a matrix from patch to channel. Kernels
    that read or write an image, and biases, stay with Adam. Its steps are scaled to the size of Adam's (Liu et al. 2025).
    """
    if kind == "adam":
        return optax.scale_by_adam(config.beta1, config.beta2)
    return optax.contrib.muon(
        learning_rate=-1.0,  # optax negates it for descent, but the step subtracts
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        consistent_rms=ADAM_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(_matrix_dimensions, params),
    )


def _matrix_dimensions(kernel: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    if kernel.ndim != 4 or min(kernel.shape[2:]) <= IMAGE_CHANNELS:
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))


def clip(gradients: Any, config: OptimConfig) -> Any:
    """Scales the gradients so that their norm is at most `clip_norm`. 0 leaves them as they are."""
    if is_off(config.clip_norm):
        return gradients
    return optax.clip_by_global_norm(config.clip_norm).update(gradients, optax.EmptyState())[0]


def freeze_global(
    gradients: dict, opt_state: optax.OptState, config: OptimConfig, steps: jax.Array | int, step: jax.Array
) -> tuple[dict, optax.OptState]:
    """Holds the global generator inside a local enhancer fixed during the first `global_frozen_share` of `steps`.

    Wang et al. 2018, section 3.2: the global generator is trained first, then the enhancer, then both. For both the authors
    make a new optimizer. Otherwise Adam, whose count ran on while the moments were 0, would begin with steps many times too
    large.
    Returns the gradients and the optimizer's state to go on with.
    """
    if is_off(config.global_frozen_share):
        return gradients, opt_state
    frozen_steps = jnp.round(config.global_frozen_share * steps)
    # With gradients of zero from the start, Adam's moments stay zero and the parameters do not move.
    gradients = gradients | {"global": jax.tree.map(lambda g: jnp.where(step < frozen_steps, 0, g), gradients["global"])}
    # A new state of Adam or Muon is all zeros.
    return gradients, jax.tree.map(lambda x: jnp.where(step == frozen_steps, jnp.zeros_like(x), x), opt_state)


def schedule(config: OptimConfig, steps: jax.Array | int, step: jax.Array | np.integer) -> jax.Array:
    """The factor of the learning rate at `step`, in (0, 1]: linear warm-up, constant, then a linear decay.

    The decay takes the last `decay_share` of `steps`. Until it begins, nothing depends on `steps`, so a run can be prolonged.
    It is written out because optax's linear schedule subtracts from 1, which rounds small factors coarsely.
    """
    warmup = jnp.clip((step + 1) / jnp.maximum(1, config.warmup_steps), 0.0, 1.0)
    decay = jnp.clip((steps - step) / jnp.maximum(1.0, config.decay_share * steps), 0.0, 1.0)
    return jnp.minimum(decay, warmup).astype(jnp.float32)


def ema_update(ema: Any, params: Any, decay: jax.Array | float, step: jax.Array) -> Any:
    """`decay · ema + (1 − decay) · params`, with the decay warmed up so that the average forgets the initial weights.

    It is written out because optax's incremental update computes 1 − (1 − decay), which rounds a small decay.
    """
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, new: decay_now * average + (1 - decay_now) * new, ema, params)
