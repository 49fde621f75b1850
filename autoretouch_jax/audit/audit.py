"""Audits folders of pairs, and writes a page, a JSON file and a summary.

Each pair gets a weight and reasons. `--data.audit FILE` makes training leave out or down-weight flagged pairs.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.audit import labels, page
from autoretouch_jax.audit.checks import NOTE, THUMBNAIL, WARNING, CheckedPair, check_pair
from autoretouch_jax.data.ffhqr import IMAGES, official_split
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.data.pairing import first_of_each_name, match, named_images
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, BadInput, Refused
from autoretouch_jax.runtime import storage

FORMAT = 2
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "heldout": "test", "held_out": "test",
}  # fmt: skip
ALIKE = 0.995  # correlation of thumbnails above which they are compared in detail
SAME = 4.0  # mean difference of thumbnails, in levels, below which two files show the same photograph
INCOMPARABLE = {"size", "shifted", "lossy_target", "tone"}  # reasons that hide which spots the retoucher removed
BLOCK = 1024  # thumbnails compared with all others at a time
FEWEST_FOR_PROCESSES = 64  # number of pairs from which worker processes are worth their start

PairPaths = dict[str, tuple[Path, Path]]


@dataclasses.dataclass(frozen=True)
class UnpairedFile:
    """A file without a partner, or a second file of the same name."""

    file: str
    code: str
    message: str


def run(source: Path, target: Path, json_path: Path | None, html_path: Path | None, workers: int, check_labels: bool) -> int:
    """Audits, writes the requested files and prints a summary. Returns the exit status: 1 when something is flagged."""
    for path in (json_path, html_path):
        if path and path.is_dir():
            raise Refused(f"{path}: is a folder; give a file name")
    pairs, unpaired = _pair(source, target)
    checked = _check_all(pairs, workers)
    unpaired = _explain_renamed(unpaired)
    _flag_copies(list(checked.values()))
    spots = _flag_inconsistent(checked, pairs) if check_labels else {}
    result = _result(checked, unpaired, spots, source, target)
    if json_path:
        storage.write_output(json_path, json.dumps(result, indent=1) + "\n")
    if html_path:
        storage.write_output(html_path, page.render(result, pairs))
    print(_summary(result))
    return EXIT_FAILED if result["flagged"] else EXIT_DONE


def _pair(source: Path, target: Path) -> tuple[PairPaths, list[UnpairedFile]]:
    """Matches the files of two folders by name. Unlike in training, files without a partner are reported, not refused."""
    sides, unpaired = [], []
    for role, root in (("source", source), ("target", target)):
        named, further = first_of_each_name(named_images(root, role))
        sides.append(named)
        for name, path in further:
            message = f"{named[name].name} has the same name; keep one of them"
            unpaired.append(UnpairedFile(str(path), "duplicate_name", message))
    pairing = match(*sides)
    for role, paths in (("source", pairing.only_in_source), ("target", pairing.only_in_target)):
        unpaired += [UnpairedFile(str(path), "unpaired", f"only in {role}") for path in paths.values()]
    if not pairing.pairs:
        raise Refused(f"{source} and {target} have no names in common; are they the two sides of the same pairs?")
    return pairing.pairs, unpaired


def _check_all(pairs: PairPaths, workers: int) -> dict[str, CheckedPair]:
    """Checks every pair by itself, in threads or, for many pairs, in `workers` processes (0: one per core)."""
    jobs = [(name, *paths) for name, paths in pairs.items()]
    progress = {"total": len(jobs), "desc": "checking", "unit": "pair", "dynamic_ncols": True, "disable": None}
    if workers == 1 or len(jobs) < FEWEST_FOR_PROCESSES:
        # Pillow and NumPy release the GIL, so threads are enough for few pairs. Processes would take longer to start.
        with concurrent.futures.ThreadPoolExecutor(workers or 2) as pool:
            return {checked.name: checked for checked in tqdm(pool.map(_check, jobs), **progress)}
    context = multiprocessing.get_context("spawn")  # a forked JAX can hang
    with concurrent.futures.ProcessPoolExecutor(workers or None, mp_context=context) as pool:
        return {checked.name: checked for checked in tqdm(pool.map(_check, jobs, chunksize=8), **progress)}


def _check(job: tuple[str, Path, Path]) -> CheckedPair:
    return check_pair(*job)


# ---- files without a partner ------------------------------------------------------------------------------------------------


def _explain_renamed(unpaired: Sequence[UnpairedFile]) -> list[UnpairedFile]:
    """Names, in the message of a file without a partner, the file on the other side that shows the same photograph."""
    single = [item for item in unpaired if item.code == "unpaired"]
    sides = [[item for item in single if item.message == f"only in {role}"] for role in ("source", "target")]
    thumbnails = [[_thumbnail(Path(item.file)) for item in side] for side in sides]
    partner: dict[str, str] = {}
    for item, first in zip(sides[0], thumbnails[0], strict=True):
        for other, second in zip(sides[1], thumbnails[1], strict=True):
            if first is not None and second is not None and _difference(first, second) < SAME:
                partner |= {item.file: other.file, other.file: item.file}
    return [
        dataclasses.replace(item, message=f"{item.message}; shows the same photo as {partner[item.file]}: renamed?")
        if item.file in partner
        else item
        for item in unpaired
    ]


def _thumbnail(path: Path) -> np.ndarray | None:
    try:
        image = Image.fromarray(read_rgb(path))
    except BadInput:
        return None
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())


# ---- copies and leaks -------------------------------------------------------------------------------------------------------


def split_of(name: str) -> str:
    """The split that a name's folder, or FFHQ's numbering, puts a pair in; "" where neither says."""
    parts = name.lower().split("/")
    for part in parts[:-1]:
        if part in SPLITS:
            return SPLITS[part]
    if len(parts[-1]) == 5 and parts[-1].isdigit() and int(parts[-1]) < IMAGES:
        return official_split(int(parts[-1]))
    return ""


def _flag_copies(checked: Sequence[CheckedPair]) -> None:
    """Flags pairs that show the same photograph in two splits, and exact copies. Other pairs that look alike get a note."""
    seen = [pair for pair in checked if pair.thumbnail is not None]
    for first, second in _alike([pair.thumbnail for pair in seen if pair.thumbnail is not None]):
        a, b = seen[first], seen[second]
        splits = split_of(a.name), split_of(b.name)
        if splits[0] != splits[1] and all(splits):
            # The pair to train on stays. The one to measure on is flagged.
            copy, kept = (a, b) if splits[1] == "train" else (b, a)
            copy.flag("leak", f"shows the same photo as {kept.name} of the split {split_of(kept.name)}")
            kept.flag("leaked", f"shows the same photo as {copy.name} of the split {split_of(copy.name)}", NOTE)
        elif a.digest == b.digest:
            b.flag("duplicate", f"is a copy of {a.name}", WARNING)
        else:
            b.flag("near_duplicate", f"looks like {a.name}; keep both in the same split", NOTE)


def _alike(thumbnails: Sequence[np.ndarray]) -> Iterable[tuple[int, int]]:
    """Yields pairs of numbers, the smaller first, of thumbnails that show the same photograph."""
    if not thumbnails:
        return
    vectors = np.stack(thumbnails)[:, ::2, ::2].reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
    # One matrix product finds the candidates; comparing all pairs of thumbnails would take hours for FFHQ.
    for start in range(0, len(vectors), BLOCK):
        for row, column in np.argwhere(vectors[start : start + BLOCK] @ vectors.T > ALIKE):
            first, second = start + int(row), int(column)
            if first < second and _difference(thumbnails[first], thumbnails[second]) < SAME:
                yield first, second


# ---- inconsistent labels ----------------------------------------------------------------------------------------------------


def _flag_inconsistent(checked: dict[str, CheckedPair], pairs: PairPaths) -> dict[str, labels.Finding]:
    """Flags pairs whose target still has spots of the kind that is removed elsewhere, and returns where these are."""
    comparable = [
        name
        for name, pair in checked.items()
        if pair.thumbnail is not None and INCOMPARABLE.isdisjoint(reason.code for reason in pair.reasons)
    ]
    findings = labels.find(comparable, lambda name: (read_rgb(pairs[name][0]), read_rgb(pairs[name][1])))
    if not findings:
        print(
            f"spots that were left were not looked for: that needs {labels.FEWEST_PAIRS} comparable pairs, "
            f"and there are {len(comparable)}"
        )
    for name, finding in findings.items():
        checked[name].measures["left_share"] = finding["score"]
        if finding["score"] >= labels.INCONSISTENT:
            counts = (
                f"{finding['left']} spots were left that look like the {finding['removed']} removed here and those elsewhere"
            )
            checked[name].flag("inconsistent", counts, WARNING)
    return {name: finding for name, finding in findings.items() if checked[name].flagged}


# ---- the result -------------------------------------------------------------------------------------------------------------


def _result(
    checked: dict[str, CheckedPair],
    unpaired: Sequence[UnpairedFile],
    spots: dict[str, labels.Finding],
    source: Path,
    target: Path,
) -> dict[str, Any]:
    """Returns what the JSON file holds."""
    pairs: dict[str, Any] = {}
    for name, pair in checked.items():
        weight = pair.weight
        if any(reason.code == "inconsistent" for reason in pair.reasons):
            # The more spots a pair left, the more it would teach the network to leave them.
            weight = min(weight, round(1 - pair.measures["left_share"], 3))
        reasons = [dataclasses.asdict(reason) for reason in pair.reasons]
        measures = {key: round(float(value), 5) for key, value in pair.measures.items()}
        pairs[name] = {"weight": weight, "flagged": pair.flagged, "reasons": reasons, "measures": measures}
        if name in spots:
            pairs[name]["spots"] = [[round(float(value), 1) for value in spot] for spot in spots[name]["left_spots"]]
    counts = Counter(code for pair in pairs.values() for code in {r["code"] for r in pair["reasons"] if r["severity"] != NOTE})
    counts += Counter(item.code for item in unpaired)
    return {
        "format": FORMAT,
        "source": str(source),
        "target": str(target),
        "flagged": sum(pair["flagged"] for pair in pairs.values()) + len(unpaired),
        "counts": dict(sorted(counts.items())),
        "unpaired": [dataclasses.asdict(item) for item in unpaired],
        "pairs": pairs,
    }


def _summary(result: dict[str, Any]) -> str:
    lines = [f"{len(result['pairs'])} pairs, {result['flagged']} flagged"]
    lines += [f"  {count:6}  {code}" for code, count in result["counts"].items()]
    for item in result["unpaired"]:
        lines.append(f"{item['file']}: {item['message']}")
    for name, pair in result["pairs"].items():
        lines += [f"{name}: {reason['message']}" for reason in pair["reasons"] if reason["severity"] != NOTE]
    return "\n".join(lines)
