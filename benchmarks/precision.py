"""Trains recipes in float32 and in bfloat16 on the same pairs and from the same seeds, and measures both on people held out.

    python benchmarks/precision.py --faces FACES --vgg VGG16 --out runs/precision

FACES are clean portraits, one for each person; every fifth person is held out. The pairs are those of `noisy_labels.py`, with
clean targets. The networks are small, to fit a CPU, on which bfloat16 is the slower one: this is about the result alone. The
same command goes on where it was stopped. A smoke run of two minutes:

    python benchmarks/precision.py --faces FACES --vgg random --out runs/smoke --pairs 6 --steps 6 --seeds 1 --crop 64
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from noisy_labels import add_published_sizes, draw_pairs, edited, measured, plain, published, table

from autoretouch_jax.config import Config, load

PRECISIONS = ("float32", "bfloat16")


def retouch(options: argparse.Namespace, labels: str) -> Config:
    """`configs/retouch.py` with all its losses, and a smaller network."""
    config = edited(load("retouch.py"), loss={"vgg_weights": options.vgg})
    return edited(config, generator={"width": 32, "levels": 3})


RECIPES = {"portraits": plain, "retouch": retouch, "published": published}


def runs(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Config]]:
    """Yields every run: what it is called, and its config."""
    pairs = {
        name: str((options.out / "train" / folder).resolve()) for name, folder in (("source", "source"), ("target", "clean"))
    }
    for seed in range(options.seeds):
        for recipe in options.recipes:
            for precision in options.precisions:
                train = {"steps": options.steps, "sample_every": options.steps, "batch": options.batch, "seed": seed}
                config = edited(RECIPES[recipe](options, "clean"), data=pairs | {"crop": options.crop}, train=train)
                yield {"recipe": recipe, "precision": precision, "seed": seed}, edited(config, train={"precision": precision})


def main() -> None:
    """Draws the pairs, trains what is not trained, and prints every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vgg", default="download", help="VGG16's weights: a file, download or random")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=164, help="pairs to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=128)
    add_published_sizes(parser)
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str((options.out / "compiled").resolve()))
    draw_pairs(options.faces, options.out, options.pairs)
    rows = [measured(name, config, options.out) for name, config in runs(options)]
    print(table(rows, ("recipe", "precision", "seed")))


if __name__ == "__main__":
    main()
