"""The audit as a job: killed and started again, bad files, many pairs, every kind of input, copies and bursts, the summary."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoretouch_jax import cli
from autoretouch_jax.audit import audit, checking, copies, inputs, journal, labels, page, reading, renamed, result
from autoretouch_jax.audit.checks import WARNING, CheckedPair
from autoretouch_jax.data.ffhqr import File
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import BadInput

SIDE = 64
PAIRS = 5


def pair(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a dark spot, and without it."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(40, 216, (8, 8, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    target = np.clip(np.asarray(coarse) + rng.normal(0, 5, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
    source = target.copy()
    source[20:26, 30:34] //= 2
    return source, target


def check(name: str, source: Path, target: Path) -> CheckedPair:
    """Stands for `check_pair`, whose verdicts are not what is tested here."""
    a, b = read_rgb(source), read_rgb(target)
    thumbnail = np.asarray(Image.fromarray(a).resize((64, 64)))
    checked = CheckedPair(name, measures={"mean": a.mean()}, thumbnail=thumbnail, digest=str(zlib.crc32(a.tobytes())))
    if np.array_equal(a, b):
        checked.flag("no_edit", "nothing was retouched", WARNING)
    return checked


@pytest.fixture(autouse=True)
def plain_checks(monkeypatch) -> None:
    monkeypatch.setattr(checking, "check_pair", check)


def save(image: np.ndarray, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Five sound pairs in two folders."""
    home = tmp_path_factory.mktemp("run")
    for number in range(PAIRS):
        for side, image in zip("ab", pair(number), strict=True):
            save(image, home / side / f"IMG_{number}.png")
    return home


def command(home: Path, out: Path, *more: str) -> list[str]:
    paths = [str(home / "a"), str(home / "b"), "--json", str(out), "--html", str(out.with_suffix(".html"))]
    return ["data", "audit", *paths, "--labels", "False", "--workers", "1", *more]


def checked_names(monkeypatch) -> list[str]:
    """The names that are checked from here on, as they are."""
    names, check_pair = [], checking.check_pair
    monkeypatch.setattr(checking, "check_pair", lambda name, *files: names.append(name) or check_pair(name, *files))
    return names


# ---- stopped and started again ----------------------------------------------------------------------------------------------


def test_a_stopped_audit_goes_on_and_ends_with_the_same_result(folders, tmp_path, monkeypatch):
    assert cli.main(command(folders, tmp_path / "whole.json")) == 0
    check_pair, out = checking.check_pair, tmp_path / "audit.json"

    def stop_at_third(name, *files):
        if name == "IMG_3":
            raise KeyboardInterrupt
        return check_pair(name, *files)

    with monkeypatch.context() as patch:
        patch.setattr(checking, "check_pair", stop_at_third)
        assert cli.main(command(folders, out)) == 130
    part = tmp_path / "audit.json.part"
    assert not out.exists()
    # As if the process had been killed while it wrote.
    part.write_bytes(part.read_bytes() + b'["pair", "IMG_3", "cut')
    names = checked_names(monkeypatch)
    assert cli.main(command(folders, out)) == 0
    # The worker may have checked the pair after it before the main thread saw the failure.
    assert {"IMG_3"} <= set(names) <= {"IMG_3", "IMG_4"}
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert not part.exists()


def test_a_failure_does_not_lose_what_was_ready_with_it(monkeypatch):
    wait = checking.concurrent.futures.wait

    def check(name, pair):
        if name == "bad":
            raise KeyboardInterrupt
        return {"name": name}

    monkeypatch.setattr(checking, "check", check)
    # As if the main thread had slept until all were done.
    monkeypatch.setattr(checking.concurrent.futures, "wait", lambda running, return_when: wait(running))
    results = {}
    with pytest.raises(KeyboardInterrupt):
        results.update(checking._results(dict.fromkeys(["bad", "x", "y", "z"]), 2))
    assert set(results) == {"x", "y", "z"}


def test_a_pair_that_changed_meanwhile_is_checked_again(folders, tmp_path, monkeypatch):
    pairs = {"IMG_0": inputs.FilePair(*(File(folders / side / "IMG_0.png") for side in "ab"))}
    kept = journal.Journal(tmp_path / "x.part", ["a"])
    checking.check_all(pairs, kept.section("pair", lambda name: "before"), 1)
    names = checked_names(monkeypatch)
    again = journal.Journal(tmp_path / "x.part", ["a"])
    checking.check_all(pairs, again.section("pair", lambda name: "before"), 1)
    assert names == []
    again = journal.Journal(tmp_path / "x.part", ["a"])
    checking.check_all(pairs, again.section("pair", lambda name: "after"), 1)
    assert names == ["IMG_0"]


def test_a_files_stamp_changes_with_the_file_and_with_its_place_in_a_tar_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    before = inputs.file_stamp(File(path))
    os.utime(path, ns=(1, 1))
    assert inputs.file_stamp(File(path)) != before
    assert inputs.file_stamp(File(path, "x", 512, 3)) != inputs.file_stamp(File(path, "x", 1024, 3))
    assert "No such file" in inputs.file_stamp(File(tmp_path / "gone"))


@pytest.mark.parametrize("cut", [1, 2])  # bytes of the last line: its end, and its bracket
def test_the_journal_keeps_whole_lines_only_and_belongs_to_one_audit(tmp_path, capsys, cut):
    path = tmp_path / "a.part"
    section = journal.Journal(path, ["a"]).section("pair", str)
    section["x"], section["y"] = 1, 23
    path.write_bytes(path.read_bytes()[:-cut])
    section = journal.Journal(path, ["a"]).section("pair", str)
    assert (section.get("x"), section.get("y")) == (1, None)
    section["z"] = 3
    assert journal.Journal(path, ["a"]).section("pair", str).get("z") == 3
    assert journal.Journal(path, ["a"]).section("spots", str).get("z") is None
    assert capsys.readouterr().err == ""
    assert journal.Journal(path, ["b"]).section("pair", str).get("z") is None
    assert "of another audit" in capsys.readouterr().err
    nothing = journal.Journal(None, [])
    nothing.section("pair", str)["x"] = 1
    nothing.remove()


def test_killed_with_its_workers_it_goes_on(tmp_path, monkeypatch):
    """SIGKILL reaches only the main process. Its workers must end by themselves."""
    home, out = tmp_path, tmp_path / "audit.json"
    for number in range(checking.FEWEST_FOR_PROCESSES):
        for side, image in zip("ab", pair(number % 3), strict=True):
            save(np.roll(image, number, 1), home / side / f"{number}.png")
    words = command(home, out, "--workers", "2")
    process = subprocess.Popen([sys.executable, "-m", "autoretouch_jax.cli", *words], start_new_session=True)
    part = tmp_path / "audit.json.part"
    while not part.exists() or part.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlives the audit"
        time.sleep(0.05)
    before = part.read_bytes().count(b"\n") - 1
    names = checked_names(monkeypatch)
    monkeypatch.setattr(checking, "FEWEST_FOR_PROCESSES", 1000)
    cli.main(words)
    assert len(names) <= checking.FEWEST_FOR_PROCESSES - before
    assert len(json.loads(out.read_text())["pairs"]) == 64


def group_is_alive(number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, 0)
        return True
    return False


# ---- one bad file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad\nAVIF"), Image.DecompressionBombError("too large")])
def test_whatever_a_check_raises_is_the_pairs_fault(folders, tmp_path, monkeypatch, error):
    check_pair = checking.check_pair

    def fail(name, *files):
        if name == "IMG_2":
            raise error
        return check_pair(name, *files)

    monkeypatch.setattr(checking, "check_pair", fail)
    assert cli.main(command(folders, tmp_path / "audit.json")) == 1
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["counts"] == {"unreadable": 1}
    (reason,) = found["pairs"]["IMG_2"]["reasons"]
    assert type(error).__name__ in reason["message"]
    assert "IMG_2.png" in reason["message"]
    assert found["pairs"]["IMG_2"]["weight"] == 0


class Fatal(inputs.FilePair):
    """A pair that takes down the process that reads it, as a decoder's fault or the lack of memory do."""

    @contextlib.contextmanager
    def files(self):
        os._exit(9)
        yield


def test_a_pair_that_kills_its_process_is_flagged_and_the_others_are_checked(folders, monkeypatch):
    monkeypatch.setattr(checking, "FEWEST_FOR_PROCESSES", 2)
    files = [File(folders / side / "IMG_0.png") for side in "ab"]
    pairs = {"a": inputs.FilePair(*files), "b": Fatal(*files), "c": inputs.FilePair(*files)}
    checked = checking.check_all(pairs, journal.Journal(None, []).section("pair", str), 2)
    assert list(checked) == ["a", "b", "c"]
    assert not any(reason.code == "unreadable" for name in "ac" for reason in checked[name].reasons)
    assert "process that read it died" in checked["b"].reasons[0].message


def test_large_pairs_wait_for_one_another_and_small_ones_do_not():
    shares = checking._Shares(threading, 2)
    inside, most, lock = [], [], threading.Lock()

    def hold(pixels: float) -> None:
        for _ in range(20):
            with shares.of(int(pixels)):
                with lock:
                    inside.append(pixels)
                    most.append(sum(inside))
                time.sleep(0.0005)
                with lock:
                    inside.remove(pixels)

    threads = [threading.Thread(target=hold, args=(pixels,)) for pixels in (1, 24e6, 100e6, 100e6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert max(most) == 100e6  # one at a time
    assert 24e6 + 1 in most


# ---- reduced scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (161, 161), (90, 60)])
def test_photographs_are_read_at_a_reduced_scale_whatever_their_format(size, tmp_path):
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    image = np.clip(np.stack([x, y, 80 + 40 * np.sin(x / 9 + y / 14)], -1), 0, 255).astype(np.uint8)
    save(image, tmp_path / "a.png")
    save(image, tmp_path / "a.jpg", quality=98, subsampling=0)
    (png, reduced), (jpeg, also) = (reading.read_reduced(tmp_path / name, 100) for name in ("a.png", "a.jpg"))
    assert png.shape == jpeg.shape
    assert max(png.shape) == min(100, max(size))
    assert reduced == also == max(1, max(size) / 100)
    assert np.abs(png.astype(int) - jpeg).mean() < 2
    # The middle of the picture stays in the middle.
    middle = image[size[1] // 2, size[0] // 2, :2].astype(int)
    assert np.abs(png[png.shape[0] // 2, png.shape[1] // 2, :2] - middle).max() < 4


def test_a_turned_jpeg_is_read_upright_at_a_reduced_scale(tmp_path):
    image = np.zeros((120, 200, 3), np.uint8)
    image[:60] = 200
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, clockwise
    save(image, tmp_path / "a.jpg", exif=exif)
    upright, _ = reading.read_reduced(tmp_path / "a.jpg", 100)
    assert upright.shape == (100, 60, 3)
    assert upright[:, 40:].mean() > 190 > 10 > upright[:, :20].mean()


def test_a_lossy_pair_read_at_little_reduction_differs_in_the_edit_alone(tmp_path):
    rng = np.random.default_rng(0)
    image = np.clip(faces.draw_face(1, 192) + rng.normal(0, 6, (192, 192, 1)), 0, 255).astype(np.uint8)
    save(image, tmp_path / "a.jpg", quality=92)
    edited = np.asarray(Image.open(tmp_path / "a.jpg")).copy()
    edited[80:96, 80:96] = np.clip(edited[80:96, 80:96] + 40.0, 0, 255).astype(np.uint8)
    save(edited, tmp_path / "b.jpg", quality=90)
    for longest, factor in ((192, 1.0), (150, 1.28)):
        (a, b), reduced = reading.read_reduced_pair(tmp_path / "a.jpg", tmp_path / "b.jpg", longest)
        assert reduced == pytest.approx(factor)
        assert a.shape == b.shape == (longest, longest, 3)
        changed = (a != b).any(-1)
        assert changed[int(86 / factor), int(86 / factor)]
        changed[int(70 / factor) : int(106 / factor), int(70 / factor) : int(106 / factor)] = False
        assert changed.mean() < 0.01
    (a, b), reduced = reading.read_reduced_pair(tmp_path / "a.jpg", tmp_path / "b.jpg", 96)
    assert (a.shape, reduced) == ((96, 96, 3), 2.0)


def test_working_ahead_keeps_the_order_and_a_damaged_file_is_bad_input(tmp_path):
    assert list(reading.ahead(range(9), lambda number: number**2)) == [(number, number**2) for number in range(9)]
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    with pytest.raises(BadInput, match=r"a.jpg: cannot be decoded"):
        reading.read_reduced(tmp_path / "a.jpg")


# ---- copies, bursts, renamed files ------------------------------------------------------------------------------------------


def some_pair(name: str, image: np.ndarray) -> CheckedPair:
    return CheckedPair(name, thumbnail=copies.small(image), digest=str(hash(image.tobytes())))


def codes(pair: CheckedPair) -> list[str]:
    return [reason.code for reason in pair.reasons]


def test_copies_likenesses_and_leaks_are_told_apart_and_grouped():
    image = [faces.draw_face(number, SIDE) for number in range(4)]
    brighter = np.clip(image[0].astype(int) + 2, 0, 255).astype(np.uint8)
    pairs = [
        some_pair("test/a", image[1]),
        some_pair("train/a", image[0]),
        some_pair("train/b", brighter),
        some_pair("train/c", image[0]),
        some_pair("train/d", image[1]),
        some_pair("train/e", image[2]),
        some_pair("validation/a", image[2]),
        CheckedPair("unreadable"),
    ]
    groups = copies.flag_copies(pairs)
    by_name = {pair.name: codes(pair) for pair in pairs}
    assert by_name == {
        "test/a": ["leak"],
        "train/a": [],
        "train/b": ["near_duplicate"],
        "train/c": ["duplicate", "near_duplicate"],  # a copy of a, and like b
        "train/d": ["leaked"],
        "train/e": ["leaked"],
        "validation/a": ["leak"],
        "unreadable": [],
    }
    assert groups == {
        "test/a": "test/a", "train/d": "test/a",
        "train/a": "train/a", "train/b": "train/a", "train/c": "train/a",
        "train/e": "train/e", "validation/a": "train/e",
    }  # fmt: skip


def test_blocks_find_the_same_likenesses_as_comparing_each_with_each(monkeypatch):
    monkeypatch.setattr(copies, "BLOCK", 7)
    monkeypatch.setattr(copies, "DIFFERENCES", 2)
    rng = np.random.default_rng(0)
    originals = [faces.draw_face(number, SIDE) for number in range(6)]
    images = [
        np.clip(originals[number % 6] + rng.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8) for number in range(20)
    ]
    images.append(np.clip(images[19] // 2, 0, 255))  # the same contours, but much darker
    thumbnails = np.stack([copies.small(image) for image in images])
    found = {(a, int(b)) for a, later in copies._alike(thumbnails, copies.vectors(thumbnails)) for b in later}
    assert found == {(a, b) for a, b in itertools.combinations(range(20), 2) if a % 6 == b % 6}


def test_frames_of_a_burst_are_one_group_and_other_photographs_are_not():
    frames = {"IMG_9": 0, "IMG_10": 1, "IMG_11": 2}  # the face moves by a pixel from frame to frame
    pairs = [some_pair(f"day/{name}", np.roll(faces.draw_face(0, SIDE), moved, 1)) for name, moved in frames.items()]
    pairs += [some_pair(f"day/IMG_{number}", faces.draw_face(number, SIDE)) for number in (12, 13)]
    groups = copies.flag_copies(sorted(pairs, key=lambda pair: pair.name))
    assert set(groups) == {f"day/{name}" for name in frames}
    assert len(set(groups.values())) == 1
    assert sorted(["a10", "a9", "b1"], key=copies._by_numbers) == ["a9", "a10", "b1"]


def test_a_renamed_file_gets_the_most_similar_one_of_the_other_side(tmp_path):
    unpaired = []
    for number in range(3):
        source, target = pair(number)
        for role, image in (("source", source), ("target", target)):
            if (role, number) != ("target", 2):
                path = tmp_path / role / f"{role}{number}.jpg"
                save(image, path, quality=95)
                unpaired.append(inputs.UnpairedFile(File(path), "unpaired", role, f"only in {role}"))
    (tmp_path / "damaged.jpg").write_bytes(b"x")
    unpaired.append(inputs.UnpairedFile(File(tmp_path / "damaged.jpg"), "unpaired", "target", "only in target"))
    kept = journal.Journal(tmp_path / "a.part", [])
    messages = {Path(str(item.file)).stem: item.message for item in renamed.explain(unpaired, kept)}
    for number in range(2):
        assert f"target{number}.jpg: renamed?" in messages[f"source{number}"]
        assert f"source{number}.jpg: renamed?" in messages[f"target{number}"]
    assert messages["source2"] == "only in source"
    assert messages["damaged"] == "only in target"
    again = renamed.explain(unpaired, journal.Journal(tmp_path / "a.part", []))
    assert {item.message for item in again} == set(messages.values())


# ---- inputs -----------------------------------------------------------------------------------------------------------------


def audited(tmp_path: Path, *words: str) -> dict:
    out = tmp_path / "audit.json"
    cli.main(["data", "audit", *words, "--labels", "False", "--json", str(out), "--html", str(tmp_path / "audit.html")])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """Pairs of which one is not retouched and one is a copy."""
    home = tmp_path_factory.mktemp("faulty")
    for number, shown in enumerate([0, 1, 0, 2]):
        source, target = pair(shown)
        save(source, home / "a" / f"{number}.png")
        save(source if number == 3 else target, home / "b" / f"{number}.png")
    return home


@pytest.mark.parametrize("kind", ["tar", "records", "tfds"])
def test_data_sets_are_audited_like_folders(faulty, tmp_path, kind):
    sides = [str(faulty / "a"), str(faulty / "b")]
    folder = audited(tmp_path, *sides)
    assert folder["counts"] == {"duplicate": 1, "no_edit": 1}
    if kind == "tar":
        words = [f"{tmp_path}/{side}.tar" for side in "ab"]
        for side, path in zip(sides, words, strict=True):
            with tarfile.open(path, "w") as archive:
                archive.add(side, ".")
    elif kind == "records":
        assert cli.main(["data", "prepare", *sides, "--out", str(tmp_path / "records"), "--workers", "1"]) == 0
        words = ["--records", str(tmp_path / "records")]
    else:
        shares = ["--validation", "0", "--test", "0", "--license", "CC0"]
        assert cli.main(["data", "build", "retouch_pairs", *sides, "--out", str(tmp_path), *shares]) == 0
        words = ["--tfds", str(tmp_path / "retouch_pairs" / "1.0.0")]
    found = audited(tmp_path, *words)
    assert found["pairs"] == folder["pairs"]
    assert (tmp_path / "audit.html").read_text().count("data:image/jpeg") == 6


def test_a_fault_in_a_tar_file_is_named_by_its_place_there(tmp_path):
    for side in "ab":
        for number in range(2):
            save(pair(number)[side == "b"], tmp_path / side / f"{number}.png")
    path = tmp_path / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "b", "photos")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "photos")
    found = audited(tmp_path, str(tmp_path / "a.tar"), str(tmp_path / "b.tar"))
    (reason,) = found["pairs"]["photos/1"]["reasons"]
    assert reason["code"] == "unreadable"
    assert f"{tmp_path}/b.tar/photos/1.png" in reason["message"]


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "--records", "r"], ["--records", "r", "--tfds", "t"]])
def test_one_kind_of_input_is_needed(words, capsys):
    assert cli.main(["data", "audit", *words]) == 2
    assert "give two folders" in capsys.readouterr().err


# ---- spots on a sample, the result ------------------------------------------------------------------------------------------


def test_spots_are_looked_for_on_a_sample_that_is_spread_evenly():
    names = [str(number) for number in range(10)]
    assert audit._evenly(names, 4) == ["0", "3", "6", "9"]
    assert audit._evenly(names, 0) == audit._evenly(names, 10) == names


def test_only_the_sample_is_judged_and_the_summary_says_so(folders, tmp_path, monkeypatch, capsys):
    finding = {"score": 0.6, "left": 3, "removed": 2, "left_spots": [(40.0, 50.0, 3.0)]}
    monkeypatch.setattr(labels, "find", lambda names, read, params, spots: {name: finding for name in names if read(name)})
    words = command(folders, tmp_path / "audit.json", "--labels", "True", "--labels-sample", "2")
    assert cli.main(words) == 1
    pairs = json.loads((tmp_path / "audit.json").read_text())["pairs"]
    assert [name for name in pairs if "left_share" in pairs[name]["measures"]] == ["IMG_0", "IMG_4"]
    assert "in 2 of 5 comparable pairs" in capsys.readouterr().out


def of_codes(*codes: str) -> result.Audited:
    checked = {}
    for number, code in enumerate(codes):
        checked[str(number)] = CheckedPair(str(number))
        checked[str(number)].flag(code, f"is {code}")
    return result.Audited("a", "b", checked, [], {"0": "0", "1": "0"})


def test_the_summary_begins_with_the_most_common_reason_and_names_a_few_pairs():
    content = of_codes("size", *["tone"] * 20).content()
    lines = result.summary(content).splitlines()
    assert lines[:3] == ["21 pairs, 21 flagged", "      20  tone", "       1  size"]
    assert lines[3] == "1: is tone"
    assert lines[-2:] == ["… and 8 more: tone", "0: is size"]
    assert content["pairs"]["1"]["group"] == "0"
    assert "group" not in content["pairs"]["2"]


def test_exchanged_folders_are_named_once():
    content = of_codes("swapped", "swapped", "size").content()
    text = result.summary(content)
    assert text.count("seem to be exchanged") == 1
    assert "is swapped" not in text
    assert "is size" in text
    gone = inputs.FilePair(File(Path("gone")), File(Path("gone")))
    assert "seem to be exchanged" in page.render(content, dict.fromkeys("012", gone))
    few = of_codes("swapped", "size", "size").content()
    assert "is swapped" in result.summary(few)
    assert few["remarks"] == []


def test_learning_keeps_crops_and_no_photographs():
    """A crop that is a view keeps its whole photograph in memory: 3 GB for 300 pairs."""
    photographs: list[weakref.ref] = []
    alive = []

    def read(name):
        alive.append(sum(photograph() is not None for photograph in photographs))
        source = np.random.default_rng(int(name)).integers(0, 255, (128, 128, 3), np.uint8)
        target = source.copy()
        target[40:50, 40:50] = 0
        photographs.extend(weakref.ref(image) for image in (source, target))
        return (source, target), 1.0

    images, _ = labels._crops([str(number) for number in range(30)], read)
    assert len(images) == 30 * 2 * labels.CROPS_PER_PAIR
    assert max(alive) <= 2 * (reading.AHEAD + reading.THREADS + 2)
