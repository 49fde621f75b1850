"""Folders, blemishes, and the pipeline's promise: the batch of step k is a function of (seed, k)."""

import dataclasses

import numpy as np
import pytest
from conftest import edited
from PIL import Image

from autoretouch_jax.config import BlemishConfig, DataConfig
from autoretouch_jax.data import pipeline
from autoretouch_jax.data.blemishes import _PAINTERS, FAMILY_SHARES, Canvas, add_blemishes, skin_mask
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.opening import open_source
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import cores


def test_a_batch_is_a_function_of_seed_and_step(small_config):
    source = open_source(small_config.data)
    stream = pipeline.batches(source, small_config, 0)
    first = [next(stream) for _ in range(5)]
    threads = edited(small_config, parallel={"input_threads": 4, "prefetch": 2})
    for step in (0, 1, 4):
        again = next(pipeline.batches(source, threads, step))
        for name in ("source", "target"):
            np.testing.assert_array_equal(again[name], first[step][name])
    other = next(pipeline.batches(source, edited(small_config, train={"seed": 1}), 0))
    assert (other["target"] != first[0]["target"]).any()
    assert (first[0]["target"] != first[1]["target"]).any()


def test_pairs_stay_aligned_under_crop_zoom_and_flip(tmp_path, small_config):
    """Each pixel of these pairs carries its own position, and the target is the source plus one."""
    y, x = np.mgrid[0:80, 0:120].astype(np.uint8)
    image = np.stack([x, y, np.full_like(x, 7)], -1)
    for name, offset in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(image + np.uint8(offset)).save(tmp_path / name / "one.png")
    data = DataConfig(source=str(tmp_path / "a"), target=str(tmp_path / "b"), crop=32)
    config = edited(dataclasses.replace(small_config, data=data), train={"batch": 32})
    batch = next(pipeline.batches(open_source(data), config, 0))
    np.testing.assert_array_equal(batch["source"] + np.uint8(1), batch["target"])
    columns = batch["source"][:, 0, :, 0].astype(int)
    assert {int(row[1] - row[0]) for row in columns} == {1, -1}, "some crops are flipped, some are not"
    assert len({(row.min(), int(image[0, 0, 1])) for image, row in zip(batch["source"], columns, strict=True)}) > 10


def test_a_photo_is_never_made_smaller_than_the_crop(small_config):
    data = dataclasses.replace(small_config.data, crop=96, zoom=(0.2, 0.3))
    batch = next(pipeline.batches(open_source(data), dataclasses.replace(small_config, data=data), 0))
    assert batch["target"].shape == (8, 96, 96, 3)


def test_zoom_scales_both_images_alike(pair_folders, small_config):
    data = DataConfig(source=str(pair_folders[0]), target=str(pair_folders[0]), crop=32, zoom=(0.5, 1.5))
    batch = next(pipeline.batches(open_source(data), dataclasses.replace(small_config, data=data), 0))
    np.testing.assert_array_equal(batch["source"], batch["target"])


@pytest.mark.parametrize("family", FAMILY_SHARES)
def test_every_family_of_blemishes_is_local_and_visible(family):
    clean = faces.draw_face(1, side=128)
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(20):
        image = clean.astype(np.float32)
        _PAINTERS[family](
            rng, Canvas(image, np.ones((128, 128), np.float32)), np.array([64.0, 64.0]), BlemishConfig(patch=(6.0, 20.0))
        )
        difference = np.abs(np.rint(image) - clean).max(-1)
        changed += difference.max() >= 4
        assert (difference > 0).mean() < 0.5
        assert np.isfinite(image).all()
    assert changed >= 15


def test_blemishes_are_a_function_of_the_generator_and_leave_the_clean_share_alone():
    clean = faces.draw_face(2, side=128)
    make = lambda seed, **kwargs: add_blemishes(np.random.default_rng(seed), clean, BlemishConfig(**kwargs))  # noqa: E731
    np.testing.assert_array_equal(make(3, clean_share=0.0), make(3, clean_share=0.0))
    assert (make(3, clean_share=0.0) != clean).any()
    np.testing.assert_array_equal(make(3, clean_share=1.0), clean)


def test_skin_is_found_in_every_complexion_and_not_in_a_blue_wall():
    for tone in ((238, 200, 178), (170, 120, 90), (78, 50, 38)):
        assert skin_mask(np.full((4, 4, 3), tone, np.uint8)).all()
    assert not skin_mask(np.full((4, 4, 3), (40, 90, 200), np.uint8)).any()
    assert skin_mask(np.full((4, 4, 3), 120, np.uint8)).all(), "a black-and-white photo is skin everywhere"


def test_drawn_faces_differ_and_repeat():
    np.testing.assert_array_equal(faces.draw_face(5, 64), faces.draw_face(5, 64))
    assert (faces.draw_face(5, 64) != faces.draw_face(6, 64)).mean() > 0.5


def test_every_fault_of_a_pair_of_folders_is_named_at_once(pair_folders):
    source, target = pair_folders
    (source / "nested" / "face0.png").unlink()
    (target / "nested" / "face1.png").unlink()
    with pytest.raises(Refused) as refusal:
        PairSource(source, target)
    assert "nested/face0 (only in target)" in str(refusal.value)
    assert "nested/face1 (only in source)" in str(refusal.value)


def test_sizes_that_differ_are_named(pair_folders):
    source, target = pair_folders
    path = target / "nested" / "face2.png"
    Image.open(path).crop((0, 0, 90, 96)).save(path)
    with pytest.raises(Refused, match=r"nested/face2 \(96×96 against 90×96\)"):
        PairSource(source, target)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"crop": 112}, r"--data.crop 112 is larger than .*face0.png \(96×96\)"), ({"root": "/nowhere"}, "/nowhere")],
)
def test_a_crop_larger_than_the_smallest_image_and_a_missing_folder_are_refused(small_config, change, named):
    with pytest.raises(Refused, match=named):
        open_source(dataclasses.replace(small_config.data, **change))


def test_threads_are_one_for_each_core_unless_they_are_chosen(monkeypatch):
    for number, expected in ((1, 1), (6, 6), (96, 16)):
        monkeypatch.setattr(cores, "cores", lambda number=number: number)
        assert cores.input_threads(0) == expected
        assert cores.input_threads(3) == 3
