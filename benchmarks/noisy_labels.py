"""Trains on pairs in which 30 % of the blemishes were left in the targets, and compares with the same runs on clean targets.

    python benchmarks/noisy_labels.py --faces FACES --vgg VGG16 --out runs/noisy

FACES are clean portraits, one for each person; every fifth person is held out. The program draws the pairs itself; portraits
are used again, with other blemishes, where there are fewer than `--pairs`. The same command goes on where it was stopped: runs
that are done are read from their folders. A smoke run of two minutes:

    python benchmarks/noisy_labels.py --faces FACES --vgg random --out runs/smoke --pairs 6 --steps 6 --seeds 1 --crop 64
"""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from autoretouch_jax.config import AutoRetouch, AutoRetouchPatchGAN, BlemishConfig, Config, load
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.face_parts import find_living_faces, regions
from autoretouch_jax.data.faces import scaled, span
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEUE, Refused
from autoretouch_jax.evaluation import evaluate
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.training import loop

LEFT = 0.3  # share of the blemishes that the targets keep
FACE_SIZE = 256  # of the faces in the pairs, in pixels, as in configs/portraits.py
PER_MEGAPIXEL = (250.0, 1500.0)  # blemishes of a face, drawn log-uniformly: a face of fewer can be judged spot by spot
# A retoucher who is in a hurry overlooks spots. So there are neither large patches nor shadows below the eyes, nor the faintest
# blemishes of configs/portraits.py. Pigments, whose number is not Poisson, could not be drawn in two layers.
SPOTS = {"patch": (2.0, 5.5), "strength": (0.3, 0.9), "hollows": 0.0, "pigments": 0.0, "clean_share": 0.0}
HELD_OUT = 5  # every so many-th person
SHARE_TO_KEEP, LEAST_RECOVERED = 0.85, 0.30  # of what clean labels recover; less than the second shows nothing

Row = dict[str, Any]


# ---- the pairs --------------------------------------------------------------------------------------------------------------


def head(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the head of a portrait, its face brought to `FACE_SIZE`, and where its skin is (`face_parts.regions`)."""
    image = read_rgb(path)
    faces = find_living_faces(image)
    if not faces:
        raise Refused(f"--faces: no face was found in {path}; take it out")
    image, faces = scaled(image, faces, FACE_SIZE / faces[0].size)
    face, (height, width) = faces[0], image.shape[:2]
    cut = np.s_[span(face.y - FACE_SIZE, face.y + FACE_SIZE, height), span(face.x - FACE_SIZE, face.x + FACE_SIZE, width)]
    return image[cut], regions(image, faces)[cut]


def draw(rng: np.random.Generator, clean: np.ndarray, skin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source, which has all blemishes, and the target in which a share `LEFT` of them was left.

    The number of blemishes is Poisson. So leaving each one with probability `LEFT` is the same as drawing two layers, each of
    its share of the density: the left ones, and on top of them the others.
    """
    drawn: BlemishConfig = load("portraits.py").data.blemish
    density = float(np.exp(rng.uniform(*np.log(PER_MEGAPIXEL))))

    def layer(image: np.ndarray, share: float) -> np.ndarray:
        count = (share * density, share * density)
        return add_blemishes(rng, image, dataclasses.replace(drawn, per_megapixel=count, **SPOTS), skin)

    target = layer(clean, LEFT)
    return layer(target, 1 - LEFT), target


def draw_pairs(faces: Path, out: Path, count: int) -> None:
    """Writes the pairs below `out`: `train/` with `source`, `clean` and `noisy` targets, and `test/` with `source` and `clean`.

    Portraits are used again, with other blemishes, where there are fewer than `count`; 0 takes each of them once.
    """
    paths = list_images(faces)
    people = {
        part: [p for i, p in enumerate(paths) if (i % HELD_OUT == HELD_OUT - 1) == (part == "test")]
        for part in ("train", "test")
    }
    settings = {"faces": [path.name for path in paths], "pairs": count, "left": LEFT, "density": PER_MEGAPIXEL, "spots": SPOTS}
    settings = json.loads(json.dumps(settings))  # with lists, as they are read
    stamp = out / "pairs.json"
    if stamp.is_file():
        if json.loads(stamp.read_text()) != settings:
            raise Refused(f"--out {out}: holds pairs of other --faces or --pairs, or of another version; choose another folder")
        return
    numbers = {"train": count or len(people["train"]), "test": len(people["test"])}
    for part, seed in (("train", 0), ("test", 1)):
        for number in range(numbers[part]):
            clean, skin = head(people[part][number % len(people[part])])
            source, noisy = draw(np.random.default_rng((seed, number)), clean, skin)
            images = {"source": source, "clean": clean} | ({"noisy": noisy} if part == "train" else {})
            for name, image in images.items():
                (out / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(out / part / name / f"{number:04d}.png")
    stamp.write_text(json.dumps(settings))  # last, so that a stopped drawing begins anew


# ---- the recipes ------------------------------------------------------------------------------------------------------------


def edited(config: Config, **groups: dict[str, Any]) -> Config:
    """Returns a copy with some values of some groups replaced."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, **changed)


def published(options: argparse.Namespace, labels: str) -> Config:
    """`configs/autoretouch.py` with its three losses, its learning rates and its crops anywhere; fewer channels and blocks."""
    config = edited(load("autoretouch.py"), loss={"vgg_weights": options.vgg})
    generator = AutoRetouch(width=options.width, blocks=options.blocks)
    return dataclasses.replace(config, generator=generator, discriminator=AutoRetouchPatchGAN(width=options.width))


def plain(options: argparse.Namespace, labels: str) -> Config:
    """The network, losses and optimizer of `configs/portraits.py` with the data settings for pairs of `configs/finetune.py`."""
    data = dataclasses.replace(load("finetune.py").data, face_size=0)  # the faces have been brought to one size
    # The pairs are heads and evaluated whole, so there is one gate.
    return edited(dataclasses.replace(load("portraits.py"), data=data), generator={"gate_off_faces": 0.0})


def ours(options: argparse.Namespace, labels: str) -> Config:
    """`plain`, told what share of the blemishes was left: none for clean labels."""
    return edited(plain(options, labels), loss={"left_share": LEFT if labels == "noisy" else 0.0})


def misled(options: argparse.Namespace, labels: str) -> Config:
    """`plain`, told that a share was left, for clean labels too, where that is wrong."""
    return edited(plain(options, labels), loss={"left_share": LEFT})


RECIPES = {"published": published, "plain": plain, "ours": ours, "misled": misled}


def runs(options: argparse.Namespace) -> Iterator[tuple[Row, Config]]:
    """Yields every run: what it is called, and its config."""
    for recipe in options.recipes:
        for labels in ("clean", "noisy"):
            for seed in range(options.seeds):
                folders = {
                    name: str((options.out / "train" / folder).resolve())
                    for name, folder in (("source", "source"), ("target", labels))
                }
                steps = {"steps": options.steps, "sample_every": options.steps, "batch": options.batch, "seed": seed}
                config = edited(RECIPES[recipe](options, labels), data=folders | {"crop": options.crop}, train=steps)
                yield {"recipe": recipe, "labels": labels, "seed": seed}, config


def measured(name: Row, config: Config, out: Path) -> Row:
    """Trains a run, or goes on with it, and returns its values on the held-out pairs. A run that is done is only read."""
    workdir = out / "runs" / "-".join(str(part) for part in name.values())
    stored = workdir / "held_out.json"
    # Runs of other options are not taken for this one: training refuses their folders.
    name = name | {"steps": config.train.steps, "config": hashlib.sha256(repr(config).encode()).hexdigest()}
    if stored.is_file() and (row := json.loads(stored.read_text())).get("config") == name["config"]:
        return row
    status = loop.run(config, workdir)
    if status in (EXIT_REQUEUE, EXIT_INTERRUPTED):
        raise SystemExit(status)  # the same command goes on
    if status != EXIT_DONE and not (workdir / "model").is_dir():
        return name | {"status": status, "edit_recovered": math.nan}
    pairs = PairSource(out / "test" / "source", out / "test" / "clean")
    result, _ = evaluate.evaluate({"model": load_model(workdir)}, pairs, faces="off")
    row = name | {"status": status} | result["model"] | {"identity": result["identity"]}
    if status == EXIT_DONE:
        stored.write_text(json.dumps(row, indent=1))
    return row


# ---- the answer -------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The runs as a Markdown table, below what doing nothing scores. `names` are the keys that tell the runs apart."""
    lines = [f"| {' | '.join(names)} | edit recovered | outside error /255 | PSNR dB |", "|---" * (len(names) + 3) + "|"]
    identity = next((row["identity"]["psnr_rgb_u8"] for row in rows if "identity" in row), math.nan)
    lines.append(f"| identity {'| ' * len(names)}0 | 0 | {identity:.2f} |")
    for row in rows:
        values = [
            f"{row.get(key) if row.get(key) is not None else math.nan:.3f}"
            for key in ("edit_recovered", "outside_error", "psnr_rgb_u8")
        ]
        lines.append(f"| {' | '.join([*(str(row[key]) for key in names), *values])} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row], recipe: str) -> tuple[float, float]:
    """The mean share of the edit that a recipe recovers with clean labels, and with noisy ones."""
    means = [
        np.mean([row["edit_recovered"] for row in rows if (row["recipe"], row["labels"]) == (recipe, labels)])
        for labels in ("clean", "noisy")
    ]
    return float(means[0]), float(means[1])


def verdict(rows: Sequence[Row]) -> str:
    """Whether ours holds: no run has collapsed, and noisy labels keep 85 % of what clean ones recover."""
    clean, noisy = summary(rows, "ours")
    # A collapsed network does worse than doing nothing; one that gave up did not finish.
    collapsed = [
        row
        for row in rows
        if row["recipe"] == "ours" and (row["status"] != EXIT_DONE or row["psnr_rgb_u8"] < row["identity"]["psnr_rgb_u8"])
    ]
    if collapsed:
        return f"FAILED: {len(collapsed)} run(s) of ours ended early, or below doing nothing"
    if clean < LEAST_RECOVERED:
        return f"inconclusive: with clean labels ours recovers {clean:.3f}, less than {LEAST_RECOVERED}; give more --steps"
    word = "holds" if noisy >= SHARE_TO_KEEP * clean else "FAILED"
    return f"{word}: ours keeps {noisy / clean:.1%} of it, and is asked to keep {SHARE_TO_KEEP:.0%}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the pairs, of the runs and of the published recipe."""
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vgg", default="download", help="VGG16's weights, for perceptual losses: a file, download or random")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--pairs", type=int, default=164, help="pairs to train on; 0: one for each portrait that is not held out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--width", type=int, default=16, help="channels of the published networks, which have 64")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the published generator, which has 15")


def all_measured(options: argparse.Namespace, runs: Iterable[tuple[Row, Config]]) -> list[Row]:
    """Draws the pairs, trains what is not trained, and returns the values of all runs."""
    # Runs that differ in their labels or their seed alone have the same program: it is compiled once.
    jax.config.update("jax_compilation_cache_dir", str((options.out / "compiled").resolve()))
    draw_pairs(options.faces, options.out, options.pairs)
    return [measured(name, config, options.out) for name, config in runs]


def main() -> None:
    """Draws the pairs, trains what is not trained, prints the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["published", "ours"])
    options = parser.parse_args()
    rows = all_measured(options, runs(options))
    print(table(rows, ("recipe", "labels", "seed")))
    for recipe in options.recipes:
        clean, noisy = summary(rows, recipe)
        ratio = f"ratio {noisy / clean:.3f}" if clean > 0 else "no ratio"
        print(f"{recipe}: {noisy:.3f} with noisy labels, {clean:.3f} with clean ones, {ratio}")
    if "ours" in options.recipes:
        print(verdict(rows))


if __name__ == "__main__":
    main()
