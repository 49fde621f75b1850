"""`autoretouch doctor`: checks whether this machine can train. Every check prints a line, and says what to do about a fault."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, Refused, first_line
from autoretouch_jax.runtime import compile_cache, devices, processes, storage

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
MEGABYTES = 16  # of the all-reduce that is timed
CLOCK = 2.0  # seconds by which the clocks of two processes may differ
FREE = 10.0  # GB of free disk, below which the finding is a note
TIMEOUT = 120.0  # seconds to wait for the other processes


class Finding(NamedTuple):
    """A line of the report: `ok`, `note` or `BAD`, what was checked, and the result."""

    mark: str
    subject: str
    result: str


Check = Callable[[], Iterator[Finding]]


def run(workdir: str | None) -> int:
    """Runs every check and prints a line for each. Returns the exit status: 1 when something is bad."""
    config = ParallelConfig(timeout=int(TIMEOUT))
    with processes.one_run(config):
        findings = [finding for name, check in _checks(workdir).items() for finding in _run_check(name, check)]
    if processes.is_first():
        for mark, subject, result in findings:
            print(f"{mark:4}  {subject:12}{result}")
    return EXIT_FAILED if any(finding.mark == "BAD" for finding in findings) else EXIT_DONE


def _checks(workdir: str | None) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "libraries": _versions,
        "devices": _devices,
        "processes": _processes,
        "all-reduce": _all_reduce,
        "clocks": _clocks,
        "cache": _cache,
    }
    return checks | {"workdir": lambda: _workdir(workdir)} if workdir else checks


def _run_check(name: str, check: Check) -> list[Finding]:
    """Runs a check. An exception becomes a finding, so that the other checks still run."""
    try:
        return list(check())
    except (OSError, RuntimeError, ValueError, Refused) as error:
        return [Finding("BAD", name, f"{type(error).__name__}: {first_line(error)}")]


def _versions() -> Iterator[Finding]:
    yield Finding(
        "ok", "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {sys.executable}"
    )
    installed = []
    for name in LIBRARIES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("ok", "libraries", ", ".join(installed))


def _devices() -> Iterator[Finding]:
    for line in devices.describe_devices():
        yield Finding("ok", "devices", line)
    if jax.default_backend() == "cpu":
        hint = "an accelerator here needs -e '.[cuda12]', '.[cuda13]' or '.[tpu]'"
        yield Finding("note", "devices", f"only CPUs: fine for small runs; {hint}")


def _processes() -> Iterator[Finding]:
    names = processes.gather("doctor/host", platform.node(), TIMEOUT)
    if len(names) == 1:
        yield Finding("ok", "processes", "one process")
        return
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    yield Finding("ok", "processes", f"{len(names)} processes, all answered: {shown}")


def _all_reduce() -> Iterator[Finding]:
    seconds, right = devices.time_all_reduce(MEGABYTES * 2**20)
    speed = MEGABYTES * 2**20 / seconds / 1e9
    text = f"{MEGABYTES} MiB over {jax.device_count()} device(s) in {1e3 * seconds:.1f} ms ({speed:.2f} GB/s)"
    yield Finding(
        "ok" if right else "BAD", "all-reduce", text if right else f"{text}, but the sum is wrong: a broken link or driver"
    )


def _clocks() -> Iterator[Finding]:
    processes.barrier("doctor: clocks", TIMEOUT)  # all read their clock at about the same moment
    times = [float(text) for text in processes.gather("doctor/clock", repr(time.time()), TIMEOUT)]
    apart = max(times) - min(times)
    good = apart <= CLOCK
    yield Finding("ok" if good else "BAD", "clocks", f"{apart:.2f} s apart" + ("" if good else ": set them by NTP"))


def _cache() -> Iterator[Finding]:
    for name, folder in (("cache", storage.cache_folder()), ("scratch", Path(tempfile.gettempdir()))):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 1e9
        mark = "ok" if free > FREE else "note"
        yield Finding(mark, name, f"{folder}: can be written, {free:.0f} GB free")
    yield _compiled()


def _compiled() -> Finding:
    """Says where compiled programs are kept, and how many there are."""
    if not jax.config.values.get("jax_enable_compilation_cache"):
        return Finding("note", "compiled", "switched off by JAX_ENABLE_COMPILATION_CACHE: every start compiles its programs")
    home = jax.config.values.get("jax_compilation_cache_dir")
    if not home:
        hint = f"{compile_cache.folder()} cannot be used; JAX_COMPILATION_CACHE_DIR=FOLDER names another folder"
        return Finding("note", "compiled", f"every start compiles its programs: {hint}")
    if is_remote(home):
        return Finding("ok", "compiled", home)
    ends = (compile_cache.JAX_OWN, compile_cache.WHOLE)
    sizes = [path.stat().st_size for path in Path(home).glob("*") if path.name.endswith(ends)]
    return Finding("ok", "compiled", f"{home}: {len(sizes)} programs, {sum(sizes) / 1e6:.0f} MB")


def _workdir(workdir: str) -> Iterator[Finding]:
    """Writes, reads and deletes a file. Every process must see the file that process 0 has written."""
    home = storage.open_path(workdir)
    # A random name, chosen by process 0: a file that an earlier doctor has left must not be taken for this one's.
    probe = home / f".doctor-{processes.gather('doctor/probe', uuid.uuid4().hex, TIMEOUT)[0]}"
    content, started = np.random.default_rng(0).bytes(1 << 20), time.perf_counter()
    if processes.is_first():
        home.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(content)
    processes.barrier("doctor: probe written", TIMEOUT)
    same = probe.exists() and probe.read_bytes() == content
    everywhere = processes.gather("doctor/same", str(same), TIMEOUT)
    took = time.perf_counter() - started
    if processes.is_first():
        probe.unlink()
    blind = [str(number) for number, answer in enumerate(everywhere) if answer != "True"]
    if blind:
        text = f"{workdir}: process(es) {', '.join(blind)} do not see what process 0 writes; use a shared disk, gs:// or s3://"
        yield Finding("BAD", "workdir", text)
    else:
        free = "" if is_remote(workdir) else f", {shutil.disk_usage(home).free / 1e9:.0f} GB free"
        yield Finding("ok", "workdir", f"{workdir}: 1 MiB written, read and deleted in {1e3 * took:.0f} ms{free}")
