"""The audit names each fault of a pair once, with its figure, and flags no honest retouch."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from autoretouch_jax.audit import checks, codecs, detail, direction, geometry
from autoretouch_jax.config import BlemishConfig
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.edits import Codec
from autoretouch_jax.demo import faces

SIDE = 320
BLEMISHES = BlemishConfig(
    per_megapixel=(400.0, 400.0), radius=(2.0, 6.0), patch=(4.0, 9.0), strength=(0.6, 0.95), clean_share=0.0
)
RESAMPLING = Image.Resampling


def levels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def made(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn face with the texture of skin, before and after blemishes were taken away."""
    rng = np.random.default_rng(number)
    texture = ndimage.gaussian_filter(rng.normal(0, 12, (SIDE, SIDE, 1)), (0.6, 0.6, 0))
    target = levels(faces.draw_face(number, SIDE) + texture)
    return add_blemishes(rng, target, BLEMISHES), target


SOURCE, TARGET = made(1)


def turned(image: np.ndarray, degrees: float, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Rotated anticlockwise about the middle, then enlarged, then shifted."""
    angle = np.radians(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - matrix @ (centre + shift)
    channels = [
        ndimage.affine_transform(x.astype(float), matrix, offset, order=3, mode="reflect") for x in np.moveaxis(image, -1, 0)
    ]
    return levels(np.stack(channels, -1))


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    picture = Image.fromarray(image)
    return np.asarray(picture.resize([round(side * factor) for side in picture.size], RESAMPLING.BICUBIC))


def checked(source: np.ndarray, target: np.ndarray, folder: Path, **saving) -> checks.CheckedPair:
    paths = folder / "source.png", folder / ("target.jpg" if saving else "target.png")
    for image, path, options in zip((source, target), paths, ({}, saving), strict=True):
        Image.fromarray(np.ascontiguousarray(image)).save(path, **options)
    return checks.check_pair("a", *paths)


def faults(pair: checks.CheckedPair) -> list[str]:
    return [reason.code for reason in pair.reasons if reason.severity != checks.NOTE]


FAULTS = {
    "swapped": (SOURCE, "swapped"),  # the source is TARGET then
    "rotated": (turned(TARGET, 1.0), "rotated by 1.0"),
    "clockwise": (turned(TARGET, -15.0), "° clockwise"),
    "scaled": (turned(TARGET, 0, 1.01), "at 101.0"),
    "shifted": (np.roll(TARGET, 3, 0), "pixels below and +0.00 right"),
    "mirrored": (TARGET[:, ::-1], "left to right;"),
    "mirrored down": (TARGET[::-1], "top to bottom;"),
    "turned": (np.rot90(TARGET), "turned by 90° anticlockwise"),
    "turned over": (np.rot90(TARGET, 2), "turned by 180° against"),
    "stranger": (made(7)[1], "another photograph"),
    "blank": (np.zeros_like(TARGET), "the colour (0, 0, 0)"),
    "blank white": (np.full_like(TARGET, 255), "target shows nothing"),
    "blurred": (levels(blurred(TARGET, 1.2)), "blur by 1."),
    "sharpened": (np.asarray(Image.fromarray(TARGET).filter(ImageFilter.UnsharpMask(1, 120, 0))), "% stronger"),
    "resampled": (resized(resized(TARGET, 0.5), 2.0), "smaller export"),
    "noisy": (levels(TARGET + np.random.default_rng(0).normal(0, 4, TARGET.shape)), "that the source has not"),
    "tone": (levels(TARGET + 6.0), "brightness or colour moves by"),
    "channels": (np.asarray(Image.fromarray(TARGET).convert("L").convert("RGB")), "target is grey"),
    "size": (resized(TARGET, 0.5), "exported at 50 %"),
    "size cropped": (TARGET[:, 10:], "cropped"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_named_once_with_its_figure(name, tmp_path):
    target, message = FAULTS[name]
    pair = checked(TARGET if name == "swapped" else SOURCE, target, tmp_path)
    code = {"clockwise": "rotated"}.get(name, name.split()[0])
    assert faults(pair) == [code], pair.reasons
    assert message in pair.reasons[0].message
    assert pair.weight < 1


def test_a_rotation_and_a_scale_are_two_faults_and_a_shift_belongs_to_them(tmp_path):
    pair = checked(SOURCE, turned(TARGET, 0.8, 1.012, (5, -7)), tmp_path)
    assert faults(pair) == ["rotated", "scaled"]
    assert pair.measures["degrees"] == pytest.approx(0.8, abs=0.05)
    assert pair.measures["scale"] == pytest.approx(1.012, abs=0.001)
    assert "+5.0 pixels below and -7.0 right" in pair.reasons[0].message


def test_a_quarter_turn_explains_exchanged_sides(tmp_path):
    upright = np.s_[:, 40:-40]
    assert faults(checked(SOURCE[upright], np.rot90(TARGET[upright], -1), tmp_path)) == ["turned"]


HALF = (np.arange(SIDE) < SIDE // 2)[None, :, None]
HONEST = {
    "blemishes": TARGET,
    "half the face smoothed": levels(np.where(HALF, blurred(TARGET, 2.0), TARGET)),
    "a part lightened": levels(TARGET + 8.0 * HALF * (np.arange(SIDE) > SIDE // 3)[:, None, None]),
    "eyes sharpened": np.concatenate([TARGET[:100], levels(2 * TARGET[100:140] - blurred(TARGET, 1.0)[100:140]), TARGET[140:]]),
}


@pytest.mark.parametrize("saving", [{}, {"quality": 95, "subsampling": 0}], ids=["png", "jpeg"])
@pytest.mark.parametrize("name", list(HONEST))
def test_an_honest_retouch_is_not_flagged(name, saving, tmp_path):
    pair = checked(SOURCE, HONEST[name], tmp_path, **saving)
    assert faults(pair) == [], pair.reasons
    assert pair.weight == 1


def test_a_jpeg_weighs_the_less_the_more_detail_it_lost(tmp_path):
    pairs = [checked(SOURCE, TARGET, tmp_path, quality=quality) for quality in (97, 70, 20)]
    weights = [pair.weight for pair in pairs]
    assert weights[0] == 1 > weights[1] > weights[2]
    assert [faults(pair) for pair in pairs] == [[], ["lossy_target"], ["lossy_target"]]
    note = pairs[0].reasons[0]
    assert note.code == "losses"
    assert f"up to {codecs.HARMLESS:.0%} do no harm" in note.message


def test_damage_is_what_saving_changes_and_not_the_edit():
    tables = (tuple([1] * 64), tuple([1] * 64))
    window = detail.mosaic(SOURCE)
    assert codecs.damage(window, codecs.saved_as(window, Codec("JPEG", tables, 0))) < 0.05
    assert codecs.saved_as(window, None) is window
    assert codecs.damage(window, np.zeros_like(window)) == pytest.approx(1, abs=0.01)
    assert [codecs.weight(x) for x in (0.1, 0.5, 0.9)] == [1.0, 0.5, 0.0]


def test_a_sub_pixel_shift_is_measured(tmp_path):
    x = TARGET.astype(float)
    half_way = levels((x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, (1, 1), (0, 1))) / 4)
    pair = checked(TARGET, half_way, tmp_path)
    assert faults(pair) == ["shifted"]
    assert pair.measures["shift"] == pytest.approx(np.hypot(0.5, 0.5), abs=0.1)


def test_windows_keep_to_the_blocks_of_a_jpeg_and_bound_the_size():
    y, x = np.mgrid[0:1500, 0:2100]
    places = detail.mosaic(np.stack([y // 16 % 256, x // 16 % 256, y % 16 * 16 + x % 16], -1).astype(np.uint8))
    assert places.shape == (1024, 1024, 3)
    offsets = places[..., 2].astype(int)
    assert (offsets[::16] // 16 == 0).all()
    assert (offsets[:, ::16] % 16 == 0).all()
    assert {places[0, 0, 0], places[-1, 0, 0]} == {0, (1500 - 128) // 16 + 7}


def test_spots_on_smooth_skin_decide_and_eyes_do_not():
    there, back = direction.compare(SOURCE, TARGET), direction.compare(TARGET, SOURCE)
    assert (there.before, there.after) == (back.after, back.before)
    assert back.is_swapped
    assert not there.is_swapped
    assert not direction.compare(SOURCE, HONEST["eyes sharpened"]).is_swapped
    assert not direction.Direction(2, 7).is_swapped
    assert direction.Direction(0, 4).is_swapped


def test_what_shows_nothing_to_align_is_not_called_a_stranger():
    even = levels(np.random.default_rng(0).normal(120, 1, (200, 200, 3)))
    for image in (even, SOURCE[:40, :40]):
        placement = geometry.place(image, image[::-1])
        assert placement.match == 1
        assert not placement.is_rotated


def test_what_saving_changed_is_no_edit(tmp_path):
    saved_again = checked(SOURCE, SOURCE, tmp_path, quality=95)
    assert faults(saved_again) == ["no_edit"]
    retouched = checked(SOURCE, TARGET, tmp_path, quality=95)
    assert not faults(retouched)
    # The share of the lossless pair, and not that of all pixels that saving has moved.
    true = float((SOURCE != TARGET).any(-1).mean())
    assert 0.6 * true < retouched.measures["edited_share"] < 1.2 * true
