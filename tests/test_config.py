"""Values only: config files are found and loaded as named, every rule refuses by key, and networks describe themselves."""

import dataclasses
import json

import pytest
from conftest import GOLDEN, ROOT, edited

from autoretouch_jax import cli
from autoretouch_jax.config import (
    AutoRetouch,
    AutoRetouchPatchGAN,
    Config,
    DataConfig,
    PatchGAN,
    Pix2Pix,
    Pix2PixHDGlobal,
    Pix2PixHDLocal,
    Retouch,
    load,
    networks,
)
from autoretouch_jax.config.loading import config_argument, find, flatten, resolve, with_values
from autoretouch_jax.config.paths import absolute, is_remote
from autoretouch_jax.config.resume import MAY_CHANGE_ON_RESUME, refuse_other_run, to_json
from autoretouch_jax.config.validation import RULES, validate
from autoretouch_jax.errors import Refused, did_you_mean, first_line, summarise

SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
VALID = Config(data=DataConfig(root="faces"))


# ---- finding CONFIG ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("CONFIG.py --workdir runs/a", "CONFIG.py"),
        ("--workdir runs/a CONFIG.py", "CONFIG.py"),
        ("--space lr.py CONFIG.py", "CONFIG.py"),
        ("--space=lr.py CONFIG.py", "CONFIG.py"),
        ("CONFIG.py --space lr.py", "CONFIG.py"),
        ("--fit CONFIG.py", "CONFIG.py"),
        ("--data.zoom 0.5 1.5 CONFIG.py", "CONFIG.py"),
        ("--space lr.py", None),
        ("--workdir runs/a.py", None),
        ("", None),
    ],
)
def test_config_is_the_first_python_file_that_is_no_flags_value(words, expected):
    assert config_argument(words.split(), switches=["--fit"]) == expected


def test_a_sweeps_space_is_not_taken_for_its_config(tmp_path, capsys):
    """`--space` before CONFIG: the space, which defines no config, must not be loaded as one."""
    space = tmp_path / "lr.py"
    space.write_text("space = {}\n")
    words = ["--space", str(space), "configs/demo.py", "--workdir", "w", "--source", "a", "--target", "b"]
    arguments = cli.parse_with_config("sweep", words)
    assert str(arguments.config) == "configs/demo.py"
    assert arguments.space == space
    assert arguments.run.generator == load("demo.py").generator
    assert cli.main(["sweep", *words]) == 2
    assert "must define `space" in capsys.readouterr().err


def test_a_config_that_a_flag_would_swallow_is_refused(capsys):
    words = ["train", "--loss.perceptual-layers", "relu1_1", "configs/demo.py", "--workdir", "w"]
    assert cli.main(words) == 2
    assert "give it first" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["demo.py", "configs/demo.py"])
def test_a_shipped_config_is_found_by_its_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(path) == ROOT / "configs" / "demo.py"


@pytest.mark.parametrize(
    "path", ["experiments/tuned/retouch.py", "config/retouch.py", "../configs/retouch.py", "/configs/retouch.py"]
)
def test_a_mistyped_path_never_trains_the_shipped_config(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["train", path, "--workdir", "w", "--data.root", "faces"]) == 2
    message = capsys.readouterr().err
    assert f"config {path}: no such file" in message
    assert "retouch.py" in message


def test_a_file_of_ones_own_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.py").write_text(
        "from autoretouch_jax.config import Config, TrainConfig\nconfig = Config(train=TrainConfig(seed=7))\n"
    )
    assert load("demo.py").train.seed == 7


# ---- values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_resolves_to_the_values_it_had(name):
    """A changed default changes every recipe that relies on it. If that is what you want, write the file anew."""
    stored = json.loads((GOLDEN / "configs.json").read_text())
    assert json.loads(to_json(load(name))) == stored[name], f"python tests/test_config.py writes {GOLDEN / 'configs.json'}"


def test_flatten_and_with_values_are_inverse():
    config = load("portraits.py")
    flat = flatten(config)
    assert flat["data.blemish.radius"] == list(config.data.blemish.radius)
    changed = with_values(config, {"data.blemish.clean_share": 0.5, "train.steps": 3, "generator.width": 8})
    assert (changed.data.blemish.clean_share, changed.train.steps, changed.generator.width) == (0.5, 3, 8)
    back = with_values(changed, {key: flat[key] for key in ("data.blemish.clean_share", "train.steps", "generator.width")})
    assert back == config


def test_paths_become_absolute_and_object_storage_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = edited(VALID, data={"root": "faces"}, train={"start_from": "gs://bucket/run"}, loss={"vgg_weights": "vgg.npz"})
    resolved = resolve(config)
    assert resolved.data.root == str(tmp_path / "faces")
    assert resolved.train.start_from == "gs://bucket/run"
    assert resolved.loss.vgg_weights == str(tmp_path / "vgg.npz")
    assert resolved.data.source is None
    assert resolve(VALID).loss.vgg_weights == "download"
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("path", "remote"), [("gs://a/b", True), ("s3://a", True), ("gs://", False), ("/a/b", False), ("a.py", False)]
)
def test_remote_paths(path, remote):
    assert is_remote(path) == remote
    assert (absolute(path) == path) == (remote or path.startswith("/"))


# ---- rules ------------------------------------------------------------------------------------------------------------------

# For each rule a value that breaks it, in the order of RULES.
BREAKING = (0, -1, 0, 1.0, 1.5, (2.0, 1.0), 0.5, 50, 0.5)


def keys_and_values() -> list[tuple[str, object]]:
    return [(key, value) for (keys, _, _), value in zip(RULES, BREAKING, strict=True) for key in keys]


@pytest.mark.parametrize(("key", "value"), keys_and_values(), ids=lambda item: str(item))
def test_every_rule_refuses_by_the_key(key, value):
    name = key.split(".")[1]
    config = VALID
    for kind in (Retouch(), Pix2Pix(), Pix2PixHDGlobal(), Pix2PixHDLocal(), AutoRetouch()):
        if key.startswith("generator.") and name in {field.name for field in dataclasses.fields(kind)}:
            config = edited(dataclasses.replace(VALID, generator=kind))
    if key.startswith("discriminator."):
        config = dataclasses.replace(VALID, discriminator=PatchGAN())
    if key == "data.crop":
        value = 56  # a multiple of the network's grid, and not of 16
    with pytest.raises(Refused, match=f"--{key.replace('_', '-')} "):
        validate(with_values(config, {key: value}))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_valid(name):
    validate(edited(load(name), data={"root": "faces"}))


# ---- resuming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(flatten(VALID)))
def test_what_may_change_on_resume_may_and_nothing_else(key, tmp_path):
    stored = tmp_path / "config.json"
    tree = json.loads(to_json(VALID))
    *groups, name = key.split(".")
    group = tree
    for step in groups:
        group = group[step]
    group[name] = "something else"
    stored.write_text(json.dumps(tree))
    if key.startswith(MAY_CHANGE_ON_RESUME):
        assert refuse_other_run(VALID, stored) == []
    elif key == "data.root":  # files may move; the caller checks that they are the same
        assert refuse_other_run(VALID, stored) == [key]
    else:
        with pytest.raises(Refused, match=f"{key} \\(something else there"):
            refuse_other_run(VALID, stored)


def test_a_config_json_that_is_no_json_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match=r"config\.json is not readable JSON"):
        refuse_other_run(VALID, tmp_path / "config.json")


# ---- networks know themselves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "grid", "radius"),
    [
        (AutoRetouch(), 2, 70),
        (AutoRetouch(blocks=0), 2, 10),
        (Retouch(), 16, 208),
        (Pix2Pix(), 256, None),
        (Pix2PixHDGlobal(), 16, None),
        (Pix2PixHDLocal(), 32, None),
    ],
    ids=lambda value: getattr(value, "network", str(value)),
)
def test_grid_and_radius(config, grid, radius):
    assert (config.grid, config.receptive_radius) == (grid, radius)
    if radius is not None:
        assert radius % grid == 0, "tiles cut with it stay on the grid"


@pytest.mark.parametrize("kind", list(networks.GENERATORS.values()))
def test_every_generator_answers_what_retouching_asks(kind):
    config = kind()
    assert 0 <= config.gate <= 1
    assert config.dead_zone >= 0
    assert isinstance(config.predicts_mask, bool)
    assert config.grid >= 1
    fields = {field.name for field in dataclasses.fields(kind)}
    assert "grid" not in fields, "what follows from other values is not stored in a model"


def test_only_a_mask_has_a_gate():
    for kind in networks.GENERATORS.values():
        assert (kind().gate > 0) == kind().predicts_mask


def test_the_global_generator_of_an_enhancer_has_twice_its_width():
    local = Pix2PixHDLocal(width=8, downs=3, global_blocks=2, norm="none")
    assert local.global_generator == Pix2PixHDGlobal(width=16, downs=3, blocks=2, norm="none")
    assert AutoRetouchPatchGAN().returns_features != PatchGAN().returns_features


# ---- messages ---------------------------------------------------------------------------------------------------------------


def test_lists_of_faults_are_summarised():
    assert summarise(["a", "b"]) == "a, b"
    assert summarise([str(i) for i in range(15)]).endswith("11, and 3 more")


def test_near_misses_are_offered_and_far_ones_are_not():
    assert did_you_mean("stpes", ["steps", "seed"]) == "; did you mean steps?"
    assert did_you_mean("xyz", ["steps", "seed"]) == ""


def test_an_error_without_words_is_named_by_its_class():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 999))) == 200


if __name__ == "__main__":
    golden = {name: json.loads(to_json(load(name))) for name in SHIPPED}
    (GOLDEN / "configs.json").write_text(json.dumps(golden, indent=1) + "\n")
