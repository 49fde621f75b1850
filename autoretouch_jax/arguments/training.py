"""The arguments of the verbs that train, plan training, watch it and measure its speed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional

from autoretouch_jax.config import Config
from autoretouch_jax.config.schema import PairMetric

# With an empty name the config's flags are `--train.steps` and not `--run.train.steps`.
ConfigFlags = Annotated[Config, tyro.conf.arg(name=""), FlagConversionOff]


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
    """Search for the combination of images per device, crop and remat that fits and is the fastest by this plan."""
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
class DemoArguments:
    """Watch a small model learn to remove blemishes. It needs no data set, no weights and no internet connection."""

    minutes: float = 3.0
    """Training time. Making the data and evaluating take a little longer."""
    workdir: Path = Path("runs/demo")
    """Folder of the run. evaluate, retouch and train accept it like any other run."""


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
class BenchStepArguments:
    """Measure the training step of a config on this machine: time, images a second, share of the machine's ceiling, memory.

    autoretouch bench step configs/retouch.py --train.batch 8 --train.precision bfloat16

    It needs no data: the images are noise. The figures are printed as one JSON line. The ceiling is a product of two large
    matrices, measured in the same run.
    """

    config: Positional[Path]
    """A Python file that defines `config`. Its keys are flags here too."""
    steps: int = 20
    """Number of steps that are measured, after a warm-up."""
    profile: Path | None = None
    """Also write a trace of a few steps to this folder, for XProf or Perfetto, and print the ten dearest operations."""
    json: Path | None = None
    """Also append the line to this file."""
    run: ConfigFlags = field(default_factory=Config)


@dataclass(frozen=True)
class BenchInferArguments:
    """Measure a config's generator on this machine, on square images of several sizes, with random weights.

    autoretouch bench infer configs/retouch.py --sizes 512 1024

    The figures are printed as one JSON line for each size. They are of float32, as in `retouch`, unless --train.precision is
    given.
    """

    config: Positional[Path]
    """A Python file that defines `config`. Its keys are flags here too."""
    sizes: tuple[int, ...] = (256, 512, 1024)
    """Sides of the images in pixels."""
    steps: int = 10
    """Number of images of each size that are measured, after a warm-up."""
    profile: Path | None = None
    """Also write a trace of a few images of the largest size to this folder, and print the ten dearest operations."""
    json: Path | None = None
    """Also append the lines to this file."""
    run: ConfigFlags = field(default_factory=Config)


@dataclass(frozen=True)
class BenchE2eArguments:
    """Measure training from your own data on this machine: images a second, and the share of the time spent waiting for data.

    autoretouch bench e2e configs/retouch.py --data.records records

    It trains from the first step and keeps nothing.
    """

    config: Positional[Path]
    """A Python file that defines `config`. Its keys are flags here too."""
    steps: int = 50
    """Number of steps that are measured, after a warm-up."""
    json: Path | None = None
    """Also append the line to this file."""
    run: ConfigFlags = field(default_factory=Config)
