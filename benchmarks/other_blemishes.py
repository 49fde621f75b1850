"""Draws other blemishes than the training's own on clean portraits: pairs to measure models with, OUT/source and OUT/target.

    python benchmarks/other_blemishes.py --faces PORTRAITS --out PAIRS
    python benchmarks/other_blemishes.py --faces PORTRAITS --out PAIRS --light --backgrounds PHOTOGRAPHS

It shares no drawing with `data/blemishes.py`: pigments absorb linear light (Beer-Lambert), pimples are raised and glossy, and
noise warps the outlines. With `data/pigments.py` it shares optics, families, mottling and the form of shadows, so it flatters
runs with `data.blemish.pigments`; `blended_blemishes.py` does not. Only skin is painted on, and the target is the portrait as
it is. With `--light` both sides are first brought out of the studio alike: another light, noise, JPEG, and another background.
Images are uint8 `[H, W, 3]`, RGB.
"""

import argparse
import io
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from tqdm import tqdm

from autoretouch_jax.data.face_parts import EYES, regions
from autoretouch_jax.data.faces import Face, find_faces
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.evaluation.metrics import psnr

# How strongly a pigment absorbs red, green and blue light, relative to green. Melanin follows the wavelength to the power of
# -3.33 (Jacques 1996), blood and veins Prahl's tables of haemoglobin with and without oxygen. The values are ours: milder,
# because a camera's channels overlap.
PIGMENTS = {"melanin": (0.76, 1.0, 1.3), "blood": (0.1, 1.0, 0.75), "veins": (0.5, 1.0, 0.65)}
# For each family its radius in units of the face's size, and its optical depth in green light, from faint to strong. With these
# twelve London portraits of 768² have a mean identity PSNR of 43 dB.
RADII = {"pimple": (0.007, 0.019), "mark": (0.008, 0.024), "mole": (0.004, 0.011), "patch": (0.06, 0.16)}
DEPTHS = {"pimple": (0.15, 0.95), "mark": (0.08, 0.48), "mole": (0.55, 2.0), "patch": (0.075, 0.3), "shadow": (0.12, 0.48)}
SMALL, SHARES = (
    (16, 54),
    {"pimple": 0.42, "mark": 0.42, "mole": 0.16},
)  # how many small blemishes a face has, and of which kinds
PATCHES, SHADOWED = (1, 4), 0.85  # how many patches a face has, and the share of faces with shadows below the eyes
SURFACE = 0.012  # linear light that skin reflects before any pigment: on dark skin, blood is seen less than on fair skin
STUDIO_DISTANCE = 9.0  # the distance in L*a*b* within which a pixel has the colour of the studio's background


@dataclass
class Layers:
    """What is laid over a photograph of `[H, W]` pixels: optical depths of pigments, relief and gloss."""

    shape: tuple[int, int]
    count: int = 0
    maps: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.maps = {name: np.zeros(self.shape, np.float32) for name in (*PIGMENTS, "relief", "gloss")}

    def add(self, name: str, centre: tuple[int, int], values: np.ndarray) -> None:
        """Adds a square of values around a centre. What lies beyond the photograph's border is cut off."""
        there, here = [], []
        for at, side, size in zip(centre, values.shape, self.shape, strict=True):
            start = at - side // 2
            there.append(slice(max(0, start), min(size, start + side)))
            here.append(slice(there[-1].start - start, there[-1].stop - start))
        self.maps[name][tuple(there)] += values[tuple(here)]

    def over(self, clean: np.ndarray, skin: np.ndarray, strength: float) -> np.ndarray:
        """Returns the photograph seen through the layers, `uint8[H, W, 3]`, where `skin`, float32 `[H, W]`, is not 0."""
        absorbed = sum(self.maps[name][..., None] * np.array(PIGMENTS[name], np.float32) for name in PIGMENTS)
        # Depths add up, so the order in which blemishes are drawn does not matter.
        exponent = np.clip(self.maps["relief"], -0.5, 0.5)[..., None] - np.maximum(absorbed, 0)
        light = linear(clean)
        gloss = self.maps["gloss"][..., None] * light.mean(-1, keepdims=True)
        amount = strength * skin[..., None]
        surface = np.minimum(SURFACE, 0.6 * light)
        seen = encoded(surface + (light - surface) * np.exp(amount * exponent) + amount * gloss)
        return np.where(skin[..., None] > 0, seen, clean)


def linear(image: np.ndarray) -> np.ndarray:
    """sRGB, uint8 or float in 0..255, as linear light, float32 in [0, 1] (IEC 61966-2-1)."""
    x = np.asarray(image, np.float32) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """Linear light as sRGB, uint8: the inverse of `linear`."""
    x = np.clip(light, 0, 1)
    levels = 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.rint(levels).astype(np.uint8)


# ---- forms ------------------------------------------------------------------------------------------------------------------


def between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """Returns a number between two bounds, uniform in its logarithm, so that faint and small ones are common."""
    return float(np.exp(rng.uniform(*np.log(bounds))))


def smooth_noise(rng: np.random.Generator, side: int, scale: float) -> np.ndarray:
    """Noise around 0 of standard deviation about 0.7, which varies over `scale` pixels: float32 `[side, side]`."""
    cells = int(np.ceil(side / max(scale, 1.0))) + 3
    enlarged = ndimage.zoom(rng.standard_normal((cells, cells)).astype(np.float32), side / (cells - 2), order=3)
    start = (len(enlarged) - side) // 2
    return enlarged[start : start + side, start : start + side]


def warped_distance(
    rng: np.random.Generator, radius: float, reach: float, stretch: float = 0.15, bend: float = 0.16
) -> np.ndarray:
    """The distance from the centre of an irregular ellipse, 1 on its outline: float32 `[side, side]`, out to `reach` radii."""
    half = int(np.ceil(reach * radius)) + 1
    # The centre lies anywhere within its pixel.
    dy, dx = (np.arange(-half, half + 1, dtype=np.float32) + rng.uniform(-0.5, 0.5) for _ in range(2))
    angle, ratio = rng.uniform(0, np.pi), np.exp(rng.normal(0, stretch))
    u = (np.cos(angle) * dx[None, :] + np.sin(angle) * dy[:, None]) / radius * ratio
    v = (np.cos(angle) * dy[:, None] - np.sin(angle) * dx[None, :]) / radius / ratio
    bends = [bend * smooth_noise(rng, 2 * half + 1, 1.1 * radius) for _ in range(2)]
    # Far from the centre the distance rises faster, so that nothing is left at the border of the square.
    far = np.maximum(0, np.hypot(dx[None, :], dy[:, None]) / radius - 0.7 * reach)
    return (np.hypot(u + bends[0], v + bends[1]) + 4 * far).astype(np.float32)


def with_edge(distance: np.ndarray, radius: float, sharpness: float) -> np.ndarray:
    """1 inside the outline and 0 outside. The edge is a `sharpness`-th of the radius wide, and not sharper than a lens."""
    return 1 / (1 + np.exp(np.clip((distance - 1) * min(sharpness, 2.0 * radius), -30, 30)))


def uneven(rng: np.random.Generator, side: int, scale: float, amount: float) -> np.ndarray:
    """A texture around 1, never below 0, float32 `[side, side]`."""
    return np.maximum(0, 1 + amount * smooth_noise(rng, side, scale) + 0.5 * amount * smooth_noise(rng, side, scale / 3))


# ---- families ---------------------------------------------------------------------------------------------------------------


def draw_pimple(rng: np.random.Generator, layers: Layers, centre: tuple[int, int], radius: float) -> None:
    """A red spot with a halo. Two thirds are raised: shaded on the side that is turned from the light, with a highlight."""
    depth = between(rng, DEPTHS["pimple"])
    distance = warped_distance(rng, radius, 4.0)
    body = with_edge(distance, radius, rng.uniform(3, 7)) * uneven(rng, len(distance), max(2.0, radius), 0.15)
    halo = rng.uniform(0.1, 0.5) * np.exp(-0.5 * (distance / 1.4) ** 2)
    red = depth * (body + halo)
    if rng.random() < 0.2:  # a pale head
        red = red * (1 - rng.uniform(0.5, 1.0) * np.exp(-((distance / 0.45) ** 2)))
    layers.add("blood", centre, red)
    layers.add("melanin", centre, rng.uniform(0.0, 0.25) * depth * body)
    if rng.random() < 0.67:
        raise_skin(rng, layers, centre, radius, distance, rng.uniform(0.06, 0.25))


def raise_skin(rng, layers: Layers, centre: tuple[int, int], radius: float, distance: np.ndarray, height: float) -> None:
    """A bump under a light from above: brighter above its top, darker below, and a small glossy highlight."""
    down, right = np.gradient(np.exp(-((distance / 0.9) ** 2)) * radius)
    turn = rng.normal(0, 0.5)
    layers.add("relief", centre, height * (np.cos(turn) * down + np.sin(turn) * right))
    half = len(distance) // 2
    dy, dx = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) / radius
    away = np.hypot(dy + 0.35 * np.cos(turn), dx + 0.35 * np.sin(turn)) / rng.uniform(0.2, 0.35)
    layers.add("gloss", centre, rng.uniform(0.05, 0.35) * np.exp(-0.5 * away**2))


def draw_mark(rng: np.random.Generator, layers: Layers, centre: tuple[int, int], radius: float) -> None:
    """What a pimple leaves: soft and flat, red when it is new, brown when it is old."""
    depth, brown = between(rng, DEPTHS["mark"]), rng.uniform(0.1, 0.8)
    distance = warped_distance(rng, radius, 2.6)
    body = np.exp(-0.5 * (1.4 * distance) ** rng.uniform(2, 3)) * uneven(rng, len(distance), max(2.0, radius), 0.2)
    layers.add("blood", centre, (1 - brown) * depth * body)
    layers.add("melanin", centre, brown * depth * body)


def draw_mole(rng: np.random.Generator, layers: Layers, centre: tuple[int, int], radius: float) -> None:
    """Dark brown, sharper than the others. Some are raised."""
    distance = warped_distance(rng, radius, 3.0, stretch=0.1, bend=0.1)
    body = with_edge(distance, radius, rng.uniform(5, 12)) * uneven(rng, len(distance), max(1.5, radius), 0.12)
    depth = between(rng, DEPTHS["mole"])
    layers.add("melanin", centre, depth * body)
    layers.add("blood", centre, rng.uniform(0, 0.2) * depth * body)
    if rng.random() < 0.25:
        raise_skin(rng, layers, centre, radius, distance, rng.uniform(0.05, 0.2))


def draw_patch(rng: np.random.Generator, layers: Layers, centre: tuple[int, int], radius: float) -> None:
    """Large, faint, mottled redness without an edge."""
    distance = warped_distance(rng, radius, 2.8, stretch=0.3, bend=0.3)
    body = np.exp(-(np.maximum(distance, 0) ** 2.5)) * uneven(rng, len(distance), radius / 4, 0.4)
    depth = between(rng, DEPTHS["patch"])
    layers.add("blood", centre, depth * body)
    layers.add("melanin", centre, rng.uniform(0, 0.3) * depth * body)


def draw_shadows(rng: np.random.Generator, layers: Layers, face: Face) -> None:
    """A soft crescent below each eye, bluish where veins show through, brown where pigment lies there. Both eyes are alike."""
    depth, brown = between(rng, DEPTHS["shadow"]), rng.uniform(0.1, 0.7)
    drop, width, thickness = rng.uniform(0.085, 0.115), rng.uniform(0.1, 0.135), rng.uniform(0.022, 0.042)
    half = int(0.28 * face.size)
    down, right = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) / face.size
    for x, y, _, _ in EYES:
        inwards = -np.sign(x) * right
        warp = 0.01 * smooth_noise(rng, 2 * half + 1, 0.12 * face.size)
        # The crescent follows the lid: lowest in its middle, higher and thinner at the corners, and darkest near the nose.
        across = (down - drop + 0.05 * (right / width) ** 2 + warp) / (thickness * np.exp(-0.3 * (right / width) ** 2))
        body = np.exp(-0.5 * across**2 - (np.abs(right) / width) ** 4) * (1 + np.clip(2.5 * inwards, -0.4, 0.4))
        body = rng.uniform(0.8, 1.1) * body * uneven(rng, 2 * half + 1, 0.06 * face.size, 0.15)
        centre = (round(face.y + y * face.size), round(face.x + x * face.size))
        layers.add("veins", centre, (1 - brown) * depth * body)
        layers.add("melanin", centre, brown * depth * body)
        layers.count += 1


PAINTERS = {"pimple": draw_pimple, "mark": draw_mark, "mole": draw_mole, "patch": draw_patch}


# ---- a face -----------------------------------------------------------------------------------------------------------------


def add_other_blemishes(
    rng: np.random.Generator, clean: np.ndarray, skin: np.ndarray, faces: list[Face], strength: float = 1.0
) -> tuple[np.ndarray, int]:
    """Returns the blemished photograph, and its number of blemishes. They lie where `skin`, float32 `[H, W]`, is above 0."""
    layers = Layers(skin.shape)
    for face in faces:
        if rng.random() < SHADOWED:
            draw_shadows(rng, layers, face)
        small = round(between(rng, SMALL))
        families = ["patch"] * int(rng.integers(PATCHES[0], PATCHES[1] + 1))
        families += list(rng.choice(list(SHARES), small, p=list(SHARES.values())))
        places = Places(rng, skin, face)
        for family in families:
            radius = face.size * between(rng, RADII[family])
            # Half a patch may lie on hair, where it does not show. A mole that is cut in half would look wrong.
            if (centre := places.draw(rng, 0.4 * radius if family == "patch" else 1.2 * radius)) is not None:
                PAINTERS[family](rng, layers, centre, radius)
                layers.count += 1
    return layers.over(clean, skin, strength), layers.count


class Places:
    """Where blemishes of one face lie: on its skin, more on the face than on ears and neck, and half of them in clusters."""

    def __init__(self, rng: np.random.Generator, skin: np.ndarray, face: Face) -> None:
        self.inside = ndimage.distance_transform_edt(skin > 0.5)
        rows, columns = np.nonzero(self.inside > 0)
        down, right = (rows - face.y) / face.size, (columns - face.x) / face.size
        own = (np.abs(right) < 0.7) & (np.abs(down) < 1.2)
        self.at = np.stack([rows, columns], -1)[own]
        weight = np.where((np.abs(right) < 0.42) & (down > -0.6) & (down < 0.5), 1.0, 0.25)[own]
        self.total = np.cumsum(weight)
        self.spread = 0.09 * face.size
        self.clusters = [self._anywhere(rng) for _ in range(3)] if len(self.at) else []

    def _anywhere(self, rng: np.random.Generator) -> np.ndarray:
        return self.at[np.searchsorted(self.total, rng.random() * self.total[-1])]

    def draw(self, rng: np.random.Generator, margin: float) -> tuple[int, int] | None:
        """Returns (row, column) of a pixel with `margin` pixels of skin around it, or None where there is hardly any."""
        for _ in range(30 if len(self.at) else 0):
            place = self._anywhere(rng)
            if rng.random() < 0.5:
                near = self.clusters[rng.integers(3)] + np.rint(rng.normal(0, self.spread, 2)).astype(int)
                place = np.clip(near, 0, np.array(self.inside.shape) - 1)
            if self.inside[tuple(place)] > margin:
                return int(place[0]), int(place[1])
        return None


# ---- out of the studio ------------------------------------------------------------------------------------------------------


def relit(rng: np.random.Generator, image: np.ndarray, backgrounds: list[Path]) -> np.ndarray:
    """Returns a studio portrait as if taken elsewhere: other light, other background if there are any, noise and JPEG."""
    light = linear(image)
    height, width = image.shape[:2]
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 1.0)
    ramp = np.cos(angle) * np.linspace(-1, 1, height)[:, None] + np.sin(angle) * np.linspace(-1, 1, width)[None, :]
    warm, tint, exposure = rng.normal(0, 0.12), rng.normal(0, 0.03), rng.normal(-0.1, 0.3)
    light *= np.exp(slope * ramp[..., None] + exposure + np.array([warm, tint, -1.3 * warm])).astype(np.float32)
    if backgrounds:
        subject = cut_out(image)[..., None]
        behind = linear(background(rng, backgrounds, (width, height)))
        light = subject * light + (1 - subject) * behind
    levels = encoded(light).astype(np.float32)
    # An S-curve, or its opposite, around middle grey.
    levels += rng.uniform(-0.12, 0.2) * (levels - 118) * (1 - np.abs(levels - 128) / 128)
    levels += rng.normal(0, rng.uniform(0.3, 2.0), levels.shape).astype(np.float32)
    stream = io.BytesIO()
    quality = int(rng.integers(78, 96))
    Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def cut_out(image: np.ndarray) -> np.ndarray:
    """How far each pixel belongs to the person before a studio's nearly uniform background: float32 `[H, W]`, 0 to 1."""
    lab = rgb2lab(ndimage.gaussian_filter(image, (0.7, 0.7, 0)))
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1)
    # The background shows along the left, right and upper border, and brightens slowly towards the lamps.
    border = np.zeros((height, width), bool)
    border[: height // 12] = border[: height // 2, : width // 12] = border[: height // 2, -width // 12 :] = True
    colour = np.broadcast_to(np.median(lab[border], axis=0), lab.shape)
    for limit in (25.0, 12.0, 8.0):
        near = border & (np.linalg.norm(lab - colour, axis=-1) < limit)
        colour = terms @ np.linalg.lstsq(terms[near], lab[near], rcond=None)[0]
    studio = ndimage.binary_opening(np.linalg.norm(lab - colour, axis=-1) < STUDIO_DISTANCE, iterations=2)
    labels, _ = ndimage.label(studio)
    # A white collar and shining hair have the background's colour, but lie elsewhere, or are small.
    large = np.bincount(labels.ravel()) > 0.002 * labels.size
    outer = [label for label in np.unique(labels[border & studio]) if label > 0 and large[label]]
    person, count = ndimage.label(~np.isin(labels, outer))
    if count == 0:
        return np.zeros((height, width), np.float32)
    largest = np.argmax(np.bincount(person.ravel())[1:]) + 1
    whole = ndimage.binary_erosion(person == largest, border_value=1)
    return ndimage.gaussian_filter(whole.astype(np.float32), 1.5)


def background(rng: np.random.Generator, photographs: list[Path], size: tuple[int, int]) -> np.ndarray:
    """Returns a part of one of the photographs, `uint8[height, width, 3]`, out of focus more or less."""
    photo = Image.fromarray(read_rgb(photographs[int(rng.integers(len(photographs)))]))
    scale = rng.uniform(0.6, 1.0) * min(photo.width / size[0], photo.height / size[1])
    left, top = rng.uniform(0, photo.width - scale * size[0]), rng.uniform(0, photo.height - scale * size[1])
    box = (left, top, left + scale * size[0], top + scale * size[1])
    part = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box))
    blur = rng.uniform(0, 0.006) * size[0]
    return ndimage.gaussian_filter(part, (blur, blur, 0))


# ---- the command ------------------------------------------------------------------------------------------------------------


def make_pair(path: Path, options: argparse.Namespace, backgrounds: list[Path]) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Returns source, target and the number of blemishes; None where no face is found."""
    photo = read_rgb(path)
    if not (faces := find_faces(photo)):
        return None
    # By its name: a portrait's blemishes do not depend on the others in the folder.
    rng = np.random.default_rng([options.seed, zlib.crc32(path.stem.encode())])
    # Skin is looked for in the studio's light, where it is found best. The new light moves nothing.
    skin = regions(photo, faces)[..., 0].astype(np.float32) / 255
    target = relit(rng, photo, backgrounds) if options.light else photo
    source, count = add_other_blemishes(rng, target, skin, faces, options.strength)
    return source, target, count


def write_pairs(options: argparse.Namespace) -> list[tuple[float, float, int]]:
    """Writes the pairs. Returns for each its PSNR in dB, its share of edited pixels, and its number of blemishes."""
    backgrounds = list_images(options.backgrounds) if options.backgrounds else []
    rows = []
    for side in ("source", "target"):
        (options.out / side).mkdir(parents=True, exist_ok=True)
    for path in tqdm(list_images(options.faces), desc="portraits", disable=None):
        if (pair := make_pair(path, options, backgrounds)) is None:
            print(f"{path}: no face found; left out")
            continue
        source, target, count = pair
        for side, image in (("source", source), ("target", target)):
            Image.fromarray(image).save(options.out / side / f"{path.stem}.png")
        rows.append((psnr(source, target) or np.inf, (source != target).any(-1).mean(), count))
    return rows


def main() -> None:
    """Writes the pairs, and prints how much was edited."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="folder of clean portraits")
    parser.add_argument("--out", type=Path, required=True, help="folder for source/ and target/")
    parser.add_argument("--strength", type=float, default=1.0, help="factor on the optical depths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="relight the portraits before drawing, both sides alike")
    parser.add_argument("--backgrounds", type=Path, help="with --light: photographs that replace the studio's background")
    options = parser.parse_args()
    if options.backgrounds and not options.light:
        parser.error("--backgrounds needs --light")
    if not (rows := write_pairs(options)):
        parser.error(f"--faces {options.faces}: no portrait with a face in it")
    decibels, shares, counts = np.array(rows).T
    print(
        f"{len(rows)} portraits: identity PSNR {decibels.mean():.2f} dB ({decibels.min():.1f} to {decibels.max():.1f}), "
        f"{shares.mean():.1%} of the pixels edited ({shares.min():.1%} to {shares.max():.1%}), "
        f"{counts.mean():.0f} blemishes a face ({counts.min():.0f} to {counts.max():.0f})"
    )


if __name__ == "__main__":
    main()
