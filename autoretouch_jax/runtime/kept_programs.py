"""Compiled programs, kept whole: a later start calls one without tracing it. JAX's own cache needs the traced program.

A program is kept under a digest of all that it depends on, so it never goes stale. Traced, this is its text; a file named
after the config and all of our code points to it. So after an edit that leaves the step as it was, it is traced once more, and
not compiled. JAX's own cache does not keep such a program too: XLA could not copy what that has. The files lie in the folder of
`compile_cache.py`, and are tidied with JAX's own.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from autoretouch_jax.runtime import compile_cache, processes, storage

SHORTEST = 1.0  # seconds of tracing and compiling from which a program is kept
# What JAX reports when it looks for a program in its cache, and when it is there.
ASKED, HIT = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"
PACKAGE = Path(__file__).parent.parent
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_", "TF_")  # beginnings of the names of variables that decide what XLA makes


def _versions() -> str:
    return repr([importlib.metadata.version(name) for name in LIBRARIES])


def _digest_of_code() -> str:
    """A digest of this package and of the libraries. Empty where they cannot be read."""
    digest = hashlib.sha256()
    try:
        digest.update(_versions().encode())
        for file in sorted(PACKAGE.rglob("*.py")):
            digest.update(file.read_bytes())
    except (OSError, importlib.metadata.PackageNotFoundError):
        return ""
    return digest.hexdigest()


# Taken once, when the code is read: a file that is edited while a run goes on changes the next process, and not this one.
CODE = _digest_of_code()


class Program:
    """A compiled program that was kept. It takes and returns what it did, and raises TypeError for other arguments."""

    def __init__(self, content: bytes, devices: list[jax.Device]) -> None:
        """Raises errors of many kinds for content of another version."""
        binary, counts, self._trees, self.signature = pickle.loads(content)
        # The program is read with its leaves as arguments. Its trees have classes of ours, whose imports would hold it up.
        takes, returns = jax.tree.structure(((0,) * counts[0], {})), jax.tree.structure((0,) * counts[1])
        self._call = deserialize_and_load(binary, takes, returns, execution_devices=devices)

    @functools.cached_property
    def trees(self) -> tuple[Any, Any]:
        """The structure of the arguments, and that of the results."""
        return pickle.loads(self._trees)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the program."""
        leaves, structure = jax.tree.flatten((arguments, {}))
        if structure != self.trees[0]:
            raise TypeError("the kept program takes other arguments")
        return jax.tree.unflatten(self.trees[1], self._call(*leaves))


_begun: dict[Path | None, Future[Program | None]] = {}  # entries that are being read


def _read(entry: Path | None, devices: list[jax.Device]) -> Program | None:
    # A file of another version, or one cut short, raises errors of many kinds, and each of them costs a compilation only.
    try:
        return Program(compile_cache.read_entry(entry), devices) if entry else None
    except Exception:
        return None


class Kept:
    """A program among the kept ones, whether it is there or not. Where none can be kept, it never is."""

    def __init__(self, description: str, devices: list[jax.Device], signature: str = "") -> None:
        """`description` names all that it depends on beside the devices, our code, the libraries and the environment.

        `signature` says what it takes and returns, and what neither the description nor the traced program says.
        """
        self._devices, self._signature, self._began = devices, signature, time.time()
        self._place, self._made_here, self._jax_name = _place(devices), False, ""
        # The file of this name holds only the name of the file with the program.
        self.pointer = self._file(CODE + description, compile_cache.POINTER)
        self.entry: Path | None = None

    def is_there(self) -> bool:
        """Whether it is kept."""
        if self.entry is None and self.pointer:
            with contextlib.suppress(OSError, ValueError):  # ValueError: what it holds is no name
                self.entry = self.pointer.with_name(self.pointer.read_text())
        try:
            return self.entry is not None and self.entry.is_file()
        except OSError:
            return False

    def is_there_as(self, lowered: Any) -> bool:
        """Whether it is kept by its text, now that it has been traced. It is soon found without tracing, too."""
        if not self.pointer:
            return False
        text = lowered.as_text()
        name = re.match(r"module @(\w+)", text)
        self._jax_name = name[1] if name else ""
        trees = f"{lowered.in_tree}{lowered.out_tree}"
        self.entry = self._file(f"{_versions()}{self._signature}{trees}{text}", compile_cache.WHOLE)
        if not self.is_there():
            return False
        self._point()
        return True

    def read_ahead(self) -> None:
        """Begins to read it in a thread. `read` then waits for that."""
        if self.entry:
            future = Future[Program | None]()
            threading.Thread(target=lambda: future.set_result(_read(self.entry, self._devices)), name="read").start()
            _begun[self.entry] = future

    def read(self) -> Program | None:
        """Returns the program. None where it cannot be read, or has another signature; then it is kept no longer."""
        future = _begun.pop(self.entry, None)
        program = future.result() if future else _read(self.entry, self._devices)
        # A class in its trees may have moved to another module since.
        with contextlib.suppress(Exception):
            if self.entry and program and program.signature == self._signature and program.trees:
                with contextlib.suppress(OSError):
                    os.utime(self.entry)  # the least recently used ones are deleted first
                return program
        self.forget()
        return None

    def compile(self, lowered: Any) -> Any:
        """Compiles the traced program."""
        events, own = [], threading.get_ident()

        def note(event: str, **_: Any) -> None:
            if threading.get_ident() == own:
                events.append(event)

        jax.monitoring.register_event_listener(note)
        try:
            program = lowered.compile()
        finally:
            jax.monitoring.unregister_event_listener(note)
        self._made_here = ASKED in events and HIT not in events
        if HIT in events:
            # A copy would lack the functions that XLA has compiled. So the next start compiles it, and it is kept.
            self._delete_jaxs(0.0)
        return program

    def write(self, program: Any) -> None:
        """Keeps what `compile` has made, unless it or the disk does not allow it."""
        if not self.entry or not self._made_here or time.time() - self._began < SHORTEST:
            return
        # Not every backend can; and a full disk is for the run's checkpoints to report.
        with contextlib.suppress(Exception):
            binary, *trees = serialize(program)
            counts = trees[0].num_leaves, trees[1].num_leaves
            compile_cache.write_entry(self.entry, pickle.dumps((binary, counts, pickle.dumps(trees), self._signature)))
            self._point()
            self._delete_jaxs(self._began)

    def forget(self) -> None:
        """Keeps it no longer."""
        for file in (self.pointer, self.entry):
            with contextlib.suppress(OSError):
                if file:
                    file.unlink(missing_ok=True)

    def _delete_jaxs(self, since: float) -> None:
        """Deletes what JAX's cache has kept of programs of this name since a time."""
        if self._place and self._jax_name:
            for path in self._place[0].glob(f"{self._jax_name}-*{compile_cache.JAX_OWN}"):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime >= since:
                        path.unlink()

    def _point(self) -> None:
        if self.pointer and self.entry:
            with contextlib.suppress(OSError):
                storage.write(self.pointer, self.entry.name)

    def _file(self, description: str, end: str) -> Path | None:
        if not self._place:
            return None
        folder, where = self._place
        return folder / f"{hashlib.sha256(f'{where}{description}'.encode()).hexdigest()[:32]}{end}"


def _place(devices: list[jax.Device]) -> tuple[Path, str] | None:
    """Returns the folder of the entries, and what of this process all of its programs depend on. None where none is kept."""
    folder = compile_cache.folder()
    # Reading an entry can run code. So it must come from a folder that is this user's alone, and not from a shared one.
    if os.environ.get(compile_cache.FOLDER) != str(folder) or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    # Some of several processes might read their step while the others compile it, and wait for them.
    if processes.count() > 1 or not CODE:
        return None
    kinds = [(device.id, device.platform, device.device_kind, device.client.platform_version) for device in devices]
    variables = sorted((k, v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT))
    return folder, repr((kinds, variables, sorted(jax.config.values.items())))
