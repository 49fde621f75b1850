"""Faces: found at every size and turn, where their parts are, and the edit that is brought back to the photograph."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image
from skimage import data as skimage_data

from autoretouch_jax.config import Retouch
from autoretouch_jax.data.face_parts import PARTS, find_living_faces, parts, regions
from autoretouch_jax.data.faces import Face, find_faces, scaled
from autoretouch_jax.inference import edit as edit_module
from autoretouch_jax.inference.edit import apply_edit, find_edit
from autoretouch_jax.models.folder import Model


def hopper() -> np.ndarray:
    """Grace Hopper, US Navy, public domain: a face of about 240 pixels."""
    return np.asarray(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    return scaled(image, [], factor)[0]


# ---- finding ----------------------------------------------------------------------------------------------------------------


def test_a_face_is_found_and_nothing_else():
    (face,) = find_faces(hopper())
    assert abs(face.x - 262) < 20
    assert abs(face.y - 235) < 30
    assert 190 < face.size < 270
    assert len(find_faces(skimage_data.astronaut())) == 1
    for photo in (skimage_data.chelsea(), skimage_data.coffee(), skimage_data.rocket()):
        assert find_faces(photo) == []
    assert find_faces(np.zeros((1, 9, 3), np.uint8)) == []


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.7])
def test_its_size_follows_the_photograph(factor):
    (face,), (other,) = find_faces(hopper()), find_faces(resized(hopper(), factor))
    assert other.size == pytest.approx(factor * face.size, rel=0.08)
    assert other.x == pytest.approx(factor * face.x, abs=0.06 * other.size)


@pytest.mark.parametrize("change", ["turned", "dark", "one eye hidden", "three"])
def test_faces_turned_dark_hidden_and_several(change):
    photo = Image.fromarray(hopper()[:420])
    if change == "turned":
        photo = photo.rotate(25, Image.Resampling.BICUBIC, fillcolor=(60, 60, 60))
    elif change == "dark":
        photo = photo.point(lambda level: level // 5)
    elif change == "one eye hidden":
        photo.paste((20, 20, 20), (300, 160, 370, 230))
    else:
        single = photo
        photo = Image.new("RGB", (3 * single.width, single.height))
        for i in range(3):
            photo.paste(single, (i * single.width, 0))
    assert len(find_faces(np.asarray(photo))) == (3 if change == "three" else 1)


def test_a_statue_in_a_coloured_photograph_is_no_face():
    statue = np.array(hopper())
    statue[:, :] = statue.mean(-1, keepdims=True)
    assert len(find_living_faces(statue)) == 1, "a black-and-white photograph has faces"
    statue[420:] = (200, 90, 30)
    assert find_living_faces(statue) == []


def test_a_face_under_green_light_is_a_face():
    green = np.clip(hopper() * np.array([0.75, 1.05, 0.8]), 0, 255).astype(np.uint8)
    assert len(find_living_faces(green)) == 1


def test_threads_may_look_at_once():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(find_faces, [skimage_data.astronaut()] * 8))
    assert all(faces == found[0] for faces in found)


# ---- parts ------------------------------------------------------------------------------------------------------------------


def test_regions_are_bare_skin_and_the_hollows_below_the_eyes():
    photo = resized(skimage_data.astronaut()[:256, 96:352], 2.5)
    (face,) = find_faces(photo)
    skin, hollow = np.moveaxis(regions(photo, [face]), -1, 0)

    def at(layer: np.ndarray, right: float, down: float) -> float:
        y, x = int(face.y + down * face.size), int(face.x + right * face.size)
        return float(np.median(layer[y - 6 : y + 7, x - 6 : x + 7]))

    assert at(skin, -0.28, 0.02) > 200
    assert at(skin, 0.0, 0.4) > 200
    for eye in (-0.2, 0.2):
        assert at(skin, eye, -0.22) == 0
        assert at(hollow, eye, -0.13) > 60
    assert at(skin, 0, 0.2) == 0, "the mouth is no bare skin"
    assert skin[:20, :20].max() == 0
    assert hollow[skin == 0].max() == 0
    assert (hollow > 60).sum() < 0.1 * (skin > 127).sum()


def test_every_pixel_is_in_one_part():
    photo = hopper()
    found = parts(photo, find_faces(photo))
    assert set(found) == set(PARTS)
    assert (np.sum(list(found.values()), axis=0) == 1).all()
    assert parts(photo, []) == {}
    outside = parts(photo, [Face(-900.0, -900.0, 100.0, 1.0), Face(9000.0, 9000.0, 100.0, 1.0)])
    assert outside["background"].all(), "a face that lies outside the photograph has no parts in it"


# ---- the edit ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def darkening(monkeypatch):
    """A network that darkens by eight levels whatever it is shown, and remembers the sizes."""
    seen = []

    def network_output(model, image, tile=512):
        seen.append(image.shape[:2])
        return image - np.minimum(image, 8), np.ones(image.shape[:2], np.float32)

    monkeypatch.setattr(edit_module, "network_output", network_output)
    return seen


def model(face_size: float | None) -> Model:
    return Model(Retouch(width=4, levels=2, blocks=1), {}, face_size=face_size)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_an_edit_covers_the_face_at_any_size_and_nothing_far_away(darkening, factor):
    photo = np.clip(resized(hopper(), factor), 8, 255)
    (face,) = find_faces(photo)
    found = find_edit(model(230.0), photo)
    assert found.faces == [face]
    change = found.change[int(face.y), int(face.x)]
    assert (change == -8).all()
    far = np.hypot(np.arange(photo.shape[0])[:, None] - face.y, np.arange(photo.shape[1])[None, :] - face.x) > 1.3 * face.size
    assert (found.change[far] == 0).all()
    # The network saw the face near the size that it was trained at.
    margin = model(230.0).config.receptive_radius
    assert 0.7 * 1.6 * 230 < min(darkening[0]) - 2 * margin < 1.4 * 1.6 * 230


def test_a_face_close_to_the_trained_size_is_not_resampled(darkening):
    photo = hopper()
    (face,) = find_faces(photo)
    net = model(1.25 * face.size)
    find_edit(net, photo)
    area, _ = edit_module._window(photo, face)
    margin = net.config.receptive_radius + 1
    assert darkening == [tuple(part.stop - part.start + 2 * margin for part in area)]


def test_around_a_face_the_photograph_is_mirrored_beyond_its_border(monkeypatch):
    shown = []
    monkeypatch.setattr(edit_module, "network_output", lambda model, image, plan: (shown.append(image), (image // 2, None))[1])
    photo = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    net = model(100.0)
    margin = net.config.receptive_radius + 1
    channels, _ = edit_module._scaled_edit(net, photo, np.s_[2:50, 90:120], 1.0)
    after = max(0, 50 + margin - 100)
    expected = np.pad(photo, ((margin - 2, after), (0, margin), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(shown[0][: margin + 48], expected[: margin + 48, 90 - margin :])
    area = photo[2:50, 90:120].astype(int)
    np.testing.assert_array_equal(np.stack(list(channels), -1), area // 2 - area)


def test_around_a_face_the_network_gives_what_it_gives_on_the_whole_photograph():
    import jax

    from autoretouch_jax.inference.tiles import network_output
    from autoretouch_jax.models.modules import make_generator

    config = Retouch(width=4, levels=2, blocks=1)
    shapes = jax.eval_shape(make_generator(config).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    net = Model(config, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes))
    image, margin = rng.integers(0, 256, (128, 192, 3), dtype=np.uint8), config.receptive_radius + 1
    # What the network is shown starts at multiples of its grid, as its strides do in the whole photograph.
    area = np.s_[margin + 8 : margin + 70, margin + 4 : margin + 90]
    whole, mask = network_output(net, image)
    channels, own_mask = edit_module._scaled_edit(net, image, area, 1.0)
    assert np.abs(np.stack(list(channels), -1) + image[area] - whole[area]).max() <= 1
    np.testing.assert_allclose(own_mask, mask[area], atol=1e-4)


def test_without_a_face_nothing_changes_and_off_takes_the_whole(darkening):
    photo = skimage_data.coffee()
    found = find_edit(model(230.0), photo)
    np.testing.assert_array_equal(apply_edit(model(230.0).config, photo, found), photo)
    assert found.faces == []
    assert not darkening
    assert (find_edit(model(230.0), photo, "off").change <= 0).all()
    assert darkening == [photo.shape[:2]]
    assert find_edit(model(None), photo).faces is None, "a model trained without faces takes the whole photograph"


def test_the_gate_is_stricter_where_no_face_was_looked_for(monkeypatch):
    mask = np.full((200, 200), 0.5, np.float32)
    monkeypatch.setattr(edit_module, "network_output", lambda model, image, tile=512: (image - np.minimum(image, 8), mask))
    photo = np.full((200, 200, 3), 90, np.uint8)
    config = Retouch(width=4, levels=2, blocks=1, gate=0.3, gate_off_faces=0.7)
    changed = lambda net: (apply_edit(config, photo, find_edit(net, photo, "off")) != photo).any()  # noqa: E731
    assert not changed(Model(config, {}, face_size=100.0))
    assert changed(Model(config, {})), "a model that knows no faces has one gate"


def test_two_faces_side_by_side_share_their_border_and_overlap_nothing(darkening):
    two = np.concatenate([hopper()[:420, 100:420]] * 2, axis=1)
    found = find_edit(model(230.0), two)
    assert len(found.faces) == 2
    assert found.change.min() >= -8, "where two faces meet, one of their edits is taken"
