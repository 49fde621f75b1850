"""Random-access sources of examples: two folders of pairs, one folder of clean faces, records, or a TFDS data set.

`source[i]` is one example: its `name`, `height`, `width`, `weight`, a map of where its edit is, and `cut(box)`, which gives
`{"source", "target"}`, uint8 `[h, w, 3]` each; faces have only `target`. Everything a header or a trailer can tell is checked
when a source is made, and every fault is named at once.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from autoretouch_jax import files
from autoretouch_jax.config import DataConfig
from autoretouch_jax.data.crops import Box, edit_map
from autoretouch_jax.data.images import Header, list_images, read_header, read_rgb
from autoretouch_jax.errors import BadInput, Refused

CACHE_BYTES = 1 << 30  # a set whose decoded pixels fit is decoded once
ALPHA_CHECKED = 64  # files with an alpha channel decoded before training starts; the others are checked when read
NAMED = 12  # faults listed before the rest is counted

Images = dict[str, np.ndarray]


class Example(Protocol):
    """What a source holds."""

    @property
    def name(self) -> str:
        """Unique in its source."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""

    @property
    def weight(self) -> float:
        """How much it counts in the loss."""

    def edits(self) -> np.ndarray:
        """`uint8[⌈h / 16⌉, ⌈w / 16⌉]`, see `crops.edit_map`."""

    def cut(self, box: Box) -> Images:
        """A box (top, left, height, width) of each image; raises BadInput, by name, when it cannot be read."""


class Source(Protocol):
    """Examples by number."""

    names: list[str]
    smallest: tuple[Path, int, int]  # the example with the shortest side, its width and height
    license: str | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """An `Example`."""


@dataclass(frozen=True)
class Decoded:
    """An example whose images are in memory."""

    name: str
    images: Images
    weight: float = 1.0

    @property
    def height(self) -> int:
        """In pixels."""
        return self.images["target"].shape[0]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.images["target"].shape[1]

    def edits(self) -> np.ndarray:
        """Counted when first asked for."""
        return self._edits

    @functools.cached_property
    def _edits(self) -> np.ndarray:
        return edit_map(self.images["source"], self.images["target"])

    def cut(self, box: Box) -> Images:
        """Views of the images."""
        top, left, height, width = box
        return {name: image[top : top + height, left : left + width] for name, image in self.images.items()}


def whole(example: Example) -> Images:
    """All of an example's pixels."""
    return example.cut((0, 0, example.height, example.width))


class FaceSource:
    """Clean faces: `{"target"}`."""

    license: str | None = None

    def __init__(self, root: Path):
        self.targets = _images(root, "--data.root")
        self.names = [path.relative_to(root).with_suffix("").as_posix() for path in self.targets]
        headers = _checked_headers(self.targets)
        _check_alpha(self.targets, headers)
        self.smallest = _smallest(self.targets, headers)
        self._example = _cached(self._decode, headers)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Decoded:
        return self._example(index)

    def _decode(self, index: int) -> Decoded:
        return Decoded(self.names[index], {"target": read_rgb(self.targets[index])})


@dataclass(frozen=True)
class PairFiles:
    """The files of pairs, and their sizes (height, width)."""

    names: list[str]
    sources: list[Path]
    targets: list[Path]
    sizes: list[tuple[int, int]]
    license: str | None = None

    def part(self, indices: range) -> "PairFiles":
        """Some of them."""
        some = slice(indices.start, indices.stop)
        return PairFiles(self.names[some], self.sources[some], self.targets[some], self.sizes[some], self.license)

    def stamp(self, index: int) -> str:
        """Changes when a file does."""
        stats = [path.stat() for path in (self.sources[index], self.targets[index])]
        return repr([(path.st_size, path.st_mtime_ns) for path in stats])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target, `uint8[h, w, 3]`; raises BadInput by name."""
        return read_rgb(self.sources[index]), read_rgb(self.targets[index])


class PairSource:
    """Pairs from two folders, matched by path below the folder without its ending: `{"source", "target"}`."""

    license: str | None = None

    def __init__(self, source: Path, target: Path):
        self.files, headers = checked_pairs(source, target)
        self.names = self.files.names
        self.smallest = _smallest(self.files.sources, headers)
        self._example = _cached(self._decode, 2 * headers)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Decoded:
        return self._example(index)

    def _decode(self, index: int) -> Decoded:
        source, target = self.files.read(index)
        return Decoded(self.names[index], {"source": source, "target": target})


class Weighted:
    """A source with the weights of an audit; what weighs nothing is left out."""

    def __init__(self, source: Source, weights: dict[str, float]):
        self.source, self.weights, self.license = source, weights, source.license
        self.indices = [i for i, name in enumerate(source.names) if weights.get(name, 1.0) > 0]
        self.names = [source.names[i] for i in self.indices]
        self.smallest = source.smallest

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        example = self.source[self.indices[index]]
        return dataclasses.replace(example, weight=self.weights.get(example.name, 1.0))


def open_source(config: DataConfig) -> Source:
    """The source a config names. Raises Refused, naming every fault, also when the crop exceeds the smallest image."""
    source = _open(config)
    if config.audit:
        source = Weighted(source, _audit_weights(Path(config.audit), source.names))
    path, width, height = source.smallest
    if not config.resize and config.crop > min(width, height):
        raise Refused(
            f"--data.crop {config.crop} is larger than {path} ({width}×{height}); choose a smaller crop, or leave it out"
        )
    return source


def _open(config: DataConfig) -> Source:
    if config.root:
        return FaceSource(Path(config.root))
    if config.records:
        from autoretouch_jax.data.records import RecordSource

        return RecordSource(files.place(config.records))
    if config.tfds:
        from autoretouch_jax.data.builders import TfdsSource

        return TfdsSource(Path(config.tfds), config.split)
    assert config.source
    assert config.target
    return PairSource(Path(config.source), Path(config.target))


def _audit_weights(path: Path, names: Iterable[str]) -> dict[str, float]:
    """`{name: weight}` of `autoretouch data audit --json`."""
    try:
        weights = {name: float(pair["weight"]) for name, pair in json.loads(path.read_text())["pairs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"--data.audit {path}: not what `autoretouch data audit --json` writes ({error})") from error
    kept = [weights.get(name, 1.0) for name in names]
    if not any(name in weights for name in names):
        raise Refused(f"--data.audit {path}: knows none of the pairs of this data set; audit the data that is trained on")
    if max(kept) <= 0:
        raise Refused(f"--data.audit {path}: gives every pair the weight 0; nothing would be left to train on")
    return weights


def checked_pairs(source: Path, target: Path) -> tuple[PairFiles, list[Header]]:
    """The pairs of two folders and the sources' headers. Raises Refused, naming every fault that headers and trailers tell."""
    names, sources, targets = pair_folders(source, target)
    headers = _checked_headers(sources + targets)
    unequal = [
        f"{name} ({a.width}×{a.height} against {b.width}×{b.height})"
        for name, a, b in zip(names, headers, headers[len(sources) :], strict=False)
        if (a.width, a.height) != (b.width, b.height)
    ]
    if unequal:
        raise Refused(f"source and target differ in size: {some(unequal)}")
    _check_alpha(sources + targets, headers)
    sizes = [(header.height, header.width) for header in headers[: len(sources)]]
    return PairFiles(names, sources, targets, sizes), headers[: len(sources)]


def pair_folders(source: Path, target: Path) -> tuple[list[str], list[Path], list[Path]]:
    """Names, sources and targets, matched by relative stem. Raises Refused when a name is missing, extra or ambiguous."""
    found = [_by_stem(source, _images(source, "source")), _by_stem(target, _images(target, "target"))]
    lonely = [f"{name} (only in source)" for name in sorted(found[0].keys() - found[1].keys())]
    lonely += [f"{name} (only in target)" for name in sorted(found[1].keys() - found[0].keys())]
    if lonely:
        raise Refused(f"{source} and {target} do not pair up: {some(lonely)}; add the missing or remove the extra files")
    names = sorted(found[0])
    return names, [found[0][name] for name in names], [found[1][name] for name in names]


def some(faults: list[str]) -> str:
    """The first few of a list of faults, and how many more there are."""
    more = f", and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return ", ".join(faults[:NAMED]) + more


def _images(folder: Path, key: str) -> list[Path]:
    if not folder.is_dir():
        raise Refused(f"{key} {folder}: no such folder")
    if not (paths := list_images(folder)):
        raise Refused(f"{key} {folder}: holds no images (.png .jpg .webp .tif .bmp)")
    return paths


def _by_stem(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in named:
            raise Refused(f"{folder}: {named[name].name} and {path.name} have the same name {name}; keep one of them")
        named[name] = path
    return named


def _checked_headers(paths: list[Path]) -> list[Header]:
    read = [read_header(path) for path in paths]
    faults = [f"{path}: {fault}" for path, (_, fault) in zip(paths, read, strict=True) if fault]
    if faults:
        raise Refused(f"bad images: {some(faults)}; replace or remove them")
    return [header for header, _ in read if header]


def _check_alpha(paths: list[Path], headers: list[Header]) -> None:
    with_alpha = [path for path, header in zip(paths, headers, strict=True) if "A" in header.mode]
    for path in with_alpha[:ALPHA_CHECKED]:
        try:
            read_rgb(path)
        except BadInput as error:
            raise Refused(str(error)) from error


def _smallest(paths: list[Path], headers: list[Header]) -> tuple[Path, int, int]:
    path, header = min(zip(paths, headers, strict=False), key=lambda pair: min(pair[1].width, pair[1].height))
    return path, header.width, header.height


def _cached(read: Callable[[int], Decoded], headers: list[Header]) -> Callable[[int], Decoded]:
    if sum(h.width * h.height * 3 for h in headers) > CACHE_BYTES:
        return read
    return functools.lru_cache(maxsize=None)(read)
