"""FFHQ and FFHQR as they come: two folders or tar files, flat or nested, paired by number, checked against the published md5s.

FFHQ: Karras, Laine and Aila 2019. FFHQR: Shafaei, Little and Schmidt 2021, whose authors split by folder.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from autoretouch_jax.data.images import SUFFIXES, list_images
from autoretouch_jax.data.sources import some
from autoretouch_jax.errors import Refused

LICENSE = (
    "FFHQR: CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/). FFHQ: CC BY-NC-SA 4.0 as a data set "
    "(NVIDIA); each photo has a licence of its own, listed with the data set"
)
FIRST_VALIDATION, FIRST_TEST = 56_000, 63_000  # folders 00000-55000, 56000-62000, 63000-69000


@dataclass(frozen=True)
class File:
    """An image file on its own or inside an uncompressed tar file."""

    path: Path
    member: str = ""
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """All of its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)


Splits = dict[str, list[tuple[str, File, File]]]


def ffhqr_splits(source: Path, target: Path, md5: Path | None) -> Splits:
    """FFHQ and FFHQR, each a folder or a tar file, in the official split.

    Images are paired by number, whatever the layout. With `md5`, FFHQ's `ffhq-dataset-v2.json`, every source is checked. Raises
    Refused, naming the files, when they do not pair up, or are not the published ones.
    """
    sources, targets = _by_number(source), _by_number(target)
    _refuse_lonely(sources, targets, (source, target))
    if md5:
        _check_md5(sources, md5)
    splits: Splits = {"train": [], "validation": [], "test": []}
    for number in sorted(sources):
        split = "train" if int(number) < FIRST_VALIDATION else "validation" if int(number) < FIRST_TEST else "test"
        splits[split].append((number, sources[number], targets[number]))
    return splits


def folder_splits(source: Path, target: Path, validation: float, test: float) -> Splits:
    """Any two folders or tar files, paired by path without ending; the split of a pair depends on its name alone."""
    sources, targets = (_by_name(root, lambda name: name) for root in (source, target))
    _refuse_lonely(sources, targets, (source, target))
    splits: Splits = {"train": [], "validation": [], "test": []}
    for name in sorted(sources):
        place = zlib.crc32(name.encode()) / 2**32
        split = "test" if place < test else "validation" if place < test + validation else "train"
        splits[split].append((name, sources[name], targets[name]))
    if not splits["train"]:
        raise Refused("no pair is left to train on; lower --validation and --test")
    return splits


def _by_number(root: Path) -> dict[str, File]:
    """Files by the five digits that name them; others (such as FFHQ's thumbnails' folders) count by their own names too."""
    files = _by_name(root, lambda name: name.rsplit("/", 1)[-1])
    odd = [str(file) for name, file in files.items() if not (name.isdigit() and len(name) == 5)]
    if odd:
        raise Refused(f"{root}: not FFHQ's names (00000 to 69999): {some(odd)}; for other pairs build `retouch_pairs`")
    return files


def _by_name(root: Path, key: Callable[[str], str]) -> dict[str, File]:
    found: dict[str, File] = {}
    for name, file in _files(root):
        if (name := key(name)) in found:
            raise Refused(f"{root}: {found[name]} and {file} have the same name {name}; keep one of them")
        found[name] = file
    if not found:
        raise Refused(f"{root}: holds no images")
    return found


def _files(root: Path) -> list[tuple[str, File]]:
    """`(path without ending, file)` for every image below a folder or in a tar file."""
    if root.is_dir():
        return [(path.relative_to(root).with_suffix("").as_posix(), File(path)) for path in list_images(root)]
    if not root.is_file():
        raise Refused(f"{root}: no such folder or tar file")
    try:
        with tarfile.open(root, "r:") as archive:
            return [
                (Path(member.name).with_suffix("").as_posix(), File(root, member.name, member.offset_data, member.size))
                for member in archive
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES
            ]
    except tarfile.TarError as error:
        raise Refused(f"{root}: not an uncompressed tar file ({error}); unpack it first") from error


def _refuse_lonely(sources: Mapping[str, File], targets: Mapping[str, File], roots: tuple[Path, Path]) -> None:
    lonely = [f"{name} (only in source)" for name in sorted(sources.keys() - targets.keys())]
    lonely += [f"{name} (only in target)" for name in sorted(targets.keys() - sources.keys())]
    if lonely:
        raise Refused(f"{roots[0]} and {roots[1]} do not pair up: {some(lonely)}; add the missing or remove the extra files")


def _check_md5(sources: Mapping[str, File], path: Path) -> None:
    try:
        images = [entry["image"] for entry in json.loads(path.read_text()).values()]
        published = {Path(image["file_path"]).stem: image["file_md5"] for image in images}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"--md5 {path}: not FFHQ's ffhq-dataset-v2.json ({type(error).__name__}: {error})") from error
    wrong = [
        str(file)
        for number, file in tqdm(sources.items(), desc="checking md5", unit="image", disable=None)
        if hashlib.md5(file.read(), usedforsecurity=False).hexdigest() != published.get(number)
    ]
    if wrong:
        raise Refused(f"not as FFHQ published them (md5): {some(wrong)}; download them again")
