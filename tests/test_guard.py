"""A run that goes astray: what the guard skips, when the run goes back, when it gives up, and that all can be repeated."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import edited
from safetensors.numpy import load_file
from test_resume import assert_same_run, final_state

from autoretouch_jax.config import GuardConfig
from autoretouch_jax.training import guard, loop
from autoretouch_jax.training.checkpoints import Checkpoints


def judged(memory, config, norm=1.0, objective=1.0, other=0.0):
    return guard.judge(memory, config, jnp.array([norm, 0.0]), jnp.float32(objective), jnp.array([other]))


def after(steps, config, **values):
    memory = guard.initial()
    for _ in range(steps):
        _, memory, _ = judged(memory, config, **values)
    return memory


@pytest.mark.parametrize("bad", [{"norm": np.nan}, {"norm": np.inf}, {"objective": np.nan}, {"other": np.inf}])
def test_what_is_not_finite_is_skipped_at_once_and_forgotten(bad):
    config = GuardConfig()
    memory = after(3, config)
    sound, later, metrics = judged(memory, config, **bad)
    assert not sound
    assert (int(later.seen), int(later.skipped), int(later.in_a_row)) == (3, 1, 1)
    assert metrics["guard/good"] == 0
    for name in ("norms", "slow", "fast"):
        np.testing.assert_array_equal(getattr(later, name), getattr(memory, name))
    sound, later, _ = judged(later, config)
    assert sound
    assert int(later.in_a_row) == 0


def test_a_jump_is_skipped_once_the_guard_knows_what_is_usual():
    config = GuardConfig(spike=10.0)
    assert judged(after(guard.FIRST_NORMS - 1, config), config, norm=50.0)[0], "it does not know yet"
    memory = after(guard.FIRST_NORMS, config)
    assert judged(memory, config, norm=9.0)[0]
    assert not judged(memory, config, norm=11.0)[0]
    assert judged(memory, GuardConfig(spike=0.0), norm=1e6)[0], "switched off"
    # A lasting change of size becomes the usual one.
    for count in range(100):  # noqa: B007
        sound, memory, _ = judged(memory, config, norm=30.0)
        if sound:
            break
    assert 5 < count < 50


def test_patience_and_the_objective_s_history():
    config = GuardConfig(patience=3, diverged=10.0)
    memory = after(guard.FIRST_OBJECTIVES, config)
    for expected in (0.0, 0.0, guard.SKIPPING):
        _, memory, metrics = judged(memory, config, norm=np.nan)
        assert guard.trouble(metrics) == expected
    memory = after(guard.FIRST_OBJECTIVES, config)
    _, _, metrics = judged(memory, config, objective=9.0)
    assert guard.good(metrics)
    _, memory, metrics = judged(memory, config, objective=50.0)
    assert guard.trouble(metrics) == 0, "one batch may be an odd one"
    assert not guard.good(metrics), "and is not worth a checkpoint"
    for count in range(20):  # noqa: B007
        _, memory, metrics = judged(memory, config, objective=50.0)
        if guard.trouble(metrics):
            break
    assert guard.trouble(metrics) == guard.ASTRAY
    assert count < 10


# ---- runs -------------------------------------------------------------------------------------------------------------------


def with_weights(monkeypatch, weight):
    """Lets `weight(number of the batch)` multiply the weights of each batch that the run gets."""
    real, calls = loop.Trainer.put, []

    def put(self, batch, *stop):
        calls.append(1)
        return real(self, batch | {"weight": batch["weight"] * np.float32(weight(len(calls)))}, *stop)

    monkeypatch.setattr(loop.Trainer, "put", put)
    return calls


def events(workdir: Path, kind: str) -> list[dict]:
    lines = (workdir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def all_finite(config, workdir: Path) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_state(config, workdir)[0]))


@pytest.fixture
def guarded(small_config):
    return edited(
        small_config,
        train={"steps": 12, "log_every": 2, "checkpoint_every": 4},
        optim={"decay_share": 0.0},
        guard={"patience": 3, "rollbacks": 2, "rate_factor": 0.5},
    )


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_batch_changes_nothing_but_the_count(guarded, tmp_path, monkeypatch, bad, mode):
    config = edited(guarded, parallel={"mode": mode, "devices": 2})
    with_weights(monkeypatch, lambda number: bad if number == 6 else 1.0)
    assert loop.run(config, tmp_path / "run") == 0
    assert all_finite(config, tmp_path / "run")
    state, _ = final_state(config, tmp_path / "run")
    assert (int(state.guard.skipped), int(state.guard.rollbacks), int(state.step)) == (1, 0, 12)
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["guard/skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert all(line["loss/pixel"] is not None for line in lines)
    assert "1 update(s) were skipped" in events(tmp_path / "run", "skipped")[0]["text"]


def test_a_skipped_update_leaves_every_array_as_it_was(guarded):
    trainer = loop.Trainer(edited(guarded, parallel={"devices": 1}))
    batch = next(trainer.batches(0))
    before = jax.device_get(trainer.init())
    state, _ = trainer.step(
        trainer.init(), trainer.put(batch | {"weight": batch["weight"] * np.float32("nan")}), trainer.frozen
    )
    for name in ("generator", "discriminator", "ema", "ema_stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), jax.device_get(getattr(state, name)))
    assert int(state.step) == 1


def test_without_the_guard_the_same_batch_loses_the_run(guarded, tmp_path, monkeypatch, capsys):
    with_weights(monkeypatch, lambda number: np.nan if number == 6 else 1.0)
    assert loop.run(edited(guarded, guard={"enabled": False}), tmp_path / "run") == 1
    assert "is not finite" in capsys.readouterr().err


def test_bad_batches_in_a_row_are_left_out_after_going_back(guarded, tmp_path, monkeypatch):
    with_weights(monkeypatch, lambda number: np.nan if 6 <= number <= 8 else 1.0)
    assert loop.run(guarded, tmp_path / "run") == 0
    state, _ = final_state(guarded, tmp_path / "run")
    # The third bad update is step 8. It is read one step later, or at once where a checkpoint is due: it is, at 8.
    assert (int(state.guard.rollbacks), int(state.guard.offset), float(state.guard.rate)) == (1, 4, 0.5)
    assert all_finite(guarded, tmp_path / "run")
    assert "Back to step 4" in events(tmp_path / "run", "rollback")[0]["text"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    rates = [line["learning_rate"] for line in lines]
    assert rates[-1] == pytest.approx(0.5 * rates[0])


def test_a_run_that_keeps_failing_gives_up_and_says_why(guarded, tmp_path, monkeypatch, capsys):
    calls = with_weights(monkeypatch, lambda number: np.nan if number > 5 else 1.0)
    assert loop.run(guarded, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "gave up at step" in said
    assert "2 attempt(s) with lower learning rates ended so too" in said
    assert "--optim.clip-norm 1" in said
    assert len(calls) < 30
    assert all_finite(guarded, tmp_path / "run"), "the last checkpoint is sound"
    monkeypatch.undo()
    # The same command may go on with other settings, and does.
    assert (
        loop.run(edited(guarded, optim={"generator_lr": 1e-5, "clip_norm": 1.0}, guard={"patience": 9}), tmp_path / "run") == 0
    )


def test_a_learning_rate_that_is_far_too_high_is_lowered(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "FIRST_OBJECTIVES", 8)
    monkeypatch.setattr(guard, "FIRST_NORMS", 8)
    config = edited(guarded, train={"steps": 30}, guard={"rate_factor": 0.01, "spike": 0.0, "diverged": 5.0})
    assert loop.run(edited(config, train={"steps": 10}), tmp_path / "run") == 0
    assert loop.run(edited(config, optim={"generator_lr": 3.0}), tmp_path / "run") == 0
    state, _ = final_state(config, tmp_path / "run")
    assert int(state.guard.rollbacks) >= 1
    assert all_finite(config, tmp_path / "run")
    assert "times as large as it was" in events(tmp_path / "run", "rollback")[0]["text"]


def test_killed_around_its_return_a_run_ends_the_same(guarded, tmp_path, monkeypatch):
    """The guard's memory is in the checkpoint, so what is repeated after a kill goes the same way."""

    def bad(self, batch, *stop):  # bad by content: the same batches are bad after a resume
        key = int(batch["source"].sum()) % 5
        return real(self, batch | {"weight": batch["weight"] * np.float32(np.nan if key < 3 else 1.0)}, *stop)

    real = loop.Trainer.put
    monkeypatch.setattr(loop.Trainer, "put", bad)
    config = edited(guarded, guard={"patience": 2, "rollbacks": 20}, train={"checkpoint_every": 2, "log_every": 1})
    assert loop.run(config, tmp_path / "whole") == 0
    assert int(final_state(config, tmp_path / "whole")[0].guard.rollbacks) > 0
    for step in range(1, 12):
        assert loop.run(config, tmp_path / "parts", until=step) == 0
        if step % 3 == 0:  # a kill −9: what was done after the last checkpoint is lost, and done again
            kept = shutil.copytree(tmp_path / "parts", tmp_path / "kept")
            assert loop.run(config, tmp_path / "parts", until=step + 2) == 0
            shutil.rmtree(tmp_path / "parts")
            kept.rename(tmp_path / "parts")
    assert loop.run(config, tmp_path / "parts") == 0
    assert_same_run(config, tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_without_a_guard_goes_on_with_one_and_back(small_config, tmp_path):
    """As after an update of the package, whose state has more in it."""
    config = edited(small_config, optim={"decay_share": 0.0})
    without = edited(config, guard={"enabled": False})
    assert loop.run(edited(without, train={"steps": 3}), tmp_path / "run") == 0
    assert loop.run(edited(config, train={"steps": 5}), tmp_path / "run") == 0
    assert loop.run(without, tmp_path / "run") == 0
    assert loop.run(without, tmp_path / "other") == 0
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "other"))
    # Not bitwise: with and without the guard are two programs, and on some processors XLA rounds them differently.
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-6, err_msg="the guard changes no number of a sound run")


def test_the_guard_costs_almost_nothing(guarded):
    """Less than 1 % of the step's FLOPs. What it computes grows with the parameters alone, and the step with the pixels too."""
    flops = []
    for enabled in (True, False):
        trainer = loop.Trainer(edited(guarded, guard={"enabled": enabled}, data={"crop": 64}, parallel={"devices": 1}))
        arguments = (trainer.init(), trainer.put(next(trainer.batches(0))), trainer.frozen)
        flops.append(trainer.step.lower(*arguments).compile().cost_analysis()["flops"])
    assert 1 <= flops[0] / flops[1] < 1.01


def test_old_checkpoints_have_no_averaged_statistics(small_config, tmp_path, monkeypatch):
    """A run of an earlier version goes on; its average of BatchNorm's statistics begins with the present ones."""
    config = edited(small_config, generator={"norm": "batch"}, optim={"decay_share": 0.0}, train={"steps": 3})
    real = Checkpoints.save

    def save(self, step, state, clock):  # the state as it was
        fields = {name: getattr(state, name) for name in ("step", "generator", "discriminator", "ema")}
        real(self, step, fields, clock)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert loop.run(config, tmp_path / "run") == 0
    monkeypatch.undo()
    state, _ = final_state(config, tmp_path / "run")
    assert jax.tree.leaves(state.generator.batch_stats), "the network has BatchNorm"
    jax.tree.map(np.testing.assert_array_equal, state.ema_stats, state.generator.batch_stats)
    assert os.path.isdir(tmp_path / "run" / "checkpoints" / "3")
    assert loop.run(edited(config, train={"steps": 5}), tmp_path / "run") == 0
