"""`autoretouch retouch` and the Python object: any job, any kind of image, one bad file, stops, masks, reports."""

import hashlib
import io
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_use import random_model

from autoretouch_jax import Retoucher, cli
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.inference import ahead, compare, job, listing
from autoretouch_jax.inference.edit import Edit
from autoretouch_jax.models.folder import save_model
from autoretouch_jax.runtime import storage

FACE = faces.draw_face(0, 48)[:40]  # 40 × 48 pixels


@pytest.fixture(scope="module")
def retoucher() -> Retoucher:
    """Its model changes every pixel, and looks for no faces."""
    return Retoucher(random_model())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "model", random_model(), 3)
    return str(folder)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Photographs in a tree, with other files among them."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("IMG_1.jpg", "day1/IMG_1.png", "day1/IMG_2.jpg", "day2/IMG_1.tif")):
        save(folder / name, seed=number)
    (folder / "notes.txt").write_text("mind the light")
    (folder / "day1" / "IMG_1.cr2").write_bytes(b"raw")
    (folder / "day1" / "._IMG_1.jpg").write_bytes(b"hidden")
    return folder


def save(path: Path, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The seed is in the pixels: no two photographs are alike.
    image = np.roll(FACE, seed, axis=0)
    Image.fromarray(image).save(path, **options)
    return path


def retouch(model: str, *words: object) -> int:
    return cli.main(["retouch", *map(str, words), "--model", model])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- which photographs, and where they go ------------------------------------------------------------------------------------


def names(*inputs: Path, out: Path = Path("out"), others: tuple[Path, ...] = ()) -> list[str]:
    return [item.destination.as_posix() for item in listing.list_photographs(inputs, out, others).items]


def test_a_folder_keeps_its_tree_and_several_lie_side_by_side(photos, tmp_path):
    own = ["out/IMG_1.jpg", "out/day1/IMG_1.png", "out/day1/IMG_2.jpg", "out/day2/IMG_1.tif"]
    assert names(photos) == own
    assert names(photos, photos / "notes.txt") == [*own, "out/notes.txt"], "what is given by name is tried"
    assert names(photos / "day1", photos / "day2") == ["out/day1/IMG_1.png", "out/day1/IMG_2.jpg", "out/day2/IMG_1.tif"]
    assert names(photos / "day1" / "IMG_2.jpg") == ["out/IMG_2.jpg"]
    for person in ("anna", "ben"):
        save(tmp_path / person / "DCIM" / "IMG_1.jpg")
    two = names(tmp_path / "anna" / "DCIM", tmp_path / "ben" / "DCIM")
    assert two == ["out/anna/DCIM/IMG_1.jpg", "out/ben/DCIM/IMG_1.jpg"]
    assert names(photos, photos, photos / "IMG_1.jpg", photos / "day1" / "..") == own, "given twice, retouched once"


def test_what_is_left_out_is_named_with_the_reason(photos):
    os.mkfifo(photos / "pipe.jpg")
    (photos / "gone.jpg").symlink_to(photos / "nothing.jpg")
    (photos / "day2" / "up").symlink_to(photos)
    found = listing.list_photographs([photos], Path("out"))
    skipped = {path.name: reason for path, reason in found.skipped}
    expected = {"notes.txt": "another ending", "IMG_1.cr2": "another ending", "._IMG_1.jpg": "hidden"}
    assert skipped == {**expected, "pipe.jpg": "no regular file"}
    assert "gone.jpg" in [item.name for item in found.items], "a link that leads nowhere is a photograph that cannot be read"
    assert len(found.items) == 5, "and a link to a folder above is not followed"


def test_a_job_takes_none_of_its_own_results(photos):
    before = names(photos, out=photos / "done")
    save(photos / "done" / "IMG_1.jpg")
    save(photos / "masks" / "IMG_1.png")
    assert names(photos, out=photos / "done", others=(photos / "masks",)) == before


@pytest.mark.parametrize(
    ("inputs", "out", "message"),
    [
        (["photos"], "photos", "would overwrite itself"),
        (["photos/day1/IMG_2.jpg"], "photos/day1", "would overwrite itself"),
        (["photos/day1", "photos"], ".", "would overwrite"),
        (["photos/IMG_1.jpg", "other/IMG_1.jpg"], "out", "give their folders instead"),
        (["photos/day3"], "out", "no such file"),
        (["empty"], "out", "the folders given hold none"),
        ([], "out", "name photographs"),
        (["run"], "out", "--model run"),
    ],
)
def test_a_listing_that_would_do_harm_is_refused(photos, monkeypatch, inputs, out, message):
    monkeypatch.chdir(photos.parent)
    save(Path("other/IMG_1.jpg"), seed=9)
    Path("empty").mkdir()
    Path("run/model").mkdir(parents=True)
    Path("run/model/model.json").write_text("{}")
    with pytest.raises(Refused, match=message):
        names(*map(Path, inputs), out=Path(out))


def test_an_original_is_not_replaced_through_a_link(photos, tmp_path):
    (tmp_path / "out").symlink_to(photos)
    with pytest.raises(Refused, match="would overwrite itself"):
        names(photos, out=tmp_path / "out")


def test_photographs_of_models_are_no_model(tmp_path):
    save(tmp_path / "shoot" / "model" / "IMG_1.jpg")
    assert names(tmp_path / "shoot") == ["out/model/IMG_1.jpg"]


@pytest.mark.parametrize(("photographs", "parts"), [(10, 3), (2, 5), (64, 64), (0, 2), (7, 1)])
def test_shards_are_disjoint_and_even(photographs, parts):
    shards = [listing.part(range(photographs), listing.parse_shard(f"{i}/{parts}")) for i in range(1, parts + 1)]
    assert sorted(number for shard in shards for number in shard) == list(range(photographs))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(Refused, match="3/64"):
        listing.parse_shard(text)


# ---- the command ------------------------------------------------------------------------------------------------------------


def test_folders_come_back_as_they_were_and_a_second_run_changes_nothing(photos, model, capsys):
    originals, out = tree(photos), photos / "retouched"
    assert retouch(model, photos, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 photo(s) written" in printed
    assert "skipped 2 file(s), another ending: IMG_1.cr2, notes.txt" in printed
    assert "skipped 1 file(s), hidden: ._IMG_1.jpg" in printed
    first = tree(out)
    assert set(first) == {"IMG_1.jpg", "day1/IMG_1.png", "day1/IMG_2.jpg", "day2/IMG_1.tif"}
    assert all(first[name] != originals[name] for name in first)
    assert retouch(model, photos, "--out", out) == 0
    assert tree(out) == first
    assert {name: data for name, data in tree(photos).items() if not name.startswith("retouched/")} == originals


def broken_photographs(folder: Path) -> list[str]:
    """Files that cannot be retouched, each for another reason."""
    whole = save(folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    damaged = {
        "empty.jpg": b"",
        "cut.png": whole[: len(whole) // 2],
        "text.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "psd.tif": b"8BPS\0\1" + bytes(64),
        "flipped.png": whole[:100] + bytes([whole[100] ^ 255]) + whole[101:],
    }
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    return sorted(damaged)


def test_bad_files_are_named_and_a_killed_job_is_completed(tmp_path, model, capsys):
    folder, report = tmp_path / "photos", tmp_path / "report.jsonl"
    for number in range(19):
        save(folder / f"{number:02}.png", seed=number)
    bad = broken_photographs(folder)
    assert retouch(model, folder, "--out", tmp_path / "undisturbed") == 1
    errors = capsys.readouterr().err
    assert all(name in errors for name in bad)
    assert errors.count("left out: ") == len(bad) == 5
    undisturbed = tree(tmp_path / "undisturbed")
    assert len(undisturbed) == 19

    # What a SIGKILL leaves: some results, a part of another one, and a report whose last line is cut.
    out = tmp_path / "out"
    assert retouch(model, folder, "--out", out, "--report", report) == 1
    for number in range(8, 19):
        (out / f"{number:02}.png").unlink()
    (out / "08.png.0123abcd.part").write_bytes(b"half")
    lines = [line for line in report.read_text().splitlines(True) if "08.png" not in line]
    report.write_text("".join(lines) + lines[0][:20])
    kept = (out / "03.png").stat().st_mtime_ns
    capsys.readouterr()
    assert retouch(model, folder, "--out", out, "--report", report, "--skip-existing") == 1
    assert "11 of 24 photo(s) written to" in (printed := capsys.readouterr().out)
    assert "8 were there" in printed
    assert tree(out) == undisturbed
    assert (out / "03.png").stat().st_mtime_ns == kept, "what was there is not written again"
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(Path(record["source"]).name for record in records) == sorted(path.name for path in folder.iterdir())
    assert {Path(record["source"]).name for record in records if record["status"] == "failed"} == set(bad)
    for record in records:
        assert set(record) == {"source", "destination", "status", "faces", "changed", "seconds", "reason"}
        assert (record["status"] == "retouched") == bool(record["changed"])
        assert Path(record["source"]).name in record["reason"] or record["status"] == "retouched"


@pytest.mark.parametrize("error", [MemoryError(), KeyError("PSD"), ValueError("first\nsecond"), Refused("install the extra")])
def test_any_exception_is_that_of_one_photograph(photos, model, monkeypatch, capsys, error):
    real = Retoucher.photograph

    def photograph(self, photo, *rest):
        if photo.format == "TIFF":
            raise error
        return real(self, photo, *rest)

    monkeypatch.setattr(Retoucher, "photograph", photograph)
    assert retouch(model, photos, "--out", photos / "out") == 1
    assert f"left out: {photos / 'day2' / 'IMG_1.tif'}: " in (printed := capsys.readouterr()).err
    assert "second" not in printed.err
    assert "3 of 4" in printed.out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_leaves_whole_files_and_the_rest_is_done_later(tmp_path, model, monkeypatch, capsys, number, status):
    for seed in range(30):
        save(tmp_path / "photos" / f"{seed:02}.png", seed=seed)
    words = (tmp_path / "photos", "--out", tmp_path / "out")
    calls, real = [], Retoucher.photograph

    def photograph(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return real(self, *arguments)

    monkeypatch.setattr(Retoucher, "photograph", photograph)
    assert retouch(model, *words) == status
    assert "--skip-existing" in capsys.readouterr().err
    written = tree(tmp_path / "out")
    assert len(written) < 30
    assert retouch(model, *words, "--skip-existing") == 0
    done = tree(tmp_path / "out")
    assert set(done) == {f"{seed:02}.png" for seed in range(30)}
    assert all(done[name] == data for name, data in written.items())


def test_shards_together_are_the_whole_job(photos, model, tmp_path, capsys):
    assert retouch(model, photos, "--out", tmp_path / "whole") == 0
    for number in (1, 2, 3):
        assert retouch(model, photos, "--out", tmp_path / "parts", "--shard", f"{number}/3") == 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert capsys.readouterr().out.count("notes.txt") == 2, "what is left out is named by one shard"
    assert retouch(model, photos, "--out", tmp_path / "parts", "--shard", "9/64") == 0


def test_the_picture_shows_before_after_and_change(photos, model, tmp_path):
    assert retouch(model, photos, "--out", tmp_path / "out", "--compare", tmp_path / "compare") == 0
    (tmp_path / "compare" / "IMG_1.jpg.0123abcd.part").write_bytes(b"half")
    assert retouch(model, photos, "--out", tmp_path / "out", "--compare", tmp_path / "compare", "--skip-existing") == 0
    assert set(tree(tmp_path / "compare")) == {"IMG_1.jpg", "day1/IMG_1.png.jpg", "day1/IMG_2.jpg", "day2/IMG_1.tif.jpg"}
    with Image.open(tmp_path / "compare" / "day1" / "IMG_1.png.jpg") as picture:
        shown = np.asarray(picture).astype(int)
    assert shown.shape == (40, 3 * 48, 3)
    after = np.asarray(Image.open(tmp_path / "out" / "day1" / "IMG_1.png")).astype(int)
    assert np.abs(shown[:, 48:96] - after).mean() < 5  # the codec, on noise


def test_metadata_stay_or_go_as_the_flag_says(tmp_path, model):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", 6
    photo = save(tmp_path / "a.jpg", exif=exif, quality=90)
    for metadata, maker in (("keep", "Camera"), ("safe", "Camera"), ("none", None)):
        for strength in ("0", "1"):
            out = tmp_path / metadata / strength
            assert retouch(model, photo, "--out", out, "--metadata", metadata, "--strength", strength) == 0
            with Image.open(out / "a.jpg") as result, Image.open(photo) as before:
                assert result.getexif().get(0x010F) == maker
                assert result.getexif()[0x0112] == 6, "without it the photograph would lie on its side"
                assert (result.tobytes() == before.tobytes()) == (strength == "0")


def test_a_picture_is_scaled_down_and_shows_nothing_where_nothing_changed():
    seen, change = np.full((20, 3200, 3), 99, np.uint8), np.zeros((20, 3200, 3), np.int16)
    change[:, :1600] = 4
    picture = compare.side_by_side(seen, change)
    assert picture.shape == (10, 3 * 1600, 3)
    assert (picture[0, [100, 1700, 2500, 3300, 4700]] == [[99] * 3, [103] * 3, [99] * 3, [160] * 3, [128] * 3]).all()


def test_a_job_without_memory_for_two_does_one_at_a_time(photos, model, monkeypatch):
    at_once, most, lock, real = [0], [0], threading.Lock(), Retoucher.photograph

    def photograph(self, *arguments):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        result = real(self, *arguments)
        with lock:
            at_once[0] -= 1
        return result

    monkeypatch.setattr(Retoucher, "photograph", photograph)
    monkeypatch.setattr(job, "PIXELS_AT_ONCE", 1000)  # each photograph has 1920
    assert retouch(model, photos, "--out", photos / "out") == 0
    assert most == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--strength", "1.6"], "--strength 1.6"), (["--shard", "4/3"], "--shard 4/3"), (["--mask", "none"], "--mask none"),
     (["--report", "notes.txt/report"], "--report notes.txt/report"), (["--compare", "notes.txt"], "notes.txt")],
)  # fmt: skip
def test_a_job_is_refused_before_a_photograph_is_written(photos, model, monkeypatch, capsys, words, message):
    monkeypatch.chdir(photos)
    assert retouch(model, ".", "--out", "out", *words) == 2
    assert message in capsys.readouterr().err
    assert tree(photos / "out") == {}


# ---- masks ------------------------------------------------------------------------------------------------------------------


def half_mask(path: Path, mode: str = "L") -> Path:
    """White on the left."""
    mask = np.zeros((40, 48), np.uint8)
    mask[:, :24] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_only_what_is_white_in_the_mask_changes(tmp_path, model, mode):
    photo, mask = save(tmp_path / "a.png"), half_mask(tmp_path / "mask.png", mode)
    assert retouch(model, photo, "--out", tmp_path / "out", "--mask", mask) == 0
    changed = (np.asarray(Image.open(tmp_path / "out" / "a.png")) != FACE).any(-1)
    assert changed[:, :24].mean() > 0.5
    assert not changed[:, 24:].any()
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(mask)
    assert retouch(model, photo, "--out", tmp_path / "out", "--mask", mask) == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == photo.read_bytes()


def test_a_folder_of_masks_is_laid_out_as_the_results(photos, model, tmp_path, capsys):
    masks = tmp_path / "masks"
    for name in ("IMG_1", "day1/IMG_1"):
        half_mask(masks / f"{name}.png")
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(masks / "day1" / "IMG_2.png")
    assert retouch(model, photos, "--out", tmp_path / "out", "--mask", masks) == 1
    errors = capsys.readouterr().err
    assert "day1/IMG_2.png: the mask has 9×9 pixels and the photograph 48×40" in errors
    assert "day2/IMG_1.tif: has no mask" in errors
    assert set(tree(tmp_path / "out")) == {"IMG_1.jpg", "day1/IMG_1.png"}
    changed = np.asarray(Image.open(tmp_path / "out/day1/IMG_1.png")) != np.asarray(Image.open(photos / "day1/IMG_1.png"))
    assert not changed[:, 24:].any()
    assert retouch(model, photos / "day1" / "IMG_2.jpg", "--out", tmp_path / "out2", "--mask", masks) == 2
    assert "holds no mask for any of the photographs; name one IMG_2.png there" in capsys.readouterr().err


# ---- Python: arrays ---------------------------------------------------------------------------------------------------------


ARRAYS = {
    "RGB": FACE,
    "RGBA": np.dstack([FACE, np.full(FACE.shape[:2], 7, np.uint8)]),
    "grey": FACE[..., 1],
    "grey and a channel axis": FACE[..., 1:2],
    "16 bits": FACE.astype(np.uint16) * 257 + np.arange(48, dtype=np.uint16)[:, None],
    "16 bits, grey": FACE[..., 1].astype(np.uint16) * 257,
    "float32": FACE.astype(np.float32) / 255,
    "float64, RGBA": np.dstack([FACE / 255, np.full(FACE.shape[:2], 0.3)]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_comes_back_as_the_kind_that_it_was(retoucher, kind):
    image = ARRAYS[kind]
    given = image.copy()
    mask = np.zeros(FACE.shape[:2], bool)
    mask[:, :24] = True
    result = retoucher(image, mask=mask)
    np.testing.assert_array_equal(image, given, "what was given is not written to")
    assert (result.dtype, result.shape) == (image.dtype, image.shape)
    np.testing.assert_array_equal(result[:, 24:], image[:, 24:])
    assert (result[:, :24] != image[:, :24]).mean() > 0.4
    if image.ndim == 3 and image.shape[-1] == 4:
        np.testing.assert_array_equal(result[..., 3], image[..., 3])
    np.testing.assert_array_equal(retoucher(image, strength=0.0), image)
    # The same edit, whatever the depth.
    if image.ndim == 3 and image.shape[-1] >= 3:
        levels = result[..., :3].astype(float) / {"uint8": 1, "uint16": 257}.get(image.dtype.name, 1 / 255)
        np.testing.assert_allclose(levels, retoucher(FACE, mask=mask), atol=1)


def test_a_grey_array_changes_as_its_grey_picture_does(retoucher):
    grey = retoucher(FACE[..., 1])
    colours = retoucher(np.repeat(FACE[..., 1:2], 3, -1))
    np.testing.assert_allclose(grey, np.asarray(Image.fromarray(colours).convert("L")), atol=1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FACE.astype(np.float32), "outside .0, 1."),
        (np.full((4, 4, 3), np.nan), "outside .0, 1."),
        (FACE.astype(np.int32), "int32 .40, 48, 3."),
        (FACE[None], "uint8 .1, 40, 48, 3."),
        (np.zeros((4, 4, 5), np.uint8), "1 to 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), "uint8 .0, 4, 3."),
        (FACE.tolist(), "is a list"),
        (Image.fromarray(FACE).convert("HSV"), "HSV"),
    ],
    ids=["levels", "NaN", "int32", "a batch", "5 channels", "empty", "a list", "HSV"],
)
def test_an_image_of_another_kind_is_named(retoucher, image, message):
    with pytest.raises(BadInput, match=message):
        retoucher(image)


def test_a_word_or_a_mask_that_does_not_fit_is_named(retoucher):
    for arguments in ({"strength": 1.51}, {"strength": float("nan")}, {"faces": "some"}):
        with pytest.raises(Refused, match="must be"):
            retoucher(FACE, **arguments)
    for mask in (np.ones((40, 47)), np.full((40, 48), 2.0), np.ones((40, 48), int)):
        with pytest.raises(BadInput, match="mask"):
            retoucher(FACE, mask=mask)


def test_more_strength_is_more_change(retoucher, monkeypatch):
    change = np.full(FACE.shape, 20, np.int16)
    monkeypatch.setattr(Retoucher, "edit", lambda *_: Edit(change, None, None))
    grey = np.full(FACE.shape, 100, np.uint8)
    for strength in (0.0, 0.5, 1.0, 1.5):
        assert (retoucher(grey, strength) == 100 + 20 * strength).all()


# ---- Python: pictures and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16", "CMYK"])
def test_a_picture_comes_back_as_the_kind_that_it_was(retoucher, mode):
    image = Image.fromarray(ARRAYS["16 bits, grey"]) if mode == "I;16" else Image.fromarray(FACE).convert(mode)
    image.info["dpi"] = (300, 300)
    result = retoucher(image)
    assert result.mode == ("RGB" if mode == "P" else mode)
    assert (result.size, result.info["dpi"]) == (image.size, (300, 300))
    assert result.tobytes() != image.convert(result.mode).tobytes()
    if mode == "RGB":
        np.testing.assert_array_equal(np.asarray(result), retoucher(FACE))


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_picture_keeps_its_orientation_and_profile(retoucher, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", exif=exif, icc_profile=profile)
    mask = np.zeros(FACE.shape[:2] if orientation < 5 else FACE.shape[1::-1], bool)
    mask[:5] = True  # the upper rows, as they are seen
    with Image.open(path) as image:
        result = retoucher(image, mask=mask)
        upright = np.asarray(image)
    assert result.info["icc_profile"] == profile
    assert result.getexif()[0x0112] == orientation
    changed = (np.asarray(result) != upright).any(-1)
    upper = {1: np.s_[:5], 3: np.s_[-5:], 6: np.s_[:, :5], 7: np.s_[:, -5:]}[orientation]
    assert changed[upper].any()
    changed[upper] = False
    assert not changed.any()


def test_a_path_gives_the_file(retoucher, tmp_path, model):
    path = save(tmp_path / "a.jpg", quality=90, dpi=(300, 300))
    assert retouch(model, path, "--out", tmp_path / "out", "--strength", "1.2") == 0
    assert retoucher(path, strength=1.2) == (tmp_path / "out" / "a.jpg").read_bytes(), "the command's"
    assert retoucher(str(path), strength=0.0) == path.read_bytes()
    with pytest.raises(FileNotFoundError):
        retoucher(tmp_path / "b.jpg")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadInput, match=r"a\.jpg"):
        retoucher(path)


# ---- Python: many -----------------------------------------------------------------------------------------------------------


def test_four_threads_get_what_one_gets(retoucher):
    images = [np.roll(FACE, seed, axis=0) for seed in range(12)]
    expected = [retoucher(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(expected, pool.map(retoucher, images), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_batch_may_hold_different_kinds(retoucher, tmp_path):
    path = save(tmp_path / "a.png")
    array, picture, data = retoucher.batch([FACE, Image.fromarray(FACE), path])
    np.testing.assert_array_equal(array, np.asarray(picture))
    with Image.open(io.BytesIO(data)) as file:
        np.testing.assert_array_equal(array, np.asarray(file))
    assert retoucher.batch([]) == []


def test_a_stream_is_lazy_ordered_and_bounded(retoucher):
    taken = []

    def images():
        for seed in range(100):
            taken.append(seed)
            yield np.roll(FACE, seed, axis=0)

    stream = retoucher.stream(images(), strength=0.0)
    assert not taken
    for seed in range(3):
        np.testing.assert_array_equal(next(stream), np.roll(FACE, seed, axis=0))
    assert len(taken) <= 3 + ahead.LOOK_AHEAD * ahead.threads() + 1
    stream.close()
    with pytest.raises(Refused):
        retoucher.stream([], strength=9)


def test_an_error_comes_in_its_turn(retoucher):
    stream = retoucher.stream([FACE, FACE.astype(int), FACE])
    assert next(stream).shape == FACE.shape
    with pytest.raises(BadInput, match="int64"):
        next(stream)
    assert list(stream) == []


def test_room_is_given_in_turn_and_given_back():
    room, order = ahead.Room(10), []

    def take(units, name):
        with room.taken(units):
            order.append(name)

    with room.taken(9):
        large = threading.Thread(target=take, args=(99, "large"), daemon=True)  # more than there is: all of it
        large.start()
        while not room._turn.locked():
            time.sleep(0.001)
        small = threading.Thread(target=take, args=(1, "small"), daemon=True)
        small.start()
        assert order == [], "a small one does not overtake a large one, which would wait for ever"
    for thread in (large, small):
        thread.join(5)
    assert order == ["large", "small"]
    with room.taken(None):
        pass


# ---- Python: models ---------------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_its_sha256(model):
    weights = Path(model) / "model" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert Retoucher.load(model, sha256=digest.upper()).model.config == random_model().config
    with pytest.raises(Refused, match=rf"model.safetensors: SHA-256 {digest}, expected 00"):
        Retoucher.load(model, sha256="00" * 32)


def test_only_parts_of_these_files_are_removed(tmp_path):
    for name in ("a.png.0123abcd.part", "b.png.0123abcd.part", "a.png.part", "a.png"):
        (tmp_path / name).write_bytes(b"x")
    storage.remove_parts([tmp_path / "a.png", tmp_path / "nowhere" / "c.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.png.part", "b.png.0123abcd.part"]
