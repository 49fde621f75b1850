"""The step: one forward pass, the order of the updates, its FLOPs, its terms, and one trace."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import edited

from autoretouch_jax.config import AutoRetouch, OptimConfig, ParallelConfig, Pix2PixHDGlobal, Retouch
from autoretouch_jax.models.outputs import GeneratorOutput
from autoretouch_jax.models.pixels import to_float
from autoretouch_jax.runtime import devices
from autoretouch_jax.training import losses, optimizers
from autoretouch_jax.training.state import init_state, make_networks
from autoretouch_jax.training.step import _apply_gradients, train_step
from autoretouch_jax.training.terms import Images, Term, TermEvaluator
from autoretouch_jax.training.trainer import Trainer

SUM = re.compile(r"stablehlo.reduce.* applies stablehlo.add across dimensions = \[(.*?)\] : \(tensor<([x\d]*)x(\w+)>")
LOSSES_ON = {"perceptual_weight": 1.0, "vgg_weights": "random", "perceptual_layers": ("relu1_2",)}


def batch(size: int = 8, crop: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (size, crop, crop, 3), dtype=np.uint8) for name in ("source", "target")}


def spread(config, count: int, mode: str):
    """State and metrics after one step over so many devices."""
    config = edited(config, parallel={"devices": count, "mode": mode})
    trainer = Trainer(config)
    return trainer.step(trainer.init(), trainer.put(batch()), trainer.frozen)


def relative(a, b) -> float:
    difference = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y), a, b)
    return float(optax.global_norm(difference) / optax.global_norm(jax.tree.map(lambda y: np.asarray(y, np.float64), b)))


def test_the_generator_learns_through_the_updated_discriminator(small_config):
    config = edited(
        small_config,
        loss={"pixel_weight": 0.0},
        optim={"discriminator_lr": 0.1},
        generator={"head": "tanh", "norm": "batch"},
        discriminator={"norm": "batch"},
    )
    trainer = Trainer(config)
    networks, before = trainer.networks, init_state(config, trainer.networks)
    after, _ = trainer.step(trainer.init(), trainer.put(batch()), None)
    source = to_float(jnp.asarray(batch()["source"]))

    def loss(params, discriminator):
        fake, _ = networks.generator.apply(
            {"params": params, "batch_stats": before.generator.batch_stats}, source, train=True, mutable=["batch_stats"]
        )
        variables = {"params": discriminator.params, "batch_stats": discriminator.batch_stats}
        logits, _ = networks.discriminator.apply(variables, source, fake, train=True, mutable=["batch_stats"])
        return config.loss.adversarial_weight * losses.adversarial("lsgan", [[logits]]).mean()

    gradient, scale = jax.jit(jax.grad(loss)), 1 - config.optim.beta1
    through_updated = jax.tree.map(lambda g: scale * g, gradient(before.generator.params, after.discriminator))
    through_old = jax.tree.map(lambda g: scale * g, gradient(before.generator.params, before.discriminator))
    ours = after.generator.opt_state.mu
    assert relative(ours, through_updated) < 1e-4
    assert relative(ours, through_old) > 1e-2


def test_the_discriminators_moving_averages_see_real_then_fake(small_config):
    config = edited(small_config, discriminator={"norm": "batch"})
    trainer = Trainer(config)
    networks, before = trainer.networks, init_state(config, trainer.networks)
    after, _ = trainer.step(trainer.init(), trainer.put(batch()), None)
    source, target = (to_float(jnp.asarray(batch()[name])) for name in ("source", "target"))
    fake = networks.generator.apply({"params": before.generator.params}, source)
    stats = before.discriminator.batch_stats

    @jax.jit
    def moved(stats, image):
        variables = {"params": before.discriminator.params, "batch_stats": stats}
        return networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    for image in (target, fake):
        stats = moved(stats, image)
    assert relative(after.discriminator.batch_stats, stats) < 1e-5


def flops(function, *arguments) -> float:
    # The step is jitted with options of its own, which JAX takes from the outermost program alone.
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*arguments).compile().cost_analysis()["flops"]


def bound_step(config):
    """The step of a config on one device, unwrapped, and its arguments."""
    networks, frozen = make_networks(config)
    mesh = devices.make_mesh(ParallelConfig(devices=1), config.train.batch)
    step = functools.partial(train_step, networks=networks, config=config)
    return networks, devices.wrap_step(step, mesh, "jit"), (init_state(config, networks), batch(8, 64), frozen)


def test_one_forward_costs_at_most_085_of_two(small_config):
    """The usual GAN step runs the generator once for D and once for G."""
    config = edited(small_config, loss=LOSSES_ON | {"adversarial_weight": 1.0})
    config = edited(
        config, generator={"width": 64, "blocks": 15, "norm": "batch"}, discriminator={"width": 64, "norm": "batch"}
    )
    networks, ours, arguments = bound_step(config)

    def two_forwards(state, batch, frozen):
        source, target = to_float(batch["source"]), to_float(batch["target"])

        def generate(params):
            variables = {"params": params, "batch_stats": state.generator.batch_stats}
            fake, moved = networks.generator.apply(variables, source, train=True, mutable=["batch_stats"])
            return fake, moved["batch_stats"]

        def discriminate(params, stats, image):
            variables = {"params": params, "batch_stats": stats}
            logits, moved = networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])
            return logits, moved["batch_stats"]

        def d_loss(params):
            # Other parameters keep XLA from sharing this forward with the generator's.
            fake = jax.lax.optimization_barrier(generate(jax.tree.map(lambda p: 1.001 * p, state.generator.params))[0])
            real_logits, stats = discriminate(params, state.discriminator.batch_stats, target)
            fake_logits, stats = discriminate(params, stats, fake)
            return losses.discriminator("lsgan", [[real_logits]], [[fake_logits]]).mean(), stats

        def g_loss(params, discriminator):
            fake, stats = generate(params)
            logits, _ = discriminate(discriminator.params, discriminator.batch_stats, fake)
            features = [networks.vgg.apply({"params": frozen}, image) for image in (fake, target)]
            pixel = losses.pixel("l1", fake, target, source, 1.0)
            return (pixel + losses.adversarial("lsgan", [[logits]]) + losses.perceptual(*features)).mean(), stats

        d_gradients, d_stats = jax.grad(d_loss, has_aux=True)(state.discriminator.params)
        discriminator = _apply_gradients(state.discriminator, d_gradients, d_stats, 1e-4, config)
        params = jax.lax.optimization_barrier(state.generator.params)
        g_gradients, g_stats = jax.grad(g_loss, has_aux=True)(params, discriminator)
        generator = _apply_gradients(state.generator, g_gradients, g_stats, 1e-4, config)
        return generator, discriminator, optimizers.ema_update(state.ema, generator.params, 0.999, state.step)

    ratio = flops(ours, *arguments) / flops(two_forwards, *arguments)
    assert 0.5 < ratio <= 0.85


def term_alone(config, term: str):
    """The loss of one term with its gradient at the generator's output, and the arguments to compile it with."""
    networks, frozen = make_networks(config)
    state = init_state(config, networks)
    image = to_float(jnp.asarray(batch(8, 64)["source"]))

    def perceptual(fake, frozen):
        features = [networks.vgg.apply({"params": frozen}, value) for value in (fake, image)]
        return losses.perceptual(*features).mean()

    def adversarial(fake, params):
        output = networks.discriminator.apply({"params": params}, image, fake)
        return losses.adversarial("lsgan", [[output]]).mean()

    if term == "perceptual_weight":
        return jax.value_and_grad(perceptual), (image, frozen)
    return jax.value_and_grad(adversarial), (image, state.discriminator.params)


@pytest.mark.parametrize("term", ["perceptual_weight", "adversarial_weight"])
def test_a_weight_of_zero_saves_all_that_the_term_costs(small_config, term):
    """The step without a term makes fewer FLOPs by at least those of the term alone, measured apart from the step."""
    config = edited(small_config, loss=LOSSES_ON | {"adversarial_weight": 1.0}, discriminator={"width": 16})
    _, with_term, arguments = bound_step(config)
    networks, without, arguments_without = bound_step(edited(config, loss={term: 0.0}))
    saved = flops(with_term, *arguments) - flops(without, *arguments_without)
    loss, inputs = term_alone(config, term)
    alone = flops(loss, *inputs)
    assert saved >= 0.98 * alone
    if term == "adversarial_weight":
        assert saved >= 2.5 * alone  # the discriminator's own passes, forwards and backwards, are saved too
        assert networks.discriminator is None
        assert arguments_without[0].discriminator is None
    else:
        assert saved <= 1.05 * alone
        assert networks.vgg is None


def test_a_term_of_weight_zero_is_never_called(small_config):
    def explode(*_):
        raise AssertionError("a term of weight 0 was computed")

    images = Images(*(jnp.ones((1, 4, 4, 3)),) * 2, jnp.ones(1))
    term = TermEvaluator(GeneratorOutput(images.source, None), images, one_by_one=False)
    nothing = term("nothing", 0.0, explode)
    assert nothing == Term(0.0, {})
    assert term.values() == {}


def test_terms_add_up_like_the_numbers_they_stand_for():
    """The gradient of the weighted sum is the gradient of the weighted loss, and every share is its part of the norms."""
    rng = np.random.default_rng(0)
    output = GeneratorOutput(jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32), None)
    images = Images(*(jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2)), jnp.array([1.0, 3.0]))
    square = lambda fake, images: jnp.square(fake.image - images.target).mean((1, 2, 3))  # noqa: E731
    absolute = lambda fake, images: jnp.abs(fake.image - images.source).mean((1, 2, 3))  # noqa: E731
    for one_by_one in (False, True):
        term = TermEvaluator(output, images, one_by_one)
        objective = 2.0 * term("square", 2.0, square) + jnp.float32(0.5) * term("absolute", 0.5, absolute)

        def loss(fake):
            return jnp.mean(images.weight * (2.0 * square(fake, images) + 0.5 * absolute(fake, images)))

        value, gradient = jax.value_and_grad(loss)(output)
        assert float(objective.value) == pytest.approx(float(value), rel=1e-6)
        np.testing.assert_allclose(objective.gradient().image, gradient.image, rtol=1e-5)
        shares = {name: float(share) for name, share in objective.shares().items()}
        assert sum(shares.values()) == pytest.approx(1)
        norms = [float(optax.global_norm(objective.gradients[name])) for name in ("square", "absolute")]
        assert shares["share/square"] == pytest.approx(norms[0] / sum(norms))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state(small_config):
    config = edited(small_config, generator={"norm": "batch"}, train={"precision": "bfloat16"}, loss=LOSSES_ON)
    _, step, arguments = bound_step(config)
    text = step.lower(*arguments).as_text()
    assert "convolution" in text
    assert all("bf16" in line for line in text.splitlines() if "stablehlo.convolution" in line)
    state, metrics = step(*arguments)
    for leaf in jax.tree.leaves((state.generator, state.discriminator, state.ema, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "network",
    [AutoRetouch(width=4, blocks=1, norm="batch"), Retouch(width=8, levels=2), Pix2PixHDGlobal(width=4, downs=1, blocks=1)],
)
def test_bfloat16_sums_no_pixels_in_bfloat16(small_config, network):
    """Such a sum stops growing once the next value is less than its last digit: the gradients of biases came out too small."""
    config = dataclasses.replace(edited(small_config, train={"precision": "bfloat16"}, loss=LOSSES_ON), generator=network)
    _, step, arguments = bound_step(config)
    found = 0
    for line in step.lower(*arguments).as_text().splitlines():
        if match := SUM.search(line):
            dimensions, shape, dtype = match.groups()
            sides = [int(side) for side in shape.split("x")]
            summands = math.prod(sides[int(dimension)] for dimension in dimensions.split(","))
            assert dtype != "bf16" or summands <= 4, line
            found += 1
    assert found > 20


def test_the_step_is_traced_once(small_config):
    trainer = Trainer(small_config)
    state, traces = trainer.init(), []

    def counted(*arguments):
        traces.append(1)
        return train_step(*arguments, networks=trainer.networks, config=small_config)

    step = devices.wrap_step(counted, trainer.mesh, "jit")
    for _ in range(3):
        state, _ = step(state, trainer.put(batch()), None)
    assert len(traces) == 1


def test_shares_add_up_and_every_term_is_logged(small_config):
    _, metrics = spread(edited(small_config, loss=LOSSES_ON), 1, "jit")
    shares = [float(metrics[f"share/{term}"]) for term in ("pixel", "adversarial", "perceptual")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert {"loss/pixel", "loss/adversarial", "loss/perceptual", "loss/discriminator"} <= metrics.keys()


def test_losses_by_hand():
    logits = jnp.array([[0.0, 2.0]])
    sigmoid = 1 / (1 + np.exp(-np.array([0.0, 2.0])))
    assert float(losses.adversarial("bce", [[logits]]).mean()) == pytest.approx(-np.log(sigmoid).mean(), rel=1e-6)
    assert float(losses.adversarial("lsgan", [[logits]]).mean()) == pytest.approx((1 + 1) / 2)
    assert float(losses.adversarial("hinge", [[logits]]).mean()) == pytest.approx(-1)
    assert float(losses.discriminator("lsgan", [[logits]], [[-logits]]).mean()) == pytest.approx(0.5 * (1 + 2))
    assert float(losses.discriminator("hinge", [[logits]], [[-logits]]).mean()) == pytest.approx(0.5 * (0.5 + 0.5))
    bce = -np.log(sigmoid).mean()  # the fake's logits are the real's, negated: both halves are equal
    assert float(losses.discriminator("bce", [[logits]], [[-logits]]).mean()) == pytest.approx(bce, rel=1e-6)
    source, target, fake = jnp.zeros((1, 1, 2, 3)), jnp.array([[[[0.0] * 3, [1.0] * 3]]]), jnp.full((1, 1, 2, 3), 0.5)
    assert float(losses.pixel("l1", fake, target, source, 1.0).mean()) == pytest.approx(0.5)
    assert float(losses.pixel("mse", fake, target, source, 3.0).mean()) == pytest.approx(0.25 * (1 + 3) / 2)


def test_schedule_does_not_depend_on_the_total_before_the_decay():
    optimizer = OptimConfig(warmup_steps=10, decay_share=0.25)
    factor = lambda step, steps: float(optimizers.schedule(optimizer, steps, jnp.asarray(step)))  # noqa: E731
    assert factor(0, 100) == pytest.approx(0.1)
    assert factor(50, 100) == factor(50, 1000) == 1
    assert 0 < factor(99, 100) < 0.05
