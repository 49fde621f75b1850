"""The definition of the edit: what is the retoucher's, and what saving changed."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFilter
from test_images import p3_profile

from autoretouch_jax.config import Config, DataConfig
from autoretouch_jax.config.validation import validate
from autoretouch_jax.data import edits
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.images import as_stored
from autoretouch_jax.data.sources import whole
from autoretouch_jax.errors import Refused

SIDE = 384


def skin(seed: int) -> np.ndarray:
    """A picture with soft shapes, fine texture and a flat border, as photographs have."""
    rng = np.random.default_rng(seed)
    noise = [rng.normal(0, 1, (SIDE // scale, SIDE // scale)).astype(np.float32) for scale in (48, 12, 1)]
    layers = [
        np.asarray(Image.fromarray(layer).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * strength
        for layer, strength in zip(noise, (22, 8, 4), strict=True)
    ]
    image = np.array([196.0, 148.0, 126.0]) + sum(layers)[..., None] * np.array([1.0, 0.9, 0.8])
    image[:40] = 240.0
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def retouched(image: np.ndarray, seed: int) -> np.ndarray:
    """Two dozen spots replaced by the skin beside them, with soft borders."""
    rng, out = np.random.default_rng(seed), image.astype(np.float32)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    calm = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(6))).astype(np.float32) + 7
    for _ in range(24):
        row, column = rng.integers(70, SIDE - 30, 2)
        alpha = np.clip((rng.uniform(6, 16) - np.hypot(rows - row, columns - column)) / 3 + 0.5, 0, 1)[..., None]
        out = out * (1 - alpha) + calm * alpha
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray, **options: int) -> Path:
    Image.fromarray(image).save(path, **options)
    return path


def rates(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Precision and recall."""
    both = float((found & true).sum())
    return both / max(1, found.sum()), both / true.sum()


def saved_pair(case: str, folder: Path, seed: int) -> tuple[Path, Path, np.ndarray]:
    """Files of a pair that was saved as `case` says, and the true edit."""
    original = skin(seed)
    if case == "png to jpeg":
        source, before = save(folder / "s.png", original), original
    else:
        source = save(folder / "s.jpg", original, quality=92 if case == "camera" else 95)
        before = np.asarray(Image.open(source).convert("RGB"))
    after = retouched(before, seed)
    sampling = {"subsampling": 0} if case == "camera" else {}
    return source, save(folder / "t.jpg", after, quality=95, **sampling), (before != after).any(-1)


@pytest.mark.parametrize("case", ["camera", "jpeg to jpeg", "png to jpeg"])
def test_the_edit_is_told_from_what_saving_changes(case: str, tmp_path: Path) -> None:
    measured = []
    for seed in range(4):
        source, target, true = saved_pair(case, tmp_path, seed)
        before, after = edits.read_pair(source, target)
        measured.append(rates((before != after).any(-1), true))
        raw = np.asarray(Image.open(target).convert("RGB")) != np.asarray(Image.open(source).convert("RGB"))
        assert rates(raw.any(-1), true)[0] < 0.75  # any difference would be a poor definition
    precision, recall = np.mean(measured, 0)
    assert precision > 0.9
    assert recall > 0.9


def test_another_encoder_is_allowed_for(tmp_path: Path) -> None:
    before = skin(0)
    after = retouched(before, 0)
    noisy = np.clip(after + np.random.default_rng(0).integers(-1, 2, after.shape), 0, 255).astype(np.uint8)
    target = save(tmp_path / "t.jpg", noisy, quality=95)
    source = save(tmp_path / "s.png", before)
    codecs = (edits.codec_of(source), edits.codec_of(target))
    decoded = np.asarray(Image.open(target).convert("RGB"))
    # Nothing is reproduced here, so the threshold of a JPEG that is would take noise for edits.
    low = edits.edit_mask(before, decoded, 0.5, codecs)
    assert low.mean() > edits.edit_mask(before, decoded, None, codecs).mean()
    visible = np.abs(before.astype(int) - after).max(-1) >= 4
    precision, recall = rates(edits.edit_mask(before, decoded, None, codecs), visible)
    assert precision > 0.6  # faint borders of the edit are found too, and count as wrong here
    assert recall > 0.9


def test_pairs_without_losses_are_exact(tmp_path: Path) -> None:
    source, after = skin(1), retouched(skin(1), 1)
    after[5, 5] = source[5, 5] + 1  # a single level in a single pixel is an edit
    paths = save(tmp_path / "s.png", source), save(tmp_path / "t.png", after)
    before, target = edits.read_pair(*paths)
    np.testing.assert_array_equal(target, after)
    assert edits.edit_mask(before, target)[5, 5]


def test_a_lossless_target_made_from_a_jpeg_is_exact(tmp_path: Path) -> None:
    source = save(tmp_path / "s.jpg", skin(2), quality=90)
    before = np.asarray(Image.open(source).convert("RGB"))
    after = retouched(before, 2)
    target = save(tmp_path / "t.png", after)
    np.testing.assert_array_equal(edits.read_pair(source, target)[1], after)


def test_a_given_threshold_decides(tmp_path: Path) -> None:
    source, target, true = saved_pair("png to jpeg", tmp_path, 3)
    exact = edits.read_pair(source, target, 0)
    np.testing.assert_array_equal(exact[1], np.asarray(Image.open(target).convert("RGB")))
    shares = [np.mean((np.not_equal(*edits.read_pair(source, target, level))).any(-1)) for level in (0.5, 2.0, 8.0)]
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < true.mean()


def test_a_turned_jpeg_is_saved_again_as_it_is_stored(tmp_path: Path) -> None:
    before = skin(8)[:, : SIDE - 28]  # sides that are no multiples of 8, so that the squares lie elsewhere
    after = retouched(skin(8), 8)[:, : SIDE - 28]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    target = tmp_path / "t.jpg"
    Image.fromarray(as_stored(after, 6)).save(target, quality=95, exif=exif)
    mask = np.not_equal(*edits.read_pair(save(tmp_path / "s.png", before), target)).any(-1)
    assert min(rates(mask, (before != after).any(-1))) > 0.85


def test_untouched_jpegs_have_no_edit(tmp_path: Path) -> None:
    source = save(tmp_path / "s.png", skin(4))
    target = save(tmp_path / "t.jpg", skin(4), quality=95)
    before, after = edits.read_pair(source, target)
    np.testing.assert_array_equal(before, after)


def test_codecs_are_recognised(tmp_path: Path) -> None:
    image = skin(0)[:64, :64]
    assert edits.codec_of(save(tmp_path / "a.png", image)) is None
    assert edits.codec_of(save(tmp_path / "a.tif", image)) is None
    fine, coarse = (edits.codec_of(save(tmp_path / f"{q}.jpg", image, quality=q)) for q in (95, 60))
    assert fine
    assert coarse
    assert fine.threshold < coarse.threshold
    for lossless in (True, False):
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "WEBP", lossless=lossless, quality=90)
        assert (edits.codec_of(packed) is None) == lossless


def test_a_lossy_webp_is_measured_by_its_own_noise(tmp_path: Path) -> None:
    before = skin(5)
    after = retouched(before, 5)
    source, target = save(tmp_path / "s.png", before), save(tmp_path / "t.webp", after, quality=95)
    mask = np.not_equal(*edits.read_pair(source, target)).any(-1)
    visible = np.abs(before.astype(int) - after).max(-1) >= 5
    assert rates(mask, visible)[1] > 0.8
    assert mask[:40].mean() < 0.02  # the flat border was not edited


def test_sources_cut_exact_pairs(tmp_path: Path) -> None:
    folders = [tmp_path / side for side in ("source", "target")]
    for folder in folders:
        folder.mkdir()
    source, target, true = saved_pair("camera", tmp_path, 6)
    source.rename(folders[0] / "a.jpg")
    target.rename(folders[1] / "a.jpg")
    pair = whole(PairSource(*folders)[0])
    precision, recall = rates((pair["source"] != pair["target"]).any(-1), true)
    assert min(precision, recall) > 0.85
    everything = whole(PairSource(*folders, edit_threshold=0.0)[0])
    assert (everything["source"] != everything["target"]).any(-1).mean() > 2 * true.mean()


def test_a_threshold_is_refused_where_nothing_would_use_it() -> None:
    for data in (DataConfig(records="r", edit_threshold=2.0), DataConfig(source="a", target="b", edit_threshold=-1.0)):
        with pytest.raises(Refused, match="edit-threshold"):
            validate(replace(Config(), data=data))


def test_a_pair_in_two_profiles_is_not_edited_everywhere(tmp_path: Path) -> None:
    profile = p3_profile()
    wide = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    to_wide = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), wide, "RGB", "RGB")
    source, after = skin(7), retouched(skin(7), 7)
    paths = tmp_path / "s.png", tmp_path / "t.png"
    to_wide.apply(Image.fromarray(source)).save(paths[0], icc_profile=profile)
    Image.fromarray(after).save(paths[1])
    mask = np.not_equal(*edits.read_pair(*paths)).any(-1)
    assert mask[:40].mean() < 0.01  # the border was not edited
    visible = np.abs(source.astype(int) - after).max(-1) >= 5
    assert rates(mask, visible)[1] > 0.9


def test_bands_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, _ = saved_pair("camera", tmp_path, 9)
    whole_frame = edits.read_pair(source, target)[1]
    monkeypatch.setattr(edits, "BAND", 37)
    np.testing.assert_array_equal(edits.read_pair(source, target)[1], whole_frame)
