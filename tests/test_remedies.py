"""What helps when training goes wrong: spectral norm, the penalty R1, a smooth pixel loss, and labels that left blemishes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import edited

from autoretouch_jax.config import AutoRetouchPatchGAN, Config, DataConfig, PatchGAN, Retouch
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import Refused
from autoretouch_jax.models.modules import make_discriminator
from autoretouch_jax.models.outputs import GeneratorOutput
from autoretouch_jax.models.pixels import to_float
from autoretouch_jax.runtime import devices
from autoretouch_jax.training import losses
from autoretouch_jax.training.checkpoints import Checkpoints
from autoretouch_jax.training.state import make_networks
from autoretouch_jax.training.step import objective_gradient, train_step
from autoretouch_jax.training.terms import Images
from autoretouch_jax.training.trainer import Trainer

KINDS = (AutoRetouchPatchGAN(width=4), PatchGAN(width=4, scales=2, norm="instance"))


def batch(size: int = 8, crop: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (size, crop, crop, 3), dtype=np.uint8) for name in ("source", "target")}
    return images | {"weight": np.linspace(0, 2, size, dtype=np.float32)}


def one_step(config):
    """State and metrics after a step on the whole batch."""
    trainer = Trainer(config)
    return trainer.step(trainer.init(), trainer.put(batch()), trainer.frozen)


def relative(a, b) -> float:
    a, b = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (a, b))
    return float(optax.global_norm(jax.tree.map(np.subtract, a, b)) / optax.global_norm(b))


# ---- spectral norm ----------------------------------------------------------------------------------------------------------


def initialised(config):
    """A discriminator and its variables."""
    module, image = make_discriminator(config), jnp.zeros((1, 32, 32, 3))
    return module, jax.jit(module.init)(jax.random.key(0, impl="rbg"), image, image)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.network)
def test_spectral_norm_adds_and_renames_no_parameter(config):
    _, plain = initialised(config)
    _, spectral = initialised(dataclasses.replace(config, spectral_norm=True))
    assert jax.tree.map(jnp.shape, plain["params"]) == jax.tree.map(jnp.shape, spectral["params"])
    assert "spectral" not in str(jax.tree.structure(plain)), "without it, checkpoints hold what they held"
    assert "spectral" in str(jax.tree.structure(spectral["batch_stats"]))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.network)
def test_the_output_is_that_of_kernels_divided_by_their_largest_singular_values(config):
    config = dataclasses.replace(config, spectral_norm=True)
    module, variables = initialised(config)
    rng = np.random.default_rng(0)
    source, image = (jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32) for _ in range(2))
    iterate = jax.jit(lambda v: module.apply(v, source, image, train=True, mutable=["batch_stats"])[1])
    for _ in range(200):
        variables = variables | iterate(variables)

    def divided(kernel):
        if kernel.ndim < 2:
            return kernel
        return kernel / np.linalg.svd(np.reshape(kernel, (-1, kernel.shape[-1])), compute_uv=False)[0]

    plain, _ = initialised(dataclasses.replace(config, spectral_norm=False))
    ours, _ = module.apply(variables, source, image, train=True, mutable=["batch_stats"])
    by_hand = variables | {"params": jax.tree.map(divided, variables["params"])}
    expected, _ = plain.apply(by_hand, source, image, train=True, mutable=["batch_stats"])
    assert relative(ours, expected) < 1e-3


def test_the_power_iteration_moves_in_the_discriminators_two_passes_and_nowhere_else(small_config):
    config = edited(small_config, discriminator={"spectral_norm": True})
    before = jax.device_get(Trainer(config).init()).discriminator
    after, _ = one_step(config)
    kernel = np.reshape(before.params["conv1"]["kernel"], (-1, 8))
    vector = before.batch_stats["conv1_spectral"]["conv1/kernel/u"]
    for _ in range(2):  # on the target, then on the fake; the pass through which the generator learns moves nothing
        vector = vector @ kernel.T @ kernel
        vector = vector / np.linalg.norm(vector)
    np.testing.assert_allclose(after.discriminator.batch_stats["conv1_spectral"]["conv1/kernel/u"], vector, atol=1e-5)


def test_a_run_with_spectral_norm_is_saved_and_read_again(small_config, tmp_path):
    trainer = Trainer(edited(small_config, discriminator={"spectral_norm": True}))
    state, _ = one_step(trainer.config)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored = checkpoints.restore(1, trainer.shapes, trainer.init)[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.discriminator, state.discriminator))


# ---- R1 ---------------------------------------------------------------------------------------------------------------------


def test_r1_by_hand():
    rng = np.random.default_rng(0)
    target, slope = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    single = lambda image: [[(slope * image).sum((1, 2, 3), keepdims=True)]]  # noqa: E731
    np.testing.assert_allclose(losses.r1(single, target), 0.5 * np.square(slope).sum((1, 2, 3)), rtol=1e-5)
    # Of sixteen logits, each three times the sum of its own pixel's channels, every one has the penalty 0.5 · 3 · 3².
    patches = lambda image: [[3 * image.sum(-1, keepdims=True)]]  # noqa: E731
    np.testing.assert_allclose(losses.r1(patches, target), [13.5, 13.5], rtol=1e-5)


R1 = {"r1_weight": 3.0, "r1_every": 2}


def test_r1_is_added_on_every_second_step_only(small_config):
    """Adam's mean of the gradients shows what was added: the penalty's gradient, twice as strong, and nothing in between."""
    plain = edited(small_config, discriminator={"norm": "batch"})
    config = edited(plain, loss=R1)
    trainers = [Trainer(plain), Trainer(config)]
    trainer, before = trainers[1], jax.device_get(trainers[1].init())

    def both(state):
        return [t.step(devices.put(state, t.shardings), t.put(batch()), None) for t in trainers]

    (without, _), (with_r1, metrics) = both(before)
    source, target = (to_float(jnp.asarray(batch()[name])) for name in ("source", "target"))

    def penalty(params):
        variables = {"params": params, "batch_stats": before.discriminator.batch_stats}

        def logits(image):
            out, _ = trainer.networks.discriminator.apply(variables, source, image, train=True, mutable=["batch_stats"])
            return out.sum() / 2  # four logits for each image

        return 0.5 * (batch()["weight"] * jnp.square(jax.grad(logits)(target)).sum((1, 2, 3))).mean()

    value, gradient = jax.jit(jax.value_and_grad(penalty))(before.discriminator.params)
    assert float(metrics["loss/r1"]) == pytest.approx(2 * float(value), rel=1e-4)
    scale = 2 * 3.0 * (1 - config.optim.beta1)
    added = jax.tree.map(np.subtract, *jax.device_get((with_r1.discriminator.opt_state.mu, without.discriminator.opt_state.mu)))
    assert relative(added, jax.tree.map(lambda g: scale * g, gradient)) < 1e-3
    # It moves no average.
    assert jax.tree.all(jax.tree.map(np.array_equal, with_r1.discriminator.batch_stats, without.discriminator.batch_stats))
    # From the same state at step 1, nothing is added.
    at_one = dataclasses.replace(before, step=np.asarray(1, np.int32))
    (without, _), (with_r1, metrics) = both(at_one)
    assert float(metrics["loss/r1"]) == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, with_r1.discriminator.params, without.discriminator.params))


def stepped_twice(config):
    trainer = Trainer(config)
    state, seen = trainer.init(), []
    for _ in range(2):
        state, metrics = trainer.step(state, trainer.put(batch()), trainer.frozen)
        seen.append(float(metrics["loss/r1"]))
    return state, seen


@pytest.mark.parametrize(
    ("discriminator", "parallel"),
    [
        ({"norm": "batch"}, {"devices": 8}),
        ({"norm": "none"}, {"devices": 2, "mode": "pmap", "accumulate": 2}),
    ],
)
def test_r1_is_the_same_on_devices_and_in_microbatches(small_config, discriminator, parallel):
    config = edited(small_config, discriminator=discriminator, loss=R1, train={"batch_norm": "global"})
    (one, seen), (many, _) = (stepped_twice(c) for c in (config, edited(config, parallel=parallel)))
    assert seen[0] > 0 == seen[1]
    assert relative(many.discriminator.opt_state.mu, one.discriminator.opt_state.mu) < 1e-4


def test_the_step_with_r1_is_one_program_that_branches(small_config):
    config = edited(small_config, loss=R1)
    trainer = Trainer(config)
    traces = []

    def counted(*arguments):
        traces.append(1)
        return train_step(*arguments, networks=trainer.networks, config=config)

    step = devices.wrap_step(counted, trainer.mesh, "jit")
    state, data = trainer.init(), trainer.put(batch())
    assert "stablehlo.case" in step.lower(state, data, None).as_text()
    for _ in range(3):
        state, _ = step(state, data, None)
    assert len(traces) == 1


# ---- the pixel loss ---------------------------------------------------------------------------------------------------------


def test_charbonnier_by_hand():
    """Quadratic below half a level of 8 bits, and parallel to l1 above."""
    epsilon, zeros = 1 / 255, jnp.zeros((3, 1, 1, 3))
    error = jnp.broadcast_to(jnp.array([0.0, epsilon, 1.0])[:, None, None, None], zeros.shape)
    value = losses.pixel("charbonnier", error, zeros, zeros, 1.0)
    np.testing.assert_allclose(value, [0.0, (np.sqrt(2) - 1) * epsilon, 1 - epsilon], atol=1e-5)
    slope = jax.grad(lambda x: losses.pixel("charbonnier", x, zeros, zeros, 1.0).sum())(error)
    np.testing.assert_allclose(slope.sum((1, 2, 3)), [0.0, np.sqrt(0.5), 1.0], atol=1e-4)


# ---- labels that left blemishes ---------------------------------------------------------------------------------------------

LOGITS = jnp.array([-2.0, 0.0, 3.0])  # three unedited pixels, and below the same three edited


def two_rows() -> tuple[GeneratorOutput, jax.Array, jax.Array]:
    """One image of six pixels, of which the second row is edited: the output, its source, its target."""
    logits = jnp.stack([LOGITS, LOGITS])[None, ..., None]
    source = jnp.zeros((1, 2, 3, 3))
    return GeneratorOutput(source + 0.5, logits), source, source.at[:, 1].set(1.0)


def test_the_masks_loss_is_that_of_the_share_that_was_not_left():
    fake, source, target = two_rows()
    p = 1 / (1 + np.exp(-np.asarray(LOGITS)))
    expected = np.mean([-np.log(1 - 0.7 * p), -np.log(p)])
    assert float(losses.mask(fake, source, target, 0.3)[0]) == pytest.approx(expected, rel=1e-5)
    plain = np.mean([-np.log(1 - p), -np.log(p)])
    assert float(losses.mask(fake, source, target)[0]) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("probability", [0.05, 0.4, 0.9])
def test_the_mask_learns_how_likely_a_blemish_is_although_some_were_left(probability):
    """Where blemishes of probability p are edited in 70 % of the cases, the loss is lowest at p."""
    fake, source, _ = two_rows()

    def loss(logit):
        output = fake._replace(mask_logits=jnp.full((1, 2, 3, 1), logit))
        edited_loss = losses.mask(output, source, source + 1, 0.3)[0]
        return 0.7 * probability * edited_loss + (1 - 0.7 * probability) * losses.mask(output, source, source, 0.3)[0]

    logit = float(np.log(probability / (1 - probability)))
    assert abs(float(jax.grad(loss)(logit))) < 1e-6
    assert float(loss(logit)) < min(float(loss(logit - 0.5)), float(loss(logit + 0.5)))


def test_an_unedited_pixel_that_is_surely_a_blemish_hardly_counts():
    fake, source, target = two_rows()
    trust = losses.trust_unedited(fake, 0.3)
    p = 1 / (1 + np.exp(-np.asarray(LOGITS)))
    np.testing.assert_allclose(trust[0, 0, :, 0], (1 - p) / (1 - 0.7 * p), rtol=1e-5)
    # Unedited pixels are off by 0.5 and count so much; edited ones are off by 0.5 too and count four times, whatever the mask.
    value = losses.pixel("l1", fake.image, target, source, 4.0, trust)[0]
    assert float(value) == pytest.approx(0.5 * (float(trust[0, 0].sum()) + 3 * 4) / 6, rel=1e-5)
    through_mask = jax.grad(lambda f: losses.pixel("l1", f.image, target, source, 4.0, losses.trust_unedited(f, 0.3)).sum())(
        fake
    )
    assert not np.any(through_mask.mask_logits), "a mask that calls everything a blemish must not be a way to pay less"


def test_a_share_of_zero_is_the_program_without_it():
    def plain(fake, source, target):
        pixel = losses.pixel("l1", fake.image, target, source, 4.0)
        edit = jnp.any(source != target, axis=-1, keepdims=True)
        cross_entropy = optax.sigmoid_binary_cross_entropy(fake.mask_logits, edit.astype(jnp.float32))
        return pixel, jnp.mean(cross_entropy, (1, 2, 3))

    def ours(fake, source, target):
        return losses.pixel("l1", fake.image, target, source, 4.0, 1.0), losses.mask(fake, source, target, 0.0)

    texts = [jax.jit(f).lower(*two_rows()).as_text().replace(f.__name__, "f") for f in (plain, ours)]
    assert texts[0] == texts[1]


def test_the_objective_trusts_unedited_pixels_only_as_far(small_config):
    config = edited(small_config, loss={"mask_weight": 1.0, "adversarial_weight": 0.0})
    networks, _ = make_networks(dataclasses.replace(config, generator=Retouch(width=4, levels=2, blocks=1)))
    fake, source, target = two_rows()

    def gradient(share):
        loss = edited(config, loss={"left_share": share})
        return objective_gradient(fake, Images(source, target, jnp.ones(1)), jnp.zeros(()), None, None, networks, loss)

    (plain, logged), (ours, logged_too) = gradient(0.0), gradient(0.3)
    trust = losses.trust_unedited(fake, 0.3).at[:, 1].set(1.0)
    np.testing.assert_allclose(ours.image, trust * plain.image, rtol=1e-5)
    assert float(logged["loss/pixel"]) == float(logged_too["loss/pixel"]), "the log compares runs with and without"
    assert float(logged["loss/mask"]) > float(logged_too["loss/mask"])


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({"left_share": 0.3}, "--loss.left-share"),
        ({"r1_weight": 1.0, "adversarial_weight": 0.0}, "--loss.r1-weight"),
    ],
)
def test_a_remedy_without_what_it_acts_on_is_refused(loss, key):
    with pytest.raises(Refused, match=key):
        validate(edited(Config(data=DataConfig(root="faces")), loss=loss))
