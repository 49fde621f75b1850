"""Adam, its learning-rate schedule, and the moving average of the generator."""

import jax
import jax.numpy as jnp
import optax

from autoretouch_jax.config import OptimConfig


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Adam's direction, of unit learning rate; the step multiplies by `learning_rate`."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, optax.scale_by_adam(config.beta1, config.beta2))


def schedule(config: OptimConfig, steps: int, step: jax.Array) -> jax.Array:
    """Factor in (0, 1] at `step`: linear warm-up, constant, linear decay over the last `decay_share` of `steps`.

    Until the decay begins it does not depend on `steps`, so a run can be prolonged.
    """
    decay = jnp.clip((steps - step) / max(1.0, config.decay_share * steps), 0.0, 1.0)
    warmup = jnp.clip((step + 1) / max(1, config.warmup_steps), 0.0, 1.0)
    return jnp.minimum(decay, warmup).astype(jnp.float32)


def ema_update(ema: dict, params: dict, decay: float, step: jax.Array) -> dict:
    """`decay · ema + (1 − decay) · params`, with the decay warmed up so that early averages forget the initialisation."""
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if decay else 0.0
    return jax.tree.map(lambda average, new: decay_now * average + (1 - decay_now) * new, ema, params)
