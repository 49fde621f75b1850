"""Procedural blemishes: a clean face → the same face with spots, moles, freckles, scars, patches and shine.

All randomness comes from the generator passed in. Images are uint8 `[H, W, 3]`; pixels outside every blemish come back
bit-identical. The families and their ranges are ours. They are broad on purpose, so that the network also learns to
remove blemishes that this file does not draw.
"""

import numpy as np

from autoretouch_jax.config import BlemishConfig

# For each hue the lowest and the highest multipliers of the local skin colour (R, G, B).
PALETTE = {
    "red": ((0.75, 0.35, 0.35), (1.1, 0.85, 0.85)),
    "brown": ((0.35, 0.25, 0.2), (0.85, 0.75, 0.7)),
    "dark": ((0.1, 0.1, 0.1), (0.6, 0.6, 0.6)),
    "purple": ((0.6, 0.4, 0.5), (0.95, 0.8, 0.95)),
    "pale": ((1.05, 1.05, 1.0), (1.5, 1.5, 1.5)),
}
# For each family its share of the blemishes.
FAMILY_SHARES = {"spot": 0.42, "pimple": 0.18, "freckles": 0.14, "line": 0.1, "patch": 0.16}


def add_blemishes(rng: np.random.Generator, clean: np.ndarray, config: BlemishConfig) -> np.ndarray:
    """`uint8[H, W, 3]` → the blemished image, of the same shape. Blemishes are centred on skin; without skin there are none."""
    # A network that never sees clean skin learns that every crop must be changed.
    if rng.random() < config.clean_share:
        return clean
    height, width = clean.shape[:2]
    low, high = np.log(config.per_megapixel)
    # Log-uniform, so that crops with few blemishes are as common as crops with many.
    count = rng.poisson(np.exp(rng.uniform(low, high)) * height * width / 1e6)
    on_skin = np.flatnonzero(skin_mask(clean))
    if count == 0 or on_skin.size == 0:
        return clean
    image = clean.astype(np.float32)
    families = rng.choice(list(FAMILY_SHARES), size=count, p=list(FAMILY_SHARES.values()))
    for family, position in zip(families, rng.choice(on_skin, size=count), strict=True):
        centre = np.array(divmod(int(position), width), np.float32)
        _PAINTERS[family](rng, image, centre, config)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def skin_mask(image: np.ndarray) -> np.ndarray:
    """`bool[H, W]`: pixels whose colour could be skin, of any complexion. In a black-and-white photo every pixel could be.

    A generous box in YCbCr (after Chai and Ngan 1999, widened). It only decides where blemishes are centred.
    """
    r, g, b = np.moveaxis(image.astype(np.float32), -1, 0)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = 128 + 0.564 * (b - luma), 128 + 0.713 * (r - luma)
    # Not darker than deep shadow, and neither green nor blue.
    mask = (luma > 35) & (cb > 75) & (cb < 129) & (cr > 131) & (cr < 180)
    grey = np.abs(r - b).mean() < 2
    return np.ones_like(mask) if grey else mask


def _window(image: np.ndarray, centre: np.ndarray, reach: float):
    """Returns a view of the image within `reach` of the centre, and its pixels' offsets (dy, dx) from the centre."""
    height, width = image.shape[:2]
    # A view, not a copy: painting on it paints on the image.
    top, left = (max(0, int(c - reach)) for c in centre)
    bottom, right = min(height, int(centre[0] + reach) + 2), min(width, int(centre[1] + reach) + 2)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - centre[0]
    dx = np.arange(left, right, dtype=np.float32)[None, :] - centre[1]
    return image[top:bottom, left:right], dy, dx


def _radius(rng: np.random.Generator, config: BlemishConfig, power: float = 1.5) -> float:
    """A radius between the config's bounds, log-scaled. A higher power favours small ones."""
    low, high = np.log(config.radius)
    return float(np.exp(low + (high - low) * rng.random() ** power))


def _colour(rng: np.random.Generator, kind: str | None = None) -> np.ndarray:
    if kind is None and rng.random() < 0.04:  # a few have any colour at all: ink, make-up, a stain
        return rng.uniform(0.2, 1.6, 3).astype(np.float32)
    kind = kind or str(rng.choice(list(PALETTE), p=[0.36, 0.24, 0.12, 0.1, 0.18]))
    low, high = np.array(PALETTE[kind], np.float32)
    shared = rng.random()  # the channels share most of the draw, so that hues stay plausible
    return (low + (high - low) * np.clip(shared + rng.normal(0, 0.12, 3), 0, 1)).astype(np.float32)


def _paint(rng: np.random.Generator, view: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> None:
    """Moves `view` towards `colour` × local skin by `alpha[h, w]`, in place. It hides a random part of the skin's texture."""
    # Coverage this faint would change a pixel by about one level at most. Such pixels must come back bit-identical.
    alpha = np.where(alpha < 0.004, 0, alpha)[..., None]
    weight = alpha.sum()
    if weight == 0:
        return
    # Relative to the mean colour below the blemish, so that it darkens dark skin and light skin alike.
    skin = (view * alpha).sum((0, 1)) / weight
    goal = np.clip(skin * colour, 0, 255)
    cover = rng.random() * 0.9  # 0 keeps the skin's texture, 1 hides it under the blemish
    view += alpha * (cover * (goal - view) + (1 - cover) * (goal - skin))


def _blob(rng: np.random.Generator, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """Coverage in [0, 1] of an irregular ellipse, with an edge between sharp and bell-shaped."""
    angle, stretch = rng.uniform(0, np.pi), np.exp(rng.normal(0, 0.22))
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / stretch
    v = (np.cos(angle) * dy - np.sin(angle) * dx) * stretch
    distance = np.sqrt(u * u + v * v) / radius
    # The outline of a smaller blob would not be visible.
    if radius > 2:
        theta = np.arctan2(v, u)
        for k in (2, 3, 5):
            distance = distance * (1 + rng.normal(0, 0.3 / k) * np.cos(k * theta + rng.uniform(0, 6.3)))
    # Half of the blobs fade out like a bell, the others have an edge of varying sharpness.
    if rng.random() < 0.5:
        return np.exp(-0.5 * (1.6 * distance) ** rng.uniform(1.6, 3.5))
    return 1 / (1 + np.exp(np.clip((distance - 1) * radius / rng.uniform(0.35, 0.35 + 0.35 * radius), -30, 30)))


def _strength(rng: np.random.Generator, config: BlemishConfig) -> float:
    return float(rng.uniform(*config.strength))


def _spot(rng, image, centre, config) -> None:
    radius = _radius(rng, config)
    view, dy, dx = _window(image, centre, 3 * radius + 2)
    _paint(rng, view, _strength(rng, config) * _blob(rng, dy, dx, radius), _colour(rng))


def _pimple(rng, image, centre, config) -> None:
    """A red spot with a smaller core near its centre: a white head, a dark crust, or a red or brown dot."""
    radius = _radius(rng, config)
    view, dy, dx = _window(image, centre, 3 * radius + 2)
    strength = _strength(rng, config)
    _paint(rng, view, strength * _blob(rng, dy, dx, radius), _colour(rng, "red"))
    core = max(0.7, radius * rng.uniform(0.2, 0.5))
    off = rng.normal(0, 0.2 * radius, 2)
    kind = str(rng.choice(["pale", "pale", "dark", "red", "brown"]))
    _paint(rng, view, min(1.0, 1.3 * strength) * _blob(rng, dy - off[0], dx - off[1], core), _colour(rng, kind))


def _freckles(rng, image, centre, config) -> None:
    """A few small brown, red or dark dots scattered around the centre."""
    spread, strength = rng.uniform(4, 24), _strength(rng, config)
    colour = _colour(rng, str(rng.choice(["brown", "red", "brown", "dark"])))
    for _ in range(rng.integers(3, 12)):
        position = centre + rng.normal(0, spread, 2)
        if (position >= 0).all() and (position < image.shape[:2]).all():
            radius = rng.uniform(0.6, 2.2)
            view, dy, dx = _window(image, position, 3 * radius + 2)
            _paint(rng, view, strength * rng.uniform(0.5, 1) * _blob(rng, dy, dx, radius), colour)


def _line(rng, image, centre, config) -> None:
    """A scar, a scratch or a stray hair: a gently bent stroke with soft ends."""
    length, half_width = rng.uniform(4, 28), rng.uniform(0.4, 1.8)
    view, dy, dx = _window(image, centre, length + 4 * half_width)
    angle, bend = rng.uniform(0, np.pi), rng.normal(0, 0.015)
    along = np.cos(angle) * dx + np.sin(angle) * dy
    across = np.cos(angle) * dy - np.sin(angle) * dx - bend * along * along
    alpha = np.exp(-0.5 * (across / half_width) ** 2) / (1 + np.exp(np.clip(np.abs(along) - length, -30, 30)))
    _paint(rng, view, _strength(rng, config) * alpha, _colour(rng))


def _patch(rng, image, centre, config) -> None:
    """A large, faint and uneven discoloration: irritation, pigmentation, shine."""
    radius = float(config.radius[1]) * rng.uniform(0.6, 1.6)
    view, dy, dx = _window(image, centre, 2 * radius + 2)
    # Coarse noise makes the patch uneven.
    grain = rng.normal(0, 1, (4, 4)).astype(np.float32)
    rows = np.linspace(0, 3, view.shape[0])
    columns = np.linspace(0, 3, view.shape[1])
    smooth = _interpolate(_interpolate(grain, rows).T, columns).T
    alpha = _blob(rng, dy, dx, radius) * np.clip(0.7 + 0.4 * smooth, 0, 1)
    _paint(rng, view, 0.5 * _strength(rng, config) * alpha, _colour(rng, str(rng.choice(["red", "brown", "purple", "pale"]))))


def _interpolate(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation of the rows of `values` at fractional row numbers."""
    low = np.minimum(at.astype(int), len(values) - 2)
    t = (at - low).astype(np.float32)[:, None]
    return values[low] * (1 - t) + values[low + 1] * t


# By name, because tests draw each family alone.
_PAINTERS = {"spot": _spot, "pimple": _pimple, "freckles": _freckles, "line": _line, "patch": _patch}
