"""The perceptual loss's VGG: published ImageNet weights → Flax parameters, converted exactly and checked.

The published files hold 528 MB, mostly of layers that no loss uses. The parameters that a run needs are kept in the cache as a
file of their own, so that later starts read a few MB.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from autoretouch_jax.errors import Refused
from autoretouch_jax.models import vgg
from autoretouch_jax.models.weights_file import read_arrays
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.download import download

# torchvision names a file after the first eight hexadecimal digits of its SHA-256.
TORCHVISION = {
    "vgg16": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "vgg19": ("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d"),
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
    "squeeze": ("https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
}

SMALL = 64_000_000  # bytes; a smaller file is read at once, without a copy


def vgg_params(arrays: Mapping[str, np.ndarray], network: str, layers: Sequence[str]) -> tuple[dict, vgg.Preprocess]:
    """VGG weights in torchvision's (`features.N.weight`, OIHW) or Keras' (`block1_conv1/kernel`, HWIO) naming → Flax params.

    Returns the parameters up to the deepest of `layers`, and which preprocessing they were trained with. Raises Refused, naming
    the first tensor that is missing.
    """
    # The names tell the framework, and the framework tells how images must be normalised.
    kind: vgg.Preprocess = "torchvision" if any(name.startswith("features.") for name in arrays) else "keras"
    params, names = {}, vgg.layer_names(network)
    index = 0  # in torchvision's Sequential: a convolution and a ReLU each, and a pool after each block
    # Deeper layers are not loaded: relu1_2 needs 0.15 MB of 528.
    for name in names[: 1 + max(names.index(layer) for layer in layers)]:
        block, number = name[4], name[6]
        if number == "1" and block != "1":
            index += 1
        if kind == "torchvision":
            keys = (f"features.{index}.weight", f"features.{index}.bias")
        else:
            keys = (f"block{block}_conv{number}/kernel", f"block{block}_conv{number}/bias")
        if missing := [key for key in keys if key not in arrays]:
            raise Refused(
                f"VGG weights lack {missing[0]}, needed for {name}; choose shallower --loss.perceptual-layers "
                "or a complete file"
            )
        kernel, bias = (np.asarray(arrays[key], np.float32) for key in keys)
        if kind == "torchvision":
            kernel = kernel.transpose(2, 3, 1, 0)
        params[f"conv{block}_{number}"] = {"kernel": kernel, "bias": bias}
        index += 2
    return params, kind


def load_vgg(
    network: Literal["vgg16", "vgg19"],
    layers: Sequence[str],
    weights: str,
    dtype: Any = jnp.float32,
    raw_input: bool = False,
) -> tuple[vgg.VGG, dict]:
    """Returns the VGG module and its parameters. `weights` is a path, `download`, or `random`.

    `raw_input` feeds the images as they are, without the normalisation that the weights were trained with.

    Raises Refused for an unknown layer, a missing or broken file, or weights of another shape.
    """
    known = vgg.layer_names(network)
    if unknown := [layer for layer in layers if layer not in known]:
        raise Refused(f"--loss.perceptual-layers {unknown[0]}: {network} has {', '.join(known)}")

    def module(kind: vgg.Preprocess) -> vgg.VGG:
        return vgg.VGG(network, tuple(layers), "raw" if raw_input else kind, dtype)

    shapes = jax.eval_shape(module("torchvision").init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    # For tests, and for plans, which need only the shapes.
    if weights == "random":
        return module("torchvision"), _random_like(shapes)
    params, kind = _read_params(network, layers, weights)
    # Keras' weights expect BGR in 0 … 255 minus the mean; an image in [-1, 1] would look almost uniform to them.
    if raw_input and kind == "keras":
        raise Refused(f"weights {weights}: --loss.vgg-input raw needs torchvision's weights, these are Keras' and expect BGR")
    for name, layer in shapes.items():
        for leaf, shape in layer.items():
            if params[name][leaf].shape != shape.shape:
                raise Refused(f"weights {weights}: {name}/{leaf} is {params[name][leaf].shape}, {network} needs {shape.shape}")
    return module(kind), params


# ---- the small copies -------------------------------------------------------------------------------------------------------


def _read_params(network: str, layers: Sequence[str], weights: str) -> tuple[dict, vgg.Preprocess]:
    """Returns what `vgg_params` returns, from the small copy in the cache where there is one, else from the file itself."""
    copy = _copy_path(network, layers, weights)
    if copy and (stored := _read_copy(copy)):
        return stored
    # A download is compared with its checksum here, once for each copy that is made of it.
    path = download(*TORCHVISION[network]) if weights == "download" else Path(weights)
    params, kind = vgg_params(read_arrays(path), network, layers)
    if copy:
        # A disk that is full or read-only costs the copy and nothing else.
        with contextlib.suppress(OSError):
            _write_copy(copy, params, kind)
    return params, kind


def _copy_path(network: str, layers: Sequence[str], weights: str) -> Path | None:
    """Returns where the copy of a file's parameters lies, or None for a file so small that it needs none."""
    names = vgg.layer_names(network)
    if weights == "download":
        file = Path(TORCHVISION[network][0]).stem  # it holds the digest
    else:
        path = Path(weights)
        if not path.is_file() or path.stat().st_size < SMALL:
            return None
        seen = hashlib.sha256(storage.stamp(path).encode()).hexdigest()
        file = f"{network}-{path.stem}-{seen[:12]}"
    return storage.cache_folder() / "vgg" / f"{file}-{max(layers, key=names.index)}.safetensors"


def _write_copy(path: Path, params: dict, kind: str) -> None:
    flat = {name: np.ascontiguousarray(x) for name, x in flax.traverse_util.flatten_dict(params, sep="/").items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, save(flat, metadata={"kind": kind, "sha256": _digest(flat)}))


def _read_copy(path: Path) -> tuple[dict, vgg.Preprocess] | None:
    """Returns the parameters and their preprocessing, or None where there is no copy, or a damaged one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:  # it maps the file into memory
            metadata = file.metadata()
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if not metadata or _digest(flat) != metadata.get("sha256"):
        return None
    return flax.traverse_util.unflatten_dict(flat, sep="/"), metadata["kind"]


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(flat[name])
    return digest.hexdigest()


def _random_like(shapes: Any) -> dict:
    """He initialisation, so that features keep their scale through the depth."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)

    return jax.tree.map(fill, shapes)
