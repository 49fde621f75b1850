"""The TFDS builders, without TensorFlow: what they write is what they were given, split, checked and licensed."""

import hashlib
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import edited
from PIL import Image

from autoretouch_jax import cli
from autoretouch_jax.data import pipeline, tfds_builders
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.opening import open_source
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.data.sources import whole
from autoretouch_jax.models.folder import load_model

assert tfds_builders  # importing it registers them
NUMBERS = (0, 999, 55999, 56000, 62999, 63000, 69999)


def make_ffhq(home: Path, source_name: str, target_name: str, list_name: str) -> tuple[Path, Path, Path]:
    """A few numbered images: FFHQ nested, FFHQR flat and RGBA, and the list of md5s."""
    source, target, published = home / source_name, home / target_name, {}
    target.mkdir()
    for number in NUMBERS:
        image = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        path = source / "images1024x1024" / f"{number // 1000 * 1000:05d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        Image.fromarray(image ^ np.uint8(1)).convert("RGBA").save(target / f"{number:05d}.png")
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        published[str(number)] = {"image": {"file_path": f"images1024x1024/{path.parent.name}/{path.name}", "file_md5": md5}}
    (home / list_name).write_text(json.dumps(published))
    return source, target, home / list_name


@pytest.fixture
def ffhq(tmp_path) -> tuple[Path, Path, Path]:
    return make_ffhq(tmp_path, "ffhq", "ffhqr", "v2.json")


def packed(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    return path


@pytest.mark.parametrize("pack", [False, True], ids=["folders", "tar"])
def test_ffhqr_has_the_official_split_the_licence_and_every_pixel(ffhq, tmp_path, pack):
    source, target, md5 = ffhq
    roots = [packed(root) if pack else root for root in (source, target)]
    assert cli.main(["data", "build", "ffhqr", *map(str, roots), "--md5", str(md5), "--out", str(tmp_path / "tfds")]) == 0
    folder = tmp_path / "tfds" / "ffhqr" / "1.0.0"
    builder = tfds.builder_from_directory(str(folder))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 3, "validation": 2, "test": 2}
    assert "CC BY-NC-SA 4.0" in builder.info.redistribution_info.license
    for pair in builder.as_data_source("test"):
        number = int(pair["name"].decode())
        image = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        np.testing.assert_array_equal(pair["source"], image)
        np.testing.assert_array_equal(pair["target"], image ^ np.uint8(1))
    assert "tensorflow" not in sys.modules


def test_tfds_knows_the_builders_by_name(pair_folders, tmp_path):
    source, target = pair_folders
    builder = tfds.builder("retouch_pairs", source=source, target=target, validation=0, test=0, data_dir=str(tmp_path / "t"))
    builder.download_and_prepare(download_dir=str(tmp_path / "d"))
    (pair, *_), files = builder.as_data_source("train"), PairSource(source, target)
    np.testing.assert_array_equal(pair["source"], whole(files[0])["source"])


def test_a_source_that_is_not_the_published_one_is_refused_before_anything_is_written(ffhq, tmp_path, capsys):
    source, target, md5 = ffhq
    path = source / "images1024x1024" / "56000" / "56000.png"
    Image.open(path).rotate(180).save(path)
    assert cli.main(["data", "build", "ffhqr", str(source), str(target), "--md5", str(md5), "--out", str(tmp_path / "t")]) == 2
    assert "56000.png" in (error := capsys.readouterr().err)
    assert "00999.png" not in error
    assert not (tmp_path / "t").exists()


def test_missing_partners_and_foreign_names_are_named(ffhq, tmp_path, capsys):
    source, target, _ = ffhq
    (target / "00999.png").unlink()
    build = ["data", "build", "ffhqr", str(source), str(target), "--out", str(tmp_path / "t")]
    assert cli.main(build) == 2
    assert "00999 (only in source)" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(target / "holiday.png")
    assert cli.main(build) == 2
    assert "holiday.png" in capsys.readouterr().err


def test_two_folders_become_a_data_set_that_trains_and_becomes_records(pair_folders, tmp_path, small_config):
    build = ["data", "build", "retouch_pairs", *map(str, pair_folders), "--out", str(tmp_path / "tfds"), "--license", "ours"]
    assert cli.main([*build, "--validation", "0", "--test", "0"]) == 0
    folder = tmp_path / "tfds" / "retouch_pairs" / "1.0.0"
    assert cli.main(["data", "prepare", "--tfds", str(folder), "--out", str(tmp_path / "r")]) == 0
    records, files = RecordSource(tmp_path / "r"), PairSource(*pair_folders)
    assert (records.names, records.license) == (files.names, "ours")
    forms = [
        {"tfds": str(folder)},
        {"records": str(tmp_path / "r")},
        dict(zip(("source", "target"), map(str, pair_folders), strict=True)),
    ]
    batches = []
    for form in forms:
        config = edited(small_config, data={"root": None, "edit_crops": 0.5} | form)
        batches.append(next(pipeline.batches(open_source(config.data), config, 1)))
    for batch in batches[1:]:
        for name, values in batch.items():
            np.testing.assert_array_equal(values, batches[0][name])
    (folder / "pairs.json").unlink()  # as another program would have written it
    for ours, theirs in zip(open_source(edited(small_config, data={"root": None, **forms[0]}).data), files, strict=True):
        np.testing.assert_array_equal(whole(ours)["source"], whole(theirs)["source"])


def test_a_model_carries_the_licence_of_its_data(pair_folders, tmp_path):
    assert cli.main(["data", "prepare", *map(str, pair_folders), "--out", str(tmp_path / "r"), "--license", "CC BY 4.0"]) == 0
    small = ["--generator.width", "4", "--generator.blocks", "1", "--discriminator.width", "4", "--data.crop", "32"]
    data = ["--data.records", str(tmp_path / "r"), "--loss.perceptual-weight", "0", "--parallel.devices", "1"]
    steps = ["--train.steps", "1", "--train.batch", "2", "--workdir", str(tmp_path / "run")]
    assert cli.main(["train", "configs/autoretouch.py", *small, *data, *steps]) == 0
    assert load_model(tmp_path / "run").data_license == "CC BY 4.0"
    more = [
        "--data.source",
        str(pair_folders[0]),
        "--data.target",
        str(pair_folders[1]),
        "--train.start-from",
        str(tmp_path / "run"),
    ]
    steps[-1] = str(tmp_path / "tuned")
    assert cli.main(["train", "configs/autoretouch.py", *small, *more, *data[2:], *steps]) == 0
    assert load_model(tmp_path / "tuned").data_license == "CC BY 4.0"


@pytest.mark.parametrize(
    ("folder", "split", "named"), [("nowhere", "train", "no dataset_info.json"), ("", "prod", "no split prod")]
)
def test_what_is_no_data_set_or_split_is_refused(pair_folders, tmp_path, capsys, folder, split, named):
    cli.main(["data", "build", "retouch_pairs", *map(str, pair_folders), "--out", str(tmp_path)])
    where = tmp_path / (folder or "retouch_pairs/1.0.0")
    assert cli.main(["data", "prepare", "--tfds", str(where), "--split", split, "--out", str(tmp_path / "r")]) == 2
    assert named in capsys.readouterr().err
