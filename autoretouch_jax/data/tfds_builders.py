"""TFDS builders for FFHQ/FFHQR and for any two folders. `tfds_source.py` reads what they write.

Both write ArrayRecord, need no TensorFlow, and do not use the network. Importing this module registers `ffhqr` and
`retouch_pairs`, so `tfds.builder("retouch_pairs", source=…, target=…)` works too.
"""

import contextlib
import functools
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.data import ffhqr
from autoretouch_jax.data.audit_file import read_audit
from autoretouch_jax.data.images import is_plain, read_rgb
from autoretouch_jax.data.records import WRITER_OPTIONS
from autoretouch_jax.data.tfds_source import LIST
from autoretouch_jax.errors import BadInput, Refused

SHARD = 256  # pairs per file

Files = tuple[str, ffhqr.File, ffhqr.File]  # a pair's name, source and target


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does nothing: TFDS would look for the data set in its own bucket."""


class _Writer(tfds.core.ExampleWriter):
    def write(self, path: Any, examples: Any) -> None:
        """Stores each example as a record of its own, uncompressed, because PNG is compressed already."""
        writer = ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)
        for _, example in examples:
            writer.write(example)
        writer.close()


# These are classes because TFDS finds a builder by the name of its class, and a builder overrides its methods.
class RetouchPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs of photographs before and after retouching, from two folders: `name`, `source`, `target`.

    It is written shard by shard: TFDS' own writer keeps a split in memory and needs TensorFlow for large ones.
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
        audit: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        self._audit = None if audit is None else Path(audit)
        self._source, self._target = (None if root is None else Path(root) for root in (source, target))
        self._shares, self._license = (validation, test), license
        self.written: dict[str, list[tuple[str, int, int]]] = {}  # for each split the pairs' names, heights and widths
        # ArrayRecord, because TFDS' default needs TensorFlow.
        super().__init__(**{"file_format": "array_record", **kwargs})

    @functools.cached_property
    def pairs(self) -> ffhqr.Splits:
        """The pairs of each split that has any. Raises Refused, naming the files, when they do not pair up."""
        if self._source is None or self._target is None:
            raise Refused(f"{self.name} is built from two folders or tar files: give source and target")
        return {split: files for split, files in self._splits(self._source, self._target).items() if files}

    def _splits(self, source: Path, target: Path) -> ffhqr.Splits:
        audit = read_audit(self._audit, "--audit") if self._audit else None
        return ffhqr.folder_splits(source, target, *self._shares, audit)

    def _info(self) -> tfds.core.DatasetInfo:
        image = partial(tfds.features.Image, shape=(None, None, 3), encoding_format="png")
        return _Info(
            builder=self,
            description=self.about,
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "source": image(), "target": image()}),
            supervised_keys=("source", "target"),
            homepage=self.homepage or None,
            license=self._license,
            # The examples stay in the order of their names, so that the same files give the same data set.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split, files) for split, files in self.pairs.items()}

    def _generate_examples(self, split: str, files: Sequence[Files]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (name, source, target) in enumerate(files):
            (a, size), (b, other) = _rgb_png(source), _rgb_png(target)
            # TFDS would accept unequal sizes, and training would refuse them later.
            if size != other:
                raise BadInput(f"{name}: source is {size[1]}×{size[0]}, target {other[1]}×{other[0]}; they must be equal")
            self.written.setdefault(split, []).append((name, *size))
            yield key, {"name": name, "source": io.BytesIO(a), "target": io.BytesIO(b)}
            self._bar.update(1)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        with tqdm(total=sum(map(len, self.pairs.values())), desc="building", unit="pair", disable=None) as self._bar:
            # TFDS offers writing by shards only to data sets of another base class; this is its implementation.
            tfds.core.ShardBasedBuilder._download_and_prepare(self, dl_manager, download_config)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        return {
            split: [
                partial(self._generate_examples, split, files[start : start + SHARD]) for start in range(0, len(files), SHARD)
            ]
            for split, files in self.pairs.items()
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

    def _splits(self, source: Path, target: Path) -> ffhqr.Splits:
        return ffhqr.ffhqr_splits(source, target, self._md5)


def build(builder: RetouchPairs) -> int:
    """Writes a data set and prints its folder. A data set that is complete is left as it is. Returns the exit status."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    _ = builder.pairs  # refuses before anything is written
    folder = Path(builder.data_dir)
    for stale in folder.parent.glob("incomplete.*"):  # a killed build leaves them
        shutil.rmtree(stale)
    if folder.is_dir():
        print(f"{folder}: is complete; remove it to build it again")
        return 0
    # TFDS makes a folder for downloads even where there are none, and prints its own progress.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            download_dir=downloads,
            file_format="array_record",
        )
    (folder / LIST).write_text(json.dumps(builder.written))
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"{folder}: {counts}; train with --data.tfds {folder}")
    return 0


def _rgb_png(file: ffhqr.File) -> tuple[bytes, tuple[int, int]]:
    """Returns an RGB PNG and its height and width. The bytes are the file's own if it is one, upright and in sRGB.

    Raises BadInput, naming the file.
    """
    # Decoded even where the bytes are kept, because a damaged file must not go into a data set.
    data = file.read()
    pixels = read_rgb(io.BytesIO(data), str(file))
    is_rgb = data.startswith(b"\x89PNG\r\n\x1a\n") and data[24:26] == b"\x08\x02"  # bit depth 8, colour type RGB
    if not (is_rgb and is_plain(io.BytesIO(data))):
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "PNG")
        data = packed.getvalue()
    return data, (pixels.shape[0], pixels.shape[1])
