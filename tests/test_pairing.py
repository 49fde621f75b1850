"""The one pair matcher: names that are equal or alike, names that fit several files, folders, links, and its users."""

import shutil
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from autoretouch_jax import cli
from autoretouch_jax.data import ffhqr
from autoretouch_jax.data.audit_file import sound_pairs
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.pairing import first_of_each_name, match, match_all, named_images, unique_names
from autoretouch_jax.errors import Refused

NFC, NFD = (unicodedata.normalize(form, "Jörg/Händler") for form in ("NFC", "NFD"))


def matched(sources, targets) -> dict[str, str]:
    """The pairs of two lists of names, whose files are the names as they were given."""
    sides = [first_of_each_name((name, name) for name in names)[0] for names in (sources, targets)]
    return {name: target for name, (_, target) in match(*sides).pairs.items()}


def test_files_are_matched_by_name_and_the_others_are_listed():
    pairing = match({"b": 1, "a": 2, "only": 3}, {"a": 4, "b": 5, "other": 6})
    assert pairing.pairs == {"a": (2, 4), "b": (1, 5)}
    assert list(pairing.pairs) == ["a", "b"], "sorted, so that every process has the same order"
    assert (pairing.only_in_source, pairing.only_in_target) == ({"only": 3}, {"other": 6})
    assert pairing.reasons == {"only": "only in source", "other": "only in target"}
    first, further = first_of_each_name([("a", 1), ("b", 2), ("a", 3)])
    assert (first, further) == ({"a": 1, "b": 2}, [("a", 3)])
    with pytest.raises(Refused, match="root: 1 and 3 have the same name a"):
        unique_names("root", [("a", 1), ("a", 3)])
    with pytest.raises(Refused, match=r"l and r do not pair up: only \(only in source\), other \(only in target\)"):
        match_all({"only": 3}, {"other": 6}, ("l", "r"))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (NFC, NFD), (NFD, NFC), ("IMG_1", "img_1"), ("shoot/IMG_1", "Shoot/img_1"), ("a/1", "a/1-Edit"), ("1", "1_edit"),
        ("1", "1-edited"), ("1", "1_retouched"), ("1", "1-retouched"), ("1", "1_RETOUCH"), ("1", "1_after"), ("1_before", "1"),
        ("1_before", "1_after"), ("1", "1 copy"), ("1", "1 - Copy"), ("IMG_1", "img_1-Edit copy"), ("Ä", "a\u0308-Edit"),
    ],
)  # fmt: skip
def test_names_alike_are_a_pair_of_the_sources_name(source, target):
    assert matched([source, "z"], [target, "z"]) == {unicodedata.normalize("NFC", source): target, "z": "z"}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("1", "1-2"), ("1", "12"), ("a/1", "b/1"), ("a/1", "1"), ("a_edit/1", "a/1"), ("1", "1edit"), ("edit", "after"),
        ("1", "1-x"), ("a/-edit", "a/_after"),
    ],
)  # fmt: skip
def test_other_names_are_no_pair(source, target):
    assert matched([source], [target]) == {}


def test_equal_names_come_first_then_case_then_additions():
    names = ["IMG_1", "IMG_1-Edit"]
    assert matched(names, names) == {name: name for name in names}
    assert matched(["IMG_1", "img_1"], ["img_1", "IMG_1"]) == {"IMG_1": "IMG_1", "img_1": "img_1"}
    assert matched(["IMG_1"], ["IMG_1-Edit", "img_1"]) == {"IMG_1": "img_1"}
    assert matched(["IMG_1", "IMG_1_before"], ["img_1", "IMG_1_after"]) == {"IMG_1": "img_1", "IMG_1_before": "IMG_1_after"}


def test_a_name_that_fits_several_files_is_refused_with_each_of_them():
    pairing = match({"1": "s", "2": "s"}, {"1-Edit": "t", "1_retouched": "t", "2": "t"})
    assert list(pairing.pairs) == ["2"]
    with pytest.raises(Refused) as refusal:
        match_all({"1": "s"}, {"1-Edit": "t", "1_retouched": "t"}, ("l", "r"))
    assert "1 (in source; fits 1-Edit and 1_retouched: which one is meant?)" in str(refusal.value)
    assert "1-Edit (in target; fits 1: which one is meant?)" in str(refusal.value)
    assert match({"A": 1, "a": 2}, {"a_after": 3}).reasons["a_after"] == "in target; fits A and a: which one is meant?"
    extra = match({"1": "s"}, {"1": "t", "1-Edit": "t"})
    assert extra.reasons == {"1-Edit": "in target; fits 1, which has a partner"}


def test_two_forms_of_one_name_in_a_folder_are_the_same_name():
    first, further = first_of_each_name([(NFD, 1), (NFC, 2)])
    assert (first, further) == ({NFC: 1}, [(NFC, 2)])


def test_names_are_paths_without_their_ending_and_hidden_files_are_no_images(tmp_path):
    for name in ("a/one.png", "a/.hidden.png", ".trash/two.png", "b/one.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG") if not name.endswith("txt") else (tmp_path / name).touch()
    assert [name for name, _ in named_images(tmp_path, "source")] == ["a/one", "b/one"]
    with pytest.raises(Refused, match=r"source .*nowhere: no such folder"):
        named_images(tmp_path / "nowhere", "source")
    (tmp_path / "phone").mkdir()
    with pytest.raises(Refused, match=r"holds no images that can be read \(.*\.webp.*\); convert them"):
        named_images(tmp_path / "phone", "source")
    (tmp_path / "phone" / "1.HEIC").touch()
    with pytest.raises(Refused, match=r"holds no images that can be read \(.*\), but \.heic; convert them"):
        named_images(tmp_path / "phone", "source")


def test_pairs_match_by_relative_stem_whatever_the_ending(pair_folders):
    source, target = pair_folders
    path = source / "nested" / "face3.png"
    Image.open(path).convert("RGB").save(path.with_suffix(".bmp"))
    path.unlink()
    assert len(PairSource(source, target)) == 4
    shutil.copy(path.with_suffix(".bmp"), path.with_suffix(".jpeg"))
    with pytest.raises(Refused, match="same name"):
        PairSource(source, target)


# ---- its users --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def renamed_folders(pair_folders, tmp_path):
    """Pairs whose targets are named as retouching programs name them, behind a link."""
    source, target = pair_folders
    names = {"face0": "face0-Edit", "face1": "FACE1", "face2": "face2_retouched", "face3": "face3 copy"}
    for name, other in names.items():
        (target / "nested" / f"{name}.png").rename(target / "nested" / f"{other}.png")
    (target / "nested").rename(tmp_path / "elsewhere")
    (target / "nested").symlink_to(tmp_path / "elsewhere")
    return source, target


def test_training_builders_and_tar_files_use_it(renamed_folders, face_folder, tmp_path):
    source, target = renamed_folders
    names = [f"nested/face{number}" for number in range(4)]
    pairs = PairSource(source, target)
    assert pairs.names == names
    for number in range(4):
        with Image.open(face_folder / f"face{number}.png") as clean:
            np.testing.assert_array_equal(pairs[number].images["target"], clean)
    splits = ffhqr.folder_splits(source, target, 0.0, 0.0)
    assert [name for name, *_ in splits["train"]] == names
    with tarfile.open(tmp_path / "target.tar", "w") as archive:
        for path in sorted((tmp_path / "elsewhere").iterdir()):
            archive.add(path, f"nested/{path.name}")
    sides = [ffhqr.image_files(root) for root in (source, tmp_path / "target.tar")]
    assert list(sound_pairs(*sides, (source, tmp_path / "target.tar"), None)[0]) == names


def test_the_audit_uses_it(renamed_folders, tmp_path, capsys):
    source, target = map(str, renamed_folders)
    out = tmp_path / "audit.json"
    cli.main(["data", "audit", source, target, "--json", str(out), "--labels", "False", "--html", str(tmp_path / "a.html")])
    assert "unpaired" not in capsys.readouterr().out
    assert out.read_text().count('"nested/face') >= 4
