"""The arguments of the verbs that prepare, check and measure data. The docstrings are their `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import FlagConversionOff, Positional


@dataclass(frozen=True)
class PrepareArguments:
    """Turn pairs into records made for training, lossless and checksummed. The same command again completes them.

    From two folders:  autoretouch data prepare BEFORE AFTER --out records

    From a TFDS data set:  autoretouch data prepare --tfds FOLDER --split train --out records

    Without what an audit found unsound:  autoretouch data prepare BEFORE AFTER --audit audit.json --out records

    Then:  autoretouch train configs/retouch.py --data.records records --workdir runs/a
    """

    pairs: Positional[tuple[Path, ...]] = ()
    """Two folders: images before and after retouching. Leave them out with --tfds."""
    # Required, though it follows a field with a default.
    out: Path = tyro.MISSING
    """Folder for the records."""
    tfds: Path | None = None
    """Take the pairs from this TFDS data set instead."""
    split: str = "train"
    """Split of the TFDS data set."""
    audit: Path | None = None
    """A `data audit` JSON file. What it weighs 0 or found unpaired is not opened. The other weights go into the records."""
    edit_threshold: float | None = None
    """Levels of 255 from which a change counts as an edit, as --data.edit-threshold. Left out, it is measured for each pair."""
    workers: int = 0
    """Number of processes. 0 starts one for each core."""
    on_bad: Literal["skip", "fail"] = "skip"
    """`skip` leaves out and names a pair that cannot be decoded (exit status 1); `fail` stops at it."""
    license: str | None = None
    """The data's licence. Models trained on the records carry it."""


@dataclass(frozen=True)
class VerifyArguments:
    """Read and decode all records, and name what is damaged (exit status 1)."""

    records: Positional[Path]
    """A folder that `data prepare` wrote."""


@dataclass(frozen=True)
class AuditArguments:
    """Find what is wrong with pairs before training on them: a page with pictures, a JSON file, exit status 1 for any fault.

    autoretouch data audit BEFORE AFTER --html audit.html --json audit.json

    Then:  autoretouch train configs/retouch.py --data.source BEFORE --data.target AFTER --data.audit audit.json …

    The same command goes on after a stop: results are kept beside the JSON file, in audit.json.part, until all are there.
    """

    pairs: Positional[tuple[Path, ...]] = ()
    """Two folders or uncompressed tar files: images before and after retouching, paired by name. Leave them out with --records
    or --tfds."""
    # A text and not a Path: it may be in gs:// or s3://.
    records: str | None = None
    """Audit the records that `data prepare` wrote instead."""
    tfds: Path | None = None
    """Audit this TFDS data set instead."""
    split: str = "train"
    """Split of the TFDS data set."""
    html: Path | None = Path("audit.html")
    """The page."""
    json: Path | None = Path("audit.json")
    """Every pair's weight, reasons and measures. `--data.audit` takes it."""
    labels: FlagConversionOff[bool] = True
    """Also look for spots left in a target that look like spots removed elsewhere."""
    labels_sample: int = 1000
    """Look for them in at most this many pairs, evenly spread; 0 for all."""
    workers: int = 0
    """Number of processes. 0 starts one for each core."""


@dataclass(frozen=True)
class BuildArguments:
    """Write a TFDS data set (ArrayRecord, no TensorFlow needed), for sharing and for `--data.tfds`.

    FFHQ and FFHQR in the official split:  autoretouch data build ffhqr FFHQ FFHQR --md5 ffhq-dataset-v2.json --out data

    Your own two folders:  autoretouch data build retouch_pairs BEFORE AFTER --out data --license "all rights reserved"
    """

    kind: Positional[Literal["ffhqr", "retouch_pairs"]]
    """Which data set."""
    source: Positional[Path]
    """Images before retouching: a folder or an uncompressed tar file."""
    target: Positional[Path]
    """Images after retouching: a folder or an uncompressed tar file."""
    out: Path
    """TFDS' data_dir. The data set goes to OUT/KIND/1.0.0."""
    md5: Path | None = None
    """FFHQ's ffhq-dataset-v2.json. Every source is checked against it before anything is written."""
    validation: float = 0.1
    """Share of `retouch_pairs` in the split `validation`. Pairs of one folder or one burst, and those that an audit found to be
    nearly alike, stay together. `ffhqr` has its own splits."""
    test: float = 0.1
    """Share of `retouch_pairs` in the split `test`."""
    audit: Path | None = None
    """A `data audit` JSON file. What it weighs 0 or found unpaired is left out."""
    license: str | None = None
    """The licence of `retouch_pairs`. Models trained on it carry it."""


@dataclass(frozen=True)
class BenchDataArguments:
    """Compare reading records with decoding two PNGs by Pillow, in pairs per second of one core.

    It draws faces of 1024². With --source and --target it measures your own pairs.
    """

    source: Path | None = None
    """Folder of PNGs before retouching. Without it, faces are drawn."""
    target: Path | None = None
    """Folder of PNGs after retouching."""
    pairs: int = 16
    """The largest number of pairs."""
    seconds: float = 3.0
    """Time for each line of the table, once for the records and once for the PNGs."""
    json: Path | None = None
    """Also write the numbers to this file."""
