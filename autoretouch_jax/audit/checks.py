"""Checks one pair of files, whatever the others are. Sizes are pixels, differences are 8-bit levels."""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from skimage.filters import gaussian
from skimage.registration import phase_cross_correlation

from autoretouch_jax.audit import alterations, codecs, direction
from autoretouch_jax.audit.detail import mosaic
from autoretouch_jax.audit.geometry import STRANGER, Placement, place
from autoretouch_jax.data.edits import LUMA, Codec, codec_of, codecs_of, edit_mask
from autoretouch_jax.data.images import read_header, read_rgb
from autoretouch_jax.errors import BadInput

ERROR, WARNING, NOTE = "error", "warning", "note"  # a note does not flag a pair
# The weight in training of a pair that is flagged for a reason. Those of "lossy_target", for a target that is itself saved with
# losses, and of "inconsistent" follow from what was measured.
WEIGHTS = {
    "unreadable": 0.0, "bit_depth": 0.0, "transparent": 0.0, "blank": 0.0, "size": 0.0, "stranger": 0.0, "turned": 0.0,
    "mirrored": 0.0, "rotated": 0.0, "scaled": 0.0, "shifted": 0.0, "swapped": 0.0, "lossy_target": 0.0, "no_edit": 0.0,
    "duplicate": 0.0, "leak": 0.0, "profile": 0.75, "channels": 0.0, "tone": 0.25, "too_much": 0.5,
    "blurred": 0.0, "resampled": 0.0, "sharpened": 0.25, "noisy": 0.25,
}  # fmt: skip
BLANK = 3.0  # standard deviation in levels of every channel, below which an image shows nothing; portraits have 30 and more
GREY, COLOURED = 1.0, 4.0  # mean difference of the channels, in levels, of a grey and of a coloured photograph
SHIFT = 0.25  # pixels; smaller shifts are not flagged
SHIFT_GAIN = 0.7  # aligning must bring the median difference below this share; most pixels are not part of an edit
SHIFT_SIDE = 512  # side of the middle of the image in which a shift is measured
TONE = 2.0  # levels from which a part of the brightness range counts as moved
TONE_BINS, BIN_SHARE = 8, 0.02  # parts of the brightness range, and the share of the pixels that a part needs to count
TOGETHER = 4  # levels by which pixels of one brightness may differ from their median change
STEADY = 1.5  # levels by which the mean of a 16×16 square may move that counts as steady
# Shares of steady squares below which the tone may have moved, the second where no square is identical, as after losses.
# Measured: 0.07 and less for brightness and white balance, up to 0.34 for saturation, and 0.14 and more where all skin is
# evened or lightened.
ALL_MOVE, MOST_MOVE, IDENTICAL = 0.1, 0.35, 0.01
UNTOUCHED = 0.2  # share of identical squares from which nothing was done to the whole image; hair and eyes of a close portrait
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
        weights = WEIGHTS | ({"lossy_target": codecs.weight(self.measures["damage"])} if "damage" in self.measures else {})
        return min([weights.get(reason.code, 1.0) for reason in self.reasons if reason.severity != NOTE], default=1.0)


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
    _check_profiles(pair, source, target)
    if _is_blank(pair, images):
        return pair
    if a.shape != b.shape:
        _check_sizes(pair, a, b)
    elif np.array_equal(a, b):
        pair.measures |= {"edited_share": 0.0, "visible_share": 0.0}
        pair.flag("no_edit", "the target is the source: nothing was retouched", WARNING)
    elif _lies_on_source(pair, a, b):
        _check_pixels(pair, a, b, edit_mask(a, b, None, codecs_of(source, target)), codec_of(target))
        # Sharpening and noise make spots stand out, too.
        if not {reason.code for reason in pair.reasons} & {"channels", "blurred", "resampled", "sharpened", "noisy"}:
            _check_direction(pair, a, b)
    return pair


def _check_header(pair: CheckedPair, role: str, path: Path) -> None:
    header, fault = read_header(path)
    if fault:
        code = "bit_depth" if header and "8 bits" in fault else "unreadable"
        pair.flag(code, f"{role} {path}: {fault}")
    elif header and "A" in header.mode:
        pair.flag("alpha", f"{role} has an alpha channel ({header.mode})", NOTE)


def _check_profiles(pair: CheckedPair, source: Path, target: Path) -> None:
    with Image.open(source) as a, Image.open(target) as b:
        profiles = [_profile(image) for image in (a, b)]
    if profiles[0] != profiles[1]:
        names = " and ".join(name or "none" for name in profiles)
        text = f"colour profiles differ: {names}; both sides are converted to sRGB, which rounds; export both with one profile"
        pair.flag("profile", text, WARNING)


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


def _is_blank(pair: CheckedPair, images: dict[str, np.ndarray]) -> bool:
    blank = [role for role, image in images.items() if max(image[::4, ::4].std((0, 1))) < BLANK]
    for role in blank:
        colour = ", ".join(f"{value:.0f}" for value in images[role].mean((0, 1)))
        pair.flag("blank", f"{role} shows nothing: it has the colour ({colour}) all over; export it again")
    return bool(blank)


# ---- where the target lies --------------------------------------------------------------------------------------------------


def _check_sizes(pair: CheckedPair, source: np.ndarray, target: np.ndarray) -> None:
    """Names the cause of different sizes."""
    (height, width), (other_height, other_width) = source.shape[:2], target.shape[:2]
    sizes = f"source is {width}×{height}, target {other_width}×{other_height}"
    if (other_height, other_width) == (width, height):
        placement = place(source, target)
        if placement.match >= STRANGER and _is_turned(pair, placement):
            return
    ratio = other_width / width
    if abs(other_height / height / ratio - 1) < 0.01:
        pair.flag("size", f"{sizes}: it was exported at {100 * ratio:.0f} % of the size; export it at the source's size")
    else:
        pair.flag("size", f"{sizes}: it was cropped or scaled; export it at the source's size")


def _lies_on_source(pair: CheckedPair, source: np.ndarray, target: np.ndarray) -> bool:
    """Flags a target that shows something else, or the same elsewhere. Returns whether there is nothing to flag."""
    placement = place(source, target)
    pair.measures["match"] = placement.match
    if placement.match < STRANGER:
        text = f"target shows another photograph: {placement.match:.0%} of its contours lie where the source's do; leave it out"
        pair.flag("stranger", text)
    elif (
        not _is_turned(pair, placement)
        and not _is_moved(pair, placement, max(source.shape))
        and (shift := _shift(source, target) or _coarse_shift(source, placement))
    ):
        pair.measures["shift"] = float(np.hypot(*shift))
        text = f"target lies {shift[0]:+.2f} pixels below and {shift[1]:+.2f} right of the source; register it or leave it out"
        pair.flag("shifted", text)
    return not {reason.code for reason in pair.reasons} & {"stranger", "turned", "mirrored", "rotated", "scaled", "shifted"}


def _is_turned(pair: CheckedPair, placement: Placement) -> bool:
    turns = f"turned by {90 * placement.turns}°" + (" anticlockwise" if placement.turns % 2 else "")
    if placement.mirrored:
        sides = {0: "left to right", 2: "top to bottom"}.get(placement.turns, f"left to right, and {turns}")
        pair.flag("mirrored", f"target is mirrored {sides}; mirror it back")
    elif placement.turns:
        pair.flag("turned", f"target is {turns} against the source; turn it back, and check its EXIF orientation")
    return placement.mirrored or placement.turns > 0


def _is_moved(pair: CheckedPair, placement: Placement, longest: int) -> bool:
    """Flags a rotation and a change of scale, each by itself, because they have different causes."""
    down, right = placement.offset * longest / 2
    moved = f", and its middle lies {down:+.1f} pixels below and {right:+.1f} right" if np.hypot(down, right) >= 1 else ""
    if placement.is_rotated:
        side = "anticlockwise" if placement.degrees > 0 else "clockwise"
        pair.measures["degrees"] = placement.degrees
        text = (
            f"target is rotated by {abs(placement.degrees):.2f}° {side} against the source{moved}; register it or leave it out"
        )
        pair.flag("rotated", text)
    if placement.is_scaled:
        height, width = (100 * scale for scale in placement.scales)
        pair.measures["scale"] = (height + width) / 200
        text = f"target shows the photograph at {width:.2f} % of its width and {height:.2f} % of its height"
        pair.flag("scaled", f"{text}{moved}; register it or leave it out")
    return placement.is_rotated or placement.is_scaled


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
    a, b = (gaussian(image[top : top + side, left : left + side].astype(np.float32) @ LUMA, 1.5) for image in (source, target))
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


def _coarse_shift(source: np.ndarray, placement: Placement) -> tuple[float, float] | None:
    """The shift of the whole image, for one whose middle is edited or even."""
    down, right = placement.offset * max(source.shape) / 2
    return (float(down), float(right)) if placement.is_shifted else None


def _ramp(side: int, shift: np.ndarray) -> np.ndarray:
    """Returns the factors by which a square image's Fourier transform is multiplied to shift it."""
    frequency = np.fft.fftfreq(side)
    return np.exp(-2j * np.pi * (frequency[:, None] * shift[0] + frequency[None, :] * shift[1]))


# ---- what was done to it ----------------------------------------------------------------------------------------------------


def _check_pixels(pair: CheckedPair, source: np.ndarray, target: np.ndarray, edit: np.ndarray, codec: Codec | None) -> None:
    """Flags what was done to the whole target: one fault, the first that explains the difference."""
    largest = np.abs(target.astype(np.int16) - source).max(-1)
    visible = float((edit & (largest >= VISIBLE)).mean())
    pair.measures |= {"edited_share": float(edit.mean()), "visible_share": visible}
    if not edit.any():
        pair.flag(
            "no_edit", "the target differs from the source only by what saving it changed: nothing was retouched", WARNING
        )
        return
    if codec:
        _check_codec(pair, source, target, codec)
    if _is_altered(pair, source, target, codec) or any(reason.code == "lossy_target" for reason in pair.reasons):
        return
    if pair.measures["visible_share"] > TOO_MUCH:
        pair.flag("too_much", f"{pair.measures['visible_share']:.0%} of the pixels change visibly", WARNING)


def _is_altered(pair: CheckedPair, source: np.ndarray, target: np.ndarray, codec: Codec | None) -> bool:
    """Flags a change that leaves no part of the image as it was. Returns whether there is one."""
    difference = target.astype(np.int16) - source
    steady, untouched = _steady(source, difference)
    pair.measures |= {"steady_share": steady, "untouched_share": untouched}
    if untouched >= UNTOUCHED:
        return False
    if text := _channels(source, target):
        pair.flag("channels", text)
        return True
    if steady < ALL_MOVE and _flag_tone(pair, source, difference):
        return True
    # Windows of both sides lie at the same blocks of the JPEG, so that saving them again gives what it gave.
    first, second = mosaic(source), mosaic(target)
    losses = "" if codec or untouched > IDENTICAL else codecs.reencoded(difference)
    found = alterations.find(codecs.saved_as(first, codec), second, exact=not codec and not losses)
    # What other formats than JPEG lose is not known, and losses look like noise.
    is_told = codec is None or codec.format == "JPEG"
    if found and is_told and not (found.code == "noisy" and codecs.BLOCKY in losses):
        pair.measures[found.code] = found.value
        pair.flag(found.code, found.message, WARNING)
        return True
    may_move = steady < MOST_MOVE and untouched < IDENTICAL and not codec and codecs.BLOCKY not in losses
    if may_move and _flag_tone(pair, source, difference):
        return True
    if losses:
        share = pair.measures["edited_share"]
        text = f"{share:.0%} of the pixels change a little, {losses}: was the target once saved with losses?"
        pair.flag("lossy_target", f"{text} The edit cannot be told from that; export it without")
    return bool(losses)


def _flag_tone(pair: CheckedPair, source: np.ndarray, difference: np.ndarray) -> bool:
    if levels := _tone(source, difference):
        pair.measures["tone"] = levels
        pair.flag("tone", f"brightness or colour moves by {levels:.1f} levels all over; undo it or leave it out", WARNING)
    return bool(levels)


def _steady(source: np.ndarray, difference: np.ndarray) -> tuple[float, float]:
    """The shares of the 16×16 squares whose mean colour stays, and that are identical, among those that show something."""
    rows, columns = (side // 16 for side in source.shape[:2])
    image, change = (
        x[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16, 3).swapaxes(1, 2).reshape(-1, 256, 3)
        for x in (source, difference)
    )
    # A blur leaves what is even, and more brightness leaves what is white.
    shows = np.ptp(image[..., 1], 1) >= VISIBLE
    if not shows.any():
        return 0.0, 0.0
    means = np.abs(change[shows].mean(1)).max(-1)
    return float((means <= STEADY).mean()), float((~change[shows].any((1, 2))).mean())


def _check_codec(pair: CheckedPair, source: np.ndarray, target: np.ndarray, codec: Codec) -> None:
    """Flags losses that a retouch cannot be told from, and notes smaller ones."""
    first = mosaic(source)
    # What other formats do is not known from the file. There the whole difference is measured.
    saved = codecs.saved_as(first, codec) if codec.format == "JPEG" else mosaic(target)
    pair.measures["damage"] = damage = codecs.damage(first, saved)
    changed = f"saving the target as {codec.format} changed {damage:.0%} of the fine detail"
    if codecs.weight(damage) < 1:
        pair.flag("lossy_target", f"{changed}, more than {codecs.HARMLESS:.0%}; export it at quality 95 or as PNG", WARNING)
    else:
        pair.flag("losses", f"{changed}; up to {codecs.HARMLESS:.0%} do no harm", NOTE)


def _channels(source: np.ndarray, target: np.ndarray) -> str:
    """Returns what is wrong where one side is grey and the other one coloured, or ""."""
    colour = [float(np.mean(np.ptp(image[::4, ::4].astype(np.int16), -1))) for image in (source, target)]
    if min(colour) > GREY or max(colour) < COLOURED:
        return ""
    grey, coloured = ("source", "target") if colour[0] < colour[1] else ("target", "source")
    return f"{grey} is grey, and {coloured} has colours; export both alike"


def _check_direction(pair: CheckedPair, source: np.ndarray, target: np.ndarray) -> None:
    found = direction.compare(source, target)
    pair.measures |= {"spots_before": float(found.before), "spots_after": float(found.after)}
    if found.is_swapped:
        spots = (
            f"{found.after} spots stand out in the target that the source does not have, and {found.before} the other way round"
        )
        pair.flag("swapped", f"source and target seem to be swapped: {spots}; exchange the two files")


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
