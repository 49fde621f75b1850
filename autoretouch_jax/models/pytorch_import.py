"""Converts generators that others trained with the published PyTorch code of pix2pix and pix2pixHD to ours.

State dicts come as `{name: array}` from `weights_file.read_arrays`. Which network one holds, and how large it is, follows from
the names and shapes of its tensors.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.traverse_util
import numpy as np

from autoretouch_jax.config import networks
from autoretouch_jax.errors import EXIT_DONE, Refused
from autoretouch_jax.models import weights_file
from autoretouch_jax.models.folder import Model, check_shapes, save_model

Arrays = Mapping[str, np.ndarray]
Path = tuple[str, ...]  # of a parameter in Flax: ("params", "down0", "kernel")


def run(weights: pathlib.Path, out: pathlib.Path, test_mode: Literal["eval", "train"]) -> int:
    """Writes a file's generator as a model folder."""
    config, variables = import_generator(weights_file.read_arrays(weights), test_mode)
    # A U-Net with instance norm can be read, but is another network: compare the shapes before anything is written.
    check_shapes(weights, config, variables)
    save_model(out, Model(config, variables), 0)
    print(f"{out}: {config}")
    return EXIT_DONE


def import_generator(arrays: Arrays, test_mode: Literal["eval", "train"] = "eval") -> tuple[networks.Generator, dict[str, Any]]:
    """A published generator's state dict → its description and Flax variables.

    It understands pix2pix' U-Nets with BatchNorm, and pix2pixHD's global generator and local enhancer with instance norm, which
    knows no `test_mode`. Raises Refused for anything else, naming the first tensor that does not fit.
    """
    # Weights saved from `DataParallel` have a prefix, and BatchNorm has a counter that we do not need.
    arrays = {name.removeprefix("module."): value for name, value in arrays.items() if not name.endswith("num_batches_tracked")}
    # The most specific network first: a local enhancer contains the layers of a global generator.
    if any(name.startswith("model1_1.") for name in arrays):
        return _pix2pixhd_local(arrays)
    if any(".conv_block." in name for name in arrays):
        return _pix2pixhd_global(arrays)
    if any(re.fullmatch(r"(model\.)*1(\.model)?\.1\.weight|(model\.)+1\.model\.1\.weight", name) for name in arrays):
        return _pix2pix_unet(arrays, test_mode)
    known = "pix2pix' U-Net (unet_128, unet_256), pix2pixHD's global generator or its local enhancer"
    raise Refused(
        f"not the state dict of a generator that is known here ({known}); its first tensor is {next(iter(arrays), 'none')}"
    )


def _pix2pix_unet(arrays: Arrays, test_mode: Literal["eval", "train"]) -> tuple[networks.Pix2Pix, dict[str, Any]]:
    """`UnetGenerator` of pix2pix: its blocks are nested as `model.1.model.3.model.3…`, the innermost last."""
    # The depth of a layer's name is its level in the U; its last number says which layer of the level it is.
    tensors = StateDict(arrays)
    numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in arrays}
    last = max((len(path) - 1 for path in numbers.values()), default=0)
    if last < 2:
        raise Refused("not a U-Net: its blocks are not nested")
    for prefix, path in sorted({(name.rsplit(".", 1)[0], tuple(path)) for name, path in numbers.items()}):
        level, index = len(path) - 1, path[-1]
        # The index of a layer in its block's Sequential → the side of the U it is on, and whether it is a norm.
        layers = {1: ("down", False), 2: ("down", True), 5: ("up", False), 6: ("up", True)}
        if level == 0:
            layers = {0: ("down", False), 3: ("up", False)}
        elif level == last:
            layers = {1: ("down", False), 3: ("up", False), 4: ("up", True)}
        if index not in layers:
            raise Refused(f"{prefix}: has no place in a U-Net of {last + 1} levels with BatchNorm")
        side, is_norm = layers[index]
        if is_norm:
            tensors.take_norm(prefix, (f"{side}_norm{level}",))
        else:
            tensors.take_conv(prefix, (f"{side}{level}",), transposed=side == "up")
    # Without this check, a missing convolution would only cause a strange error far from here.
    if missing := sorted({f"down{i}" for i in range(last + 1)} - {path[1] for path in tensors.flat}):
        raise Refused(f"not a complete U-Net: the convolution of level {missing[0].removeprefix('down')} is missing")
    # The width is not in the names, so it comes from a shape.
    width = tensors.flat["params", "down0", "kernel"].shape[-1]
    return networks.Pix2Pix(width=width, levels=last + 1, test_mode=test_mode), tensors.variables()


def _pix2pixhd_global(arrays: Arrays) -> tuple[networks.Pix2PixHDGlobal, dict[str, Any]]:
    """`GlobalGenerator` of pix2pixHD: layers as `model.N`, blocks as `model.N.conv_block.1` and `.5`."""
    tensors = StateDict(arrays)
    downs, blocks = _take_global_features(tensors, "model", has_head=True)
    width = tensors.flat["params", "global", "stem", "kernel"].shape[-1]
    return networks.Pix2PixHDGlobal(width=width, downs=downs, blocks=blocks), tensors.variables()


def _pix2pixhd_local(arrays: Arrays) -> tuple[networks.Pix2PixHDLocal, dict[str, Any]]:
    """`LocalEnhancer` of pix2pixHD with one enhancer: `model.N` is the global generator, `model1_1` and `model1_2` the rest."""
    tensors = StateDict(arrays)
    downs, global_blocks = _take_global_features(tensors, "model", has_head=False)
    # The authors call the enhancer's two halves model1_1 (down) and model1_2 (blocks and up).
    for name, prefix in zip(("stem", "down"), tensors.convolutions("model1_1"), strict=True):
        tensors.take_conv(prefix, (name,))
    prefixes = tensors.convolutions("model1_2")
    blocks = [prefix for prefix in prefixes if ".conv_block." in prefix]
    for i, prefix in enumerate(blocks):
        tensors.take_conv(prefix, (f"block{i // 2}", ("first", "second")[i % 2]))
    up, head = prefixes[len(blocks) :]
    tensors.take_conv(up, ("up",), transposed=True)
    tensors.take_conv(head, ("head",))
    width = tensors.flat["params", "stem", "kernel"].shape[-1]
    config = networks.Pix2PixHDLocal(width=width, downs=downs, global_blocks=global_blocks, local_blocks=len(blocks) // 2)
    return config, tensors.variables()


def _take_global_features(tensors: "StateDict", root: str, has_head: bool) -> tuple[int, int]:
    """Takes the layers of the global generator, and returns how many downsamplings and blocks it has."""
    prefixes = tensors.convolutions(root)
    blocks = [prefix for prefix in prefixes if ".conv_block." in prefix]
    # The stem, then the downsamplings, then the blocks, then as many upsamplings, and a head.
    downs = prefixes.index(blocks[0]) - 1
    tensors.take_conv(prefixes[0], ("global", "stem"))
    for level in range(1, downs + 1):
        tensors.take_conv(prefixes[level], ("global", f"down{level}"))
    for i, prefix in enumerate(blocks):
        tensors.take_conv(prefix, ("global", f"block{i // 2}", ("first", "second")[i % 2]))
    ups = prefixes[1 + downs + len(blocks) :]
    if len(ups) != downs + has_head:
        raise Refused(f"{root}: {downs} downsamplings need {downs + has_head} layers after the blocks, there are {len(ups)}")
    for level, prefix in zip(reversed(range(downs)), ups, strict=False):
        tensors.take_conv(prefix, ("global", f"up{level}"), transposed=True)
    if has_head:
        tensors.take_conv(ups[-1], ("head",))
    return downs, len(blocks) // 2


class StateDict:
    """The tensors of a state dict, and those already taken, under their paths in Flax and in Flax' layout."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.left = set(arrays)
        self.flat: dict[Path, np.ndarray] = {}

    def convolutions(self, root: str) -> list[str]:
        """The names of the convolutions under `root`, in the order of their numbers."""
        separator = "" if root.endswith("_") else "."
        # Four dimensions make a convolution; norms have one.
        kernels = [name for name, value in self.arrays.items() if name.endswith(".weight") and value.ndim == 4]
        names = {name.removesuffix(".weight") for name in kernels if name.startswith(root + separator)}
        return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name[len(root) :])])

    def take_conv(self, prefix: str, path: Path, transposed: bool = False) -> None:
        """Takes a convolution: PyTorch's OIHW, or IOHW where it is transposed, becomes `[h, w, in, out]`."""
        weight = self._take(f"{prefix}.weight")
        if weight.ndim != 4:
            raise Refused(f"{prefix}.weight has the shape {weight.shape}: a convolution was expected")
        # Flax convolves as PyTorch does, without flipping the kernel: only the axes move.
        self.flat["params", *path, "kernel"] = weight.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0))
        if f"{prefix}.bias" in self.arrays:
            self.flat["params", *path, "bias"] = self._take(f"{prefix}.bias")

    def take_norm(self, prefix: str, path: Path) -> None:
        """Takes a BatchNorm with its running statistics."""
        for theirs, ours in {"weight": "scale", "bias": "bias"}.items():
            self.flat["params", *path, ours] = self._take(f"{prefix}.{theirs}")
        for theirs, ours in {"running_mean": "mean", "running_var": "var"}.items():
            self.flat["batch_stats", *path, ours] = self._take(f"{prefix}.{theirs}")

    def _take(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise Refused(f"{name} is missing from the state dict")
        self.left.discard(name)
        return np.asarray(self.arrays[name], np.float32)

    def variables(self) -> dict[str, Any]:
        """The Flax variables. Raises Refused when a tensor is left: the file then holds another network."""
        if self.left:
            raise Refused(f"{min(self.left)} has no place in this network; was it trained with another norm or more layers?")
        return flax.traverse_util.unflatten_dict(self.flat)
