"""Metrics as a table, images as a picture."""

import io
from typing import Any

import numpy as np
from PIL import Image

from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.tables import text_table

AMPLIFY = 8  # the difference is shown as 128 + 8 · (output − source)
# The columns of the table in their order, each with its title and format. A metric that is not here is in the JSON alone.
COLUMNS = {
    "psnr_rgb_u8": ("PSNR dB", "{:.2f}"),
    "ssim_rgb_u8_gauss11": ("SSIM", "{:.4f}"),
    "edit_psnr": ("edit PSNR dB", "{:.2f}"),
    "edit_recovered": ("edit recovered", "{:.3f}"),
    "outside_error": ("outside error /255", "{:.3f}"),
    "outside_identical": ("outside identical", "{:.2%}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "alone_error": ("leave-alone error /255", "{:.4f}"),
    "alone_identical": ("leave-alone identical", "{:.3%}"),
}
# The scores of doing nothing that follow from the definitions.
IDENTITY = {
    "edit_recovered": 0.0,
    "outside_error": 0.0,
    "outside_identical": 1.0,
    "alone_error": 0.0,
    "alone_identical": 1.0,
}


def table(result: dict[str, Any]) -> str:
    """Returns the table as text: a row for the identity and one for each model."""
    models = result.get("models", {"model": result["model"]})
    columns = {key: column for key, column in COLUMNS.items() if key in result["model"]}
    rows = []
    for name, means in {"identity": IDENTITY | result["identity"], **models}.items():
        # A value can be undefined for every image, or known for the models alone.
        values = [(means.get(key), form) for key, (_, form) in columns.items()]
        rows.append([name, *("–" if value is None else form.format(value) for value, form in values)])
    lines = [text_table(["", *(title for title, _ in columns.values())], rows)]
    counts = [f"{result['n']} pair(s)"] if result["n"] else []
    counts += [f"{len(result['alone'])} photograph(s) to be left alone"] if "alone" in result else []
    lines.append(f"means over {' and '.join(counts)}; identity is doing nothing")
    left_out = {name: count for name, count in result["model"]["undefined"].items() if count and name in columns}
    if left_out:
        lines.append("left out where undefined: " + ", ".join(f"{name} {count}" for name, count in left_out.items()))
    if worst := result.get("worst"):
        lines.append("changed most, though nothing should change: " + ", ".join(worst))
    return "\n".join(lines)


def comparison(source: np.ndarray, output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Source, output, target and amplified difference side by side: uint8 `[…, H, W, 3]` → `[…, H, 4W, 3]`."""
    difference = np.clip(128 + AMPLIFY * (output.astype(np.int16) - source), 0, 255).astype(np.uint8)
    return np.concatenate([source, output, target, difference], axis=-2)


def save_picture(path: Any, image: np.ndarray) -> None:
    """Writes a PNG that appears whole or not at all."""
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, format="PNG")
    storage.write(path, packed.getvalue())


def save_preview(path: Any, image: np.ndarray, side: int = 320) -> None:
    """Writes a small WebP of an image, uint8 `[H, W, 3]`, with sides of at most `side`. It appears whole or not at all."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)  # keeps the aspect, and never enlarges
    packed = io.BytesIO()
    picture.save(packed, format="WEBP", quality=85)
    storage.write(path, packed.getvalue())
