"""One training step: the only place where losses meet gradients.

The generator runs forward once. Its vjp is kept: the discriminator learns from the fake (no gradient reaches the generator),
then the generator learns through the *updated* discriminator, by pulling the gradient at the fake back through the kept vjp.

Which passes move BatchNorm's moving averages: the generator's one forward; the discriminator's pass over the real, then its
pass over the fake. The pass by which the generator is judged normalises by its own batch and moves nothing.

Images arrive as uint8 and are converted here. Gradients, statistics and metrics are averaged over the devices; BatchNorm
normalises by each device's own share of the batch.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from autoretouch_jax import parallel
from autoretouch_jax.config import Config
from autoretouch_jax.models import build
from autoretouch_jax.models.retouch import Retouched
from autoretouch_jax.training import losses, optim
from autoretouch_jax.training.state import Learner, Networks, State

Metrics = dict[str, jax.Array]
Terms = dict[str, tuple[Any, Callable[[Retouched], jax.Array]]]  # weight and function of the generator's output


def to_float(image: jax.Array) -> jax.Array:
    """uint8 → float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def train_step(state: State, batch: dict[str, jax.Array], frozen: Any, *, networks: Networks, config: Config):
    """`(state, {"source", "target": uint8[n, H, W, 3], "weight": float32[n]}, VGG parameters) → (state, metrics)`.

    To be called with one device's share. Every loss of the batch is the mean of its images' losses times their weights
    (`data/crops.py`; 1 where there are none).
    """
    source, target, weight = to_float(batch["source"]), to_float(batch["target"]), batch.get("weight", 1.0)
    factor = optim.schedule(config.optim, config.train.steps, state.step)

    rngs = {"dropout": parallel.fold_in_device(jax.random.fold_in(jax.random.key(config.train.seed), state.step))}

    def forward(params: Any):
        variables = {"params": params, "batch_stats": state.generator.stats}
        output, moved = networks.generator.apply(variables, source, train=True, mutable=["batch_stats"], rngs=rngs)
        return build.retouched(output), moved.get("batch_stats", {})

    fake, pull, generator_stats = jax.vjp(forward, state.generator.params, has_aux=True)

    discriminator, metrics = state.discriminator, {}
    if discriminator is not None:
        discriminator, metrics = _update_discriminator(discriminator, batch, fake.image, factor, networks, config)

    functions = _generator_losses(source, target, state.step, discriminator, frozen, networks, config)
    terms, cotangents = _values_and_cotangents(functions, fake, weight)
    if "pixel" in terms:  # logged without the edit's weight, so that its curve is comparable over the run
        for name, image in (("pixel", fake.image), ("pixel_identity", source)):  # identity: what doing nothing costs
            terms[name] = jnp.mean(weight * losses.pixel(config.loss.pixel, image, target, source, 1.0))
    total = jax.tree.map(lambda *parts: sum(parts), *cotangents.values())
    gradients, generator_stats = parallel.mean((pull(total)[0], generator_stats))
    gradients = optim.freeze_global(gradients, config.optim, state.step)
    optimizer = optim.optimizer(config.optim, config.optim.generator_optimizer)
    generator = _descend(state.generator, gradients, generator_stats, config.optim.generator_lr * factor, optimizer)
    ema = optim.ema_update(state.ema, generator.params, config.optim.ema, state.step)

    metrics |= {f"loss/{name}": value for name, value in terms.items()} | _shares(cotangents)
    metrics = parallel.mean(metrics) | {
        "generator_gradient_norm": optax.global_norm(gradients),
        "learning_rate": config.optim.generator_lr * factor,
    }
    return State(state.step + 1, generator, discriminator, ema), metrics


def _update_discriminator(learner: Learner, batch, fake, factor, networks: Networks, config: Config):
    """Real first, then fake, then one optimizer step."""
    source, target = to_float(batch["source"]), to_float(batch["target"])

    def loss(params: Any):
        def judge(image: jax.Array, stats: Any):
            variables = {"params": params, "batch_stats": stats}
            found, moved = networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])
            return build.scales(found), moved.get("batch_stats", {})

        real, stats = judge(target, learner.stats)
        judged, stats = judge(jax.lax.stop_gradient(fake), stats)
        value = jnp.mean(batch.get("weight", 1.0) * losses.discriminator(config.loss.adversarial, real, judged))
        logits = {"logits/real": real[0][-1].mean(), "logits/fake": judged[0][-1].mean()}
        return value, (stats, {"loss/discriminator": value} | logits)

    gradients, (stats, metrics) = jax.grad(loss, has_aux=True)(learner.params)
    gradients, stats = parallel.mean((gradients, stats))
    learning_rate = config.optim.discriminator_lr * factor
    return _descend(learner, gradients, stats, learning_rate, optim.optimizer(config.optim)), metrics


def _generator_losses(source, target, step, discriminator, frozen, networks: Networks, config: Config) -> Terms:
    """`{term: (weight, function of the generator's output)}` for the terms whose weight is not 0."""
    weights, terms = config.loss, {}
    if weights.pixel_weight > 0:
        edit_weight = losses.edit_weight(weights.edit_weight, weights.edit_weight_steps, step)
        pixel = lambda fake: losses.pixel(weights.pixel, fake.image, target, source, edit_weight)  # noqa: E731
        terms["pixel"] = weights.pixel_weight, pixel
    if discriminator is not None:
        terms |= _adversarial_terms(source, target, step, discriminator, networks, config)
    if networks.vgg is not None:
        terms["perceptual"] = weights.perceptual_weight, _perceptual(target, frozen, networks, config)
    if weights.mask_weight > 0:
        terms["mask"] = weights.mask_weight, lambda fake: losses.mask(fake, source, target)
    return terms


def _values_and_cotangents(functions: Terms, fake: Retouched, weight: Any) -> tuple[Metrics, dict[str, Retouched]]:
    """Each term's weighted mean over the batch, and its gradient at the generator's output times the term's own weight.

    `generator` is the sum of both: what is minimised.
    """
    values, cotangents = {}, {}
    for name, (scale, function) in functions.items():
        values[name], gradient = jax.value_and_grad(lambda fake, f=function: jnp.mean(weight * f(fake)))(fake)
        cotangents[name] = jax.tree.map(lambda g, scale=scale: scale * g, gradient)
    values["generator"] = sum(scale * values[name] for name, (scale, _) in functions.items())
    return values, cotangents


def _adversarial_terms(source, target, step, discriminator: Learner, networks: Networks, config: Config) -> Terms:
    weights = config.loss
    variables = {"params": discriminator.params, "batch_stats": discriminator.stats}

    def judge(image: jax.Array):
        return build.scales(networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])[0])

    ramp = jnp.minimum(1.0, (step + 1) / max(1, weights.adversarial_ramp))
    adversarial = lambda fake: losses.adversarial(weights.adversarial, judge(fake.image))  # noqa: E731
    terms: Terms = {"adversarial": (weights.adversarial_weight * ramp, adversarial)}
    if weights.feature_matching_weight > 0:
        real = judge(target)
        matching = lambda fake: losses.feature_matching(judge(fake.image), real)  # noqa: E731
        terms["feature_matching"] = weights.feature_matching_weight, matching
    return terms


def _perceptual(target, frozen, networks: Networks, config: Config) -> Callable[[Retouched], jax.Array]:
    weights = config.loss
    window = (weights.perceptual_downsample, weights.perceptual_downsample)

    def features(image: jax.Array):
        return networks.vgg.apply({"params": frozen}, nn.avg_pool(image, window, window))

    reference = features(target)
    return lambda fake: losses.perceptual(
        features(fake.image), reference, weights.perceptual_layer_weights, weights.perceptual_scale
    )


def _shares(cotangents: dict[str, Retouched]) -> Metrics:
    """`share/TERM`: the norm of the term's weighted gradient at the generator's output, over the sum of these norms."""
    norms = {name: optax.global_norm(value) for name, value in cotangents.items()}
    total = sum(norms.values()) + 1e-30
    return {f"share/{name}": norm / total for name, norm in norms.items()}


def _descend(learner: Learner, gradients: Any, stats: Any, learning_rate: jax.Array, optimizer: Any) -> Learner:
    updates, opt = optimizer.update(gradients, learner.opt, learner.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, learner.params, updates)
    return Learner(params, stats, opt)
