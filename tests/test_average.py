"""`average`: the mean of models that were trained from the same weights on."""

import dataclasses

import jax
import numpy as np
import pytest

from autoretouch_jax import cli
from autoretouch_jax.config import AutoRetouch, Retouch
from autoretouch_jax.errors import Refused
from autoretouch_jax.models.average import average
from autoretouch_jax.models.folder import Model, load_model, save_model
from autoretouch_jax.models.modules import make_generator


def model(config, seed, **values) -> Model:
    image = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.device_get(make_generator(config).init(jax.random.key(seed), image))
    return Model(config, dict(variables), **{"face_size": 256.0} | values)


def test_weights_are_means_and_the_rest_is_the_first_ones():
    config = Retouch(width=8, levels=2, gate=0.3)
    a = model(config, 0, data_license="CC0")
    b = model(dataclasses.replace(config, gate=0.6), 1, data_license="CC BY")
    mean = average({"a": a, "b": b, "c": a})
    jax.tree.map(
        lambda m, x, y: np.testing.assert_allclose(m, (2 * x + y) / 3, atol=1e-6), mean.variables, a.variables, b.variables
    )
    assert mean.config == config
    assert (mean.face_size, mean.data_license) == (256.0, "CC0; CC BY")
    assert {leaf.dtype for leaf in jax.tree.leaves(mean.variables)} == {np.dtype(np.float32)}


def test_what_has_no_mean_is_refused_by_name():
    config = Retouch(width=8, levels=2)
    a = model(config, 0)
    with pytest.raises(Refused, match="at least two"):
        average({"a": a})
    with pytest.raises(Refused, match=r"runs/wide: .*is not the network of runs/a"):
        average({"runs/a": a, "runs/wide": model(Retouch(width=16, levels=2), 1)})
    with pytest.raises(Refused, match=r"b: .*faces of 100"):
        average({"a": a, "b": model(config, 1, face_size=100.0)})
    normed = model(AutoRetouch(width=4, blocks=1), 0)
    with pytest.raises(Refused, match="BatchNorm"):
        average({"a": normed, "b": normed})


def test_the_command_writes_a_model_that_the_others_take(tmp_path):
    config = Retouch(width=8, levels=2)
    for seed in (0, 1):
        save_model(tmp_path / str(seed), model(config, seed), seed)
    command = ["average", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "mean")]
    assert cli.main(command) == 0
    assert load_model(tmp_path / "mean").config == config
    # The same model twice is no average.
    assert cli.main(["average", str(tmp_path / "0"), str(tmp_path / "0"), "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()
