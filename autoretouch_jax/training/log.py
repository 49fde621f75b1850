"""`metrics.jsonl` and the sample pictures of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

AMPLIFY = 8  # the difference panel: 128 + 8 · (output − source)


class MetricsLog:
    """Appends one JSON object per logged step. On resume, lines of steps that will be made again are dropped."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resume_step]
            part = path.with_suffix(".part")
            part.write_text("".join(line + "\n" for line in kept))
            part.replace(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and flush it."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
        return float("inf")


def save_samples(path: Path, source: np.ndarray, output: np.ndarray, target: np.ndarray) -> None:
    """A picture with a row per example: source, output, target, amplified difference. uint8 `[N, H, W, 3]` each."""
    change = np.clip(128 + AMPLIFY * (output.astype(np.int16) - source), 0, 255).astype(np.uint8)
    rows = np.concatenate([source, output, target, change], axis=2)
    part = path.with_suffix(".part")
    Image.fromarray(rows.reshape(-1, *rows.shape[2:])).save(part, format="PNG")
    part.replace(path)
