"""`autoretouch evaluate`: measures models on pairs of files, and doing nothing beside them."""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autoretouch_jax.config.paths import absolute
from autoretouch_jax.data.sources import Source, whole
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, BadInput, Refused, summarise
from autoretouch_jax.evaluation import metrics, report
from autoretouch_jax.evaluation.lpips import Metric
from autoretouch_jax.inference.apply import apply_gate, network_output
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.runtime import processes, storage

TIMEOUT = 3600.0  # seconds by which one process may be slower with its share than another
PROTOCOL = (
    "8-bit RGB at full resolution, as a user would see it; edit: pixels where any channel of source and target differs by "
    ">= 1/255; per image, then plain means; undefined values are null, left out of the mean and counted"
)
_gather_number = itertools.count()  # a name may be gathered once, and a run evaluates many times


def evaluate(
    models: Mapping[str, Model], pairs: Source, pictures: Path | None = None, lpips: Metric | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Returns `({"n", "protocol", "identity", "model", "images"}, faults)`. A pair that cannot be decoded becomes a fault.

    With several models, `model` is the first one's, and `models` holds the values of each under its name: the means, and in
    `images` those of each image. Each of several processes measures a share of the pairs, and all return the same result.
    """
    images, faults = [], []
    share = range(processes.index(), len(pairs), processes.count())
    silent = None if processes.is_first() else True  # None: tqdm is silent where there is no terminal
    for index in tqdm(share, desc="evaluating", unit="image", dynamic_ncols=True, disable=silent):
        try:
            pair = whole(pairs[index])
        except BadInput as error:
            faults.append(str(error))
            continue
        source, target = pair["source"], pair["target"]
        rows: dict[str, Any] = {}
        for name, model in models.items():
            # All models run while the pair is in memory: decoding takes as long as a small model.
            rows[name], output = _measure(model, source, target, lpips)
            if pictures:
                folder = pictures / name if len(models) > 1 else pictures
                path = folder / f"{pairs.names[index]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                report.save_picture(path, report.comparison(source, output, target))
        identity = metrics.compare(source, target, source) | _lpips(lpips, source, target)
        image = {"name": pairs.names[index], "identity": identity, "model": next(iter(rows.values()))}
        images.append(image | ({"models": rows} if len(models) > 1 else {}))
    # A process without any pair takes part too: the others wait for its answer.
    images, faults = _of_all_processes(images), _of_all_processes(faults)
    if not images:
        raise BadInput(f"no pair could be read: {summarise(faults)}")
    means: dict[str, Any] = {row: metrics.mean([image[row] for image in images]) for row in ("identity", "model")}
    if len(models) > 1:
        means["models"] = {name: metrics.mean([image["models"][name] for image in images]) for name in models}
    return {"n": len(images), "protocol": PROTOCOL, **means, "images": images}, faults


def _of_all_processes(values: list[Any]) -> list[Any]:
    """Collects the values of all processes, each from its share of the pairs. Without faults they are in the pairs' order."""
    texts = processes.gather(f"evaluated/{next(_gather_number)}", json.dumps(values), TIMEOUT)
    shares = [json.loads(text) for text in texts]
    longest = max(len(share) for share in shares)
    # Process p has measured pairs p, p + count, p + 2 count …
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def _measure(model: Model, source: np.ndarray, target: np.ndarray, lpips: Metric | None) -> tuple[metrics.Values, np.ndarray]:
    """Returns a model's values for one pair, and its output."""
    # The network runs once, for both values.
    ungated, mask = network_output(model, source)
    output = apply_gate(model.config, source, ungated, mask)
    values = metrics.compare(source, target, output) | metrics.compare_edit(source, target, output)
    values["edit_recovered_ungated"] = metrics.compare_edit(source, target, ungated)["edit_recovered"]
    return values | _lpips(lpips, output, target), output


def _lpips(lpips: Metric | None, a: np.ndarray, b: np.ndarray) -> metrics.Values:
    return {"lpips": lpips(a, b)} if lpips else {}


def run(
    models: Sequence[str | Path], pairs: Source, json_path: Path | None, pictures: Path | None, lpips: Metric | None
) -> int:
    """Evaluates the models, prints the table and writes the JSON. Returns the exit status: 1 when a pair was left out."""
    if json_path and json_path.is_dir():
        raise Refused(f"--json {json_path}: is a folder; give a file name")
    result, faults = evaluate(_by_name(models), pairs, pictures, lpips)
    if processes.is_first():
        print(report.table(result))
        if json_path:
            write_result(json_path, result)
        for fault in faults:
            print(f"left out: {fault}", file=sys.stderr)
    return EXIT_FAILED if faults else EXIT_DONE


def _by_name(folders: Sequence[str | Path]) -> dict[str, Model]:
    """Loads each model under its run's name, with a number where two runs have the same."""
    models: dict[str, Model] = {}
    for folder in folders:
        home = Path(absolute(str(folder)))  # for its name alone
        name = base = (home.parent if home.name == "model" else home).name
        number = 2
        while name in models:
            name, number = f"{base}-{number}", number + 1
        models[name] = load_model(folder)
    return models


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the JSON. NaN is not JSON: it raises an error here rather than in the program that reads the file."""
    storage.write_output(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
