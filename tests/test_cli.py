"""The command as a user meets it: help, refusals in one line, exit statuses, and every config builds."""

import contextlib
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from autoretouch_jax import cli
from autoretouch_jax.config import Config, DataConfig, load
from autoretouch_jax.config.loading import choose_data
from autoretouch_jax.config.validation import validate
from autoretouch_jax.training.state import init_state, make_networks

ROOT = Path(__file__).parent.parent


def refused(capsys, *argv: str) -> str:
    """The one line that a refusal prints."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("verb", [[], *([verb] for verb in cli.VERBS)], ids=str)
def test_help_everywhere(verb, capsys):
    with contextlib.suppress(SystemExit):
        assert cli.main([*verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: autoretouch" in text
    assert len(text.splitlines()) > 5


def test_help_imports_no_heavy_module():
    code = (
        "import sys; from autoretouch_jax import cli; cli.main(['--help']); print({'jax', 'grain', 'flax'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "set()"


def test_refusals_name_the_key_and_the_nearest_valid_one(capsys, face_folder, tmp_path):
    train = ["train", "configs/demo.py", "--workdir", str(tmp_path / "run"), "--data.root", str(face_folder)]
    message = refused(capsys, *train, "--train.stpes", "3")
    assert "--train.stpes" in message
    assert "--train.steps" in message
    assert "--train.steps" in refused(capsys, *train, "--train.steps", "many")
    assert "'lsgan'" in refused(capsys, *train, "--loss.adversarial", "wgan")
    assert "train" in refused(capsys, "trian")
    assert "portraits.py" in refused(capsys, "train", "configs/portrait.py", "--workdir", "x")
    assert "CONFIG" in refused(capsys, "train", "--workdir", "x")
    assert "--workdir" in refused(capsys, "train", "configs/demo.py")
    assert "exclude each other" in refused(capsys, *train, "--data.source", "a", "--data.target", "b")
    assert "--data.target is missing" in refused(capsys, *train[:4], "--data.source", "a")
    assert "multiple of 16" in refused(capsys, *train, "--data.crop", "50")
    assert "nothing would be learned" in refused(capsys, *train, "--loss.pixel-weight", "0", "--loss.adversarial-weight", "0")
    missing = refused(capsys, *train, "--loss.perceptual-weight", "1", "--loss.vgg-weights", "nowhere.npz")
    assert "nowhere.npz: no such file" in missing
    assert "relu9_9" in refused(
        capsys, *train, "--loss.perceptual-weight", "1", "--loss.vgg-weights", "random", "--loss.perceptual-layers", "relu9_9"
    )
    assert not (tmp_path / "run").exists()


def test_a_config_file_with_a_mistake_is_refused_with_a_hint(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from autoretouch_jax.config import *\nconfig = Config(train=TrainConfig(stepz=3))\n")
    message = refused(capsys, "train", str(path), "--workdir", "x")
    assert "mine.py" in message
    assert "did you mean steps?" in message
    path.write_text("x = 1\n")
    assert "must define `config" in refused(capsys, "train", str(path), "--workdir", "x")


def test_the_command_line_replaces_the_configs_form_of_data(tmp_path):
    config = Config(data=DataConfig(root="faces"))
    chosen = choose_data(config, ["--data.source", "a", "--data.target", "b"])
    assert chosen.data.root is None
    assert choose_data(config, ["--train.steps", "3"]).data.root == "faces"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_builds(path, face_folder):
    config = load(path)
    flags = {"loss": {"vgg_weights": "random"}, "data": {"root": str(face_folder)}}
    from conftest import edited

    config = edited(config, **flags)
    validate(config)
    networks, _ = make_networks(config)
    state = jax.eval_shape(lambda: init_state(config, networks))
    assert state.generator.params


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line and ";" not in line
    )
    for requirement in project["dependencies"]:
        name = requirement.split(">=")[0]
        assert name in pins or name in ("jax", "flax"), f"{name} is not in constraints.txt"


def test_a_group_of_verbs_lists_its_own(capsys):
    assert cli.main(["data", "--help"]) == 0
    assert "data prepare" in (listed := capsys.readouterr().out)
    assert "demo" not in listed
    assert cli.main(["data"]) == 2
    assert "data audit" in capsys.readouterr().out
    assert cli.main(["data", "prepair"]) == 2
    assert "did you mean data prepare" in capsys.readouterr().err


def test_too_little_memory_is_a_message_and_status_1(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "train", lambda _: jnp.zeros(1 << 46).block_until_ready())
    assert cli.main(["train"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("autoretouch train: the device has too little memory (RESOURCE_EXHAUSTED: Out of memory")
    assert "--parallel.remat full, --parallel.accumulate 2, half of --train.batch, a smaller --data.crop" in errors
    assert "autoretouch plan CONFIG --topology KIND:NUMBER --fit" in errors
    assert len(errors.splitlines()) == 1


def test_an_error_that_nobody_knows_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setitem(cli.VERBS, "train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        cli.main(["train"])
