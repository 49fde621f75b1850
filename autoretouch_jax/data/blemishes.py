"""Procedural blemishes: a clean face → the same face with what retouchers remove: spots, pimples, their marks, moles, freckles,
scars, discoloured patches, and shadows below the eyes.

All randomness comes from the generator passed in. Images are uint8 `[H, W, 3]`; pixels outside every blemish come back
bit-identical. Where the skin is known (`face_parts.regions`), blemishes lie on bare skin alone, and not on hair, lips,
eyes or cloth. The families and their ranges are ours. They are broad on purpose, so that the network also learns to remove
blemishes that this file does not draw. `pigments.py` draws a share of the crops in another way.
"""

from typing import NamedTuple

import numpy as np

from autoretouch_jax.config import BlemishConfig
from autoretouch_jax.data.pigments import add_pigments
from autoretouch_jax.data.shapes import blob, shifted, uneven, window

# For each hue the lowest and the highest multipliers of the local skin colour (R, G, B).
PALETTE = {
    "red": ((0.75, 0.35, 0.35), (1.1, 0.85, 0.85)),
    "brown": ((0.35, 0.25, 0.2), (0.85, 0.75, 0.7)),
    "dark": ((0.1, 0.1, 0.1), (0.6, 0.6, 0.6)),
    "purple": ((0.6, 0.4, 0.5), (0.95, 0.8, 0.95)),
    "pale": ((1.05, 1.05, 1.0), (1.5, 1.5, 1.5)),
}
# For each family its share of the blemishes. Shadows below the eyes are drawn once a crop: `blemish.hollows`.
FAMILY_SHARES = {"spot": 0.25, "pimple": 0.22, "mark": 0.22, "mole": 0.1, "freckles": 0.04, "line": 0.03, "patch": 0.14}


class Canvas(NamedTuple):
    """An image, float32 `[h, w, 3]`, which is painted on in place, and how far each pixel is skin, float32 `[h, w]`."""

    image: np.ndarray
    skin: np.ndarray


def add_blemishes(
    rng: np.random.Generator, clean: np.ndarray, config: BlemishConfig, regions: np.ndarray | None = None
) -> np.ndarray:
    """`uint8[H, W, 3]` → the blemished image, of the same shape. Blemishes are centred on skin; without skin there are none.

    `regions` is what `face_parts.regions` returns. Without it, blemishes are centred on pixels of any skin's colour.
    """
    # A network that never sees clean skin learns that every crop must be changed.
    if rng.random() < config.clean_share:
        return clean
    # Without them nothing is drawn here, so that runs of before go on with the same crops.
    if regions is not None and config.pigments > 0 and rng.random() < config.pigments:
        return add_pigments(rng, clean, config, regions)
    height, width = clean.shape[:2]
    if regions is None:
        on_skin = np.flatnonzero(skin_mask(clean))
        canvas = Canvas(clean.astype(np.float32), np.ones((height, width), np.float32))
    else:
        on_skin = np.flatnonzero(regions[..., 0] > 127)
        canvas = Canvas(clean.astype(np.float32), regions[..., 0].astype(np.float32) / 255)
    if on_skin.size == 0:
        return clean
    low, high = np.log(config.per_megapixel)
    # Log-uniform, so that crops with few blemishes are as common as crops with many.
    count = rng.poisson(np.exp(rng.uniform(low, high)) * height * width / 1e6)
    # Shadows and patches lie below the rest, as they do in skin.
    if regions is not None and rng.random() < config.hollows:
        _hollows(rng, canvas, regions[..., 1].astype(np.float32) / 255, config)
    families = list(rng.choice(list(FAMILY_SHARES), size=count, p=list(FAMILY_SHARES.values())))
    families.sort(key=lambda family: family != "patch")
    for family, position in zip(families, rng.choice(on_skin, size=count), strict=True):
        centre = np.array(divmod(int(position), width), np.float32)
        _PAINTERS[family](rng, canvas, centre, config)
    return np.clip(np.rint(canvas.image), 0, 255).astype(np.uint8)


def skin_mask(image: np.ndarray) -> np.ndarray:
    """`bool[H, W]`: pixels whose colour could be skin, of any complexion. In a black-and-white photo every pixel could be.

    A generous box in YCbCr (after Chai and Ngan 1999, widened). It decides where blemishes are centred when no face is known.
    """
    r, g, b = np.moveaxis(image.astype(np.float32), -1, 0)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = 128 + 0.564 * (b - luma), 128 + 0.713 * (r - luma)
    # Not darker than deep shadow, and neither green nor blue.
    mask = (luma > 35) & (cb > 75) & (cb < 129) & (cr > 131) & (cr < 180)
    grey = np.abs(r - b).mean() < 2
    return np.ones_like(mask) if grey else mask


def _window(canvas: Canvas, centre: np.ndarray, reach: float) -> tuple[Canvas, np.ndarray, np.ndarray]:
    """Returns a view of the canvas within `reach` of the centre, and its pixels' offsets (dy, dx) from the centre."""
    cut, dy, dx = window(canvas.skin.shape, centre, reach)
    # Views, not copies: painting on them paints on the image.
    return Canvas(canvas.image[cut], canvas.skin[cut]), dy, dx


def _radius(rng: np.random.Generator, config: BlemishConfig, power: float = 1.5) -> float:
    """A radius between the config's bounds, log-scaled. A higher power favours small ones."""
    low, high = np.log(config.radius)
    return float(np.exp(low + (high - low) * rng.random() ** power))


def _colour(rng: np.random.Generator, kind: str | None = None) -> np.ndarray:
    if kind is None and rng.random() < 0.04:  # a few have any colour at all: ink, make-up, a stain
        return rng.uniform(0.2, 1.6, 3).astype(np.float32)
    kind = kind or str(rng.choice(list(PALETTE), p=[0.42, 0.28, 0.06, 0.1, 0.14]))
    low, high = np.array(PALETTE[kind], np.float32)
    shared = rng.random()  # the channels share most of the draw, so that hues stay plausible
    return (low + (high - low) * np.clip(shared + rng.normal(0, 0.12, 3), 0, 1)).astype(np.float32)


def _paint(rng: np.random.Generator, view: Canvas, alpha: np.ndarray, colour: np.ndarray, cover: float | None = None) -> None:
    """Multiplies the skin in `view` by `colour`, or covers it with `colour` × local skin, by `alpha[h, w]`, in place.

    `cover` is how much of the skin's texture and shading it hides: 0 none, as a pigment in the skin, 1 all of it, as a crust.
    By default it is drawn at random.
    """
    # Coverage this faint would change a pixel by about one level at most. Such pixels must come back bit-identical.
    alpha = alpha * view.skin
    alpha = np.where(alpha < 0.004, 0, alpha)[..., None]
    weight = alpha.sum()
    if weight == 0:
        return
    # Relative to the mean colour below the blemish, so that it darkens dark skin and light skin alike.
    image = view.image
    skin = (image * alpha).sum((0, 1)) / weight
    goal = np.clip(skin * colour, 0, 255)
    cover = rng.random() * 0.9 if cover is None else cover
    image += alpha * (cover * (goal - image) + (1 - cover) * image * (colour - 1))


def _strength(rng: np.random.Generator, config: BlemishConfig) -> float:
    """A strength between the config's bounds. Faint ones are more common: most of what retouchers remove is faint."""
    low, high = config.strength
    return float(low + (high - low) * rng.random() ** 1.4)


# ---- the families -----------------------------------------------------------------------------------------------------------


def _spot(rng, canvas, centre, config) -> None:
    """A round discoloration of any hue and sharpness."""
    radius = _radius(rng, config)
    view, dy, dx = _window(canvas, centre, 3 * radius + 2)
    _paint(rng, view, _strength(rng, config) * blob(rng, dy, dx, radius), _colour(rng))


def _pimple(rng, canvas, centre, config) -> None:
    """A raised red spot: one side is lit and the other shaded. Many have a core: a white head, a dark crust, a red dot."""
    radius = _radius(rng, config)
    view, dy, dx = _window(canvas, centre, 3 * radius + 2)
    strength = _strength(rng, config)
    _paint(rng, view, strength * blob(rng, dy, dx, radius), _colour(rng, "red"))
    if rng.random() < 0.6:
        core = max(0.7, radius * rng.uniform(0.2, 0.5))
        off = rng.normal(0, 0.2 * radius, 2)
        kind = str(rng.choice(["pale", "pale", "dark", "red", "brown"]))
        _paint(rng, view, min(1.0, 1.3 * strength) * blob(rng, dy - off[0], dx - off[1], core), _colour(rng, kind))
    if radius > 1.5:
        angle = rng.uniform(0, 2 * np.pi)
        slope = (np.cos(angle) * dx + np.sin(angle) * dy) / radius * np.exp(-0.5 * (dx * dx + dy * dy) / radius**2)
        light = rng.uniform(0, 0.15) * strength * slope * view.skin
        view.image[...] *= 1 + np.where(np.abs(light) < 0.006, 0, light)[..., None]


def _mark(rng, canvas, centre, config) -> None:
    """What a pimple leaves: flat, soft, brown, red or purple, and the skin's texture shows through."""
    radius = 1.3 * _radius(rng, config, power=0.9)
    view, dy, dx = _window(canvas, centre, 3 * radius + 2)
    colour = _colour(rng, str(rng.choice(["brown", "red", "purple"], p=[0.35, 0.4, 0.25])))
    _paint(rng, view, 0.6 * _strength(rng, config) * blob(rng, dy, dx, radius, bell=0.7), colour, cover=0.15 * rng.random())


def _mole(rng, canvas, centre, config) -> None:
    """A dark brown spot with a clear edge."""
    radius = 0.6 * _radius(rng, config)
    view, dy, dx = _window(canvas, centre, 3 * radius + 2)
    strength = min(1.0, 0.3 + _strength(rng, config))
    _paint(rng, view, strength * blob(rng, dy, dx, radius, bell=0.2), _colour(rng, str(rng.choice(["brown", "dark"]))))


def _freckles(rng, canvas, centre, config) -> None:
    """A few small brown, red or dark dots scattered around the centre."""
    spread, strength = rng.uniform(4, 24), _strength(rng, config)
    colour = _colour(rng, str(rng.choice(["brown", "red", "brown", "dark"])))
    for _ in range(rng.integers(3, 9)):
        position = centre + rng.normal(0, spread, 2)
        if (position >= 0).all() and (position < canvas.skin.shape).all():
            radius = rng.uniform(0.6, 2.2)
            view, dy, dx = _window(canvas, position, 3 * radius + 2)
            _paint(rng, view, strength * rng.uniform(0.5, 1) * blob(rng, dy, dx, radius), colour)


def _line(rng, canvas, centre, config) -> None:
    """A scar, a scratch or a stray hair: a gently bent stroke with soft ends."""
    length, half_width = rng.uniform(4, 28), rng.uniform(0.4, 1.8)
    view, dy, dx = _window(canvas, centre, length + 4 * half_width)
    angle, bend = rng.uniform(0, np.pi), rng.normal(0, 0.015)
    along = np.cos(angle) * dx + np.sin(angle) * dy
    across = np.cos(angle) * dy - np.sin(angle) * dx - bend * along * along
    alpha = np.exp(-0.5 * (across / half_width) ** 2) / (1 + np.exp(np.clip(np.abs(along) - length, -30, 30)))
    _paint(rng, view, _strength(rng, config) * alpha, _colour(rng))


def _patch(rng, canvas, centre, config) -> None:
    """A large, faint and uneven discoloration: irritation, pigmentation, shine."""
    low, high = np.log(config.patch)
    radius = float(np.exp(rng.uniform(low, high)))
    view, dy, dx = _window(canvas, centre, 2 * radius + 2)
    alpha = blob(rng, dy, dx, radius, bell=0.7) * uneven(rng, view.skin.shape)
    colour = _colour(rng, str(rng.choice(["red", "brown", "purple", "pale"], p=[0.6, 0.2, 0.1, 0.1])))
    _paint(rng, view, 0.45 * _strength(rng, config) * alpha, colour, cover=0.15 * rng.random())


def _hollows(rng, canvas, hollow: np.ndarray, config) -> None:
    """The shadows below both eyes: brown, purple, reddish or just dark. `hollow[h, w]` is their usual place and form."""
    if hollow.max() < 0.2:
        return
    # Mostly lower than the usual place, and narrower or wider.
    reach = config.patch[1]
    hollow = shifted(hollow, round(reach * rng.uniform(-0.1, 0.35)), round(reach * rng.uniform(-0.1, 0.1)))
    alpha = 0.7 * _strength(rng, config) * hollow ** rng.uniform(0.5, 1.8) * uneven(rng, hollow.shape)
    _paint(
        rng, canvas, alpha, _colour(rng, str(rng.choice(["purple", "brown", "dark", "red"], p=[0.4, 0.3, 0.2, 0.1]))), cover=0.0
    )


# By name, because tests draw each family alone.
_PAINTERS = {
    "spot": _spot,
    "pimple": _pimple,
    "mark": _mark,
    "mole": _mole,
    "freckles": _freckles,
    "line": _line,
    "patch": _patch,
}
