"""Compiled programs, kept whole: a later start calls one without tracing it. JAX's own cache needs the traced program.

A program's name is a digest of all that it depends on, so an entry never goes stale. Entries lie in the folder of
`compile_cache.py`, and are tidied with JAX's own.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pickle
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from autoretouch_jax.runtime import compile_cache, processes

PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "TF_")  # beginnings of the names of variables that decide what XLA makes


def _digest_of_code() -> str:
    """A digest of this package and of the libraries. Empty where they cannot be read."""
    digest = hashlib.sha256()
    try:
        digest.update(repr([importlib.metadata.version(name) for name in LIBRARIES]).encode())
        for file in sorted(PACKAGE.rglob("*.py")):
            digest.update(file.read_bytes())
    except (OSError, importlib.metadata.PackageNotFoundError):
        return ""
    return digest.hexdigest()


# Taken once, when the code is read: a file that is edited while a run goes on changes the next process, and not this one.
CODE = _digest_of_code()


def path(description: str, devices: list[jax.Device]) -> Path | None:
    """Returns where a program is or would be kept, or None where none is kept.

    `description` names all that the program depends on beside the devices, our code, the libraries and the environment.
    """
    folder = compile_cache.folder()
    # Reading an entry can run code. So it must come from a folder that is this user's alone, and not from a shared one.
    if os.environ.get(compile_cache.FOLDER) != str(folder) or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    # Some of several processes might read their step while the others compile it, and wait for them.
    if processes.count() > 1 or not CODE:
        return None
    digest = hashlib.sha256(f"{CODE}{description}".encode())
    kinds = [(device.id, device.platform, device.device_kind, device.client.platform_version) for device in devices]
    digest.update(repr(kinds).encode())
    digest.update(repr(sorted((k, v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT))).encode())
    digest.update(repr(sorted(jax.config.values.items())).encode())
    return folder / f"{digest.hexdigest()[:32]}{compile_cache.WHOLE}"


def read(kept: Path, devices: list[jax.Device]) -> Any:
    """Returns the program, ready to be called, or None where it cannot be read; then the entry is deleted."""
    # A file of another version, or one cut short, raises errors of many kinds, and each of them costs a compilation only.
    try:
        binary, arguments, results = pickle.loads(compile_cache.read_entry(kept))
        program = deserialize_and_load(binary, arguments, results, execution_devices=devices)
    except Exception:
        kept.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(kept)  # the least recently used ones are deleted first
    return program


def write(kept: Path, program: Any) -> None:
    """Keeps a compiled program, unless it or the disk does not allow it."""
    # Not every backend can; and a full disk is for the run's checkpoints to report.
    with contextlib.suppress(Exception):
        compile_cache.write_entry(kept, pickle.dumps(serialize(program)))
