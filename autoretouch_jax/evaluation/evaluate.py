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
from autoretouch_jax.data.edits import edit_mask
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
    "8-bit RGB at full resolution, as a user would see it; edit: where source and target differ after the codecs' losses were "
    "removed; threshold {threshold}; pooled PSNR, edit_recovered, outside_error and outside_identical: from sums over "
    "the pixels of all images; other metrics: per image, then plain means, PSNR of an image at most {ceiling:.2f} dB; every "
    "row: over the same images, n of each metric; null: no image has it (n is 0), or, for a pooled PSNR, there is no error"
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

    With several models, `model` is the first one's, and `models` holds the values of each under its name: over all images, and
    in `images` those of each image. The identity is a model that returns the source. Each of several processes measures a share
    of the pairs, and all return the same result. `alone` are photographs in which nothing should change: what each model
    changes there is added to its values, `alone` holds the values of each photograph, and `worst` names those that the first
    model changed most. `observe` is called with the name, the source, the first model's output and the target of each pair that
    this process measures.
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
    threshold = getattr(pairs, "edit_threshold", 0.0)  # a source without one: any difference is an edit
    words = "measured for each pair from its codecs" if threshold is None else f"{threshold:g} levels of 255"
    protocol = PROTOCOL.format(threshold=words, ceiling=metrics.CEILING)
    stated = {"protocol": protocol, "edit_threshold": threshold, "faces": faces}
    return stated | _result(list(models), images, untouched), faults


def _result(names: list[str], images: list[dict[str, Any]], untouched: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the values over all images, and the rows, in which `model` becomes the first model's values."""
    by_model = {
        name: _over_all([image["models"][name] for image in images], [u["models"][name] for u in untouched]) for name in names
    }
    for row in images + untouched:
        row["model"] = row["models"][names[0]]
        if len(names) == 1:
            del row["models"]
    identity = _over_all([image["identity"] for image in images], [photo["identity"] for photo in untouched])
    result = {"n": len(images), "identity": identity, "model": by_model[names[0]]}
    result |= {"models": by_model} if len(names) > 1 else {}
    return result | {"images": images} | _changed_most(untouched)


def _changed_most(untouched: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the values of the photographs that should not change, and the names of those that changed most."""
    if not untouched:
        return {}
    worst = sorted(untouched, key=lambda row: row["model"]["alone_identical"])[:WORST]
    return {"alone": untouched, "worst": [row["name"] for row in worst if row["model"]["alone_identical"] < 1]}


def _over_all(pairs: list[metrics.Row], untouched: list[metrics.Row]) -> dict[str, Any]:
    """Returns what a model scores over the pairs and over the photographs that should not change."""
    groups = ([metrics.pool(pairs)] if pairs else []) + ([metrics.mean(untouched)] if untouched else [])
    n = {name: count for group in groups for name, count in group.pop("n").items()}
    return {name: value for group in groups for name, value in group.items()} | {"n": n}


def _each(
    source: Source | None, measure: Callable[[str, Any], dict[str, Any]], title: str, quiet: bool
) -> tuple[list[Any], list[str]]:
    """Measures this process's share of a source, and returns the rows and faults of all processes."""
    if source is None:
        return [], []
    rows: list[tuple[int, Any]] = []
    faults: list[tuple[int, str]] = []
    share = range(processes.index(), len(source), processes.count())
    silent = None if processes.is_first() and not quiet else True  # None: tqdm is silent where there is no terminal
    for index in tqdm(share, desc=title, unit="image", dynamic_ncols=True, disable=silent):
        try:
            rows.append((index, measure(source.names[index], whole(source[index]))))
        except BadInput as error:
            faults.append((index, str(error)))
    # A process without any image takes part too: the others wait for its answer.
    return _of_all_processes(rows), _of_all_processes(faults)


def _of_all_processes(values: list[tuple[int, Any]]) -> list[Any]:
    """Collects the values of all processes, each with its image's number, and returns them in the order of the images."""
    texts = processes.gather(f"evaluated/{next(_gather_number)}", json.dumps(values), TIMEOUT)
    # In any other order the interval, and the last digit of a mean, would depend on the number of processes.
    return [value for _, value in sorted((item for text in texts for item in json.loads(text)), key=lambda item: item[0])]


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
    edited = edit_mask(source, target)
    face_parts = parts(source, find_living_faces(source))

    def values(output: np.ndarray, ungated: np.ndarray) -> metrics.Row:
        row = metrics.compare(source, target, output, ungated)
        row |= metrics.change_by_part(source, output, face_parts, edited)
        return row | ({"lpips": lpips(output, target)} if lpips else {})

    rows: dict[str, Any] = {}
    for label, model in models.items():
        # All models run while the pair is in memory: decoding takes as long as a small model.
        edit = find_edit(model, source, faces)
        output = apply_edit(model.config, source, edit)
        rows[label] = values(output, np.clip(source + edit.change, 0, 255).astype(np.uint8))
        if observe and label == next(iter(models)):
            observe(name, source, output, target)
        if pictures:
            folder = pictures / label if len(models) > 1 else pictures
            _save(folder / f"{name}.png", report.comparison(source, output, target))
    # Measured as a model is, so that one that returns its input has the same values to the last bit.
    return {"name": name, "identity": values(source, source), "models": rows}


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
    return {"name": name, "identity": metrics.compare_untouched(pixels, pixels), "models": rows}


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
    csv_path: Path | None = None,
) -> int:
    """Evaluates the models, prints the table, writes JSON and CSV. Returns the exit status: 1 when an image was left out."""
    for flag, path in (("--json", json_path), ("--csv", csv_path)):
        if path and path.is_dir():
            raise Refused(f"{flag} {path}: is a folder; give a file name")
    result, faults = evaluate(_by_name(models), pairs, pictures, lpips, faces, alone)
    if processes.is_first():
        print(report.table(result))
        if json_path:
            write_result(json_path, result)
        if csv_path:
            storage.write_output(csv_path, report.as_csv(result))
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
        while name in models or name == "identity":  # the name of another row
            name, number = f"{base}-{number}", number + 1
        models[name] = load_model(folder)
    return models


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the JSON. NaN is not JSON: it raises an error here rather than in the program that reads the file."""
    storage.write_output(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
