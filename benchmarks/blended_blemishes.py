"""Blends blemishes into clean portraits: pairs to measure models with, OUT/source and OUT/target.

    python benchmarks/blended_blemishes.py --faces PORTRAITS --out PAIRS

As an editor would paint them: polygons, blurred and blended with sRGB levels. It shares no drawing with the training. Its
colours are blended as in `data/blemishes.py`, and not as pigments, as in `data/pigments.py` and `other_blemishes.py`. For
portraits outside the studio give the targets that `other_blemishes.py --light` wrote. Images are uint8 `[H, W, 3]`, RGB.
"""

import argparse
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from autoretouch_jax.data.face_parts import EYES, regions
from autoretouch_jax.data.faces import Face, find_faces
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.evaluation.metrics import psnr

SMALL, PATCHES, SHADOWED = (12, 45), (1, 4), 0.75  # small blemishes and patches of a face, and the share of faces with shadows
# For each kind its share of the small ones, its radius in units of the drawn one, how far it is blurred in radii, how much of
# it is seen, and the lowest and highest factors of the skin's red, green and blue.
KINDS = {
    "spot": (0.45, 1.0, (0.15, 0.5), (0.2, 0.85), ((0.92, 0.5, 0.5), (1.1, 0.85, 0.85))),
    "mark": (0.35, 1.3, (0.4, 0.9), (0.15, 0.6), ((0.8, 0.65, 0.6), (1.0, 0.9, 0.9))),
    "mole": (0.2, 0.6, (0.15, 0.15), (0.4, 0.95), ((0.27, 0.21, 0.18), (0.72, 0.56, 0.48))),
}
RADIUS, PATCH = (0.006, 0.018), (0.05, 0.14)  # in units of the face's size
SURE = 0.8  # skin that a blemish is centred on
FAINTEST = 0.006  # less would change a pixel by about a level at most


class Skin(NamedTuple):
    """A portrait that is painted on, float32 `[H, W, 3]`, where its skin is, float32 `[H, W]`, and its usual colour, `[3]`."""

    image: np.ndarray
    where: np.ndarray
    usual: np.ndarray


def outline(rng: np.random.Generator, centre: np.ndarray, radius: float) -> list[tuple[float, float]]:
    """The corners (x, y) of a rough ellipse around (row, column)."""
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    reach, turn, flat = radius * (1 + 0.25 * rng.uniform(-1, 1, 14)), rng.uniform(0, np.pi), rng.uniform(0.7, 1.0)
    x, y = reach * np.cos(angles), flat * reach * np.sin(angles)
    rows = centre[0] + x * np.sin(turn) + y * np.cos(turn)
    return [(float(a), float(b)) for a, b in zip(centre[1] + x * np.cos(turn) - y * np.sin(turn), rows, strict=True)]


def blend(skin: Skin, corners: list[tuple[float, float]], blur: float, tint: np.ndarray, alpha: float, cover: bool) -> None:
    """Paints a blurred polygon in place: `tint` × the skin's usual colour over it, or, without `cover`, × its own levels."""
    layer = Image.new("L", skin.where.shape[::-1], 0)
    ImageDraw.Draw(layer).polygon(corners, fill=255)
    amount = alpha * np.asarray(layer.filter(ImageFilter.GaussianBlur(float(blur))), np.float32) / 255 * skin.where
    amount = np.where(amount < FAINTEST, 0, amount)[..., None]
    goal = np.clip(skin.usual * tint, 0, 255) if cover else skin.image * tint
    skin.image[...] += amount * (goal - skin.image)


def add_blended_blemishes(rng: np.random.Generator, clean: np.ndarray, where: np.ndarray, face: Face) -> np.ndarray:
    """Returns the portrait with blemishes. They lie where `where`, float32 `[H, W]`, is above 0."""
    rows, columns = np.nonzero(where > SURE)
    own = (np.abs(rows - face.y) < 0.75 * face.size) & (np.abs(columns - face.x) < 0.55 * face.size)
    places = np.stack([rows, columns], -1)[own if own.any() else slice(None)]
    skin = Skin(clean.astype(np.float32), where, np.median(clean[tuple(places.T)], axis=0))

    def place() -> np.ndarray:
        return places[rng.integers(len(places))]

    for _ in range(rng.integers(*PATCHES)):
        radius = face.size * rng.uniform(*PATCH)
        tint = rng.uniform((1.0, 0.72, 0.75), (1.08, 0.9, 0.92))
        blend(skin, outline(rng, place(), radius), radius * rng.uniform(0.3, 0.7), tint, rng.uniform(0.25, 0.8), False)
    if rng.random() < SHADOWED:
        draw_shadows(rng, skin, face)
    kinds = rng.choice(list(KINDS), int(rng.integers(*SMALL)), p=[kind[0] for kind in KINDS.values()])
    for _, size, blur, alpha, (low, high) in (KINDS[kind] for kind in kinds):
        radius = size * face.size * np.exp(rng.uniform(*np.log(RADIUS)))
        corners = outline(rng, place(), radius)
        blend(skin, corners, radius * rng.uniform(*blur), rng.uniform(low, high), rng.uniform(*alpha), rng.random() < 0.4)
    return np.clip(np.rint(skin.image), 0, 255).astype(np.uint8)


def draw_shadows(rng: np.random.Generator, skin: Skin, face: Face) -> None:
    """A darker, bluish ellipse below each eye, both alike."""
    tint = 1 - rng.uniform(0.1, 0.45) * np.array([0.75, 0.95, 0.8]) + rng.uniform(-0.03, 0.03, 3)
    drop, width, height = face.size * rng.uniform((0.09, 0.09, 0.025), (0.11, 0.13, 0.045))
    angles = np.linspace(0, 2 * np.pi, 24)
    for x, y, _, _ in EYES:
        across = face.x + x * face.size + width * np.cos(angles)
        down = face.y + y * face.size + drop + height * (np.sin(angles) - 0.3 * np.cos(angles) ** 2)
        corners = [(float(a), float(b)) for a, b in zip(across, down, strict=True)]
        blend(skin, corners, 0.6 * height, tint, 1.0, False)


def main() -> None:
    """Draws a pair for each portrait in which a face is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="folder of clean portraits")
    parser.add_argument("--out", type=Path, required=True, help="folder for source/ and target/")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for side in ("source", "target"):
        (options.out / side).mkdir(parents=True, exist_ok=True)
    values = []
    for path in tqdm(list_images(options.faces), desc="portraits", disable=None):
        clean = read_rgb(path)
        if not (faces := find_faces(clean)):
            print(f"{path}: no face found; left out")
            continue
        where = regions(clean, faces)[..., 0].astype(np.float32) / 255
        if where.max() <= SURE:
            print(f"{path}: no skin found; left out")
            continue
        rng = np.random.default_rng([options.seed, zlib.crc32(path.stem.encode())])
        blemished = add_blended_blemishes(rng, clean, where, faces[0])
        values.append(psnr(blemished, clean) or np.inf)
        for side, image in (("source", blemished), ("target", clean)):
            Image.fromarray(image).save(options.out / side / f"{path.stem}.png")
    if not values:
        parser.error(f"--faces {options.faces}: no portrait in which a face and its skin were found")
    print(f"{len(values)} pairs in {options.out}; doing nothing: {np.mean(values):.1f} dB PSNR")


if __name__ == "__main__":
    main()
