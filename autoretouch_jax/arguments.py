"""The arguments of each verb of the command line. The docstrings are its `--help`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional

from autoretouch_jax.config import Config
from autoretouch_jax.config.schema import Faces, PairMetric

# With an empty name the config's flags are `--train.steps` and not `--run.train.steps`.
ConfigFlags = Annotated[Config, tyro.conf.arg(name=""), FlagConversionOff]


# The first line of a docstring is the verb's line in `autoretouch --help`; the whole docstring begins the verb's own help.
@dataclass(frozen=True)
class TrainArguments:
    """Train a retoucher. The same command again resumes.

    Clean faces, with blemishes drawn while training:  autoretouch train configs/portraits.py --data.root FACES --workdir runs/a

    Before/after pairs:  autoretouch train configs/retouch.py --data.source BEFORE --data.target AFTER --workdir runs/b

    On several hosts, give the same command on each of them: see launch/.
    """

    config: Positional[Path]
    """A Python file that defines `config`. Name it to see its values in this help."""
    # A text and not a Path, which would turn gs:// into gs:/.
    workdir: str
    """Where config.json, metrics.jsonl, checkpoints/, samples/ and model/ go: a folder, gs://BUCKET/PATH or s3://BUCKET/PATH."""
    max_time: str | None = None
    """Stop after this long, with a checkpoint and status 75: 11h50m, 90m, 45s."""
    run: ConfigFlags = field(default_factory=Config)


@dataclass(frozen=True)
class PlanArguments:
    """Show what a config's step needs on machines that are not here: memory, FLOPs, communication, time, scaling.

    TPU slices, by compiling (extra `plan`):  autoretouch plan configs/retouch.py --topology v5e:16x16 --train.batch 2048

    GPUs, by an estimate:  autoretouch plan configs/retouch.py --topology h100:8
    """

    config: Positional[Path]
    """A Python file that defines `config`. Its keys are flags here too."""
    topology: str = "v5e:2x2"
    """KIND:SIDExSIDE for TPUs (v4, v5e, v5p, v6e), KIND:NUMBER for GPUs (a100-80, h100, h200, l4, rtx4090 …)."""
    fit: FlagCreatePairsOff[bool] = False
    """Search for the fastest combination of images per device, crop and remat that fits."""
    json: Path | None = None
    """Also write the numbers to this file."""
    run: ConfigFlags = field(default_factory=Config)


@dataclass(frozen=True)
class SweepArguments:
    """Search a space of config values with many runs, and stop the worst early. The same command resumes, or adds a worker.

    autoretouch sweep configs/retouch.py --space configs/sweeps/lr.py --trials 20 --workdir runs/sweep
    --data.records records --source VALIDATION_BEFORE --target VALIDATION_AFTER

    At the end it prints a table and writes trials.csv, sweep.png, and best.py, a config that train accepts.
    """

    config: Positional[Path]
    """A Python file that defines `config`. Its keys are flags here too."""
    space: Path
    """A Python file that defines `space`: keys of the config and Optuna's distributions."""
    workdir: Path
    """Where the trials go, on a disk that all workers share."""
    source: Path
    """Folder of images before retouching, on which the trials are compared. They must not be those trained on."""
    target: Path
    """Folder of images after retouching, paired by name."""
    trials: int = 20
    """Number of trials over all workers. A grid search ignores it and tries every combination."""
    search: Literal["bayes", "random", "grid"] = "bayes"
    """Tree-structured Parzen estimators, random draws, or every combination."""
    metric: PairMetric = "psnr_pooled"
    """The metric to maximise on these pairs; higher is better. `psnr_pooled`: PSNR of all pixels of all images, which every
    damage lowers; `psnr_rgb_u8`, `ssim_rgb_u8_gauss11`: means over images; `edit_…`: inside the edit, blind to damage
    outside."""
    rungs: int = 3
    """How often a trial is measured: 3 means at 1/4, 1/2 and all of its steps. A trial below the median is stopped."""
    storage: str | None = None
    """A database for the trials' values (postgresql://…) instead of a journal in the work directory."""
    run: ConfigFlags = field(default_factory=Config)


@dataclass(frozen=True)
class DoctorArguments:
    """Check the machine: versions, devices, processes, all-reduce, clocks, disk, caches. Start it as you start `train`."""

    workdir: str | None = None
    """Also check that a run could be written here."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure models on pairs, beside doing nothing (the identity row), and on photographs that should not change.

    autoretouch evaluate pretrained runs/a --source BEFORE --target AFTER --leave-alone PHOTOS

    On several hosts, give the same command on each of them; each measures its share. See launch/.
    """

    # Texts and not Paths: they may be in gs:// or s3://.
    models: Positional[tuple[str, ...]]
    """Runs, or their model/ folders, or `pretrained`, the model in the box: a row each."""
    source: Path | None = None
    """Folder of images before retouching."""
    target: Path | None = None
    """Folder of images after retouching, paired by name."""
    leave_alone: Path | None = None
    """Folder of photographs in which nothing is to be retouched. Every change of a model there is harm."""
    edit_threshold: float | None = None
    """Levels of 255 from which a change counts as an edit, as --data.edit-threshold. Left out, it is measured for each pair."""
    faces: Faces = "auto"
    """`auto` edits the faces, at the size that the model was trained at. `off` edits the whole image as it is. `all` as in
    `retouch`."""
    json: Path | None = None
    """Also write every number to this file."""
    csv: Path | None = None
    """Also write the metrics of every image to this file, a row for the identity and one for each model."""
    pictures: Path | None = None
    """Also write source, output, target and amplified difference of each pair to this folder."""
    lpips: Literal["none", "squeeze", "alex", "vgg16"] = "none"
    """Also measure the perceptual distance LPIPS 0.1 to the target, with this backbone."""
    lpips_weights: str = "download"
    """The backbone's ImageNet weights as torchvision names them (.pth, .npz), or `download`."""
    lpips_heads: str = "download"
    """LPIPS' linear heads (.pth, .npz), or `download`."""


@dataclass(frozen=True)
class CompareArguments:
    """Compare runs: how far each one is, its best validation, its speed, its verdict, and the config keys that differ.

    autoretouch compare runs/a runs/b --html compare.html
    """

    # Texts and not Paths: they may be in gs:// or s3://.
    runs: Positional[tuple[str, ...]]
    """The --workdir of a training each: a row each."""
    html: Path | None = None
    """Also write a page with the curves of the runs over one another."""


@dataclass(frozen=True)
class RetouchArguments:
    """Retouch the faces in photographs of any size. Colour profile, EXIF and format are kept.

    With the model in the box:  autoretouch retouch PHOTO.jpg --out retouched

    With your own:  autoretouch retouch PHOTOS --out retouched --model runs/a
    """

    photos: Positional[tuple[Path, ...]]
    """Photos, or folders of photos."""
    out: Path
    """Folder for the results, each under its photo's name."""
    # A text and not a Path: it may be in gs:// or s3://.
    model: str = "pretrained"
    """A run, its model/ folder, or `pretrained`, the model in the box."""
    strength: float = 1.0
    """0 leaves the photo as it is, 1 applies all of the model's retouch."""
    faces: Faces = "auto"
    """`auto` finds the faces and retouches them and the skin around; without a face the photo stays as it is. `all` includes
    faces of which the detector is less sure. `off` retouches the whole photo as it is, and so does any model that was trained
    without faces."""
    face_size: float | None = None
    """Bring faces to this size, from brows to chin in pixels, instead of the one that the model was trained at."""


@dataclass(frozen=True)
class DemoArguments:
    """Watch a small model learn to remove blemishes. It needs no data set, no weights and no internet connection."""

    minutes: float = 3.0
    """Training time. Making the data and evaluating take a little longer."""
    workdir: Path = Path("runs/demo")
    """Folder of the run. evaluate, retouch and train accept it like any other run."""


@dataclass(frozen=True)
class ModelsArguments:
    """List the networks: parameters, receptive field, multiply-accumulates at 512² and 1024², source."""


@dataclass(frozen=True)
class ConvertArguments:
    """Convert a trained PyTorch generator of pix2pix or pix2pixHD: its state dict becomes a model/ folder."""

    weights: Positional[Path]
    """A .pth state dict (read without executing it) or .npz: pix2pix' U-Net, pix2pixHD's global generator or local enhancer."""
    out: Path
    """The model folder to write. evaluate and retouch take it."""
    test_mode: Literal["eval", "train"] = "eval"
    """For pix2pix: how the model retouches. `eval` uses the moving averages and no dropout, as the authors' code does with
    --eval. `train` uses the photograph's own statistics and dropout, as it does by default. model.json states it."""


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


# In the order in which `autoretouch --help` lists them: first what a newcomer needs.
ARGUMENTS: dict[str, Any] = {
    "demo": DemoArguments,
    "train": TrainArguments,
    "plan": PlanArguments,
    "sweep": SweepArguments,
    "doctor": DoctorArguments,
    "evaluate": EvaluateArguments,
    "compare": CompareArguments,
    "retouch": RetouchArguments,
    "models": ModelsArguments,
    "convert": ConvertArguments,
    "data prepare": PrepareArguments,
    "data audit": AuditArguments,
    "data build": BuildArguments,
    "data verify": VerifyArguments,
    "bench data": BenchDataArguments,
}


def switches(verb: str) -> list[str]:
    """Returns the flags of a verb that take no value."""
    fields = dataclasses.fields(ARGUMENTS[verb])
    return [f"--{field.name}" for field in fields if field.type == FlagCreatePairsOff[bool]]


def with_defaults(verb: str, config: Config) -> Any:
    """Returns a verb's arguments with a config's values as defaults. What the user must give is marked as missing."""
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(ARGUMENTS[verb])
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    # CONFIG is looked for beforehand; a placeholder lets `--help` and refusals of other flags work without it.
    return ARGUMENTS[verb](**required | {"config": Path("CONFIG.py"), "run": config})
