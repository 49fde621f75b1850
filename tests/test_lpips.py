"""LPIPS against PyTorch on random weights, its weight files, and the command's option."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import GOLDEN

from autoretouch_jax import cli
from autoretouch_jax.errors import Refused
from autoretouch_jax.evaluation import lpips

spec = importlib.util.spec_from_file_location("pytorch_float32", GOLDEN / "pytorch_float32.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.fixture
def files(tmp_path):
    """`(weights, heads)` of SqueezeNet, random, as files."""
    arrays, heads = reference.random_lpips("squeeze")
    np.savez(tmp_path / "squeeze.npz", **arrays)
    np.savez(tmp_path / "heads.npz", **{f"{name}.model.1.weight": value[None, :, None, None] for name, value in heads.items()})
    return str(tmp_path / "squeeze.npz"), str(tmp_path / "heads.npz")


@pytest.mark.parametrize("backbone", ["squeeze", "alex", "vgg16"])
def test_lpips_against_pytorch(backbone, tmp_path):
    arrays, heads = reference.random_lpips(backbone)
    np.savez(tmp_path / "weights.npz", **arrays)
    np.savez(tmp_path / "heads.npz", **heads)
    metric = lpips.load(backbone, str(tmp_path / "weights.npz"), str(tmp_path / "heads.npz"))
    with np.load(GOLDEN / "metrics.npz") as pairs, np.load(GOLDEN / "pytorch_float32.npz") as expected:
        a, b = pairs["0/a"][:95], pairs["0/b"][:95]  # odd: SqueezeNet's pools keep incomplete windows
        assert metric(a, b) == pytest.approx(float(expected[f"lpips.{backbone}"]), rel=1e-5)
    assert metric(a, a) == 0
    assert metric(a[:20], b[:20]) is None


def test_evaluate_reports_lpips(files, face_folder, pair_folders, tmp_path):
    from test_use import random_model

    from autoretouch_jax.models.folder import save_model

    model = random_model()
    save_model(tmp_path / "model", model, 1)
    argv = ["evaluate", str(tmp_path / "model"), "--source", str(pair_folders[0]), "--target", str(pair_folders[1])]
    options = ["--lpips", "squeeze", "--lpips-weights", files[0], "--lpips-heads", files[1]]
    assert cli.main([*argv, *options, "--json", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert 0 < result["identity"]["lpips"] != result["model"]["lpips"]


def test_files_that_do_not_fit_are_named(files):
    with pytest.raises(Refused, match=r"--lpips-weights .*heads\.npz.*features\.0\.weight"):
        lpips.load("squeeze", files[1], files[1])
    with pytest.raises(Refused, match=r"--lpips-heads .*lin0"):
        lpips.load("squeeze", files[0], files[0])
