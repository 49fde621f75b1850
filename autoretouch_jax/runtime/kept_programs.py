"""Compiled programs, kept whole: a later start calls one without tracing it. JAX's own cache needs the traced program.

A program's name is a digest of all that it depends on, so an entry never goes stale. Entries lie in the folder of
`compile_cache.py`, and are tidied with JAX's own.
"""

import hashlib
import importlib.metadata
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import zstandard
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from autoretouch_jax.runtime import compile_cache

PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "TF_")  # beginnings of the names of variables that decide what XLA makes


def path(description: str, devices: list[jax.Device]) -> Path | None:
    """Returns where a program is or would be kept, or None where none is kept.

    `description` names all that the program depends on beside the devices, our code, the libraries and the environment.
    """
    folder = compile_cache.folder()
    # Reading an entry can run code. So it must come from a folder that is this user's alone, and not from a shared one.
    if os.environ.get(compile_cache.FOLDER) != str(folder) or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    digest = hashlib.sha256(description.encode())
    digest.update(repr([(device.id, device.platform, device.device_kind) for device in devices]).encode())
    digest.update(repr([importlib.metadata.version(name) for name in LIBRARIES]).encode())
    digest.update(repr(sorted((k, v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT))).encode())
    digest.update(repr(sorted(jax.config.values.items())).encode())
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return folder / f"whole-{digest.hexdigest()[:32]}-cache"


def read(kept: Path, devices: list[jax.Device]) -> Any:
    """Returns the program, ready to be called, or None where it cannot be read; then the entry is deleted."""
    # A file of another version, or one cut short, raises errors of many kinds, and each of them costs a compilation only.
    try:
        binary, arguments, results = pickle.loads(zstandard.ZstdDecompressor().decompress(kept.read_bytes()))
        program = deserialize_and_load(binary, arguments, results, execution_devices=devices)
        os.utime(kept)  # the least recently used ones are deleted first
        return program
    except Exception:
        kept.unlink(missing_ok=True)
        return None


def write(kept: Path, program: Any) -> None:
    """Keeps a compiled program, unless it or the disk does not allow it."""
    part = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        part.write_bytes(zstandard.ZstdCompressor().compress(pickle.dumps(serialize(program))))
        part.replace(kept)
    # Not every backend can; and a full disk is for the run's checkpoints to report.
    except Exception:
        part.unlink(missing_ok=True)
