"""The configs for pairs train: small variants of each, from the command line to one table of all of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import edited
from safetensors.numpy import load_file

from autoretouch_jax import cli
from autoretouch_jax.config import networks
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import Refused
from autoretouch_jax.models.outputs import GeneratorOutput
from autoretouch_jax.models.vgg import preprocess
from autoretouch_jax.training import losses
from autoretouch_jax.training.checkpoints import read_discriminator
from autoretouch_jax.training.trainer import Trainer

TINY_D = ["--discriminator.width", "4"]
RANDOM_VGG = ["--loss.vgg-weights", "random", "--loss.perceptual-layers", "relu1_1", "relu2_1"]
SMALL = {
    "pix2pix": ["--generator.width", "4", "--generator.levels", "5", "--data.resize", "80", "--data.crop", "64", *TINY_D],
    "pix2pixhd": [
        *["--generator.width", "4", "--generator.downs", "2", "--generator.blocks", "1", "--data.crop", "48", *TINY_D],
        *[*RANDOM_VGG, "--loss.perceptual-layer-weights", "0.5", "1.0"],
    ],
    "autoretouch": ["--generator.width", "4", "--generator.blocks", "2", "--data.crop", "48", *TINY_D, *RANDOM_VGG],
    "retouch": [
        *["--generator.width", "8", "--generator.levels", "2", "--generator.blocks", "1", "--data.crop", "48", *TINY_D],
        *[*RANDOM_VGG, "--optim.warmup-steps", "5", "--loss.adversarial-ramp", "10"],
    ],
}
STEPS = 16


def train(name: str, pairs: tuple[Path, Path], workdir: Path, *more: str) -> int:
    source, target = map(str, pairs)
    common = ["--data.source", source, "--data.target", target, "--workdir", str(workdir), "--parallel.devices", "1"]
    periods = ["--train.batch", "4", "--train.log-every", "4", "--train.sample-every", str(STEPS)]
    return cli.main(["train", f"configs/{name}.py", *SMALL[name], *common, *periods, *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, module_pairs) -> dict[str, Path]:
    """A finished run of each config, stopped in the middle and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    for name in SMALL:
        for steps in (STEPS // 2, STEPS):
            assert train(name, module_pairs, folder / name, "--train.steps", str(steps), "--optim.decay-share", "0") == 0
    return {name: folder / name for name in SMALL}


@pytest.mark.parametrize("name", list(SMALL))
def test_the_loss_falls(runs, name):
    lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
    term = {"pix2pixhd": "loss/perceptual"}.get(name, "loss/pixel")
    assert lines[-1][term] < lines[0][term]
    assert all(value is None or np.isfinite(value) for line in lines for value in line.values())


@pytest.mark.parametrize("name", list(SMALL))
def test_stopped_and_resumed_it_ends_bitwise_the_same(runs, name, module_pairs, tmp_path):
    assert train(name, module_pairs, tmp_path / "whole", "--train.steps", str(STEPS), "--optim.decay-share", "0") == 0
    ours, expected = (load_file(run / "model" / "model.safetensors") for run in (runs[name], tmp_path / "whole"))
    for key, value in expected.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_one_table_with_all_of_them(runs, module_pairs, tmp_path, capsys):
    source, target = map(str, module_pairs)
    folders = [str(run) for run in runs.values()]
    assert cli.main(["evaluate", *folders, "--source", source, "--target", target, "--json", str(tmp_path / "e.json")]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:6]]
    assert rows == ["identity", *SMALL]
    result = json.loads((tmp_path / "e.json").read_text())
    assert list(result["models"]) == list(SMALL)
    assert result["model"] == result["models"]["pix2pix"]
    assert result["models"]["retouch"]["outside_identical"] >= 0.5
    assert result["images"][0]["models"]["autoretouch"]["edit_recovered"] is not None


def test_the_local_enhancer_starts_from_a_global_generator_that_is_frozen_at_first(runs, module_pairs, tmp_path):
    small = ["--generator.width", "2", "--generator.downs", "2", "--generator.global-blocks", "1", "--data.crop", "48"]
    # The discriminators stay as they were, so that it shows where they come from.
    small += ["--generator.local-blocks", "1", "--optim.discriminator-lr", "1e-30"]
    arguments = [*small, *SMALL["pix2pixhd"][8:]]
    data = ["--data.source", str(module_pairs[0]), "--data.target", str(module_pairs[1]), "--train.batch", "1"]
    start = ["--train.start-from", str(runs["pix2pixhd"]), "--train.steps", "4", "--parallel.devices", "1"]
    trained = flat_global(runs["pix2pixhd"])
    for frozen, moved in (("1.0", False), ("0.5", True)):
        run = tmp_path / frozen
        command = ["train", "configs/pix2pixhd_local.py", *arguments, *data, *start, "--workdir", str(run)]
        assert cli.main([*command, "--optim.global-frozen-share", frozen]) == 0
        changed = any((value != trained[key]).any() for key, value in flat_global(run).items())
        assert changed == moved
        theirs, ours = (read_discriminator(run / "checkpoints") for run in (runs["pix2pixhd"], run))
        assert sorted(ours) == ["scale0", "scale1", "scale2"]
        for scale in theirs:  # numbered from the finest: the coarsest of two is the coarsest of three
            same = jax.tree.map(np.array_equal, theirs[scale], ours[f"scale{int(scale[-1]) + 1}"])
            assert all(jax.tree.leaves(same)), scale


def flat_global(run: Path) -> dict[str, np.ndarray]:
    arrays = load_file(run / "model" / "model.safetensors")
    return {key: value for key, value in arrays.items() if key.startswith("params/global/")}


def test_starting_from_another_network_is_refused(runs, module_pairs, tmp_path, capsys):
    assert train("retouch", module_pairs, tmp_path / "run", "--train.start-from", str(runs["pix2pix"])) == 2
    assert "--train.start-from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_with_another_gate_can_be_started_from_and_may_move_once_training_has_begun(runs, module_pairs, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(runs["retouch"] / "model", start)
    more = ["--train.start-from", str(start), "--generator.gate", "0.4", "--generator.dead-zone", "1"]
    more += ["--optim.decay-share", "0"]
    assert train("retouch", module_pairs, tmp_path / "run", *more, "--train.steps", "2") == 0
    shutil.rmtree(start)
    assert train("retouch", module_pairs, tmp_path / "run", *more, "--train.steps", "3") == 0


# ---- the pieces -------------------------------------------------------------------------------------------------------------


def test_epochs_become_steps(small_config):
    assert (
        Trainer(edited(small_config, train={"steps": 0, "epochs": 5})).config.train.steps == 3
    )  # 5 × 4 images / 8, rounded up


def test_dropout_is_a_function_of_seed_and_step(small_config):
    """The step of a U-Net with dropout, twice, and with a higher rate: everything else is the same."""
    config = edited(small_config, loss={"adversarial_weight": 0.0}, data={"crop": 64}, train={"batch": 1})
    unet = networks.Pix2Pix(width=2, levels=6)
    seen = []
    for rate in (0.5, 0.9):
        trainer = Trainer(dataclasses.replace(config, generator=dataclasses.replace(unet, dropout=rate)))
        batch = trainer.put(next(trainer.batches(0)))
        seen += [float(trainer.step(trainer.init(), batch, None)[1]["loss/pixel"]) for _ in range(2)]
    assert seen[0] == seen[1]
    assert seen[0] != seen[2] == seen[3]


def test_losses_of_pix2pixhd_by_hand():
    ones, zeros = jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))
    scales = lambda x: [[x, x, x, x, x[..., :1]]] * 2  # noqa: E731
    # Four feature layers of weight 4 / 4, two scales of weight 1 / 2; the logits do not count.
    assert float(losses.feature_matching(scales(ones), scales(zeros)).mean()) == pytest.approx(4.0)
    assert float(losses.adversarial("lsgan", scales(zeros)).mean()) == pytest.approx(2.0)
    assert float(losses.discriminator("lsgan", scales(zeros), scales(ones)).mean()) == pytest.approx(2.0)
    features = {"a": 3 * ones, "b": 5 * ones}
    assert float(losses.perceptual({"a": ones, "b": ones}, features, (0.5, 2.0), "none").mean()) == pytest.approx(
        0.5 * 2 + 2 * 4
    )
    np.testing.assert_array_equal(preprocess(ones, "raw"), ones)


def test_the_masks_loss_by_hand():
    source, target = jnp.zeros((1, 1, 2, 3)), jnp.array([[[[0.0] * 3, [0.0, 0.0, 1.0]]]])
    logits = jnp.array([[[[-2.0], [3.0]]]])
    expected = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-3.0))])
    assert float(losses.mask(GeneratorOutput(source, logits), source, target).mean()) == pytest.approx(expected, rel=1e-6)


def test_the_adversarial_weight_ramps_in(small_config):
    shares = []
    for ramp in (0, 10):
        trainer = Trainer(edited(small_config, loss={"adversarial_ramp": ramp}))
        _, metrics = trainer.step(trainer.init(), trainer.put(next(trainer.batches(0))), None)
        shares.append(float(metrics["share/adversarial"]) / float(metrics["share/pixel"]))
    assert shares[1] == pytest.approx(shares[0] / 10, rel=1e-4)


@pytest.mark.parametrize(
    ("groups", "key"),
    [
        ({"loss": {"feature_matching_weight": 1.0}}, "--loss.feature-matching-weight"),
        ({"loss": {"mask_weight": 1.0}}, "--loss.mask-weight"),
        ({"optim": {"global_frozen_share": 0.1}}, "--optim.global-frozen-share"),
        ({"loss": {"perceptual_weight": 1.0, "perceptual_layer_weights": (1.0,)}}, "--loss.perceptual-layer-weights"),
        ({"data": {"resize": 16}}, "--data.resize"),
        ({"train": {"steps": 0}}, "--train.epochs"),
        ({"generator": {"width": 0}}, "--generator.width"),
    ],
)
def test_impossible_combinations_name_the_key(small_config, groups, key):
    with pytest.raises(Refused, match=key):
        validate(edited(small_config, **groups))


def test_the_crop_must_fit_the_networks_depth(small_config):
    unet = dataclasses.replace(small_config, generator=networks.Pix2Pix(levels=8))
    with pytest.raises(Refused, match="multiple of 256"):
        validate(unet)


def test_a_description_comes_back_from_json():
    for kind in networks.GENERATORS.values():
        described = json.loads(json.dumps(dataclasses.asdict(kind())))
        assert networks.generator_from_json(described) == kind()
    with pytest.raises(Refused, match="unknown"):
        networks.generator_from_json({"network": "autoretouch", "wdith": 3})
    with pytest.raises(Refused, match="pix2pixhd_local"):
        networks.generator_from_json({"network": "stylegan"})
