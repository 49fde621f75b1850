"""`autoretouch evaluate`: measures models on pairs, on photographs that should not change, and doing nothing beside them."""

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autoretouch_jax.config.paths import absolute
from autoretouch_jax.config.schema import Faces
from autoretouch_jax.data.face_parts import find_living_faces, parts
from autoretouch_jax.data.sources import Images, Source, whole
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, BadInput, Refused, summarise
from autoretouch_jax.evaluation import metrics, report
from autoretouch_jax.evaluation.lpips import Metric
from autoretouch_jax.inference.edit import apply_edit, find_edit
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.runtime import processes, storage

TIMEOUT = 3600.0  # seconds by which one process may be slower with its share than another
PROTOCOL = (
    "8-bit RGB at full resolution, as a user would see it; edit: pixels where any channel of source and target differs by "
    ">= 1/255; per image, then plain means; undefined values are null, left out of the mean and counted"
)
WORST = 5  # photographs that are named when a model changes what it should leave alone
_gather_number = itertools.count()  # a name may be gathered once, and a run evaluates many times


def evaluate(
    models: Mapping[str, Model],
    pairs: Source | None,
    pictures: Path | None = None,
    lpips: Metric | None = None,
    faces: Faces = "auto",
    alone: Source | None = None,
    observe: Callable[[str, np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    quiet: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Returns `({"n", "protocol", "identity", "model", "images"}, faults)`. A pair that cannot be decoded becomes a fault.

    With several models, `model` is the first one's, and `models` holds the values of each under its name: the means, and in
    `images` those of each image. Each of several processes measures a share of the pairs, and all return the same result.
    `alone` are photographs in which nothing should change: what each model changes there is added to its means, `alone` holds
    the values of each photograph, and `worst` names those that the first model changed most. `observe` is called with the name,
    the source, the first model's output and the target of each pair that this process measures.
    """

    def measure(name: str, pair: Images) -> dict[str, Any]:
        return _measure_pair(models, name, pair, pictures, lpips, faces, observe)

    images, faults = _each(pairs, measure, "evaluating", quiet)
    untouched, further = _each(
        alone, lambda name, photo: _measure_alone(models, name, photo, pictures, faces), "leaving alone", quiet
    )
    faults += further
    if not images and not untouched:
        raise BadInput(f"no image could be read: {summarise(faults)}")
    return _result(list(models), images, untouched) | {"faces": faces}, faults


def _result(names: list[str], images: list[dict[str, Any]], untouched: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the means over the rows of all images, and the rows, in which `model` becomes the first model's values."""
    by_model = {
        name: _means([image["models"][name] for image in images], [u["models"][name] for u in untouched]) for name in names
    }
    for row in images + untouched:
        row["model"] = row["models"][names[0]]
        if len(names) == 1:
            del row["models"]
    identity = metrics.mean([image["identity"] for image in images]) if images else {}
    result = {"n": len(images), "protocol": PROTOCOL, "identity": identity, "model": by_model[names[0]]}
    result |= {"models": by_model} if len(names) > 1 else {}
    return result | {"images": images} | _changed_most(untouched)


def _changed_most(untouched: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the values of the photographs that should not change, and the names of those that changed most."""
    if not untouched:
        return {}
    worst = sorted(untouched, key=lambda row: row["model"]["alone_identical"])[:WORST]
    return {"alone": untouched, "worst": [row["name"] for row in worst if row["model"]["alone_identical"] < 1]}


def _means(pairs: list[metrics.Values], untouched: list[metrics.Values]) -> dict[str, Any]:
    """Returns the means of one model over the pairs and over the photographs that should not change."""
    groups = [metrics.mean(rows) for rows in (pairs, untouched) if rows]
    undefined = {name: count for group in groups for name, count in group.pop("undefined").items()}
    return {name: value for group in groups for name, value in group.items()} | {"undefined": undefined}


def _each(
    source: Source | None, measure: Callable[[str, Any], dict[str, Any]], title: str, quiet: bool
) -> tuple[list[Any], list[str]]:
    """Measures this process's share of a source, and returns the rows and faults of all processes."""
    if source is None:
        return [], []
    rows, faults = [], []
    share = range(processes.index(), len(source), processes.count())
    silent = None if processes.is_first() and not quiet else True  # None: tqdm is silent where there is no terminal
    for index in tqdm(share, desc=title, unit="image", dynamic_ncols=True, disable=silent):
        try:
            rows.append(measure(source.names[index], whole(source[index])))
        except BadInput as error:
            faults.append(str(error))
    # A process without any image takes part too: the others wait for its answer.
    return _of_all_processes(rows), _of_all_processes(faults)


def _of_all_processes(values: list[Any]) -> list[Any]:
    """Collects the values of all processes, each from its share of the images. Without faults they are in the images' order."""
    texts = processes.gather(f"evaluated/{next(_gather_number)}", json.dumps(values), TIMEOUT)
    shares = [json.loads(text) for text in texts]
    longest = max(len(share) for share in shares)
    # Process p has measured images p, p + count, p + 2 count …
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def _measure_pair(
    models: Mapping[str, Model],
    name: str,
    pair: Images,
    pictures: Path | None,
    lpips: Metric | None,
    faces: Faces,
    observe: Callable[[str, np.ndarray, np.ndarray, np.ndarray], None] | None,
) -> dict[str, Any]:
    """Returns the values of one pair: of doing nothing, and of every model."""
    source, target = pair["source"], pair["target"]
    rows: dict[str, Any] = {}
    edited = metrics.edit_mask(source, target)
    face_parts = parts(source, find_living_faces(source))
    for label, model in models.items():
        # All models run while the pair is in memory: decoding takes as long as a small model.
        edit = find_edit(model, source, faces)
        output = apply_edit(model.config, source, edit)
        values = metrics.compare(source, target, output) | metrics.compare_edit(source, target, output)
        ungated = np.clip(source + edit.change, 0, 255).astype(np.uint8)
        values["edit_recovered_ungated"] = metrics.compare_edit(source, target, ungated)["edit_recovered"]
        values |= metrics.change_by_part(source, output, face_parts, edited)
        rows[label] = values | ({"lpips": lpips(output, target)} if lpips else {})
        if observe and label == next(iter(models)):
            observe(name, source, output, target)
        if pictures:
            folder = pictures / label if len(models) > 1 else pictures
            _save(folder / f"{name}.png", report.comparison(source, output, target))
    identity = metrics.compare(source, target, source) | ({"lpips": lpips(source, target)} if lpips else {})
    return {"name": name, "identity": identity, "models": rows}


def _measure_alone(
    models: Mapping[str, Model], name: str, photo: Images, pictures: Path | None, faces: Faces
) -> dict[str, Any]:
    """Returns what every model changes in a photograph that should stay as it is."""
    pixels, rows = photo["target"], {}
    for label, model in models.items():
        output = apply_edit(model.config, pixels, find_edit(model, pixels, faces))
        rows[label] = metrics.compare_untouched(pixels, output)
        if pictures:
            folder = (pictures / label if len(models) > 1 else pictures) / "leave_alone"
            _save(folder / f"{name}.png", report.comparison(pixels, output, pixels))
    return {"name": name, "models": rows}


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save_picture(path, picture)


def run(
    models: Sequence[str | Path],
    pairs: Source | None,
    json_path: Path | None,
    pictures: Path | None,
    lpips: Metric | None,
    faces: Faces = "auto",
    alone: Source | None = None,
) -> int:
    """Evaluates the models, prints the table and writes the JSON. Returns the exit status: 1 when an image was left out."""
    if json_path and json_path.is_dir():
        raise Refused(f"--json {json_path}: is a folder; give a file name")
    result, faults = evaluate(_by_name(models), pairs, pictures, lpips, faces, alone)
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
