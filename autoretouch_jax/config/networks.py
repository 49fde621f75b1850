"""Descriptions of the networks: one frozen dataclass for each generator and discriminator.

The field `network` names the class in `config.json` and `model.json`. A config file chooses the class; the command line
changes its fields: `--generator.width 32`. Nothing here computes; the modules are in `models/`.

Every generator's description also says what is needed to apply it to a photograph:

* `grid`: the sides of an image must be multiples of it, in pixels.
* `receptive_radius`: how far, in pixels, an output pixel sees. It is an upper bound and a multiple of `grid`, so that tiles cut
  with it as their halo stay on the grid. None for networks that look at the whole image at once.
* `gate`: the mask probability below which a pixel is left alone; 0 for networks without a mask.
* `gate_off_faces`: the same where the whole photograph is retouched and not its faces, if it is higher.
* `dead_zone`: the largest change, in 8-bit levels, that is not applied.
* `predicts_mask`: whether the network also predicts where to edit.
* `test_mode`: whether it is applied as in evaluation, or as in training, with the photograph's own statistics and dropout.
* `global_generator`: the description of the generator that it contains and can start from, or None.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from autoretouch_jax.errors import Refused


def _round_up(size: int, grid: int) -> int:
    return -(-size // grid) * grid


@dataclass(frozen=True)
class AutoRetouch:
    """The AutoRetouch generator (Shafaei, Little and Schmidt, WACV 2021)."""

    network: Literal["autoretouch"] = "autoretouch"
    width: int = 64
    """Channels of the stem. The residual blocks have twice as many."""
    blocks: int = 15
    """Residual blocks at half resolution."""
    norm: Literal["batch", "none"] = "batch"
    """`batch` is the paper's. `none` behaves the same in training and in inference, and shifts no colours."""
    head: Literal["tanh", "residual"] = "tanh"
    """`tanh` is the paper's. `residual` adds a zero-initialised delta to the input, so that training starts at the identity."""
    dead_zone: int = 0
    """When retouching, pixels that would change by at most this many 8-bit levels in every channel stay as they are."""

    gate: ClassVar[float] = 0.0
    gate_off_faces: ClassVar[float] = 0.0
    predicts_mask: ClassVar[bool] = False
    test_mode: ClassVar[str] = "eval"
    global_generator: ClassVar[None] = None

    @property
    def grid(self) -> int:
        """2: there is one stride-2 convolution."""
        return 2

    @property
    def receptive_radius(self) -> int:
        """Counted along the network, in pixels of the input."""
        stem, head = 3, 1  # 7×7 and 3×3 at full resolution
        down = 1 + 1  # the stride-2 convolution, and one pixel because it is applied at every second pixel
        blocks = 4 * self.blocks  # two 3×3 convolutions at half resolution each
        up = 2 + 1  # a 3×3 convolution at half resolution, and one pixel for the upsampling's grid
        return _round_up(stem + down + blocks + up + head, self.grid)


@dataclass(frozen=True)
class Retouch:
    """Our own generator, without norm layers: it predicts an edit, which it adds to the input, and a mask of where to edit."""

    network: Literal["retouch"] = "retouch"
    width: int = 48
    """Channels at half resolution. Each level below has twice as many, up to `widest` × `width`."""
    widest: int = 4
    """The largest number of channels of any level, as a multiple of `width`."""
    levels: int = 4
    """Number of resolutions: 1/2, 1/4, … of the image."""
    blocks: int = 2
    """Residual blocks per level, in the encoder and again in the decoder."""
    gate: float = 0.65
    """When retouching, pixels whose predicted probability of needing an edit is below this stay bit-identical."""
    gate_off_faces: float = 0.0
    """The gate with `--faces off`, where it is higher than `gate`: most of a whole photograph is not skin."""
    dead_zone: int = 0
    """When retouching, pixels that would change by at most this many 8-bit levels in every channel stay as they are."""

    predicts_mask: ClassVar[bool] = True
    test_mode: ClassVar[str] = "eval"
    global_generator: ClassVar[None] = None

    @property
    def grid(self) -> int:
        """Each level halves the resolution."""
        return int(2**self.levels)

    @property
    def receptive_radius(self) -> int:
        """In pixels of the input. How far a pixel sees depends on its position on the grid; this is the furthest."""
        return _round_up(max(pixel - self._first_seen(pixel) for pixel in range(self.grid)), self.grid)

    def _first_seen(self, pixel: int) -> int:
        """Returns the leftmost pixel of the input that a pixel of the output sees, from the last layer to the first."""
        convolved = 2 * self.blocks  # pixels that the blocks of a level see to each side
        at = pixel // 2 - 1  # the head, 3×3 at half resolution
        skips = []
        for _ in range(self.levels - 1):
            at -= convolved
            skips.append(at)  # where the encoder's features are added
            at //= 2
        at -= convolved
        for skip in reversed(skips):
            at = min(2 * at, skip) - convolved
        return 2 * (at - 1)  # the stem, 3×3 at half resolution


@dataclass(frozen=True)
class Pix2Pix:
    """The U-Net of pix2pix (Isola et al., CVPR 2017)."""

    network: Literal["pix2pix"] = "pix2pix"
    width: int = 64
    """Channels of the outermost level. They double three times."""
    levels: int = 8
    """Stride-2 convolutions: 8 is the U-Net-256, 7 the U-Net-128. Sides of images are padded to multiples of 2^levels."""
    norm: Literal["batch", "none"] = "batch"
    dropout: float = 0.5
    """Rate in training, in the first decoder layers after the innermost one: three in the U-Net-256, as published."""
    test_mode: Literal["eval", "train"] = "eval"
    """How photographs are retouched. `eval`: with moving averages and without dropout, the authors' `--eval`. `train`: with the
    photograph's own statistics and dropout, the authors' default."""

    gate: ClassVar[float] = 0.0
    gate_off_faces: ClassVar[float] = 0.0
    dead_zone: ClassVar[int] = 0
    predicts_mask: ClassVar[bool] = False
    global_generator: ClassVar[None] = None
    receptive_radius: ClassVar[None] = None  # its innermost level sees the whole image

    @property
    def grid(self) -> int:
        """Each level halves the resolution."""
        return int(2**self.levels)


@dataclass(frozen=True)
class Pix2PixHDGlobal:
    """The global generator of pix2pixHD (Wang et al., CVPR 2018)."""

    network: Literal["pix2pixhd_global"] = "pix2pixhd_global"
    width: int = 64
    """Channels of the stem. Each downsampling doubles them."""
    downs: int = 4
    """Stride-2 convolutions."""
    blocks: int = 9
    """Residual blocks at the lowest resolution."""
    norm: Literal["instance", "none"] = "instance"

    gate: ClassVar[float] = 0.0
    gate_off_faces: ClassVar[float] = 0.0
    dead_zone: ClassVar[int] = 0
    predicts_mask: ClassVar[bool] = False
    test_mode: ClassVar[str] = "eval"
    global_generator: ClassVar[None] = None
    receptive_radius: ClassVar[None] = None  # instance norm averages over the whole image

    @property
    def grid(self) -> int:
        """Each downsampling halves the resolution."""
        return int(2**self.downs)


@dataclass(frozen=True)
class Pix2PixHDLocal:
    """The local enhancer of pix2pixHD around a global generator at half resolution (one enhancer, as published)."""

    network: Literal["pix2pixhd_local"] = "pix2pixhd_local"
    width: int = 32
    """Channels of the enhancer's stem. The global generator's stem has twice as many."""
    downs: int = 4
    """Stride-2 convolutions of the global generator."""
    global_blocks: int = 9
    """Residual blocks of the global generator."""
    local_blocks: int = 3
    """Residual blocks of the enhancer."""
    norm: Literal["instance", "none"] = "instance"

    gate: ClassVar[float] = 0.0
    gate_off_faces: ClassVar[float] = 0.0
    dead_zone: ClassVar[int] = 0
    predicts_mask: ClassVar[bool] = False
    test_mode: ClassVar[str] = "eval"
    receptive_radius: ClassVar[None] = None  # instance norm averages over the whole image

    @property
    def grid(self) -> int:
        """The enhancer halves the resolution once more than its global generator."""
        return int(2 ** (self.downs + 1))

    @property
    def global_generator(self) -> Pix2PixHDGlobal:
        """The global generator inside."""
        return Pix2PixHDGlobal(width=2 * self.width, downs=self.downs, blocks=self.global_blocks, norm=self.norm)


@dataclass(frozen=True)
class AutoRetouchPatchGAN:
    """The discriminator of AutoRetouch's reference implementation: four stride-2 convolutions, receptive field of 94 pixels."""

    network: Literal["autoretouch_patchgan"] = "autoretouch_patchgan"
    width: int = 64
    """Channels of the first layer. They double three times."""
    norm: Literal["batch", "none"] = "batch"
    spectral_norm: bool = False
    """Divide each convolution's kernel by its largest singular value, so that the discriminator cannot grow steep."""

    returns_features: ClassVar[bool] = False


@dataclass(frozen=True)
class PatchGAN:
    """The 70×70 PatchGAN of pix2pix. With several scales it is the multi-scale discriminator of pix2pixHD."""

    network: Literal["patchgan"] = "patchgan"
    width: int = 64
    """Channels of the first layer. Each layer doubles them."""
    widest: int = 0
    """The largest number of channels of a layer: 512 in pix2pixHD. 0 is eight times `width`, as in pix2pix."""
    layers: int = 3
    """Stride-2 convolutions: 3 gives the receptive field of 70 pixels."""
    norm: Literal["batch", "instance", "none"] = "batch"
    scales: int = 1
    """Discriminators, which see the image at 1, 1/2, 1/4 … of its resolution: 2 in pix2pixHD, 3 with its local enhancer."""
    padding: int = 1
    """Zeros around each convolution's input: 1 in pix2pix, 2 in pix2pixHD."""
    spectral_norm: bool = False
    """Divide each convolution's kernel by its largest singular value, so that the discriminator cannot grow steep."""

    returns_features: ClassVar[bool] = True  # feature matching (pix2pixHD) compares them


# A new network is added to one of these unions.
Generator = AutoRetouch | Retouch | Pix2Pix | Pix2PixHDGlobal | Pix2PixHDLocal
Discriminator = AutoRetouchPatchGAN | PatchGAN
GENERATORS: dict[str, Any] = {kind.network: kind for kind in get_args(Generator)}


# Fields that models of an earlier version lack, with the values that say what these models did.
ADDED_SINCE: dict[str, dict[str, Any]] = {"retouch": {"gate_off_faces": 0.0}, "pix2pix": {"test_mode": "eval"}}
# Fields that act only when retouching: networks that differ in them alone have the same weights.
RETOUCHING_ONLY = ("gate", "gate_off_faces", "dead_zone", "test_mode")


def generator_from_json(description: Mapping[str, Any]) -> Generator:
    """Returns the generator that `dataclasses.asdict` described.

    Raises Refused, naming it, when the network or a field is unknown or missing.
    """
    kind = GENERATORS.get(description.get("network", ""))
    if kind is None:
        raise Refused(f"network {description.get('network')!r} is unknown; this version knows {', '.join(GENERATORS)}")
    description = ADDED_SINCE.get(kind.network, {}) | dict(description)
    # A field that is missing is refused too: its default may have changed since the model was written.
    fields = {field.name for field in dataclasses.fields(kind)}
    if odd := sorted(description.keys() - fields) or sorted(fields - description.keys()):
        raise Refused(f"generator.{odd[0]} is {'missing' if odd[0] in fields else 'unknown'} for network {kind.network}")
    return kind(**description)
