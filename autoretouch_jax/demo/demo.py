"""The demo: makes data, trains a small model, and measures it on held-out pictures, in a few minutes on a CPU."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from autoretouch_jax.config import BlemishConfig, Config, load
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.config.resume import refuse_other_run
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.demo import faces, showcase
from autoretouch_jax.errors import EXIT_DONE, Refused
from autoretouch_jax.evaluation import evaluate, report
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.training import loop
from autoretouch_jax.training.trainer import Trainer

TRAINING_FACES, TRAINING_PHOTOS, HELD_OUT_FACES = 24, 40, 5
HELD_OUT_SEED = 1_000_000  # faces drawn with this seed and above are never trained on
# Fewer and clearer blemishes than in training, like those that a person would want removed.
HELD_OUT_BLEMISHES = BlemishConfig(per_megapixel=(200.0, 500.0), radius=(1.0, 6.0), strength=(0.4, 0.95), clean_share=0.0)
WARM_UP_STEPS, TIMED_SECONDS = 2, 5.0
FEWEST_STEPS = 4
MARGIN = 0.88  # share of the time planned for steps: a run also samples, logs and saves, and a machine has slower minutes


def run(minutes: float, workdir: Path) -> int:
    """Makes the data, trains for about `minutes`, evaluates, and says where to look. Returns the exit status.

    The same command resumes a demo that was stopped.
    """
    if not minutes > 0:
        raise Refused(f"--minutes {minutes}: must be positive")
    config = load("demo.py")
    config = resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(workdir / "data" / "train"))))
    stored = workdir / "config.json"
    if stored.is_file():
        refuse_other_run(config, stored)  # before the data of that run are touched
    make_data(workdir / "data")
    # A run that is resumed keeps its number of steps, though the machine may be slower today.
    steps = json.loads(stored.read_text())["train"]["steps"] if stored.is_file() else steps_for(config, minutes)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    # A demo that was stopped shows nothing: its model is not trained.
    if status := loop.run(config, workdir):
        return status
    return show(workdir)


def make_data(folder: Path) -> None:
    """Makes `train/`, clean faces drawn and photographed, and other faces with blemishes (`heldout/source`) and without."""
    # The file `complete` is written last: after a run that was killed, the data are made again, with the same pixels.
    if (folder / "complete").is_file():
        return
    print(
        f"making {TRAINING_FACES + TRAINING_PHOTOS} pictures to learn from and {HELD_OUT_FACES + 1} to measure on",
        flush=True,
    )
    for name in ("train", "heldout/source", "heldout/target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in range(TRAINING_FACES):
        report.save_picture(folder / "train" / f"drawn{seed:03d}.png", faces.draw_face(seed))
    person, cat = faces.training_photos()
    for seed in range(TRAINING_PHOTOS):
        photo = cat if seed % 4 == 3 else person  # False is 0, the person, three times out of four; True is 1, the cat
        report.save_picture(folder / "train" / f"photo{seed:03d}.png", faces.restyled(photo, seed))
    held_out = {f"drawn{i}": faces.draw_face(HELD_OUT_SEED + i) for i in range(HELD_OUT_FACES)} | {"portrait": faces.portrait()}
    for number, (name, clean) in enumerate(held_out.items()):
        source = add_blemishes(np.random.default_rng([HELD_OUT_SEED, number]), clean, HELD_OUT_BLEMISHES)
        report.save_picture(folder / "heldout" / "source" / f"{name}.png", source)
        report.save_picture(folder / "heldout" / "target" / f"{name}.png", clean)
    (folder / "complete").write_text(f"The portrait: {faces.PORTRAIT_CREDIT}.\n")


def steps_for(config: Config, minutes: float) -> int:
    """Returns how many steps this machine makes in so many minutes, measured after a warm-up, input included."""
    # The real step on real batches, because input and devices share the same cores.
    trainer = Trainer(config)
    # Each picture is decoded and searched for faces once. That is not what a step takes.
    for index in range(len(trainer.source)):
        trainer.source[index]
    state, batches, steps, started = trainer.init(), trainer.batches(0), 0, 0.0
    while steps <= WARM_UP_STEPS or time.perf_counter() - started < min(TIMED_SECONDS, 60 * minutes):
        state, metrics = trainer.step(state, trainer.put(next(batches)), trainer.frozen)
        jax.block_until_ready(metrics)
        steps += 1
        if steps == WARM_UP_STEPS:
            started = time.perf_counter()
    speed = (steps - WARM_UP_STEPS) / (time.perf_counter() - started)
    # At least a few steps, so that a very short demo runs to its end too.
    return max(FEWEST_STEPS, int(60 * minutes * speed * MARGIN))


def show(workdir: Path) -> int:
    """Evaluates on the held-out pictures, and prints the table and where to look next. Returns the exit status."""
    held_out = workdir / "data" / "heldout"
    pairs = PairSource(held_out / "source", held_out / "target")
    # The whole picture, because the detector takes only half of the drawn faces for faces.
    result, _ = evaluate.evaluate({"model": load_model(workdir)}, pairs, workdir / "pictures", faces="off")
    evaluate.write_result(workdir / "eval.json", result)
    print("\n" + report.table(result))
    report.save_picture(workdir / "photographs.png", showcase.side_by_side(load_model(workdir)))
    print(f"""
real, unretouched photographs through this model and through the model in the box: {workdir / "photographs.png"}
  ({"; ".join(showcase.CREDITS)})
before, after, target and amplified change of a portrait with drawn blemishes: {workdir / "pictures" / "portrait.png"}
how it learned: {workdir / "samples"} and {workdir / "metrics.jsonl"}; every number: {workdir / "eval.json"}
the model in the box on a photo:  autoretouch retouch PHOTO.jpg --out retouched
this one:                         autoretouch retouch PHOTO.jpg --model {workdir} --out retouched
train it on real faces:   autoretouch train configs/portraits.py --data.root FACES --workdir runs/portraits
or on before/after pairs: autoretouch train configs/retouch.py --data.source BEFORE --data.target AFTER --workdir runs/b""")
    return EXIT_DONE
