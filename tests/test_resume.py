"""A resumed run ends bitwise like an undisturbed one, after a clean stop, a signal, or kill −9 at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import edited
from PIL import Image

from autoretouch_jax.config import ValidationConfig
from autoretouch_jax.config.resume import to_json
from autoretouch_jax.data.folders import FaceSource
from autoretouch_jax.errors import EXIT_REQUEUE, BadInput, Refused
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.runtime.stop import StopRequest
from autoretouch_jax.training import loop, progress, publish, resuming
from autoretouch_jax.training.checkpoints import Checkpoints, newest_checkpoint, read_clock
from autoretouch_jax.training.manifest import take_manifest


def final_state(config, workdir: Path):
    trainer = loop.Trainer(config)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state, clock = checkpoints.restore(checkpoints.latest(), trainer.shapes, trainer.init)
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
    for_the_run = {"config.json", "data.json", "manifest.json", "checkpoints"}
    for_people = {"metrics.jsonl", "events.jsonl", "report.html"}
    assert {path.name for path in undisturbed.iterdir()} == for_the_run | for_people | {"samples", "model", "tensorboard"}
    record = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 6
    assert record["images"] == 48
    assert {"loss/pixel", "share/pixel", "share/adversarial", "images_per_s", "input_wait_share"} <= record.keys()
    assert (undisturbed / "samples" / "00000006.png").is_file()


@pytest.mark.parametrize(
    ("change", "key"), [({"optim": {"beta1": 0.9}}, "optim.beta1"), ({"train": {"seed": 5}}, "train.seed")]
)
def test_another_config_is_refused_by_key(small_config, undisturbed, change, key):
    with pytest.raises(Refused, match=key):
        loop.run(edited(small_config, **change), undisturbed)


def test_a_key_that_a_newer_version_added_counts_as_its_default(small_config, undisturbed):
    stored = json.loads((undisturbed / "config.json").read_text())
    del stored["guard"], stored["data"]["validation"], stored["generator"]["norm"]
    stored["train"].pop("trackers")
    (undisturbed / "config.json").write_text(json.dumps(stored))
    # The default of `norm` is not what this config says, so the old run was another one.
    with pytest.raises(Refused, match=r"generator\.norm"):
        loop.run(small_config, undisturbed)
    stored["generator"]["norm"] = "none"
    (undisturbed / "config.json").write_text(json.dumps(stored))
    assert loop.run(edited(small_config, train={"steps": 8}), undisturbed) == 0


def test_a_run_goes_on_in_the_precision_that_it_had(small_config, undisturbed, tmp_path, capsys):
    def stored(run: Path) -> str:
        return json.loads((run / "config.json").read_text())["train"]["precision"]

    assert stored(undisturbed) == "float32"  # auto, on a CPU
    run = tmp_path / "run"  # as if it had begun on a GPU
    assert loop.run(edited(small_config, train={"precision": "bfloat16", "steps": 2}), run) == 0
    capsys.readouterr()
    for given, steps, goes_on in (("auto", 3, "bfloat16"), ("float32", 4, "float32"), ("auto", 5, "float32")):
        assert loop.run(edited(small_config, train={"precision": given, "steps": steps}), run) == 0
        assert f"(jit, {goes_on})" in capsys.readouterr().out
        assert stored(run) == goes_on


def test_a_run_that_computed_nothing_has_no_precision_yet(small_config, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    begun = edited(small_config, train={"precision": "bfloat16"})
    (run / "config.json").write_text(to_json(begun))
    assert loop.run(edited(small_config, train={"steps": 1}), run) == 0
    assert "(jit, float32)" in capsys.readouterr().out
    (run / "config.json").write_text(to_json(begun).replace("bfloat16", "float8"))
    with pytest.raises(Refused, match="float8 is unknown; give --train"):
        loop.run(small_config, run)


def test_data_may_move_and_must_be_the_same(small_config, undisturbed, tmp_path, capsys):
    moved = Path(shutil.copytree(small_config.data.root, tmp_path / "moved"))
    longer = edited(small_config, train={"steps": 8})
    assert loop.run(edited(longer, data={"root": str(moved)}), undisturbed) == 0
    assert "--data.root: at another path than before, with the same files" in capsys.readouterr().err
    (moved / "face0.png").unlink()
    Image.open(moved / "face1.png").rotate(180).save(moved / "face1.png")
    longer = edited(small_config, train={"steps": 9}, data={"root": str(moved)})
    with pytest.raises(Refused, match=r"--data.root: other data .*removed 1 \(face0\); changed 1 \(face1\).*--data.on-change"):
        loop.run(longer, second_home(undisturbed, small_config))
    assert loop.run(edited(longer, data={"on_change": "accept"}), undisturbed) == 0
    assert "data have changed since the last start: removed 1 (face0)" in capsys.readouterr().err
    assert loop.run(edited(longer, train={"steps": 10}), undisturbed) == 0, "accepted once and for all"
    clock = read_clock(undisturbed / "checkpoints", 10)
    assert clock["data"] == take_manifest(FaceSource(moved), None).digest


def test_a_run_of_an_earlier_version_resumes_and_notices_other_names(face_folder, tmp_path):
    """Its clock holds no digest, and it has no manifest: the names are all that can be compared."""
    moved = Path(shutil.copytree(face_folder, tmp_path / "moved"))
    source = FaceSource(moved)
    (tmp_path / "data.json").write_text(json.dumps(resuming.describe_data(source)))
    check = lambda source, clock={}, accept=False: resuming.check_data(  # noqa: E731
        tmp_path, source, take_manifest(source, None), clock, ["data.root"], accept
    )
    assert check(source) == ["--data.root: at another path than before, with the same names"]
    # A clock with a digest belongs to a run that has a manifest: here it was lost.
    with pytest.raises(Refused, match="or other names, files or weights"):
        check(source, {"data": "1:other"})
    assert check(source, {"data": take_manifest(source, None).digest}), "the checkpoint was made with these data"
    (moved / "face2.png").unlink()
    with pytest.raises(Refused, match="4 examples there, 3 here"):
        check(FaceSource(moved))
    assert "From here on this is another run" in check(FaceSource(moved), accept=True)[0]


def second_home(workdir: Path, config) -> Path:
    """The run as it would be had it been started with the config's own data."""
    stored = json.loads((workdir / "config.json").read_text())
    stored["data"]["root"] = config.data.root
    (workdir / "config.json").write_text(json.dumps(stored))
    return workdir


def test_a_broken_model_beside_a_whole_checkpoint_is_written_again(small_config, undisturbed):
    weights = undisturbed / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert loop.run(edited(small_config, train={"steps": 8}), undisturbed) == 0
    load_model(undisturbed)


def test_a_learning_rate_that_would_jump_is_named(small_config, undisturbed, capsys):
    assert loop.run(edited(small_config, train={"steps": 60}), undisturbed) == 0
    said = capsys.readouterr().err
    assert "the learning rate rises from 6.7e-05 to 0.0002 at step 6" in said.replace("The learning", "the learning")
    assert "--optim.generator-lr 6.7e-05 would go on smoothly" in said


def test_the_published_statistics_are_averaged_like_the_weights(small_config, tmp_path):
    """Weights that no step ever had need the statistics that go with them."""
    config = edited(small_config, generator={"norm": "batch"})
    assert loop.run(config, tmp_path / "run") == 0
    state, _ = final_state(config, tmp_path / "run")
    published = load_model(tmp_path / "run").variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, published, jax.device_get(state.ema_stats))
    different = jax.tree.map(lambda a, b: bool((a != b).any()), published, jax.device_get(state.generator.batch_stats))
    assert any(jax.tree.leaves(different))


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
    explosive = edited(
        small_config,
        optim={"generator_lr": 1e30},
        train={"steps": 40, "log_every": 1, "checkpoint_every": 100},
        guard={"enabled": False},
    )
    assert loop.run(explosive, tmp_path / "run") == 1
    assert "is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_bad_input_after_an_explosion_keeps_the_sound_checkpoint(small_config, tmp_path, monkeypatch, capsys):
    """However a run ends, a state that is not finite replaces no checkpoint."""
    config = edited(
        small_config,
        train={"steps": 40, "log_every": 100, "checkpoint_every": 2},
        optim={"decay_share": 0.0},
        guard={"enabled": False},
    )
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


def test_a_save_that_fails_in_the_background_is_said_once_and_tried_again(small_config, undisturbed, monkeypatch, capsys):
    """A full disk may become free again. At the end the run must not say that it has saved what it has not."""
    real, calls = Checkpoints.check, []

    def check(self):
        calls.append(1)
        if 4 <= len(calls) <= 6:
            raise OSError("checkpoints: a checkpoint could not be written (no space)")
        real(self)

    monkeypatch.setattr(Checkpoints, "check", check)
    longer = edited(small_config, train={"steps": 20}, optim={})
    assert loop.run(longer, undisturbed) == 0
    assert capsys.readouterr().err.count("could not be written") == 1
    events = [json.loads(line) for line in (undisturbed / "events.jsonl").read_text().splitlines()]
    assert [event["level"] for event in events if "could not be written" in event["text"]] == ["bad"]

    monkeypatch.setattr(Checkpoints, "check", lambda self: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        loop.run(edited(longer, train={"steps": 22}), undisturbed)
    monkeypatch.undo()
    assert loop.run(edited(longer, train={"steps": 22}), undisturbed) == 0


def test_a_model_is_written_while_training_goes_on(small_config, tmp_path, monkeypatch):
    """Its arrays are those of the step that it names, though later steps overwrite the state meanwhile."""
    config = edited(small_config, train={"steps": 6, "checkpoint_every": 3}, optim={})
    assert loop.run(config, tmp_path / "three", until=3) == 0
    expected = (tmp_path / "three" / "model" / "model.safetensors").read_bytes()
    real, written, stepped = publish.save_model, {}, threading.Event()

    def slow(folder, model, step):
        if step == 3:
            assert stepped.wait(120), "training did not go on"
        real(folder, model, step)
        written[step] = (folder / "model.safetensors").read_bytes()

    def record(step, *rest, real=progress.record):
        if step > 4:
            stepped.set()
        return real(step, *rest)

    monkeypatch.setattr(publish, "save_model", slow)
    monkeypatch.setattr(progress, "record", record)
    assert loop.run(edited(config, train={"log_every": 1}, optim={}), tmp_path / "run") == 0
    assert written[3] == expected
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == written[6]


def test_a_model_that_cannot_be_written_is_said_once_and_ends_no_run(small_config, tmp_path, monkeypatch, capsys):
    def full(folder, model, step):
        if step < 4:
            raise RuntimeError("the store is full")  # as an object store's own errors
        real(folder, model, step)

    def stuck(folder, model, step):
        raise OSError("no space")

    real = publish.save_model
    monkeypatch.setattr(publish, "save_model", full)
    config = edited(small_config, train={"steps": 4, "checkpoint_every": 1}, optim={})
    assert loop.run(config, tmp_path / "run") == 0
    assert capsys.readouterr().err.count("model: the model could not be written (the store is full)") == 1
    monkeypatch.setattr(publish, "save_model", stuck)
    longer = edited(config, train={"steps": 6}, optim={})
    # A stop has its checkpoint, so the run is put into the queue again.
    assert loop.run(longer, tmp_path / "run", StopRequest(1e-9)) == EXIT_REQUEUE
    with pytest.raises(OSError, match="model: the model could not be written"):
        loop.run(longer, tmp_path / "run")


def test_a_checkpoint_is_deleted_only_once_a_newer_one_is_finished(small_config, tmp_path, monkeypatch):
    trainer = loop.Trainer(small_config)
    state = trainer.init()
    with Checkpoints(tmp_path) as checkpoints:
        real, beside = checkpoints._manager.delete, []

        def delete(step):
            beside.append({path.name for path in tmp_path.iterdir() if path.name.isdigit()})
            real(step)

        monkeypatch.setattr(checkpoints._manager, "delete", delete)
        for step in range(1, 6):  # each save begins while the one before it still writes
            checkpoints.save(step, state, {})
    assert beside == [{"1", "2"}, {"2", "3"}, {"3", "4"}]


def test_a_deletion_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(small_config, tmp_path, monkeypatch):
    trainer = loop.Trainer(small_config)
    state = trainer.init()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
        monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: (Path(folder) / "2" / "_CHECKPOINT_METADATA").unlink())
        checkpoints.forget_after(1)
        monkeypatch.undo()
    assert newest_checkpoint(tmp_path) == 1
    assert (tmp_path / "deleted").is_dir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert not (tmp_path / "deleted").exists()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, trainer.shapes, trainer.init)[0], state)


RUN = """
import pickle, sys
from pathlib import Path
from autoretouch_jax.training import loop
sys.exit(loop.run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_at_random_moments_loses_nothing(small_config, face_folder, tmp_path, sent):
    """With validation, guard and report. MOMENTS=20 ends it at twenty moments."""
    import pickle

    held_out = ValidationConfig(root=str(shutil.copytree(face_folder, tmp_path / "held_out")), every=7, images=2)
    config = edited(
        small_config,
        train={"steps": 60, "checkpoint_every": 2, "log_every": 2, "sample_every": 20},
        data={"validation": held_out},
    )
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))

    def start(workdir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / "config.pickle"), str(workdir)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    whole, ended = tmp_path / "whole", tmp_path / "ended"
    started = time.perf_counter()
    assert start(whole).wait() == 0
    duration = time.perf_counter() - started
    moments, statuses = random.Random(0), []
    for _ in range(int(os.environ.get("MOMENTS", "2"))):
        process = start(ended)
        time.sleep(moments.uniform(0.3, 0.95) * duration)
        process.send_signal(sent)
        process.communicate()
        statuses.append(process.returncode)
    process = start(ended)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert set(statuses) <= {0, 75, -sent}, statuses
    assert_same_run(config, whole, ended)
    best = [(run / "model-best" / "model.safetensors").read_bytes() for run in (whole, ended)]
    assert best[0] == best[1]
    measured = [[json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()] for run in (whole, ended)]
    assert measured[0] == measured[1]
