"""The published systems to the letter: their steps, statistics and files, against arrays that PyTorch computed."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest
from conftest import GOLDEN, ROOT

from autoretouch_jax import cli
from autoretouch_jax.config import networks
from autoretouch_jax.config.loading import load
from autoretouch_jax.inference.tiles import network_output
from autoretouch_jax.models import torchfile
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.models.layers import BatchNorm
from autoretouch_jax.models.modules import GENERATORS, make_discriminator, make_generator
from autoretouch_jax.models.pixels import to_uint8
from autoretouch_jax.training import optimizers

HD = ("pix2pixhd", "pix2pixhd_local")
spec = importlib.util.spec_from_file_location("published_steps", GOLDEN / "published_steps.py")
published_steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published_steps)


def test_twenty_steps_of_each_recipe_agree_with_pytorch_in_float64():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "float64_steps.py")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    errors = json.loads(child.stdout)
    assert list(errors) == ["pix2pix", "global", "local_frozen", "local_unfrozen"]
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_trained_u_net_is_converted_with_both_of_its_test_modes(mode, tmp_path, monkeypatch):
    with np.load(GOLDEN / "trained_unet.npz") as archive:
        state = {name.removeprefix("state|"): archive[name] for name in archive.files if name.startswith("state|")}
        expected, other = (
            archive[name][0].transpose(1, 2, 0).astype(int) for name in (mode, {"eval": "train"}.get(mode, "eval"))
        )
    # The modes are far apart, so the one cannot be taken for the other.
    assert np.abs(expected - other).max() > 16
    np.savez(tmp_path / "latest_net_G.npz", **state)
    assert cli.main(["convert", str(tmp_path / "latest_net_G.npz"), "--out", str(tmp_path / "m"), "--test-mode", mode]) == 0
    assert json.loads((tmp_path / "m" / "model.json").read_text())["generator"]["test_mode"] == mode
    # The same units as PyTorch kept.
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: published_steps.kept_units(shape))
    image = published_steps.scene(2000)[0].transpose(1, 2, 0)
    output, _ = network_output(load_model(tmp_path / "m"), image)
    assert np.abs(output.astype(int) - expected).max() <= 1


# ---- layers and initial values ----------------------------------------------------------------------------------------------


def initial(config, seed: int = 0) -> dict[str, np.ndarray]:
    """A network's initial parameters by path."""
    module, inputs = (make_generator(config), 1) if type(config) in GENERATORS else (make_discriminator(config), 2)
    params = module.init(jax.random.key(seed, impl="rbg"), *[np.zeros((1, 256, 256, 3), np.float32)] * inputs)["params"]
    return {name: np.asarray(value) for name, value in flax.traverse_util.flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("config", [networks.Pix2Pix(width=16), networks.PatchGAN(width=16)])
def test_pix2pix_starts_as_its_authors_do(config):
    for name, value in initial(config).items():
        if name.endswith("kernel"):
            assert np.isclose(value.std(), 0.02, rtol=0.15), name
            assert abs(value.mean()) < 0.003, name
        elif name.endswith("scale"):
            assert abs(value.mean() - 1) < 0.02, name
            assert 0.01 < value.std() < 0.03, name
        else:
            assert not value.any(), name


def test_pix2pixhds_biases_start_as_pytorchs():
    """Uniform within ± 1 / √fan_in. For a transposed convolution PyTorch counts the output channels."""
    generator = initial(networks.Pix2PixHDGlobal(width=16, downs=2, blocks=1))
    discriminator = initial(networks.PatchGAN(width=16, norm="instance", scales=1, padding=2, widest=512))
    for name, value in (generator | discriminator).items():
        if name.endswith("kernel"):
            assert np.isclose(value.std(), 0.02, rtol=0.15), name
            continue
        kernel = (generator | discriminator)[name.replace("bias", "kernel")]
        fan_in = kernel[..., 0, :].size if "/up" in name else kernel[..., 0].size
        assert 0.5 * fan_in**-0.5 < np.abs(value).max() <= fan_in**-0.5, name


def test_autoretouch_starts_as_keras_does():
    for config in (networks.AutoRetouch(width=16, blocks=1), networks.AutoRetouchPatchGAN(width=16)):
        for name, value in initial(config).items():
            if name.endswith("kernel"):
                fans = value[..., 0].size + value[..., 0, :].size
                assert 0.9 * (6 / fans) ** 0.5 < np.abs(value).max() <= (6 / fans) ** 0.5, name
            else:
                assert (value == name.endswith("scale")).all(), name


@pytest.mark.parametrize(("unbiased", "factor"), [(True, 4 / 3), (False, 1.0)])
def test_the_moving_variance_is_pytorchs_or_keras(unbiased, factor):
    x = np.random.default_rng(0).normal(3, 2, (1, 2, 2, 5)).astype(np.float32)
    norm = BatchNorm(momentum=0.9, epsilon=1e-5, unbiased=unbiased)
    variables = norm.init(jax.random.key(0), x, train=False)
    _, moved = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = 0.9 + 0.1 * factor * x.reshape(4, 5).var(0)
    np.testing.assert_allclose(moved["batch_stats"]["var"], expected, rtol=1e-6)


def test_the_variance_keeps_its_digits_where_the_mean_is_large():
    """E[x²] − E[x]², which Flax' own layer uses, is off by 3e-4 here."""
    x = np.random.default_rng(0).normal(100, 1, (4, 16, 16, 8)).astype(np.float32)
    norm = BatchNorm(momentum=0.0, epsilon=1e-5, unbiased=False)
    _, moved = norm.apply(norm.init(jax.random.key(0), x, train=False), x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(moved["batch_stats"]["var"], x.astype(np.float64).var((0, 1, 2)), rtol=2e-6)


@pytest.mark.parametrize("sides", [(64, 83), (83, 64), (83, 83), (64, 64)])
def test_autoretouchs_discriminator_pads_each_side_by_its_own_parity(sides):
    """Keras' "same", as XLA computes it too."""
    x = np.random.default_rng(0).normal(size=(1, *sides, 6)).astype(np.float32)
    module = make_discriminator(networks.AutoRetouchPatchGAN(width=4))
    variables = module.init(jax.random.key(0), x[..., :3], x[..., 3:])
    _, layers = module.apply(variables, x[..., :3], x[..., 3:], capture_intermediates=True)
    first = variables["params"]["conv0"]
    expected = jax.lax.conv_general_dilated(x, first["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layers["intermediates"]["conv0"]["__call__"][0], expected + first["bias"], atol=1e-5)


def test_pix2pixhds_discriminator_is_at_most_512_wide():
    def widths(widest):
        config = networks.PatchGAN(width=128, norm="instance", padding=2, widest=widest)
        module, image = make_discriminator(config), np.zeros((1, 32, 32, 3), np.float32)
        params = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]["scale0"]
        return [params[f"conv{i}"]["kernel"].shape[-1] for i in range(4)]

    assert widths(512) == [128, 256, 512, 512]
    assert widths(0) == [128, 256, 512, 1024]


# ---- files of older versions ------------------------------------------------------------------------------------------------


def test_files_of_old_versions_and_other_types_are_read(tmp_path):
    found = torchfile.read_state_dict(GOLDEN / "state_dict_2017.pth")
    assert found["weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found["tail"].tolist() == [4.0, 5.0]
    bfloat16 = torchfile.read_state_dict(GOLDEN / "state_dict_bfloat16.pth")["weight"]
    assert bfloat16.astype(np.float32).tolist() == [1.0, -2.5, 0.15625]


# ---- docs/published.md ------------------------------------------------------------------------------------------------------


def test_every_row_of_the_page_names_its_test():
    tests = set(re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")), re.M))
    rows = [line for line in (ROOT / "docs" / "published.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| |")]
    assert len(rows) > 30
    for row in rows:
        last = row.split("|")[-2].strip()
        named = re.findall(r"`(test_\w+)`", last)
        assert last == "not stated by the authors" or (named and set(named) <= tests), row


def test_the_published_values_are_in_the_configs():
    pix2pix, hd, local, autoretouch = (load(f"configs/{name}.py") for name in ("pix2pix", *HD, "autoretouch"))
    assert pix2pix.generator == networks.Pix2Pix(width=64, levels=8, norm="batch", dropout=0.5)
    assert pix2pix.discriminator == networks.PatchGAN(width=64, layers=3, norm="batch", scales=1, padding=1)
    assert (pix2pix.data.resize, pix2pix.data.crop, pix2pix.data.flip) == (286, 256, True)
    assert hd.generator == networks.Pix2PixHDGlobal(width=64, downs=4, blocks=9)
    assert local.generator == networks.Pix2PixHDLocal(width=32, downs=4, global_blocks=9, local_blocks=3)
    assert (hd.discriminator.scales, local.discriminator.scales, hd.data.crop, local.data.crop) == (2, 3, 512, 1024)
    assert [config.train.epochs for config in (pix2pix, hd, local)] == [200, 200, 100]
    for config in (pix2pix, hd, local):
        assert (config.train.batch, config.train.steps, config.optim.decay_share, config.optim.ema) == (1, 0, 0.5, 0.0)
        assert (config.optim.generator_lr, config.optim.discriminator_lr) == (2e-4, 2e-4)
        assert (config.optim.beta1, config.optim.beta2, config.optim.clip_norm) == (0.5, 0.999, 0.0)
    # 10 of 100 passes, and 20 of the 200 that the script for smaller cards makes.
    assert [round(local.optim.global_frozen_share * epochs) for epochs in (100, 200)] == [10, 20]
    loss = autoretouch.loss
    assert autoretouch.generator == networks.AutoRetouch(width=64, blocks=15, norm="batch", head="tanh")
    assert loss.pixel == "mse"
    assert min(loss.pixel_weight, loss.adversarial_weight, loss.perceptual_weight) > 0


def test_the_rate_falls_over_the_second_half():
    optim = load("configs/pix2pix.py").optim
    factors = [float(optimizers.schedule(optim, 1000, np.int32(step))) for step in (0, 500, 750, 999)]
    np.testing.assert_allclose(factors, [1, 1, 0.5, 1 / 500])


def test_a_network_that_sees_the_whole_image_keeps_its_size():
    config = networks.Pix2Pix(width=4, levels=5)
    variables = make_generator(config).init(jax.random.key(0, impl="rbg"), np.zeros((1, 32, 32, 3), np.float32))
    image = np.random.default_rng(0).integers(0, 256, (45, 71, 3), dtype=np.uint8)
    assert network_output(Model(config, variables), image)[0].shape == image.shape


def test_output_is_rounded_to_the_nearest_level():
    levels = np.array([99.4, 99.6, 100.0, -3.0, 300.0], np.float32)
    assert to_uint8(levels / 127.5 - 1).tolist() == [99, 100, 100, 0, 255]
