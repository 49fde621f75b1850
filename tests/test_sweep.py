"""A sweep makes every trial exactly once, whichever worker is killed, and ends in a table, a plot, and a config that trains."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import edited
from optuna import distributions

from autoretouch_jax import cli
from autoretouch_jax.arguments.training import SweepArguments
from autoretouch_jax.config import load
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime.stop import StopRequest
from autoretouch_jax.sweeps import study, sweep
from autoretouch_jax.sweeps.report import as_python
from autoretouch_jax.sweeps.space import endless_keys, grid, smallest_values, trial_values

SPACE = """
from optuna.distributions import CategoricalDistribution, FloatDistribution
space = {"loss.pixel_weight": FloatDistribution(1.0, 100.0, log=True), "loss.edit_weight": CategoricalDistribution([1.0, 4.0])}
"""
TRIALS, STEPS = 5, 4


@pytest.fixture
def command(small_config, module_pairs, tmp_path) -> list[str]:
    """A sweep of runs of a second, as a user types it."""
    base = edited(small_config, train={"steps": STEPS, "log_every": 1, "checkpoint_every": 1})
    (tmp_path / "base.py").write_text(as_python(base, "A run of a second."))
    (tmp_path / "space.py").write_text(SPACE)
    source, target = module_pairs
    words = f"sweep {tmp_path / 'base.py'} --space {tmp_path / 'space.py'} --trials {TRIALS} --workdir {tmp_path / 'sweep'}"
    return [*words.split(), "--source", str(source), "--target", str(target), "--search", "random", "--rungs", "2"]


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "autoretouch_jax.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_workers_killed_and_started_again_lose_no_trial_and_make_none_twice(command, tmp_path):
    folder = tmp_path / "sweep"
    workers = [start(command), start(command)]
    until = time.monotonic() + 240
    while len(list(folder.glob("trials/*/metrics.jsonl"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
        worker.communicate()
    workers = [start(command), start(command)]
    said = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert sorted(int(row["trial"]) for row in rows) == list(range(TRIALS))
    assert {row["state"] for row in rows} <= {"finished", "stopped early"}
    for number in range(TRIALS):  # no step of any trial was logged twice: taken over, not made again
        steps = [json.loads(line)["step"] for line in (folder / f"trials/{number:04d}/metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))
    assert len({row["loss.pixel_weight"] for row in rows}) == TRIALS  # the workers did not repeat each other's draws
    values = [float(row["psnr_pooled"]) for row in rows if row["state"] == "finished"]
    assert values == sorted(values, reverse=True)
    best = load(folder / "best.py")
    assert best.loss.pixel_weight == pytest.approx(float(rows[0]["loss.pixel_weight"]))
    assert (folder / "sweep.png").stat().st_size > 10_000


def test_the_tasks_of_one_srun_are_workers_of_their_own(command, small_config, tmp_path):
    """Two tasks of a Slurm step. As processes of one run they would wait for each other, and average different trials."""
    base = edited(small_config, train={"steps": 2, "checkpoint_every": 1}, parallel={"timeout": 15})
    (tmp_path / "base.py").write_text(as_python(base, "A run of a second."))
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "autoretouch_jax.cli", *command, "--trials", "2"],
            env=os.environ | step | {"SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in "01"
    ]
    said = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    rows = list(csv.DictReader((tmp_path / "sweep" / "trials.csv").open()))
    assert [row["steps"] for row in rows] == ["2", "2"], said
    assert load(tmp_path / "sweep" / "best.py").parallel.distributed == "auto"  # the winner may train on many hosts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.distributed", "on"], "--parallel.distributed on: every worker of a sweep is a run of its own"),
        (
            ["--parallel.coordinator", "h:1", "--parallel.processes", "2"],
            "--parallel.coordinator h:1: every worker of a sweep is a run of its own",
        ),
    ],
)
def test_a_sweep_whose_workers_would_join_is_refused(command, tmp_path, capsys, flags, message):
    assert cli.main([*command, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_trial_that_needs_too_much_memory_fails_and_the_sweep_goes_on(small_config, module_pairs, tmp_path, monkeypatch):
    def run(config, workdir, stop, steps):
        jnp.zeros(1 << 46).block_until_ready()

    monkeypatch.setattr(sweep.loop, "run", run)
    space = {"loss.edit_weight": distributions.CategoricalDistribution([1.0, 2.0])}
    large = sweep.Sweep(small_config, space, 2, tmp_path / "large", "random", "psnr_pooled", 1, None)
    assert sweep.run(large, PairSource(*module_pairs)) == 1  # no trial was finished
    rows = list(csv.DictReader((tmp_path / "large" / "trials.csv").open()))
    assert len(rows) == 2
    assert all("too little memory" in row["reason"] for row in rows)


def test_the_best_trial_is_one_that_changes_nothing_where_nothing_is_to_be_edited(
    small_config, face_folder, tmp_path, monkeypatch, capsys
):
    """A PSNR without any error is infinite: the trial that keeps untouched pairs wins over those that damage them."""
    from test_use import random_model

    random = random_model()
    still = dataclasses.replace(random, variables=jax.tree.map(np.zeros_like, random.variables))
    monkeypatch.setattr(sweep.loop, "run", lambda *_: 0)
    monkeypatch.setattr(sweep, "load_model", lambda folder: still if folder.name == "0001" else random)
    space = {"loss.edit_weight": distributions.CategoricalDistribution([1.0, 2.0, 3.0])}
    untouched = sweep.Sweep(small_config, space, 3, tmp_path / "still", "grid", SweepArguments.metric, 2, None)
    assert sweep.run(untouched, PairSource(face_folder, face_folder)) == 0
    rows = list(csv.DictReader((tmp_path / "still" / "trials.csv").open()))
    assert rows[0]["trial"] == "1"
    assert rows[0]["psnr_pooled"] == "inf"
    assert "psnr_pooled inf on the validation pairs; doing nothing scores inf." in capsys.readouterr().out
    assert 0 < float(rows[1]["psnr_pooled"]) < 60
    undefined = sweep.dataclasses.replace(untouched, metric="edit_recovered", workdir=tmp_path / "undefined")
    assert sweep.run(undefined, PairSource(face_folder, face_folder)) == 1
    assert "none of these pairs has an edit" in (tmp_path / "undefined" / "trials.csv").read_text()


def test_the_winner_is_a_config_that_trains(small_config, tmp_path):
    path = tmp_path / "best.py"
    far = "/data of the-studio/" + "a-very long-folder/" * 12  # nothing may be broken inside a text
    config = edited(small_config, data={"root": far})
    path.write_text(as_python(config, "Trial 3."))
    assert load(path) == config


def test_a_grid_is_all_its_combinations_and_a_stopped_worker_says_so(small_config, module_pairs, tmp_path, capsys):
    space = {"loss.edit_weight": sweep.optuna.distributions.CategoricalDistribution([1.0, 2.0, 3.0])}
    config = edited(small_config, train={"steps": 1})
    common = sweep.Sweep(config, space, 1, tmp_path / "grid", "grid", "psnr_pooled", 1, None)
    assert sweep.run(common, PairSource(*module_pairs)) == 0
    rows = list(csv.DictReader((tmp_path / "grid" / "trials.csv").open()))
    assert sorted(float(row["loss.edit_weight"]) for row in rows) == [1, 2, 3]
    with pytest.raises(Refused, match="holds another sweep: metric"):
        sweep.run(sweep.dataclasses.replace(common, metric="edit_psnr"), PairSource(*module_pairs))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("space = {}", "must define"),
        ("space = 1 / 0", "ZeroDivisionError"),
        ('from optuna.distributions import *\nspace = {"optim.generator_rl": FloatDistribution(1, 2)}', "did you mean"),
        ('from optuna.distributions import *\nspace = {"train.batch": IntDistribution(0, 2)}', "train.batch 0"),
        ('from optuna.distributions import *\nspace = {"parallel.process": IntDistribution(0, 1)}', "a run of its own"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(command, tmp_path, capsys, space, message):
    (tmp_path / "space.py").write_text(space)
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_the_values_of_a_grid_are_listed_and_endless_ones_are_named():
    kinds = {
        "train.batch": distributions.IntDistribution(2, 6, step=2),
        "loss.edit_weight": distributions.CategoricalDistribution([1.0, 4.0]),
    }
    assert grid(kinds) == [{"train.batch": b, "loss.edit_weight": w} for b in (2, 4, 6) for w in (1.0, 4.0)]
    assert smallest_values(kinds) == {"train.batch": 2, "loss.edit_weight": 1.0}
    assert endless_keys(kinds) == []
    endless = kinds | {"optim.generator_lr": distributions.FloatDistribution(1e-4, 1e-2, log=True)}
    assert endless_keys(endless) == ["optim.generator_lr"]


def test_the_devices_of_the_first_worker_decide_in_which_precision_all_compare(small_config, tmp_path, monkeypatch):
    one = sweep.Sweep(small_config, {}, 1, tmp_path, "random", "psnr_pooled", 1, None)

    def joins(kind: str) -> str:
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=kind)])
        joined = sweep._in_one_precision(one)
        sweep._refuse_other_sweep(joined)
        return joined.config.train.precision

    assert [joins("tpu"), joins("cpu")] == ["bfloat16", "bfloat16"]
    (tmp_path / "sweep.json").unlink()
    assert [joins("cpu"), joins("tpu")] == ["float32", "float32"]


def test_a_left_trial_is_taken_over_and_a_running_one_is_not(tmp_path):
    one = study.open_study(tmp_path, None)
    space = {"loss.edit_weight": distributions.CategoricalDistribution([1.0, 4.0])}
    folder = lambda number: tmp_path / f"{number}"  # noqa: E731
    trial, lock = study.take_new(one, space, "random", 0, [], 2, folder)
    assert study.any_running(one)
    assert study.take_abandoned(one, folder) is None, "its worker lives"
    value = trial_values(trial, space)
    lock.close()  # as the kernel does when the worker dies
    taken, lock = study.take_abandoned(one, folder)
    assert taken.number == trial.number
    assert trial_values(taken, space) == value, "drawn once"
    one.tell(taken, 1.0)
    lock.close()
    assert study.take_abandoned(one, folder) is None
    assert study.take_new(one, space, "random", 0, [], 1, folder) is None, "there are as many as were asked for"


def test_a_torn_line_in_the_journal_is_cut_off(tmp_path):
    journal = tmp_path / "journal.log"
    journal.write_bytes(b'{"a": 1}\n{"b"')
    lock = study.JournalLock(journal)
    lock.acquire()
    lock.release()
    assert journal.read_bytes() == b'{"a": 1}\n'


def test_a_command_that_is_stopped_before_it_has_begun_says_so(command):
    started = subprocess.Popen([sys.executable, "-m", "autoretouch_jax.cli", *command], stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{started.pid}/status")
    until = time.monotonic() + 60
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert time.monotonic() < until
    started.terminate()
    assert started.wait(60) == 75


def test_a_request_to_stop_may_be_entered_twice():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        with stop:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
