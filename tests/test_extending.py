"""The worked examples of docs/extending.md, applied to a copy of the package: they train, resume, evaluate and retouch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

BLOCK = re.compile(r"^```(diff|python)\n(.*?)^```$", re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    """The code blocks of the page: their kind and their text."""
    return BLOCK.findall((ROOT / "docs" / "extending.md").read_text())


def apply_diff(root: Path, text: str) -> None:
    """Replaces the old lines of a diff by its new ones. They must be found exactly once."""
    header, *lines = text.splitlines()
    path = root / header.removeprefix("--- ")
    old = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "-", ""))
    new = "".join(line[1:] + "\n" for line in lines if line[:1] in (" ", "+", ""))
    source = path.read_text()
    assert source.count(old) == 1, f"{path.name} has {source.count(old)} places like\n{old}"
    path.write_text(source.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the package with all four examples in it."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "autoretouch_jax", root / "autoretouch_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, text in blocks():
        if kind == "diff":
            apply_diff(root, text)
        else:
            name = text.splitlines()[0].removeprefix("# ")
            assert name.startswith("autoretouch_jax/")
            (root / name).write_text(text.split("\n", 1)[1])
    return root


def run(root: Path, *words: object) -> str:
    """The output of the copy's command."""
    command = [sys.executable, "-m", "autoretouch_jax.cli", *map(str, words)]
    ended = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


CONFIG = """
from autoretouch_jax.config import AutoRetouchPatchGAN, Config, DataConfig, LossConfig, ParallelConfig, TrainConfig
from autoretouch_jax.config.networks import Plain

config = Config(
    generator=Plain(width=4),
    discriminator=AutoRetouchPatchGAN(width=4, norm="none"),
    loss=LossConfig(perceptual_weight=0.0, smoothness_weight=0.5),
    data=DataConfig(arrays="pairs.npz", crop=32),
    train=TrainConfig(steps=4, batch=2, log_every=2),
    parallel=ParallelConfig(devices=1),
)
"""


def test_the_page_has_an_example_of_each():
    text = (ROOT / "docs" / "extending.md").read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert [section.splitlines()[0] for section in sections] == ["A loss term", "A network", "A data source", "A metric"]
    for section in sections:
        assert "```diff" in section


def test_a_new_loss_network_source_and_metric_train_and_measure(extended, pair_folders):
    sides = [sorted(folder.rglob("*.png")) for folder in pair_folders]
    arrays = [np.stack([np.asarray(Image.open(path).convert("RGB")) for path in side]) for side in sides]
    np.savez(extended / "pairs.npz", source=arrays[0], target=arrays[1])
    (extended / "mine.py").write_text(CONFIG)
    assert "steps 0 → 4" in run(extended, "train", "mine.py", "--workdir", "run")
    assert "steps 4 → 5" in run(extended, "train", "mine.py", "--workdir", "run", "--train.steps", "5")
    line = json.loads((extended / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss/smoothness"] >= 0
    assert 0 <= line["share/smoothness"] < 1
    table = run(extended, "evaluate", "run", "--source", pair_folders[0], "--target", pair_folders[1], "--json", "e.json")
    assert "largest change outside" in table
    assert json.loads((extended / "e.json").read_text())["model"]["outside_largest"] >= 0
    description = json.loads((extended / "run" / "model" / "model.json").read_text())
    assert description["generator"] == {"network": "plain", "width": 4}
    run(extended, "retouch", sides[0][0], "--model", "run", "--out", "out")
    assert (extended / "out" / sides[0][0].name).is_file()


def test_the_examples_break_no_rule_of_the_house(extended):
    """The copy passes the tests of the rooms: imports, sizes, docstrings."""
    tests = extended / "tests"
    tests.mkdir()
    for name in ("conftest.py", "test_house.py"):
        shutil.copy(ROOT / "tests" / name, tests / name)
    chosen = "imports or sizes or rooms or full_stop"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(tests / "test_house.py")]
    environment = os.environ | {"PYTHONPATH": str(extended)}
    ended = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
