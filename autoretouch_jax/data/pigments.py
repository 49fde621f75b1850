"""Another way to draw blemishes than `blemishes.py`: few of them, each a pigment that absorbs light.

`blemishes.py` draws many at once, of any colour, so that networks learn to remove what nobody thought of. What retouchers meet
is narrower: blood below the skin, melanin in it, veins that show through, and bumps. Depths of pigments add up, and light falls
off exponentially with them (Beer and Lambert). So all depths are added, as are the logarithms of the gain by relief, and laid
over the skin at once. The pigments' colours follow Jacques (1996) and Prahl's tables of haemoglobin, loosely, because cameras
differ. The ranges are ours. `benchmarks/other_blemishes.py` has the same optics, families, mottling and crescents, so it
flatters what learned here; `benchmarks/blended_blemishes.py` does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from autoretouch_jax.config import BlemishConfig
from autoretouch_jax.data.shapes import blob, bowed, distance, mottled, shifted, window

# For each pigment the lowest and the highest absorption of red, green and blue light, relative to green.
PIGMENTS = {
    "melanin": ((0.6, 1.0, 1.1), (0.85, 1.0, 1.5)),
    "blood": ((0.02, 1.0, 0.6), (0.3, 1.0, 1.0)),
    "veins": ((0.35, 1.0, 0.5), (0.7, 1.0, 0.9)),
}
SMALL = {"pimple": 0.42, "mark": 0.38, "mole": 0.2}  # the shares of the small blemishes
MOST_PATCHES = 3  # in a crop
LEAST_DEPTH = 0.004  # a fainter layer would change a pixel by about half a level at most
LEVELS = (np.arange(256, dtype=np.float32) / 255) ** 2.2  # linear light of a level, nearly: sRGB's curve is not much different


class Layers(NamedTuple):
    """What lies over a crop, painted on in place: optical depths `[h, w, 3]`, and the logarithm of relief's gain, `[h, w]`."""

    depth: np.ndarray
    relief: np.ndarray
    absorption: dict[str, np.ndarray]  # of each pigment, float32 `[3]`, the depths in red, green and blue light


def bare(rng: np.random.Generator, shape: tuple[int, int]) -> Layers:
    """Layers in which nothing lies yet. One camera took all of a crop, so each pigment has one colour in it."""
    absorption = {}
    for pigment, bounds in PIGMENTS.items():
        low, high = np.array(bounds, np.float32)
        absorption[pigment] = low + (high - low) * rng.random(3).astype(np.float32)
    return Layers(np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32), absorption)


def add_pigments(rng: np.random.Generator, clean: np.ndarray, config: BlemishConfig, regions: np.ndarray) -> np.ndarray:
    """`uint8[H, W, 3]` → the same with blemishes on its skin. `regions` is what `face_parts.regions` returns."""
    height, width = clean.shape[:2]
    on_skin = np.flatnonzero(regions[..., 0] > 127)
    if on_skin.size == 0:
        return clean
    layers = bare(rng, (height, width))
    if rng.random() < config.hollows:
        draw_shadows(rng, layers, regions[..., 1].astype(np.float32) / 255, config)
    # The lower half of the range, because a face has fewer blemishes than a network should see.
    low, high = np.log(config.per_megapixel)
    count = rng.poisson(np.exp(rng.uniform(low, (low + high) / 2)) * height * width / 1e6)
    families = ["patch"] * int(rng.integers(MOST_PATCHES + 1)) + list(rng.choice(list(SMALL), count, p=list(SMALL.values())))
    for family, position in zip(families, rng.choice(on_skin, size=len(families)), strict=True):
        PAINTERS[family](rng, layers, np.array(divmod(int(position), width), np.float32), config)
    skin = regions[..., 0].astype(np.float32)[..., None] / 255
    exponent = skin * (np.clip(layers.relief, -0.4, 0.4)[..., None] - layers.depth)
    light = LEVELS[clean] * np.exp(exponent)
    levels = np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.2)).astype(np.uint8)
    return np.where(np.abs(exponent) < LEAST_DEPTH, clean, levels)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between two bounds, uniform in its logarithm: faint and small ones are common."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _radius(rng: np.random.Generator, config: BlemishConfig, more: float) -> float:
    """A radius between the config's bounds, of which the lower one is raised by `more` pixels, so that a spot is seen."""
    low, high = config.radius
    return _log_uniform(rng, min(low + more, high), high)


def _lay(layers: Layers, centre: np.ndarray, reach: float, form: Callable[..., np.ndarray], colour: np.ndarray) -> None:
    """Adds a layer of depth `form(dy, dx)`, float32 `[h, w]`, within `reach` of the centre."""
    cut, dy, dx = window(layers.relief.shape, centre, reach)
    layers.depth[cut] += (form(dy, dx) * _fade(dy, dx, reach))[..., None] * colour


def _fade(dy: np.ndarray, dx: np.ndarray, reach: float) -> np.ndarray:
    """1 near the centre, 0 from `reach` on: cut off, a layer would end in a straight edge, which shows where a blemish is."""
    return np.clip((reach - np.hypot(dy, dx)) / (0.25 * reach), 0, 1)


# ---- the families -----------------------------------------------------------------------------------------------------------


def _pimple(rng, layers, centre, config) -> None:
    """Blood, with a halo around it. A fifth have a pale head. Half of the larger ones are raised: one side is lit."""
    radius, depth = _radius(rng, config, 0.4), _log_uniform(rng, *config.strength)
    halo, wide = depth * rng.uniform(0, 0.5), rng.uniform(1.3, 2.2)
    pale = rng.uniform(0.5, 1.0) if rng.random() < 0.2 else 0.0

    def form(dy, dx):
        away = np.hypot(dy, dx) / radius
        core = depth * blob(rng, dy, dx, radius, bell=0.4) + halo * np.exp(-0.5 * (away / wide) ** 2)
        return core * (1 - pale * np.exp(-((away / 0.45) ** 2)))

    reach = max(4, 3.5 * wide) * radius + 2
    _lay(layers, centre, reach, form, layers.absorption["blood"] + rng.uniform(0, 0.25) * layers.absorption["melanin"])
    if radius > 1.5 and rng.random() < 0.5:
        cut, dy, dx = window(layers.relief.shape, centre, 4 * radius)
        angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.3)
        bump = np.exp(-0.5 * (dy * dy + dx * dx) / radius**2)
        slope = height * (np.cos(angle) * dy + np.sin(angle) * dx) / radius
        layers.relief[cut] += slope * bump * _fade(dy, dx, 4 * radius)


def _mark(rng, layers, centre, config) -> None:
    """What a pimple leaves: soft, red when it is new, brown when it is old."""
    radius = 1.3 * _radius(rng, config, 0.5)
    depth, brown = 0.55 * _log_uniform(rng, *config.strength), rng.random()
    colour = (1 - brown) * layers.absorption["blood"] + brown * layers.absorption["melanin"]
    _lay(layers, centre, 3 * radius + 2, lambda dy, dx: depth * blob(rng, dy, dx, radius, bell=0.9), colour)


def _mole(rng, layers, centre, config) -> None:
    """Melanin with a clear edge."""
    radius = 0.6 * _log_uniform(rng, *config.radius)
    depth = _log_uniform(rng, 0.4, 2.0)
    _lay(
        layers,
        centre,
        4 * radius + 2,
        lambda dy, dx: depth * blob(rng, dy, dx, radius, bell=0.2),
        layers.absorption["melanin"] + rng.uniform(0, 0.3) * layers.absorption["blood"],
    )


def _patch(rng, layers, centre, config) -> None:
    """Large and faint, mostly blood, without an edge. Most are mottled: more blood shows in some places than in others."""
    radius = _log_uniform(rng, 0.35 * config.patch[1], 1.25 * config.patch[1])
    depth, power = 0.45 * _log_uniform(rng, *config.strength), rng.uniform(1.5, 3)
    scale, amount = radius * _log_uniform(rng, 0.1, 0.8), rng.uniform(0.0, 0.6)

    def form(dy, dx):
        away = distance(rng, dy, dx, radius)
        return depth * np.exp(-(np.maximum(away, 1e-3) ** power)) * mottled(rng, away.shape, scale, amount)

    colour = layers.absorption["blood"] + rng.uniform(0, 0.4) * layers.absorption["melanin"]
    _lay(layers, centre, 2.8 * radius, form, colour)


def draw_shadows(rng: np.random.Generator, layers: Layers, hollow: np.ndarray, config: BlemishConfig) -> None:
    """Below both eyes alike: veins and melanin. `hollow[h, w]` is their usual place and form. Like the lid, they hang down."""
    if hollow.max() < 0.2:
        return
    reach = config.patch[1]
    hollow = bowed(hollow, reach * rng.uniform(0, 0.45))
    hollow = shifted(hollow, round(reach * rng.uniform(-0.15, 0.3)), round(reach * rng.uniform(-0.1, 0.1)))
    brown, depth = rng.random(), 0.7 * _log_uniform(rng, *config.strength)
    colour = (1 - brown) * layers.absorption["veins"] + brown * layers.absorption["melanin"]
    form = depth * hollow ** _log_uniform(rng, 0.5, 4.0) * mottled(rng, hollow.shape, reach * rng.uniform(0.3, 1.0), 0.2)
    layers.depth[...] += form[..., None] * colour


# By name, because tests draw each family alone.
PAINTERS = {"pimple": _pimple, "mark": _mark, "mole": _mole, "patch": _patch}
