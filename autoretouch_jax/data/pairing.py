"""Matches sources with targets: files match by their path below their folder, without its ending."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from autoretouch_jax.data.images import list_images
from autoretouch_jax.errors import Refused, summarise

File = TypeVar("File")


# Files without a partner are kept apart because training and data sets refuse them, and the audit reports them.
@dataclass(frozen=True)
class Pairing(Generic[File]):
    """Files by name: those with a partner, sorted, and those without."""

    pairs: dict[str, tuple[File, File]]
    only_in_source: dict[str, File]
    only_in_target: dict[str, File]


def named_images(folder: Path, role: str) -> list[tuple[str, Path]]:
    """Returns `(name, path)` of every image below a folder. Raises Refused without any; `role` begins the message."""
    if not folder.is_dir():
        raise Refused(f"{role} {folder}: no such folder")
    if not (paths := list_images(folder)):
        raise Refused(f"{role} {folder}: holds no images (.png .jpg .webp .tif .bmp)")
    # Without the ending, because a JPEG is often retouched into a PNG; with the folders, because names repeat in them.
    return [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in paths]


def first_of_each_name(files: Iterable[tuple[str, File]]) -> tuple[dict[str, File], list[tuple[str, File]]]:
    """Returns the first file of each name, and `(name, file)` of every other one whose name has occurred before."""
    first: dict[str, File] = {}
    further = []
    # The first one is kept, in the order of the paths.
    for name, file in files:
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
    """Matches sources and targets of the same name."""
    return Pairing(
        {name: (sources[name], targets[name]) for name in sorted(sources.keys() & targets.keys())},
        {name: sources[name] for name in sorted(sources.keys() - targets.keys())},
        {name: targets[name] for name in sorted(targets.keys() - sources.keys())},
    )


def match_all(sources: Mapping[str, File], targets: Mapping[str, File], roots: tuple[Any, Any]) -> dict[str, tuple[File, File]]:
    """Matches sources and targets, and refuses when one has no partner, naming each."""
    pairing = match(sources, targets)
    unpaired = [f"{name} (only in source)" for name in pairing.only_in_source]
    unpaired += [f"{name} (only in target)" for name in pairing.only_in_target]
    if unpaired:
        raise Refused(
            f"{roots[0]} and {roots[1]} do not pair up: {summarise(unpaired)}; add the missing or remove the extra files"
        )
    return pairing.pairs
