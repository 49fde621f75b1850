"""Validation while training: what is measured, which model is kept, when a run ends early, how it is shared; verdicts."""

import json
import time

import numpy as np
import pytest
from conftest import edited, make_pairs
from safetensors import safe_open

from autoretouch_jax.config import Config, DataConfig, TrainConfig, ValidationConfig
from autoretouch_jax.config.validation import validate
from autoretouch_jax.data.held_out import open_validation
from autoretouch_jax.errors import Refused
from autoretouch_jax.evaluation import evaluate as evaluation
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.runtime import cores, processes
from autoretouch_jax.training import loop, publish, verdicts
from autoretouch_jax.training.journal import Journal
from autoretouch_jax.training.log import Window
from autoretouch_jax.training.verdicts import judge


@pytest.fixture(scope="module")
def held_out(face_folder, tmp_path_factory):
    return make_pairs(face_folder, tmp_path_factory.mktemp("held"))


@pytest.fixture
def validated(small_config, held_out, face_folder) -> Config:
    source, target = map(str, held_out)
    given = ValidationConfig(source=source, target=target, alone=str(face_folder), every=2, images=3)
    return edited(small_config, data={"validation": given}, optim={"decay_share": 0.0})


def step_of(model) -> int:
    with safe_open(model / "model.safetensors", "numpy") as file:
        return int(file.metadata()["step"])


def rows(workdir):
    return [json.loads(line) for line in (workdir / "validation.jsonl").read_text().splitlines()]


def test_a_run_is_measured_beside_doing_nothing_and_keeps_its_best_model(validated, tmp_path):
    assert loop.run(validated, tmp_path / "run") == 0
    measured = rows(tmp_path / "run")
    assert [row["step"] for row in measured] == [2, 4, 6]
    assert all(len(row["images"]) == 3 and len(row["alone"]) == 3 for row in measured)
    assert all(row["identity"]["psnr_pooled"] == measured[0]["identity"]["psnr_pooled"] for row in measured)
    scores = [row["model"]["psnr_pooled"] for row in measured]
    best = max(range(3), key=scores.__getitem__)
    assert [row["best"] for row in measured] == [score > max(scores[:i], default=0) for i, score in enumerate(scores)]
    assert step_of(tmp_path / "run" / "model-best") == measured[best]["step"]
    # What the run says of its last model is what `evaluate` says of it.
    pairs, alone = open_validation(validated.data)
    result, _ = evaluation.evaluate({"model": load_model(tmp_path / "run")}, pairs, alone=alone)
    assert result["model"] == measured[-1]["model"]
    pictures = sorted(path.name for path in (tmp_path / "run" / "validation").rglob("*.webp"))
    assert pictures.count("source.webp") == 3
    assert pictures.count("00000006.webp") == 3
    assert "PSNR" in (tmp_path / "run" / "report.html").read_text()


def test_validation_changes_no_number_of_the_run_and_survives_a_resume(validated, small_config, tmp_path):
    plain = edited(small_config, optim={"decay_share": 0.0})
    assert loop.run(plain, tmp_path / "plain") == 0
    assert loop.run(edited(validated, train={"steps": 3}), tmp_path / "run") == 0
    assert loop.run(validated, tmp_path / "run") == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 3, 4, 6]
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("plain", "run"))
    assert a == b


def test_a_run_ends_early_on_request_and_says_so_again(validated, tmp_path, capsys, monkeypatch):
    scores = iter([3.0, 5.0, 4.0, 5.0, 9.0])

    def measured(models, pairs, **options):
        result = {"n": 1, "edit_threshold": 0.0, "identity": {}, "model": {"psnr_pooled": next(scores)}, "images": []}
        return result, []

    monkeypatch.setattr("autoretouch_jax.training.validation.evaluate", measured)
    patient = edited(validated, train={"steps": 20}, data={"validation": edited_validation(validated, patience=2)})
    for _ in range(2):
        assert loop.run(patient, tmp_path / "run") == 0
        assert "ended early at step 8, after 2 validation(s) without a better one" in capsys.readouterr().out
    assert step_of(tmp_path / "run" / "model-best") == 4


def test_the_best_model_that_cannot_be_written_is_named(validated, tmp_path, monkeypatch):
    """The last validation and the last checkpoint are of one step: the model that is written next must not hide the error."""
    real = publish.save_model

    def best_fails(folder, model, step):
        if folder.name == "model-best":
            raise OSError("no space")
        real(folder, model, step)

    monkeypatch.setattr(publish, "save_model", best_fails)
    with pytest.raises(OSError, match="model-best: the model could not be written"):
        loop.run(edited(validated, train={"steps": 2}), tmp_path / "run")
    assert step_of(tmp_path / "run" / "model") == 2


def test_a_perfect_validation_is_the_best_one_and_a_reader_is_told(validated, tmp_path, monkeypatch):
    """A pooled PSNR without any error is null in the file, and higher than any other."""
    scores = iter([41.0, None, 42.0])

    def measured(models, pairs, **options):
        values = {"psnr_pooled": next(scores), "n": {"psnr_pooled": 1}}
        return {"n": 1, "edit_threshold": 0.0, "identity": values, "model": values, "images": []}, []

    monkeypatch.setattr("autoretouch_jax.training.validation.evaluate", measured)
    assert loop.run(validated, tmp_path / "run") == 0
    assert [row["best"] for row in rows(tmp_path / "run")] == [True, True, False]
    assert step_of(tmp_path / "run" / "model-best") == 4
    told = [json.loads(line)["text"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert "The best validation so far: psnr_pooled ∞." in told
    assert "∞" in (tmp_path / "run" / "report.html").read_text()


def edited_validation(config, **values):
    import dataclasses

    return dataclasses.replace(config.data.validation, **values)


def test_processes_share_a_validation_and_agree_with_one(validated, tmp_path, monkeypatch):
    """Three images over two processes: the last round does not divide. Each process measures its own share."""
    assert loop.run(edited(validated, train={"steps": 2}), tmp_path / "run") == 0
    model = {"model": load_model(tmp_path / "run")}
    pairs, alone = open_validation(validated.data)
    whole, _ = evaluation.evaluate(model, pairs, alone=alone)

    def as_process(number, others):
        sent = []

        def gather(name, text, timeout):
            sent.append(text)
            return [text, others[len(sent) - 1]] if number == 0 else ["[]", text]  # images 0 and 2, and image 1

        monkeypatch.setattr(processes, "index", lambda: number)
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "gather", gather)
        return evaluation.evaluate(model, pairs, alone=alone)[0], sent

    second, sent = as_process(1, [])
    assert second["n"] == 1
    shared, _ = as_process(0, sent)
    assert shared["n"] == 3
    assert shared == whole


def test_clean_faces_get_the_same_blemishes_every_time(face_folder):
    data = DataConfig(validation=ValidationConfig(root=str(face_folder), images=2))
    first, second = (open_validation(data)[0] for _ in range(2))
    assert len(first) == 2
    assert first.names == [first.source.names[0], first.source.names[3]], "evenly spaced"
    for a, b in zip((first[0], first[1]), (second[0], second[1]), strict=True):
        np.testing.assert_array_equal(a.images["source"], b.images["source"])
        assert (a.images["source"] != a.images["target"]).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "a"}, "one of them and in full"),
        ({"root": "a", "records": "b"}, "one of them and in full"),
        ({"patience": 3}, "nothing to validate on"),
        ({"root": "faces"}, "the same folder"),
        ({"alone": "a"}, "alone_identical"),
        ({"root": "a", "metric": "alone_identical"}, "needs photographs"),
        ({"every": 0}, "at least 1"),
    ],
)
def test_an_impossible_validation_is_refused(given, message):
    with pytest.raises(Refused, match=message):
        validate(Config(data=DataConfig(root="faces", validation=ValidationConfig(**given))))


def test_a_missing_folder_is_refused_before_anything_is_written(validated, tmp_path):
    lost = edited(validated, data={"validation": edited_validation(validated, alone=str(tmp_path / "nowhere"))})
    with pytest.raises(Refused, match="nowhere"):
        loop.run(lost, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the journal ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_said_once_and_ends_nothing(validated, tmp_path, monkeypatch, capsys):
    """A full disk, or a folder without access: files for people are lost, the run is not."""
    real = Journal.softly

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    for where in (
        "log.MetricsLog.write",
        "journal.write_report",
        "publish.report.save_picture",
        "journal.pictures.save_preview",
    ):
        monkeypatch.setattr(f"autoretouch_jax.training.{where}", full)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert real is Journal.softly
    assert loop.run(validated, tmp_path / "run") == 0
    said = capsys.readouterr().err
    for name in ("metrics.jsonl", "events.jsonl", "validation.jsonl", "report.html", "samples", "validation"):
        assert said.count(f"{name} could not be written") == 1, name
    assert said.count("tensorboard") >= 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_waiting_for_data_counts_only_while_the_device_stands_still():
    """Known times: the host waited 9 s for each batch, the device was busy for all of it but 2 s."""
    from concurrent.futures import Future

    window = Window()
    started = time.perf_counter()
    done: Future[float] = Future()
    done.set_result(started + 8.0)
    window.add_step(started + 1.0, started + 10.0, done)
    window._started = time.perf_counter() - 20.0
    assert window.close(1, {"loss": np.float32(1)})["input_wait_share"] == pytest.approx(0.1, abs=0.01)


# ---- verdicts ---------------------------------------------------------------------------------------------------------------

HEALTHY = {
    "edit/left": 0.5, "edit/drawn": 1.0, "edit/outside": 0.1, "loss/pixel": 0.5, "loss/pixel_identity": 1.0,
    "accuracy/real": 0.8, "accuracy/fake": 0.7, "share/adversarial": 0.3, "share/pixel": 0.7, "input_wait_share": 0.01,
    "guard/skipped": 0.0, "learning_rate": 2e-4,
}  # fmt: skip


def lines(**changes):
    return [{"step": step, **HEALTHY, **changes} for step in range(50, 4001, 50)]


def test_a_healthy_run_is_called_healthy():
    (verdict,) = judge(lines(), [], Config())
    assert verdict.level == "good"
    assert "50% of the edit is made" in verdict.text
    assert judge(lines()[:4], [], Config())[0].text.startswith("It is too early")
    assert "Without a validation" in verdict.text
    assert judge([], [], Config()) == []


def test_a_short_run_is_judged_at_its_end():
    idle = [line for line in lines(**{"edit/left": 1.0, "edit/outside": 0.0}) if line["step"] <= 400]
    config = Config(train=TrainConfig(steps=400))
    assert judge(idle[:4], [], config)[0].text.startswith("It is too early")
    assert "The generator does nothing yet" in judge(idle, [], config)[0].text


def test_a_run_that_went_back_is_named_from_its_first_steps_on():
    verdict = judge(lines(**{"guard/rate": 0.09})[:1], [], Config())[0]
    assert verdict.level == "warning"
    assert "the learning rates by 0.09" in verdict.text
    assert judge(lines(**{"guard/rate": 1.0}), [], Config())[0].level == "good"


@pytest.mark.parametrize(
    ("changes", "words", "remedy"),
    [
        ({"edit/left": 0.995, "edit/outside": 0.01}, "The generator does nothing yet", "--loss.edit-weight"),
        ({"accuracy/real": 0.99, "accuracy/fake": 0.99}, "The discriminator has won for 1,950 steps", "--loss.r1-weight"),
        ({"accuracy/real": 1.0, "accuracy/fake": 0.0}, "calls every patch real", "--optim.discriminator-lr"),
        ({"input_wait_share": 0.5}, "stand still for 50%", "data prepare"),
        ({"share/adversarial": 0.0001}, "it is computed and has no say", "--loss.adversarial-weight"),
        ({"loss/pixel": 3.0}, "3.0 times as far from the target", "rate"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(changes, words, remedy):
    verdict = judge(lines(**changes), [], Config(train=TrainConfig(steps=40_000)))[0]
    assert verdict.level in ("warning", "note")
    assert words in verdict.text
    assert remedy in verdict.text


@pytest.mark.parametrize(
    ("number", "parallel", "advice"),
    [
        (2, {}, "data prepare`."),
        (8, {}, "--parallel.input-processes 8."),
        (64, {}, "--parallel.input-processes 16."),
        (8, {"input_threads": 1}, "--parallel.input-processes 8."),
        (8, {"input_processes": 2}, "--parallel.input-processes 8."),
        (8, {"input_processes": 8}, "data prepare`."),
        (64, {"input_processes": 16}, "--parallel.input-threads above 16."),
    ],
)
def test_input_that_is_too_slow_gets_more_workers_where_there_are_cores(monkeypatch, number, parallel, advice):
    for module in (cores, verdicts):
        monkeypatch.setattr(module, "cores", lambda: number)
    assert judge(lines(input_wait_share=0.5), [], edited(Config(), parallel=parallel))[0].text.endswith(advice)


def test_skips_and_validations_have_their_say():
    counted = lines()
    for number, line in enumerate(counted):
        line["guard/skipped"] = float(5 * number)
    assert "skipped 10.0% of the last updates" in judge(counted, [], Config())[0].text
    worse = [
        {"step": 4000, "metric": "psnr_pooled", "best": True, "model": {"psnr_pooled": 40.0}, "identity": {"psnr_pooled": 43.0}}
    ]
    assert "3.00 dB worse than doing nothing" in judge(lines(), worse, Config())[0].text
    perfect = [dict(worse[0], identity={"psnr_pooled": None, "n": {"psnr_pooled": 1}})]  # nothing is to be edited
    assert "the model is worse than doing nothing" in judge(lines(), perfect, Config())[0].text
    stale = [dict(worse[0], step=100 * n, best=n == 1, model={"psnr_pooled": 45.0}) for n in range(1, 8)]
    assert "No validation has been better than that of step 100 for 6" in judge(lines(), stale, Config())[0].text
