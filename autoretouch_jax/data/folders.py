"""Folders of images as sources: clean faces, or pairs in two folders.

Everything that the beginning and the end of a file show is checked when a source is opened, and all faults are named at once.
With an audit, only what it found sound is opened.
"""

import concurrent.futures
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from autoretouch_jax.data.audit_file import Audit, sound_pairs
from autoretouch_jax.data.edits import VERSION, read_pair
from autoretouch_jax.data.face_parts import find_living_faces, regions
from autoretouch_jax.data.faces import Face, scaled
from autoretouch_jax.data.images import Header, read_header, read_rgb
from autoretouch_jax.data.pairing import named_images
from autoretouch_jax.data.sources import Decoded
from autoretouch_jax.errors import BadInput, Refused, summarise
from autoretouch_jax.runtime import worker

CACHE_BYTES = 1 << 30  # decoded examples are kept until they take this much
LARGEST_FACTOR = 4.0  # by which a photograph is enlarged to bring its face to a size
MANY = 1000  # files from which on threads read them, with a progress bar
THREADS = 16  # more than cores: on a network's disk they mostly wait
END = 4096  # bytes at the end of a file that its mark covers; a PNG ends with a checksum of its pixels
ALPHA_CHECKED = 64  # files with an alpha channel that are decoded before training starts; the others are checked when read

T = TypeVar("T")


class PhotoSource:
    """Photographs of anything. Its examples hold only `target`."""

    license: str | None = None

    def __init__(self, root: Path, role: str = "--data.root") -> None:
        files = named_images(root, role)
        self.names = [name for name, _ in files]
        self.targets = [path for _, path in files]
        headers = _checked_headers(self.targets)
        _check_alpha(self.targets, headers)
        # Known from the headers, so that a crop that is too large is refused before anything is decoded.
        self.smallest = _smallest(self.targets, headers)
        self.sizes = _sizes(headers)
        self._example = _Cached(self._decode)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Decoded:
        return self._example(index)

    def marks(self) -> list[str]:
        """Returns a text for each photograph that changes with its file, wherever the file lies."""
        return _marks(self.targets)

    def _decode(self, index: int) -> Decoded:
        return Decoded(self.names[index], {"target": read_rgb(self.targets[index])})


class FaceSource(PhotoSource):
    """Clean faces. Its examples hold `target`, and `regions`, where skin is (`face_parts.py`), if a face is found.

    With a `face_size` every photograph is resized so that its largest face has that size.
    """

    def __init__(self, root: Path, face_size: int = 0, role: str = "--data.root") -> None:
        super().__init__(root, role)
        self.face_size = face_size
        self._faces = FacesFound()

    def _decode(self, index: int) -> Decoded:
        image = super()._decode(index).images["target"]
        faces = self._faces(index, image)
        if not faces:
            return Decoded(self.names[index], {"target": image})
        if self.face_size:
            image, faces = scaled(image, faces, _factor(self.face_size, faces))
        return Decoded(self.names[index], {"target": image, "regions": regions(image, faces)})


class FacesFound:
    """The faces of a source's photographs. They are few numbers, and kept even where the photographs are too many to keep."""

    def __init__(self) -> None:
        self._faces: dict[int, list[Face]] = {}

    def __call__(self, index: int, image: np.ndarray) -> list[Face]:
        """Returns the faces of the photograph with this number. They are looked for once."""
        if index not in self._faces:
            self._faces[index] = find_living_faces(image)
        return self._faces[index]


def _factor(face_size: int, faces: list[Face]) -> float:
    """The factor that brings the largest face to a size. A tiny face is not enlarged without limit."""
    return min(face_size / faces[0].size, LARGEST_FACTOR)


@dataclass(frozen=True)
class PairFiles:
    """The files of pairs, and their sizes (height, width). `data prepare` reads from it."""

    names: list[str]
    sources: list[Path]
    targets: list[Path]
    sizes: list[tuple[int, int]]
    license: str | None = None
    edit_threshold: float | None = None  # `data.edit_threshold`
    warnings: tuple[str, ...] = ()  # what an audit does not know of these folders

    def part(self, indices: Sequence[int]) -> "PairFiles":
        """Returns the pairs of these indices."""
        names, sizes = [self.names[i] for i in indices], [self.sizes[i] for i in indices]
        sources, targets = ([paths[i] for i in indices] for paths in (self.sources, self.targets))
        return dataclasses.replace(self, names=names, sources=sources, targets=targets, sizes=sizes)

    def stamp(self, index: int) -> str:
        """Returns a text that changes when one of the two files does."""
        # Size and time of change: reading every file only to see whether it changed would take as long as packing it.
        stats = [path.stat() for path in (self.sources[index], self.targets[index])]
        return repr([(path.st_size, path.st_mtime_ns) for path in stats] + [self.edit_threshold, VERSION])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and target, `uint8[h, w, 3]`, that differ only in the edit. Raises BadInput, naming the file."""
        return read_pair(self.sources[index], self.targets[index], self.edit_threshold)


class PairSource:
    """Pairs from two folders, matched by name. With a `face_size` both are resized so that the largest face has that size."""

    license: str | None = None

    def __init__(
        self, source: Path, target: Path, face_size: int = 0, audit: Audit | None = None, edit_threshold: float | None = None
    ) -> None:
        """With an `audit`, what it found unsound is left out. `edit_threshold` is `data.edit_threshold`."""
        self.face_size, self._faces, self.edit_threshold = face_size, FacesFound(), edit_threshold
        self.files, headers = checked_pairs(source, target, audit, edit_threshold)
        self.names, self.sizes = self.files.names, self.files.sizes
        self.smallest = _smallest(self.files.sources, headers)
        self._example = _Cached(self._decode)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Decoded:
        return self._example(index)

    def marks(self) -> list[str]:
        """Returns a text for each pair that changes with one of its files, wherever they lie."""
        marks = _marks(self.files.sources + self.files.targets)
        return [" ".join(both) for both in zip(marks[: len(self)], marks[len(self) :], strict=True)]

    def _decode(self, index: int) -> Decoded:
        source, target = self.files.read(index)
        # Both by the source's face: two detections could differ by a pixel, and the pair would no longer be aligned.
        if self.face_size and (faces := self._faces(index, source)):
            factor = _factor(self.face_size, faces)
            source, target = (scaled(image, faces, factor)[0] for image in (source, target))
        return Decoded(self.names[index], {"source": source, "target": target})


def checked_pairs(
    source: Path, target: Path, audit: Audit | None = None, edit_threshold: float | None = None
) -> tuple[PairFiles, list[Header]]:
    """Returns the pairs of two folders and the sources' headers. Raises Refused, naming the faulty files.

    With an `audit` no file is opened that it found unsound.
    """
    sides = [named_images(root, role) for root, role in ((source, "source"), (target, "target"))]
    pairs, warnings = sound_pairs(sides[0], sides[1], (source, target), audit)
    sources, targets = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    # Sources first, then targets: the two halves of this list belong together.
    headers = _checked_headers(sources + targets)
    unequal = [
        f"{name} ({a.width}×{a.height} against {b.width}×{b.height})"
        for name, a, b in zip(pairs, headers, headers[len(sources) :], strict=False)
        if (a.width, a.height) != (b.width, b.height)
    ]
    if unequal:
        raise Refused(f"source and target differ in size: {summarise(unequal)}")
    _check_alpha(sources + targets, headers)
    headers = headers[: len(sources)]
    files = PairFiles(list(pairs), sources, targets, _sizes(headers), edit_threshold=edit_threshold, warnings=tuple(warnings))
    return files, headers


def _checked_headers(paths: Sequence[Path]) -> list[Header]:
    # All faults at once, because a folder with one usually has several.
    read = _of_each(paths, read_header, "checking files")
    faults = [f"{path}: {fault}" for path, (_, fault) in zip(paths, read, strict=True) if fault]
    if faults:
        raise Refused(f"bad images: {summarise(faults)}; replace or remove them")
    return [header for header, _ in read if header]


def _check_alpha(paths: Sequence[Path], headers: Sequence[Header]) -> None:
    # Whether an alpha channel is opaque shows only in the pixels. Usually all files come from one program: a few will do.
    with_alpha = [path for path, header in zip(paths, headers, strict=True) if "A" in header.mode]
    for path in with_alpha[:ALPHA_CHECKED]:
        try:
            read_rgb(path)
        except BadInput as error:
            raise Refused(str(error)) from error


def _sizes(headers: Sequence[Header]) -> list[tuple[int, int]]:
    return [(header.height, header.width) for header in headers]


def _marks(paths: Sequence[Path]) -> list[str]:
    return _of_each(paths, _mark, "comparing files")


def _mark(path: Path) -> str:
    """A file's length and a checksum of its end: copying keeps them, unlike the time of the last change."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END))
        return f"{size}:{zlib.crc32(file.read()):08x}"


def _of_each(paths: Sequence[Path], read: Callable[[Path], T], what: str) -> list[T]:
    """Returns `read(path)` for every path, in order."""
    if len(paths) < MANY:
        return [read(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(tqdm(pool.map(read, paths), total=len(paths), desc=what, unit="file", disable=None))


def _smallest(paths: Sequence[Path], headers: Sequence[Header]) -> tuple[Path, int, int]:
    path, header = min(zip(paths, headers, strict=False), key=lambda pair: min(pair[1].width, pair[1].height))
    return path, header.width, header.height


class _Cached:
    """`read` with a memory: decoding whole photographs for every crop would take longer than training on the crops."""

    def __init__(self, read: Callable[[int], Decoded]) -> None:
        self._read = read
        self._kept: dict[int, Decoded] = {}
        self._size = 0

    def __call__(self, index: int) -> Decoded:
        if index in self._kept:
            return self._kept[index]
        example = self._read(index)
        # Once it is full, the others are decoded each time. Threads may overshoot by an example each.
        if self._size < CACHE_BYTES / worker.siblings():
            self._size += sum(image.nbytes for image in example.images.values())
            self._kept[index] = example
        return example

    def __reduce__(self) -> tuple[type, tuple[Callable[[int], Decoded]]]:
        # A worker process reads for itself. What is in memory here would be copied to each of them.
        return _Cached, (self._read,)
