"""Trains recipes in float32 and in bfloat16 on the same pairs and from the same seeds, and measures both on people held out.

    python benchmarks/precision.py --faces FACES --vgg VGG16 --out runs/precision

FACES are clean portraits, one for each person; every fifth person is held out. The pairs are those of `noisy_labels.py`, with
clean targets. The networks are small, to fit a CPU, on which bfloat16 is the slower one: this is about the result alone. The
same command goes on where it was stopped. A smoke run of two minutes:

    python benchmarks/precision.py --faces FACES --vgg random --out runs/smoke --pairs 6 --steps 6 --seeds 1 --crop 64
"""

import argparse
from collections.abc import Iterator
from typing import Any

from noisy_labels import add_options, all_measured, edited, plain, published, table

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
    add_options(parser)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    print(table(all_measured(options, runs(options)), ("recipe", "precision", "seed")))


if __name__ == "__main__":
    main()
