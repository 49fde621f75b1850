"""A work directory as a run of 100,000 steps leaves it, without training anything."""

import json
import math
from pathlib import Path

import numpy as np

from autoretouch_jax.demo.faces import draw_face
from autoretouch_jax.evaluation.report import save_preview

STEPS, EVERY, VALIDATE = 100_000, 50, 5_000
VERDICT = "The model beats doing nothing by 3.9 dB on the validation pairs, and leaves photographs alone."


def lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(step: int, random: np.random.Generator) -> dict:
    done, noise = 1 - math.exp(-step / 25_000), lambda size: float(random.normal(0, size))
    drawn = 0.03 + noise(0.001)
    return {
        "step": step,
        "images": step * 16,
        "seconds": step * 0.21,
        "images_per_s": 76 + noise(3),
        "input_wait_share": abs(noise(0.02)),
        "bad_examples": step // 40_000,
        "learning_rate": 2e-4 * 0.5 * (1 + math.cos(math.pi * step / STEPS)),
        "generator_gradient_norm": math.exp(noise(0.3)) * (1.2 - done),
        "discriminator_gradient_norm": math.exp(noise(0.4)) * 0.3,
        "loss/generator": 1.4 - 0.5 * done + noise(0.03),
        "loss/discriminator": 0.48 + noise(0.03),
        "loss/pixel": 0.0080 - 0.004 * done + noise(0.0003),
        "loss/pixel_identity": 0.0080 + noise(0.0002),
        "loss/adversarial": 0.6 + noise(0.05),
        "loss/perceptual": 0.3 - 0.1 * done + noise(0.01),
        "loss/mask": 0.02 * (1.1 - done),
        "logits/real": 0.6 + noise(0.05),
        "logits/fake": 0.4 + noise(0.05),
        "accuracy/real": 0.66 + noise(0.03),
        "accuracy/fake": 0.63 + noise(0.03),
        "share/pixel": 0.6,
        "share/adversarial": 0.25,
        "share/perceptual": 0.15,
        "edit/left": drawn * (1 - 0.8 * done),
        "edit/drawn": drawn,
        "edit/outside": 0.4 * (1.1 - done),
        "guard/skipped": 2 if step > 30_000 else 0,
        "guard/rate": 1.0,
    }


def validation(step: int, done: float) -> dict:
    identity = {"psnr_pooled": 41.2, "psnr_rgb_u8": 42.2, "ssim_rgb_u8_gauss11": 0.9911, "edit_psnr_pooled": 28.1}
    identity |= {"edit_recovered": 0.0, "edit_recovered_interval": [0.0, 0.0], "outside_error": 0.0, "outside_identical": 1.0}
    model = {
        "psnr_pooled": 40.2 + 5 * done,
        "psnr_rgb_u8": 41.2 + 5 * done,
        "ssim_rgb_u8_gauss11": 0.990 + 0.006 * done,
        "edit_psnr_pooled": 27.9 + 6 * done,
        "edit_recovered": -0.05 + 0.7 * done,
        "edit_recovered_interval": [-0.1 + 0.7 * done, 0.7 * done],
        "outside_error": 0.2 - 0.1 * done,
        "outside_identical": 0.8 + 0.15 * done,
        "alone_error": 0.02,
        "alone_identical": 0.985,
    }
    images = [
        {"name": f"face_{i:02d}", "identity": identity, "model": model | {"psnr_rgb_u8": model["psnr_rgb_u8"] - 2 + 0.5 * i}}
        for i in range(12)
    ]
    alone = [{"name": f"photo_{i}.jpg", "model": {"alone_error": 0.01 * i, "alone_identical": 1 - 0.01 * i}} for i in range(6)]
    return {
        "step": step,
        "seconds": 31.0,
        "n": 12,
        "identity": identity,
        "model": model,
        "metric": "psnr_pooled",
        "best": step <= 90_000,
        "images": images,
        "alone": alone,
    }


def events(verdict: str, level: str) -> list[dict]:
    return [
        {"step": 0, "kind": "started", "text": "The run started: 1,204,331 parameters, 5,120 pairs.", "level": "note"},
        {"step": 21_300, "kind": "skipped", "text": "An update was skipped: its gradient was not finite.", "level": "warning"},
        {"step": 30_000, "kind": "rollback", "text": "The losses ran away; went back to step 25,000.", "level": "warning"},
        {"step": 40_000, "kind": "verdict", "text": "Not yet better than doing nothing.", "level": "warning"},
        {"step": 90_000, "kind": "best", "text": "The best model so far: 45.1 dB.", "level": "good"},
        {"step": 100_000, "kind": "verdict", "text": verdict, "level": level},
        {"step": 100_000, "kind": "verdict", "text": "The discriminator sees a difference and has not won.", "level": "good"},
        {"step": 100_000, "kind": "done", "text": "All steps are done.", "level": "good"},
    ]


def write_run(workdir: Path, verdict: str = VERDICT, level: str = "good", faces: int = 6, seed: int = 0) -> Path:
    """Writes all files of a run, with 20 validations of so many faces, and returns its folder."""
    random = np.random.default_rng(seed)
    (workdir / "model").mkdir(parents=True)
    config = {
        "train": {"steps": STEPS, "batch": 16, "seed": seed, "log_every": EVERY},
        "generator": {"network": "retouch", "width": 32},
        "data": {"root": "faces", "source": None, "homepage": "https://example.org/faces"},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "model" / "model.json").write_text(json.dumps({"data_license": "CC BY 4.0"}))
    lines(workdir / "metrics.jsonl", [metrics(step, random) for step in range(EVERY, STEPS + 1, EVERY)])
    steps = range(VALIDATE, STEPS + 1, VALIDATE)
    lines(workdir / "validation.jsonl", [validation(step, 1 - math.exp(-step / 40_000)) for step in steps])
    lines(workdir / "events.jsonl", events(verdict, level))
    for face in range(faces):
        folder = workdir / "validation" / f"face_{face:02d}"
        folder.mkdir(parents=True)
        target = draw_face(face, 256)
        spots = random.random((256, 256, 1)) < 0.02
        source = np.where(spots, target // 2, target).astype(np.uint8)
        save_preview(folder / "source.webp", source)
        save_preview(folder / "target.webp", target)
        for step in steps:
            share = 1 - math.exp(-step / 40_000)
            save_preview(folder / f"{step:08d}.webp", (source + share * (target.astype(float) - source)).astype(np.uint8))
    return workdir
