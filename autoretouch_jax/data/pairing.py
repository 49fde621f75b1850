"""Matches sources with targets: files match by their path below their folder, without its ending.

Names that are equal match first, then those that differ in case alone, then those that differ in what programs add: `-Edit`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from autoretouch_jax.data.images import SUFFIXES, endings, list_images
from autoretouch_jax.errors import Refused, summarise

File = TypeVar("File")
# What programs and people add to the name of a retouched copy, in lower case. Numbers are not among them: `-2` may be a copy of
# a photograph or the next one.
ADDED = re.compile(r"(?:[\s_-]+(?:edit|edited|retouch|retouched|before|after|copy))+$")


# Files without a partner are kept apart because training and data sets refuse them, and the audit reports them.
@dataclass(frozen=True)
class Pairing(Generic[File]):
    """Files by name: those with a partner, sorted by the source's name, which is the pair's, and those without."""

    pairs: dict[str, tuple[File, File]]
    only_in_source: dict[str, File]
    only_in_target: dict[str, File]
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a name has no partner: `only in source`, or which names it fits."""


def named_images(folder: Path, role: str) -> list[tuple[str, Path]]:
    """Returns `(name, path)` of every image below a folder. Raises Refused without any; `role` begins the message."""
    if not folder.is_dir():
        raise Refused(f"{role} {folder}: no such folder")
    if not (paths := list_images(folder)):
        others = f", but {summarise(there)}" if (there := endings(folder)) else ""
        raise Refused(f"{role} {folder}: holds no images that can be read ({' '.join(SUFFIXES)}){others}; convert them")
    # Without the ending, because a JPEG is often retouched into a PNG; with the folders, because names repeat in them.
    return [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in paths]


def first_of_each_name(files: Iterable[tuple[str, File]]) -> tuple[dict[str, File], list[tuple[str, File]]]:
    """Returns the first file of each name, and `(name, file)` of every other one whose name has occurred before.

    The names are in Unicode's form NFC.
    """
    first: dict[str, File] = {}
    further = []
    # The first one is kept, in the order of the paths.
    for name, file in files:
        # macOS writes an umlaut as two characters, other systems as one.
        name = unicodedata.normalize("NFC", name)
        if name in first:
            further.append((name, file))
        else:
            first[name] = file
    return first, further


def unique_names(root: Any, files: Iterable[tuple[str, File]]) -> dict[str, File]:
    """Returns the files by name. Refuses two of the same name: nobody could tell which of them is meant."""
    first, further = first_of_each_name(files)
    if further:
        name, file = further[0]
        raise Refused(f"{root}: {first[name]} and {file} have the same name {name}; keep one of them")
    return first


def match(sources: Mapping[str, File], targets: Mapping[str, File]) -> Pairing[File]:
    """Matches sources and targets of the same name, then those of names alike, unless several names are alike."""
    left, right = dict(sources), dict(targets)
    pairs: dict[str, tuple[File, File]] = {}
    for key in (str, _without_case, _without_additions):
        for ours, theirs in _alike(key, left, right):
            if len(ours) == len(theirs) == 1:
                pairs[ours[0]] = left.pop(ours[0]), right.pop(theirs[0])
    return Pairing(
        dict(sorted(pairs.items())), dict(sorted(left.items())), dict(sorted(right.items())), _reasons(pairs, left, right)
    )


def _without_case(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _without_additions(name: str) -> str:
    # The folders remain as they are: photographs of two folders are different ones.
    folder, slash, stem = _without_case(name).rpartition("/")
    return folder + slash + (ADDED.sub("", stem) or stem)


def _alike(key: Callable[[str], str], left: Iterable[str], right: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Groups the names of both sides by a key. Returns the groups that have names on both sides."""
    groups: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for number, names in enumerate((left, right)):
        for name in sorted(names):
            groups[key(name)][number].append(name)
    return [group for group in groups.values() if all(group)]


def _reasons(pairs: Iterable[str], left: Iterable[str], right: Iterable[str]) -> dict[str, str]:
    """Says for each name without a partner why it has none."""
    taken = {_without_additions(name): name for name in pairs}
    reasons = {}
    for side, names in (("source", left), ("target", right)):
        for name in names:
            partner = taken.get(_without_additions(name))
            reasons[name] = f"in {side}; fits {partner}, which has a partner" if partner else f"only in {side}"
    for groups in _alike(_without_additions, left, right):
        for side, ours, theirs in zip(("source", "target"), groups, reversed(groups), strict=True):
            reasons |= {name: f"in {side}; fits {' and '.join(theirs)}: which one is meant?" for name in ours}
    return reasons


def match_all(sources: Mapping[str, File], targets: Mapping[str, File], roots: tuple[Any, Any]) -> dict[str, tuple[File, File]]:
    """Matches sources and targets, and refuses when one has no partner, naming each."""
    pairing = match(sources, targets)
    if unpaired := [f"{name} ({pairing.reasons[name]})" for name in (*pairing.only_in_source, *pairing.only_in_target)]:
        raise Refused(
            f"{roots[0]} and {roots[1]} do not pair up: {summarise(unpaired)}; add the missing or remove the extra files"
        )
    return pairing.pairs
