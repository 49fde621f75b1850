"""What the model left alone in a JPEG decodes as before: its blocks come from the photograph's own file."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from autoretouch_jax.inference.files import blocks
from autoretouch_jax.inference.photo import encode, read_photo

# Where colours are subsampled, decoders blend each with its neighbours: a pixel beyond the block may change.
BLENDED = 2


def jpeg(mode: str = "RGB", size: tuple[int, int] = (171, 140), **options) -> bytes:
    """A photograph with odd sides."""
    image = Image.fromarray(data.astronaut()).crop((100, 0, 100 + size[0], size[1])).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def retouched(content: bytes, spots=((40, 50), (139, 170))) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pixels before and after a retouch that was written and read again, and which pixels it changed."""
    photo = read_photo(io.BytesIO(content), "a.jpg")
    changed = np.zeros(photo.pixels.shape[:2], bool)
    for y, x in spots:
        changed[max(0, y - 4) : y + 5, max(0, x - 3) : x + 4] = True
    new = photo.pixels.copy()
    new[changed] = np.clip(new[changed].astype(int) + 12, 0, 255)
    changed &= (new != photo.pixels).any(-1)
    return photo.pixels, read_photo(io.BytesIO(encode(photo, new)), "b.jpg").pixels, changed


def near(changed: np.ndarray, side: int, reach: int) -> np.ndarray:
    """The blocks of so many pixels a side that have a changed pixel, and what lies within `reach` of them."""
    found = np.zeros_like(changed)
    for y, x in np.argwhere(changed):
        top, left = y // side * side, x // side * side
        found[max(0, top - reach) : top + side + reach, max(0, left - reach) : left + side + reach] = True
    return found


@pytest.mark.parametrize(
    ("options", "side", "reach"),
    [
        ({"quality": 92, "subsampling": 0}, 8, 0),
        ({"quality": 60, "subsampling": 0, "progressive": True}, 8, 0),
        ({"quality": 85, "subsampling": 2}, 16, BLENDED),
        ({"quality": 75, "subsampling": 1, "optimize": True}, 16, BLENDED),
        ({"mode": "L", "quality": 88}, 8, 0),
        ({"quality": 90, "subsampling": 2, "size": (16, 8)}, 16, BLENDED),
    ],
)
def test_all_but_the_blocks_with_a_change_decode_as_before(options, side, reach):
    before, after, changed = retouched(jpeg(**options), [(4, 5)] if "size" in options else ((40, 50), (139, 170)))
    far = ~near(changed, side, reach)
    np.testing.assert_array_equal(after[far], before[far])
    # The edit itself is there.
    assert (after[changed].astype(int) - before[changed]).mean() > 8


def test_without_the_own_blocks_others_would_change_too(monkeypatch):
    monkeypatch.setattr(blocks, "_library", lambda: None)  # a machine for which jpeglib has no wheel
    before, after, changed = retouched(jpeg(quality=92, subsampling=0))
    far = ~near(changed, 8, 0)
    assert 0.5 < (after[far] == before[far]).all(-1).mean() < 1


@pytest.mark.parametrize("options", [{"mode": "CMYK", "quality": 90}, {"quality": 90, "keep_rgb": True}])
def test_other_forms_of_colours_come_back_too(options):
    before, after, changed = retouched(jpeg(**options))
    assert after.shape == before.shape
    assert np.abs(after[~near(changed, 8, 0)].astype(int) - before[~near(changed, 8, 0)]).mean() < 2
    assert np.abs(after[changed].astype(int) - before[changed]).mean() > 4


@pytest.mark.parametrize("progressive", [False, True])
def test_the_file_stays_progressive_or_sequential_and_about_as_large(progressive):
    content = jpeg(quality=90, progressive=progressive, optimize=True, size=(400, 300))
    photo = read_photo(io.BytesIO(content), "a.jpg")
    new = photo.pixels.copy()
    new[40:50, 40:50] ^= 16
    written = encode(photo, new)
    assert bool(Image.open(io.BytesIO(written)).info.get("progressive")) is progressive
    assert len(written) < 1.02 * len(content)


def test_files_of_different_form_are_not_mixed():
    changed = np.ones((140, 171), bool)
    new = jpeg(quality=92, subsampling=0)
    for own in (jpeg(quality=80, subsampling=0), jpeg(quality=92, subsampling=2), jpeg("L"), new[:200], b""):
        assert blocks.with_own_blocks(own, new, ~changed) == new
    assert blocks.with_own_blocks(jpeg(quality=92, subsampling=0, size=(179, 140)), new, ~changed) == new
    # One block of each component, whatever the subsampling.
    small = jpeg(quality=92, subsampling=0, size=(8, 8))
    assert blocks.with_own_blocks(jpeg(quality=92, subsampling=2, size=(8, 8)), small, np.zeros((8, 8), bool)) == small
