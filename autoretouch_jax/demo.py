"""`autoretouch demo`: from nothing to before/after pictures and honest numbers in a few minutes on a CPU."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from autoretouch_jax import config as configs
from autoretouch_jax.config import BlemishConfig, Config
from autoretouch_jax.data import faces
from autoretouch_jax.data.blemish import add_blemishes
from autoretouch_jax.data.sources import PairSource
from autoretouch_jax.errors import Refused
from autoretouch_jax.evaluation import evaluate, report
from autoretouch_jax.models.bundle import load_model
from autoretouch_jax.training import loop

TRAINING_FACES, TRAINING_PHOTOS, HELD_OUT_FACES = 24, 40, 5
HELD_OUT_SEED = 1_000_000  # drawn faces from here on are never trained on
WARM_UP_STEPS, TIMED_SECONDS = 2, 5.0
LEAST_STEPS = 4
MARGIN = 0.88  # the run also samples, logs and saves, and a shared machine has slower minutes


def run(minutes: float, workdir: Path) -> int:
    """Make the data, train for `minutes`, evaluate, show where to look; returns the exit status.

    The same command again resumes.
    """
    if not minutes > 0:
        raise Refused(f"--minutes {minutes}: must be positive")
    config = configs.load("demo.py")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(workdir / "data" / "train")))
    config = configs.resolve(config)
    stored = workdir / "config.json"
    if stored.is_file():  # refuse before the data are touched
        configs.refuse_other_run(config, stored)
    make_data(workdir / "data")
    steps = json.loads(stored.read_text())["train"]["steps"] if stored.is_file() else steps_for(config, minutes)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    if status := loop.run(config, workdir):
        return status
    return show(workdir)


def make_data(folder: Path) -> None:
    """`train/` (clean faces, drawn and photographed) and `heldout/source`, `heldout/target` (others, blemished once)."""
    if (folder / "complete").is_file():
        return
    print(
        f"making {TRAINING_FACES + TRAINING_PHOTOS} pictures to learn from and {HELD_OUT_FACES + 1} to be measured on",
        flush=True,
    )
    for name in ("train", "heldout/source", "heldout/target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in range(TRAINING_FACES):
        report.save_picture(folder / "train" / f"drawn{seed:03d}.png", faces.draw_face(seed))
    photos = faces.training_photos()
    for seed in range(TRAINING_PHOTOS):
        photo = photos[seed % 4 == 3]  # a person three times out of four, a cat the fourth
        report.save_picture(folder / "train" / f"photo{seed:03d}.png", faces.restyled(photo, seed))
    held_out = {f"drawn{i}": faces.draw_face(HELD_OUT_SEED + i) for i in range(HELD_OUT_FACES)} | {"portrait": faces.portrait()}
    blemishes = BlemishConfig(per_megapixel=(200.0, 500.0), radius=(1.0, 6.0), strength=(0.4, 0.95), clean_share=0.0)
    for number, (name, clean) in enumerate(held_out.items()):
        source = add_blemishes(np.random.default_rng([HELD_OUT_SEED, number]), clean, blemishes)
        report.save_picture(folder / "heldout" / "source" / f"{name}.png", source)
        report.save_picture(folder / "heldout" / "target" / f"{name}.png", clean)
    (folder / "complete").write_text(f"The portrait: {faces.PORTRAIT_CREDIT}.\n")


def steps_for(config: Config, minutes: float) -> int:
    """How many steps this machine makes in so many minutes, measured after warm-up, input included."""
    trainer = loop.Trainer(config)
    state, batches, steps, started = trainer.init(), trainer.batches(0), 0, 0.0
    while steps <= WARM_UP_STEPS or time.perf_counter() - started < min(TIMED_SECONDS, 60 * minutes):
        state, metrics = trainer.step(state, trainer.put(next(batches)), trainer.frozen)
        jax.block_until_ready(metrics)
        steps += 1
        if steps == WARM_UP_STEPS:
            started = time.perf_counter()
    speed = (steps - WARM_UP_STEPS) / (time.perf_counter() - started)
    return max(LEAST_STEPS, int(60 * minutes * speed * MARGIN))


def show(workdir: Path) -> int:
    """Evaluate on what was held out; print the table and where to look next."""
    held_out = workdir / "data" / "heldout"
    pairs = PairSource(held_out / "source", held_out / "target")
    result, _ = evaluate.evaluate({"model": load_model(workdir)}, pairs, workdir / "pictures")
    evaluate.write_result(workdir / "eval.json", result)
    print("\n" + report.table(result))
    print(f"""
before, after, target and amplified change of a real portrait it has never seen: {workdir / "pictures" / "portrait.png"}
  ({faces.PORTRAIT_CREDIT})
how it learned: {workdir / "samples"} and {workdir / "metrics.jsonl"}; every number: {workdir / "eval.json"}
try it on a photo:        autoretouch retouch {workdir} PHOTO.jpg --out retouched
train it on real faces:   autoretouch train configs/portraits.py --data.root FACES --workdir runs/portraits
or on before/after pairs: autoretouch train configs/autoretouch.py --data.source BEFORE --data.target AFTER --workdir runs/b""")
    return 0
