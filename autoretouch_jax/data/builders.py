"""TFDS: builders for FFHQ/FFHQR and for anybody's two folders, and the source that trains from what they wrote.

Both write ArrayRecord, need no TensorFlow, and touch no network. Importing this module registers `ffhqr` and `retouch_pairs`,
so `tfds.builder("retouch_pairs", source=…, target=…)` works too.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.data import ffhqr
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.data.records import WRITER_OPTIONS
from autoretouch_jax.data.sources import Decoded
from autoretouch_jax.errors import BadInput, Refused

SHARD = 256  # pairs per file
LIST = "pairs.json"  # beside TFDS' own files: each split's names, heights and widths, so that opening it reads no image

Files = tuple[str, ffhqr.File, ffhqr.File]  # a name, and where its source and its target are


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: the data set is on no bucket."""


class _Writer(tfds.core.ExampleWriter):
    def write(self, path: Any, examples: Any) -> None:
        """PNG is packed already: store each example as it is, on its own."""
        writer = ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)
        for _, example in examples:
            writer.write(example)
        writer.close()


class RetouchPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs of photographs before and after retouching, from two folders: `name`, `source`, `target`.

    Written shard by shard: the stock writer keeps a split in memory and wants TensorFlow for large ones.
    """

    name = "retouch_pairs"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    url_infos = None  # nothing is downloaded
    about = "Photographs before and after retouching."
    homepage = ""

    def __init__(
        self,
        *,
        source: str | os.PathLike[str] | None = None,
        target: str | os.PathLike[str] | None = None,
        validation: float = 0.1,
        test: float = 0.1,
        license: str | None = None,
        **kwargs: Any,
    ):
        self._source, self._target = (None if root is None else Path(root) for root in (source, target))
        self._shares, self._license = (validation, test), license
        self.listed: dict[str, list[tuple[str, int, int]]] = {}  # for each split names, heights, widths
        super().__init__(**{"file_format": "array_record", **kwargs})

    @functools.cached_property
    def splits_found(self) -> ffhqr.Splits:
        """The files of each split that has any. Raises Refused, naming the files, when they do not pair up."""
        if self._source is None or self._target is None:
            raise Refused(f"{self.name} is built from two folders or tar files: give source and target")
        return {split: files for split, files in self._find(self._source, self._target).items() if files}

    def _find(self, source: Path, target: Path) -> ffhqr.Splits:
        return ffhqr.folder_splits(source, target, *self._shares)

    def _info(self) -> tfds.core.DatasetInfo:
        image = partial(tfds.features.Image, shape=(None, None, 3), encoding_format="png")
        return _Info(
            builder=self,
            description=self.about,
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "source": image(), "target": image()}),
            supervised_keys=("source", "target"),
            homepage=self.homepage or None,
            license=self._license,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split, files) for split, files in self.splits_found.items()}

    def _generate_examples(self, split: str, files: Sequence[Files]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (name, source, target) in enumerate(files):
            (a, size), (b, other) = _rgb_png(source), _rgb_png(target)
            if size != other:
                raise BadInput(f"{name}: source is {size[1]}×{size[0]}, target {other[1]}×{other[0]}; they must be equal")
            self.listed.setdefault(split, []).append((name, *size))
            yield key, {"name": name, "source": io.BytesIO(a), "target": io.BytesIO(b)}
            self._bar.update(1)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        with tqdm(total=sum(map(len, self.splits_found.values())), desc="building", unit="pair", disable=None) as self._bar:
            tfds.core.ShardBasedBuilder._download_and_prepare(self, dl_manager, download_config)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        return {
            split: [
                partial(self._generate_examples, split, files[start : start + SHARD]) for start in range(0, len(files), SHARD)
            ]
            for split, files in self.splits_found.items()
        }

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _Writer(self.info.file_format)


class Ffhqr(RetouchPairs):
    """FFHQ and FFHQR: 70,000 portraits of 1024², before and after professional retouching."""

    name = "ffhqr"
    about = (
        "FFHQ (Karras, Laine and Aila 2019) as source and FFHQR (Shafaei, Little and Schmidt 2021) as target, in the official "
        "split by folder: 56,000 for training, 7,000 for validation, 7,000 for testing."
    )
    homepage = "https://github.com/skylab-tech/ffhqr-dataset"

    def __init__(self, *, md5: str | os.PathLike[str] | None = None, **kwargs: Any):
        self._md5 = None if md5 is None else Path(md5)
        super().__init__(**{**kwargs, "license": ffhqr.LICENSE})

    def _find(self, source: Path, target: Path) -> ffhqr.Splits:
        return ffhqr.ffhqr_splits(source, target, self._md5)


def build(made: RetouchPairs) -> int:
    """Write a data set below its `data_dir`; tells its folder. What is already complete is left as it is."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    _ = made.splits_found  # refuses before anything is written
    folder = Path(made.data_dir)
    for stale in folder.parent.glob("incomplete.*"):  # left by a kill
        shutil.rmtree(stale)
    if folder.is_dir():
        print(f"{folder}: is complete; remove it to build it anew")
        return 0
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        made.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            download_dir=downloads,
            file_format="array_record",
        )
    (folder / LIST).write_text(json.dumps(made.listed))
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in made.info.splits.items())
    print(f"{folder}: {counts}; train with --data.tfds {folder}")
    return 0


def _rgb_png(file: ffhqr.File) -> tuple[bytes, tuple[int, int]]:
    """The file's bytes where it is an RGB PNG, else its pixels as one; and height and width. Raises BadInput by name."""
    data = file.read()
    pixels = read_rgb(io.BytesIO(data), str(file))
    if not (data.startswith(b"\x89PNG\r\n\x1a\n") and data[24:26] == b"\x08\x02"):  # 8 bits, RGB
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "PNG")
        data = packed.getvalue()
    return data, (pixels.shape[0], pixels.shape[1])


@dataclass(frozen=True)
class TfdsPairs:
    """A split's pairs, for `data prepare`."""

    folder: Path
    split: str
    names: list[str]
    sizes: list[tuple[int, int]]
    license: str | None
    start: int = 0

    @classmethod
    def open(cls, folder: Path, split: str) -> "TfdsPairs":
        """Names and sizes of a whole split."""
        source = TfdsSource(folder, split)
        return cls(folder, split, source.names, source.sizes, source.license)

    def part(self, indices: range) -> "TfdsPairs":
        """Some of them."""
        names, sizes = (values[indices.start : indices.stop] for values in (self.names, self.sizes))
        return TfdsPairs(self.folder, self.split, names, sizes, self.license, self.start + indices.start)  # type: ignore[arg-type]

    def stamp(self, index: int) -> str:
        """A data set does not change in place; its identity is its description's."""
        return hashlib.sha256((self.folder / "dataset_info.json").read_bytes()).hexdigest() + str(self.start + index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target, `uint8[h, w, 3]`."""
        pair = _opened(self.folder, self.split)[self.start + index]
        name = f"{self.folder}: {self.names[index]}"
        return tuple(read_rgb(io.BytesIO(pair[key]), f"{name} ({key})") for key in ("source", "target"))  # type: ignore[return-value]


class TfdsSource:
    """Pairs of a split of a TFDS data set with the features `source` and `target` (and `name`, if it has one)."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        pairs = _opened(folder, split)
        self.license: str | None = tfds.builder_from_directory(str(folder)).info.redistribution_info.license or None
        listed = _listed(folder, split, pairs)
        self.names, self.sizes = [name for name, _, _ in listed], [(height, width) for _, height, width in listed]
        height, width = min(self.sizes, key=min)
        self.smallest = folder / self.names[self.sizes.index((height, width))], width, height

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Decoded:
        name = self.names[index]
        images = TfdsPairs(self.folder, self.split, self.names, self.sizes, None).read(index)
        return Decoded(name, dict(zip(("source", "target"), images, strict=True)))


@functools.lru_cache(maxsize=8)
def _opened(folder: Path, split: str) -> Any:
    """The split's random-access source of undecoded examples. Raises Refused when there is none."""
    if not (folder / "dataset_info.json").is_file():
        raise Refused(
            f"{folder}: holds no TFDS data set (no dataset_info.json); give the folder named by its version, such as 1.0.0"
        )
    builder = tfds.builder_from_directory(str(folder))
    if split not in builder.info.splits:
        raise Refused(f"{folder}: has no split {split}; its splits are {', '.join(builder.info.splits)}")
    if missing := {"source", "target"} - set(builder.info.features):
        raise Refused(f"{folder}: has no feature {missing.pop()}; pairs need the images `source` and `target`")
    return builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding() for key in ("source", "target")})


def _listed(folder: Path, split: str, pairs: Any) -> list[tuple[str, int, int]]:
    """Names, heights and widths: from the list beside the data set, or, where another program wrote it, from every example."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if len(listed := json.loads((folder / LIST).read_text())[split]) == len(pairs):
            return [tuple(item) for item in listed]
    listed = []
    for index in tqdm(range(len(pairs)), desc="reading sizes", unit="pair", disable=None):
        pair = pairs[index]
        with Image.open(io.BytesIO(pair["source"])) as image:
            listed.append((pair["name"].decode() if "name" in pair else f"{index:06d}", image.height, image.width))
    return listed
