"""Compares the recommended network with AutoRetouch as published, small, on one machine: same data, same minutes, one table.

    python benchmarks/ablation.py --faces FACES --vgg VGG16 --source BEFORE --target AFTER --minutes 4 --out runs/ablation

FACES are clean portraits, on which blemishes are drawn while training. BEFORE and AFTER are held-out pairs. The speed of each
variant is measured first, so that all train for the same time. The seed is 0 throughout.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from autoretouch_jax.config import AutoRetouch, AutoRetouchPatchGAN, Config, load
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.demo.demo import steps_for
from autoretouch_jax.evaluation import evaluate, report
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.training import loop


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


def main() -> None:
    """Trains every variant, then prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("faces", "vgg", "source", "target", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    gate = {"gate": load("retouch.py").generator.gate}
    ours = edited(
        load("portraits.py"), generator=gate, data={"root": str(options.faces)}, loss={"vgg_weights": str(options.vgg)}
    )
    models = {}
    for name, config in variants(ours).items():
        if options.only and name not in options.only:
            continue
        config = resolve(config)
        workdir = options.out / name
        if not (workdir / "config.json").is_file():
            steps = steps_for(config, options.minutes)
            loop.run(edited(config, train={"steps": steps, "sample_every": steps, "checkpoint_every": steps}), workdir)
        models[name] = load_model(workdir)
    result, _ = evaluate.evaluate(models, PairSource(options.source, options.target))
    evaluate.write_result(options.out / "eval.json", result)
    print(report.table(result))
    for name, means in result["models"].items():
        print(f"{name}: edit_recovered before the gate {means['edit_recovered_ungated']:.3f}")


if __name__ == "__main__":
    main()
