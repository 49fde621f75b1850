"""Eight fake CPU devices, and small data drawn by the program."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

# The same small programs are compiled by many tests, and by the processes they start: compile each once.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the one that their starter has made
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="autoretouch-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoretouch_jax.config import (
    AutoRetouch,
    AutoRetouchPatchGAN,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.demo import faces

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(autouse=True)
def _no_programs_of_other_tests():
    """A test may have replaced a part of the step, which the programs that it made still hold."""
    if compilation := sys.modules.get("autoretouch_jax.training.compilation"):
        compilation._program.cache_clear()


@pytest.fixture(scope="session")
def face_folder(tmp_path_factory) -> Path:
    """Four small clean faces."""
    folder = tmp_path_factory.mktemp("faces")
    for seed in range(4):
        Image.fromarray(faces.draw_face(seed, side=96)).save(folder / f"face{seed}.png")
    return folder


@pytest.fixture
def pair_folders(face_folder, tmp_path) -> tuple[Path, Path]:
    """The same faces, blemished and clean, as PNGs in nested folders. The targets have an opaque alpha channel."""
    return make_pairs(face_folder, tmp_path)


@pytest.fixture(scope="module")
def module_pairs(face_folder, tmp_path_factory) -> tuple[Path, Path]:
    """`pair_folders`, for a whole module."""
    return make_pairs(face_folder, tmp_path_factory.mktemp("pairs"))


def make_pairs(face_folder: Path, folder: Path) -> tuple[Path, Path]:
    source, target = folder / "source", folder / "target"
    for number, path in enumerate(sorted(face_folder.glob("*.png"))):
        clean = np.asarray(Image.open(path))
        blemished = add_blemishes(
            np.random.default_rng(number), clean, dataclasses.replace(DataConfig().blemish, clean_share=0.0)
        )
        for home, image in ((source, Image.fromarray(blemished)), (target, Image.fromarray(clean).convert("RGBA"))):
            (home / "nested").mkdir(parents=True, exist_ok=True)
            image.save(home / "nested" / path.name)
    return source, target


@pytest.fixture(scope="session")
def small_config(face_folder) -> Config:
    """A run of seconds on one device, with the two losses that need no VGG weights."""
    return Config(
        generator=AutoRetouch(width=4, blocks=1, norm="none", head="residual"),
        discriminator=AutoRetouchPatchGAN(width=4, norm="none"),
        loss=LossConfig(pixel="l1", perceptual_weight=0.0, adversarial="lsgan"),
        data=DataConfig(root=str(face_folder), crop=32),
        optim=OptimConfig(ema=0.9),
        train=TrainConfig(steps=6, batch=8, checkpoint_every=3, log_every=2, sample_every=6),
        parallel=ParallelConfig(devices=1),
    )


def edited(config: Config, **groups: dict) -> Config:
    """`edited(config, train={"steps": 3})`: a copy with some values of some groups replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    )
