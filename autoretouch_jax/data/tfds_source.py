"""A TFDS data set as a source of pairs, for training and for `data prepare`, read without TensorFlow."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from autoretouch_jax.data.edits import VERSION, read_pair
from autoretouch_jax.data.images import read_header
from autoretouch_jax.data.sources import Decoded
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import storage

# Beside TFDS' own files: each split's names, heights and widths, so that opening the data set reads no image.
LIST = "pairs.json"
IMAGES = ("source", "target")  # the features that hold the images


@dataclass(frozen=True)
class TfdsPairs:
    """The pairs of a split, as `data prepare` takes them."""

    folder: Path
    split: str
    names: list[str]
    sizes: list[tuple[int, int]]
    license: str | None
    numbers: Sequence[int]  # of the pairs in the split
    edit_threshold: float | None = None  # `data.edit_threshold`

    @classmethod
    def open(cls, folder: Path, split: str, edit_threshold: float | None = None) -> "TfdsPairs":
        """Opens a whole split."""
        source = TfdsSource(folder, split)
        return cls(folder, split, source.names, source.sizes, source.license, range(len(source)), edit_threshold)

    def part(self, indices: Sequence[int]) -> "TfdsPairs":
        """Returns the pairs of these indices."""
        names, sizes = [self.names[i] for i in indices], [self.sizes[i] for i in indices]
        return dataclasses.replace(self, names=names, sizes=sizes, numbers=[self.numbers[i] for i in indices])

    def stamp(self, index: int) -> str:
        """Returns a text that changes with the data set: its description has a new digest when it is built again."""
        digest = storage.sha256(self.folder / "dataset_info.json")
        return f"{digest}{self.numbers[index]} {self.edit_threshold} {VERSION}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and target, `uint8[h, w, 3]`. Raises BadInput, naming the pair."""
        pair = _open(self.folder, self.split)[self.numbers[index]]
        name = f"{self.folder}: {self.names[index]}"
        source, target = (io.BytesIO(pair[key]) for key in IMAGES)
        return read_pair(source, target, self.edit_threshold, (f"{name} (source)", f"{name} (target)"))


class TfdsSource:
    """Pairs of a split of a TFDS data set with the features `source` and `target` (and `name`, if it has one)."""

    def __init__(self, folder: Path, split: str, edit_threshold: float | None = None):
        self.folder, self.split, self.edit_threshold = folder, split, edit_threshold
        pairs = _open(folder, split)
        self.license: str | None = tfds.builder_from_directory(str(folder)).info.redistribution_info.license or None
        entries = _names_and_sizes(folder, split, pairs)
        self.names, self.sizes = [name for name, _, _ in entries], [(height, width) for _, height, width in entries]
        height, width = min(self.sizes, key=min)
        self.smallest = folder / self.names[self.sizes.index((height, width))], width, height

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Decoded:
        name = self.names[index]
        pairs = TfdsPairs(self.folder, self.split, self.names, self.sizes, None, range(len(self)), self.edit_threshold)
        images = pairs.read(index)
        return Decoded(name, dict(zip(IMAGES, images, strict=True)))

    def marks(self) -> list[str]:
        """Returns a text for each pair that changes with its size, or with the length of a file of the split."""
        split = tfds.builder_from_directory(str(self.folder)).info.splits[self.split]
        files = [f"{path.name}:{path.stat().st_size}" for path in map(Path, split.filepaths)]
        digest = hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]
        return [f"{digest} {height}×{width}" for height, width in self.sizes]


# Cached, because opening takes a second, and a worker would open the data set again for every pair.
@functools.lru_cache(maxsize=8)
def _open(folder: Path, split: str) -> Any:
    """Returns the split's random-access source of undecoded examples. Raises Refused when there is none."""
    if not (folder / "dataset_info.json").is_file():
        raise Refused(
            f"{folder}: holds no TFDS data set (no dataset_info.json); give the folder named by its version, such as 1.0.0"
        )
    builder = tfds.builder_from_directory(str(folder))
    if split not in builder.info.splits:
        raise Refused(f"{folder}: has no split {split}; its splits are {', '.join(builder.info.splits)}")
    if missing := set(IMAGES) - set(builder.info.features):
        raise Refused(f"{folder}: has no feature {min(missing)}; pairs need the images `source` and `target`")
    return builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding() for key in IMAGES})


def _names_and_sizes(folder: Path, split: str, pairs: Any) -> list[tuple[str, int, int]]:
    """Returns names, heights and widths: from the list beside the data set, or, where there is none, from every example."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if len(listed := json.loads((folder / LIST).read_text())[split]) == len(pairs):
            return [tuple(item) for item in listed]
    # Without a list, another program wrote the data set, so every example is read.
    entries = []
    for index in tqdm(range(len(pairs)), desc="reading sizes", unit="pair", disable=None):
        pair = pairs[index]
        name = pair["name"].decode() if "name" in pair else f"{index:06d}"
        header, fault = read_header(io.BytesIO(pair["source"]))
        if header is None:
            raise Refused(f"{folder}: the source of {name} is {fault}; build the data set again")
        entries.append((name, header.height, header.width))
    return entries
