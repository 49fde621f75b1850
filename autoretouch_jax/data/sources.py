"""Random-access sources of examples: two folders of pairs, or one folder of clean faces.

`source[i]` decodes example i to `{"source", "target"}`, uint8 `[H, W, 3]` each; faces have only `target`.
Everything a header or a trailer can tell is checked when a source is made, and every fault is named at once.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data.images import Header, list_images, read_header, read_rgb
from autoretouch_jax.errors import BadInput, Refused

CACHE_BYTES = 1 << 30  # a set whose decoded pixels fit is decoded once
ALPHA_CHECKED = 64  # files with an alpha channel decoded before training starts; the others are checked when read
NAMED = 12  # faults listed before the rest is counted

Example = dict[str, np.ndarray]


class FaceSource:
    """Clean faces: `{"target"}`."""

    def __init__(self, root: Path):
        self.targets = _images(root, "--data.root")
        headers = _checked_headers(self.targets)
        _check_alpha(self.targets, headers)
        self.smallest = _smallest(self.targets, headers)
        self._read = _cached(read_rgb, headers)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        return {"target": self._read(self.targets[index])}


class PairSource:
    """Pairs from two folders, matched by path below the folder without its ending: `{"source", "target"}`."""

    def __init__(self, source: Path, target: Path):
        self.names, self.sources, self.targets = pair_folders(source, target)
        headers = _checked_headers(self.sources + self.targets)
        unequal = [
            f"{name} ({a.width}×{a.height} against {b.width}×{b.height})"
            for name, a, b in zip(self.names, headers, headers[len(self.sources) :], strict=False)
            if (a.width, a.height) != (b.width, b.height)
        ]
        if unequal:
            raise Refused(f"source and target differ in size: {some(unequal)}")
        _check_alpha(self.sources + self.targets, headers)
        self.smallest = _smallest(self.sources, headers)
        self._read = _cached(read_rgb, headers)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Example:
        return {"source": self._read(self.sources[index]), "target": self._read(self.targets[index])}


def open_source(config: DataConfig) -> FaceSource | PairSource:
    """The source a config names. Raises Refused, naming every fault, also when the crop exceeds the smallest image."""
    if config.root:
        source: FaceSource | PairSource = FaceSource(Path(config.root))
    else:
        assert config.source
        assert config.target
        source = PairSource(Path(config.source), Path(config.target))
    path, width, height = source.smallest
    if not config.resize and config.crop > min(width, height):
        raise Refused(
            f"--data.crop {config.crop} is larger than {path} ({width}×{height}); choose a smaller crop, or leave it out"
        )
    return source


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


def _cached(read: Callable[[Path], np.ndarray], headers: list[Header]) -> Callable[[Path], np.ndarray]:
    if sum(h.width * h.height * 3 for h in headers) > CACHE_BYTES:
        return read
    return functools.lru_cache(maxsize=None)(read)
