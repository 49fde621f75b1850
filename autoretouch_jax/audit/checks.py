"""Checks one pair of files, whatever the others are. Sizes are pixels, differences are 8-bit levels."""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from skimage.filters import gaussian
from skimage.registration import phase_cross_correlation

from autoretouch_jax.data.images import read_header, read_rgb
from autoretouch_jax.errors import BadInput

ERROR, WARNING, NOTE = "error", "warning", "note"  # a note does not flag a pair
# The weight in training of a pair that is flagged for a reason. The weight of "inconsistent" comes from audit.py.
WEIGHTS = {
    "unreadable": 0.0, "bit_depth": 0.0, "transparent": 0.0, "size": 0.0, "shifted": 0.0, "lossy_target": 0.0, "no_edit": 0.0,
    "duplicate": 0.0, "leak": 0.0, "profile": 0.5, "channels": 0.5, "tone": 0.25, "too_much": 0.5,
}  # fmt: skip
LOSSY = ("JPEG", "MPO")
SHIFT = 0.25  # pixels; smaller shifts are not flagged
SHIFT_GAIN = 0.7  # aligning must bring the median difference below this share; most pixels are not part of an edit
SHIFT_SIDE = 512  # side of the middle of the image in which a shift is measured
TONE = 2.0  # levels from which a part of the brightness range counts as moved
TONE_BINS, BIN_SHARE = 8, 0.02  # parts of the brightness range, and the share of the pixels that a part needs to count
TOGETHER = 4  # levels by which pixels of one brightness may differ from their median change
EVERYWHERE = 0.25  # share of changed pixels from which a re-encoding is suspected
SMALL, MOSTLY = 8, 0.8  # a re-encoding moves pixels by at most so many levels, for at least this share of the changed ones
BLOCKS = 1.06  # roughness of the change across the borders of 8×8 blocks, relative to inside them, above which it is a JPEG's
COVERED = 0.9  # share of the 32×32 squares above which a change is everywhere; a square counts when over half of it changes
TOO_MUCH, VISIBLE = 0.5, 8  # a pair is no retouch when more than this share of its pixels changes by so many levels or more
THUMBNAIL = 64  # side in pixels


@dataclass
class Reason:
    """Why a pair is flagged, or, as a note, a remark about it."""

    code: str
    severity: str
    message: str


@dataclass
class CheckedPair:
    """A pair's reasons, its measures, and what is needed to compare it with the other pairs."""

    name: str
    reasons: list[Reason] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    thumbnail: np.ndarray | None = None  # uint8[64, 64, 3], of the source
    digest: str = ""  # of the source's pixels

    def flag(self, code: str, message: str, severity: str = ERROR) -> None:
        """Adds a reason."""
        self.reasons.append(Reason(code, severity, message))

    @property
    def flagged(self) -> bool:
        """Whether any reason is more than a note."""
        return any(reason.severity != NOTE for reason in self.reasons)

    @property
    def weight(self) -> float:
        """The smallest of its reasons' weights; 1 without any."""
        return min([WEIGHTS.get(reason.code, 1.0) for reason in self.reasons if reason.severity != NOTE], default=1.0)


def check_pair(name: str, source: Path, target: Path) -> CheckedPair:
    """Checks everything that two files show by themselves."""
    pair = CheckedPair(name)
    files = {"source": source, "target": target}
    for role, path in files.items():
        _check_header(pair, role, path)
    if pair.flagged:  # a damaged file is not decoded
        return pair
    images = {}
    for role, path in files.items():
        try:
            images[role] = read_rgb(path)
        except BadInput as error:
            pair.flag("transparent" if "transparent" in str(error) else "unreadable", str(error))
    if len(images) < 2:
        return pair
    a, b = images["source"], images["target"]
    pair.thumbnail = np.asarray(Image.fromarray(a).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    pair.digest = hashlib.blake2b(np.ascontiguousarray(a).tobytes(), digest_size=16).hexdigest()
    _check_files(pair, source, target)
    if a.shape != b.shape:
        pair.flag("size", f"source is {a.shape[1]}×{a.shape[0]}, target {b.shape[1]}×{b.shape[0]}")
    else:
        _check_pixels(pair, a, b)
    return pair


def _check_header(pair: CheckedPair, role: str, path: Path) -> None:
    header, fault = read_header(path)
    if fault:
        code = "bit_depth" if header and "8 bits" in fault else "unreadable"
        pair.flag(code, f"{role} {path}: {fault}")
    elif header and "A" in header.mode:
        pair.flag("alpha", f"{role} has an alpha channel ({header.mode})", NOTE)


def _check_files(pair: CheckedPair, source: Path, target: Path) -> None:
    """Checks what the containers say: colour profiles, channels, lossy formats."""
    with Image.open(source) as a, Image.open(target) as b:
        profiles = [_profile(image) for image in (a, b)]
        modes = [image.mode.removesuffix("A").removesuffix("X") for image in (a, b)]
        kind, lossless_source = b.format, a.format not in LOSSY
    if profiles[0] != profiles[1]:
        names = " and ".join(name or "none" for name in profiles)
        pair.flag("profile", f"colour profiles differ: {names}; convert one of them", WARNING)
    if modes[0] != modes[1]:
        pair.flag("channels", f"source has channels {modes[0]}, target {modes[1]}", WARNING)
    if kind in LOSSY:
        severity = ERROR if lossless_source else WARNING  # where both are lossy, there may be no better files
        pair.flag("lossy_target", f"target is a {kind} file: its losses are as large as a retouch; export PNG", severity)


def _profile(image: Image.Image) -> str:
    """The profile's name. sRGB counts as none, because an image without a profile is taken for sRGB."""
    data = image.info.get("icc_profile")
    if not data:
        return ""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImageCms.PyCMSError, OSError):
        name = f"unreadable ({len(data)} bytes)"
    return "" if "srgb" in name.lower() else name


def _check_pixels(pair: CheckedPair, source: np.ndarray, target: np.ndarray) -> None:
    difference = target.astype(np.int16) - source
    largest = np.abs(difference).max(-1)
    changed = largest > 0
    share = float(changed.mean())
    pair.measures |= {"edited_share": share, "visible_share": float((largest >= VISIBLE).mean())}
    if share == 0:
        pair.flag("no_edit", "the target is the source: nothing was retouched", WARNING)
        return
    if shift := _shift(source, target):
        pair.measures["shift"] = float(np.hypot(*shift))
        pair.flag("shifted", f"target lies {shift[0]:+.2f} pixels below and {shift[1]:+.2f} right of the source")
        return
    if levels := _tone(source, difference):
        pair.measures["tone"] = levels
        pair.flag("tone", f"brightness or colour moves by {levels:.1f} levels all over", WARNING)
        return
    is_flagged = any(reason.code == "lossy_target" for reason in pair.reasons)
    if share > EVERYWHERE and not is_flagged and (evidence := _reencoded(difference, changed)):
        pair.flag("lossy_target", f"{share:.0%} of the pixels change a little, {evidence}: was the target saved with losses?")
        return
    if pair.measures["visible_share"] > TOO_MUCH:
        pair.flag("too_much", f"{pair.measures['visible_share']:.0%} of the pixels change visibly", WARNING)


def _shift(source: np.ndarray, target: np.ndarray) -> tuple[float, float] | None:
    """Returns the rows and columns by which the target is shifted, or None.

    The shift is measured by sub-pixel cross-correlation of the brightness in the middle of the image. It counts only if undoing
    it makes the images clearly more alike.
    """
    height, width = source.shape[:2]
    side = min(SHIFT_SIDE, height, width)
    if side < 32:
        return None
    top, left = (height - side) // 2, (width - side) // 2
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    a, b = (gaussian(image[top : top + side, left : left + side].astype(np.float32) @ luma, 1.5) for image in (source, target))
    window = np.hanning(side)[:, None] * np.hanning(side)
    if min(a.std(), b.std()) < 1:
        return None
    a, b = a - a.mean(), b - b.mean()
    shift, _, _ = phase_cross_correlation(b * window, a * window, upsample_factor=20, normalization=None)
    if max(abs(shift)) < SHIFT or max(abs(shift)) > side / 4:
        return None
    moved = np.fft.ifft2(np.fft.fft2(a) * _ramp(side, shift)).real
    inside = np.s_[side // 4 : -side // 4, side // 4 : -side // 4]
    after, before = (float(np.median(np.abs(x - b)[inside])) for x in (moved, a))
    return (float(shift[0]), float(shift[1])) if after < SHIFT_GAIN * before else None


def _ramp(side: int, shift: np.ndarray) -> np.ndarray:
    """Returns the factors by which a square image's Fourier transform is multiplied to shift it."""
    frequency = np.fft.fftfreq(side)
    return np.exp(-2j * np.pi * (frequency[:, None] * shift[0] + frequency[None, :] * shift[1]))


def _tone(source: np.ndarray, difference: np.ndarray) -> float | None:
    """Returns the largest move, in levels, of a part of the brightness range, or None where few parts move evenly."""
    step = max(1, int(np.sqrt(source.shape[0] * source.shape[1] / 1e5)))
    values, moves = source[::step, ::step].reshape(-1, 3), difference[::step, ::step].reshape(-1, 3)
    moved, close = [], []
    for channel in range(3):
        bins = values[:, channel].astype(int) * TONE_BINS // 256
        for number in range(TONE_BINS):
            inside = moves[bins == number, channel]
            if inside.size >= BIN_SHARE * len(values):
                median = float(np.median(inside))
                moved.append(abs(median))
                close.append(np.mean(np.abs(inside - median) <= TOGETHER))
    together = moved and np.mean(close) > 0.5  # in a different picture the pixels change too, but not evenly
    return max(moved) if together and np.mean(np.array(moved) >= TONE) >= 0.3 else None


def _reencoded(difference: np.ndarray, changed: np.ndarray) -> str:
    """Returns what suggests that the whole image was re-encoded, or ""."""
    if np.mean(np.abs(difference).max(-1)[changed] <= SMALL) < MOSTLY:
        return ""
    if (rough := _blockiness(difference)) > BLOCKS:
        return f"in squares of 8 pixels ({rough:.2f} times as rough at their borders)"
    height, width = (size // 32 * 32 for size in changed.shape)
    if height and width:
        squares = changed[:height, :width].reshape(height // 32, 32, width // 32, 32).mean((1, 3))
        if (squares > 0.5).mean() > COVERED:
            return "everywhere"
    return ""


def _blockiness(difference: np.ndarray) -> float:
    """The mean step of the change across the borders of 8×8 blocks, over the mean step elsewhere."""
    luma = difference.astype(np.float32).mean(-1)
    ratios = []
    for axis in (0, 1):
        steps = np.abs(np.diff(luma, axis=axis)).mean(1 - axis)
        border = np.arange(len(steps)) % 8 == 7
        if border.any() and steps[~border].mean() > 0:
            ratios.append(steps[border].mean() / steps[~border].mean())
    return float(np.mean(ratios)) if ratios else 1.0
