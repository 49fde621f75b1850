"""Published weights → Flax parameters: download with a checksum, read without executing anything, convert, check.

Readable: `.npz`, PyTorch `.pth`/`.pt` state dicts, Keras `.h5` (with the extra `keras`).
"""

import hashlib
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from autoretouch_jax.errors import Refused
from autoretouch_jax.files import cache_folder
from autoretouch_jax.models import torchfile, vgg

# torchvision names a file after the first eight hexadecimal digits of its SHA-256.
PUBLISHED = {
    "vgg16": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "vgg19": ("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d"),
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
    "squeeze": ("https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
}


def download(url: str, sha256: str, folder: Path | None = None, prefix: str = "") -> Path:
    """Fetch `url` once into the cache. The file appears, as `prefix` + its name, only after its SHA-256 starts with `sha256`.

    Raises Refused when the server cannot be reached, the connection is cut, or the checksum is wrong; nothing is left behind.
    """
    folder = folder or cache_folder()
    path = folder / (prefix + url.rsplit("/", 1)[-1])
    if path.is_file() and _digest(path).startswith(sha256):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=path.name, suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as response:
            expected = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=expected or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
        if expected and part.stat().st_size != expected:
            raise Refused(f"{url}: the connection was cut after {part.stat().st_size} of {expected} bytes; try again")
        if not (found := _digest(part)).startswith(sha256):
            raise Refused(f"{url}: wrong checksum (SHA-256 {found[:16]}…, expected {sha256}…); try again, or give a local file")
        part.replace(path)
    except OSError as error:
        raise Refused(f"{url}: cannot download ({error}); fetch the file elsewhere and give its path instead") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array in a weights file by name. Raises Refused, naming the file, when it is missing or unreadable."""
    if not path.is_file():
        raise Refused(f"weights {path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if path.suffix in (".pth", ".pt"):
            return torchfile.read_state_dict(path)
        if path.suffix in (".h5", ".hdf5"):
            return _read_h5(path)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise Refused(f"weights {path}: cannot be read ({error}); is the file complete?") from error
    raise Refused(f"weights {path}: unknown ending; give a .npz, .pth, .pt or .h5 file")


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise Refused(
            f"weights {path}: reading .h5 needs h5py; install the extra: pip install 'autoretouch-jax[keras]'"
        ) from error
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            layer, leaf = name.split("/")[0], name.split("/")[-1].split(":")[0]
            arrays[f"{layer}/{leaf.removeprefix(layer + '_').replace('W_1', 'kernel').replace('b_1', 'bias')}"] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return arrays


def vgg_params(arrays: Mapping[str, np.ndarray], network: str, layers: Sequence[str]) -> tuple[dict, vgg.Preprocess]:
    """VGG weights in torchvision's (`features.N.weight`, OIHW) or Keras' (`block1_conv1/kernel`, HWIO) naming → Flax params.

    Returns the parameters up to the deepest of `layers`, and which preprocessing they were trained with.
    """
    kind: vgg.Preprocess = "torchvision" if any(name.startswith("features.") for name in arrays) else "keras"
    params, names = {}, vgg.layer_names(network)
    index = 0  # of torchvision's Sequential: a convolution and a ReLU each, a pool after each block
    for name in names[: 1 + max(names.index(layer) for layer in layers)]:
        block, number = name[4], name[6]
        if number == "1" and block != "1":
            index += 1
        keys = (
            (f"features.{index}.weight", f"features.{index}.bias")
            if kind == "torchvision"
            else (f"block{block}_conv{number}/kernel", f"block{block}_conv{number}/bias")
        )
        if missing := [key for key in keys if key not in arrays]:
            raise Refused(
                f"VGG weights lack {missing[0]}, needed for {name}; choose shallower --loss.perceptual-layers "
                "or a complete file"
            )
        kernel, bias = (np.asarray(arrays[key], np.float32) for key in keys)
        params[f"conv{block}_{number}"] = {
            "kernel": kernel.transpose(2, 3, 1, 0) if kind == "torchvision" else kernel,
            "bias": bias,
        }
        index += 2
    return params, kind


def load_vgg(
    network: Literal["vgg16", "vgg19"], layers: Sequence[str], weights: str, dtype: Any = None, raw_input: bool = False
):
    """The VGG module and its parameters. `weights` is a path, `download`, or `random`.

    `raw_input` feeds the images as they are, without the normalisation that the weights were trained with.

    Raises Refused for an unknown layer, a missing or broken file, or weights of another shape.
    """
    known = vgg.layer_names(network)
    if unknown := [layer for layer in layers if layer not in known]:
        raise Refused(f"--loss.perceptual-layers {unknown[0]}: {network} has {', '.join(known)}")
    make = lambda kind: vgg.VGG(network, tuple(layers), "raw" if raw_input else kind, dtype or np.float32)  # noqa: E731
    shapes = jax.eval_shape(make("torchvision").init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    if weights == "random":
        return make("torchvision"), _random_like(shapes)
    path = download(*PUBLISHED[network]) if weights == "download" else Path(weights)
    params, kind = vgg_params(read_arrays(path), network, layers)
    if raw_input and kind == "keras":
        raise Refused(f"weights {path}: --loss.vgg-input raw needs torchvision's weights, these are Keras' and expect BGR")
    for name, layer in shapes.items():
        for leaf, shape in layer.items():
            if params[name][leaf].shape != shape.shape:
                raise Refused(f"weights {path}: {name}/{leaf} is {params[name][leaf].shape}, {network} needs {shape.shape}")
    return make(kind), params


def _random_like(shapes: Any) -> dict:
    rng = np.random.default_rng(0)  # He initialisation: features keep their scale through the depth
    fill = lambda s: rng.normal(0, np.sqrt(2 / np.prod(s.shape[:-1])), s.shape) if len(s.shape) > 1 else np.zeros(s.shape)  # noqa: E731
    return jax.tree.map(lambda s: fill(s).astype(np.float32), shapes)
