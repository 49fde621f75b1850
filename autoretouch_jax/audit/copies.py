"""Pairs that show the same photograph, or frames of one burst: flags copies and leaks, and groups what belongs in one split.

Photographs are compared by small grey thumbnails, `uint8[1024]`: 32 rows of 32.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.audit.checks import NOTE, WARNING, CheckedPair
from autoretouch_jax.data.ffhqr import IMAGES, official_split

SIDE = 32  # of a thumbnail, in pixels
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "heldout": "test", "held_out": "test",
}  # fmt: skip
ALIKE = 0.995  # correlation of thumbnails from which two files may show the same photograph
SAME = 4.0  # mean difference of thumbnails, in levels, below which they do
# Neighbours in a folder are frames of a burst from this correlation on. Among 51 people before one studio's wall the largest
# is 0.966.
BURST = 0.98
BLOCK = 256  # thumbnails compared with all later ones at a time: 72 MB for 70,000
DIFFERENCES = 4096  # candidates whose difference is computed at a time


def small(image: np.ndarray) -> np.ndarray:
    """`uint8[h, w, 3]` → `uint8[1024]`: the thumbnail of a photograph."""
    grey = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey).reshape(-1)


def vectors(thumbnails: np.ndarray) -> np.ndarray:
    """`uint8[n, 1024]` → `float32[n, 256]`: 16 × 16 pixels of mean 0 and length 1, whose products are correlations."""
    coarse = thumbnails.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4), dtype=np.float32).reshape(len(thumbnails), -1)
    coarse -= coarse.mean(1, keepdims=True)
    coarse /= np.linalg.norm(coarse, axis=1, keepdims=True) + 1e-6
    return coarse


def differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean difference, in levels, of each pair of thumbnails, `uint8[n, 1024]` each."""
    out = np.empty(len(first), np.float32)
    for start in range(0, len(first), DIFFERENCES):
        part = slice(start, start + DIFFERENCES)
        out[part] = np.abs(first[part].astype(np.int16) - second[part]).mean(1)
    return out


def flag_copies(checked: Sequence[CheckedPair]) -> dict[str, str]:
    """Flags pairs that show the same photograph in two splits, and exact copies. Other pairs that look alike get a note.

    Returns a group for each pair that belongs in one split with others: the name of the group's first pair.
    """
    seen = [pair for pair in checked if pair.thumbnail is not None]
    if not seen:
        return {}
    splits = np.array(splits_of([pair.name for pair in seen]))
    thumbnails = np.stack([pair.thumbnail for pair in seen if pair.thumbnail is not None])
    features = vectors(thumbnails)
    groups = np.arange(len(seen))  # the number of the first pair of each pair's group
    _flag_duplicates(seen, splits, groups)
    for number, later in _alike(thumbnails, features):
        _join(groups, number, later)
        across = later[(splits[later] != splits[number]) & (splits[later] != "") & (splits[number] != "")]
        for other in across:
            _flag_leak(seen[number], seen[other], splits[number], splits[other])
        for other in later if not across.size else ():
            _note_likeness(seen[number], seen[other])
    for first, second in _bursts([pair.name for pair in seen], features):
        _join(groups, first, np.array([second]))
    sizes = np.bincount(groups, minlength=len(seen))
    return {pair.name: seen[group].name for pair, group in zip(seen, groups, strict=True) if sizes[group] > 1}


def _flag_duplicates(seen: Sequence[CheckedPair], splits: np.ndarray, groups: np.ndarray) -> None:
    first: dict[tuple[str, str], int] = {}
    for number, pair in enumerate(seen):
        # Copies in two splits are leaks, which are worse.
        kept = first.setdefault((pair.digest, splits[number]), number)
        if kept != number:
            pair.flag("duplicate", f"is a copy of {seen[kept].name}", WARNING)
            _join(groups, kept, np.array([number]))


def _flag_leak(a: CheckedPair, b: CheckedPair, split_a: str, split_b: str) -> None:
    # The pair to train on stays. The one to measure on is flagged. Once is enough, however many look like it.
    copy, kept, of_copy, of_kept = (a, b, split_a, split_b) if split_b == "train" else (b, a, split_b, split_a)
    if not _has(copy, "leak"):
        copy.flag("leak", f"shows the same photo as {kept.name} of the split {of_kept}")
    if not _has(kept, "leaked"):
        kept.flag("leaked", f"shows the same photo as {copy.name} of the split {of_copy}", NOTE)


def _note_likeness(a: CheckedPair, b: CheckedPair) -> None:
    if a.digest != b.digest and not _has(b, "near_duplicate"):
        b.flag("near_duplicate", f"looks like {a.name}; keep both in the same split", NOTE)


def _has(pair: CheckedPair, code: str) -> bool:
    return any(reason.code == code for reason in pair.reasons)


def _join(groups: np.ndarray, number: int, others: np.ndarray) -> None:
    """Makes one group of the groups of these pairs. Nearly every call finds them joined already."""
    joined = np.unique(groups[np.append(others, number)])
    if len(joined) > 1:
        groups[np.isin(groups, joined)] = joined[0]


def _alike(thumbnails: np.ndarray, features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number of a thumbnail, and the later ones that show the same photograph, where there are any."""
    # Matrix products find the candidates; comparing all pairs of thumbnails would take hours for FFHQ.
    blocks = range(0, len(features), BLOCK)
    for start in tqdm(blocks, desc="comparing photographs", unit="block", dynamic_ncols=True, disable=None):
        likeness = features[start : start + BLOCK] @ features[start:].T
        for row, likenesses in enumerate(likeness):
            number = start + row
            later = number + 1 + np.flatnonzero(likenesses[row + 1 :] > ALIKE)
            if later.size:
                repeated = np.broadcast_to(thumbnails[number], (len(later), thumbnails.shape[1]))
                later = later[differences(repeated, thumbnails[later]) < SAME]
            if later.size:
                yield number, later


def _bursts(names: Sequence[str], features: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields the numbers of neighbours in a folder that look like frames of one burst."""
    order = sorted(range(len(names)), key=lambda number: _by_numbers(names[number]))
    for first, second in itertools.pairwise(order):
        same_folder = names[first].rpartition("/")[0] == names[second].rpartition("/")[0]
        if same_folder and float(features[first] @ features[second]) > BURST:
            yield first, second


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts IMG_9 before IMG_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# ---- splits -----------------------------------------------------------------------------------------------------------------


def splits_of(names: Sequence[str]) -> list[str]:
    """The split in which each name's folder, or FFHQ's numbering, puts a pair; "" where neither says."""
    numbered = _is_ffhq(names)
    return [_split_of(name, numbered) for name in names]


def _split_of(name: str, numbered: bool) -> str:
    parts = name.lower().split("/")
    for part in parts[:-1]:
        if part in SPLITS:
            return SPLITS[part]
    return official_split(int(parts[-1])) if numbered else ""


def _is_ffhq(names: Sequence[str]) -> bool:
    """Whether these are FFHQ's numbers, and not the five digits of a camera.

    FFHQ is published in folders of a thousand (`56000/56001`). Flat, it counts only with more than half of its images: a part
    of it cannot be told from a camera's files.
    """
    files = [name.rpartition("/") for name in names]
    # A short ascii check: other scripts have digits too, and "²" is one to `isdigit`.
    if not all(re.fullmatch("[0-9]{5}", file) and int(file) < IMAGES for _, _, file in files):
        return False
    in_thousands = all(folder.rpartition("/")[2] == f"{int(file) // 1000 * 1000:05d}" for folder, _, file in files)
    return in_thousands or len({file for _, _, file in files}) > IMAGES / 2
