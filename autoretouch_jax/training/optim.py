"""Adam and Muon, the learning-rate schedule, and the moving average of the generator."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from autoretouch_jax.config import OptimConfig

ADAMS_RMS = 0.2  # of its steps, at unit learning rate (Liu et al. 2025, "Muon is scalable for LLM training")
IMAGE_CHANNELS = 12  # 3, or 12 where pixels are folded into channels


def optimizer(config: OptimConfig, kind: str = "adam") -> optax.GradientTransformation:
    """The direction of Adam or Muon, of unit learning rate; the step multiplies by `learning_rate`.

    Muon (Jordan et al. 2024) makes each kernel's averaged gradient, seen as a matrix from patch to channel, orthogonal. Kernels
    that read or write an image, and biases, stay with Adam. Its steps are scaled to the size of Adam's (Liu et al. 2025).
    """
    clipped = [optax.identity()] if config.clip_norm else []  # by `clip`; its place in the state stays, for older checkpoints
    if kind == "adam":
        return optax.chain(*clipped, optax.scale_by_adam(config.beta1, config.beta2))
    muon = optax.contrib.muon(
        learning_rate=-1.0,  # optax turns descent into a negative sign; the step subtracts by itself
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        consistent_rms=ADAMS_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(_as_matrix, params),
    )
    return optax.chain(*clipped, muon)


def _as_matrix(kernel: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    if kernel.ndim != 4 or min(kernel.shape[2:]) <= IMAGE_CHANNELS:
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))


def clip(gradients: Any, config: OptimConfig) -> Any:
    """Gradients of norm `clip_norm` at most; as they are where it is 0."""
    if not config.clip_norm:
        return gradients
    return optax.clip_by_global_norm(config.clip_norm).update(gradients, optax.EmptyState())[0]


def freeze_global(gradients: dict, config: OptimConfig, step: jax.Array) -> dict:
    """No gradient for the global generator inside a local enhancer during the first `global_frozen_steps`.

    (Wang et al. 2018, section 3.2: the global generator is trained first, then the enhancer, then both. With gradients of zero
    from the start Adam's moments stay zero and nothing moves.)
    """
    if not config.global_frozen_steps:
        return gradients
    factor = (step >= config.global_frozen_steps).astype(jnp.float32)
    return gradients | {"global": jax.tree.map(lambda g: factor * g, gradients["global"])}


def schedule(config: OptimConfig, steps: int, step: jax.Array) -> jax.Array:
    """Factor in (0, 1] at `step`: linear warm-up, constant, linear decay over the last `decay_share` of `steps`.

    Until the decay begins it does not depend on `steps`, so a run can be prolonged.
    """
    warmup = jnp.clip((step + 1) / max(1, config.warmup_steps), 0.0, 1.0).astype(jnp.float32)
    if config.decay_share == 0:
        return warmup  # the same program whatever `steps` is
    decay = jnp.clip((steps - step) / max(1.0, config.decay_share * steps), 0.0, 1.0)
    return jnp.minimum(decay, warmup).astype(jnp.float32)


def ema_update(ema: dict, params: dict, decay: float, step: jax.Array) -> dict:
    """`decay · ema + (1 − decay) · params`, with the decay warmed up so that early averages forget the initialisation."""
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if decay else 0.0
    return jax.tree.map(lambda average, new: decay_now * average + (1 - decay_now) * new, ema, params)
