"""FFHQ and FFHQR as they are published, and any two folders or tar files: their files, pairs, splits and checksums.

FFHQ: Karras, Laine and Aila 2019. FFHQR: Shafaei, Little and Schmidt 2021, whose authors split by folder.
"""

import hashlib
import json
import sys
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from autoretouch_jax.data.audit_file import Audit, advising_an_audit, sound_pairs
from autoretouch_jax.data.groups import groups
from autoretouch_jax.data.images import SUFFIXES
from autoretouch_jax.data.pairing import match_all, named_images, unique_names
from autoretouch_jax.errors import Refused, summarise

LICENSE = (
    "FFHQR: CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/). FFHQ: CC BY-NC-SA 4.0 as a data set "
    "(NVIDIA); each photo has a licence of its own, listed with the data set"
)
# The official split: folders 00000-55000 for training, 56000-62000 for validation, 63000-69000 for testing.
FIRST_VALIDATION, FIRST_TEST, IMAGES = 56_000, 63_000, 70_000


@dataclass(frozen=True)
class File:
    """An image file on its own or inside an uncompressed tar file."""

    path: Path
    member: str = ""
    offset: int = 0
    size: int = -1

    def read(self, most: int = -1) -> bytes:
        """Returns its bytes, or so many of them at most."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(min((size for size in (self.size, most) if size >= 0), default=-1))

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)


Splits = dict[str, list[tuple[str, File, File]]]  # for each split the pairs' names, sources and targets


def ffhqr_splits(source: Path, target: Path, md5: Path | None) -> Splits:
    """Returns the pairs of FFHQ and FFHQR, each a folder or a tar file, in the official split.

    Images are paired by number, whatever the layout. With `md5`, FFHQ's `ffhq-dataset-v2.json`, every source is checked. Raises
    Refused, naming the files, when they do not pair up or are not the published ones.
    """
    sources = _by_number(source)
    pairs = match_all(sources, _by_number(target), (source, target))
    if md5:
        _check_md5(sources, md5)
    splits: Splits = {"train": [], "validation": [], "test": []}
    for number, files in pairs.items():
        splits[official_split(int(number))].append((number, *files))
    return splits


def official_split(number: int) -> str:
    """The split in which FFHQR's authors put this image of FFHQ."""
    return "train" if number < FIRST_VALIDATION else "validation" if number < FIRST_TEST else "test"


def folder_splits(source: Path, target: Path, validation: float, test: float, audit: Audit | None = None) -> Splits:
    """Returns the pairs of any two folders or tar files, in splits of about these shares.

    Pairs of one folder, of one burst, and those that an audit found nearly alike stay together, see `groups.py`. The split
    depends on the group's name alone, so that it stays when others are added. What the audit found unsound is left out.
    """
    with advising_an_audit("--audit", audit, (source, target)):
        pairs, warnings = sound_pairs(image_files(source), image_files(target), (source, target), audit)
    group_of = groups({name: files[0] for name, files in pairs.items()}, audit.groups if audit else {})
    splits: Splits = {"train": [], "validation": [], "test": []}
    for name, files in pairs.items():
        draw = zlib.crc32(group_of[name].encode()) / 2**32  # in [0, 1), a function of the group's name
        split = "test" if draw < test else "validation" if draw < test + validation else "train"
        splits[split].append((name, *files))
    number = len(set(group_of.values()))
    # With few groups, or large shares, a hash may put all of them elsewhere.
    if not splits["train"]:
        raise Refused(f"no pair is left to train on: all {number} group(s) are elsewhere; lower --validation and --test")
    for split, share in (("validation", validation), ("test", test)):
        if not splits[split] and share * len(pairs) >= 1:
            warnings.append(f"the split {split} is empty: {len(pairs)} pairs make only {number} group(s), which stay together")
    for warning in warnings:
        print(warning, file=sys.stderr)
    return splits


def _by_number(root: Path) -> dict[str, File]:
    """Returns the files by the five digits that name them. Refuses other names, such as those of FFHQ's thumbnails."""
    # The number is the file's name, in whichever folders the archive has put it.
    files = unique_names(root, [(name.rsplit("/", 1)[-1], file) for name, file in image_files(root)])
    odd = [str(file) for name, file in files.items() if not (name.isdigit() and len(name) == 5 and int(name) < IMAGES)]
    if odd:
        raise Refused(f"{root}: not FFHQ's names (00000 to 69999): {summarise(odd)}; for other pairs build `retouch_pairs`")
    return files


def image_files(root: Path) -> list[tuple[str, File]]:
    """Returns `(path without ending, file)` of every image below a folder or in a tar file. Raises Refused without any."""
    if root.is_dir():
        return [(name, File(path)) for name, path in named_images(root, "folder")]
    if not root.is_file():
        raise Refused(f"{root}: no such folder or tar file")
    try:
        # Uncompressed, because members of a compressed archive cannot be read at random.
        with tarfile.open(root, "r:") as archive:
            files = [
                (Path(member.name).with_suffix("").as_posix(), File(root, member.name, member.offset_data, member.size))
                for member in archive
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES
            ]
    except tarfile.TarError as error:
        raise Refused(f"{root}: not an uncompressed tar file ({error}); unpack it first") from error
    if not files:
        raise Refused(f"{root}: holds no images")
    return files


def _check_md5(sources: Mapping[str, File], path: Path) -> None:
    """Refuses sources that are not the published ones, naming them."""
    try:
        images = [entry["image"] for entry in json.loads(path.read_text()).values()]
        # FFHQ's list has an entry for each image, with its path and md5.
        published = {Path(image["file_path"]).stem: image["file_md5"] for image in images}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"--md5 {path}: not FFHQ's ffhq-dataset-v2.json ({type(error).__name__}: {error})") from error
    # All wrong files are named at once: otherwise they would turn up one by one.
    wrong = [
        str(file)
        for number, file in tqdm(sources.items(), desc="checking md5", unit="image", disable=None)
        if hashlib.md5(file.read(), usedforsecurity=False).hexdigest() != published.get(number)
    ]
    if wrong:
        raise Refused(f"not as FFHQ published them (md5): {summarise(wrong)}; download them again")
