"""The figures of a model card: pairs by skin tone, one face at several sizes, and what is changed in faces without a blemish.

    python benchmarks/card.py pretrained --source BEFORE --target AFTER --clean PORTRAITS --out runs/card

Skin tones are thirds of the people by the individual typology angle, arctan((L* - 50) / b*), of their bare skin: the larger the
lighter (Chardon et al. 1991). CLEAN are portraits without drawn blemishes, smiling if possible: what changes in eyes, mouth and
hair there is harm.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2lab
from tqdm import tqdm

from autoretouch_jax.data.face_parts import PARTS, parts, regions
from autoretouch_jax.data.faces import find_faces
from autoretouch_jax.data.folders import PairSource, PhotoSource
from autoretouch_jax.evaluation import metrics
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.runtime.tables import text_table

FACE_SIZES = (150, 400, 1000, 2500)


def typology_angle(image: np.ndarray) -> float | None:
    """Returns the individual typology angle of a portrait's bare skin, in degrees; None where no face is found."""
    skin = regions(image, find_faces(image))[..., 0] > 127
    if not skin.any():
        return None
    lightness, _, yellow = np.median(rgb2lab(image[skin][None] / 255.0)[0], axis=0)
    return float(np.degrees(np.arctan2(lightness - 50, yellow)))


def by_tone(model: Model, pairs: PairSource) -> list[list[str]]:
    """Returns a row for each third of the people, darkest first."""
    measured = []
    for i in tqdm(range(len(pairs)), desc="skin tones", disable=None):
        source, target = pairs[i].images["source"], pairs[i].images["target"]
        angle = typology_angle(target)
        sums = metrics.count(source, target, retouch_array(model, source))
        if angle is not None and sums["drawn"]:
            measured.append((angle, sums))
    measured.sort(key=lambda person: person[0])
    rows = []
    for name, indices in zip(("darkest", "middle", "lightest"), np.array_split(np.arange(len(measured)), 3), strict=True):
        third = [measured[i] for i in indices]
        angle = np.mean([angle for angle, _ in third])
        rows.append([f"{name} third, {len(third)} people, {angle:.0f}°", *pooled([sums for _, sums in third])])
    return rows


def pooled(people: list[metrics.Sums]) -> list[str]:
    """Returns what is recovered of the edits, and the error outside them, over the pixels of all people together."""
    values = metrics.ratios({name: sum(person[name] for person in people) for name in people[0]})
    return [f"{values[name]:.3f}" for name in ("edit_recovered", "outside_error")]


def by_size(model: Model, pairs: PairSource, people: int) -> list[list[str]]:
    """Returns a row for each size of the same faces, in pixels from brows to chin."""
    rows = []
    for size in FACE_SIZES:
        values = []
        for i in tqdm(range(min(people, len(pairs))), desc=f"faces of {size}", disable=None):
            pair = pairs[i].images
            if not (faces := find_faces(pair["target"])):
                continue
            factor = size / faces[0].size
            height, width = (round(side * factor) for side in pair["target"].shape[:2])
            source, target = (
                np.asarray(Image.fromarray(pair[side]).resize((width, height), Image.Resampling.LANCZOS))
                for side in ("source", "target")
            )
            values.append(metrics.count(source, target, retouch_array(model, source)))
        rows.append([f"faces of {size} pixels", *pooled(values)])
    return rows


def in_clean_faces(model: Model, photos: PhotoSource) -> list[list[str]]:
    """Returns the mean change of each part of faces without a drawn blemish, in 1/255."""
    rows: list[metrics.Values] = []
    for i in tqdm(range(len(photos)), desc="clean faces", disable=None):
        image = photos[i].images["target"]
        nothing = np.zeros(image.shape[:2], bool)
        rows.append(metrics.change_by_part(image, retouch_array(model, image), parts(image, find_faces(image)), nothing))
    means = metrics.mean(rows)
    return [[part, "–" if means[f"change_{part}"] is None else f"{means[f'change_{part}']:.3f}"] for part in PARTS]


def main() -> None:
    """Prints the tables and writes their numbers to OUT/card.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("source", "target", "clean", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--people", type=int, default=6, help="faces that are measured at several sizes")
    options = parser.parse_args()
    model, pairs = load_model(options.model), PairSource(options.source, options.target)
    pair_rows = [*by_tone(model, pairs), *by_size(model, pairs, options.people)]
    part_rows = in_clean_faces(model, PhotoSource(options.clean, "--clean"))
    print(text_table(["", "edit recovered", "outside error /255"], pair_rows))
    print(text_table(["change in clean faces", "/255"], part_rows))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "card.json").write_text(json.dumps({"pairs": pair_rows, "clean": part_rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
