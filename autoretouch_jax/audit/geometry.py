"""How a target lies on its source: turned, mirrored, rotated, scaled, shifted, or another photograph altogether.

Images are compared at reduced size by their contours: brightness without its slow changes. The placement is the affine map that
aligns them best, found by Gauss-Newton steps from coarse to fine (inverse compositional alignment, Baker and Matthews 2004).
Pixels that do not fit count less, so that a retouch does not pull at the map. Points are (row, column) from the image's centre,
in halves of the longer side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from autoretouch_jax.data.edits import LUMA

LONGEST = 512  # pixels of the longer side at which images are aligned
SMALLEST, PYRAMID = 32, 8  # pixels of the shorter side below which nothing is halved, and what sides are a multiple of
POINTS, STEPS, CLOSE = 6000, 12, 0.005  # pixels that are aligned, steps on each level, and the step in pixels that ends them
TUKEY = 4.685  # standard deviations from which a pixel counts nothing: 95 % efficient for normal noise (Tukey's biweight)
FAINT = 2.0  # levels per pixel, which a fiftieth of the image must exceed to have contours; portraits: 14 and more
CELL = 16  # side in pixels, at half of LONGEST, of the squares that are compared
SEEN = 0.05  # share of the squares that must have contours and lie in both images
ALIKE = 0.8  # correlation of contours from which a square shows the same thing
# Share of alike squares. Measured on 122 portraits: up to 0.23 for other people, from 0.38 on for pairs with any retouch.
STRANGER, SURE = 0.3, 0.5
GAIN = 0.8  # aligning must bring the difference of contours below this share; clean pairs: 0.94, with local warps 0.83
# Movement of the border in pixels of the reduced image, here 0.11° or 0.2 %, and relative to the largest movement. Clean pairs
# move by at most 0.1, and a fit of one movement mistakes at most a twentieth of it for another one.
LEAST, MINOR = 0.5, 0.1
LEAST_SHIFT = 0.2  # pixels of the reduced image
# Where to start when nothing fits: alignment alone finds rotations up to 15° and scales within 10 %.
STARTS = [(0.0, 0.8), (0.0, 1.25), (-25.0, 1.0), (25.0, 1.0)]  # degrees, scale


class Placement(NamedTuple):
    """Where the source lies in the target, once the target's turns and mirroring are undone."""

    turns: int  # quarter turns anticlockwise
    mirrored: bool  # left and right exchanged, before the turns
    matrix: np.ndarray  # float64[2, 2]
    offset: np.ndarray  # float64[2], halves of the longer side
    match: float  # share of the squares with contours that show the same thing
    gain: float = 1.0  # the difference of contours once aligned, relative to before

    @property
    def degrees(self) -> float:
        """The rotation of the target, anticlockwise."""
        (a, b), (c, d) = self.matrix
        return float(np.degrees(np.arctan2(c - b, a + d)))

    @property
    def scales(self) -> tuple[float, float]:
        """How many times as high and as wide the target shows the photograph."""
        height, width = np.linalg.norm(self.matrix, axis=0)
        return float(height), float(width)

    @property
    def _moves(self) -> tuple[float, float, float]:
        """By how many pixels of the reduced image a rotation and a scale move the border, and a shift everything."""
        if self.gain >= GAIN:
            return 0.0, 0.0, 0.0
        scale = max(abs(scale - 1) for scale in self.scales)
        half = LONGEST / 2
        return abs(np.radians(self.degrees)) * half, scale * half, float(np.hypot(*self.offset)) * half

    @property
    def is_rotated(self) -> bool:
        """Whether a rotation moves the border, and undoing it makes the images clearly more alike."""
        return self._moves[0] >= max(LEAST, MINOR * max(self._moves))

    @property
    def is_scaled(self) -> bool:
        """The same for a change of scale."""
        return self._moves[1] >= max(LEAST, MINOR * max(self._moves))

    @property
    def is_shifted(self) -> bool:
        """The same for a shift."""
        return self._moves[2] >= LEAST_SHIFT


def place(source: np.ndarray, target: np.ndarray) -> Placement:
    """Two images, uint8[H, W, 3] → the best placement. The target's shape may also be [W, H, 3].

    An image that is too small or too even to judge counts as lying on its source, with a match of 1.
    """
    a, b = _luma(source), _luma(target)
    if min(source.shape[:2]) < 2 * SMALLEST or _contrast(a) < FAINT:
        return Placement(0, False, np.eye(2), np.zeros(2), 1.0)
    is_square = abs(a.shape[0] - a.shape[1]) <= PYRAMID
    turns = range(4) if is_square else (0, 2) if (a.shape[0] > a.shape[1]) == (b.shape[0] > b.shape[1]) else (1, 3)
    tried = [(number, mirrored, 0.0, 1.0) for mirrored in (False, True) for number in turns]
    # Only where nothing fits: most pairs are settled by the first alignment.
    tried += [(turns[0], False, degrees, scale) for degrees, scale in STARTS]
    first, best = _pyramid(a), None
    for number, mirrored, degrees, scale in tried:
        second = _pyramid(_undone(b, number, mirrored))
        placement = _aligned(first, second, Placement(number, mirrored, _rotation(degrees, scale), np.zeros(2), 0.0))
        if best is None or placement.match > best[0].match:
            best = placement, second
        if placement.match >= SURE:
            break
    assert best is not None  # there is at least one way to try
    return _refined(first, best[1], best[0]) if best[0].match >= STRANGER else best[0]


def _luma(image: np.ndarray) -> np.ndarray:
    """`uint8[H, W, 3]` → float32[h, w], at most LONGEST pixels long, sides that can be halved again and again."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture = picture.reduce(max(1, max(picture.size) // LONGEST))
    factor = min(1.0, LONGEST / max(picture.size))
    width, height = (max(PYRAMID, int(side * factor + 0.5) // PYRAMID * PYRAMID) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)).astype(np.float32) @ LUMA


def _contrast(luma: np.ndarray) -> float:
    return float(np.quantile(ndimage.gaussian_gradient_magnitude(luma, 1.0), 0.98))


def _pyramid(luma: np.ndarray) -> list[np.ndarray]:
    """Returns the contours at decreasing sizes, the largest first."""
    levels = [luma]
    while min(levels[-1].shape) >= 2 * SMALLEST and all(side % 2 == 0 for side in levels[-1].shape):
        height, width = levels[-1].shape
        levels.append(levels[-1].reshape(height // 2, 2, width // 2, 2).mean((1, 3)))
    return [ndimage.gaussian_filter(level, 1.0) - ndimage.gaussian_filter(level, 4.0) for level in levels]


def _undone(image: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    turned = np.rot90(image, -turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


def _rotation(degrees: float, scale: float) -> np.ndarray:
    angle = np.radians(degrees)
    return scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _aligned(first: Sequence[np.ndarray], second: Sequence[np.ndarray], start: Placement) -> Placement:
    """Aligns from the smallest size up to the second largest, and measures there how much fits."""
    levels = list(zip(first, second, strict=False))
    for a, b in reversed(levels[1:] or levels):
        start, _ = _fit(a, b, start)
    a, b = levels[min(1, len(levels) - 1)]
    return start._replace(match=_match(a, b, start))


def _refined(first: Sequence[np.ndarray], second: Sequence[np.ndarray], placement: Placement) -> Placement:
    """Aligns at the largest size, and measures what that gains over leaving the images as they lie."""
    a, b = first[0], second[0]
    placement, weight = _fit(a, b, placement)
    unmoved = placement._replace(matrix=np.eye(2), offset=np.zeros(2))
    after, before = (float(weight @ np.abs(_errors(a, b, where)[0])) for where in (placement, unmoved))
    return placement._replace(gain=after / before if before > 0 else 1.0)


def _fit(a: np.ndarray, b: np.ndarray, start: Placement) -> tuple[Placement, np.ndarray]:
    """Improves a placement of the contours `a` in `b`. Returns it, and how much each point counts."""
    points, _, slopes = _points(a)
    matrix, offset = start.matrix, start.offset
    weight = np.zeros(points.shape[1])
    for _ in range(STEPS):
        error, inside = _errors(a, b, start._replace(matrix=matrix, offset=offset))
        if not inside.any():
            break
        # 1.4826 times the median is a normal distribution's standard deviation.
        spread = 1.4826 * float(np.median(np.abs(error[inside]))) + 1e-3
        weight = np.square(np.clip(1 - np.square(error / (TUKEY * spread)), 0, None)) * inside
        squares = (slopes * weight) @ slopes.T
        change = np.linalg.solve(squares + 1e-6 * (np.trace(squares) + 1e-6) * np.eye(6), slopes @ (weight * error))
        # The change moves `a`. Moving `b` instead undoes it.
        matrix = matrix @ np.linalg.inv(np.eye(2) + change[:4].reshape(2, 2))
        offset = offset - matrix @ change[4:]
        if np.abs(change).max() * max(a.shape) / 2 < CLOSE:
            break
    return start._replace(matrix=matrix, offset=offset), weight


def _errors(a: np.ndarray, b: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Returns by how much the points differ under a placement, in levels, float[N], and which lie inside `b`, bool[N]."""
    points, values, _ = _points(a)
    last = np.array(b.shape)[:, None] - 1
    place = (placement.matrix @ points + placement.offset[:, None]) * max(a.shape) / 2 + last / 2
    inside = ((place >= 0) & (place <= last)).all(0)
    found = ndimage.map_coordinates(b, place, order=1, mode="nearest")
    # A blurred target has weaker contours. The median ignores those of a border that was added.
    strengths = [float(np.median(np.abs(x[inside]))) if inside.any() else 0.0 for x in (values, found)]
    return found * strengths[0] / max(strengths[1], 1e-3) - values, inside


def _points(a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the points with strong contours: float[2, N], their values, and how these change with the map, float[6, N]."""
    rows, columns = np.gradient(a)
    strength = np.hypot(rows, columns)
    for border in (strength[:2], strength[-2:], strength[:, :2], strength[:, -2:]):
        border[...] = 0
    chosen = np.flatnonzero(strength.ravel() > np.quantile(strength[::2, ::2], 0.6))
    chosen = chosen[:: max(1, len(chosen) // POINTS)]
    half = max(a.shape) / 2
    y, x = ((part - (side - 1) / 2) / half for part, side in zip(np.divmod(chosen, a.shape[1]), a.shape, strict=True))
    down, right = rows.ravel()[chosen] * half, columns.ravel()[chosen] * half
    return np.stack([y, x]), a.ravel()[chosen], np.stack([down * y, down * x, right * y, right * x, down, right])


def _match(a: np.ndarray, b: np.ndarray, placement: Placement) -> float:
    """Returns the share of the squares with contours in which `a` and the aligned `b` are alike."""
    half, centre = max(a.shape) / 2, (np.array(a.shape) - 1) / 2
    shift = (np.array(b.shape) - 1) / 2 + placement.offset * half - placement.matrix @ centre
    moved = ndimage.affine_transform(b, placement.matrix, shift, output_shape=a.shape, order=1, cval=np.nan)
    rows, columns = (side // CELL for side in a.shape)
    squares = [
        image[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL).swapaxes(1, 2).reshape(-1, CELL * CELL)
        for image in (a, moved)
    ]
    known = np.isfinite(squares[1]).all(1)
    first, second = (square[known] - square[known].mean(1, keepdims=True) for square in squares)
    strength = first.std(1)
    has_contours = strength > max(1.0, float(np.median(strength)) / 2) if known.any() else known[:0]
    if has_contours.mean() * known.mean() < SEEN if known.any() else True:
        return 0.0
    first, second = first[has_contours], second[has_contours]
    correlation = (first * second).mean(1) / (first.std(1) * second.std(1) + 1e-6)
    return float((correlation > ALIKE).mean())
