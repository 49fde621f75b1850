"""Compiles the real step for a TPU slice that is not here, in a process of its own.

libtpu, the compiler, comes with the extra `plan` (0.5 GB). It must be told not to look for a TPU, and a process that has loaded
it can be used for nothing else. So the caller starts `python -m autoretouch_jax.planning.tpu`, which writes its results to a
JSON file.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autoretouch_jax.config import Config
from autoretouch_jax.errors import Refused
from autoretouch_jax.planning.traffic import BYTES, array_bytes, bytes_through_memory, estimated_cycles
from autoretouch_jax.runtime import storage

PACKAGE = Path(__file__).parent.parent
# Our own code that the compiled program depends on. Both whole rooms are taken, so that no new file is forgotten.
PROGRAM_ROOMS = ("models", "training")
PROGRAM_FILES = ("runtime/devices.py", "planning/tpu.py", "planning/traffic.py")
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
LIMIT_SECONDS = 3600


def compile_for(config: Config, topology: str, cache: Path) -> dict[str, Any]:
    """Returns XLA's analysis of the step of `config` on the slice (see `_analysis`), and keeps it in `cache`.

    Raises Refused when libtpu is missing or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise Refused("libtpu, the compiler for TPUs (0.5 GB), is not installed: pip install 'autoretouch-jax[plan]'")
    # Compiling takes minutes. The name covers all that the result depends on, so it never goes stale.
    kept = cache / f"{_fingerprint(config, topology)}.json"
    if kept.is_file():
        return json.loads(kept.read_text()) | {"cached": True}
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder) / "request", Path(folder) / "result.json"
        # A pickle is safe here: it goes from us to our own child, and nobody else can write to this folder.
        request.write_bytes(pickle.dumps((config, topology)))
        command = [sys.executable, "-m", "autoretouch_jax.planning.tpu", str(request), str(result)]
        with (Path(folder) / "log").open("w+") as log:
            child = subprocess.Popen(command, env=_child_environment(), stdout=log, stderr=subprocess.STDOUT)
            _wait(child, f"compiling for {topology}, crop {config.data.crop}, batch {config.train.batch}")
            log.seek(0)
            output = log.read().strip()
        # libtpu may abort in C++, so the missing file, not the exit status, shows that it failed.
        if not result.is_file():
            raise Refused(f"--topology {topology}: could not be compiled for: {_reason(output)}")
        findings = json.loads(result.read_text())
    storage.write_output(kept, json.dumps(findings, indent=2) + "\n")
    return findings | {"cached": False}


def _child_environment() -> dict[str, str]:
    # Flags for other devices would reach libtpu too, and it refuses those that it does not know.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return environment | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the plan itself is kept, and it needs what the compiler says of the program
        "TPU_SKIP_MDS_QUERY": "1",  # the metadata server answers only on a TPU VM
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a killed child leaves a lock file behind
    }


def _wait(child: subprocess.Popen, what: str) -> None:
    """Waits for the child and shows the time. It is killed when the caller is interrupted or the limit is over."""
    with tqdm(bar_format="{desc} {elapsed}", desc=what, disable=None) as bar:
        started = time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(0.2)
                bar.refresh()
                if time.monotonic() - started > LIMIT_SECONDS:
                    raise Refused(f"{what}: not done after {LIMIT_SECONDS} s; plan a smaller crop or batch")
        finally:
            child.kill()
            child.wait()


def _reason(output: str) -> str:
    """Returns the line of the child's output that says what went wrong."""
    lines = [line for line in output.splitlines() if re.match(r"\w*(Error|Exception|Refused)|.*INVALID_ARGUMENT", line)]
    return (lines or output.splitlines() or ["it ended without a message"])[-1][:300]


def _fingerprint(config: Config, topology: str) -> str:
    """A digest of all that the compiled program depends on: the values, the slice, the versions, and our code of the step."""
    digest = hashlib.sha256(repr((config.generator, config.discriminator, config.loss, config.optim)).encode())
    train, parallel = config.train, config.parallel
    digest.update(repr((train.batch, train.precision, train.batch_norm, config.data.crop)).encode())
    digest.update(repr((parallel.mode, parallel.accumulate, parallel.remat, parallel.optimizer_state, topology)).encode())
    # Another compiler, or another Flax, makes another program.
    digest.update(repr([importlib.metadata.version(name) for name in ("jax", "libtpu", "flax", "optax")]).encode())
    files = [PACKAGE / name for name in PROGRAM_FILES]
    files += [path for room in PROGRAM_ROOMS for path in (PACKAGE / room).glob("*.py")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


# ---- in the child -----------------------------------------------------------------------------------------------------------


def _analysis(config: Config, topology: str) -> dict[str, Any]:
    """Returns `{"fits", "need", "limit", "memory", "flops", "bytes", "cycles", "collectives", "compile_seconds"}`, per device.

    Where the step does not fit, there are only the first three and the time.
    """
    from autoretouch_jax.models import forms
    from autoretouch_jax.runtime import devices
    from autoretouch_jax.training.compilation import lowered_step
    from autoretouch_jax.training.state import make_networks

    started = time.monotonic()
    # This process runs on a CPU, and compiles for another device.
    with forms.plain():
        lowered = lowered_step(config, *make_networks(config), devices.mesh_of_slice(topology))
    try:
        compiled = lowered.compile()
    # A step that does not fit is a result. Any other error ends the child, and the caller shows its last line.
    except Exception as error:
        needed = _need_and_limit(str(error))
        if needed is None:
            raise
        return {"fits": False, "need": needed[0], "limit": needed[1], "compile_seconds": time.monotonic() - started}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "fits": True,
        "memory": {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds} | {"peak": memory.peak_memory_in_bytes},
        "flops": compiled.cost_analysis()["flops"],
        "bytes": bytes_through_memory(text),
        "cycles": estimated_cycles(text),
        "collectives": collectives(text),
        "compile_seconds": time.monotonic() - started,
    }


def _need_and_limit(message: str) -> tuple[float, float] | None:
    """Reads the bytes that a step needs and has from the message by which XLA refuses it; None for another message."""
    size = r"\(([\d.]+)([GMK])\)"
    match = re.search(rf"required for .+? {size} exceeds available HBM {size}", message)
    if match is None:
        return None
    unit = {"G": 2**30, "M": 2**20, "K": 2**10}
    return float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]]


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Returns `{kind: {"count", "bytes"}}` of a compiled module's text: its collectives, and the bytes of their results."""
    totals: dict[str, dict[str, int]] = {}
    # A collective may be asynchronous, as a pair of start and done: only the start is counted.
    for shapes, kind, started in re.findall(rf"= (.+?) ({COLLECTIVES})(-start)?\(", text):
        sizes = [array_bytes(dtype, sides) for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes) if dtype in BYTES]
        if started and kind == "all-gather":  # its result names the operands too
            sizes = sizes[len(sizes) // 2 :]
        entry = totals.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(sizes)
    return totals


if __name__ == "__main__":
    requested = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_text(json.dumps(_analysis(*requested)))
