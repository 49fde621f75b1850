"""Records made for training: pairs in ArrayRecord shards, lossless, readable by example and by crop.

A folder holds `index.json` and `shard-NNNNN.arrayrecord` files. Each example is a run of records: first its edit map
(`crops.edit_map`, raw), then its tiles (`tile_codec.encode`) row by row. Reading a crop decodes only the tiles it overlaps.
ArrayRecord checks a hash of every record it reads. An image is padded on the right and at the bottom to whole tiles.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from autoretouch_jax.data import tile_codec
from autoretouch_jax.data.crops import CELL, Box, edit_map
from autoretouch_jax.data.shards import Shards
from autoretouch_jax.errors import BadInput, Refused

# Increased whenever an older version could misread the new records.
FORMAT = 1
INDEX = "index.json"
WRITER_OPTIONS = "group_size:1,uncompressed"  # records are read one by one, and the codec has packed them already


@dataclass(frozen=True)
class Entry:
    """The place of an example: its shard's number, its first record, and the sizes that determine its tiles."""

    name: str
    height: int
    width: int
    side: int
    shard: int
    first: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        # Rounded up: the last row and column of tiles are padded.
        return -(-self.height // self.side), -(-self.width // self.side)

    @property
    def records(self) -> int:
        """How many records this example has."""
        # The edit map comes first, so that crops around edits read one small record to choose their place.
        return 1 + self.grid[0] * self.grid[1]


def tile_side(height: int, width: int) -> int:
    """The side of an image's tiles, in pixels: 128, or less for a smaller image."""
    # A multiple of 16, the side of an edit map's cell.
    return min(tile_codec.SIDE, -(-max(height, width) // 16) * 16)


def write_example(writer: ArrayRecordWriter, source: np.ndarray, target: np.ndarray) -> None:
    """Appends one pair, `uint8[h, w, 3]` each."""
    height, width = source.shape[:2]
    side = tile_side(height, width)
    writer.write(edit_map(source, target).tobytes())
    # Repeated edges pack better than zeros.
    margins = ((0, -height % side), (0, -width % side), (0, 0))
    a, b = (np.pad(image, margins, mode="edge") for image in (source, target))
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = np.s_[top : top + side, left : left + side]
            writer.write(tile_codec.encode(a[tile], b[tile]))


@dataclass(frozen=True)
class RecordPair:
    """One example of a `RecordSource`. Nothing is read before it is asked for."""

    records: "RecordSource"
    entry: Entry
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The pair's name."""
        return self.entry.name

    @property
    def height(self) -> int:
        """The height in pixels."""
        return self.entry.height

    @property
    def width(self) -> int:
        """The width in pixels."""
        return self.entry.width

    def edits(self) -> np.ndarray:
        """Returns where the edit is: `uint8[⌈h / 16⌉, ⌈w / 16⌉]`, see `crops.edit_map`."""
        (data,) = self.records.read(self.entry, [0])
        shape = (-(-self.height // CELL), -(-self.width // CELL))
        # ArrayRecord's hash cannot tell that an intact record belongs to another example.
        if len(data) != shape[0] * shape[1]:
            raise BadInput(self.records.damaged(self.entry, "its edit map has another size"))
        return np.frombuffer(data, np.uint8).reshape(shape)

    def cut(self, box: Box) -> dict[str, np.ndarray]:
        """Returns `{"source", "target"}: uint8[h, w, 3]` of a box (top, left, height, width) inside the image."""
        top, left, height, width = box
        side, columns = self.entry.side, self.entry.grid[1]
        # The tiles that the box overlaps, row by row.
        rows = range(top // side, (top + height - 1) // side + 1)
        across = range(left // side, (left + width - 1) // side + 1)
        data = self.records.read(self.entry, [1 + row * columns + column for row in rows for column in across])
        try:
            inside = (top - rows[0] * side, left - across[0] * side, height, width)
            source, target = tile_codec.decode(data, len(across), side, inside)
        except ValueError as error:
            raise BadInput(self.records.damaged(self.entry, error)) from error
        return {"source": source, "target": target}


class RecordSource:
    """Pairs from a folder that `autoretouch data prepare` wrote. Only `index.json` is read to open it."""

    def __init__(self, root: Path):
        self.root = root
        index = read_index(root)
        self.license: str | None = index["license"]
        # Earlier versions took any difference for an edit.
        self.edit_threshold: float | None = index.get("edit_threshold", 0.0)
        self.shards: list[str] = [shard["file"] for shard in index["shards"]]
        self.entries = [Entry(*fields) for fields in index["examples"]]
        self.names = [entry.name for entry in self.entries]
        self.sizes = [(entry.height, entry.width) for entry in self.entries]
        self.weights: dict[str, float] | None = index.get("weights")  # those of the audit that they were prepared with
        # Digests of the pairs' pixels; in an earlier version's records, those of their shards.
        shards = [shard.get("sha256", "") for shard in index["shards"]]
        self._marks: list[str] = index.get("digests") or [f"{shards[entry.shard]}:{entry.first}" for entry in self.entries]
        # An index may be copied without its shards.
        present = {path.name for path in root.iterdir()}  # one listing: in a bucket, each question takes a request
        missing = [name for name in self.shards if name not in present]
        if missing:
            raise Refused(f"{root}: {missing[0]} is missing; copy it again, or run `autoretouch data prepare` again")
        smallest = min(self.entries, key=lambda entry: min(entry.height, entry.width))
        self.smallest = root / smallest.name, smallest.width, smallest.height
        self._shards = Shards(root, index["shards"])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> RecordPair:
        return RecordPair(self, self.entries[index])

    def marks(self) -> list[str]:
        """Returns a text for each pair that changes with its pixels."""
        return self._marks

    def read(self, entry: Entry, offsets: Sequence[int]) -> list[bytes]:
        """Returns the records of an example at `offsets`. Raises BadInput, naming example and shard, when they are damaged."""
        try:
            return self._shards.read(entry.shard, [entry.first + offset for offset in offsets])
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadInput(self.damaged(entry, error)) from error

    def damaged(self, entry: Entry, why: Any) -> str:
        """Returns the message for a damaged example."""
        # ArrayRecord's messages run over several lines.
        reason = " ".join(str(why).split())[:160]
        return (
            f"{self.root / self.shards[entry.shard]}: example {entry.name} is damaged ({reason}); "
            "run `autoretouch data prepare` again to rewrite it"
        )


def read_index(root: Path) -> dict[str, Any]:
    """Returns `index.json`, checked. Raises Refused, saying what to do, when it is missing or not a usable index."""
    path = root / INDEX
    if not path.is_file():
        # While `data prepare` writes, there are shards and no index.
        unfinished = any(root.glob("shard-*")) if root.is_dir() else False
        hint = (
            "`autoretouch data prepare` did not finish; run it again"
            if unfinished
            else "make it with `autoretouch data prepare`"
        )
        raise Refused(f"{root}: holds no {INDEX}; {hint}")
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise Refused(f"{path}: format {index['format']}; this version reads format {FORMAT}; prepare the records again")
        if not index["examples"]:
            raise Refused(f"{path}: holds no examples; prepare the records again")
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path}: not an index of records ({error}); prepare the records again") from error
    return index
