"""The configuration of a run: frozen dataclasses, filled by a Python file under `configs/` and the command line.

Every key is `group.name`, on the command line `--group.name VALUE` (hyphens and underscores both work).
Images are float32 in [-1, 1] inside the networks; sizes are pixels; periods are optimizer steps.
Where the AutoRetouch paper does not state a value in a source we could read, the comment says that the default is ours.
"""

import dataclasses
import difflib
import json
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoretouch_jax import files
from autoretouch_jax.architecture import AutoRetouch, Discriminator, Generator, SeedPatchGAN
from autoretouch_jax.errors import Refused

REPOSITORY_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
INSTALLED_CONFIGS = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class LossConfig:
    """What the generator is trained on. A term with weight 0 is not computed at all."""

    pixel: Literal["mse", "l1"] = "mse"
    pixel_weight: float = 100.0
    edit_weight: float = 1.0
    """How many times a pixel of the edit counts in the pixel loss at the start (1: as any other)."""
    edit_weight_steps: int = 0
    """Steps over which the edit's weight falls to 1: first the network learns to find, then to leave alone. 0: it stays."""
    adversarial: Literal["bce", "lsgan", "hinge"] = "bce"
    adversarial_weight: float = 1.0
    adversarial_ramp: int = 0
    """Steps over which the adversarial weight rises from 0; 0 gives it in full from the start."""
    feature_matching_weight: float = 0.0
    """Mean absolute difference of the discriminator's features for fake and target (pix2pixHD); needs `network="patchgan"`."""
    mask_weight: float = 0.0
    """Binary cross-entropy of the predicted edit mask; for `network="retouch"`."""
    perceptual_weight: float = 1.0
    perceptual_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3")
    """VGG activations compared."""
    perceptual_downsample: int = 1
    """Average the images over squares of this side before the VGG: 2 costs a quarter and looks for larger spots."""
    perceptual_layer_weights: tuple[float, ...] = ()
    """A weight for each of them; none given: their mean."""
    perceptual_scale: Literal["rms", "none"] = "rms"
    """`rms` divides by the target's RMS activation, so that weights do not depend on layer or file; `none` is the published."""
    vgg_input: Literal["imagenet", "raw"] = "imagenet"
    """`imagenet` normalises as the weights were trained; `raw` feeds [-1, 1] as pix2pixHD's published code does."""
    vgg: Literal["vgg16", "vgg19"] = "vgg16"
    vgg_weights: str = "download"
    """A file (.pth, .npz, .h5), `download` (torchvision's, checked and cached), or `random` (for tests; it learns little)."""


@dataclass(frozen=True)
class BlemishConfig:
    """Procedural blemishes for a folder of clean faces. Sizes are pixels of the training crop."""

    per_megapixel: tuple[float, float] = (1500.0, 8000.0)
    """Blemishes per million pixels, drawn log-uniformly for each crop."""
    radius: tuple[float, float] = (1.0, 10.0)
    """Log-uniform; large radii are rarer."""
    strength: tuple[float, float] = (0.2, 0.9)
    """How far a blemish moves the skin towards its own colour."""
    clean_share: float = 0.1
    """Share of crops left without any blemish, so that the network learns to leave skin alone."""


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from: `root` (clean faces), `source` and `target` (paired by relative stem), `records`, or `tfds`."""

    root: str | None = None
    source: str | None = None
    target: str | None = None
    records: str | None = None
    """A folder that `autoretouch data prepare` wrote: the fastest to train from. In gs:// or s3:// each shard is copied to the
    cache when first needed."""
    tfds: str | None = None
    """A TFDS data set's folder that holds `source` and `target`, such as `autoretouch data build` writes."""
    split: str = "train"
    """Of the TFDS data set."""
    audit: str | None = None
    """What `autoretouch data audit --json` wrote: each pair counts with its weight, those of weight 0 are left out."""
    on_bad: Literal["skip", "fail"] = "skip"
    """An example that cannot be read is replaced, up to one in a thousand of them (one at least), or stops the run."""
    crop: int = 256
    """Side of the square training crop, in pixels, even."""
    resize: int = 0
    """Resize every photo to this square side before the crop, as pix2pix does (286); 0 crops from full resolution."""
    edit_crops: float = 0.0
    """For pairs: share of the crops that are placed around an edit; about a third of random crops hold none at all. Each crop
    is weighted in the losses so that their means stay what they are over crops placed anywhere."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Random resize factor of a photo before the crop; a photo is never made smaller than the crop."""
    flip: bool = True
    colour: float = 0.0
    """Random gamma and gain of each channel within about ± this share, the same for both images."""
    extra_blemishes: float = 0.0
    """For pairs: share of the crops whose source gets fresh blemishes on top."""
    blemish: BlemishConfig = field(default_factory=BlemishConfig)


@dataclass(frozen=True)
class OptimConfig:
    """Adam for both networks, or Muon for the generator: linear warm-up, constant, then a linear decay to zero at the end."""

    generator_optimizer: Literal["adam", "muon"] = "adam"
    """`muon` learns in fewer steps, each a little dearer; the published recipes use Adam."""
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    warmup_steps: int = 0
    decay_share: float = 0.5
    """Share of `train.steps`, at the end, over which the learning rate falls to zero."""
    clip_norm: float = 0.0
    """Clip each network's gradient to this norm; 0 does not clip."""
    global_frozen_steps: int = 0
    """For pix2pixHD's local enhancer: steps during which its global generator does not move."""
    ema: float = 0.999
    """Decay of the generator's moving average per step, warmed up; 0 keeps no average."""


@dataclass(frozen=True)
class TrainConfig:
    """The run itself."""

    steps: int = 100_000
    """0: as many as `epochs` passes over the data make."""
    epochs: int = 0
    """Passes over the data; counts only where `steps` is 0."""
    start_from: str | None = None
    """A run or model/ folder whose weights the generator starts with: to fine-tune, or, for pix2pixHD's local enhancer, a
    trained global generator."""
    batch: int = 8
    """Images per step over all devices."""
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters, losses and statistics stay float32."""
    batch_norm: Literal["per_device", "global"] = "per_device"
    """Over which images BatchNorm takes its statistics: `per_device` (no communication; how many images a device holds is
    felt) or `global` (two small all-reduces a layer; the same numbers however the batch is spread). Without BatchNorm: no
    difference."""
    checkpoint_every: int = 1000
    log_every: int = 50
    sample_every: int = 1000


@dataclass(frozen=True)
class ParallelConfig:
    """How the step is spread and fed. The order of the data does not depend on it, so all of it may change on resume.

    (With BatchNorm and `train.batch_norm="per_device"` the number of devices, and `accumulate`, are felt.)
    """

    mode: Literal["jit", "pmap"] = "jit"
    """`jit` over a mesh, or `pmap`: the same step, the same numbers, the same checkpoints."""
    devices: int = 0
    """Devices to use; 0 means all. With several processes always all."""
    accumulate: int = 1
    """Parts into which a device's share of the batch is cut; they are computed one after another and their gradients averaged:
    memory of a part, result of the whole. The generator runs forward twice, which costs about a fifth more."""
    remat: Literal["none", "norms", "full"] = "none"
    """What the generator's blocks compute again on the way back instead of keeping it: nothing; norms and activations; or
    everything (`full`: the least memory, up to a third more computing)."""
    optimizer_state: Literal["replicated", "sharded"] = "replicated"
    """`sharded`: each device keeps its part of Adam's moments, for the price of an all-gather; needs `mode="jit"` and Adam."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Whether this is one of several processes: `auto` looks for Slurm, Open MPI, a TPU pod's TPU_WORKER_HOSTNAMES, or the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; `on` lets JAX find out (Cloud TPU VMs)."""
    coordinator: str | None = None
    """Explicitly: ADDRESS:PORT of process 0, the same for all; needs `processes` and `process` too."""
    processes: int = 0
    """Explicitly: how many processes."""
    process: int = 0
    """Explicitly: which of them this is, from 0."""
    timeout: int = 300
    """Seconds after which a process that is not heard of is called missing, and the others stop."""
    input_threads: int = 2
    """Threads that decode and augment."""
    prefetch: int = 16
    """Examples made ahead per thread."""


@dataclass(frozen=True)
class Config:
    """One run."""

    generator: Generator = field(default_factory=AutoRetouch)
    discriminator: Discriminator = field(default_factory=SeedPatchGAN)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


DATA_FORMS = (("root",), ("source", "target"), ("records",), ("tfds",))
MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.checkpoint_every",
    "train.log_every",
    "train.sample_every",
    "parallel.",
    "data.on_bad",
)


def find(path: str | Path) -> Path:
    """The config file: as given, or by name among the configs that come with the package."""
    path = Path(path)
    for candidate in (path, REPOSITORY_CONFIGS / path.name, INSTALLED_CONFIGS / path.name):
        if candidate.is_file():
            return candidate
    known = sorted(p.name for folder in (REPOSITORY_CONFIGS, INSTALLED_CONFIGS) for p in folder.glob("*.py"))
    raise Refused(f"config {path}: no such file; the configs that come with the package are {', '.join(known)}")


def load(path: str | Path) -> Config:
    """Run the config file and return its `config`. Raises Refused with the file's name when that is not a Config."""
    path = find(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        hint = nearest(unknown[1], [part for key in flatten(Config()) for part in key.split(".")]) if unknown else ""
        raise Refused(f"config {path}: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(config, Config):
        raise Refused(f"config {path}: must define `config = Config(...)` from autoretouch_jax.config")
    return config


def choose_data(config: Config, argv: Sequence[str]) -> Config:
    """Drop the config's form of data where the command line names the other one, so that the command line's replaces it."""
    named = {arg.split("=")[0].removeprefix("--data.") for arg in argv if arg.startswith("--data.")}
    if chosen := [form for form in DATA_FORMS if named & set(form)]:
        dropped: dict[str, Any] = {key: None for form in DATA_FORMS if form not in chosen for key in form}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **dropped))
    return config


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean …?` for the known word closest to this one, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"group.name": value}` for every leaf of a config."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = list(value) if isinstance(value, tuple) else value
    return flat


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The config with some of its keys, `group.name`, set to other values."""
    for key, value in values.items():
        *groups, name = key.split(".")
        config = _with_value(config, groups, name, value)
    return config


def _with_value(config: Any, groups: list[str], name: str, value: Any) -> Any:
    if groups:
        name, value = groups[0], _with_value(getattr(config, groups[0]), groups[1:], name, value)
    return dataclasses.replace(config, **{name: value})


def resolve(config: Config) -> Config:
    """Make every path absolute, so that the same run can be resumed from any folder."""

    places: dict[str, Any] = {
        key: getattr(config.data, key) for key in ("root", "source", "target", "records", "tfds", "audit")
    }
    places = {key: place and files.absolute(place) for key, place in places.items()}
    data = dataclasses.replace(config.data, **places)
    loss, train = config.loss, config.train
    if loss.vgg_weights not in ("download", "random"):
        loss = dataclasses.replace(loss, vgg_weights=files.absolute(loss.vgg_weights))
    train = dataclasses.replace(train, start_from=train.start_from and files.absolute(train.start_from))
    return dataclasses.replace(config, data=data, loss=loss, train=train)


def write_json(config: Config, path: Path) -> None:
    """Write the resolved config, readable and complete."""
    files.write(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def refuse_other_run(config: Config, path: Path) -> None:
    """Refuse when the config.json at `path` differs from `config` in a key that may not change on resume."""
    try:
        before = _flatten_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise Refused(f"{path} is not readable JSON ({error}); choose another --workdir") from error
    now = _flatten_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    changed = [
        f"{key} ({before.get(key, 'absent')} there, {now.get(key, 'absent')} here)"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, dataclasses.MISSING) != now.get(key, dataclasses.MISSING)
        and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise Refused(
            f"--workdir {path.parent} holds a run of another config: {', '.join(changed)}; "
            "choose another --workdir, or give the values it was started with"
        )


def _flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
