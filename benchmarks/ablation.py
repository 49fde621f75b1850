"""Compares the recommended network with AutoRetouch as published, small, on one machine: same data, same minutes, one table.

    python benchmarks/ablation.py --faces FACES --vgg VGG16 --source BEFORE --target AFTER --minutes 4 --out runs/ablation

FACES are clean portraits, on which blemishes are drawn while training. BEFORE and AFTER are held-out pairs. The speed of each
variant is measured first, so that all train for the same time. The seed is 0 throughout. Ten times on the way the pairs are
measured too: `quality.png` and the second table show how soon a model is worth having. Measuring does not count as time. The
same command goes on where it was stopped.

    python benchmarks/ablation.py --only published ours --minutes 30 …   # quality per hour: the two ends of the table alone
"""

import argparse
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt

from autoretouch_jax.config import AutoRetouch, AutoRetouchPatchGAN, Config, load
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.demo.demo import steps_for
from autoretouch_jax.evaluation import evaluate, report
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.runtime.tables import text_table
from autoretouch_jax.training import history, loop

MEASURED = 10  # how often the held-out pairs are measured while training
GOALS = (0.1, 0.2, 0.3, 0.4)  # shares of the edit that are recovered

Curve = list[tuple[float, float]]  # (seconds of training, share of the edit recovered)


def variants(ours: Config) -> dict[str, Config]:
    """Returns recipes from the published one to ours, a few changes at a time. Data and batch are those of `ours`."""
    published = load("autoretouch.py")
    same = {"perceptual_layers": ("relu1_2",), "perceptual_downsample": 2, "vgg_weights": ours.loss.vgg_weights}
    published = dataclasses.replace(
        ours,
        generator=AutoRetouch(width=16, blocks=6),
        discriminator=AutoRetouchPatchGAN(width=16),
        loss=dataclasses.replace(published.loss, **same),
        optim=dataclasses.replace(published.optim, ema=ours.optim.ema),
    )
    residual = dataclasses.replace(published, generator=AutoRetouch(width=16, blocks=6, head="residual", norm="none"))
    weighted = dataclasses.replace(
        residual,
        discriminator=ours.discriminator,
        loss=dataclasses.replace(ours.loss, mask_weight=0.0),
        optim=dataclasses.replace(ours.optim, generator_optimizer="adam"),
    )
    return {
        "published": published,
        "residual": residual,  # output = input + delta, no norm
        "weighted": weighted,  # and our losses and learning rates
        "ours-adam": edited(ours, optim={"generator_optimizer": "adam"}),  # and our network with its gate
        "ours": ours,  # and Muon
    }


def edited(config: Config, **groups: dict[str, Any]) -> Config:
    """Returns a copy with some values of some groups replaced."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, **changed)


def quality(workdir: Path) -> Curve:
    """Returns what was recovered of the held-out pairs' edit over the seconds of training, those of measuring left out."""
    run = history.read(workdir)
    # The median is the speed of the windows in which nothing was measured or saved.
    seconds = run.config["train"]["batch"] / statistics.median(line["images_per_s"] for line in run.metrics)
    return [(step * seconds, value) for step, value in run.validation("edit_recovered") if value is not None]


def how_soon(curves: dict[str, Curve]) -> str:
    """A table: after how many seconds each variant recovered how much of the edit."""
    first = {
        name: [next((f"{seconds:.0f}" for seconds, value in curve if value >= goal), "not reached") for goal in GOALS]
        for name, curve in curves.items()
    }
    return text_table(["seconds until", *map(str, GOALS)], [[name, *cells] for name, cells in first.items()])


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Saves a picture of the curves."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    axes.axhline(0, color="black", linestyle="--", linewidth=1, label="doing nothing")
    # A network that still spoils the image is far below; how far would hide the rest.
    axes.set(xlabel="seconds of training", ylabel="edit recovered", ylim=(-0.5, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains every variant, then prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("faces", "vgg", "source", "target", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    ours = edited(load("portraits.py"), data={"root": str(options.faces)}, loss={"vgg_weights": str(options.vgg)})
    pairs = PairSource(options.source, options.target)
    held_out = dataclasses.replace(ours.data.validation, source=str(options.source), target=str(options.target))
    models = {}
    for name, config in variants(ours).items():
        if options.only and name not in options.only:
            continue
        config = resolve(config)
        workdir = options.out / name
        # A run that was stopped goes on with the steps that it began with.
        begun = history.read(workdir).config
        steps = begun["train"]["steps"] if begun else steps_for(config, options.minutes)
        train = {"steps": steps, "sample_every": steps, "checkpoint_every": steps, "log_every": max(1, steps // 100)}
        validation = dataclasses.replace(held_out, every=math.ceil(steps / MEASURED), images=len(pairs))
        if status := loop.run(edited(config, train=train, data={"validation": validation}), workdir):
            raise SystemExit(status)  # the same command goes on
        models[name] = load_model(workdir)
    result, _ = evaluate.evaluate(models, pairs)
    evaluate.write_result(options.out / "eval.json", result)
    print(report.table(result))
    for name, means in result.get("models", dict.fromkeys(models, result["model"])).items():
        print(f"{name}: edit_recovered before the gate {means['edit_recovered_ungated']:.3f}")
    curves = {name: quality(options.out / name) for name in models}
    print(how_soon(curves))
    draw(curves, options.out / "quality.png")
    print(f"over time: {options.out / 'quality.png'}")


if __name__ == "__main__":
    main()
