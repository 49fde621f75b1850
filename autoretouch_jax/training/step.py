"""One training step: the only place where losses meet gradients.

The generator runs forward once, and its vjp is kept. The discriminator learns from the target and from the fake; no gradient
reaches the generator there. Then the generator learns through the *updated* discriminator, or, where `train.update_order` says
so, through the one from before the step: the gradient of its objective at the fake is pulled back through the kept vjp. With
gradient accumulation no vjp can be kept: all microbatches pass through the discriminator first, and the generator runs forward
a second time.

Three passes move BatchNorm's moving averages: the generator's forward pass, the discriminator's pass over the target, and
its pass over the fake. The discriminator's third pass, through which the generator learns, moves nothing.

Images arrive as uint8 and are converted here. Each network's gradients, statistics and metrics are averaged over the devices in
one collective. BatchNorm normalises by each device's own share of the batch, unless `train.batch_norm` is global.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import Config
from autoretouch_jax.models import sums
from autoretouch_jax.models.outputs import GeneratorOutput, Scales, discriminator_scales, generator_output
from autoretouch_jax.models.pixels import to_float
from autoretouch_jax.runtime import devices
from autoretouch_jax.training import guard, losses, optimizers
from autoretouch_jax.training.scalars import is_off
from autoretouch_jax.training.state import BatchStats, Learner, Networks, Params, State
from autoretouch_jax.training.terms import Images, Metrics, TermEvaluator

Batch = dict[str, jax.Array]  # "source", "target": uint8[n, H, W, 3]; "weight", "stop": float32[n]
Number = int | jax.Array  # a microbatch's number in its step; an array inside a scan
Forward = tuple[GeneratorOutput, Callable[[GeneratorOutput], tuple[Params]], BatchStats]  # the output, its vjp, moved averages


class PassResult(NamedTuple):
    """The result of one network's pass over a microbatch, or over a device's whole share of the batch."""

    gradients: Params
    batch_stats: BatchStats
    metrics: Metrics


def train_step(
    state: State, batch: Batch, frozen: Params | None, *, networks: Networks, config: Config
) -> tuple[State, Metrics]:
    """One step on one device's share of the batch. `frozen` are the VGG's parameters.

    A loss of the batch is the mean over its images of loss times weight (`data/crops.py`; 1 where the batch has no weights).
    Where the batch has "stop", its mean over all devices is among the metrics: see `agreed_to_stop` in `loop.py`. Scalars of
    `config` may be traced arrays: see `scalars.py`.
    """
    images, microbatches = _to_images(batch), config.parallel.accumulate
    rate_factor = optimizers.schedule(config.optim, config.train.steps, state.step)
    if state.guard is not None:
        rate_factor *= state.guard.rate
    # Dropout is a function of seed, step, device and microbatch, so a resumed run drops the same units.
    key = devices.fold_in_device(jax.random.fold_in(jax.random.key(config.train.seed), state.step))
    forward = functools.partial(_generator_forward, networks=networks, key=key)

    # ---- the generator's forward pass ----------------------------------------------------------------------------------
    kept_forward = forward(state.generator, images, 0) if microbatches == 1 else None

    # ---- the discriminator, on the real and the fake -------------------------------------------------------------------
    discriminator, metrics = state.discriminator, dict[str, jax.Array]()
    if discriminator is not None:

        def make_fake(part: Images, number: Number) -> jax.Array:
            return (kept_forward or forward(state.generator, part, number))[0].image

        discriminator, metrics = _update_discriminator(state, images, make_fake, rate_factor, networks, config)

    # ---- the generator, through the discriminator ----------------------------------------------------------------------
    adversary = discriminator if config.train.update_order == "discriminator_first" else state.discriminator

    def generator_pass(batch_stats: BatchStats, part: Images, number: Number) -> PassResult:
        learner = dataclasses.replace(state.generator, batch_stats=batch_stats)
        output, pull, batch_stats = kept_forward or forward(learner, part, number)
        gradient, metrics = objective_gradient(output, part, state.step, adversary, frozen, networks, config)
        return PassResult(pull(gradient)[0], batch_stats, metrics)

    result = _over_microbatches(generator_pass, state.generator.batch_stats, images, microbatches)
    if "stop" in batch:
        result.metrics["stop"] = jnp.mean(batch["stop"])
    gradients, batch_stats, generator_metrics = devices.mean(result)
    gradients, opt_state = optimizers.freeze_global(
        gradients, state.generator.opt_state, config.optim, config.train.steps, state.step
    )
    learning_rate = config.optim.generator_lr * rate_factor
    kind = config.optim.generator_optimizer
    learner = dataclasses.replace(state.generator, opt_state=opt_state)
    generator = _apply_gradients(learner, gradients, batch_stats, learning_rate, config, kind)

    # ---- the moving average --------------------------------------------------------------------------------------------
    ema, ema_stats = state.ema, state.ema_stats
    if ema is not None:
        average = (generator.params, generator.batch_stats)
        ema, ema_stats = optimizers.ema_update((ema, ema_stats), average, config.optim.ema, state.step)
    metrics |= generator_metrics
    metrics |= {"generator_gradient_norm": sums.global_norm(gradients), "learning_rate": learning_rate}
    new = State(state.step + 1, generator, discriminator, ema, ema_stats, state.guard)
    return _guarded(new, state, metrics, config)


def _guarded(new: State, old: State, metrics: Metrics, config: Config) -> tuple[State, Metrics]:
    """Returns the new state, or the old one with the next step's number where the guard finds the update unsound."""
    if old.guard is None:
        return new, metrics
    norms = [metrics.get(f"{name}_gradient_norm", jnp.zeros(())) for name in ("generator", "discriminator")]
    others = [sums.global_norm(new.generator.batch_stats), metrics.get("loss/discriminator", jnp.zeros(()))]
    if new.discriminator is not None:
        others.append(sums.global_norm(new.discriminator.batch_stats))
    sound, memory, judged = guard.judge(
        old.guard, config.guard, jnp.stack(norms), metrics["loss/generator"], jnp.stack([jnp.asarray(x) for x in others])
    )
    # Both networks or neither: the one that learns from a broken one would break too.
    kept = guard.select(sound, dataclasses.replace(new, guard=None), dataclasses.replace(old, guard=None))
    return dataclasses.replace(kept, step=new.step, guard=memory), metrics | judged


def _to_images(batch: Batch) -> Images:
    """Returns the batch as float32, converted once."""
    weight = batch.get("weight", jnp.ones(len(batch["source"]), jnp.float32))
    # Without the barrier a compiler may convert again, with another rounding, wherever the images are used. Where nothing is to
    # be edited, source and target must be bit-identical, or the L1 loss would follow the sign of rounding errors.
    return jax.lax.optimization_barrier(Images(to_float(batch["source"]), to_float(batch["target"]), weight))


def _over_microbatches(
    one_pass: Callable[[BatchStats, Images, Number], PassResult], batch_stats: BatchStats, images: Images, count: int
) -> PassResult:
    """Runs `one_pass(batch_stats, part, number)` over the microbatches, one after another.

    Gradients and metrics are averaged. Each microbatch updates the moving averages that the previous one returned.
    """
    if count == 1:
        return one_pass(batch_stats, images, 0)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), images)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(one_pass, batch_stats, first, 0).gradients
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry: tuple[Params, BatchStats], numbered: tuple[Images, Number]) -> tuple[tuple[Params, BatchStats], Metrics]:
        total, batch_stats = carry
        result = one_pass(batch_stats, *numbered)
        return (jax.tree.map(jnp.add, total, result.gradients), result.batch_stats), result.metrics

    (total, batch_stats), metrics = jax.lax.scan(body, (zeros, batch_stats), (parts, jnp.arange(count)))
    return PassResult(jax.tree.map(lambda x: x / count, total), batch_stats, jax.tree.map(jnp.mean, metrics))


# ---- the discriminator ------------------------------------------------------------------------------------------------------


def _update_discriminator(
    state: State,
    images: Images,
    make_fake: Callable[[Images, Number], jax.Array],
    rate_factor: jax.Array,
    networks: Networks,
    config: Config,
) -> tuple[Learner, Metrics]:
    """Returns the discriminator after its step, and its metrics. `make_fake(part, number)` returns a microbatch's fake."""
    learner = state.discriminator
    assert learner is not None

    def discriminator_pass(batch_stats: BatchStats, part: Images, number: Number) -> PassResult:
        fake = jax.lax.stop_gradient(make_fake(part, number))
        result = _discriminator_gradients(learner.params, batch_stats, part, fake, networks, config)
        if is_off(config.loss.r1_weight):
            return result
        value, gradients = _lazy_r1(learner.params, batch_stats, part, state.step, networks, config)
        gradients = jax.tree.map(lambda a, b: a + config.loss.r1_weight * b, result.gradients, gradients)
        return PassResult(gradients, result.batch_stats, result.metrics | {"loss/r1": value})

    result = _over_microbatches(discriminator_pass, learner.batch_stats, images, config.parallel.accumulate)
    gradients, batch_stats, metrics = devices.mean(result)
    metrics = metrics | {"discriminator_gradient_norm": sums.global_norm(gradients)}
    learning_rate = config.optim.discriminator_lr * rate_factor
    return _apply_gradients(learner, gradients, batch_stats, learning_rate, config), metrics


def _discriminator_gradients(
    params: Params, batch_stats: BatchStats, part: Images, fake: jax.Array, networks: Networks, config: Config
) -> PassResult:
    def loss(params: Params) -> tuple[jax.Array, tuple[BatchStats, Metrics]]:
        # Real first, then fake: BatchNorm's moving averages depend on the order.
        real_scales, moved = _discriminate(networks, params, batch_stats, part.source, part.target)
        fake_scales, moved = _discriminate(networks, params, moved, part.source, fake)
        value = jnp.mean(part.weight * losses.discriminator(config.loss.adversarial, real_scales, fake_scales))
        return value, (moved, {"loss/discriminator": value} | _logit_metrics(real_scales[0][-1], fake_scales[0][-1], config))

    gradients, (moved, metrics) = jax.grad(loss, has_aux=True)(params)
    return PassResult(gradients, moved, metrics)


def _lazy_r1(params: Params, batch_stats: BatchStats, part: Images, step: jax.Array, networks: Networks, config: Config) -> Any:
    """Returns the penalty R1 and its gradient on every `r1_every`-th step, and else zeros (Karras et al. 2020, section 3.1).

    Both are so many times as large: their means over steps are those of the penalty.
    """

    def penalty(params: Params) -> jax.Array:
        # The averages that this pass would move are dropped.
        discriminate = lambda image: _discriminate(networks, params, batch_stats, part.source, image)[0]  # noqa: E731
        return config.loss.r1_every * jnp.mean(part.weight * losses.r1(discriminate, part.target))

    zeros = lambda params: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))  # noqa: E731
    # All devices are at the same step, so all of them take the same branch.
    return jax.lax.cond(step % config.loss.r1_every == 0, jax.value_and_grad(penalty), zeros, params)


def _logit_metrics(real: jax.Array, fake: jax.Array, config: Config) -> Metrics:
    """The discriminator's mean logits, and the share of the patches that it calls what they are."""
    # Least squares pulls real logits to 1 and fake ones to 0; the other losses part them at 0.
    border = 0.5 if config.loss.adversarial == "lsgan" else 0.0
    accuracy = {"accuracy/real": (real > border).mean(), "accuracy/fake": (fake < border).mean()}
    return {"logits/real": real.mean(), "logits/fake": fake.mean()} | accuracy


def _discriminate(
    networks: Networks, params: Params, batch_stats: BatchStats, source: jax.Array, image: jax.Array
) -> tuple[Scales, BatchStats]:
    """Returns the discriminator's features and logits for an image, and BatchNorm's moved averages."""
    variables = {"params": params, "batch_stats": batch_stats}
    output, moved = networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])
    return discriminator_scales(output), moved.get("batch_stats", {})


# ---- the generator ----------------------------------------------------------------------------------------------------------


def _generator_forward(learner: Learner, part: Images, number: Number, networks: Networks, key: jax.Array) -> Forward:
    """Returns the generator's output in training, its vjp, and BatchNorm's moved averages."""
    rngs = {"dropout": jax.random.fold_in(key, number)}

    def generate(params: Params) -> tuple[GeneratorOutput, BatchStats]:
        variables = {"params": params, "batch_stats": learner.batch_stats}
        output, moved = networks.generator.apply(variables, part.source, train=True, mutable=["batch_stats"], rngs=rngs)
        return generator_output(output), moved.get("batch_stats", {})

    return jax.vjp(generate, learner.params, has_aux=True)


def objective_gradient(
    output: GeneratorOutput,
    images: Images,
    step: jax.Array,
    discriminator: Learner | None,
    frozen: Params | None,
    networks: Networks,
    config: Config,
) -> tuple[GeneratorOutput, Metrics]:
    """Returns the gradient of the generator's objective at its output, and the value and share of every term.

    A new loss term takes a function, a line that evaluates it, and a line in the sum.
    """
    weights = config.loss
    edit_weight = losses.edit_weight(weights.edit_weight, weights.edit_weight_steps, step)
    adversarial_weight = weights.adversarial_weight * jnp.minimum(1.0, (step + 1) / jnp.maximum(1, weights.adversarial_ramp))

    def pixel_loss(fake: GeneratorOutput, images: Images) -> jax.Array:
        trust = losses.trust_unedited(fake, weights.left_share) if not is_off(weights.left_share) else 1.0
        return losses.pixel(weights.pixel, fake.image, images.target, images.source, edit_weight, trust)

    def adversarial_loss(fake: GeneratorOutput, images: Images) -> jax.Array:
        return losses.adversarial(weights.adversarial, discriminate(images, fake.image))

    def feature_matching_loss(fake: GeneratorOutput, images: Images) -> jax.Array:
        return losses.feature_matching(discriminate(images, fake.image), discriminate(images, images.target))

    def perceptual_loss(fake: GeneratorOutput, images: Images) -> jax.Array:
        fake_features, target_features = vgg_features(fake.image), vgg_features(images.target)
        return losses.perceptual(fake_features, target_features, weights.perceptual_layer_weights, weights.perceptual_scale)

    def mask_loss(fake: GeneratorOutput, images: Images) -> jax.Array:
        return losses.mask(fake, images.source, images.target, weights.left_share)

    def discriminate(images: Images, image: jax.Array) -> Scales:
        assert discriminator is not None
        return _discriminate(networks, discriminator.params, discriminator.batch_stats, images.source, image)[0]

    def vgg_features(image: jax.Array) -> losses.Features:
        window = (weights.perceptual_downsample, weights.perceptual_downsample)
        return networks.vgg.apply({"params": frozen}, nn.avg_pool(image, window, window))

    term = TermEvaluator(output, images, one_by_one=config.parallel.remat == "full")
    pixel = term("pixel", weights.pixel_weight, pixel_loss)
    adversarial = term("adversarial", weights.adversarial_weight, adversarial_loss)
    feature_matching = term("feature_matching", weights.feature_matching_weight, feature_matching_loss)
    perceptual = term("perceptual", weights.perceptual_weight, perceptual_loss)
    mask = term("mask", weights.mask_weight, mask_loss)
    objective = (
        weights.pixel_weight * pixel
        + adversarial_weight * adversarial
        + weights.feature_matching_weight * feature_matching
        + weights.perceptual_weight * perceptual
        + weights.mask_weight * mask
    )
    metrics = term.values() | {"loss/generator": jnp.asarray(objective.value)} | objective.shares()
    if not is_off(weights.pixel_weight):
        # Logged without the edit weight, so that values are comparable over the run, next to the loss of the unchanged source.
        for name, image in (("pixel", output.image), ("pixel_identity", images.source)):
            plain = losses.pixel(weights.pixel, image, images.target, images.source, 1.0)
            metrics[f"loss/{name}"] = jnp.mean(images.weight * plain)
    return objective.gradient(), metrics | losses.edit_measures(output.image, images.source, images.target)


# ---- the update -------------------------------------------------------------------------------------------------------------


def _apply_gradients(
    learner: Learner,
    gradients: Params,
    batch_stats: BatchStats,
    learning_rate: jax.Array,
    config: Config,
    kind: str = "adam",
) -> Learner:
    """Returns the network after its optimizer's step."""
    optimizer, gradients = optimizers.optimizer(config.optim, kind), optimizers.clip(gradients, config.optim)
    if config.parallel.optimizer_state == "sharded":
        # Every device updates its own part of the moments. The updates are then gathered: parameters are whole on every device.
        own_gradients, own_params = devices.own_part((gradients, learner.params))
        updates, opt_state = optimizer.update(own_gradients, learner.opt_state, own_params)
        updates = devices.join_parts(updates, learner.params)
    else:
        updates, opt_state = optimizer.update(gradients, learner.opt_state, learner.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, learner.params, updates)
    return Learner(params, batch_stats, opt_state)
