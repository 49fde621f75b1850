"""A resumed run ends bitwise like an undisturbed one, after a clean stop, a signal, or kill −9 at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import edited

from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.training import loop
from autoretouch_jax.training.checkpoints import Checkpoints


def final_state(config, workdir: Path):
    trainer = loop.Trainer(config)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state, clock = checkpoints.restore(checkpoints.latest(), trainer.init(), trainer.shardings)
    return state, clock


def assert_same_run(config, a: Path, b: Path):
    (state_a, clock_a), (state_b, clock_b) = final_state(config, a), final_state(config, b)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)
    assert clock_a["images"] == clock_b["images"] == config.train.steps * config.train.batch
    steps = [[json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    assert steps[0] == steps[1] == sorted(set(steps[0]))
    assert (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, small_config) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert loop.run(small_config, workdir) == 0
    return workdir


@pytest.fixture
def undisturbed(whole_run, tmp_path) -> Path:
    """A copy of a run of `small_config` that nothing interrupted."""
    return Path(shutil.copytree(whole_run, tmp_path / "undisturbed"))


def test_six_steps_are_three_and_three(small_config, tmp_path):
    parts = tmp_path / "parts"
    longer_schedule = edited(small_config, optim={"decay_share": 0.0}, train={"log_every": 3})
    whole = tmp_path / "constant"
    assert loop.run(longer_schedule, whole) == 0
    assert loop.run(edited(longer_schedule, train={"steps": 3}), parts) == 0
    assert loop.run(longer_schedule, parts) == 0
    assert_same_run(longer_schedule, whole, parts)


def test_a_finished_run_says_so_and_changes_nothing(small_config, undisturbed, capsys):
    before = (undisturbed / "metrics.jsonl").read_text()
    assert loop.run(small_config, undisturbed) == 0
    assert "finished, 6 of 6 steps" in capsys.readouterr().out
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_the_files_of_a_run(undisturbed):
    assert {path.name for path in undisturbed.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "samples", "model"}
    record = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 6
    assert record["images"] == 48
    assert {"loss/pixel", "share/pixel", "share/adversarial", "images_per_s", "input_wait_share"} <= record.keys()
    assert (undisturbed / "samples" / "00000006.png").is_file()


@pytest.mark.parametrize(
    ("change", "key"), [({"optim": {"generator_lr": 1e-3}}, "optim.generator_lr"), ({"train": {"seed": 5}}, "train.seed")]
)
def test_another_config_is_refused_by_key(small_config, undisturbed, change, key):
    with pytest.raises(Refused, match=key):
        loop.run(edited(small_config, **change), undisturbed)


def test_periods_and_devices_may_change(small_config, undisturbed):
    changed = edited(
        small_config, train={"steps": 8, "checkpoint_every": 1, "log_every": 1}, parallel={"devices": 2, "mode": "pmap"}
    )
    assert loop.run(changed, undisturbed) == 0


def test_nothing_is_written_when_refused(small_config, tmp_path):
    with pytest.raises(Refused):
        loop.run(edited(small_config, data={"crop": 512}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(small_config, tmp_path, undisturbed, monkeypatch, number, status):
    fetched = []
    real = loop.Trainer.put

    def put(self, batch, *stop):
        fetched.append(1)
        if len(fetched) == 2:
            os.kill(os.getpid(), number)
        return real(self, batch, *stop)

    monkeypatch.setattr(loop.Trainer, "put", put)
    assert loop.run(small_config, tmp_path / "stopped") == status
    monkeypatch.undo()
    assert loop.run(small_config, tmp_path / "stopped") == 0
    assert_same_run(small_config, undisturbed, tmp_path / "stopped")


def test_bad_input_in_the_middle_of_a_run_saves_a_checkpoint(small_config, tmp_path, undisturbed, monkeypatch):
    real = loop.Trainer.put
    calls = []

    def put(self, batch, *stop):
        calls.append(1)
        if len(calls) == 5:
            raise BadInput("face7.png: cannot be decoded")
        return real(self, batch, *stop)

    monkeypatch.setattr(loop.Trainer, "put", put)
    assert loop.run(small_config, tmp_path / "stopped") == 1
    monkeypatch.undo()
    assert loop.run(small_config, tmp_path / "stopped") == 0
    assert_same_run(small_config, undisturbed, tmp_path / "stopped")


def test_a_loss_that_is_not_finite_stops_the_run(small_config, tmp_path, capsys):
    explosive = edited(small_config, optim={"generator_lr": 1e30}, train={"steps": 40, "log_every": 1, "checkpoint_every": 100})
    assert loop.run(explosive, tmp_path / "run") == 1
    assert "is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_bad_input_after_an_explosion_keeps_the_sound_checkpoint(small_config, tmp_path, monkeypatch, capsys):
    """However a run ends, a state that is not finite replaces no checkpoint."""
    config = edited(small_config, train={"steps": 40, "log_every": 100, "checkpoint_every": 2}, optim={"decay_share": 0.0})
    assert loop.run(edited(config, train={"steps": 2}), tmp_path / "run") == 0
    real, calls = loop.Trainer.put, []

    def put(self, batch, *stop):
        calls.append(1)
        if len(calls) == 2:
            raise BadInput("face7.png: cannot be decoded")
        return real(self, batch | {"weight": np.full_like(batch["weight"], np.nan)}, *stop)

    monkeypatch.setattr(loop.Trainer, "put", put)
    assert loop.run(config, tmp_path / "run") == 1
    assert "is not finite" in capsys.readouterr().err
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == ["2"]
    state, _ = final_state(config, tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.generator.params))


def test_without_an_average_none_is_kept(small_config, tmp_path):
    """The model is the generator itself, and resuming needs no average."""
    config = edited(small_config, optim={"ema": 0.0, "decay_share": 0.0})
    assert loop.run(edited(config, train={"steps": 3}), tmp_path / "run") == 0
    assert loop.run(config, tmp_path / "run") == 0
    state, _ = final_state(config, tmp_path / "run")
    assert state.ema is None
    variables = load_model(tmp_path / "run").variables["params"]
    jax.tree.map(np.testing.assert_array_equal, variables, jax.device_get(state.generator.params))


def test_a_save_that_fails_in_the_background_ends_the_run_and_keeps_the_one_before(small_config, undisturbed, monkeypatch):
    real, calls = Checkpoints.check, []

    def check(self):
        calls.append(1)
        if len(calls) == 4:
            monkeypatch.setattr(self._manager, "check_for_errors", lambda: [].pop())
        real(self)

    monkeypatch.setattr(Checkpoints, "check", check)
    longer = edited(small_config, train={"steps": 20}, optim={})
    with pytest.raises(OSError, match="a checkpoint could not be written"):
        loop.run(longer, undisturbed)
    monkeypatch.undo()
    assert loop.run(longer, undisturbed) == 0


RUN = """
import pickle, sys
from pathlib import Path
from autoretouch_jax.training import loop
sys.exit(loop.run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])))
"""


def test_kill_nine_at_random_moments_loses_nothing(small_config, tmp_path):
    import pickle

    config = edited(small_config, train={"steps": 40, "checkpoint_every": 2, "sample_every": 20})
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))

    def start(workdir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / "config.pickle"), str(workdir)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.perf_counter()
    assert start(whole).wait() == 0
    duration = time.perf_counter() - started
    moments = random.Random(0)
    for _ in range(2):
        process = start(killed)
        time.sleep(moments.uniform(0.3, 0.95) * duration)
        process.kill()
        process.communicate()
    process = start(killed)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert_same_run(config, whole, killed)
