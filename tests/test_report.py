"""The report of a run, its trackers, and the comparison of runs, on work directories that no training has written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_run import VERDICT, lines, write_run
from PIL import Image

from autoretouch_jax import cli
from autoretouch_jax.evaluation.report import save_preview
from autoretouch_jax.training import history
from autoretouch_jax.training.curves import Curve, chart, thin
from autoretouch_jax.training.report import health, write_report
from autoretouch_jax.training.trackers import Trackers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = write_run(tmp_path_factory.mktemp("runs") / "portraits")
    write_report(workdir)
    return workdir


def page(workdir) -> str:
    write_report(workdir)
    return (workdir / "report.html").read_text()


# ---- the page ---------------------------------------------------------------------------------------------------------------


def test_a_long_run_is_one_small_file_that_asks_for_nothing(run):
    text = (run / "report.html").read_text()
    assert len(text.encode()) < 8_000_000
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?!data:)[a-z+]*:?//|url\(|@import|<link|<script src""", text)
    assert max(len(points.split()) for points in re.findall(r'points="([^"]*)"', text)) <= 400
    pictures = json.loads(re.search(r"const pictures = (.*), time = ", text)[1])
    assert len(pictures) == 4
    steps = [step for step, _ in pictures[0]["outputs"]]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (5_000, 100_000)


def test_the_first_screen_says_how_the_run_is(run):
    text = (run / "report.html").read_text()
    start = text[text.index("<body>") : text.index("<h2>Validation</h2>")]
    assert 'class="banner good"' in start
    assert "Healthy" in start
    assert VERDICT in start
    assert "Not yet better" not in start  # a verdict of an earlier step
    assert "100,000" in start
    for heading in ("Validation", "Is it better than doing nothing?", "Do the losses behave?", "Events", "Data licence"):
        assert f"<h2>{heading}</h2>" in text
    assert "CC BY 4.0" in text
    assert "photo_5.jpg" in text
    assert text.index("face_00</td>" if "face_00</td>" in text else "<td>face_00") < text.index("<td>face_01")


@pytest.mark.parametrize(("level", "headline"), [("bad", "Not healthy"), ("warning", "Needs attention"), ("odd", "Healthy")])
def test_the_worst_verdict_decides(tmp_path, level, headline):
    lines(tmp_path / "events.jsonl", [{"step": 5, "kind": "verdict", "text": "a", "level": kind} for kind in ("good", level)])
    expected = "No problem found" if level == "odd" else headline
    assert health(history.read(tmp_path))["headline"] == expected
    assert expected in page(tmp_path)


def test_a_run_that_has_just_begun_is_not_called_sound(tmp_path):
    lines(tmp_path / "events.jsonl", [{"step": 5, "kind": "verdict", "text": "It is too early to tell.", "level": "note"}])
    assert health(history.read(tmp_path))["headline"] == "Too early to tell"


def test_a_run_that_gave_up_is_not_healthy(tmp_path):
    events = [
        {"step": 5, "kind": "verdict", "text": "fine", "level": "good"},
        {"step": 9, "kind": "gave_up", "text": "No way."},
    ]
    lines(tmp_path / "events.jsonl", events)
    assert "Not healthy" in (text := page(tmp_path))
    assert "No way." in text


def test_what_is_missing_or_cut_is_left_out(run, tmp_path):
    assert "No verdict yet" in page(tmp_path)
    workdir = tmp_path / "cut"
    shutil.copytree(run, workdir)
    for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl", "config.json", "model/model.json"):
        content = (workdir / name).read_bytes()
        (workdir / name).write_bytes(content[: len(content) * 2 // 3] + b"\xff")
        assert "Training report" in page(workdir), name
    for picture in (workdir / "validation").rglob("*.webp"):
        picture.write_bytes(picture.read_bytes()[:40])
    assert "const pictures" not in page(workdir)
    (workdir / "metrics.jsonl").write_text('[1]\n{"step": null}\n{"step": "x"}\n7\n')
    (workdir / "validation.jsonl").write_text('{"step": 3, "model": 7, "identity": null, "images": {"a": 1}, "alone": [3]}\n')
    (workdir / "config.json").write_text('{"train": 3}')
    assert "Training report" in page(workdir)


def test_values_that_are_not_finite_break_a_curve(tmp_path):
    values = [1.0, 2.0, None, float("nan"), float("inf"), 3.0, 4.0]
    lines(tmp_path / "metrics.jsonl", [{"step": i, "loss/pixel": value} for i, value in enumerate(values)])
    lines(tmp_path / "validation.jsonl", [{"step": 1, "model": {"psnr_pooled": None}, "identity": {"psnr_pooled": None}}])
    assert history.read(tmp_path).curve("loss/pixel")[2:5] == [(2, None), (3, None), (4, None)]
    drawn = chart("loss", [Curve("model", history.read(tmp_path).curve("loss/pixel"))])
    assert len(drawn["lines"][0]["paths"]) == 2
    assert "nan" not in page(tmp_path).split("<body>")[1].lower().replace("nanosecond", "")


def test_a_resumed_run_repeats_no_step(tmp_path):
    lines(tmp_path / "metrics.jsonl", [{"step": step, "loss/pixel": value} for step, value in ((1, 5), (2, 6), (3, 7), (2, 9))])
    assert history.read(tmp_path).curve("loss/pixel") == [(1, 5), (2, 9), (3, 7)]


def test_thinning_keeps_the_mean_and_the_gaps():
    points = [(float(i), float(i % 7)) for i in range(2000)]
    thinned = thin(points)
    assert len(thinned) <= 400
    assert np.mean([value for _, value in thinned]) == pytest.approx(np.mean([value for _, value in points]))
    assert thin([(0.0, None)] * 1000)[0][1] is None
    assert thin([]) == []
    assert chart("empty", [Curve("a", [(0.0, None)])]) is None
    assert chart("flat", [Curve("a", [(3.0, 0.0)])], log=True)["lines"][0]["dots"]


def test_a_preview_is_small_and_keeps_its_shape(tmp_path):
    save_preview(tmp_path / "a.webp", np.zeros((400, 800, 3), np.uint8))
    save_preview(tmp_path / "b.webp", np.zeros((40, 30, 3), np.uint8))
    with Image.open(tmp_path / "a.webp") as large, Image.open(tmp_path / "b.webp") as small:
        assert (large.format, large.size, small.size) == ("WEBP", (320, 160), (30, 40))


PROBE = """<script>
const image = document.querySelector("img[data-shows=output]"), source = document.querySelector("img[data-shows=source]");
const stack = document.querySelector(".wipe"), found = {errors: window.faults}, slide = (slider, value) => {
  slider.value = value; slider.dispatchEvent(new Event("input")); };
const border = () => getComputedStyle(stack.querySelectorAll("img")[1]).clipPath;
found.last = document.getElementById("step").textContent;
found.decoded = source.src.startsWith("data:image/webp");
const before = [image.src, border()];
slide(document.getElementById("time"), 0);
slide(document.querySelector(".wiper"), 20);
found.first = document.getElementById("step").textContent;
found.shown = image.src !== before[0];
found.border = [before[1], border()];
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 20}));
found.readout = document.querySelector(".readout").textContent;
found.wide = document.documentElement.scrollWidth > innerWidth;
document.body.innerHTML = "<pre id=probe>" + JSON.stringify(found) + "</pre>";
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_sliders_work_in_a_browser(run, tmp_path, width):
    catch = "<script>window.faults = []; addEventListener('error', event => faults.push(event.message))</script><body>"
    probed = (run / "report.html").read_text().replace("<body>", catch, 1) + PROBE
    (tmp_path / "probe.html").write_text(probed)
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={width},900",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    ended = subprocess.run([*command, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', ended.stdout)[1])
    assert found["errors"] == []
    assert not re.search(r"CONSOLE.*(error|refused|violates)", ended.stderr, re.I)
    assert (found["first"], found["last"]) == ("5,000", "100,000")
    assert found["decoded"]
    assert found["shown"]
    assert found["border"] == ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 20%)"]
    assert found["readout"].startswith("step ")
    assert not found["wide"]  # nothing is wider than the screen


# ---- trackers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings():
    return []


def events(folder) -> list:
    """What TensorBoard would read: the events of all files, in the order of the files' names."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_gets_the_values_and_hides_repeated_steps(tmp_path, warnings):
    first = Trackers(tmp_path, ("tensorboard",), {}, warnings.append, 0)
    first.write(50, {"loss/pixel": 0.25, "loss/mask": None, "psnr": float("nan")})
    first.image("face", 50, np.zeros((8, 8, 3), np.uint8))
    first.close()
    second = Trackers(tmp_path, ("tensorboard",), {}, warnings.append, 40)
    second.write(50, {"loss/pixel": 0.5})
    second.close()
    found = events(tmp_path / "tensorboard")
    values = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
    assert values == [(50, "loss/pixel", 0.25), (50, "face", 0.0), (50, "loss/pixel", 0.5)]
    assert [event.step for event in found if event.HasField("session_log")] == [41]
    assert warnings == []


class Store(type(Path())):
    """A local folder that calls itself an object store."""

    def __str__(self):
        return "s3://bucket" + super().__str__()

    def __fspath__(self):
        return super().__str__()


def test_in_an_object_store_the_event_file_is_uploaded(tmp_path, warnings):
    trackers = Trackers(Store(tmp_path), ("tensorboard",), {}, warnings.append, 0)
    trackers.write(3, {"loss": 1.0})
    trackers.close()
    assert warnings == []
    found = [value.tag for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert found == ["loss"]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, warnings):
    (tmp_path / "tensorboard").write_text("a file is in the way")
    trackers = Trackers(tmp_path, ("tensorboard",), {}, warnings.append, 0)
    assert len(warnings) == 1
    assert str(tmp_path / "tensorboard") in warnings[0]
    for step in range(5):
        trackers.write(step, {"loss": 1.0})
    trackers.close()
    assert len(warnings) == 1


def test_a_disk_that_fills_up_later_is_said_once(tmp_path, warnings, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    trackers = Trackers(tmp_path, ("tensorboard",), {}, warnings.append, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    for step in range(5):
        trackers.write(step, {"loss": 1.0})
    trackers.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert "free space" in warnings[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_once_with_its_install_line(tmp_path, warnings, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails as if it were not installed
    if name == "wandb":
        monkeypatch.setenv("WANDB_API_KEY", "x")
    trackers = Trackers(tmp_path, (name,), {}, warnings.append, 0)
    trackers.write(1, {"loss": 1.0})
    trackers.close()
    assert len(warnings) == 1
    assert f"pip install 'autoretouch-jax[{name}]'" in warnings[0]


def test_an_unknown_tracker_is_said(tmp_path, warnings):
    Trackers(tmp_path, ("clearml",), {}, warnings.append, 0).close()
    assert len(warnings) == 1
    assert "tensorboard, wandb, mlflow" in warnings[0]


def test_a_tracker_that_hangs_stops_nothing(tmp_path, warnings, monkeypatch):
    import threading
    import time

    from autoretouch_jax.training import trackers

    never = threading.Event()
    monkeypatch.setattr(trackers, "_Wandb", lambda *_: never.wait(20))
    monkeypatch.setattr(trackers, "START_TIMEOUT", 0.2)
    started = time.monotonic()
    hanging = Trackers(tmp_path, ("wandb",), {}, warnings.append, 0)
    hanging.write(1, {"loss": 1.0})
    hanging.close()
    never.set()
    assert time.monotonic() - started < 5
    assert len(warnings) == 1
    assert "did not start" in warnings[0]


# ---- compare ----------------------------------------------------------------------------------------------------------------


def test_compare_prints_a_row_for_each_run_and_for_doing_nothing(run, tmp_path, capsys):
    other = write_run(tmp_path / "b", "It is worse than doing nothing.", "bad", faces=0, seed=1)
    bare = tmp_path / "bare"
    bare.mkdir()
    lines(bare / "metrics.jsonl", [{"step": 50, "images_per_s": 12.5, "input_wait_share": 0.4, "loss/pixel": 0.1}])
    assert cli.main(["compare", str(run), str(other), str(bare), "--html", str(tmp_path / "out" / "compare.html")]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "41.20" in rows["doing nothing"]
    assert re.search(r"100,000 +90,000 +44\.67 .* 0\.576 \[0\.53, 0\.63\] .* healthy, finished$", rows["portraits"])
    assert "not healthy" in rows["b"]
    assert re.search(r"50 +– .* 12\.5 +40% +no verdict yet", rows["bare"])
    assert re.search(r"train\.seed +0 +1 +–", out)
    assert "generator.width " in out  # the bare run has no config
    text = (tmp_path / "out" / "compare.html").read_text()
    assert "default-src 'none'" in text
    assert 'aria-label="Pixel loss; portraits from' in text
    assert "Validation: pooled PSNR dB" in text


def test_compare_refuses_what_is_no_run(run, tmp_path, capsys):
    for argv, words in (
        ([str(run), str(tmp_path / "nowhere")], ("nowhere", "--workdir")),
        ([str(run), str(run)], ("twice",)),
        ([], ("RUN",)),
    ):
        assert cli.main(["compare", *argv]) == 2
        message = capsys.readouterr().err
        assert len(message.strip().splitlines()) == 1
        assert all(word in message for word in words), message
