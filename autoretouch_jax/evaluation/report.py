"""Metrics as a table and as CSV, images as a picture."""

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from autoretouch_jax.evaluation import metrics
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.tables import text_table

AMPLIFY = 8  # the difference is shown as 128 + 8 · (output − source)
# The columns of the table in their order, each with its title and format. A metric that is not here is in the JSON alone.
COLUMNS = {
    "psnr_pooled": ("pooled PSNR dB", "{:.2f}"),
    "psnr_rgb_u8": ("mean PSNR dB", "{:.2f}"),
    "ssim_rgb_u8_gauss11": ("SSIM", "{:.4f}"),
    "edit_psnr_pooled": ("pooled edit PSNR dB", "{:.2f}"),
    "edit_recovered": ("edit recovered", "{:.3f}"),
    "outside_error": ("outside error /255", "{:.3f}"),
    "outside_identical": ("outside identical", "{:.2%}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "alone_error": ("leave-alone error /255", "{:.4f}"),
    "alone_identical": ("leave-alone identical", "{:.3%}"),
}


def cell(name: str, values: Mapping[str, Any]) -> str:
    """Returns a metric of a row as the tables show it: a dash where no image has it, ∞ for a PSNR without any error."""
    value = metrics.score(values, name)
    if value is None or math.isnan(value):
        return "–"
    interval = values.get(f"{name}_interval")
    ends = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return "∞" if math.isinf(value) else COLUMNS.get(name, ("", "{:.4g}"))[1].format(value) + ends


def table(result: dict[str, Any]) -> str:
    """Returns the table as text: a row for the identity, one for each model, and the number of images behind each column."""
    models = result.get("models", {"model": result["model"]})
    names = [name for name in COLUMNS if name in result["model"]]
    rows = {"identity": result["identity"], **models}
    lines = [[label, *(cell(name, values) for name in names)] for label, values in rows.items()]
    # One number holds for every row: which images have a metric depends on source and target alone.
    lines.append(["images", *(str(result["model"]["n"][name]) for name in names)])
    text = [text_table(["", *(COLUMNS[name][0] for name in names)], lines)]
    counts = [f"{result['n']} pair(s)"] if result["n"] else []
    counts += [f"{len(result['alone'])} photograph(s) to be left alone"] if "alone" in result else []
    text.append(f"over {' and '.join(counts)}; identity is doing nothing; in brackets a 95 % interval over pairs")
    if worst := result.get("worst"):
        text.append("changed most, though nothing should change: " + ", ".join(worst))
    return "\n".join(text)


def as_csv(result: dict[str, Any]) -> str:
    """Returns every metric and sum of every image as CSV: a row for the identity and one for each model.

    A metric that the image does not have is empty.
    """
    rows = []
    for image in [*result["images"], *result.get("alone", [])]:
        for label, values in {"identity": image["identity"], **image.get("models", {"model": image["model"]})}.items():
            row = {"image": image["name"], "model": label, **values, **values.get("sums", {})}
            row.pop("sums", None)
            rows.append(row)
    text = io.StringIO()
    # Photographs that should not change have other metrics than pairs.
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
