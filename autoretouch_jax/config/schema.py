"""The configuration of a run: frozen dataclasses, filled by a Python file under `configs/` and the command line.

Every key is `group.name`, on the command line `--group.name VALUE`; hyphens and underscores both work.
Images are float32 in [-1, 1] inside the networks. Sizes are pixels. Periods are optimizer steps.
The text below a key is its `--help`. Where no source that we could read states the AutoRetouch paper's value, the default is
ours.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from autoretouch_jax.config.networks import AutoRetouch, AutoRetouchPatchGAN, Discriminator, Generator

# Where a model edits a photograph. `auto`: the faces that the detector is sure of, or the whole photograph if the model was
# trained without faces. `all`: also those of which the detector is less sure. `off`: the whole photograph as it is.
Faces = Literal["auto", "all", "off"]
# What a retouched file keeps of the photograph's metadata. `safe` drops the location and embedded previews.
Metadata = Literal["keep", "safe", "none"]
# What a step computes in.
Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = get_args(Precision)
# What a model can be chosen by, on pairs. Each is over images that the pairs determine, and better when higher.
PairMetric = Literal["psnr_pooled", "edit_psnr_pooled", "psnr_rgb_u8", "edit_psnr", "edit_recovered", "ssim_rgb_u8_gauss11"]


@dataclass(frozen=True)
class LossConfig:
    """The terms of the generator's loss. A term whose weight is 0 is not computed."""

    # The defaults are those of configs/autoretouch.py. Its weights are ours: the paper states none that we could read.
    pixel: Literal["mse", "l1", "charbonnier"] = "mse"
    """`mse` is the paper's, `l1` pix2pix'. `charbonnier` is l1 with a smooth minimum, below half a level of 8 bits."""
    pixel_weight: float = 100.0
    """Weight of the pixel loss."""
    edit_weight: float = 1.0
    """Weight of an edited pixel in the pixel loss at the start of training; 1 weights it like any other."""
    edit_weight_steps: int = 0
    """Steps over which that weight falls to 1: the network first learns to edit, then to leave the rest alone. 0 keeps it."""
    left_share: float = 0.0
    """Share of the blemishes that the retouchers are expected to have left in the targets. The mask loss allows for it, and the
    pixel loss leaves out unedited pixels as far as they are such blemishes. It needs a network that predicts a mask."""
    # The paper's, after Goodfellow et al. 2014. pix2pixHD uses lsgan.
    adversarial: Literal["bce", "lsgan", "hinge"] = "bce"
    """Form of the adversarial loss."""
    adversarial_weight: float = 1.0
    """Weight of the adversarial loss. At 0 there is no discriminator."""
    adversarial_ramp: int = 0
    """Steps over which the adversarial weight rises from 0. 0 gives it in full from the start."""
    r1_weight: float = 0.0
    """Weight of the penalty R1 on the discriminator's gradient at the target. It keeps a strong discriminator useful."""
    # StyleGAN2's period: a sixteenth of the cost, and no measurable loss (Karras et al. 2020, section 3.1).
    r1_every: int = 16
    """Compute that penalty on every so many-th step, so many times as strong."""
    feature_matching_weight: float = 0.0
    """Weight of the mean absolute difference between the discriminator's features for fake and target (pix2pixHD). It needs a
    PatchGAN."""
    mask_weight: float = 0.0
    """Weight of the predicted mask's binary cross-entropy. It needs a network that predicts a mask, such as `retouch`."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss. At 0 no VGG is loaded."""
    # One activation for each of the first three blocks; which ones the paper used, we do not know.
    perceptual_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3")
    """VGG activations that are compared."""
    perceptual_downsample: int = 1
    """Average the images over squares of this side before the VGG: 2 needs a quarter of the time and compares larger spots."""
    perceptual_layer_weights: tuple[float, ...] = ()
    """A weight for each layer. Where none are given, the layers are averaged."""
    perceptual_scale: Literal["rms", "none"] = "rms"
    """`rms` divides by the RMS of the target's activation, so that weights do not depend on layer or file. `none` is the
    published form."""
    vgg_input: Literal["imagenet", "raw"] = "imagenet"
    """`imagenet` normalises as the weights were trained. `raw` feeds [-1, 1], as pix2pixHD's published code does."""
    vgg: Literal["vgg16", "vgg19"] = "vgg16"
    """Which VGG the perceptual loss uses."""
    vgg_weights: str = "download"
    """A file (.pth, .npz, .h5), `download` (torchvision's, checked and cached), or `random` (for tests; it teaches little)."""


@dataclass(frozen=True)
class BlemishConfig:
    """Procedural blemishes for a folder of clean faces. Sizes are pixels of the training crop."""

    # The ranges are ours and broad, because no range of real skin has been measured.
    per_megapixel: tuple[float, float] = (1500.0, 8000.0)
    """Blemishes per million pixels, drawn log-uniformly for each crop."""
    radius: tuple[float, float] = (1.0, 10.0)
    """Range of radii, log-scaled. Large radii are rarer."""
    strength: tuple[float, float] = (0.2, 0.9)
    """How far a blemish moves the skin towards its own colour: 0 not at all, 1 all the way. Faint ones are more common."""
    patch: tuple[float, float] = (6.0, 40.0)
    """Range of radii of large, faint patches."""
    hollows: float = 0.4
    """Share of the crops below an eye that get a shadow there. It needs `data.root` and a face that can be found."""
    pigments: float = 0.0
    """Share of the crops whose blemishes are few, and of the colours of blood, melanin and veins; those of the others have any
    colour. There `strength` is an optical depth, less for marks, patches and shadows; moles have their own. The number is of
    the lower half of `per_megapixel`. The radii of patches lie between 0.35 and 1.25 times the upper bound of `patch`. It needs
    `data.root` and a face that can be found."""
    clean_share: float = 0.1
    """Share of the crops that get no blemish, so that the network learns to leave skin alone."""


@dataclass(frozen=True)
class ValidationConfig:
    """Images that are measured while training, beside doing nothing. All may change on resume.

    They are pairs, or clean faces (`root`) that get fixed blemishes, and photographs in which nothing may change (`alone`).
    None of them may be among the training data.
    """

    root: str | None = None
    """A folder of clean faces of other people. Each gets blemishes once, the same in every validation."""
    source: str | None = None
    """A folder of images before retouching."""
    target: str | None = None
    """A folder of images after retouching, with the same names."""
    records: str | None = None
    """A folder that `autoretouch data prepare` wrote."""
    tfds: str | None = None
    """The folder of a TFDS data set that holds `source` and `target`."""
    split: str = "validation"
    """The split of it that is measured."""
    alone: str | None = None
    """A folder of photographs in which nothing may change. It may be given alone or beside one of the others."""
    every: int = 1000
    """Steps between two validations. The last step is always validated."""
    images: int = 16
    """Images of each kind that are measured, at most: evenly spaced over the folder."""
    metric: Literal[PairMetric, "alone_identical"] = "psnr_pooled"
    """What decides which validation is the best one; higher is better. `model-best/` holds its model. `psnr_pooled`: PSNR of
    all pixels of all images, which every damage lowers; `psnr_rgb_u8`, `ssim_rgb_u8_gauss11`: means over images; `edit_…`:
    inside the edit, blind to damage outside; `alone_identical`: share of unchanged pixels in the photographs of `alone`."""
    patience: int = 0
    """Validations in a row without a better one after which the run ends early. 0 trains to the end."""


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from: `root` (clean faces), `source` and `target` (paired by name), `records`, or `tfds`."""

    # Exactly one of the following forms is given: see DATA_FORMS below.
    root: str | None = None
    """A folder of clean faces. Blemishes are drawn on them while training."""
    source: str | None = None
    """A folder of images before retouching."""
    target: str | None = None
    """A folder of images after retouching, with the same names."""
    records: str | None = None
    """A folder that `autoretouch data prepare` wrote: the fastest to train from. In gs:// or s3:// each shard is copied to the
    cache when it is first needed. $AUTORETOUCH_CACHE_GB limits the cache."""
    tfds: str | None = None
    """The folder of a TFDS data set that holds `source` and `target`, such as `autoretouch data build` writes."""
    split: str = "train"
    """Split of the TFDS data set."""
    audit: str | None = None
    """The JSON file that `autoretouch data audit` wrote. It gives each pair a weight. Pairs of weight 0 and files without a
    partner are left out and not opened."""
    edit_threshold: float | None = None
    """For pairs: levels of 255 from which a change counts as an edit. Where nothing was edited, the target gets the source's
    pixels. Left out, it is measured for each pair: any change without losses, for a JPEG more than saving again changes."""
    on_bad: Literal["skip", "fail"] = "skip"
    """`skip` replaces unreadable examples, up to one in a thousand (at least one); more end the run. `fail` allows none."""
    on_change: Literal["refuse", "accept"] = "refuse"
    """What to do when the data, the negatives or the audit's weights have changed since the run's last start: `refuse` to go on
    and name the changes, or `accept` them."""
    # Ours: the paper trains on FFHQ's 1024² and states no crop.
    crop: int = 256
    """Side of the square training crop, in pixels: a multiple of 16, at least 32."""
    resize: int = 0
    """Resize every photo to this square side before the crop, as pix2pix does (286). 0 crops from full resolution."""
    # 0 draws crops anywhere, as the published recipes do.
    edit_crops: float = 0.0
    """For pairs: share of the crops that are placed around an edit. About a third of random crops contain none. Each crop has
    a weight in the losses, so that their expected means are those over crops placed anywhere."""
    edit_crops_limit: float = 0.0
    """Clip these weights to [1 / limit, limit]: the losses then count small edits on large photographs more than crops placed
    anywhere would, the gradient varies less, and more changes outside the edit. 0 does not clip."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the random resize factor of a photo before the crop. A photo is never made smaller than the crop."""
    face_size: int = 0
    """For folders: bring the largest face of each photo to this size before the zoom, from brows to chin in pixels. 0 takes
    photos as they are. `model.json` states the size, and `retouch` brings faces to it."""
    on_skin: float = 0.75
    """For clean faces: share of the crops that are placed on skin. The others lie anywhere: on hair, cloth, background."""
    negatives: str | None = None
    """A folder of photographs in which nothing is to be retouched, of anything: cloth, flowers, houses, people far away."""
    negative_share: float = 0.25
    """Share of the crops in which nothing is to be retouched: from `negatives`, and drawn patterns. Without `negatives` it
    acts only where blemishes are synthetic, because pairs show by themselves what to leave alone."""
    degrade: float = 0.0
    """Share of the crops that are blurred, sharpened, made noisy or compressed as cameras do, the same for both images."""
    flip: bool = True
    """Mirror half of the crops, chosen at random."""
    colour: float = 0.0
    """Random gamma and gain of each channel, within about ± this share, the same for both images."""
    light: float = 0.0
    """Random light, the same for both images: one side brighter and the other darker, each by up to about this share, and
    random saturation. One crop in 25 is black and white."""
    warp: float = 0.0
    """Random bending, the same for both images: points move by up to about this share of the crop's side, after a turn by up
    to twice this, in radians. So the faces of a few people become many."""
    extra_blemishes: float = 0.0
    """For pairs: share of the crops whose source gets blemishes drawn on top."""
    blemish: BlemishConfig = field(default_factory=BlemishConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass(frozen=True)
class OptimConfig:
    """Adam for both networks, or Muon for the generator. The learning rate warms up, stays constant and falls linearly to 0."""

    generator_optimizer: Literal["adam", "muon"] = "adam"
    """`muon` learns in fewer steps, each slightly more expensive. The published recipes use Adam."""
    # pix2pix' learning rates and beta1 (Isola et al. 2017, section 3.3).
    generator_lr: float = 2e-4
    """Learning rate of the generator after the warm-up."""
    discriminator_lr: float = 2e-4
    """Learning rate of the discriminator after the warm-up."""
    beta1: float = 0.5
    """Adam's decay of the gradient's mean."""
    beta2: float = 0.999
    """Adam's decay of the gradient's square."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises."""
    # pix2pix' schedule: half of the epochs constant, half falling.
    decay_share: float = 0.5
    """Share of `train.steps`, at the end, over which the learning rate falls to zero."""
    clip_norm: float = 0.0
    """Clip each network's gradient to this norm. 0 does not clip."""
    global_frozen_share: float = 0.0
    """For pix2pixHD's local enhancer: share of `train.steps`, at the start, during which its global generator is not trained.
    Then the generator's optimizer begins anew."""
    ema: float = 0.999
    """Decay of the generator's moving average per step, warmed up. 0 keeps none: the model then has the trained weights."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, seed, precision and periods of a run."""

    # The number of steps is ours.
    steps: int = 100_000
    """Optimizer steps. 0: as many as `epochs` passes over the data make."""
    epochs: int = 0
    """Passes over the data. It counts only where `steps` is 0."""
    start_from: str | None = None
    """A run or model/ folder whose weights the generator starts with, or `pretrained`, the model in the box: for fine-tuning.
    For pix2pixHD's local enhancer, a trained global generator. A run's discriminator comes along where it fits."""
    batch: int = 8
    """Images per step over all devices."""
    update_order: Literal["discriminator_first", "generator_first"] = "discriminator_first"
    """`discriminator_first`: the generator learns through the discriminator that this step has updated, as in pix2pix.
    `generator_first`: through the one from before the step, as in pix2pixHD."""
    seed: int = 0
    """Everything random is a function of this and the step."""
    # float32 is what has been compared with the references.
    precision: Precision = "auto"
    """Compute type. Parameters, losses and statistics stay float32. `auto` is bfloat16 where all devices are TPUs, or NVIDIA's
    GPUs from Ampere on, which are made for it, and float32 elsewhere. A run goes on in the type that it had, unless one is
    given."""
    batch_norm: Literal["per_device", "global"] = "per_device"
    """The images over which BatchNorm takes its statistics. `per_device` needs no communication, and results depend on the
    number of images per device. `global` needs two small all-reduces a layer, and results do not depend on the number of
    devices where `parallel.accumulate` is 1. Without BatchNorm there is no difference."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    sample_every: int = 1000
    """Steps between two pictures of samples."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the metrics also go. `wandb` and `mlflow` are extras. None of them can end a run."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens when training goes astray. It all may change on resume.

    An update that is not finite, or far larger than usual, is skipped. After many of them, or when the objective has grown far
    above its own history, the run goes back to its last good checkpoint, leaves out the batches since then, and goes on with a
    lower learning rate. After some such attempts it gives up and says why.
    """

    # The defaults are ours, and far from sound runs: in 26,000 recorded steps of configs/portraits.py and pretrained.py the
    # objective's mean over 50 steps stayed below 1.3 times its history, and the gradient's below 1.5 times.
    enabled: bool = True
    """Whether to guard the run at all. Without it the first value that is not finite ends the run."""
    spike: float = 100.0
    """Skip an update whose gradient's norm is this many times its moving average. 0 skips only what is not finite."""
    patience: int = 10
    """Updates in a row that may be skipped before the run goes back to its last checkpoint."""
    diverged: float = 10.0
    """Go back when the generator's objective is this many times its average over the last thousand steps. 0 never does."""
    rate_factor: float = 0.3
    """Each return to a checkpoint multiplies both learning rates by this."""
    rollbacks: int = 4
    """Returns to a checkpoint before the run gives up."""


@dataclass(frozen=True)
class ParallelConfig:
    """Devices, memory, processes and input of a run. The order of the data does not depend on them: all may change on resume.

    Results depend on `accumulate` with BatchNorm or dropout, and on the number of devices with dropout or per-device BatchNorm.
    """

    mode: Literal["jit", "pmap"] = "jit"
    """`jit` over a mesh, or `pmap`: the same step, the same numbers, the same checkpoints."""
    devices: int = 0
    """Devices to use; 0 means all. Several processes always use all of theirs."""
    # The next three trade computation or communication for memory. Without BatchNorm and dropout the numbers stay the same.
    accumulate: int = 1
    """Microbatches into which a device's share of the batch is cut. They are computed one after another and their gradients
    averaged: the memory of one microbatch and, without BatchNorm, the result of the whole batch. With a discriminator the
    generator runs forward twice, which costs about a fifth more."""
    remat: Literal["none", "norms", "full"] = "none"
    """The results that the generator's blocks recompute in the backward pass instead of storing them: none, norms and
    activations, or all (`full`: the least memory, up to a third more computation)."""
    optimizer_state: Literal["replicated", "sharded"] = "replicated"
    """With `sharded` each device stores its part of Adam's moments, at the cost of an all-gather. It needs `mode="jit"` and
    Adam."""
    # The next keys say how the processes of several hosts find each other.
    distributed: Literal["auto", "on", "off"] = "auto"
    """Whether this is one of several processes. `auto` looks for Slurm, Open MPI, a TPU pod's TPU_WORKER_HOSTNAMES, or the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. `on` lets JAX find out (Cloud TPU VMs)."""
    coordinator: str | None = None
    """ADDRESS:PORT of process 0, the same for all processes. It needs `processes` and `process` too."""
    processes: int = 0
    """How many processes there are, where `coordinator` is given."""
    process: int = 0
    """Number of this process, from 0, where `coordinator` is given."""
    timeout: int = 300
    """Seconds after which a silent process counts as lost and the others stop."""
    # Grain's threads. More threads than cores slow the input down.
    input_threads: int = 0
    """Threads that decode and augment. 0: one for each core, 16 at most."""
    input_processes: int = 0
    """Processes that make batches, where Python's lock holds up threads of one process. 0: none. Each has its share of the
    threads, rounded down, one at least. It takes about 230 MB beside the photographs that it keeps in memory, and its batches
    need room in /dev/shm."""
    prefetch: int = 16
    """Examples that each thread prepares in advance."""


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    # A config file chooses the classes of these two; the command line can change only their fields.
    generator: Generator = field(default_factory=AutoRetouch)
    discriminator: Discriminator = field(default_factory=AutoRetouchPatchGAN)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


# The ways to name the data of a run. Exactly one of them is given, in full.
DATA_FORMS = (("root",), ("source", "target"), ("records",), ("tfds",))
