"""Numbers as a table, images as a picture."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autoretouch_jax import files

AMPLIFY = 8  # the difference panel: 128 + 8 · (output − source)
COLUMNS = {
    "psnr_rgb_u8": ("PSNR dB", "{:.2f}"),
    "ssim_rgb_u8_gauss11": ("SSIM", "{:.4f}"),
    "edit_psnr": ("edit PSNR dB", "{:.2f}"),
    "edit_recovered": ("edit recovered", "{:.3f}"),
    "outside_error": ("outside error /255", "{:.3f}"),
    "outside_identical": ("outside identical", "{:.2%}"),
    "lpips": ("LPIPS", "{:.4f}"),
}
DO_NOTHING = {"edit_recovered": 0.0, "outside_error": 0.0, "outside_identical": 1.0}  # by definition


def table(result: dict[str, Any]) -> str:
    """The identity's row and each model's, as text."""
    models = result.get("models", {"model": result["model"]})
    columns = {key: column for key, column in COLUMNS.items() if key in result["model"]}
    rows = [["", *(title for title, _ in columns.values())]]
    for name, means in {"identity": DO_NOTHING | result["identity"], **models}.items():
        rows.append([name, *(form.format(means[key]) if means[key] is not None else "–" for key, (_, form) in columns.items())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"means over {result['n']} image(s); identity is doing nothing")
    left_out = {name: count for name, count in result["model"]["undefined"].items() if count and name in columns}
    if left_out:
        lines.append("left out where undefined: " + ", ".join(f"{name} {count}" for name, count in left_out.items()))
    return "\n".join(lines)


def comparison(source: np.ndarray, output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Side by side: source, output, target, amplified difference. uint8 `[…, H, W, 3]` → `[…, H, 4W, 3]`."""
    change = np.clip(128 + AMPLIFY * (output.astype(np.int16) - source), 0, 255).astype(np.uint8)
    return np.concatenate([source, output, target, change], axis=-2)


def save_picture(path: Path, image: np.ndarray) -> None:
    """Write a PNG that appears whole or not at all."""
    written = io.BytesIO()
    Image.fromarray(image).save(written, format="PNG")
    files.write(path, written.getvalue())
