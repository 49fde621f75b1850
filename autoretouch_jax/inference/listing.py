"""Which photographs a `retouch` job takes, where each goes, and which files it leaves out and why. No file is opened here."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from autoretouch_jax.errors import Refused
from autoretouch_jax.inference.photo import SUFFIXES

SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Item:
    """A photograph of a job. `name` is the path of its result below the job's folder, with `/`."""

    source: Path
    destination: Path
    name: str


@dataclass(frozen=True)
class Listing:
    """The photographs of a job, sorted by name, and every other file below its folders with the reason to leave it out."""

    items: list[Item] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def list_photographs(inputs: Sequence[Path], out: Path, others: Collection[Path] = ()) -> Listing:
    """Returns the photographs that the inputs stand for. A folder stands for all photographs below it.

    A single folder keeps its tree in `out`; of several folders each does in a folder of its own name. A file goes right into
    `out`. What lies in `out` or in `others`, the job's further folders, is no photograph of the job. Raises Refused when an
    input does not exist, no photograph is left, two would be written to one file, or one would be written over an original.
    """
    if not inputs:
        raise Refused("no photos: name photographs, or folders of them")
    folders = _distinct([path for path in inputs if path.is_dir()])
    below = dict(zip(folders, _subfolders(folders), strict=True))
    own = {folder.resolve() for folder in (out, *others)}
    listing = Listing()
    for given in dict.fromkeys(inputs):
        if given in below:
            _refuse_model(given)
            _add_folder(listing, given, out / below[given], own - {given.resolve()}, out)
        elif given.is_file():
            listing.items.append(Item(given, out / given.name, given.name))
        elif not given.is_dir():  # a folder that is not in `below` was given twice, under two names
            raise Refused(f"photo {given}: no such file")
    if not listing.items:
        raise Refused(f"no photos: the folders given hold none ({' '.join(SUFFIXES)})")
    items = _without_collisions(listing.items)
    _refuse_overwriting(items, out)
    return Listing(sorted(items, key=lambda item: item.name), listing.skipped)


def parse_shard(text: str) -> tuple[int, int]:
    """Returns `3/64` as (3, 64): the third of 64 parts. Raises Refused for anything else."""
    match = SHARD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise Refused(f"--shard {text}: write it as 3/64, for the third of 64 parts; the first part is 1/64")
    return int(match[1]), int(match[2])


def part(entries: Sequence[Entry], shard: tuple[int, int]) -> list[Entry]:
    """Returns a part of a sorted list. The parts share no entry, together they are the list, and their sizes differ by one."""
    # Every 64th, and not a run of neighbours: photographs of one shoot are alike in size, and so in time.
    return list(entries[shard[0] - 1 :: shard[1]])


# ---- folders ----------------------------------------------------------------------------------------------------------------


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """The folders without those that another name stands for."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _subfolders(folders: Sequence[Path]) -> list[Path]:
    """Where below the job's folder each input folder keeps its tree: one alone at the top, several under their names.

    Folders of the same name, such as `anna/DCIM` and `ben/DCIM`, keep as much of their paths as tells them apart.
    """
    if len(folders) < 2:
        return [Path() for _ in folders]
    whole = [folder.resolve().parts[1:] for folder in folders]  # without the root: these are to lie below another folder
    for depth in range(1, max(map(len, whole)) + 1):
        ends = [Path(*parts[-depth:]) for parts in whole]
        if len(set(ends)) == len(ends):
            return ends
    raise Refused(f"{' and '.join(map(str, folders))} have the same path on two drives; retouch them one after the other")


def _refuse_model(folder: Path) -> None:
    # In an old form of the command the model came first. Its samples must not be retouched.
    if (folder / "model.json").is_file() or (folder / "model" / "model.json").is_file():
        raise Refused(f"photo {folder}: is a model; name it with --model {folder}")


def _add_folder(listing: Listing, folder: Path, home: Path, excluded: Collection[Path], out: Path) -> None:
    """Adds the files below a folder to the listing. `home` is where its tree is kept."""
    for path, reason in _files_below(folder, excluded, frozenset()):
        if reason:
            listing.skipped.append((path, reason))
        else:
            destination = home / path.relative_to(folder)
            listing.items.append(Item(path, destination, destination.relative_to(out).as_posix()))


def _files_below(folder: Path, excluded: Collection[Path], above: frozenset[Path]) -> Iterator[tuple[Path, str]]:
    """Yields every file below a folder with the reason to leave it out, "" for none. Links are followed, but in no circle."""
    here = folder.resolve()
    if here in excluded or here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        # A folder that may not be listed counts as a photograph: it cannot be read, and the job names it and goes on.
        yield folder, ""
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            yield path, "hidden"
        elif path.is_dir():
            yield from _files_below(path, excluded, above | {here})
        elif path.suffix.lower() not in SUFFIXES:
            # Folders of photographs also hold notes, catalogues and raw files.
            yield path, "another ending"
        elif path.exists() and not path.is_file():  # opening a pipe could wait for ever
            yield path, "no regular file"
        else:  # a link that leads nowhere too: that it cannot be read is to be named
            yield path, ""


# ---- destinations -----------------------------------------------------------------------------------------------------------


def _without_collisions(items: Sequence[Item]) -> list[Item]:
    """The items without photographs that were given twice. Refuses two photographs of the same destination."""
    first: dict[Path, Item] = {}
    for item in items:
        other = first.setdefault(item.destination, item)
        if other.source.resolve() != item.source.resolve():
            raise Refused(
                f"{other.source} and {item.source} would both be written to {item.destination}; "
                "give their folders instead, which are kept apart, or retouch them into different folders"
            )
    return list(first.values())


def _refuse_overwriting(items: Sequence[Item], out: Path) -> None:
    """Refuses a job in which a result would take the place of an original, its own or another's."""
    resolved: dict[Path, Path] = {}  # many files share few folders

    def place(path: Path) -> Path:
        # The last part is not resolved: a result replaces a link, and not what the link leads to.
        folder = resolved.setdefault(path.parent, path.parent.resolve())
        return folder / path.name

    originals: dict[Any, Path] = {place(item.source): item.source for item in items}
    originals |= {item.source.resolve(): item.source for item in items}
    for item in items:
        if original := originals.get(place(item.destination)):
            what = "itself" if original == item.source else f"the original {original}"
            raise Refused(f"--out {out}: {item.source} would overwrite {what}; choose another folder")
