"""The published networks and ours: parity with PyTorch, sizes, costs, receptive fields, and the conversion of weights."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from reference_weights import import_patchgan

from autoretouch_jax import cli
from autoretouch_jax.config import networks
from autoretouch_jax.errors import Refused
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.inference.tiles import Axis, Plan, network_output
from autoretouch_jax.models import forms, layers
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.models.layers import Conv, TransposedConv, depth_to_space, space_to_depth
from autoretouch_jax.models.modules import make_discriminator, make_generator
from autoretouch_jax.models.pytorch_import import import_generator
from autoretouch_jax.tools import catalogue

GENERATORS = [
    "pix2pix_unet128_ngf2",
    "pix2pix_unet256_ngf2",
    "pix2pixhd_global_ngf4_down3_blocks2",
    "pix2pixhd_local_ngf4_down3_global2_local2",
]
TOLERANCE = 1e-5


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """All arrays of a file, the weights among them in the source framework's names, and the input as NHWC in [-1, 1]."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    weights = {key.split("|")[1]: value for key, value in arrays.items() if "|" in key}
    return arrays, weights, arrays["in0"].transpose(0, 2, 3, 1).astype(np.float32) / 127.5 - 1


def float32(name: str) -> np.ndarray:
    with np.load(GOLDEN / "pytorch_float32.npz") as archive:
        return archive[name]


def nchw(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def relative_error(a, b) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def agree_in_8_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """The files hold round(127.5 · (x + 1)) modulo 256; a value on a rounding edge may fall either way."""
    exact = (ours.astype(np.float64) + 1) * 127.5
    distance = np.abs(exact - theirs) % 256
    return bool((np.minimum(distance, 256 - distance) <= 0.5 + 1e-3).all())


# ---- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_against_pytorch(name):
    arrays, weights, image = golden(name)
    config, variables = import_generator(weights)
    output = nchw(jax.jit(make_generator(config).apply)(variables, image))
    assert agree_in_8_bits(output, arrays["infer"])
    assert relative_error(output[:, :, ::4, ::4], float32(name)) <= TOLERANCE


def test_patchgan_against_pytorch():
    arrays, weights, pair = golden("patchgan70_ndf4_batchnorm")
    config, variables = import_patchgan(weights)
    module = make_discriminator(config)
    logits = nchw(module.apply(variables, pair[..., :3], pair[..., 3:])[0][-1])
    assert relative_error(logits, float32("patchgan70_ndf4_batchnorm")) <= TOLERANCE
    trained, _ = module.apply(variables, pair[..., :3], pair[..., 3:], train=True, mutable=["batch_stats"])
    assert relative_error(nchw(trained[0][-1]), arrays["train_nodropout"]) <= TOLERANCE


def test_every_feature_of_every_scale_against_pytorch():
    arrays, weights, pair = golden("pix2pixhd_multiscale_d_ndf4_num3")
    config, variables = import_patchgan(weights)
    assert config == networks.PatchGAN(width=4, norm="instance", scales=3, padding=2)
    for scale, features in enumerate(jax.jit(make_discriminator(config).apply)(variables, pair[..., :3], pair[..., 3:])):
        for layer, feature in enumerate(features):
            assert agree_in_8_bits(nchw(feature), arrays[f"infer.{scale}.{layer}"])
            assert relative_error(nchw(feature)[:, ::4], float32(f"multiscale.{scale}.{layer}")) <= TOLERANCE


@pytest.mark.parametrize("size", [3, 4])
def test_transposed_convolution_agrees_with_xlas(size):
    module, x = TransposedConv(3, size, np.float32), np.random.default_rng(0).normal(size=(2, 5, 4, 6)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    before, after = (2, 2) if size == 4 else (1, 2)
    expected = jax.lax.conv_general_dilated(
        x,
        variables["params"]["kernel"][::-1, ::-1],
        (1, 1),
        [(before, after)] * 2,
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


# ---- sizes, costs, receptive fields -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("autoretouch", 4_594_051),
        ("pix2pix (U-Net-256)", 54_413_955),
        ("pix2pixhd_global", 182_443_267),
        ("pix2pixhd_local", 182_701_827),
        ("patchgan", 2_769_601),
        ("patchgan, 2 scales", 5_535_618),
    ],
)
def test_full_size_parameter_counts(name, count):
    assert catalogue.parameters(catalogue.NETWORKS[name][0]) == count


@pytest.mark.parametrize("name", list(catalogue.NETWORKS))
def test_flops_are_what_the_catalogue_says(name):
    config = catalogue.NETWORKS[name][0]
    module, images = catalogue.module_and_images(config, 512, 512)
    variables = jax.eval_shape(module.init, jax.random.key(0), *images)
    with forms.plain():
        flops = jax.jit(module.apply).lower(variables, *images).compile().cost_analysis()["flops"]
    assert 2 * catalogue.multiply_accumulates(config, 512) == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (networks.PatchGAN(), 70),
        (networks.AutoRetouchPatchGAN(), 94),
        (networks.AutoRetouch(blocks=1), 23),
        (networks.Pix2Pix(levels=2), 18),
    ],
    ids=lambda value: getattr(value, "network", value),
)
def test_receptive_fields(config, field):
    assert catalogue.receptive_field(config) == field


def test_the_recommended_network_sees_beyond_135_pixels_and_the_tiles_know_it():
    config = networks.Retouch(width=4)
    seen = catalogue.receptive_field(config)
    assert 135 < seen <= 2 * config.receptive_radius + 1


def test_the_models_verb_lists_every_network(capsys):
    small = {"pix2pix": (networks.Pix2Pix(width=2, levels=3), "x"), "patchgan": (networks.PatchGAN(width=2), "y")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "NETWORKS", small)
        assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["pix2pix", "patchgan"]
    assert "70" in lines[2]


def test_an_instance_norm_unet_is_refused_before_anything_is_written(tmp_path, capsys):
    _, weights, _ = golden("pix2pix_unet128_ngf2")
    kernels = {key: value for key, value in weights.items() if value.ndim == 4}
    biases = {key.replace("weight", "bias"): np.zeros(value.shape[0], np.float32) for key, value in kernels.items()}
    np.savez(tmp_path / "unet.npz", **kernels, **biases)
    assert cli.main(["convert", str(tmp_path / "unet.npz"), "--out", str(tmp_path / "model")]) == 2
    assert "batch_stats" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# ---- our network ----------------------------------------------------------------------------------------------------------


def random_retouch(**changes) -> Model:
    config = networks.Retouch(**({"width": 4, "levels": 2, "blocks": 1} | changes))
    variables = jax.jit(make_generator(config).init)(jax.random.key(0, impl="rbg"), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    return Model(config, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), variables))


def test_the_untrained_network_is_the_identity_and_its_mask_is_below_the_gate():
    config = networks.Retouch(width=4, levels=2, blocks=1)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    variables = jax.jit(make_generator(config).init)(jax.random.key(0, impl="rbg"), np.zeros((1, 32, 32, 3), np.float32))
    output, need = network_output(Model(config, variables), image)
    np.testing.assert_array_equal(output, image)
    assert (need < config.gate).all()


@pytest.mark.parametrize("size", [(37, 50), (131, 70)])
def test_its_tiles_do_not_show(size):
    model, image = random_retouch(), np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    halo, canvas = model.config.receptive_radius, [-(-side // 64) * 64 for side in size]
    whole, tiled = (network_output(model, image, Plan(*(Axis(s, min(s, t), halo) for s in canvas))) for t in (512, 64))
    assert np.abs(whole[0].astype(int) - tiled[0]).max() <= 1
    np.testing.assert_allclose(whole[1], tiled[1], atol=1e-4)


def test_what_the_gate_closes_comes_back_bit_identical():
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    model = random_retouch()
    raw, need = network_output(model, image)
    gate = float(np.median(need))
    gated = retouch_array(Model(networks.Retouch(width=4, levels=2, blocks=1, gate=gate), model.variables), image)
    np.testing.assert_array_equal(gated[need < gate], image[need < gate])
    np.testing.assert_array_equal(gated[need >= gate], raw[need >= gate])
    assert (raw[need < gate] != image[need < gate]).any()


def test_space_to_depth_and_back():
    x = np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(depth_to_space(space_to_depth(x)), x)
    np.testing.assert_array_equal(space_to_depth(x)[0, 0, 0, :3], x[0, 0, 0])


# ---- PyTorch's weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pix2pix_unet128_ngf2", "pix2pixhd_global_ngf4_down3_blocks2"])
def test_a_pytorch_generator_becomes_a_model(name, tmp_path, capsys):
    arrays, weights, _ = golden(name)
    prefixed = {key.replace("model.", "model.model.", 1) if "unet" in name else key: value for key, value in weights.items()}
    np.savez(tmp_path / "generator.npz", **prefixed, **{"model.9.num_batches_tracked": np.array(7)})
    assert cli.main(["convert", str(tmp_path / "generator.npz"), "--out", str(tmp_path / "model")]) == 0
    assert json.loads((tmp_path / "model" / "model.json").read_text())["generator"]["network"] in capsys.readouterr().out
    image = arrays["in0"].transpose(0, 2, 3, 1)[0]
    output = retouch_array(load_model(tmp_path / "model"), image)
    assert np.abs(output.astype(int) - arrays["infer"].transpose(0, 2, 3, 1)[0]).max() <= 1


def test_what_does_not_fit_is_named():
    _, weights, _ = golden("pix2pix_unet128_ngf2")
    with pytest.raises(Refused, match="level 0 is missing"):
        import_generator({key: value for key, value in weights.items() if key != "model.0.weight"})
    with pytest.raises(Refused, match="no place"):
        import_generator(weights | {"model.7.weight": np.zeros((1, 1, 4, 4))})
    with pytest.raises(Refused, match="first tensor is fc"):
        import_generator({"fc.weight": np.zeros(3)})
    _, weights, _ = golden("pix2pixhd_global_ngf4_down3_blocks2")
    with pytest.raises(Refused, match="another norm"):
        import_generator(weights | {"model.2.running_mean": np.zeros(4)})


def test_a_bias_before_batch_norm_is_as_if_it_were_added():
    """Output, gradients, moved statistics and use, beside a convolution that adds its bias."""
    rng = np.random.default_rng(0)
    x, bias, wanted = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 5), (6,), (2, 8, 8, 6)))

    class Pair(nn.Module):
        later: bool

        @nn.compact
        def __call__(self, x, train):
            norm = layers.BatchNorm(momentum=0.8, epsilon=1e-3, unbiased=False)
            if not self.later:
                return norm(layers.Conv(6, (3, 3), name="conv")(x), train)
            y, offset = layers.ConvBeforeNorm(6, jnp.float32, nn.initializers.lecun_normal(), name="conv")(x)
            return norm(y, train, offset)

    variables = Pair(True).init(jax.random.key(1), x, True)
    variables["params"]["conv"]["bias"] = jnp.asarray(bias)
    found = []
    for later in (True, False):

        def loss(params, x, later=later):
            out, moved = Pair(later).apply(variables | {"params": params}, x, True, mutable="batch_stats")
            return jnp.vdot(out, wanted), (out, moved["batch_stats"])

        (_, (out, stats)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        used = Pair(later).apply(variables | {"batch_stats": stats}, x, False)
        found.append((out, stats, used, gradients[1], gradients[0]["conv"]["kernel"]))
        if later:
            assert not gradients[0]["conv"]["bias"].any()
    for ours, plain in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


def test_the_gradient_of_a_bias_is_right_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (2, 48, 48, 8))
    wanted = jnp.abs(jax.random.normal(jax.random.key(1), (2, 48, 48, 16)))
    for layer in (Conv(16, (3, 3), dtype=jnp.bfloat16), TransposedConv(16, 4, jnp.bfloat16)):
        variables = layer.init(jax.random.key(0), x)
        out, pull = jax.vjp(lambda variables, layer=layer: layer.apply(variables, x), variables)
        cotangent = jnp.resize(wanted, out.shape).astype(jnp.bfloat16)
        gradient = pull(cotangent)[0]["params"]["bias"]
        assert (out.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(gradient, cotangent.astype(jnp.float32).sum((0, 1, 2)), rtol=1e-5)


def test_our_convolution_is_flax_own():
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 5))
    drawn = {"bias_init": nn.initializers.normal()}
    for options in (drawn, drawn | {"strides": (2, 2), "padding": ((1, 2), (0, 1))}, {"use_bias": False}):
        ours, flax = (layer(7, (3, 3), **options) for layer in (Conv, nn.Conv))
        variables = flax.init(jax.random.key(3), x)
        jax.tree.map(np.testing.assert_array_equal, variables, ours.init(jax.random.key(3), x))
        np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), atol=1e-6)
        gradients = [jax.grad(lambda v, layer=layer: jnp.square(layer.apply(v, x)).sum())(variables) for layer in (ours, flax)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)
