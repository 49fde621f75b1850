"""The model in the box: it is there, it heals, it leaves alone, and it can be tuned."""

import json

import numpy as np
import pytest
from conftest import edited
from PIL import Image, ImageOps
from skimage import data as skimage_data
from test_images import p3_profile

import autoretouch_jax
from autoretouch_jax import cli
from autoretouch_jax.config import load
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.data import libvips
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.colour import adobe_rgb_profile
from autoretouch_jax.data.face_parts import regions
from autoretouch_jax.data.faces import find_faces
from autoretouch_jax.data.images import as_stored
from autoretouch_jax.data.spaces import Space
from autoretouch_jax.demo import faces
from autoretouch_jax.demo.demo import HELD_OUT_BLEMISHES
from autoretouch_jax.errors import Refused
from autoretouch_jax.evaluation import metrics
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.inference.photo import Photo
from autoretouch_jax.models.folder import PRETRAINED_FOLDER, load_model
from autoretouch_jax.training.state import check_start
from autoretouch_jax.training.trainer import Trainer


def blemished_portrait() -> tuple[np.ndarray, np.ndarray]:
    """A real portrait with drawn blemishes, and without."""
    clean = faces.portrait()
    where = regions(clean, find_faces(clean))
    return add_blemishes(np.random.default_rng(3), clean, HELD_OUT_BLEMISHES, where), clean


def test_it_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for path in PRETRAINED_FOLDER.iterdir()) < 8_000_000
    model = load_model("pretrained")
    assert model.face_size
    assert "CC BY 4.0" in model.data_license
    card = (PRETRAINED_FOLDER / "README.md").read_text()
    for word in ("identity", "DeBruine", "10.6084/m9.figshare.5047666", "held out", "typology angle", "badly"):
        assert word in card, word


def test_it_is_the_network_of_its_configs():
    for name in ("pretrained.py", "finetune.py", "portraits.py"):
        config = load(name)
        check_start(load_model("pretrained"), config)  # refuses another network
        centre = (config.data.zoom[0] * config.data.zoom[1]) ** 0.5
        assert load_model("pretrained").face_size == pytest.approx(config.data.face_size * centre, abs=0.1)


def test_it_heals_and_keeps_the_rest():
    source, clean = blemished_portrait()
    output = retouch_array(load_model("pretrained"), source)
    values = metrics.compare(source, clean, output)
    assert values["edit_recovered"] > 0.3
    assert values["outside_error"] < 0.15
    assert metrics.psnr(output, clean) > metrics.psnr(source, clean)


def test_photographs_of_other_things_come_back_as_they_are():
    for photo in (skimage_data.coffee(), skimage_data.chelsea(), skimage_data.rocket()):
        np.testing.assert_array_equal(retouch_array(load_model("pretrained"), photo), photo)
    photo = skimage_data.rocket()
    assert (retouch_array(load_model("pretrained"), photo, faces="off") == photo).all(-1).mean() > 0.999


def test_the_first_command_works_at_once(tmp_path, capsys):
    photo = tmp_path / "portrait.jpg"
    Image.fromarray(blemished_portrait()[0]).save(photo, quality=95)
    assert cli.main(["retouch", str(photo), "--out", str(tmp_path / "out")]) == 0
    assert "1 of 1" in capsys.readouterr().out
    before, after = (np.asarray(Image.open(path)) for path in (photo, tmp_path / "out" / "portrait.jpg"))
    assert 0.001 < (before != after).any(-1).mean() < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_may_be_held_in_any_way(tmp_path, orientation):
    source, _ = blemished_portrait()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(as_stored(source, orientation))
    stored.save(tmp_path / "a.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(shown), source, "as a viewer shows it")
    assert cli.main(["retouch", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "a.png") as after:
        assert after.getexif()[0x0112] == orientation
        np.testing.assert_array_equal(
            np.asarray(ImageOps.exif_transpose(after)), retouch_array(load_model("pretrained"), source)
        )


@pytest.mark.parametrize("name", ["p3", "adobe"])
def test_a_photograph_in_a_wide_space_is_retouched_as_its_srgb_version(name):
    profile = adobe_rgb_profile() if name == "adobe" else p3_profile()
    source, _ = blemished_portrait()
    own = np.rint(libvips.from_srgb(source.astype(np.uint16) * 257, profile) / 257).astype(np.uint8)
    photo = Photo(own, "PNG", Space("RGB", profile))
    retoucher = autoretouch_jax.Retoucher.load()
    plain = retoucher(photo.seen()).astype(int)
    pixels, _ = retoucher.photograph(photo)
    assert (plain != photo.seen()).any(-1).mean() > 0.001
    assert np.abs(Photo(pixels, "PNG", photo.space).seen() - plain).max() <= 2
    untouched = (plain == photo.seen()).all(-1)
    np.testing.assert_array_equal(pixels[untouched], own[untouched])


def test_the_retoucher_takes_arrays_and_pictures():
    retoucher = autoretouch_jax.Retoucher.load()
    source, _ = blemished_portrait()
    full = retoucher(source)
    np.testing.assert_array_equal(np.asarray(retoucher(Image.fromarray(source))), full)
    np.testing.assert_array_equal(retoucher(source, strength=0.0), source)
    assert 0 < np.abs(retoucher(source, strength=0.5).astype(int) - source).sum() < np.abs(full.astype(int) - source).sum()
    np.testing.assert_allclose(retoucher(source / 255.0) * 255, full, atol=0.01)
    with pytest.raises(Refused, match="--face-size"):
        autoretouch_jax.Retoucher.load(face_size=-1)


def test_a_run_starts_from_it(module_pairs, tmp_path):
    config = load("finetune.py")
    assert resolve(config).train.start_from == "pretrained", "a name, and no path of this machine"
    pairs = {"source": str(module_pairs[0]), "target": str(module_pairs[1]), "crop": 64}
    trainer = Trainer(edited(config, data=pairs, parallel={"devices": 1}))
    started, shipped = trainer.init().generator.params, load_model("pretrained").variables["params"]
    np.testing.assert_array_equal(started["stem"]["kernel"], shipped["stem"]["kernel"])
    assert json.loads((PRETRAINED_FOLDER / "model.json").read_text())["generator"]["network"] == "retouch"
