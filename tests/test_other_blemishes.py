"""`benchmarks/other_blemishes.py` and `blended_blemishes.py`: pairs with blemishes drawn otherwise than in training."""

import importlib.util
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from skimage import data as skimage_data

from autoretouch_jax.data.face_parts import regions
from autoretouch_jax.data.faces import Face, find_faces
from autoretouch_jax.demo import faces


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def program():
    yield from loaded("other_blemishes")


@pytest.fixture(scope="module")
def blended():
    yield from loaded("blended_blemishes")


@pytest.fixture(scope="module")
def portrait():
    """A real portrait, its faces, and how far each pixel is skin."""
    clean = faces.portrait()
    found = find_faces(clean)
    return clean, found, regions(clean, found)[..., 0].astype(np.float32) / 255


@pytest.fixture
def run(program, monkeypatch, tmp_path):
    """Runs the command on a portrait. Returns source and target."""
    folder = tmp_path / "faces"
    folder.mkdir()
    Image.fromarray(faces.portrait()).save(folder / "a.png")

    def call(*arguments: str) -> tuple[np.ndarray, np.ndarray]:
        monkeypatch.setattr(sys, "argv", ["x", "--faces", str(folder), "--out", str(tmp_path / "out"), *arguments])
        program.main()
        source, target = (np.asarray(Image.open(tmp_path / "out" / side / "a.png")) for side in ("source", "target"))
        return source, target

    return call


def test_the_seed_decides_and_the_target_is_the_portrait(run, tmp_path, capsys):
    source, target = run()
    np.testing.assert_array_equal(target, faces.portrait())
    assert 0.01 < (source != target).any(-1).mean() < 0.2
    assert "1 portraits: identity PSNR" in capsys.readouterr().out
    # Another portrait in the folder changes nothing, and one without a face is left out.
    Image.fromarray(skimage_data.coffee()).save(tmp_path / "faces" / "0.png")
    again, _ = run()
    np.testing.assert_array_equal(again, source)
    assert not (tmp_path / "out" / "source" / "0.png").exists()
    assert (run("--seed", "1")[0] != source).any()


def test_blemishes_lie_on_skin_alone(program, portrait):
    clean, found, skin = portrait
    changed = np.zeros(clean.shape[:2], bool)
    for seed in range(6):
        blemished, count = program.add_other_blemishes(np.random.default_rng(seed), clean, skin, found)
        assert 10 < count < 65
        changed |= (blemished != clean).any(-1)
    assert not changed[skin == 0].any(), "hair, eyes, lips and cloth stay as they are"
    assert changed[skin > 0.5].mean() > 0.3


def test_strength_scales_the_blemishes(program, portrait):
    clean, found, skin = portrait

    def error(strength):
        blemished, _ = program.add_other_blemishes(np.random.default_rng(2), clean, skin, found, strength)
        return np.abs(blemished.astype(int) - clean).mean()

    assert error(0.0) == 0
    assert 1.5 * error(0.5) < error(1.0) < 2.5 * error(0.5)


def test_pigments_absorb_linear_light(program):
    grey = np.full((40, 40, 3), 180, np.uint8)
    whole = np.ones((40, 40), np.float32)

    def transmitted(pigment, depth):
        layers = program.Layers((40, 40))
        layers.add(pigment, (20, 20), np.full((9, 9), depth, np.float32))
        seen = layers.over(grey, whole, 1.0)
        np.testing.assert_array_equal(seen[:16], grey[:16])
        surface = program.SURFACE
        return (program.linear(seen)[20, 20] - surface) / (program.linear(grey)[20, 20] - surface)

    for pigment, absorbed in program.PIGMENTS.items():
        once, twice = transmitted(pigment, 0.4), transmitted(pigment, 0.8)
        np.testing.assert_allclose(once, np.exp(-0.4 * np.array(absorbed)), atol=0.01)
        np.testing.assert_allclose(twice, once**2, atol=0.02)


@pytest.mark.parametrize("family", ["pimple", "mark", "mole", "patch"])
def test_every_family_is_drawn_in_its_colour(program, family):
    skin = np.full((160, 160, 3), (205, 160, 140), np.uint8)
    changes = []
    for seed in range(8):
        layers = program.Layers(skin.shape[:2])
        program.PAINTERS[family](np.random.default_rng(seed), layers, (80, 80), 25.0 if family == "patch" else 6.0)
        seen = layers.over(skin, np.ones(skin.shape[:2], np.float32), 1.0)
        changes.append((seen.astype(float) - skin)[(seen != skin).any(-1)].mean(0))
    red, green, _ = np.mean(changes, axis=0)
    assert green < -2
    # Blood lets red light through. A mole is brown, and darker than the others.
    assert (red < -15) if family == "mole" else (0.6 * green < red)


def test_no_blemish_is_cut_off_by_its_own_square(program):
    edges = []

    class Watched(program.Layers):
        def add(self, name, centre, values):
            edges.append(np.abs(np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])).max())

    for seed in range(10):
        rng = np.random.default_rng(seed)
        for family, paint in program.PAINTERS.items():
            paint(rng, Watched((9, 9)), (0, 0), 25.0 if family == "patch" else 6.0)
        program.draw_shadows(rng, Watched((9, 9)), Face(0.0, 0.0, 200.0, 1.0))
    assert max(edges) < 0.003


def test_blemishes_at_the_border_are_cut_off(program):
    layers = program.Layers((20, 30))
    layers.add("blood", (0, 29), np.ones((9, 9), np.float32))
    layers.add("blood", (10, -40), np.ones((9, 9), np.float32))
    assert layers.maps["blood"].sum() == 25


def test_shadows_lie_below_the_eyes(program, portrait):
    clean, found, skin = portrait
    layers = program.Layers(skin.shape)
    program.draw_shadows(np.random.default_rng(0), layers, found[0])
    seen = layers.over(clean, skin, 1.0)
    rows, columns = np.nonzero((seen.astype(int) - clean).min(-1) < -3)
    down, right = (rows - found[0].y) / found[0].size, (columns - found[0].x) / found[0].size
    assert ((down > -0.22) & (down < 0)).all()
    assert (right < -0.1).any()
    assert (right > 0.1).any()
    assert layers.count == 2


# ---- out of the studio ------------------------------------------------------------------------------------------------------


def studio(side: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """A dark ellipse before a grey wall that is brighter on one side, and where the ellipse is."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    person = (x / 0.5) ** 2 + ((y - 0.5) / 1.45) ** 2 < 1
    wall = 200 + 15 * x + np.random.default_rng(0).normal(0, 1, x.shape)
    image = np.where(person[..., None], (150.0, 100.0, 80.0), wall[..., None])
    image[120:130, 75:85] = 200  # a collar of the wall's colour
    image[8:13, 78:83] = 200  # light on the hair, near the upper border
    return np.clip(image, 0, 255).astype(np.uint8), person


def test_a_person_is_cut_out_of_the_studio(program):
    image, person = studio()
    alpha = program.cut_out(image)
    assert ((alpha > 0.5) & person).sum() / ((alpha > 0.5) | person).sum() > 0.93
    assert alpha[125, 80] > 0.99
    assert alpha[10, 80] > 0.99
    assert alpha[5, 5] == 0


def test_another_light_and_background_are_on_both_sides(run, program, tmp_path, portrait):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(skimage_data.coffee()).save(photos / "coffee.png")
    source, target = run("--light", "--backgrounds", str(photos))
    clean, _, skin = portrait
    assert np.abs(target.astype(int) - clean).mean() > 3
    edited = (source != target).any(-1)
    assert edited.any()
    assert not edited[skin == 0].any()
    image, _ = studio()
    outdoors = program.relit(np.random.default_rng(0), image, [photos / "coffee.png"])
    assert outdoors[:40, :40].std() > 2 * program.relit(np.random.default_rng(0), image, [])[:40, :40].std()


def test_what_it_cannot_do_it_says(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--backgrounds", str(tmp_path))
    assert "--backgrounds needs --light" in capsys.readouterr().err
    (tmp_path / "faces" / "a.png").unlink()
    with pytest.raises(SystemExit):
        run()
    assert "no portrait with a face" in capsys.readouterr().err


def test_blended_blemishes_lie_on_skin_and_repeat(blended, portrait, tmp_path, monkeypatch, capsys):
    clean, found, skin = portrait
    draw = lambda seed: blended.add_blended_blemishes(np.random.default_rng(seed), clean, skin, found[0])  # noqa: E731
    changed = (draw(1) != clean).any(-1)
    assert not changed[skin == 0].any()
    assert 0.02 < changed[skin > 0].mean() < 0.9
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    folder = tmp_path / "faces"
    folder.mkdir()
    Image.fromarray(clean).save(folder / "a.png")
    Image.fromarray(skimage_data.coffee()).save(folder / "b.png")
    monkeypatch.setattr(sys, "argv", ["x", "--faces", str(folder), "--out", str(tmp_path / "out")])
    blended.main()
    assert [path.name for path in (tmp_path / "out" / "source").iterdir()] == ["a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "target" / "a.png")), clean)
    assert "1 pairs in" in capsys.readouterr().out


def test_blended_shadows_lie_below_the_eyes(blended, portrait):
    clean, found, skin = portrait
    usual = blended.Skin(clean.astype(np.float32), skin, np.array([200.0, 150.0, 130.0]))
    blended.draw_shadows(np.random.default_rng(0), usual, found[0])
    rows = np.nonzero((usual.image < clean.astype(np.float32) - 1).any(-1))[0]
    face = found[0]
    assert len(rows)
    assert face.y - 0.5 * face.size < rows.min() < rows.max() < face.y + 0.25 * face.size
