"""One training step: the only place where losses meet gradients.

The generator runs forward once. Its vjp is kept: the discriminator learns from the fake (no gradient reaches the generator),
then the generator learns through the *updated* discriminator, by pulling the gradient at the fake back through the kept vjp.
(Accumulated over parts of the batch, nothing can be kept: all parts go through the discriminator first, and the generator runs
forward a second time.)

Which passes move BatchNorm's moving averages: the generator's one forward; the discriminator's pass over the real, then its
pass over the fake. The pass by which the generator is judged normalises by its own batch and moves nothing.

Images arrive as uint8 and are converted here. Each network's gradients, statistics and metrics are averaged over the devices
in one collective; BatchNorm normalises by each device's own share of the batch, unless `train.batch_norm` is global.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
Terms = dict[str, tuple[Any, Callable[["Images", Retouched], jax.Array]]]  # weight, and function of the generator's output
Pass = tuple[Any, Any, Metrics]  # gradients, BatchNorm's moving averages, metrics


class Images(NamedTuple):
    """A device's share of the batch, or a part of it: float32 `[n, H, W, 3]` in [-1, 1], and float32 `[n]`."""

    source: jax.Array
    target: jax.Array
    weight: jax.Array


def to_float(image: jax.Array) -> jax.Array:
    """uint8 → float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def train_step(state: State, batch: dict[str, jax.Array], frozen: Any, *, networks: Networks, config: Config):
    """`(state, {"source", "target": uint8[n, H, W, 3], "weight": float32[n]}, VGG parameters) → (state, metrics)`.

    To be called with one device's share. Every loss of the batch is the mean of its images' losses times their weights
    (`data/crops.py`; 1 where there are none). Where the batch has "stop", its mean over all devices is among the metrics.
    """
    images, parts = _images(batch), config.parallel.accumulate
    factor = optim.schedule(config.optim, config.train.steps, state.step)
    key = parallel.fold_in_device(jax.random.fold_in(jax.random.key(config.train.seed), state.step))
    forward = functools.partial(_forward, networks=networks, key=key)
    kept = forward(state.generator, images, 0) if parts == 1 else None

    discriminator, metrics = state.discriminator, {}
    if discriminator is not None:

        def fake(part: Images, number: Any) -> jax.Array:
            return (kept or forward(state.generator, part, number))[0].image

        discriminator, metrics = _update_discriminator(discriminator, images, fake, factor, networks, config)

    def generator_pass(stats: Any, part: Images, number: Any) -> Pass:
        learner = dataclasses.replace(state.generator, stats=stats)
        output, pull, stats = kept or forward(learner, part, number)
        functions = _generator_losses(state.step, discriminator, frozen, networks, config)
        cotangent, metrics = _judged(functions, output, part, config)
        return pull(cotangent)[0], stats, metrics

    passed = _in_parts(generator_pass, state.generator.stats, images, parts)
    if "stop" in batch:
        passed[2]["stop"] = jnp.mean(batch["stop"])
    gradients, stats, judged = parallel.mean(passed)
    gradients = optim.freeze_global(gradients, config.optim, state.step)
    learning_rate = config.optim.generator_lr * factor
    generator = _descend(state.generator, gradients, stats, learning_rate, config, config.optim.generator_optimizer)
    ema = optim.ema_update(state.ema, generator.params, config.optim.ema, state.step)
    metrics |= judged | {"generator_gradient_norm": optax.global_norm(gradients), "learning_rate": learning_rate}
    return State(state.step + 1, generator, discriminator, ema), metrics


def _forward(learner: Learner, part: Images, number: Any, networks: Networks, key: jax.Array):
    """`(output, its vjp, BatchNorm's moved averages)` of the generator in training."""
    rngs = {"dropout": jax.random.fold_in(key, number)}

    def generate(params: Any):
        variables = {"params": params, "batch_stats": learner.stats}
        output, moved = networks.generator.apply(variables, part.source, train=True, mutable=["batch_stats"], rngs=rngs)
        return build.retouched(output), moved.get("batch_stats", {})

    return jax.vjp(generate, learner.params, has_aux=True)


def _update_discriminator(learner: Learner, images: Images, fake: Callable, factor, networks: Networks, config: Config):
    """The discriminator after its step, and its metrics. `fake(part, number)` is the generator's image of a part."""

    def one_pass(stats: Any, part: Images, number: Any) -> Pass:
        return _discriminator_gradients(learner.params, stats, part, fake(part, number), networks, config)

    passed = _in_parts(one_pass, learner.stats, images, config.parallel.accumulate)
    gradients, stats, metrics = parallel.mean(passed)
    return _descend(learner, gradients, stats, config.optim.discriminator_lr * factor, config), metrics


def _images(batch: dict[str, jax.Array]) -> Images:
    """The batch as float32, made once.

    The barrier keeps a compiler from converting again, with another rounding, wherever the images are used: where nothing is to
    be edited, source and target must be equal to the bit, or the L1 loss pulls by the sign of what is only rounding.
    """
    weight = batch.get("weight", jnp.ones(len(batch["source"]), jnp.float32))
    return jax.lax.optimization_barrier(Images(to_float(batch["source"]), to_float(batch["target"]), weight))


def _in_parts(one_pass: Callable[[Any, Images, Any], Pass], stats: Any, images: Images, parts: int) -> Pass:
    """`one_pass(stats, part, number)` over the parts of a batch: gradients and metrics averaged, `stats` handed on."""
    if parts == 1:
        return one_pass(stats, images, 0)
    cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), images)
    first = jax.tree.map(lambda x: x[0], cut)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one_pass, stats, first, 0)[0])

    def body(carry, numbered):
        total, stats = carry
        gradients, stats, metrics = one_pass(stats, *numbered)
        return (jax.tree.map(jnp.add, total, gradients), stats), metrics

    (total, stats), metrics = jax.lax.scan(body, (zeros, stats), (cut, jnp.arange(parts)))
    return jax.tree.map(lambda x: x / parts, total), stats, jax.tree.map(jnp.mean, metrics)


def _discriminator_gradients(
    params: Any, stats: Any, part: Images, fake: jax.Array, networks: Networks, config: Config
) -> Pass:
    """Real first, then fake."""

    def loss(params: Any):
        def judge(image: jax.Array, stats: Any):
            variables = {"params": params, "batch_stats": stats}
            found, moved = networks.discriminator.apply(variables, part.source, image, train=True, mutable=["batch_stats"])
            return build.scales(found), moved.get("batch_stats", {})

        real, moved = judge(part.target, stats)
        judged, moved = judge(jax.lax.stop_gradient(fake), moved)
        value = jnp.mean(part.weight * losses.discriminator(config.loss.adversarial, real, judged))
        logits = {"logits/real": real[0][-1].mean(), "logits/fake": judged[0][-1].mean()}
        return value, (moved, {"loss/discriminator": value} | logits)

    gradients, (moved, metrics) = jax.grad(loss, has_aux=True)(params)
    return gradients, moved, metrics


def _generator_losses(step, discriminator, frozen, networks: Networks, config: Config) -> Terms:
    """`{term: (weight, function of the images and the generator's output)}` for the terms whose weight is not 0."""
    weights, terms = config.loss, {}
    if weights.pixel_weight > 0:
        edit_weight = losses.edit_weight(weights.edit_weight, weights.edit_weight_steps, step)
        pixel = lambda part, fake: losses.pixel(weights.pixel, fake.image, part.target, part.source, edit_weight)  # noqa: E731
        terms["pixel"] = weights.pixel_weight, pixel
    if discriminator is not None:
        terms |= _adversarial_terms(step, discriminator, networks, config)
    if networks.vgg is not None:
        terms["perceptual"] = weights.perceptual_weight, _perceptual(frozen, networks, config)
    if weights.mask_weight > 0:
        terms["mask"] = weights.mask_weight, lambda part, fake: losses.mask(fake, part.source, part.target)
    return terms


def _judged(functions: Terms, fake: Retouched, part: Images, config: Config) -> tuple[Retouched, Metrics]:
    """The gradient of what is minimised at the generator's output, and each term's value and share.

    With `remat="full"` one term is done before the next begins: left alone, a compiler may compute them side by side and hold
    the activations of all.
    """
    values: Metrics = {}
    cotangents: dict[str, Retouched] = {}
    for name, (scale, function) in functions.items():
        if config.parallel.remat == "full":
            part, fake, cotangents = jax.lax.optimization_barrier((part, fake, cotangents))
        weighted = lambda fake, f=function, part=part: jnp.mean(part.weight * f(part, fake))  # noqa: E731
        values[name], gradient = jax.value_and_grad(weighted)(fake)
        cotangents = cotangents | {name: jax.tree.map(lambda g, scale=scale: scale * g, gradient)}
    values["generator"] = sum(scale * values[name] for name, (scale, _) in functions.items())
    if "pixel" in values:  # logged without the edit's weight, so that its curve is comparable over the run
        for name, image in (("pixel", fake.image), ("pixel_identity", part.source)):  # identity: what doing nothing costs
            plain = losses.pixel(config.loss.pixel, image, part.target, part.source, 1.0)
            values[name] = jnp.mean(part.weight * plain)
    total = jax.tree.map(lambda *terms: sum(terms), *cotangents.values())
    return total, {f"loss/{name}": value for name, value in values.items()} | _shares(cotangents)


def _adversarial_terms(step, discriminator: Learner, networks: Networks, config: Config) -> Terms:
    weights = config.loss
    variables = {"params": discriminator.params, "batch_stats": discriminator.stats}

    def judge(part: Images, image: jax.Array):
        judged = networks.discriminator.apply(variables, part.source, image, train=True, mutable=["batch_stats"])[0]
        return build.scales(judged)

    ramp = jnp.minimum(1.0, (step + 1) / max(1, weights.adversarial_ramp))
    adversarial = lambda part, fake: losses.adversarial(weights.adversarial, judge(part, fake.image))  # noqa: E731
    terms: Terms = {"adversarial": (weights.adversarial_weight * ramp, adversarial)}
    if weights.feature_matching_weight > 0:

        def matching(part: Images, fake: Retouched) -> jax.Array:
            return losses.feature_matching(judge(part, fake.image), judge(part, part.target))

        terms["feature_matching"] = weights.feature_matching_weight, matching
    return terms


def _perceptual(frozen, networks: Networks, config: Config) -> Callable[[Images, Retouched], jax.Array]:
    weights = config.loss
    window = (weights.perceptual_downsample, weights.perceptual_downsample)

    def features(image: jax.Array):
        return networks.vgg.apply({"params": frozen}, nn.avg_pool(image, window, window))

    def perceptual(part: Images, fake: Retouched) -> jax.Array:
        found, reference = features(fake.image), features(part.target)
        return losses.perceptual(found, reference, weights.perceptual_layer_weights, weights.perceptual_scale)

    return perceptual


def _shares(cotangents: dict[str, Retouched]) -> Metrics:
    """`share/TERM`: the norm of the term's weighted gradient at the generator's output, over the sum of these norms."""
    norms = {name: optax.global_norm(value) for name, value in cotangents.items()}
    total = sum(norms.values()) + 1e-30
    return {f"share/{name}": norm / total for name, norm in norms.items()}


def _descend(learner: Learner, gradients: Any, stats: Any, learning_rate: jax.Array, config: Config, kind: str = "adam"):
    optimizer, gradients = optim.optimizer(config.optim, kind), optim.clip(gradients, config.optim)
    if config.parallel.optimizer_state == "sharded":
        own = parallel.own_part((gradients, learner.params))
        updates, opt = optimizer.update(own[0], learner.opt, own[1])
        updates = parallel.join_parts(updates, learner.params)
    else:
        updates, opt = optimizer.update(gradients, learner.opt, learner.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, learner.params, updates)
    return Learner(params, stats, opt)
