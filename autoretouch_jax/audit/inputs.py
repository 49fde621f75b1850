"""What is audited: pairs in two folders or tar files, in records, or in a TFDS data set, each as two files to open."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from autoretouch_jax.data.ffhqr import File, image_files
from autoretouch_jax.data.pairing import first_of_each_name, match, named_images
from autoretouch_jax.data.sources import whole
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import storage


class Pair(Protocol):
    """A pair. It is sent to worker processes, so it must be picklable and small."""

    def stamp(self) -> str:
        """Returns a text that changes when the pair does."""

    def files(self) -> contextlib.AbstractContextManager[tuple[Path, Path]]:
        """Yields the files of source and target. Those that are no files of their own lie in a temporary folder meanwhile."""

    def shown(self) -> tuple[str, str]:
        """Returns what messages call source and target."""


@dataclass(frozen=True)
class FilePair:
    """Two files, each on its own or inside a tar file."""

    source: File
    target: File

    def stamp(self) -> str:
        """See `Pair`."""
        return file_stamp(self.source) + file_stamp(self.target)

    @contextlib.contextmanager
    def files(self) -> Iterator[tuple[Path, Path]]:
        """See `Pair`."""
        with unpacked(self.source) as source, unpacked(self.target) as target:
            yield source, target

    def shown(self) -> tuple[str, str]:
        """See `Pair`."""
        return str(self.source), str(self.target)


class PixelPair(Protocol):
    """A pair of a data set without files. `data prepare` reads pairs in the same way."""

    def stamp(self, index: int) -> str:
        """Returns a text that changes when the pair does."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and target, `uint8[h, w, 3]`. Raises BadInput when they cannot be decoded."""


@dataclass(frozen=True)
class StoredPair:
    """A pair of a data set. Its pixels are written to temporary files, so that one check serves all inputs."""

    name: str
    root: str
    pair: PixelPair

    def stamp(self) -> str:
        """See `Pair`."""
        return self.pair.stamp(0)

    @contextlib.contextmanager
    def files(self) -> Iterator[tuple[Path, Path]]:
        """See `Pair`."""
        images = self.pair.read(0)
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "source.bmp"), Path(folder, "target.bmp")
            # BMP holds the pixels as they are: packing them would take longer than checking them.
            for path, image in zip(paths, images, strict=True):
                Image.fromarray(image).save(path)
            yield paths

    def shown(self) -> tuple[str, str]:
        """See `Pair`."""
        return f"{self.root}/{self.name} (source)", f"{self.root}/{self.name} (target)"


@dataclass(frozen=True)
class _Recorded:
    """A pair in records, by its number."""

    root: str
    index: int
    digest: str  # of its shard

    def stamp(self, _: int) -> str:
        return f"{self.digest} {self.index}"

    def read(self, _: int) -> tuple[np.ndarray, np.ndarray]:
        images = whole(_open_records(self.root)[self.index])
        return images["source"], images["target"]


@functools.lru_cache(maxsize=1)  # a worker process opens the records once
def _open_records(root: str) -> Any:
    from autoretouch_jax.data.records import RecordSource

    return RecordSource(storage.open_path(root))


# ---- opening ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnpairedFile:
    """A file without a partner, or a second file of the same name."""

    file: File
    code: str
    role: str
    message: str


@dataclass(frozen=True)
class Inputs:
    """The pairs by name, sorted, the files without a partner, and what the result calls the two sides."""

    source: str
    target: str
    pairs: dict[str, Pair]
    unpaired: list[UnpairedFile]


def from_files(source: Path, target: Path) -> Inputs:
    """Matches the files of two folders or tar files by name. Unlike in training, files without a partner are kept apart.

    Raises Refused when the two have no name in common.
    """
    sides, unpaired = [], []
    for role, root in (("source", source), ("target", target)):
        files = [(name, File(path)) for name, path in named_images(root, role)] if root.is_dir() else image_files(root)
        named, further = first_of_each_name(files)
        sides.append(named)
        for name, file in further:
            kept = Path(named[name].member or named[name].path).name
            unpaired.append(UnpairedFile(file, "duplicate_name", role, f"{kept} has the same name; keep one of them"))
    pairing = match(*sides)
    for role, alone in (("source", pairing.only_in_source), ("target", pairing.only_in_target)):
        unpaired += [UnpairedFile(file, "unpaired", role, pairing.reasons[name]) for name, file in alone.items()]
    if not pairing.pairs:
        raise Refused(f"{source} and {target} have no names in common; are they the two sides of the same pairs?")
    pairs: dict[str, Pair] = {name: FilePair(*files) for name, files in pairing.pairs.items()}
    return Inputs(str(source), str(target), pairs, unpaired)


def from_records(root: str) -> Inputs:
    """Opens what `data prepare` wrote."""
    from autoretouch_jax.data.records import read_index

    records = _open_records(root)
    digests = [shard["sha256"] for shard in read_index(storage.open_path(root))["shards"]]
    pairs: dict[str, Pair] = {
        entry.name: StoredPair(entry.name, root, _Recorded(root, number, digests[entry.shard]))
        for number, entry in enumerate(records.entries)
    }
    return Inputs(root, root, dict(sorted(pairs.items())), [])


def from_tfds(folder: Path, split: str) -> Inputs:
    """Opens a split of a TFDS data set."""
    from autoretouch_jax.data.tfds_source import TfdsPairs

    whole_split = TfdsPairs.open(folder, split)
    root = f"{folder}/{split}"
    pairs: dict[str, Pair] = {
        name: StoredPair(name, root, whole_split.part(range(number, number + 1)))
        for number, name in enumerate(whole_split.names)
    }
    return Inputs(root, root, dict(sorted(pairs.items())), [])


# ---- files ------------------------------------------------------------------------------------------------------------------


def file_stamp(file: File) -> str:
    """Returns a text that changes when the file does."""
    try:
        status = file.path.stat()
    except OSError as error:  # the check names a file that has vanished
        return str(error)
    return repr((file.offset, file.size, status.st_size, status.st_mtime_ns))


@contextlib.contextmanager
def unpacked(file: File) -> Iterator[Path]:
    """Yields the path of a file. One inside a tar file lies in a temporary folder meanwhile."""
    if not file.member:
        yield file.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(file.member).name)
        path.write_bytes(file.read())
        yield path
