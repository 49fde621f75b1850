"""The audit names every planted fault and flags no clean pair. Training takes what it writes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from autoretouch_jax import cli
from autoretouch_jax.audit import copies, labels
from autoretouch_jax.config import BlemishConfig
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.demo import faces

SIDE = 160
BLEMISHES = BlemishConfig(
    per_megapixel=(500.0, 900.0), radius=(2.0, 6.0), patch=(4.0, 9.0), strength=(0.6, 0.95), clean_share=0.0
)
CLEAN = 8


def made(number: int) -> tuple[np.ndarray, np.ndarray]:
    target = faces.draw_face(number, SIDE)
    return add_blemishes(np.random.default_rng(number), target, BLEMISHES), target


def save(image: np.ndarray, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def jpeg(image: np.ndarray) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, "JPEG", quality=93)
    return np.asarray(Image.open(packed))


def half_way(image: np.ndarray) -> np.ndarray:
    """Moved by half a pixel to the right and below."""
    x = image.astype(np.float32)
    return np.rint((x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, (1, 1), (0, 1))) / 4).astype(np.uint8)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict:
    """The audit of a folder with every fault in it, without the search for spots left."""
    home = tmp_path_factory.mktemp("planted")
    source, target = home / "source", home / "target"

    def put(name: str, a: np.ndarray, b: np.ndarray) -> None:
        save(a, source / f"{name}.png")
        save(b, target / f"{name}.png")

    for number in range(CLEAN):
        put(f"train/clean{number}", *made(number))
    a, b = made(20)
    save(a, source / "train" / "dropped.png")
    a, b = made(21)
    save(a, source / "train" / "before.png")
    save(b, target / "train" / "after.png")
    a, b = made(22)
    put("train/cut", a, b)
    path = target / "train" / "cut.png"
    path.write_bytes(path.read_bytes()[:-2000])
    put("train/shifted", made(23)[0], np.roll(made(23)[1], 2, 0))
    put("train/half_way", made(24)[0], half_way(made(24)[1]))
    put("train/jpeg_inside", made(25)[0], jpeg(made(25)[1]))
    save(made(26)[0], source / "train" / "jpeg.png")
    save(made(26)[1], target / "train" / "jpeg.jpg", quality=40)
    put("train/opaque", made(27)[0], np.dstack([made(27)[1], np.full((SIDE, SIDE), 255, np.uint8)]))
    veil = np.full((SIDE, SIDE), 255, np.uint8)
    veil[3, 3] = 100
    put("train/veiled", made(28)[0], np.dstack([made(28)[1], veil]))
    put("train/narrow", made(29)[0], made(29)[1][:, :-4])
    put("test/copy", *made(0))
    put("train/again", *made(1))
    put("train/unretouched", made(30)[0], made(30)[0])
    put("train/brighter", made(31)[0], np.clip(made(31)[1].astype(int) + 6, 0, 255).astype(np.uint8))
    put("train/repainted", made(32)[0], faces.draw_face(99, SIDE))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    save(made(33)[0], source / "train" / "profile.png", icc_profile=profile)
    save(made(33)[1], target / "train" / "profile.png")
    save(made(34)[0], source / "train" / "deep.png")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(target / "train" / "deep.png")
    put("train/twin", *made(35))
    save(made(35)[1], target / "train" / "twin.webp", lossless=True)
    command = ["data", "audit", str(source), str(target), "--labels", "False"]
    status = cli.main([*command, "--json", str(home / "audit.json"), "--html", str(home / "audit.html")])
    return {"status": status, "home": home, **json.loads((home / "audit.json").read_text())}


def codes(planted: dict, name: str) -> set[str]:
    return {reason["code"] for reason in planted["pairs"][name]["reasons"] if reason["severity"] != "note"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("train/cut", "unreadable"),
        ("train/shifted", "shifted"),
        ("train/half_way", "shifted"),
        ("train/jpeg_inside", "lossy_target"),
        ("train/jpeg", "lossy_target"),
        ("train/veiled", "transparent"),
        ("train/narrow", "size"),
        ("test/copy", "leak"),
        ("train/unretouched", "no_edit"),
        ("train/brighter", "tone"),
        ("train/repainted", "stranger"),
        ("train/profile", "profile"),
        ("train/deep", "bit_depth"),
    ],
)
def test_each_fault_is_named_and_down_weighted(planted, name, code):
    assert code in codes(planted, name)
    assert planted["pairs"][name]["weight"] < 1


def test_no_clean_pair_is_flagged_and_an_opaque_alpha_is_only_noted(planted):
    for name in [f"train/clean{number}" for number in range(CLEAN)] + ["train/opaque"]:
        if name != "train/clean1":  # one of two copies goes; the audit keeps the first by name
            assert codes(planted, name) == set(), name
            assert planted["pairs"][name]["weight"] == 1
    assert {frozenset(codes(planted, name)) for name in ("train/clean1", "train/again")} == {
        frozenset(),
        frozenset({"duplicate"}),
    }
    assert [reason["code"] for reason in planted["pairs"]["train/opaque"]["reasons"]] == ["alpha"]
    assert planted["status"] == 1


def test_files_without_a_partner_are_named_and_the_renamed_one_is_recognised(planted):
    unpaired = {Path(item["file"]).name: item for item in planted["unpaired"]}
    assert set(unpaired) == {"dropped.png", "before.png", "after.png", "twin.webp"}
    assert "twin.png has the same name" in unpaired["twin.webp"]["message"]
    assert "after.png: renamed?" in unpaired["before.png"]["message"]
    assert "renamed" not in unpaired["dropped.png"]["message"]


def test_the_page_shows_what_is_flagged(planted):
    page = (planted["home"] / "audit.html").read_text()
    assert page.count("data:image/jpeg;base64") > 20
    assert "train/shifted" in page
    assert "train/clean3" not in page


def test_a_clean_folder_is_not_flagged(tmp_path):
    for number in range(4):
        source, target = made(number)
        save(source, tmp_path / "a" / f"{number}.png")
        save(target, tmp_path / "b" / f"{number}.png")
    command = ["data", "audit", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "audit.json")]
    assert cli.main([*command, "--html", str(tmp_path / "audit.html")]) == 0
    assert "Nothing is flagged" in (tmp_path / "audit.html").read_text()


def test_folders_with_nothing_in_common_are_refused(tmp_path, capsys):
    save(made(0)[0], tmp_path / "a" / "x.png")
    save(made(0)[1], tmp_path / "b" / "y.png")
    assert cli.main(["data", "audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "no names in common" in capsys.readouterr().err


def test_splits_are_told_by_folder_or_by_ffhqs_numbers():
    assert copies.splits_of(["train/a", "x/Val/a", "test/a", "a/b"]) == ["train", "validation", "test", ""]
    assert copies.splits_of(["00000/00012", "56000/56001", "a/69000/69999"]) == ["train", "validation", "test"]
    assert copies.splits_of([f"{number:05d}" for number in range(0, 70_000, 2)] + ["69999"])[-1] == "test"


def test_five_digits_of_a_camera_are_no_ffhq_numbers():
    assert copies.splits_of(["10234", "60235", "65001"]) == ["", "", ""]
    assert copies.splits_of(["56000/56001", "56000/57001"]) == ["", ""]
    assert copies.splits_of(["56000/56001", "56000/other"]) == ["", ""]


def test_spots_that_were_left_are_found_and_natural_marks_are_not(monkeypatch):
    """Round dark spots are removed from all pairs but six, where half are left; pale rings are left by everybody."""
    monkeypatch.setattr(labels, "STEPS", 60)
    y, x = np.mgrid[0:128, 0:128]
    pairs, careless = {}, {"3", "8", "11", "14", "20", "23"}
    for number in range(24):
        rng = np.random.default_rng(number)
        target = (
            np.full((128, 128, 3), (200, 160, 140), np.float32)
            + rng.normal(0, 3, (128, 128, 1))
            + 20 * np.sin(x / 40)[..., None]
        )
        source = target.copy()
        for spot in range(14):
            row, column = rng.integers(8, 120, 2)
            distance = np.hypot(y - row, x - column)
            if spot < 4:
                for image in (source, target):
                    image[(distance > 2) & (distance < 4)] += 30
            else:
                inside = distance < rng.uniform(2, 4)
                for image in (source, target) if str(number) in careless and spot < 9 else (source,):
                    image[inside] -= 50
        pairs[str(number)] = tuple(np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in (source, target))

    def read(name: str):
        names.append(name)
        return pairs[name], 4.0

    params, spots, names = {}, {}, []
    found = labels.find(list(pairs), read, params, spots)
    scores = {name: finding["score"] for name, finding in found.items()}
    assert min(scores[name] for name in careless) > 0.2
    assert max(score for name, score in scores.items() if name not in careless) < 0.1
    assert labels.find(list(pairs)[:5], read, {}, {}) == {}
    # Spots are given in the file's pixels, which are four times as many here.
    assert max(spot[0] for finding in found.values() for spot in finding["left_spots"]) > 128
    # What is known is not computed again, and gives the same result; what is missing is computed with the same network.
    monkeypatch.setattr(labels, "_learn", None)
    kept = json.loads(json.dumps(spots))
    del kept["3"]
    names.clear()
    assert labels.find(list(pairs), read, params, kept) == found
    assert names == ["3"]


def test_a_pair_with_spots_left_is_flagged_shown_and_down_weighted(tmp_path, monkeypatch):
    for number in range(2):
        source, target = made(number)
        save(source, tmp_path / "a" / f"{number}.png")
        save(target, tmp_path / "b" / f"{number}.png")
    finding = {"score": 0.6, "left": 3, "removed": 2, "left_spots": [(40.0, 50.0, 3.0)]}
    monkeypatch.setattr(labels, "find", lambda *_: {"1": finding, "0": finding | {"score": 0.1, "left": 1}})
    command = ["data", "audit", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "audit.json")]
    assert cli.main([*command, "--html", str(tmp_path / "audit.html")]) == 1
    pairs = json.loads((tmp_path / "audit.json").read_text())["pairs"]
    assert [pairs[name]["weight"] for name in "01"] == [1.0, 0.4]
    assert [reason["code"] for reason in pairs["1"]["reasons"]] == ["inconsistent"]
    assert pairs["1"]["spots"] == [[40.0, 50.0, 3.0]]
    assert "3 spots were left" in (tmp_path / "audit.html").read_text()
