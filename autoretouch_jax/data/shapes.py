"""Forms that blemishes are drawn with, and their textures: floats `[h, w]`, from the random generator passed in."""

import numpy as np

HOLE = 15  # pixels: narrower gaps in an ellipse are closed before it is bent


def window(shape: tuple[int, ...], centre: np.ndarray, reach: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The part of an image of `shape` within `reach` of (row, column), and its pixels' offsets dy `[h, 1]` and dx `[1, w]`."""
    (top, bottom), (left, right) = (
        (max(0, int(c - reach)), min(side, int(c + reach) + 2)) for c, side in zip(centre, shape[:2], strict=True)
    )
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - centre[0]
    dx = np.arange(left, right, dtype=np.float32)[None, :] - centre[1]
    return np.s_[top:bottom, left:right], dy, dx


def distance(rng: np.random.Generator, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """The distance from the centre of an irregular ellipse, 1 on its outline, at offsets `dy[h, 1]` and `dx[1, w]` from it."""
    angle, stretch = rng.uniform(0, np.pi), np.exp(rng.normal(0, 0.22))
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / stretch
    v = (np.cos(angle) * dy - np.sin(angle) * dx) * stretch
    away = np.sqrt(u * u + v * v) / radius
    # The outline of a smaller blob would not be visible.
    if radius > 2:
        theta = np.arctan2(v, u)
        for k in (2, 3, 5):
            away = away * (1 + rng.normal(0, 0.3 / k) * np.cos(k * theta + rng.uniform(0, 6.3)))
    return away


def blob(rng: np.random.Generator, dy: np.ndarray, dx: np.ndarray, radius: float, bell: float = 0.5) -> np.ndarray:
    """Coverage in [0, 1] of an irregular ellipse. A share `bell` of them fade out, the others have an edge."""
    away = distance(rng, dy, dx, radius)
    if rng.random() < bell:
        return np.exp(-0.5 * (1.6 * away) ** rng.uniform(1.6, 3.5))
    return 1 / (1 + np.exp(np.clip((away - 1) * radius / rng.uniform(0.35, 0.35 + 0.35 * radius), -30, 30)))


def shifted(values: np.ndarray, down: int, right: int) -> np.ndarray:
    """`[h, w]` moved by so many pixels. What comes in from outside repeats the border."""
    height, width = values.shape
    rows, columns = np.clip(np.arange(height) - down, 0, height - 1), np.clip(np.arange(width) - right, 0, width - 1)
    return values[np.ix_(rows, columns)]


def bowed(values: np.ndarray, rise: float) -> np.ndarray:
    """`[h, w]` of ellipses that fade out sidewards as exp(-x⁴), bent into crescents: at x = 1 they lie `rise` pixels higher."""
    from scipy import ndimage  # a third of a second, which most runs need not wait

    # A column's highest value tells how far it is from the middle of its ellipse, apart from holes, which a mole makes in skin.
    highest = ndimage.gaussian_filter1d(ndimage.grey_closing(values.max(0), HOLE), 1.5)
    square = np.sqrt(-np.log(np.clip(highest, 0.02, 1)))
    rows = np.arange(len(values))[:, None] + np.rint(rise * square).astype(int)
    return np.take_along_axis(values, np.clip(rows, 0, len(values) - 1), 0)


def uneven(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A factor around 0.7, from coarse noise: `float32[h, w]` in [0, 1]."""
    return np.clip(0.7 + 0.25 * _noise(rng, shape, 4, 4), 0, 1)


def mottled(rng: np.random.Generator, shape: tuple[int, ...], scale: float, amount: float) -> np.ndarray:
    """A factor around 1, `float32[h, w]`, at least 0, that varies over `scale` pixels, and half as much over a third of it."""
    factor = np.ones(shape, np.float32)
    for pixels, strength in ((scale, amount), (scale / 3, 0.5 * amount)):
        # Noise finer than a pixel would be no texture.
        cells = [2 + int(np.ceil(side / max(pixels, 1.0))) for side in shape]
        factor += strength * _noise(rng, shape, *cells)
    return np.maximum(factor, 0)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    """Normal noise at `rows` × `columns` points, and between them by linear interpolation: `float32[h, w]`."""
    grain = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    down, right = np.linspace(0, rows - 1, shape[0]), np.linspace(0, columns - 1, shape[1])
    return _interpolate(_interpolate(grain, down).T, right).T


def _interpolate(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation of the rows of `values` at fractional row numbers."""
    low = np.minimum(at.astype(int), len(values) - 2)
    t = (at - low).astype(np.float32)[:, None]
    return values[low] * (1 - t) + values[low + 1] * t
