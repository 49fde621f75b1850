"""What each verb of the command line takes; the docstrings are its `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from autoretouch_jax import config as configs


@dataclass(frozen=True)
class Train:
    """Train a retoucher. The same command again resumes.

    Clean faces, blemishes made on the fly:  autoretouch train configs/portraits.py --data.root FACES --workdir runs/a

    Before/after pairs:  autoretouch train configs/autoretouch.py --data.source BEFORE --data.target AFTER --workdir runs/b

    On several hosts: the same command on each of them, see launch/.
    """

    config: Positional[Path]
    """A Python file that defines `config`; name it to see its values in this help."""
    workdir: str
    """Where config.json, metrics.jsonl, checkpoints/, samples/ and model/ go: a folder, gs://BUCKET/PATH or s3://BUCKET/PATH."""
    max_time: str | None = None
    """Stop after this long, with a checkpoint and status 75: 11h50m, 90m, 45s."""
    run: Annotated[configs.Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=configs.Config)


@dataclass(frozen=True)
class Plan:
    """What a config's step needs on machines that are not here: memory, FLOPs, communication, time, scaling.

    TPU slices, compiled for (extra `plan`):  autoretouch plan configs/retouch.py --topology v5e:16x16 --train.batch 2048

    GPUs, by arithmetic:  autoretouch plan configs/retouch.py --topology h100:8
    """

    config: Positional[Path]
    """A Python file that defines `config`; its keys are flags here too."""
    topology: str = "v5e:2x2"
    """KIND:SIDExSIDE for TPUs (v4, v5e, v5p, v6e), KIND:NUMBER for GPUs (a100-80, h100, h200, l4, rtx4090 …)."""
    fit: tyro.conf.FlagCreatePairsOff[bool] = False
    """Search images per device, crop and remat for the fastest that fits."""
    json: Path | None = None
    """Also write the numbers to this file."""
    run: Annotated[configs.Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=configs.Config)


@dataclass(frozen=True)
class Sweep:
    """Search a space of config values: many runs, the worst stopped early. The same command again goes on; so do more workers.

    autoretouch sweep configs/retouch.py --space configs/sweeps/lr.py --trials 20 --workdir runs/sweep
    --data.records records --source VALIDATION_BEFORE --target VALIDATION_AFTER

    At the end: a table, sweep.png, and best.py, a config that train accepts.
    """

    config: Positional[Path]
    """A Python file that defines `config`; its keys are flags here too."""
    space: Path
    """A Python file that defines `space`: keys of the config and Optuna's distributions."""
    workdir: Path
    """Where the trials go; on a disk that all workers share."""
    source: Path
    """Folder of images before retouching to compare trials by; not those trained on."""
    target: Path
    """Folder of images after retouching, paired by name."""
    trials: int = 20
    """How many, over all workers; a grid's are all its combinations."""
    search: Literal["bayes", "random", "grid"] = "bayes"
    """Tree-structured Parzen estimators, random draws, or every combination."""
    metric: Literal["psnr_rgb_u8", "ssim_rgb_u8_gauss11", "edit_psnr", "edit_recovered"] = "psnr_rgb_u8"
    """What is to be as high as possible on these pairs."""
    rungs: int = 3
    """How often a trial is measured, at 1/4, 1/2 and all of its steps for 3; what is below the median is stopped."""
    storage: str | None = None
    """A database for the trials' values (postgresql://…) instead of a journal in the work directory."""
    run: Annotated[configs.Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=configs.Config)


@dataclass(frozen=True)
class Doctor:
    """Check the place: versions, devices, peers, all-reduce, clocks, disk, caches. Run it as `train` is run, on every host."""

    workdir: str | None = None
    """Also check that a run could be written here."""


@dataclass(frozen=True)
class Evaluate:
    """Measure models on pairs, beside doing nothing (the identity row).

    On several hosts: the same command on each of them, see launch/; each measures its share.
    """

    models: Positional[tuple[str, ...]]
    """Runs, or their model/ folders: a row each."""
    source: Path
    """Folder of images before retouching."""
    target: Path
    """Folder of images after retouching, paired by name."""
    json: Path | None = None
    """Also write every number to this file."""
    pictures: Path | None = None
    """Also write source, output, target and amplified difference of each pair to this folder."""
    lpips: Literal["none", "squeeze", "alex", "vgg16"] = "none"
    """Also the perceptual distance LPIPS 0.1 to the target, with this backbone."""
    lpips_weights: str = "download"
    """The backbone's ImageNet weights as torchvision names them (.pth, .npz), or `download`."""
    lpips_heads: str = "download"
    """LPIPS' linear heads (.pth, .npz), or `download`."""


@dataclass(frozen=True)
class Retouch:
    """Retouch photographs of any size. Colour profile, EXIF and format are kept."""

    model: Positional[str]
    """A run, or its model/ folder."""
    photos: Positional[tuple[Path, ...]]
    """Photos, or folders of photos."""
    out: Path
    """Folder for the results, each under its photo's name."""
    strength: float = 1.0
    """0 leaves the photo as it is, 1 applies all of the model's retouch."""


@dataclass(frozen=True)
class Demo:
    """Watch a small model learn to remove blemishes: no data set, no network, no weights needed."""

    minutes: float = 3.0
    """Training time; making data and evaluating come on top."""
    workdir: Path = Path("runs/demo")
    """An ordinary run: evaluate, retouch and train take it."""


@dataclass(frozen=True)
class Models:
    """List the networks: parameters, receptive field, multiply-accumulates at 512² and 1024², source."""


@dataclass(frozen=True)
class Convert:
    """Bring a trained PyTorch pix2pix or pix2pixHD generator along: its state dict becomes a model/ folder."""

    weights: Positional[Path]
    """A .pth state dict (read without executing it) or .npz: pix2pix' U-Net, pix2pixHD's global generator or local enhancer."""
    out: Path
    """The model folder to write; evaluate and retouch take it."""


@dataclass(frozen=True)
class Prepare:
    """Turn pairs into records made for training: lossless, checksummed, a crop costs a crop. The same command again completes.

    From two folders:  autoretouch data prepare BEFORE AFTER --out records

    From a TFDS data set:  autoretouch data prepare --tfds FOLDER --split train --out records

    Then:  autoretouch train configs/retouch.py --data.records records --workdir runs/a
    """

    pairs: Positional[tuple[Path, ...]] = ()
    """Folder before retouching, folder after retouching; none with --tfds."""
    out: Path = tyro.MISSING
    """Folder for the records."""
    tfds: Path | None = None
    """Take the pairs from this TFDS data set instead."""
    split: str = "train"
    """Its split."""
    workers: int = 0
    """Processes; 0: one for each core."""
    on_bad: Literal["skip", "fail"] = "skip"
    """A pair that cannot be decoded is left out and named (exit status 1), or stops the work."""
    license: str | None = None
    """The data's licence; models trained on the records carry it."""


@dataclass(frozen=True)
class Verify:
    """Read and decode all records; name what is damaged (exit status 1)."""

    records: Positional[Path]
    """A folder that `data prepare` wrote."""


@dataclass(frozen=True)
class Audit:
    """Find what is wrong with pairs before training on them: a page with pictures, a JSON file, exit status 1 if anything.

    autoretouch data audit BEFORE AFTER --html audit.html --json audit.json

    Then:  autoretouch train configs/retouch.py --data.source BEFORE --data.target AFTER --data.audit audit.json …
    """

    source: Positional[Path]
    """Folder of images before retouching."""
    target: Positional[Path]
    """Folder of images after retouching, paired by name."""
    html: Path | None = Path("audit.html")
    """The page."""
    json: Path | None = Path("audit.json")
    """Every pair's weight, reasons and measures; `--data.audit` takes it."""
    labels: tyro.conf.FlagConversionOff[bool] = True
    """Also look for spots left in a target that look like spots removed elsewhere; the longest part."""
    workers: int = 0
    """Processes; 0: one for each core."""


@dataclass(frozen=True)
class Build:
    """Write a TFDS data set (ArrayRecord, no TensorFlow needed), for sharing and for `--data.tfds`.

    FFHQ and FFHQR in the official split:  autoretouch data build ffhqr FFHQ FFHQR --md5 ffhq-dataset-v2.json --out data

    Your own two folders:  autoretouch data build retouch_pairs BEFORE AFTER --out data --license "all rights reserved"
    """

    kind: Positional[Literal["ffhqr", "retouch_pairs"]]
    """Which builder."""
    source: Positional[Path]
    """Images before retouching: a folder or an uncompressed tar file."""
    target: Positional[Path]
    """Images after retouching."""
    out: Path
    """TFDS' data_dir: the data set goes to OUT/KIND/1.0.0."""
    md5: Path | None = None
    """FFHQ's ffhq-dataset-v2.json, to check every source before anything is written."""
    validation: float = 0.1
    """Share of `retouch_pairs` in the split `validation`, chosen by name; `ffhqr` has its own."""
    test: float = 0.1
    """Share in the split `test`."""
    license: str | None = None
    """The licence of `retouch_pairs`; models trained on it carry it."""


@dataclass(frozen=True)
class BenchData:
    """Pairs per second of records against the usual way: decode two PNGs with Pillow and cut. One core, one run, one table.

    autoretouch bench data  draws faces of 1024²; --source and --target take your own pairs.
    """

    source: Path | None = None
    """Folder of PNGs before retouching; drawn faces where none is given."""
    target: Path | None = None
    """Folder of PNGs after retouching."""
    pairs: int = 16
    """How many pairs at most."""
    seconds: float = 3.0
    """Time for each line of the table, on each side."""
    json: Path | None = None
    """Also write the numbers to this file."""
