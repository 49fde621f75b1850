"""A trained model in use: it is loaded, evaluated, and retouches photographs of any size; and the demo from end to end."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data as skimage_data

from autoretouch_jax import cli
from autoretouch_jax.config import AutoRetouch
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import Refused
from autoretouch_jax.evaluation import metrics
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.inference.tiles import Axis, Plan, network_output
from autoretouch_jax.models.autoretouch import AutoRetouchGenerator
from autoretouch_jax.models.folder import Model, load_model, save_model


def random_model(**changes) -> Model:
    """A generator with random weights in every layer, so that it changes every pixel."""
    config = AutoRetouch(**({"width": 4, "blocks": 1, "norm": "none", "head": "residual"} | changes))
    variables = jax.jit(AutoRetouchGenerator(config).init)(jax.random.key(0, impl="rbg"), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    return Model(config, jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), variables))


@pytest.fixture
def model_folder(tmp_path):
    model = random_model()
    save_model(tmp_path / "run" / "model", model, 3)
    return tmp_path / "run"


# ---- applying a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (37, 50), (64, 64), (131, 70)])
def test_any_size_comes_back_and_the_tile_size_does_not_show(size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    model = random_model()
    whole = retouch_array(model, image)
    assert whole.shape == image.shape
    assert whole.dtype == np.uint8
    assert (whole != image).any()
    halo = model.config.receptive_radius
    tiled, _ = network_output(model, image, Plan(*(Axis(-(-side // 64) * 64, 64, halo) for side in size)))
    assert np.abs(whole.astype(int) - tiled).max() <= 1, "float32 rounding may tip a level, nothing more"
    assert (whole != tiled).mean() < 0.01


@pytest.mark.parametrize("blocks", [0, 2])
def test_no_pixel_sees_beyond_the_receptive_radius(blocks):
    model = random_model(blocks=blocks)
    radius, size = model.config.receptive_radius, 128
    image = np.full((1, size, size, 3), 0.1, np.float32)
    poked = image.copy()
    poked[0, size // 2, size // 2] += 0.5
    apply = AutoRetouchGenerator(model.config).apply
    change = np.abs(np.asarray(apply(model.variables, poked) - apply(model.variables, image))).max((0, 3))
    rows = np.flatnonzero(change.max(1))
    assert max(size // 2 - rows.min(), rows.max() - size // 2) <= radius
    assert rows.max() - size // 2 >= radius - 6, "the bound is tight enough not to waste work"


def test_strength_and_dead_zone():
    image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    model = random_model()
    full, half = retouch_array(model, image), retouch_array(model, image, strength=0.5)
    np.testing.assert_array_equal(retouch_array(model, image, strength=0.0), image)
    expected = image + 0.5 * (full.astype(float) - image)
    assert np.abs(half - expected).max() <= 0.5
    change = np.abs(full.astype(int) - image).max(-1)
    level = int(np.median(change))
    gated = retouch_array(Model(AutoRetouch(**{**vars(model.config), "dead_zone": level}), model.variables), image)
    np.testing.assert_array_equal(gated[change <= level], image[change <= level])
    np.testing.assert_array_equal(gated[change > level], full[change > level])


def test_an_untrained_residual_generator_is_the_identity():
    config = AutoRetouch(width=4, blocks=1, norm="none", head="residual")
    variables = jax.jit(AutoRetouchGenerator(config).init)(jax.random.key(0, impl="rbg"), np.zeros((1, 32, 32, 3), np.float32))
    image = np.random.default_rng(1).integers(0, 256, (33, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(retouch_array(Model(config, variables), image), image)


def test_a_saved_model_is_the_same_model(model_folder):
    image = faces.draw_face(0, 64)
    expected = retouch_array(random_model(), image)
    for folder in (model_folder, model_folder / "model"):
        np.testing.assert_array_equal(retouch_array(load_model(folder), image), expected)


@pytest.mark.parametrize("fault", ["no model", "cut weights", "other blocks", "not json"])
def test_a_broken_model_is_refused_by_name(model_folder, fault):
    home = model_folder / "model"
    if fault == "no model":
        (home / "model.json").unlink()
    elif fault == "cut weights":
        (home / "model.safetensors").write_bytes((home / "model.safetensors").read_bytes()[:-100])
    elif fault == "not json":
        (home / "model.json").write_text("{")
    else:
        (home / "model.json").write_text((home / "model.json").read_text().replace('"blocks": 1', '"blocks": 2'))
    with pytest.raises(Refused, match="run"):
        load_model(model_folder)


# ---- metrics and evaluate -----------------------------------------------------------------------------------------------


def test_edit_metrics_by_hand():
    source = np.full((12, 12, 3), 100, np.uint8)
    target = source.copy()
    target[:2] = 110  # the edit: 24 pixels
    output = source.copy()
    output[0] = 110  # half of it done
    output[5, 0, 0] = 103  # and one sample outside touched
    values = metrics.compare(source, target, output)
    assert values["edit_recovered"] == pytest.approx(0.5)
    assert values["outside_error"] == pytest.approx(3 / (120 * 3))
    assert values["edit_psnr"] == pytest.approx(10 * np.log10(255**2 / 50))
    identity = metrics.compare(source, target, source)
    assert identity["edit_psnr"] == pytest.approx(10 * np.log10(255**2 / 100))


def test_what_a_pair_does_not_have_is_null_left_out_and_counted():
    image = np.full((12, 12, 3), 100, np.uint8)
    untouched = metrics.compare(image, image, image)
    assert untouched["psnr_rgb_u8"] == pytest.approx(58.92, abs=0.01)
    assert untouched["edit_psnr"] is None
    assert untouched["edit_recovered"] is None
    assert untouched["outside_error"] == 0
    everywhere = metrics.compare(image, image + np.uint8(1), image)
    assert everywhere["edit_recovered"] == 0
    assert everywhere["outside_error"] is everywhere["outside_identical"] is None
    assert metrics.ssim(image[:5], image[:5]) is None
    mean = metrics.mean([{"a": None, "b": 1.0}, {"a": 3.0, "b": 2.0}, {"a": None, "b": 3.0}])
    assert mean == {"a": 3.0, "b": 2.0, "n": {"a": 1, "b": 3}}


def test_evaluate_writes_the_table_the_json_and_the_pictures(model_folder, pair_folders, tmp_path, capsys):
    source, target = map(str, pair_folders)
    out = tmp_path / "numbers" / "eval.json"
    argv = ["evaluate", str(model_folder), "--source", source, "--target", target, "--json", str(out)]
    assert cli.main([*argv, "--pictures", str(tmp_path / "pictures")]) == 0
    assert "identity" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result.keys() == {"n", "protocol", "edit_threshold", "faces", "identity", "model", "images"}
    assert result["n"] == len(result["images"]) == 4
    assert "threshold measured for each pair" in result["protocol"]
    assert result["identity"].keys() == result["model"].keys()
    assert result["model"].keys() == {
        "psnr_pooled",
        "edit_psnr_pooled",
        "psnr_rgb_u8",
        "ssim_rgb_u8_gauss11",
        "edit_psnr",
        "edit_recovered",
        "edit_recovered_interval",
        "edit_recovered_ungated",
        "outside_error",
        "outside_identical",
        "change_skin",
        "change_eyes",
        "change_mouth",
        "change_hair",
        "change_background",
        "n",
    }
    sums = [image["model"]["sums"] for image in result["images"]]
    left, drawn = (sum(image[name] for image in sums) for name in ("left", "drawn"))
    assert result["model"]["edit_recovered"] == 1 - left / drawn
    assert Image.open(tmp_path / "pictures" / "nested" / "face0.png").size == (4 * 96, 96)


def test_evaluate_sees_harm_alone_and_beside_pairs(model_folder, pair_folders, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "eval.json"
    photos.mkdir()
    for name in ("door", "boat"):
        Image.fromarray(faces.draw_face(9, 64)).save(photos / f"{name}.png")
    argv = ["evaluate", str(model_folder), "--leave-alone", str(photos), "--json", str(out), "--faces", "off"]
    assert cli.main([*argv, "--pictures", str(tmp_path / "pictures")]) == 0
    text = capsys.readouterr().out
    assert "leave-alone identical" in text
    assert "changed most, though nothing should change: boat, door" in text
    result = json.loads(out.read_text())
    assert result["n"] == 0
    assert result["model"]["alone_error"] > 0
    assert result["model"]["alone_identical"] == np.mean([photo["model"]["alone_identical"] for photo in result["alone"]])
    assert (tmp_path / "pictures" / "leave_alone" / "boat.png").is_file()
    pairs = ["--source", str(pair_folders[0]), "--target", str(pair_folders[1])]
    assert cli.main(["evaluate", str(model_folder), str(model_folder), *argv[2:], *pairs]) == 0
    both = json.loads(out.read_text())
    assert both["n"] == 4
    assert {"edit_recovered", "alone_identical"} <= both["models"]["run-2"].keys()
    assert both["model"]["alone_error"] == result["model"]["alone_error"]


@pytest.mark.parametrize("extra", [[], ["--source", "a"], ["--target", "b", "--leave-alone", "c"]])
def test_evaluate_wants_pairs_or_photographs(model_folder, capsys, extra):
    assert cli.main(["evaluate", str(model_folder), *extra]) == 2
    assert "--leave-alone" in capsys.readouterr().err


def test_a_change_is_told_by_part():
    source = np.full((8, 8, 3), 100, np.uint8)
    output, edit = source.copy(), np.zeros((8, 8), bool)
    output[0], edit[:4] = 110, True
    output[5] = 104
    parts = {name: np.zeros((8, 8), bool) for name in ("skin", "eyes", "mouth", "hair", "background")}
    parts["skin"][:6], parts["hair"][6:] = True, True
    values = metrics.change_by_part(source, output, parts, edit)
    assert values["change_skin"] == pytest.approx(2.0), "outside the edit: rows 4 and 5"
    assert values["change_hair"] == 0
    assert values["change_eyes"] is None
    assert set(metrics.change_by_part(source, output, {}, edit).values()) == {None}


def test_evaluate_survives_one_bad_pair_and_says_so(model_folder, pair_folders, tmp_path, capsys):
    path = pair_folders[0] / "nested" / "face1.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF  # a flipped byte: header and trailer stay good
    path.write_bytes(data)
    out = tmp_path / "eval.json"
    folders = ["--source", str(pair_folders[0]), "--target", str(pair_folders[1])]
    assert cli.main(["evaluate", str(model_folder), *folders, "--json", str(out)]) == 1
    assert "face1.png" in capsys.readouterr().err
    assert json.loads(out.read_text())["n"] == 3


# ---- retouch ------------------------------------------------------------------------------------------------------------


def test_retouch_keeps_size_format_profile_exif_and_alpha(model_folder, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    photos = tmp_path / "photos"
    photos.mkdir()
    face = Image.fromarray(faces.draw_face(0, 96)).crop((0, 0, 95, 61))
    face.save(photos / "a.jpg", icc_profile=profile, exif=exif, quality=90)
    face.convert("L").save(photos / "b.png")
    veiled = face.convert("RGBA")
    veiled.putalpha(90)
    veiled.save(photos / "c.webp", lossless=True, exact=True)
    out = tmp_path / "out"
    assert cli.main(["retouch", str(photos), "--model", str(model_folder), "--out", str(out)]) == 0
    for path in photos.iterdir():
        with Image.open(path) as before, Image.open(out / path.name) as after:
            assert (after.size, after.mode, after.format) == (before.size, before.mode, before.format)
            assert np.asarray(after).tobytes() != np.asarray(before).tobytes()
    with Image.open(out / "a.jpg") as after:
        assert after.info["icc_profile"] == profile
        assert after.getexif()[0x0112] == 6
    with Image.open(out / "c.webp") as after:
        assert after.getchannel("A").getextrema() == (90, 90)
    assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "b.png", "c.webp"]


def test_a_photograph_without_a_face_comes_back_as_the_same_file(model_folder, tmp_path, capsys):
    description = json.loads((model_folder / "model" / "model.json").read_text())
    (model_folder / "model" / "model.json").write_text(json.dumps(description | {"face_size": 100.0}))
    photo, out = tmp_path / "coffee.jpg", tmp_path / "out"
    Image.fromarray(skimage_data.coffee()).save(photo, quality=71)
    argv = ["retouch", str(photo), "--model", str(model_folder), "--out", str(out)]
    assert cli.main(argv) == 0
    assert (out / "coffee.jpg").read_bytes() == photo.read_bytes()
    assert "no face found, written unchanged: coffee.jpg" in capsys.readouterr().out
    assert cli.main([*argv, "--faces", "off"]) == 0
    assert (out / "coffee.jpg").read_bytes() != photo.read_bytes()
    assert cli.main([*argv, "--face-size", "0"]) == 2
    assert "--face-size" in capsys.readouterr().err
    # The old form, with the model first, must not retouch the samples in the run's folder.
    assert cli.main(["retouch", str(model_folder), str(photo), "--out", str(out)]) == 2
    assert f"--model {model_folder}" in capsys.readouterr().err


def test_retouch_does_the_rest_when_one_photo_is_broken(model_folder, tmp_path, capsys):
    Image.fromarray(faces.draw_face(0, 64)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    photos = [str(tmp_path / "bad.png"), str(tmp_path / "good.png")]
    assert cli.main(["retouch", *photos, "--model", str(model_folder), "--out", str(tmp_path / "out")]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["missing.png", "--out", "out"], "missing.png"), (["{photo}", "--out", "{folder}"], "overwrite itself"),
     (["{photo}", "--out", "out", "--strength", "2"], "--strength")],
)  # fmt: skip
def test_retouch_refuses_before_it_writes(model_folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.png"
    Image.fromarray(faces.draw_face(0, 64)).save(photo)
    before = photo.read_bytes()
    filled = [argument.format(photo=photo, folder=photo.parent) for argument in arguments]
    assert cli.main(["retouch", *filled, "--model", str(model_folder)]) == 2
    assert message in capsys.readouterr().err
    assert photo.read_bytes() == before
    assert not (tmp_path / "out").exists()


# ---- the demo -----------------------------------------------------------------------------------------------------------


def test_the_demo_is_an_ordinary_run(tmp_path, monkeypatch, capsys):
    from autoretouch_jax.demo import demo

    monkeypatch.setattr(demo, "TRAINING_FACES", 4)
    monkeypatch.setattr(demo, "TRAINING_PHOTOS", 4)
    monkeypatch.setattr(demo, "HELD_OUT_FACES", 1)
    monkeypatch.setattr(demo, "steps_for", lambda *_: 3)
    smaller = ["--generator.width", "8", "--generator.levels", "2"]  # it compiles in a quarter of the time
    config = demo.load("demo.py")
    small = dataclasses.replace(config, generator=dataclasses.replace(config.generator, width=8, levels=2))
    monkeypatch.setattr(demo, "load", lambda _: small)
    workdir = tmp_path / "demo"
    assert cli.main(["demo", "--workdir", str(workdir), "--minutes", "0.01"]) == 0
    first = capsys.readouterr().out
    assert "identity" in first
    assert "portrait.png" in first
    assert Image.open(workdir / "photographs.png").size == (4 * 420, 30 + 3 * 420)
    result = json.loads((workdir / "eval.json").read_text())
    assert [image["name"] for image in result["images"]] == ["drawn0", "portrait"]
    assert all(image["identity"]["edit_psnr"] is not None for image in result["images"])
    held_out = workdir / "data" / "heldout"
    again = [
        "evaluate",
        str(workdir),
        "--faces",
        "off",
        "--source",
        str(held_out / "source"),
        "--target",
        str(held_out / "target"),
    ]
    assert cli.main([*again, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == result
    train = ["train", "configs/demo.py", "--workdir", str(workdir), "--data.root", str(workdir / "data" / "train")]
    assert cli.main([*train, *smaller, "--train.steps", "4", "--train.batch", "8"]) == 0
    assert cli.main(["demo", "--workdir", str(workdir)]) == 0
    assert "finished, 4 of 4 steps" in capsys.readouterr().out


def test_demo_time_becomes_steps_after_warm_up(small_config):
    from autoretouch_jax.demo import demo

    few, many = demo.steps_for(small_config, 0.01), demo.steps_for(small_config, 1.0)
    assert demo.FEWEST_STEPS <= few < many
