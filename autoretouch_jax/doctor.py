"""`autoretouch doctor`: is this place fit to train? Every check is a line; what is wrong says what to do."""

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

from autoretouch_jax import files, hosts, parallel
from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import Refused

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
MEGABYTES = 16  # of the all-reduce that is timed
CLOCK = 2.0  # seconds by which two hosts' clocks may differ
FREE = 10.0  # GB
TIMEOUT = 120.0


class Finding(NamedTuple):
    """A line: `ok`, `note` or `BAD`, what was looked at, and what was found."""

    mark: str
    what: str
    found: str


def run(workdir: str | None) -> int:
    """Check everything, print a line each; status 1 when something is bad. Of several processes the first one prints."""
    config = ParallelConfig(timeout=int(TIMEOUT))
    with hosts.one_run(config):
        findings = [finding for check in _checks(workdir) for finding in _tried(check)]
    if hosts.is_first():
        for mark, what, found in findings:
            print(f"{mark:4}  {what:12}{found}")
    return int(any(finding.mark == "BAD" for finding in findings))


def _checks(workdir: str | None) -> list[Callable[[], Iterator[Finding]]]:
    checks = [_versions, _devices, _peers, _all_reduce, _clocks, _cache]
    return [*checks, lambda: _workdir(workdir)] if workdir else checks


def _tried(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except (OSError, RuntimeError, ValueError, Refused) as error:
        name = getattr(check, "__name__", "").strip("_<>").replace("lambda", "workdir").replace("_", "-")
        return [Finding("BAD", name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")]


def _versions() -> Iterator[Finding]:
    yield Finding(
        "ok", "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {sys.executable}"
    )
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("ok", "libraries", ", ".join(found))


def _devices() -> Iterator[Finding]:
    for line in parallel.describe_devices():
        yield Finding("ok", "devices", line)
    if jax.default_backend() == "cpu":
        hint = "an accelerator here needs -e '.[cuda12]', '.[cuda13]' or '.[tpu]'"
        yield Finding("note", "devices", f"only CPUs: fine for small runs; {hint}")


def _peers() -> Iterator[Finding]:
    names = hosts.gather("doctor/host", platform.node(), TIMEOUT)
    if len(names) == 1:
        yield Finding("ok", "peers", "none: a single process")
        return
    yield Finding(
        "ok", "peers", f"{len(names)} processes, all answered: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    )


def _all_reduce() -> Iterator[Finding]:
    seconds, right = parallel.time_all_reduce(MEGABYTES * 2**20)
    speed = MEGABYTES * 2**20 / seconds / 1e9
    text = f"{MEGABYTES} MiB over {jax.device_count()} device(s) in {1e3 * seconds:.1f} ms ({speed:.2f} GB/s)"
    yield Finding(
        "ok" if right else "BAD", "all-reduce", text if right else f"{text}, but the sum is wrong: a broken link or driver"
    )


def _clocks() -> Iterator[Finding]:
    hosts.barrier("doctor: clocks", TIMEOUT)
    times = [float(text) for text in hosts.gather("doctor/clock", repr(time.time()), TIMEOUT)]
    apart = max(times) - min(times)
    good = apart <= CLOCK
    yield Finding("ok" if good else "BAD", "clocks", f"{apart:.2f} s apart" + ("" if good else ": set them by NTP"))


def _cache() -> Iterator[Finding]:
    for name, folder in (("cache", files.cache_folder()), ("scratch", Path(tempfile.gettempdir()))):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 1e9
        mark = "ok" if free > FREE else "note"
        yield Finding(mark, name, f"{folder}: can be written, {free:.0f} GB free")
    compiled = jax.config.values.get("jax_compilation_cache_dir")
    hint = "none; JAX_COMPILATION_CACHE_DIR=FOLDER saves the compilation at every restart"
    yield Finding("ok" if compiled else "note", "compiled", compiled or hint)


def _workdir(workdir: str) -> Iterator[Finding]:
    """Write, read, delete; among several processes, what the first one wrote must be there for all."""
    home = files.place(workdir)
    probe = home / f".doctor-{hosts.gather('doctor/probe', uuid.uuid4().hex, TIMEOUT)[0]}"
    content, started = np.random.default_rng(0).bytes(1 << 20), time.perf_counter()
    if hosts.is_first():
        home.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(content)
    hosts.barrier("doctor: probe written", TIMEOUT)
    same = probe.exists() and probe.read_bytes() == content
    everywhere = hosts.gather("doctor/same", str(same), TIMEOUT)
    took = time.perf_counter() - started
    if hosts.is_first():
        probe.unlink()
    blind = [str(number) for number, answer in enumerate(everywhere) if answer != "True"]
    if blind:
        text = f"{workdir}: process(es) {', '.join(blind)} do not see what process 0 writes; use a shared disk, gs:// or s3://"
        yield Finding("BAD", "workdir", text)
    else:
        free = "" if files.is_remote(workdir) else f", {shutil.disk_usage(home).free / 1e9:.0f} GB free"
        yield Finding("ok", "workdir", f"{workdir}: 1 MiB written, read and deleted in {1e3 * took:.0f} ms{free}")
