"""From the audit to a trained model: what it found unsound stops nothing, and is never opened. Also splits and changed data."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import edited
from PIL import ExifTags, Image

from autoretouch_jax import cli
from autoretouch_jax.config import DataConfig
from autoretouch_jax.data import ffhqr, folders, prepare
from autoretouch_jax.data.audit_file import read_audit
from autoretouch_jax.data.ffhqr import folder_splits
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.groups import groups
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.data.negatives import Negatives
from autoretouch_jax.data.opening import open_source
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.data.sources import whole
from autoretouch_jax.errors import Refused
from autoretouch_jax.training import loop, resuming
from autoretouch_jax.training.manifest import Manifest, read_manifest, take_manifest

SOUND = ["nested/face0", "nested/face1", "nested/face2"]


@pytest.fixture
def faulty(pair_folders) -> tuple[Path, Path]:
    """Three sound pairs of 96², a small one, and one of every fault that ends a training without an audit."""
    source, target = pair_folders
    for root, name in ((source, "lost.png"), (target, "found.png"), (target, "nested/face1.webp")):
        shutil.copy(source / "nested" / "face1.png", root / name)
    for name in ("cut", "narrow", "deep", "empty", "text", "veiled", "small", "jpeg"):
        for root in (source, target):
            shutil.copy(root / "nested" / "face3.png", root / f"{name}.png")
    for root in (source, target):
        (root / "nested" / "face3.png").unlink()
        Image.open(root / "small.png").crop((40, 40, 64, 64)).save(root / "small.png")
    (target / "cut.png").write_bytes((target / "cut.png").read_bytes()[:-500])
    Image.open(target / "narrow.png").crop((0, 0, 90, 96)).save(target / "narrow.png")
    Image.fromarray(np.zeros((96, 96), np.uint16)).save(target / "deep.png")
    (source / "empty.png").write_bytes(b"")
    (target / "text.png").write_text("to be retouched")
    veiled = Image.open(target / "veiled.png")
    veiled.putpixel((3, 3), (0, 0, 0, 9))
    veiled.save(target / "veiled.png")
    Image.open(target / "jpeg.png").convert("RGB").save(target / "jpeg.jpg", quality=90)
    (target / "jpeg.png").unlink()
    return source, target


def write_audit(path: Path, roots: tuple, weights: dict[str, float], unpaired: tuple = (), **more) -> Path:
    """The file that `data audit --json` writes, as far as other verbs read it."""
    pairs = {name: {"weight": weight, "flagged": weight < 1} for name, weight in weights.items()}
    for name, group in more.items():
        pairs[name]["group"] = group
    files = [{"file": str(file), "code": "unpaired", "message": ""} for file in unpaired]
    path.write_text(json.dumps({"source": str(roots[0]), "target": str(roots[1]), "unpaired": files, "pairs": pairs}))
    return path


@pytest.fixture
def judged(faulty, tmp_path) -> tuple[Path, Path, Path]:
    """The faulty folders and an audit of them, written by hand."""
    source, target = faulty
    zero = dict.fromkeys(("cut", "narrow", "deep", "empty", "text", "veiled", "jpeg"), 0.0)
    unpaired = (source / "lost.png", target / "found.png", target / "nested" / "face1.webp")
    weights = dict.fromkeys(SOUND, 1.0) | {"small": 1.0, "nested/face1": 0.5} | zero
    return source, target, write_audit(tmp_path / "audit.json", faulty, weights, unpaired)


def of_folders(source: Path, target: Path, audit: Path | None = None, crop: int = 32) -> DataConfig:
    return DataConfig(source=str(source), target=str(target), crop=crop, audit=audit and str(audit))


# ---- audit → prepare → verify → train ---------------------------------------------------------------------------------------


def test_what_an_audit_has_seen_is_prepared_verified_and_trained_on(faulty, tmp_path, small_config, capsys):
    """The chain of docs/data.md, on a folder with every fault."""
    roots, audit, page = [str(root) for root in faulty], str(tmp_path / "audit.json"), str(tmp_path / "audit.html")
    assert cli.main(["data", "audit", *roots, "--json", audit, "--html", page, "--labels", "False"]) == 1
    assert cli.main(["data", "prepare", *roots, "--out", str(tmp_path / "r"), "--audit", audit]) == 0
    assert cli.main(["data", "verify", str(tmp_path / "r")]) == 0
    forms = {
        "records": {"records": str(tmp_path / "r")},
        "both": {"records": str(tmp_path / "r"), "audit": audit},
        "folders": {"source": roots[0], "target": roots[1], "audit": audit},
    }
    for name, data in forms.items():
        capsys.readouterr()
        assert loop.run(edited(small_config, data={"root": None} | data), tmp_path / name, until=2) == 0
        manifest = read_manifest(tmp_path / name)
        assert set(SOUND) <= set(manifest.data) <= {*SOUND, "jpeg"}, "how much a JPEG is worth is for the audit to say"
        assert "left out 1 pairs smaller than --data.crop 32: small" in capsys.readouterr().err


def test_what_weighs_nothing_is_never_opened(judged, monkeypatch):
    opened, mark = [], folders._mark
    for name in ("read_header", "read_rgb"):
        real = getattr(folders, name)
        monkeypatch.setattr(folders, name, lambda path, real=real: (opened.append(path), real(path))[1])
    monkeypatch.setattr(folders, "_mark", lambda path: (opened.append(path), mark(path))[1])
    source = open_source(of_folders(*judged))
    assert source.names == SOUND
    assert take_manifest(source, None).weights == {"nested/face1": 0.5}
    assert [source[i].weight for i in range(3)] == [1.0, 0.5, 1.0]
    assert {path.stem for path in opened} == {"face0", "face1", "face2", "small"}
    assert {path.suffix for path in opened} == {".png"}


def test_without_an_audit_the_refusal_names_the_way_out(faulty, capsys, tmp_path):
    with pytest.raises(Refused, match=r"do not pair up|same name"):
        PairSource(*faulty)
    with pytest.raises(Refused, match=r"`autoretouch data audit`, then --data.audit audit.json"):
        open_source(of_folders(*faulty))
    assert cli.main(["data", "prepare", *map(str, faulty), "--out", str(tmp_path / "r")]) == 2
    assert "then --audit audit.json" in capsys.readouterr().err


def test_what_the_audit_does_not_know_is_checked_and_counts_one(judged, capsys):
    source, target, _ = judged
    for root in (source, target):
        shutil.copy(root / "nested" / "face0.png", root / "later.png")
    assert open_source(of_folders(*judged)).names == ["later", *SOUND]
    assert "does not know 1 of 12 pairs, which count 1 (later); audit again" in capsys.readouterr().err
    (target / "later.png").unlink()
    with pytest.raises(Refused, match=r"later \(only in source\), which --data.audit .*audit.json does not report"):
        open_source(of_folders(*judged))
    shutil.move(source / "later.png", source / "nested" / "face0.bmp")
    with pytest.raises(Refused, match=r"face0.bmp and .*face0.png have the same name"):
        open_source(of_folders(*judged))
    (source / "nested" / "face0.bmp").unlink()
    (target / "nested" / "face2.png").unlink()
    with pytest.raises(Refused, match=r"face2 \(only in source\)"):
        open_source(of_folders(*judged))


def test_a_fault_that_was_mended_since_the_audit_needs_no_other_audit(judged):
    source, target, _ = judged
    shutil.copy(source / "lost.png", target / "lost.png")
    (source / "cut.png").unlink()  # of weight 0
    (target / "nested" / "face1.png").unlink()  # its second file takes its place
    assert open_source(of_folders(*judged)).names == ["lost", *SOUND]


def test_an_audit_of_other_folders_is_told_from_one_that_moved(judged, tmp_path, capsys, monkeypatch):
    source, target, audit = judged
    with pytest.raises(Refused, match="exchange the two"):
        open_source(of_folders(target, source, audit))
    copies = [Path(shutil.copytree(root, tmp_path / "elsewhere" / root.name)) for root in (source, target)]
    assert open_source(of_folders(*copies, audit)).names == SOUND
    assert f"was made of {source} and {target}; its weights go to the pairs of the same names" in capsys.readouterr().err
    for root in (source, target):
        shutil.rmtree(root)
    assert open_source(of_folders(*copies, audit)).names == SOUND
    assert "was made of" not in capsys.readouterr().err, "the folders have moved"
    # Relative paths count from where the audit ran: here, the folder of its file.
    content = json.loads(audit.read_text())
    relative = {"source": "source", "target": "target", "unpaired": [{"file": "source/lost.png"}]}
    (tmp_path / "elsewhere" / "audit.json").write_text(json.dumps(content | relative))
    found = read_audit(tmp_path / "elsewhere" / "audit.json", "--audit")
    assert found.check(list(found.weights), tuple(copies)) == []
    assert len(found.check([*found.weights, "new"], tuple(copies))) == 1, "only the new pair is worth a warning"
    assert found.unpaired == (frozenset({"lost.png"}), frozenset())


@pytest.mark.parametrize("weight", ["NaN", "-1", '"heavy"', "null"])
def test_weights_that_are_none_are_refused(tmp_path, weight):
    (tmp_path / "audit.json").write_text(f'{{"pairs": {{"a": {{"weight": {weight}}}}}}}')
    with pytest.raises(Refused, match=r"--audit .*not what `autoretouch data audit --json` writes"):
        read_audit(tmp_path / "audit.json", "--audit")


def test_an_audit_that_leaves_nothing_is_refused(judged):
    audit = judged[2]
    with pytest.raises(Refused, match=r"--data.crop 112 is larger than every pair"):
        open_source(of_folders(*judged, crop=112))
    assert open_source(of_folders(*judged, crop=96)).smallest == (Path("nested/face0"), 96, 96)
    content = json.loads(audit.read_text())
    for pair in content["pairs"].values():
        pair["weight"] = 0
    audit.write_text(json.dumps(content))
    with pytest.raises(Refused, match="gives every pair the weight 0"):
        open_source(of_folders(*judged))


def test_records_keep_the_weights_and_a_newer_audit_takes_precedence(judged, tmp_path, capsys):
    source, target, audit = judged
    command = ["data", "prepare", str(source), str(target), "--out", str(tmp_path / "r")]
    assert cli.main([*command, "--audit", str(audit), "--on-bad", "fail"]) == 0
    made = RecordSource(tmp_path / "r")
    assert (made.names, made.weights) == ([*SOUND, "small"], {"nested/face1": 0.5})
    data = DataConfig(records=str(tmp_path / "r"), crop=32)
    opened = open_source(data)
    assert (opened.names, [opened[i].weight for i in range(3)]) == (SOUND, [1.0, 0.5, 1.0])
    newer = write_audit(tmp_path / "newer.json", (source, target), {"nested/face0": 0.0, "nested/face1": 0.75})
    opened = open_source(dataclasses.replace(data, audit=str(newer)))
    assert {name: opened[i].weight for i, name in enumerate(opened.names)} == {"nested/face1": 0.75, "nested/face2": 1.0}
    other = write_audit(tmp_path / "other.json", ("a", "b"), {"other": 1.0})
    with pytest.raises(Refused, match="knows none"):
        open_source(dataclasses.replace(data, audit=str(other)))


def test_a_tfds_data_set_is_built_and_prepared_without_what_is_unsound(judged, tmp_path, capsys, monkeypatch):
    source, target, audit = judged
    build = ["data", "build", "retouch_pairs", str(source), str(target), "--out", str(tmp_path), "--test", "0"]
    assert cli.main([*build, "--validation", "0"]) == 2
    assert "then --audit audit.json" in capsys.readouterr().err
    assert cli.main([*build, "--validation", "0", "--audit", str(audit)]) == 0
    folder, one = tmp_path / "retouch_pairs" / "1.0.0", ["--workers", "1"]
    left = write_audit(tmp_path / "less.json", ("a", "b"), {"nested/face0": 0.0, "nested/face1": 0.5})
    monkeypatch.setattr(prepare, "SHARD_PIXELS", 1)  # a pair in each shard
    assert cli.main(["data", "prepare", "--tfds", str(folder), "--out", str(tmp_path / "r"), "--audit", str(left), *one]) == 0
    assert len(RecordSource(tmp_path / "r").shards) == 3
    assert "does not know 2 of 4 pairs" in capsys.readouterr().err
    made = RecordSource(tmp_path / "r")
    assert made.names == ["nested/face1", "nested/face2", "small"]
    np.testing.assert_array_equal(whole(made[1])["source"], read_rgb(source / "nested" / "face2.png"))
    opened = open_source(DataConfig(tfds=str(folder), crop=32, audit=str(left)))
    assert opened.names == ["nested/face1", "nested/face2"]
    assert len(set(opened.marks())) == 1
    ffhq = ["data", "build", "ffhqr", str(source), str(target), "--out", str(tmp_path), "--audit", str(audit)]
    assert cli.main(ffhq) == 2


# ---- splits -----------------------------------------------------------------------------------------------------------------


def save(path: Path, taken: str = "") -> None:
    """A tiny photograph, with the time at which it was taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    Image.new("RGB", (16, 16)).save(path, exif=exif)


def grouped(folder: Path, alike: dict[str, str] | None = None) -> set[frozenset[str]]:
    """The groups of the photographs of a folder, as sets of names."""
    of_each = groups(dict(ffhqr.image_files(folder)), alike or {})
    return {frozenset(name for name, key in of_each.items() if key == one) for one in of_each.values()}


def test_a_burst_is_a_group_by_time_or_else_by_the_cameras_counter(tmp_path):
    times = {"IMG_0009": "10:00:00", "IMG_0010": "10:00:50", "IMG_0011": "10:01:40", "IMG_0012": "10:03:00"}
    for name, time in times.items():
        save(tmp_path / "a" / f"{name}.jpg", f"2024:01:31 {time}")
    assert grouped(tmp_path / "a") == {frozenset({"IMG_0009", "IMG_0010", "IMG_0011"}), frozenset({"IMG_0012"})}
    names = ("IMG_0001", "IMG_0009", "IMG_0010", "DSC_0001", "00012", "00013", "face1", "face2")
    for name in (*names, "PXL_20240131_120503", "PXL_20240131_120559", "PXL_20240131_120603"):
        save(tmp_path / "b" / f"{name}.png")
    minute = frozenset({"PXL_20240131_120503", "PXL_20240131_120559"})
    alone = [frozenset({name}) for name in (*names[2:], "PXL_20240131_120603")]
    assert grouped(tmp_path / "b") == {frozenset({"IMG_0001", "IMG_0009"}), minute, *alone}


def test_folders_stay_whole_and_what_is_alike_joins_them(tmp_path):
    for name in ("ann/1", "ann/2", "bob/1", "bob/2", "cid/1", "IMG_0001", "IMG_0002", "IMG_0011"):
        save(tmp_path / f"{name}.png")
    ann, bob, cid = frozenset({"ann/1", "ann/2"}), frozenset({"bob/1", "bob/2"}), frozenset({"cid/1"})
    loose = {frozenset({"IMG_0001", "IMG_0002"}), frozenset({"IMG_0011"})}
    assert grouped(tmp_path) == {ann, bob, cid, *loose}
    assert grouped(tmp_path, {"ann/2": "ann/2", "bob/1": "ann/2"}) == {ann | bob, cid, *loose}
    # The pair that a group is named after may have been left out.
    assert grouped(tmp_path, {"cid/1": "gone", "IMG_0001": "gone", "bob/1": "cid/1"}) == {
        ann, bob | cid | {"IMG_0001", "IMG_0002"}, frozenset({"IMG_0011"})
    }  # fmt: skip
    shutil.copytree(tmp_path / "ann", tmp_path / "all" / "ann")
    assert grouped(tmp_path / "all") == {frozenset({"ann/1"}), frozenset({"ann/2"})}, "one folder says nothing"


def test_no_group_is_in_two_splits_and_more_pairs_move_none(tmp_path, capsys):
    names = [f"person{person}/{number}" for person in range(40) for number in range(3)]
    for side in ("a", "b"):
        for name in names:
            save(tmp_path / side / f"{name}.png")
    roots = tmp_path / "a", tmp_path / "b"
    splits = folder_splits(*roots, 0.2, 0.2)
    folder_of = {split: {name.split("/")[0] for name, *_ in pairs} for split, pairs in splits.items()}
    assert sum(map(len, folder_of.values())) == 40
    assert all(len(those) >= 4 for those in folder_of.values())
    audit = read_audit(write_audit(tmp_path / "x.json", roots, {}), "--audit")
    with pytest.raises(Refused, match="knows none"):
        folder_splits(*roots, 0.2, 0.2, audit)
    alike = dict.fromkeys(names[::3], names[0])
    weights = dict.fromkeys(names, 1.0)
    audit = read_audit(write_audit(tmp_path / "x.json", roots, weights, **alike), "--audit")
    assert len(folder_splits(*roots, 0.2, 0.0, audit)["train"]) == 120
    assert "the split validation is empty: 120 pairs make only 1 group(s)" in capsys.readouterr().err
    for root in roots:
        save(root / "person40" / "0.png")
    for split, pairs in folder_splits(*roots, 0.2, 0.2).items():
        assert {name for name, *_ in pairs} - {"person40/0"} == {name for name, *_ in splits[split]}


# ---- changed data -----------------------------------------------------------------------------------------------------------


def test_what_has_changed_since_the_last_start_is_named(judged, tmp_path):
    source, target, audit = judged
    photos = Path(shutil.copytree(source / "nested", tmp_path / "photos"))

    def now() -> tuple:
        data = dataclasses.replace(of_folders(*judged), negatives=str(photos), negative_share=0.5)
        opened = open_source(data)
        return opened, take_manifest(opened, Negatives(data))

    opened, before = now()
    resuming.write_data(tmp_path, opened, before, None)
    assert read_manifest(tmp_path) == before
    assert len(json.dumps(before.digest)) < 50, "the clock of a checkpoint stays small"
    assert resuming.check_data(tmp_path, opened, now()[1], {}, [], accept=False) == []
    content = json.loads(audit.read_text())
    content["pairs"]["nested/face0"]["weight"] = 0.25
    content["pairs"]["nested/face1"]["weight"] = 0.0
    content["pairs"]["new"] = {"weight": 1.0}
    audit.write_text(json.dumps(content))
    for root in (source, target):
        shutil.copy(root / "nested" / "face0.png", root / "new.png")
    image = Image.open(target / "nested" / "face2.png")
    image.putpixel((50, 50), (0, 0, 0, 255))
    image.save(target / "nested" / "face2.png")
    (photos / "face0.png").unlink()
    opened, changed = now()
    with pytest.raises(Refused) as refusal:
        resuming.check_data(tmp_path, opened, changed, {"data": before.digest}, [], accept=False)
    for part in (
        "added 1 (new); removed 1 (nested/face1); changed 1 (nested/face2)",
        "weighted otherwise 1 (nested/face0 1 to 0.25)",
        "negatives removed 1 (face0)",
        "--data.on-change accept",
    ):
        assert part in str(refusal.value)
    assert "another run" in resuming.check_data(tmp_path, opened, changed, {}, [], accept=True)[0]
    assert resuming.check_data(tmp_path, opened, changed, {"data": changed.digest}, [], accept=False) == []


def test_records_are_known_by_their_pixels_and_not_by_their_shards(pair_folders, tmp_path):
    command = ["data", "prepare", *map(str, pair_folders), "--workers", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "a")]) == 0
    before = take_manifest(RecordSource(tmp_path / "a"), None)
    for root in pair_folders:
        (root / "nested" / "face0.png").unlink()
    Image.open(pair_folders[0] / "nested" / "face1.png").rotate(180).save(pair_folders[0] / "nested" / "face1.png")
    assert cli.main([*command, str(tmp_path / "b")]) == 0
    after = take_manifest(RecordSource(tmp_path / "b"), None)
    assert before.changes_to(after) == "removed 1 (nested/face0); changed 1 (nested/face1)"
    # An index of an earlier version has no digests of pairs: the shard's counts for all in it.
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    del index["digests"]
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    marks = RecordSource(tmp_path / "a").marks()
    assert len(set(marks)) == 4
    assert all(mark.startswith(index["shards"][0]["sha256"]) for mark in marks)


def test_another_order_is_another_data_set_and_a_source_of_ones_own_has_names_at_least(tmp_path):
    forward, backward = (Manifest(dict.fromkeys(names, ""), {}, {}) for names in ("ab", "ba"))
    assert forward.digest != backward.digest
    assert forward.changes_to(backward) == "the order of the examples"

    class Own(list):
        names = ("x", "y")

    assert take_manifest(Own([1, 2]), None).data == {"x": "", "y": ""}
    (tmp_path / "manifest.json").write_text('{"format": 0}')
    assert read_manifest(tmp_path) is None


def test_many_files_are_read_by_threads_in_their_order(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.png")
    files = sorted(tmp_path.iterdir())
    one_by_one = folders._marks(files)
    monkeypatch.setattr(folders, "MANY", 2)
    assert folders._marks(files) == one_by_one
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"!")
    assert [a == b for a, b in zip(folders._marks(files), one_by_one, strict=True)] == [False, True, True]
    save(files[0])
    assert [header.width for header in folders._checked_headers(files)] == [16] * 3
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(Refused, match=r"b\.png"):
        folders._checked_headers(files)
