"""One training step: the only place where losses meet gradients.

The generator runs forward once. Its vjp is kept: the discriminator learns from the fake (no gradient reaches the generator),
then the generator learns through the *updated* discriminator, by pulling the gradient at the fake back through the kept vjp.

Which passes move BatchNorm's moving averages: the generator's one forward; the discriminator's pass over the real, then its
pass over the fake. The pass by which the generator is judged normalises by its own batch and moves nothing.

Images arrive as uint8 and are converted here. Gradients, statistics and metrics are averaged over the devices; BatchNorm
normalises by each device's own share of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from autoretouch_jax import parallel
from autoretouch_jax.config import Config
from autoretouch_jax.training import losses, optim
from autoretouch_jax.training.state import Learner, Networks, State

Metrics = dict[str, jax.Array]


def to_float(image: jax.Array) -> jax.Array:
    """uint8 → float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def train_step(state: State, batch: dict[str, jax.Array], frozen: Any, *, networks: Networks, config: Config):
    """`(state, {"source", "target": uint8[n, H, W, 3]}, VGG parameters) → (state, metrics)`, on one device's share."""
    source, target = to_float(batch["source"]), to_float(batch["target"])
    factor = optim.schedule(config.optim, config.train.steps, state.step)

    def forward(params: Any):
        variables = {"params": params, "batch_stats": state.generator.stats}
        fake, moved = networks.generator.apply(variables, source, train=True, mutable=["batch_stats"])
        return fake, moved.get("batch_stats", {})

    fake, pull, generator_stats = jax.vjp(forward, state.generator.params, has_aux=True)

    discriminator, metrics = state.discriminator, {}
    if discriminator is not None:
        discriminator, metrics = _update_discriminator(discriminator, source, target, fake, factor, networks, config)

    edit_weight = losses.edit_weight(config.loss.edit_weight, config.loss.edit_weight_steps, state.step)
    cotangents, terms = _generator_cotangents(fake, source, target, edit_weight, discriminator, frozen, networks, config)
    gradients, generator_stats = parallel.mean((pull(sum(cotangents.values()))[0], generator_stats))
    generator = _descend(state.generator, gradients, generator_stats, config.optim.generator_lr * factor, config)
    ema = optim.ema_update(state.ema, generator.params, config.optim.ema, state.step)

    metrics |= {f"loss/{name}": value for name, value in terms.items()} | _shares(cotangents)
    metrics = parallel.mean(metrics) | {
        "generator_gradient_norm": optax.global_norm(gradients),
        "learning_rate": config.optim.generator_lr * factor,
    }
    return State(state.step + 1, generator, discriminator, ema), metrics


def _update_discriminator(learner: Learner, source, target, fake, factor, networks: Networks, config: Config):
    """Real first, then fake, then one optimizer step."""

    def loss(params: Any):
        def judge(image: jax.Array, stats: Any):
            variables = {"params": params, "batch_stats": stats}
            logits, moved = networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])
            return logits, moved.get("batch_stats", {})

        real_logits, stats = judge(target, learner.stats)
        fake_logits, stats = judge(jax.lax.stop_gradient(fake), stats)
        value = losses.discriminator(config.loss.adversarial, real_logits, fake_logits)
        return value, (
            stats,
            {"loss/discriminator": value, "logits/real": real_logits.mean(), "logits/fake": fake_logits.mean()},
        )

    gradients, (stats, metrics) = jax.grad(loss, has_aux=True)(learner.params)
    gradients, stats = parallel.mean((gradients, stats))
    return _descend(learner, gradients, stats, config.optim.discriminator_lr * factor, config), metrics


def _generator_cotangents(fake, source, target, edit_weight, discriminator, frozen, networks: Networks, config: Config):
    """Per loss term: its weighted gradient at the fake, and its unweighted value."""
    weights, functions = config.loss, {}
    if weights.pixel_weight > 0:
        functions["pixel"] = weights.pixel_weight, lambda x: losses.pixel(weights.pixel, x, target, source, edit_weight)
    if discriminator is not None:
        variables = {"params": discriminator.params, "batch_stats": discriminator.stats}

        def adversarial(image: jax.Array) -> jax.Array:
            logits, _ = networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])
            return losses.adversarial(weights.adversarial, logits)

        functions["adversarial"] = weights.adversarial_weight, adversarial
    if networks.vgg is not None:
        reference = networks.vgg.apply({"params": frozen}, target)
        functions["perceptual"] = (
            weights.perceptual_weight,
            lambda x: losses.perceptual(networks.vgg.apply({"params": frozen}, x), reference),
        )
    terms, cotangents = {}, {}
    for name, (weight, function) in functions.items():
        terms[name], gradient = jax.value_and_grad(function)(fake)
        cotangents[name] = weight * gradient
    if "pixel" in terms:  # logged without the edit's weight, so that its curve is comparable over the run
        terms["pixel"] = losses.pixel(weights.pixel, fake, target, source, 1.0)
    return cotangents, terms


def _shares(cotangents: dict[str, jax.Array]) -> Metrics:
    """`share/TERM`: the norm of the term's weighted gradient at the generator's output, over the sum of these norms."""
    norms = {name: jnp.linalg.norm(value.ravel()) for name, value in cotangents.items()}
    total = sum(norms.values()) + 1e-30
    return {f"share/{name}": norm / total for name, norm in norms.items()}


def _descend(learner: Learner, gradients: Any, stats: Any, learning_rate: jax.Array, config: Config) -> Learner:
    updates, opt = optim.optimizer(config.optim).update(gradients, learner.opt)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, learner.params, updates)
    return Learner(params, stats, opt)
