"""Convolutions by Winograd's algorithm and BatchNorm's written-out gradient, beside the plain ones; the memory that is kept."""

import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoretouch_jax.config import networks
from autoretouch_jax.models import convolution, forms, sums, winograd
from autoretouch_jax.models.layers import BatchNorm
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.planning import gpu
from autoretouch_jax.training import losses

OUTPUTS, GRADIENTS = 1e-5, 1e-4  # relative to the largest value
CHANNELS = winograd.SMALLEST_CHANNELS


def convolve(x, kernel, padding="SAME", strides=(1, 1)):
    return convolution.convolve(x, kernel, strides, padding)


def plainly(function, *arguments):
    with forms.plain():
        return function(*arguments)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel_of(inputs, outputs):
    return noise(3, 3, inputs, outputs, seed=1) / np.sqrt(9 * inputs)


def uses_winograd(x, kernel, padding="SAME", **options):
    return "conv_general_dilated" not in str(jax.make_jaxpr(lambda *a: convolve(*a, padding, **options))(x, kernel))


def error(value, reference):
    return float(jnp.abs(value - reference).max() / jnp.abs(reference).max())


# Odd sides, asymmetric margins, more margin than a kernel reaches, and none.
SHAPES = [
    ((2, 32, 32), "SAME"),
    ((1, 31, 27), "SAME"),
    ((2, 34, 35), ((0, 1), (2, 1))),
    ((3, 20, 21), ((2, 2), (2, 2))),
    ((2, 26, 26), "VALID"),
]


@pytest.mark.parametrize("band", [2**30, 2**21, 2**19], ids=["whole", "an image at a time", "several bands an image"])
@pytest.mark.parametrize(("shape", "padding"), SHAPES)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(shape, padding, band, monkeypatch):
    monkeypatch.setattr(winograd, "LARGEST_BAND", band)
    jax.clear_caches()  # shapes that another test traced keep its bands
    x, kernel = noise(*shape, CHANNELS), kernel_of(CHANNELS, 48)
    assert uses_winograd(x, kernel, padding)

    def results(x, kernel):
        y, pull = jax.vjp(lambda *a: convolve(*a, padding), x, kernel)
        return y, *pull(noise(*y.shape, seed=2))

    fast, plain = jax.jit(lambda *a: results(*a))(x, kernel), plainly(jax.jit(lambda *a: results(*a)), x, kernel)
    assert fast[0].shape == plain[0].shape
    for value, reference, tolerance in zip(fast, plain, (OUTPUTS, GRADIENTS, GRADIENTS), strict=True):
        assert error(value, reference) <= tolerance


def test_a_gradient_of_a_gradient_is_the_plain_one():
    """As in R1, where a network's gradient is penalised."""
    x, kernel = noise(2, 16, 16, CHANNELS), kernel_of(CHANNELS, CHANNELS)

    def penalty(kernel):
        return jnp.square(jax.grad(lambda x: jnp.square(convolve(x, kernel)).sum())(x)).mean()

    assert error(jax.grad(penalty)(kernel), plainly(jax.grad(penalty), kernel)) <= GRADIENTS


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 32, 32, 16), (3, 3, 16, 64), {}),  # few channels
        ((1, 8, 8, 64), (3, 3, 64, 64), {}),  # few tiles
        ((1, 32, 32, 64), (1, 1, 64, 64), {}),
        ((1, 32, 32, 64), (3, 3, 64, 64), {"strides": (2, 2)}),
        ((1, 32, 32, 64), (3, 3, 64, 64), {"padding": ((3, 3), (3, 3))}),
    ],
)
def test_other_convolutions_stay_plain(shape, kernel, options):
    assert not uses_winograd(noise(*shape), noise(*kernel), **options)


def test_other_types_and_other_devices_stay_plain(monkeypatch):
    x, kernel = noise(1, 32, 32, 64), kernel_of(64, 64)
    assert uses_winograd(x, kernel)
    assert not uses_winograd(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not uses_winograd(x, kernel)


def test_it_multiplies_less():
    x, kernel = noise(2, 32, 32, 128), kernel_of(128, 128)

    def flops():
        return jax.jit(lambda *a: convolve(*a)).lower(x, kernel).compile().cost_analysis()["flops"]

    # 2.25 times fewer products. The transforms take back a little.
    assert flops() < plainly(flops) / 2


def test_flops_of_a_plan_are_those_of_plain_convolutions():
    x, kernel = noise(2, 32, 32, 128), kernel_of(128, 128)
    assert gpu.flops(convolve, x, kernel) == pytest.approx(2 * 9 * 128 * x.size, rel=1e-3)


@pytest.mark.parametrize("config", [networks.AutoRetouch(width=32, blocks=3), networks.Retouch(width=32, levels=2)])
def test_a_generator_computes_the_same(config, monkeypatch):
    # At the kink of the leaky ReLU, a rounding error would choose another slope.
    monkeypatch.setattr(flax.linen, "leaky_relu", lambda x, slope: flax.linen.silu(x))
    module, image = make_generator(config), 0.5 * noise(2, 64, 64, 3)
    variables = module.init(jax.random.key(0), image)
    params, rest = variables["params"], {name: value for name, value in variables.items() if name != "params"}
    # What starts at zero would hide the layers before it.
    params = jax.tree.map(lambda x: x + 0.02 * noise(*x.shape, seed=3), params)

    def objective(params):
        output, _ = module.apply({"params": params} | rest, image, train=True, mutable=["batch_stats"])
        output = getattr(output, "image", output)
        return (output * noise(*output.shape, seed=4)).sum(), output

    (_, output), gradients = jax.jit(jax.value_and_grad(lambda p: objective(p), has_aux=True))(params)
    plain = jax.jit(jax.value_and_grad(lambda p: objective(p), has_aux=True))
    (_, plain_output), plain_gradients = plainly(plain, params)
    assert not np.array_equal(output, plain_output)  # both ways were taken
    assert error(output, plain_output) <= OUTPUTS
    flat, plain_flat = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (gradients, plain_gradients))
    assert float(jnp.linalg.norm(flat - plain_flat) / jnp.linalg.norm(plain_flat)) <= GRADIENTS


def test_remat_of_norms_does_not_convolve_again():
    config, image = networks.AutoRetouch(width=32, blocks=2), noise(2, 32, 32, 3)

    def products(remat):
        module = make_generator(config, remat=remat)
        variables = module.init(jax.random.key(0), image)

        def loss(params):
            return module.apply(variables | {"params": params}, image, train=True, mutable=["batch_stats"])[0].sum()

        return jax.jit(jax.grad(loss)).lower(variables["params"]).compile().as_text().count(" dot(")

    assert products("norms") == products("none") < products("full")


# ---- BatchNorm --------------------------------------------------------------------------------------------------------------


def derived(x, scale, bias):
    """BatchNorm as it is defined, for JAX to derive."""
    mean = x.mean((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean((0, 1, 2)) + 1e-3) * scale + bias


def ours(x, scale, bias):
    module = BatchNorm(momentum=0.8, epsilon=1e-3, unbiased=False)
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}
    return module.apply(variables, x, True, mutable=["batch_stats"])[0]


def test_the_written_out_gradient_of_batch_norm_is_the_derived_one():
    arguments = 3 * noise(2, 7, 5, 8) + 1, 1 + noise(8, seed=1), noise(8, seed=2)
    weight = noise(2, 7, 5, 8, seed=3)
    gradients, references = (
        jax.grad(lambda *a, f=f: (weight * f(*a)).sum(), argnums=(0, 1, 2))(*arguments) for f in (ours, derived)
    )
    for value, reference in zip(gradients, references, strict=True):
        assert error(value, reference) <= 1e-5


def test_a_gradient_of_its_gradient_is_the_derived_one():
    x, scale, bias, weight = 3 * noise(2, 7, 5, 8) + 1, 1 + noise(8, seed=1), noise(8, seed=2), noise(2, 7, 5, 8, seed=3)

    def penalty(norm, scale):
        return jnp.square(jax.grad(lambda x: (weight * jnp.tanh(norm(x, scale, bias))).sum())(x)).sum()

    value, reference = (jax.grad(lambda s, f=f: penalty(f, s))(scale) for f in (ours, derived))
    assert error(value, reference) <= 1e-4


def test_batch_norm_of_bfloat16_is_that_of_the_same_values_in_float32():
    x, scale, bias, weight = 3 * noise(2, 7, 5, 8) + 1, 1 + noise(8, seed=1), noise(8, seed=2), noise(2, 7, 5, 8, seed=3)
    half = x.astype(jnp.bfloat16)
    value, reference = (jax.jit(ours)(image, scale, bias) for image in (half, half.astype(jnp.float32)))
    assert value.dtype == jnp.float32
    assert error(value, reference) <= 1e-5

    def gradient(image):
        return jax.grad(lambda x: jnp.square(jax.grad(lambda x: (weight * jnp.tanh(ours(x, scale, bias))).sum())(x)).sum())(
            image
        )

    assert error(gradient(half).astype(jnp.float32), gradient(half.astype(jnp.float32))) <= 2e-2


@pytest.mark.parametrize(("dtype", "kept"), [(jnp.bfloat16, True), (jnp.float32, False)])
def test_what_is_bfloat16_stays_so_in_memory(dtype, kept):
    """A barrier keeps XLA from carrying an array on as float32. In float32, where it could only hinder, there is none."""
    x = noise(2, 7, 5, 8).astype(dtype)
    norm = jax.jit(ours).lower(x, jnp.ones(8), jnp.zeros(8)).as_text()
    perceptual = jax.jit(losses.perceptual).lower({"relu1_2": x}, {"relu1_2": x}).as_text()
    assert [("optimization_barrier" in text) for text in (norm, perceptual)] == [kept, kept]


# ---- sums -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 16, 16, 5), (3, 3, 8, 4), (2, 7, 5, 8), (16, 3)])
def test_sums_and_their_gradients_are_the_plain_ones(shape):
    x, weight = 1 + noise(*shape), noise(shape[-1], seed=1)

    def gradient(x):
        return jax.value_and_grad(lambda x: (weight * sums.of_channels(jnp.square(x))).sum())(x)

    ours, plain = jax.jit(gradient)(x), plainly(jax.jit(lambda x: gradient(x)), x)
    assert "dot_general" not in plainly(jax.jit(lambda x: sums.of_channels(x)).lower, x).as_text()
    assert all(error(a, b) <= 1e-6 for a, b in zip(ours, plain, strict=True))


def test_the_sums_of_a_cpu_are_products():
    assert "dot_general" in jax.jit(lambda x: sums.of_channels(x)).lower(noise(2, 4, 4, 8)).as_text()


def test_the_norm_of_a_tree_is_that_of_optax():
    tree = {"kernel": noise(3, 3, 8, 16), "bias": noise(16), "odd": noise(3, 7), "scalar": jnp.float32(2), "none": None}
    assert error(jax.jit(sums.global_norm)(tree), optax.global_norm(tree)) <= 1e-6
    assert float(sums.global_norm({})) == 0


# ---- memory -----------------------------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys
import numpy as np
from autoretouch_jax.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**24, 1.0, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are")
def test_memory_is_zeroed_once():
    """The page faults of the sixth array of 64 MiB: none where memory is kept, and else one for each page."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "leave")
    )
    assert kept < 100
    assert kept < given_back
