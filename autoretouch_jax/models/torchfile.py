"""Reads a PyTorch state dict without PyTorch and without executing a pickle.

It understands both file forms: the zip archive (PyTorch ≥ 1.6) and the older stream of pickles, in which torchvision
still publishes its VGG files. The unpickler knows the few names that a state dict needs and refuses every other one.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older form
# PyTorch's names of its storages, little-endian as PyTorch writes them.
STORAGE_TYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    first: int = 0  # the element at which a view of a larger storage begins


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, data: bytes) -> np.ndarray:
        flat = np.frombuffer(data, self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        # A damaged or hostile file could make a view of memory outside the array.
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        if self.offset < 0 or min(self.strides, default=0) < 0 or last >= flat.size:
            raise ValueError("a tensor points outside its data")
        strides = [s * flat.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False).copy()


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_unused: Any) -> _Tensor:
    return _Tensor(storage, storage.first + offset, tuple(shape), tuple(strides))


class _StateDictUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Whatever is returned here may be called with arguments from the file: only inert names may pass.
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # PyTorch up to 0.3 wrote the first name, later versions the second.
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_unused: tensor
        if module in ("torch", "torch.storage") and name in STORAGE_TYPES:
            return STORAGE_TYPES[name]
        if module in ("torch", "torch.storage", "torch._utils"):
            raise ValueError(
                f"it holds a tensor of a kind that is not read here ({name}); in PyTorch, make every tensor of the state dict "
                "an ordinary one, `tensor.float().contiguous().cpu()`, and write the file again"
            )
        raise ValueError(
            f"it refers to {module}.{name}, which is no part of a state dict; save `model.state_dict()` instead of the model"
        )

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key = reference[:3]
        if kind != "storage":
            raise ValueError(f"unknown reference {kind!r}")
        # Old versions name the view of a storage that tensors share: its key, first element and size.
        view = reference[5] if len(reference) > 5 else None
        return _Storage(str(key), dtype, view[1] if view else 0)


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Returns `{name: array}` in PyTorch's names and layouts. Raises ValueError for anything but a plain state dict."""
    try:
        tensors, data = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except (pickle.UnpicklingError, AttributeError, TypeError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not a PyTorch state dict: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError("not a state dict: the file holds something other than a dictionary of tensors")
    return {name: t.array(data[t.storage.key]) for name, t in tensors.items() if isinstance(t, _Tensor)}


def _read_zip(path: Path) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        # An archive holds one pickle of names and shapes, and a file of raw bytes for each storage.
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without one data.pkl")
        prefix = pickles[0].removesuffix("data.pkl") + "data/"
        tensors = _StateDictUnpickler(io.BytesIO(archive.read(pickles[0]))).load()
        data = {n.removeprefix(prefix): archive.read(n) for n in archive.namelist() if n.startswith(prefix)}
    return tensors, data


def _read_legacy(path: Path) -> tuple[Any, dict[str, bytes]]:
    with path.open("rb") as file:
        # Five pickles one after another: magic, protocol, system, tensors, and the order of the storages.
        if _StateDictUnpickler(file).load() != LEGACY_MAGIC:
            raise ValueError("not written by torch.save")
        for _ in ("protocol version", "system information"):
            _StateDictUnpickler(file).load()
        unpickler = _StateDictUnpickler(file)
        tensors = unpickler.load()
        # The pickles are followed by the storages, each as its number of elements and its bytes.
        dtypes = {t.storage.key: t.storage.dtype for t in tensors.values() if isinstance(t, _Tensor)}
        data = {}
        for key in _StateDictUnpickler(file).load():
            count = int.from_bytes(file.read(8), "little")
            size = count * dtypes[str(key)].itemsize
            data[str(key)] = file.read(size)
            if len(data[str(key)]) != size:
                raise ValueError("the file is cut short")
    return tensors, data
