"""Weights files of other frameworks as arrays by name, read without executing anything.

`.npz`, PyTorch `.pth`/`.pt` state dicts, and Keras `.h5` (with the extra `keras`).
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from autoretouch_jax.errors import Refused
from autoretouch_jax.models import torchfile


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns every array of a weights file by name. Raises Refused, naming the file, when it is missing or unreadable."""
    if not path.is_file():
        raise Refused(f"weights {path}: no such file")
    # The ending tells the format, because .npz and newer .pth files are both zip archives.
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
        # h5py comes with an extra, because few people have Keras' files.
        import h5py
    except ImportError as error:
        raise Refused(
            f"weights {path}: reading .h5 needs h5py; install the extra: pip install 'autoretouch-jax[keras]'"
        ) from error
    arrays: dict[str, np.ndarray] = {}

    # Keras names a leaf `conv/conv/kernel:0` or, in its older files, `conv/conv_W_1:0`; both become `conv/kernel`.
    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            layer, leaf = name.split("/")[0], name.split("/")[-1].split(":")[0]
            arrays[f"{layer}/{leaf.removeprefix(layer + '_').replace('W_1', 'kernel').replace('b_1', 'bias')}"] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return arrays
