"""Data that teach restraint: blemishes on skin alone, crops in which nothing changes, and a camera's marks on both sides."""

import dataclasses
import json

import matplotlib.cbook
import numpy as np
import pytest
from conftest import edited
from PIL import Image
from skimage import data as skimage_data

from autoretouch_jax import cli
from autoretouch_jax.config import BlemishConfig, DataConfig
from autoretouch_jax.data import pigments, pipeline
from autoretouch_jax.data.augment import augment, augment_negative
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.degrade import degrade
from autoretouch_jax.data.face_parts import regions
from autoretouch_jax.data.faces import find_faces
from autoretouch_jax.data.negatives import mixed, open_negatives
from autoretouch_jax.data.opening import open_source, typical_face_size
from autoretouch_jax.data.patterns import PATTERNS, draw_pattern
from autoretouch_jax.data.shapes import bowed, mottled
from autoretouch_jax.data.sources import Decoded
from autoretouch_jax.data.warp import warp, with_margin
from autoretouch_jax.errors import Refused


def photo() -> np.ndarray:
    return np.asarray(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))


@pytest.fixture
def photo_folder(tmp_path):
    """Two photographs with nothing to retouch."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(skimage_data.coffee()).save(folder / "coffee.png")
    Image.fromarray(skimage_data.chelsea()).save(folder / "cat.png")
    return folder


# ---- blemishes --------------------------------------------------------------------------------------------------------------


def test_where_the_face_is_known_blemishes_lie_on_its_skin_alone():
    clean = photo()
    where = regions(clean, find_faces(clean))
    config = BlemishConfig(per_megapixel=(3000.0, 3000.0), clean_share=0.0, hollows=1.0)
    changed = np.zeros(clean.shape[:2], bool)
    for seed in range(3):
        changed |= (add_blemishes(np.random.default_rng(seed), clean, config, where) != clean).any(-1)
    skin = where[..., 0] > 0
    assert not changed[~skin].any(), "hair, eyes, lips and cloth stay as they are"
    assert changed[skin].mean() > 0.3


def test_shadows_lie_below_the_eyes():
    clean = photo()
    where = regions(clean, find_faces(clean))
    config = BlemishConfig(per_megapixel=(0.001, 0.001), clean_share=0.0, hollows=1.0, strength=(0.8, 0.9))
    changed = (add_blemishes(np.random.default_rng(1), clean, config, where) != clean).any(-1)
    assert changed[where[..., 1] > 128].mean() > 0.8
    assert not changed[where[..., 1] == 0].any()
    none = dataclasses.replace(config, hollows=0.0)
    np.testing.assert_array_equal(add_blemishes(np.random.default_rng(1), clean, none, where), clean)


def pigmented(seed, **values):
    clean = photo()
    where = regions(clean, find_faces(clean))
    config = BlemishConfig(clean_share=0.0, pigments=1.0, **values)
    return clean, add_blemishes(np.random.default_rng(seed), clean, config, where), where[..., 0] > 0


def test_pigments_lie_on_skin_alone_and_are_few():
    changed = []
    for seed in range(4):
        clean, blemished, skin = pigmented(seed, per_megapixel=(100.0, 1600.0), patch=(3.0, 10.0), radius=(0.7, 2.0))
        changed.append((blemished != clean).any(-1))
        assert not changed[-1][~skin].any(), "hair, eyes, lips and cloth stay as they are"
        assert 0.01 < changed[-1][skin].mean() < 0.7
    assert (changed[0] != changed[1]).any()
    np.testing.assert_array_equal(pigmented(3)[1], pigmented(3)[1])


def test_blood_and_melanin_take_more_green_and_blue_light_than_red():
    clean, blemished, _ = pigmented(5, per_megapixel=(400.0, 400.0), hollows=0.0)
    taken = (clean.astype(int) - blemished).reshape(-1, 3).sum(0)
    assert taken[0] < taken[1]
    assert taken[0] < taken[2]
    assert (taken > 0).all()


def test_pigments_need_a_known_face_and_use_no_draw_where_they_are_off():
    clean, config = photo(), BlemishConfig(clean_share=0.0)
    where = regions(clean, find_faces(clean))
    always = dataclasses.replace(config, pigments=1.0)
    draw = lambda config, where: add_blemishes(np.random.default_rng(7), clean, config, where)  # noqa: E731
    np.testing.assert_array_equal(draw(always, None), draw(config, None))
    assert (draw(always, where) != draw(config, where)).any()
    np.testing.assert_array_equal(draw(always, np.zeros_like(where)), clean)


@pytest.mark.parametrize("family", pigments.PAINTERS)
def test_every_family_of_pigments_is_local_and_visible(family):
    visible = raised = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        layers = pigments.bare(rng, (160, 160))
        config = BlemishConfig(patch=(6.0, 14.0), radius=(1.0, 6.0))
        pigments.PAINTERS[family](rng, layers, np.array([80.0, 80.0], np.float32), config)
        assert np.isfinite(layers.depth).all()
        seen = (layers.depth > pigments.LEAST_DEPTH).any(-1) | (np.abs(layers.relief) > 0)
        assert seen.mean() < 0.35
        rows, columns = (np.nonzero(layers.depth.any((axis, 2)))[0] for axis in (1, 0))
        for edge in (*layers.depth[rows[[0, -1]]], *layers.depth[:, columns[[0, -1]]].swapaxes(0, 1)):
            assert edge.max() < 0.02, "a layer fades out before its window ends"
        visible += layers.depth.max() > 0.03
        raised += layers.relief.any()
    assert visible >= 15
    assert (raised > 0) == (family == "pimple")


def test_pigments_are_drawn_with_bounds_that_are_equal():
    clean, blemished, _ = pigmented(1, per_megapixel=(900.0, 900.0), radius=(2.0, 2.0), patch=(4.0, 4.0), strength=(0.5, 0.5))
    assert (clean != blemished).any()


def test_pigmented_shadows_lie_below_the_eyes():
    clean = photo()
    where = regions(clean, find_faces(clean))
    rng, shape = np.random.default_rng(3), clean.shape[:2]
    layers = pigments.bare(rng, shape)
    pigments.draw_shadows(rng, layers, where[..., 1].astype(np.float32) / 255, BlemishConfig(patch=(2.0, 4.0)))
    assert layers.depth[where[..., 1] > 128].mean() > 5 * layers.depth[where[..., 1] < 20].mean()
    assert not layers.relief.any()


def test_crescents_hang_from_the_corners_of_the_eye():
    right, down = np.meshgrid(np.arange(-40, 41) / 30, np.arange(-20, 21) / 8)
    ellipse = np.exp(-(right**4) - down**2).astype(np.float32)
    assert (bowed(ellipse, 0.0) == ellipse).all()
    crescent = bowed(ellipse, 6.0)
    lowest = crescent.argmax(0)
    assert lowest[40] == 20
    assert abs(lowest[10] - 14) <= 1, "where x = 1, it lies six pixels higher"
    np.testing.assert_array_equal(lowest, lowest[::-1])
    ellipse[:, 30:36] = 0  # a mole, which is no skin
    whole = np.delete(np.arange(81), np.arange(30, 36))
    assert np.abs(bowed(ellipse, 6.0).argmax(0) - lowest)[whole].max() <= 1


def test_mottling_varies_over_its_scale():
    def steps(scale):
        factor = mottled(np.random.default_rng(0), (120, 120), scale, 0.4)
        assert factor.min() >= 0
        assert abs(factor.mean() - 1) < 0.15
        return np.abs(np.diff(factor, axis=1)).mean()

    assert steps(4.0) > 2 * steps(16.0) > 4 * steps(64.0)
    assert (mottled(np.random.default_rng(0), (9, 9), 3.0, 0.0) == 1).all()


# ---- negatives --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_pattern_is_drawn_and_repeats(kind):
    pictures = [np.asarray(PATTERNS[kind](np.random.default_rng(seed), 64)) for seed in range(4)]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    assert max(picture.std() for picture in pictures) > 5
    np.testing.assert_array_equal(pictures[1], np.asarray(PATTERNS[kind](np.random.default_rng(1), 64)))
    np.testing.assert_array_equal(draw_pattern(np.random.default_rng(2), 48), draw_pattern(np.random.default_rng(2), 48))


def test_other_hues_keep_what_is_grey():
    grey = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[:, None, None], 3, axis=-1)
    for seed in range(5):
        assert np.abs(mixed(np.random.default_rng(seed), grey).astype(int) - grey).max() <= 1
    red = np.full((4, 4, 3), (200, 30, 30), np.uint8)
    assert len({tuple(mixed(np.random.default_rng(seed), red)[0, 0]) for seed in range(8)}) > 4


def test_synthetic_blemishes_bring_negatives_and_pairs_do_not(face_folder, photo_folder):
    assert open_negatives(DataConfig(root=str(face_folder))) is not None
    assert open_negatives(DataConfig(root=str(face_folder), negative_share=0.0)) is None
    pairs = DataConfig(source="a", target="b")
    assert open_negatives(pairs) is None
    assert open_negatives(dataclasses.replace(pairs, extra_blemishes=0.2)) is not None
    assert open_negatives(dataclasses.replace(pairs, negatives=str(photo_folder))) is not None


def test_the_share_of_negatives_is_kept_and_nothing_changes_in_them(small_config, photo_folder):
    blemish = BlemishConfig(per_megapixel=(20000.0, 20000.0), clean_share=0.0)
    data = dataclasses.replace(
        small_config.data,
        negatives=str(photo_folder),
        negative_share=0.5,
        on_skin=1.0,
        degrade=0.5,
        colour=0.3,
        blemish=blemish,
    )
    run = dataclasses.replace(small_config, data=data)
    batches = pipeline.batches(open_source(data), run, 0, negatives=open_negatives(data))
    same = np.concatenate([(b["source"] == b["target"]).all((1, 2, 3)) for b, _ in zip(batches, range(12), strict=False)])
    assert 0.3 < same.mean() < 0.7


def test_a_broken_negative_is_named_and_replaced_and_a_missing_folder_refused(small_config, photo_folder):
    data = bytearray((photo_folder / "cat.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (photo_folder / "cat.png").write_bytes(data)
    config = dataclasses.replace(small_config.data, negatives=str(photo_folder), negative_share=1.0)
    faults = pipeline.Faults(config, 4)
    run = dataclasses.replace(small_config, data=config)
    batches = pipeline.batches(open_source(config), run, 0, faults=faults, negatives=open_negatives(config))
    for _ in range(4):
        next(batches)
    assert list(faults.messages) == ["negatives: cat"]
    with pytest.raises(Refused, match=r"--data.negatives .*nowhere"):
        open_negatives(dataclasses.replace(config, negatives="nowhere"))


# ---- cameras ----------------------------------------------------------------------------------------------------------------


def test_a_cameras_marks_are_the_same_on_both_sides():
    target = skimage_data.coffee()[:96, :96].copy()
    source = target.copy()
    source[40:48, 40:48] = (180, 60, 60)
    far = np.ones((96, 96), bool)
    far[16:72, 16:72] = False
    changed = 0
    for seed in range(30):
        a, b = degrade(np.random.default_rng(seed), source, target)
        np.testing.assert_array_equal(a[far], b[far])
        assert (a[42:46, 42:46] != b[42:46, 42:46]).any(), "the blemish is still there"
        changed += (b != target).any()
    assert changed > 20
    config = DataConfig(crop=96, colour=0.2, degrade=1.0, light=0.5)
    crop = augment_negative(target, config, np.random.default_rng(0))
    np.testing.assert_array_equal(crop["source"], crop["target"])


def test_light_falls_on_both_sides_alike_and_from_one_direction():
    grey = np.full((64, 64, 3), 100, np.uint8)
    config = DataConfig(crop=64, light=0.5)
    crops = [augment_negative(grey, config, np.random.default_rng(seed))["source"].astype(int) for seed in range(12)]
    spread = [np.ptp(crop[..., 0]) for crop in crops]
    assert max(spread) > 30
    assert all(np.ptp(crop, axis=-1).max() == 0 for crop in crops), "light has no colour of its own"
    red = np.full((64, 64, 3), (200, 80, 80), np.uint8)
    chroma = [
        np.ptp(augment_negative(red, config, np.random.default_rng(seed))["source"][32, 32].astype(int)) for seed in range(40)
    ]
    assert min(chroma) < 80
    assert max(chroma) > 125


# ---- the size of faces ------------------------------------------------------------------------------------------------------


def disc_images() -> dict[str, np.ndarray]:
    """A red disc on grey within a white border of 4 pixels, and where it is."""
    down, across = np.mgrid[:240, :240]
    disc = np.hypot(down - 100, across - 140) < 30
    target = np.full((240, 240, 3), 255, np.uint8)
    target[4:-4, 4:-4] = 90
    target[disc] = (220, 60, 60)
    return {"target": target, "regions": np.repeat(255 * disc[..., None].astype(np.uint8), 2, -1)}


def test_a_bent_crop_moves_all_images_alike_and_differs_with_every_draw():
    images = disc_images()
    bent = [warp(np.random.default_rng(seed), images, (24, 24), 192, 0.05) for seed in range(8)]
    for image in bent:
        red, where = image["target"][..., 2] < 75, image["regions"][..., 1] > 127
        assert image["target"].shape == (192, 192, 3)
        assert (red != where).mean() < 0.005
        assert 0.6 < where.sum() / np.pi / 30**2 < 1.6
        assert image["target"].min() > 20, "nothing is black"
        assert (image["target"].min(-1) > 150).mean() < 0.02, "hardly any of the border, which lies 20 pixels outside, comes in"
    centres = np.array([np.argwhere(image["regions"][..., 0] > 127).mean(0) for image in bent])
    assert (centres.std(0) > 2).all()
    assert np.abs(centres - (100 - 24, 140 - 24)).max() < 192 * 0.05 + 2 * 0.05 * 47 + 3, "by no more than is stated"
    straight = warp(np.random.default_rng(0), images, (24, 24), 192, 0.0)["target"]
    np.testing.assert_array_equal(straight, images["target"][24:216, 24:216])


def test_what_is_bent_beyond_the_photograph_repeats_its_last_pixels():
    images = {"target": np.full((192, 192, 3), 90, np.uint8)}
    for seed in range(5):
        assert (warp(np.random.default_rng(seed), images, (0, 0), 192, 0.2)["target"] == 90).all()


def test_a_margin_ends_with_the_photograph():
    assert with_margin((100, 200, 64, 64), 1000, 1000) == (92, 192, 80, 80)
    assert with_margin((0, 936, 64, 64), 1000, 1000) == (0, 928, 72, 72)
    assert with_margin((0, 0, 64, 64), 64, 64) == (0, 0, 64, 64)


@pytest.mark.parametrize("zoom", [0.5, 1.0, 1.4])
def test_bent_pairs_stay_aligned_and_where_they_were(zoom):
    """Also where the crop is as wide as the photograph. The least bending gives the crop without it, but for rounding."""
    # Enlarged, so that half a pixel more or less changes little.
    photo = np.asarray(Image.fromarray(skimage_data.chelsea()[100:150, 100:165]).resize((260, 200)))
    config = DataConfig(crop=96, zoom=(zoom, zoom), flip=False, source="a", target="b")
    example = Decoded("cat", {"source": photo, "target": photo})
    plain, least, bent = (
        augment(example, dataclasses.replace(config, warp=warp), np.random.default_rng(1)) for warp in (0.0, 1e-9, 0.06)
    )
    np.testing.assert_array_equal(bent["source"], bent["target"])
    assert np.abs(plain["target"].astype(int) - least["target"]).mean() < 2
    assert (np.abs(bent["target"].astype(int) - least["target"]) > 10).mean() > 0.05


def test_faces_are_brought_to_one_size_and_pairs_stay_aligned(tmp_path):
    for side in ("faces", "source", "target"):
        (tmp_path / side).mkdir()
    for number, factor in enumerate((0.5, 1.0)):
        size = (round(512 * factor), round(600 * factor))
        clean = Image.fromarray(photo()).resize(size, Image.Resampling.LANCZOS)
        clean.save(tmp_path / "faces" / f"{number}.png")
        clean.save(tmp_path / "target" / f"{number}.png")
        clean.paste((120, 30, 30), (size[0] // 2, size[1] // 2, size[0] // 2 + 20, size[1] // 2 + 20))
        clean.save(tmp_path / "source" / f"{number}.png")
    config = DataConfig(root=str(tmp_path / "faces"), face_size=150, crop=32)
    examples = [example for source in [open_source(config)] for example in (source[0], source[1])]
    sizes = [find_faces(example.images["target"])[0].size for example in examples]
    assert sizes == pytest.approx([150, 150], rel=0.06)
    assert examples[0].images["regions"].shape[:2] == examples[0].images["target"].shape[:2]
    assert typical_face_size(open_source(config), dataclasses.replace(config, zoom=(1.0, 2.25))) == pytest.approx(225)
    measured = typical_face_size(open_source(config), dataclasses.replace(config, face_size=0))
    assert measured == pytest.approx(find_faces(photo())[0].size * 0.75, rel=0.1)
    pairs = DataConfig(source=str(tmp_path / "source"), target=str(tmp_path / "target"), face_size=150, crop=32)
    for pair in (open_source(pairs)[0], open_source(pairs)[1]):
        assert pair.images["source"].shape == pair.images["target"].shape
        assert 0 < pair.edits().astype(bool).mean() < 0.2


def test_the_model_knows_the_size_and_drawn_noise_has_none(small_config, tmp_path):
    from autoretouch_jax.models.folder import load_model
    from autoretouch_jax.training import loop

    (tmp_path / "faces").mkdir()
    Image.fromarray(photo()).save(tmp_path / "faces" / "one.png")
    data = {"root": str(tmp_path / "faces"), "face_size": 120, "zoom": (0.5, 2.0)}
    config = edited(small_config, data=data, train={"steps": 2, "batch": 2})
    assert loop.run(config, tmp_path / "run") == 0
    assert load_model(tmp_path / "run").face_size == pytest.approx(120)
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text())["face_size"] == pytest.approx(120)


def test_a_mistyped_folder_of_negatives_is_refused_before_anything_is_written(small_config, tmp_path):
    from autoretouch_jax.training import loop

    with pytest.raises(Refused, match=r"--data.negatives .*nowhere"):
        loop.run(edited(small_config, data={"negatives": str(tmp_path / "nowhere")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [["--data.records", "r"], ["--data.root", "f", "--data.resize", "286"]])
def test_a_face_size_that_cannot_be_had_is_refused(tmp_path, capsys, extra):
    argv = ["train", "configs/portraits.py", *extra, "--data.face-size", "300", "--workdir", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    assert "--data.face-size" in capsys.readouterr().err
