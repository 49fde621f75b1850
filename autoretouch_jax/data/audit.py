"""`autoretouch data audit`: what is wrong with a folder of pairs, before GPU time is spent.

It writes a page with pictures and a JSON file. Each pair gets a weight and reasons; `--data.audit FILE` makes training leave
out or weigh down what is accused.
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

from autoretouch_jax.data import audit_page, labels
from autoretouch_jax.data.checks import NOTE, THUMBNAIL, WARNING, Checked, check_pair
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.errors import BadInput, Refused

FORMAT = 1
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "heldout": "test", "held_out": "test",
}  # fmt: skip
ALIKE = 0.995  # correlation of thumbnails from which they are compared in detail
SAME = 4.0  # mean difference of thumbnails, in levels, below which two photos are the same one
INCOMPARABLE = {"size", "shifted", "lossy_target", "tone"}  # pairs that labels cannot be learned from
BLOCK = 1024  # thumbnails compared with all others at a time


@dataclasses.dataclass(frozen=True)
class Lonely:
    """A file without a partner, or a second file of the same name."""

    file: str
    code: str
    message: str


def run(source: Path, target: Path, json_path: Path | None, page: Path | None, workers: int, look_for_left: bool) -> int:
    """Audit, write what was asked for, print a summary. Returns 0 when nothing is accused, else 1."""
    for path in (json_path, page):
        if path and path.is_dir():
            raise Refused(f"{path}: is a folder; give a file name")
    pairs, lonely = _pair(source, target)
    found = _check_all(pairs, workers)
    lonely = _renamed(lonely)
    _compare(list(found.values()))
    spots = _labels(found, pairs) if look_for_left else {}
    result = _result(found, lonely, spots, source, target)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if page:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(audit_page.render(result, pairs))
    print(_summary(result))
    return 1 if result["accused"] else 0


def _pair(source: Path, target: Path) -> tuple[dict[str, tuple[Path, Path]], list[Lonely]]:
    """Files matched by path below their folder without ending; those that have no partner, or more than one."""
    sides, lonely = [], []
    for role, root in (("source", source), ("target", target)):
        if not root.is_dir():
            raise Refused(f"{role} {root}: no such folder")
        named: dict[str, Path] = {}
        for path in list_images(root):
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in named:
                lonely.append(Lonely(str(path), "duplicate_name", f"{named[name].name} has the same name; keep one of them"))
            else:
                named[name] = path
        sides.append(named)
    for role, mine, other in (("source", sides[0], sides[1]), ("target", sides[1], sides[0])):
        lonely += [Lonely(str(mine[name]), "unpaired", f"only in {role}") for name in sorted(mine.keys() - other.keys())]
    both = sorted(sides[0].keys() & sides[1].keys())
    if not both:
        raise Refused(f"{source} and {target} have no names in common; are they the two sides of the same pairs?")
    return {name: (sides[0][name], sides[1][name]) for name in both}, lonely


def _check_all(pairs: dict[str, tuple[Path, Path]], workers: int) -> dict[str, Checked]:
    """Every pair by itself, on all cores. Pillow and NumPy leave the interpreter free, so threads do where pairs are few."""
    jobs = [(name, *files) for name, files in pairs.items()]
    progress = {"total": len(jobs), "desc": "checking", "unit": "pair", "dynamic_ncols": True, "disable": None}
    if workers == 1 or len(jobs) < 64:
        with concurrent.futures.ThreadPoolExecutor(workers or 2) as pool:
            return {found.name: found for found in tqdm(pool.map(_check, jobs), **progress)}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or None, mp_context=context) as pool:
        return {found.name: found for found in tqdm(pool.map(_check, jobs, chunksize=8), **progress)}


def _check(job: tuple[str, Path, Path]) -> Checked:
    return check_pair(*job)


def _renamed(lonely: list[Lonely]) -> list[Lonely]:
    """Say of a file without a partner which one on the other side shows the same photo."""
    alone = [item for item in lonely if item.code == "unpaired"]
    sides = [[item for item in alone if item.message == f"only in {role}"] for role in ("source", "target")]
    looks = [[_look(Path(item.file)) for item in side] for side in sides]
    partner: dict[str, str] = {}
    for item, look in zip(sides[0], looks[0], strict=True):
        for other, seen in zip(sides[1], looks[1], strict=True):
            if look is not None and seen is not None and _difference(look, seen) < SAME:
                partner |= {item.file: other.file, other.file: item.file}
    return [
        dataclasses.replace(item, message=f"{item.message}; shows the same photo as {partner[item.file]}: renamed?")
        if item.file in partner
        else item
        for item in lonely
    ]


def _look(path: Path) -> np.ndarray | None:
    try:
        image = Image.fromarray(read_rgb(path))
    except BadInput:
        return None
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())


def split_of(name: str) -> str:
    """The split a name's folder, or FFHQ's numbering, puts it in; "" where neither says."""
    parts = name.lower().split("/")
    for part in parts[:-1]:
        if part in SPLITS:
            return SPLITS[part]
    if len(parts[-1]) == 5 and parts[-1].isdigit() and int(parts[-1]) < 70_000:
        return "train" if int(parts[-1]) < 56_000 else "validation" if int(parts[-1]) < 63_000 else "test"
    return ""


def _compare(found: Sequence[Checked]) -> None:
    """Accuse of showing the same photo: across splits whoever it is, within one only exact copies."""
    seen = [item for item in found if item.thumbnail is not None]
    for first, second in _alike([item.thumbnail for item in seen if item.thumbnail is not None]):
        a, b = seen[first], seen[second]
        splits = split_of(a.name), split_of(b.name)
        if splits[0] != splits[1] and all(splits):
            copy, kept = (a, b) if splits[1] == "train" else (b, a)  # the one to go is not the one to train on
            copy.accuse("leak", f"shows the same photo as {kept.name} of the split {split_of(kept.name)}")
            kept.accuse("leaked", f"shows the same photo as {copy.name} of the split {split_of(copy.name)}", NOTE)
        elif a.digest == b.digest:
            b.accuse("duplicate", f"is a copy of {a.name}", WARNING)
        else:
            b.accuse("near_duplicate", f"looks like {a.name}; keep both in the same split", NOTE)


def _alike(thumbnails: Sequence[np.ndarray]) -> Iterable[tuple[int, int]]:
    """Pairs of numbers, the smaller first, of thumbnails that show the same photo."""
    if not thumbnails:
        return
    vectors = np.stack(thumbnails)[:, ::2, ::2].reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
    for start in range(0, len(vectors), BLOCK):
        for row, column in np.argwhere(vectors[start : start + BLOCK] @ vectors.T > ALIKE):
            first, second = start + int(row), int(column)
            if first < second and _difference(thumbnails[first], thumbnails[second]) < SAME:
                yield first, second


def _labels(found: dict[str, Checked], pairs: dict[str, tuple[Path, Path]]) -> dict[str, labels.Finding]:
    """Accuse pairs in whose target spots were left that are removed elsewhere, where their pixels can be compared."""
    sound = [
        name
        for name, item in found.items()
        if item.thumbnail is not None and INCOMPARABLE.isdisjoint(reason.code for reason in item.reasons)
    ]
    findings = labels.find(sound, lambda name: (read_rgb(pairs[name][0]), read_rgb(pairs[name][1])))
    if not findings:
        print(
            f"spots that were left: not looked for, which takes {labels.FEWEST_PAIRS} comparable pairs; these are {len(sound)}"
        )
    for name, finding in findings.items():
        found[name].measures["left_share"] = finding["score"]
        if finding["score"] >= labels.INCONSISTENT:
            message = (
                f"{finding['left']} spots were left that look like the {finding['removed']} removed here and those elsewhere"
            )
            found[name].accuse("inconsistent", message, WARNING)
    return {name: finding for name, finding in findings.items() if found[name].accused}


def _result(
    found: dict[str, Checked], lonely: Sequence[Lonely], spots: dict[str, labels.Finding], source: Path, target: Path
) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for name, item in found.items():
        weight = item.weight
        if any(reason.code == "inconsistent" for reason in item.reasons):
            weight = min(weight, round(1 - item.measures["left_share"], 3))
        reasons = [dataclasses.asdict(reason) for reason in item.reasons]
        measures = {key: round(float(value), 5) for key, value in item.measures.items()}
        pairs[name] = {"weight": weight, "accused": item.accused, "reasons": reasons, "measures": measures}
        if name in spots:
            pairs[name]["spots"] = [[round(float(value), 1) for value in spot] for spot in spots[name]["spots"]]
    counts = Counter(code for pair in pairs.values() for code in {r["code"] for r in pair["reasons"] if r["severity"] != NOTE})
    counts += Counter(item.code for item in lonely)
    return {
        "format": FORMAT,
        "source": str(source),
        "target": str(target),
        "accused": sum(pair["accused"] for pair in pairs.values()) + len(lonely),
        "counts": dict(sorted(counts.items())),
        "unpaired": [dataclasses.asdict(item) for item in lonely],
        "pairs": pairs,
    }


def _summary(result: dict[str, Any]) -> str:
    lines = [f"{len(result['pairs'])} pairs, {result['accused']} accused"]
    lines += [f"  {count:6}  {code}" for code, count in result["counts"].items()]
    for item in result["unpaired"]:
        lines.append(f"{item['file']}: {item['message']}")
    for name, pair in result["pairs"].items():
        lines += [f"{name}: {reason['message']}" for reason in pair["reasons"] if reason["severity"] != NOTE]
    return "\n".join(lines)
