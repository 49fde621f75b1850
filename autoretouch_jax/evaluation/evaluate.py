"""`autoretouch evaluate`: a model on pairs of files, beside doing nothing."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autoretouch_jax.data.sources import PairSource, some
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.evaluation import metrics, report
from autoretouch_jax.models.bundle import Model, load_model, retouch_array

PROTOCOL = (
    "8-bit RGB at full resolution, as a user would see it; edit: pixels where any channel of source and target differs by "
    ">= 1/255; per image, then plain means; undefined values are null, left out of the mean and counted"
)


def evaluate(model: Model, pairs: PairSource, pictures: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """`({"n", "protocol", "identity", "model", "images"}, faults)`; a pair that cannot be decoded becomes a fault."""
    images, faults = [], []
    for index in tqdm(range(len(pairs)), desc="evaluating", unit="image", dynamic_ncols=True, disable=None):
        try:
            pair = pairs[index]
        except BadInput as error:
            faults.append(str(error))
            continue
        source, target = pair["source"], pair["target"]
        output = retouch_array(model, source)
        images.append(
            {
                "name": pairs.names[index],
                "identity": metrics.compare(source, target, source),
                "model": metrics.compare(source, target, output) | metrics.compare_edit(source, target, output),
            }
        )
        if pictures:
            path = pictures / f"{pairs.names[index]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            report.save_picture(path, report.comparison(source, output, target))
    if not images:
        raise BadInput(f"no pair could be read: {some(faults)}")
    means = {row: metrics.mean([image[row] for image in images]) for row in ("identity", "model")}
    return {"n": len(images), "protocol": PROTOCOL, **means, "images": images}, faults


def run(model: Path, source: Path, target: Path, json_path: Path | None, pictures: Path | None) -> int:
    """Check everything, evaluate, print the table, write the JSON. Returns the exit status."""
    if json_path and json_path.is_dir():
        raise Refused(f"--json {json_path}: is a folder; give a file name")
    loaded, pairs = load_model(model), PairSource(source, target)
    result, faults = evaluate(loaded, pairs, pictures)
    print(report.table(result))
    if json_path:
        write_result(json_path, result)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    return 1 if faults else 0


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON, strictly (no NaN)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
