"""Weights that others trained, as ours: the published PyTorch pix2pix and pix2pixHD networks, and AutoRetouch's Keras seed.

State dicts come as `{name: array}` from `weights.read_arrays`; which network it is, and its sizes, names and shapes tell.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from autoretouch_jax import architecture
from autoretouch_jax.errors import Refused

Arrays = Mapping[str, np.ndarray]
Flat = dict[tuple[str, ...], np.ndarray]


def generator(arrays: Arrays) -> tuple[architecture.Generator, dict[str, Any]]:
    """A published generator's state dict → its description and Flax variables.

    Understood: pix2pix' U-Nets with BatchNorm, pix2pixHD's global generator and local enhancer with instance norm. Raises
    Refused for anything else, naming the first tensor that does not fit.
    """
    arrays = {name.removeprefix("module."): value for name, value in arrays.items() if not name.endswith("num_batches_tracked")}
    if any(name.startswith("model1_1.") for name in arrays):
        return pix2pixhd_local(arrays)
    if any(".conv_block." in name for name in arrays):
        return pix2pixhd_global(arrays)
    if any(re.fullmatch(r"(model\.)*1(\.model)?\.1\.weight|(model\.)+1\.model\.1\.weight", name) for name in arrays):
        return pix2pix_unet(arrays)
    known = "pix2pix' U-Net (unet_128, unet_256), pix2pixHD's global generator or its local enhancer"
    raise Refused(
        f"not the state dict of a generator that is known here ({known}); its first tensor is {next(iter(arrays), 'none')}"
    )


def pix2pix_unet(arrays: Arrays) -> tuple[architecture.Pix2Pix, dict[str, Any]]:
    """`UnetGenerator` of pix2pix: blocks nested as `model.1.model.3.model.3…`, innermost last."""
    used = _Used(arrays)
    paths = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in arrays}
    last = max((len(path) - 1 for path in paths.values()), default=0)
    if last < 2:
        raise Refused("not a U-Net: its blocks are not nested")
    homes: Flat = {}
    for prefix, path in sorted({(name.rsplit(".", 1)[0], tuple(path)) for name, path in paths.items()}):
        level, index = len(path) - 1, path[-1]
        places = {0: ("down", 0), 3: ("up", 0)} if level == 0 else {1: ("down", 0), 2: ("down", 1), 5: ("up", 0), 6: ("up", 1)}
        if level == last:
            places = {1: ("down", 0), 3: ("up", 0), 4: ("up", 1)}
        if index not in places:
            raise Refused(f"{prefix}: has no place in a U-Net of {last + 1} levels with BatchNorm")
        side, is_norm = places[index]
        if is_norm:
            used.norm(homes, (f"{side}_norm{level}",), prefix)
        else:
            used.conv(homes, (f"{side}{level}",), prefix, transposed=side == "up")
    if missing := sorted({f"down{i}" for i in range(last + 1)} - {home[1] for home in homes}):
        raise Refused(f"not a complete U-Net: the convolution of level {missing[0].removeprefix('down')} is missing")
    width = homes["params", "down0", "kernel"].shape[-1]
    return architecture.Pix2Pix(width=width, levels=last + 1), used.finish(homes)


def pix2pixhd_global(arrays: Arrays) -> tuple[architecture.Pix2PixHDGlobal, dict[str, Any]]:
    """`GlobalGenerator` of pix2pixHD: `model.N`, blocks as `model.N.conv_block.1` and `.5`."""
    homes: Flat = {}
    used = _Used(arrays)
    downs, blocks = _global_features(used, homes, "model", has_head=True)
    width = homes["params", "global", "stem", "kernel"].shape[-1]
    return architecture.Pix2PixHDGlobal(width=width, downs=downs, blocks=blocks), used.finish(homes)


def pix2pixhd_local(arrays: Arrays) -> tuple[architecture.Pix2PixHDLocal, dict[str, Any]]:
    """`LocalEnhancer` of pix2pixHD with one enhancer: the global one as `model.N`, the enhancer as `model1_1`, `model1_2`."""
    homes: Flat = {}
    used = _Used(arrays)
    downs, global_blocks = _global_features(used, homes, "model", has_head=False)
    for name, prefix in zip(("stem", "down"), used.prefixes("model1_1"), strict=True):
        used.conv(homes, (name,), prefix)
    prefixes = used.prefixes("model1_2")
    blocks = [prefix for prefix in prefixes if ".conv_block." in prefix]
    for i, prefix in enumerate(blocks):
        used.conv(homes, (f"block{i // 2}", ("first", "second")[i % 2]), prefix)
    up, head = prefixes[len(blocks) :]
    used.conv(homes, ("up",), up, transposed=True)
    used.conv(homes, ("head",), head)
    width = homes["params", "stem", "kernel"].shape[-1]
    config = architecture.Pix2PixHDLocal(width=width, downs=downs, global_blocks=global_blocks, local_blocks=len(blocks) // 2)
    return config, used.finish(homes)


def _global_features(used: "_Used", homes: Flat, root: str, has_head: bool) -> tuple[int, int]:
    """Place the layers of the global generator; returns its downsamplings and blocks."""
    prefixes = used.prefixes(root)
    blocks = [prefix for prefix in prefixes if ".conv_block." in prefix]
    downs = prefixes.index(blocks[0]) - 1
    used.conv(homes, ("global", "stem"), prefixes[0])
    for level in range(1, downs + 1):
        used.conv(homes, ("global", f"down{level}"), prefixes[level])
    for i, prefix in enumerate(blocks):
        used.conv(homes, ("global", f"block{i // 2}", ("first", "second")[i % 2]), prefix)
    ups = prefixes[1 + downs + len(blocks) :]
    if len(ups) != downs + has_head:
        raise Refused(f"{root}: {downs} downsamplings need {downs + has_head} layers after the blocks, there are {len(ups)}")
    for level, prefix in zip(reversed(range(downs)), ups, strict=False):
        used.conv(homes, ("global", f"up{level}"), prefix, transposed=True)
    if has_head:
        used.conv(homes, ("head",), ups[-1])
    return downs, len(blocks) // 2


def patchgan(arrays: Arrays) -> tuple[architecture.PatchGAN, dict[str, Any]]:
    """`NLayerDiscriminator` of pix2pix (`model.N`), or `MultiscaleDiscriminator` of pix2pixHD (`scaleN_layerM.0`).

    The authors number scales from the coarsest, we from the finest. Their older code pads every convolution by 2 and gives it a
    bias; the newer pads by 1 and has no bias before a norm. Ours has the biases; where they are missing they are zero.
    """
    homes: Flat = {}
    used = _Used({name: value for name, value in arrays.items() if not name.endswith("num_batches_tracked")})
    found = {int(match[1]) for name in arrays if (match := re.match(r"scale(\d+)_layer", name))}
    for scale in range(max(found, default=0) + 1):
        convolutions = used.prefixes(f"scale{max(found) - scale}_") if found else used.prefixes("model")
        for i, prefix in enumerate(convolutions):
            name = f"conv{i}" if i < len(convolutions) - 1 else "logits"
            used.conv(homes, (f"scale{scale}", name), prefix)
            bias = homes["params", f"scale{scale}", name, "kernel"].shape[-1:]
            homes.setdefault(("params", f"scale{scale}", name, "bias"), np.zeros(bias, np.float32))
        norms = sorted(
            (n.rsplit(".", 1)[0] for n in used.left if n.endswith(".running_mean")), key=lambda n: int(n.split(".")[1])
        )
        for i, prefix in enumerate(norms):
            used.norm(homes, (f"scale{scale}", f"norm{i + 1}"), prefix)
    biased = f"{convolutions[1]}.bias" in arrays
    config = architecture.PatchGAN(
        width=homes["params", "scale0", "conv0", "kernel"].shape[-1],
        layers=len(convolutions) - 2,
        norm="instance" if found else "batch",
        scales=len(found) or 1,
        padding=2 if found or biased else 1,
    )
    return config, used.finish(homes)


class _Used:
    """The arrays of a state dict, and which of them have found a place."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays
        self.left = set(arrays)

    def prefixes(self, root: str) -> list[str]:
        """The convolutions under `root`, in the order of their numbers."""
        separator = "" if root.endswith("_") else "."
        kernels = [name for name, value in self.arrays.items() if name.endswith(".weight") and value.ndim == 4]
        names = {name.removesuffix(".weight") for name in kernels if name.startswith(root + separator)}
        return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name[len(root) :])])

    def take(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise Refused(f"{name} is missing from the state dict")
        self.left.discard(name)
        return np.asarray(self.arrays[name], np.float32)

    def conv(self, homes: Flat, home: tuple[str, ...], prefix: str, transposed: bool = False) -> None:
        """PyTorch's OIHW, for transposed convolutions IOHW, to `[h, w, in, out]`."""
        weight = self.take(f"{prefix}.weight")
        if weight.ndim != 4:
            raise Refused(f"{prefix}.weight has the shape {weight.shape}: a convolution was expected")
        homes["params", *home, "kernel"] = weight.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0))
        if f"{prefix}.bias" in self.arrays:
            homes["params", *home, "bias"] = self.take(f"{prefix}.bias")

    def norm(self, homes: Flat, home: tuple[str, ...], prefix: str) -> None:
        for theirs, ours in {"weight": "scale", "bias": "bias"}.items():
            homes["params", *home, ours] = self.take(f"{prefix}.{theirs}")
        for theirs, ours in {"running_mean": "mean", "running_var": "var"}.items():
            homes["batch_stats", *home, ours] = self.take(f"{prefix}.{theirs}")

    def finish(self, homes: Flat) -> dict[str, Any]:
        if self.left:
            raise Refused(f"{min(self.left)} has no place in this network; was it trained with another norm or more layers?")
        return flax.traverse_util.unflatten_dict(homes)


def seed_keras_variables(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The seed's Keras generator or discriminator (`conv2d_3/kernel`, `batch_normalization/gamma`, …) → Flax variables.

    Keras numbers its layers in the order they were made: convolutions and norms are matched to ours in that order. Which of
    the two networks it is follows from the first kernel: 7×7 for the generator, 4×4 for the discriminator.
    """
    convolutions, norms = (_keras_layers(arrays, prefix) for prefix in ("conv2d", "batch_normalization"))
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    is_generator = convolutions[0]["kernel"].shape[0] == 7
    if is_generator:
        blocks = len(norms) // 2
        homes: list[tuple[str, ...]] = [
            ("stem",),
            ("down",),
            *((f"block{i}", f"Conv_{j}") for i in range(blocks) for j in (0, 1)),
            ("up",),
            ("head",),
        ]
        norm_homes: list[tuple[str, ...]] = [(f"block{i}", f"BatchNorm_{j}") for i in range(blocks) for j in (0, 1)]
    else:
        homes = [*((f"conv{i}",) for i in range(len(convolutions) - 1)), ("logits",)]
        norm_homes = [(f"norm{i + 1}",) for i in range(len(norms))]
    for home, layer in zip(homes, convolutions, strict=True):
        _place(params, home, {"kernel": layer["kernel"], "bias": layer["bias"]})
    for home, layer in zip(norm_homes, norms, strict=True):
        _place(params, home, {"scale": layer["gamma"], "bias": layer["beta"]})
        _place(stats, home, {"mean": layer["moving_mean"], "var": layer["moving_variance"]})
    return {"params": params, "batch_stats": stats}


def _keras_layers(arrays: Mapping[str, np.ndarray], prefix: str) -> list[dict[str, np.ndarray]]:
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        layer, leaf = name.split("/")
        if layer == prefix or layer.startswith(prefix + "_"):
            layers.setdefault(int(layer[len(prefix) + 1 :] or 0), {})[leaf] = value
    return [layers[number] for number in sorted(layers)]


def _place(tree: dict[str, Any], home: tuple[str, ...], leaves: dict[str, Any]) -> None:
    for name in home[:-1]:
        tree = tree.setdefault(name, {})
    tree[home[-1]] = leaves
