"""The one definition of the edit: where a retoucher changed a photograph, apart from what saving it with losses changed.

In a pair without losses every difference is an edit. A JPEG target differs from its source nearly everywhere, by what its
compression changed. `target_of` removes that: where nothing was edited, it returns the source's own pixels. So everywhere
behind the reading of a pair, in crops, losses, records, labels and metrics, the edit is where source and target differ.

Images are uint8 `[H, W, 3]`, RGB. Thresholds are 8-bit levels of the denoised difference; 0 means that any difference counts.
"""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin

from autoretouch_jax.data.colour import is_srgb
from autoretouch_jax.data.images import as_stored, orientation_of, read_rgb, upright

VERSION = 1  # of the measurement; records that were made with another one are written again

# The threshold in levels where saving again reproduces the unedited parts: a constant and a share of the mean entry of the
# JPEG's table, twice that with subsampled colour. Fitted to qualities 60 to 98 on drawn blemishes, whose faint
# borders a higher threshold misses, and on pasted patches of skin, which a lower one widens: benchmarks/README.md.
REPRODUCED_LEAST, PER_TABLE_ENTRY, SUBSAMPLED = 0.23, 0.035, 2.0
LOWEST = 1.5  # levels; the lowest threshold where the encoder is another one, so that saving again does not reproduce it
ABOVE_SAVING = 2.5  # times the change by saving nearby, which an edit must exceed there
QUANTILE = 0.995  # of what saving again changes, which the threshold lies above
OWN_NOISE = 4.0  # times the median difference of the pair: the threshold for formats whose saving cannot be repeated
REPRODUCED = 0.3  # share of the pixels that saving changes, in which saving the source again must give the target
EXACT = 0.5  # share of identical pixels from which a lossless target was made from the lossy source as it is
SURROUNDINGS = 8.0  # pixels; over how far the local change by saving is averaged
# ITU-R BT.601, JPEG's own colours. Colour counts less than brightness, because JPEG keeps it at half resolution.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
COLOUR_WEIGHT = 0.25
BAND, REACH = 512, 8  # rows that are filtered at a time; pixels over which the filters reach, four times their sigma


@dataclass(frozen=True)
class Codec:
    """How a file was saved with losses. All but `format` are a JPEG's."""

    format: str
    tables: tuple[tuple[int, ...], ...] = ()
    sampling: int = 0
    orientation: int = 1  # a camera held upright stores its squares of 8 pixels turned

    @property
    def threshold(self) -> float:
        """The threshold, in levels, where saving the source again as this JPEG reproduces the unedited parts."""
        return REPRODUCED_LEAST + PER_TABLE_ENTRY * float(np.mean(self.tables[0])) * (SUBSAMPLED if self.sampling > 0 else 1.0)


Codecs = tuple[Codec | None, Codec | None]  # the source's and the target's; None: saved without losses


def codec_of(path: Path | BinaryIO) -> Codec | None:
    """Returns how an image file was saved, None if without losses. It reads the header alone. Raises what Pillow raises."""
    with Image.open(path) as image:
        if isinstance(image, JpegImagePlugin.JpegImageFile):  # MPO, a camera's JPEG with a preview, is one too
            tables = tuple(tuple(image.quantization[key]) for key in sorted(image.quantization))
            return Codec("JPEG", tables, JpegImagePlugin.get_sampling(image), orientation_of(image))
        if image.format == "WEBP" and not _is_lossless_webp(path):
            return Codec("WEBP")
        return Codec("AVIF") if image.format == "AVIF" else None


def codecs_of(source: Path | BinaryIO, target: Path | BinaryIO) -> Codecs:
    """Returns how the two files of a pair were saved. Converting one of them from another colour profile counts as a loss."""
    codecs, profiles = (codec_of(source), codec_of(target)), []
    for file in (source, target):
        with Image.open(file) as image:
            profiles.append(image.info.get("icc_profile"))
    if profiles[0] != profiles[1] and codecs == (None, None):
        # A conversion rounds, so about a third of the pixels move by a level. Two descriptions of sRGB are not converted.
        return (None, Codec("PROFILE")) if any(profile and not is_srgb(profile) for profile in profiles) else codecs
    return codecs


def _is_lossless_webp(path: Path | BinaryIO) -> bool:
    if isinstance(path, Path):
        data = path.read_bytes()
    else:
        path.seek(0)
        data = path.read()
    place = 12
    while place + 8 <= len(data):
        kind, length = data[place : place + 4], struct.unpack("<I", data[place + 4 : place + 8])[0]
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        place += 8 + length + length % 2  # chunks are padded to even lengths (RFC 9649, section 2.3)
    return False


def read_pair(
    source: Path | BinaryIO, target: Path | BinaryIO, threshold: float | None = None, names: tuple[str, str] = ("", "")
) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and target, which differ only in the edit. Raises BadInput, naming a file that cannot be decoded.

    `threshold` is `data.edit_threshold`. Open files have no names of their own: give some for the messages.
    """
    images = read_rgb(source, names[0]), read_rgb(target, names[1])
    return images[0], target_of(*images, codecs_of(source, target), threshold)


def target_of(source: np.ndarray, target: np.ndarray, codecs: Codecs, threshold: float | None = None) -> np.ndarray:
    """Returns the target with the source's pixels wherever nothing was edited. A target of another size comes back as it is."""
    if source.shape != target.shape or _is_lossless(codecs, threshold):
        return target
    return np.where(edit_mask(source, target, threshold, codecs)[..., None], target, source)


def edit_mask(
    source: np.ndarray, target: np.ndarray, threshold: float | None = None, codecs: Codecs = (None, None)
) -> np.ndarray:
    """`bool[H, W]`: where the retoucher changed something.

    The threshold, in levels, is measured from the codecs where none is given. A pair without losses then has the threshold 0.
    """
    if _is_lossless(codecs, threshold):
        return (source != target).any(-1)
    saving = _Saving.of(source, target, codecs)
    if saving.exact and threshold is None:
        return saving.possible
    changed = _denoised(target.astype(np.int16) - source, saving.possible)
    return _without_specks((changed > saving.threshold(changed, threshold)) & saving.possible)


def _is_lossless(codecs: Codecs, threshold: float | None) -> bool:
    return threshold == 0 or (threshold is None and codecs == (None, None))


@dataclass(frozen=True)
class _Saving:
    """What saving changed in a pair: where an edit is possible, and how much saving again changes, where that is known."""

    possible: np.ndarray  # bool[H, W]
    exact: bool = False  # the lossless side was made from the lossy one as it is
    reproduced: float | None = None  # the threshold, where saving again gives the unedited parts
    change: np.ndarray | None = None  # float32[H, W], levels

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray, codecs: Codecs) -> "_Saving":
        """Saves one image as the other one was saved, and compares."""
        # The target is usually the one that was saved last. Beside a lossless target, the source may be what was saved last.
        original, saved, codec = (source, target, codecs[1]) if codecs[1] else (target, source, codecs[0])
        differs, everywhere = (source != target).any(-1), np.ones(source.shape[:2], bool)
        again = saved_again(original, codec) if codec and codec.format == "JPEG" else None
        if again is not None and codec:
            moved, unlike = (again != original).any(-1), (again != saved).any(-1)
            # In flat or overexposed parts saving changes nothing. They would say nothing about the encoder.
            if moved.any() and float(np.mean(~unlike[moved])) >= REPRODUCED:
                return cls(unlike, reproduced=codec.threshold)
        if codecs[1] is None and float(differs.mean()) < 1 - EXACT:
            return cls(differs, exact=True)
        if again is None:
            return cls(differs)
        return cls(everywhere, change=_denoised(again.astype(np.int16) - original, everywhere))

    def threshold(self, changed: np.ndarray, given: float | None) -> np.ndarray:
        """Returns the threshold: one number, or one for each pixel."""
        if self.reproduced is not None:
            return np.asarray(self.reproduced if given is None else given)
        if self.change is None:
            own = max(LOWEST, OWN_NOISE * float(np.median(changed)))
            return np.asarray(own if given is None else given)
        lowest = max(LOWEST, float(np.quantile(self.change[::4, ::4], QUANTILE))) if given is None else given
        return np.maximum(lowest, ABOVE_SAVING * _filters().gaussian_filter(self.change, SURROUNDINGS))


def saved_again(image: np.ndarray, codec: Codec) -> np.ndarray:
    """Returns an image as it comes back after saving it as that JPEG was saved."""
    packed = io.BytesIO()
    tables = [list(table) for table in codec.tables]
    stored = Image.fromarray(as_stored(image, codec.orientation))
    stored.save(packed, "JPEG", qtables=tables, subsampling=max(0, codec.sampling))
    return upright(np.asarray(Image.open(packed).convert("RGB")), codec.orientation)


def _denoised(difference: np.ndarray, where: np.ndarray) -> np.ndarray:
    """`int16[H, W, 3]` → `float32[H, W]`: the size of the difference, with the noise of compression averaged out."""
    out = np.zeros(difference.shape[:2], np.float32)
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    if not len(rows):
        return out
    # Most retouches touch a part of the frame. Bands of it keep the memory small: a pair of 24 MP would take 1 GB more.
    across = slice(max(0, columns[0] - REACH), columns[-1] + 1 + REACH)
    for top in range(rows[0], rows[-1] + 1, BAND):
        start = max(0, top - REACH)
        band = np.s_[start : top + BAND + REACH, across]
        sizes = _sizes(difference[band] * where[band][..., None])
        out[top : top + BAND, across] = sizes[top - start : top - start + BAND]
    return out


def _sizes(difference: np.ndarray) -> np.ndarray:
    luma = difference @ LUMA
    blue, red = 0.564 * (difference[..., 2] - luma), 0.713 * (difference[..., 0] - luma)
    # The median keeps the edges of pasted patches, which a Gaussian alone would widen.
    gaussian = _filters().gaussian_filter
    luma = gaussian(_filters().median_filter(luma, 3), 0.6)
    colour = np.square(gaussian(blue, 1.5)) + np.square(gaussian(red, 1.5))
    sizes: np.ndarray = np.sqrt(3 * np.square(luma) + COLOUR_WEIGHT * colour)
    return sizes


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Sets each pixel to what most of its 3×3 neighbours are."""
    majority: np.ndarray = _filters().uniform_filter(mask.astype(np.float32), 3) > 0.5
    return majority


def _filters() -> Any:
    # Here, because its import is a fifth of the imports of a training, and pairs without losses do not need it.
    from scipy import ndimage

    return ndimage
