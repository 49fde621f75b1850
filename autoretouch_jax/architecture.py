"""What a network is: one frozen dataclass per generator and discriminator, and their form in a `model.json`.

The field `network` names the class, in configs, in `config.json` and in `model.json`. A config file chooses the class, the
command line its fields: `--generator.width 32`. Nothing here computes; the modules are in `models/`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autoretouch_jax.errors import Refused


@dataclass(frozen=True)
class AutoRetouch:
    """The AutoRetouch generator (Shafaei, Little and Schmidt, WACV 2021)."""

    network: Literal["autoretouch"] = "autoretouch"
    width: int = 64
    """Channels of the stem; the residual blocks have twice as many."""
    blocks: int = 15
    """Residual blocks at half resolution."""
    norm: Literal["batch", "none"] = "batch"
    """`batch` is the paper's; `none` has no train/test mismatch and no colour shifts."""
    head: Literal["tanh", "residual"] = "tanh"
    """`tanh` is the paper's; `residual` adds a zero-initialised delta to the input, so training starts at the identity."""
    dead_zone: int = 0
    """When retouching: pixels that would change by at most this many 8-bit levels in every channel stay as they are."""


@dataclass(frozen=True)
class Retouch:
    """Ours: an edit of the untouched input, gated by a predicted mask; norm-free, with low-resolution levels for context."""

    network: Literal["retouch"] = "retouch"
    width: int = 48
    """Channels at half resolution; each level below has twice as many, up to `widest` times."""
    widest: int = 4
    """How many times `width` the widest levels have."""
    levels: int = 4
    """Resolutions: 1/2, 1/4, … of the image."""
    blocks: int = 2
    """Residual blocks per level, on the way down and on the way up."""
    gate: float = 0.65
    """When retouching: pixels whose predicted probability of needing an edit is below this stay bit-identical."""
    dead_zone: int = 0
    """When retouching: pixels that would change by at most this many 8-bit levels in every channel stay as they are."""


@dataclass(frozen=True)
class Pix2Pix:
    """The U-Net of pix2pix (Isola et al., CVPR 2017)."""

    network: Literal["pix2pix"] = "pix2pix"
    width: int = 64
    """Channels of the outermost level; they double three times."""
    levels: int = 8
    """Stride-2 convolutions: 8 is the U-Net-256, 7 the U-Net-128. The image's sides are padded to multiples of 2^levels."""
    norm: Literal["batch", "none"] = "batch"
    dropout: float = 0.5
    """In training, in the first up layers after the innermost: three in the U-Net-256, as published."""


@dataclass(frozen=True)
class Pix2PixHDGlobal:
    """The global generator of pix2pixHD (Wang et al., CVPR 2018)."""

    network: Literal["pix2pixhd_global"] = "pix2pixhd_global"
    width: int = 64
    """Channels of the stem; each downsampling doubles them."""
    downs: int = 4
    """Stride-2 convolutions."""
    blocks: int = 9
    """Residual blocks at the lowest resolution."""
    norm: Literal["instance", "none"] = "instance"


@dataclass(frozen=True)
class Pix2PixHDLocal:
    """The local enhancer of pix2pixHD around a global generator at half resolution (one enhancer, as published)."""

    network: Literal["pix2pixhd_local"] = "pix2pixhd_local"
    width: int = 32
    """Channels of the enhancer's stem; the global generator's stem has twice as many."""
    downs: int = 4
    """Stride-2 convolutions of the global generator."""
    global_blocks: int = 9
    local_blocks: int = 3
    norm: Literal["instance", "none"] = "instance"


@dataclass(frozen=True)
class SeedPatchGAN:
    """The discriminator of AutoRetouch's reference implementation: four strides, 94-pixel receptive field."""

    network: Literal["seed_patchgan"] = "seed_patchgan"
    width: int = 64
    """Channels of the first layer; they double three times."""
    norm: Literal["batch", "none"] = "batch"


@dataclass(frozen=True)
class PatchGAN:
    """The 70×70 PatchGAN of pix2pix; with several scales, the multi-scale discriminator of pix2pixHD."""

    network: Literal["patchgan"] = "patchgan"
    width: int = 64
    """Channels of the first layer; they double up to eight times."""
    layers: int = 3
    """Stride-2 convolutions: 3 gives the 70-pixel receptive field."""
    norm: Literal["batch", "instance", "none"] = "batch"
    scales: int = 1
    """Copies that see the image at 1, 1/2, 1/4 … of its resolution; pix2pixHD has 2."""
    padding: int = 1
    """Zeros around each convolution's input: 1 in pix2pix, 2 in pix2pixHD."""


Generator = AutoRetouch | Retouch | Pix2Pix | Pix2PixHDGlobal | Pix2PixHDLocal
Discriminator = SeedPatchGAN | PatchGAN
GENERATORS: dict[str, Any] = {kind.network: kind for kind in get_args(Generator)}


def generator_from_json(described: Mapping[str, Any]) -> Generator:
    """The generator that `dataclasses.asdict` described. Raises Refused, naming what is unknown or missing."""
    kind = GENERATORS.get(described.get("network", ""))
    if kind is None:
        raise Refused(f"network {described.get('network')!r} is unknown; this version knows {', '.join(GENERATORS)}")
    fields = {field.name for field in dataclasses.fields(kind)}
    if odd := sorted(described.keys() - fields) or sorted(fields - described.keys()):
        raise Refused(f"generator.{odd[0]} is {'missing' if odd[0] in fields else 'unknown'} for network {kind.network}")
    return kind(**described)


def grid(config: Generator) -> int:
    """What the sides of an image must be multiples of."""
    if isinstance(config, AutoRetouch):
        return 2
    if isinstance(config, Pix2PixHDGlobal):
        return int(2**config.downs)
    if isinstance(config, Pix2PixHDLocal):
        return int(2 ** (config.downs + 1))
    return int(2**config.levels)
