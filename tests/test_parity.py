"""The networks and metrics against arrays computed by other frameworks, and the published parameter counts."""

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from reference_weights import seed_keras_variables

from autoretouch_jax.config import AutoRetouch, AutoRetouchPatchGAN
from autoretouch_jax.evaluation import metrics
from autoretouch_jax.models import patchgan
from autoretouch_jax.models.autoretouch import AutoRetouchGenerator

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "seed_keras.npz") as archive:
        return {name: archive[name] for name in archive.files}


def network(golden, case: str):
    arrays = {name.split("|")[1]: value for name, value in golden.items() if name.startswith(f"{case}/w")}
    module = (
        AutoRetouchGenerator(AutoRetouch(width=8, blocks=3))
        if case == "G"
        else patchgan.AutoRetouchPatchGAN(AutoRetouchPatchGAN(width=4))
    )
    inputs = [golden[f"{case}/in{i}"] for i in range(1 if case == "G" else 2)]
    return module, seed_keras_variables(arrays), inputs


def relative_error(a, b) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


@pytest.mark.parametrize("case", ["G", "D"])
def test_inference(golden, case):
    module, variables, inputs = network(golden, case)
    assert relative_error(module.apply(variables, *inputs), golden[f"{case}/infer"]) <= TOLERANCE


@pytest.mark.parametrize("case", ["G", "D"])
def test_training_mode_and_moving_averages(golden, case):
    module, variables, inputs = network(golden, case)
    output, moved = module.apply(variables, *inputs, train=True, mutable=["batch_stats"])
    assert relative_error(output, golden[f"{case}/train"]) <= TOLERANCE
    after = {name.split("|")[1]: value for name, value in golden.items() if name.startswith(f"{case}/after")}
    weights = {name.split("|")[1]: value for name, value in golden.items() if name.startswith(f"{case}/w")}
    expected = seed_keras_variables(weights | after)["batch_stats"]
    errors = jax.tree.map(relative_error, moved["batch_stats"], expected)
    assert max(jax.tree.leaves(errors)) <= TOLERANCE


@pytest.mark.parametrize(
    ("module", "images", "trainable", "total"),
    [
        (AutoRetouchGenerator(AutoRetouch()), 1, 4_594_051, 4_601_731),
        (patchgan.AutoRetouchPatchGAN(AutoRetouchPatchGAN()), 2, 2_769_601, 2_771_393),
    ],
    ids=["generator", "discriminator"],
)
def test_full_size_parameter_counts(module, images, trainable, total):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *[np.zeros((1, 32, 32, 3), np.float32)] * images)
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    assert count["params"] == trainable
    assert count["params"] + count["batch_stats"] == total


@pytest.mark.parametrize("pair", ["0", "1", "2"])
def test_psnr_and_ssim(pair):
    with np.load(GOLDEN / "metrics.npz") as archive:
        a, b = archive[f"{pair}/a"], archive[f"{pair}/b"]
        assert metrics.psnr(a, b) == pytest.approx(float(archive[f"{pair}/psnr_rgb_u8"]), abs=1e-6)
        assert metrics.ssim(a, b) == pytest.approx(float(archive[f"{pair}/ssim_rgb_u8_gauss11"]), abs=1e-6)
