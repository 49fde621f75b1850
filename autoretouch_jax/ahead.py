"""Compile the real step for a TPU slice that is not here. Runs as a process of its own: `python -m autoretouch_jax.ahead`.

libtpu, the compiler, comes with the extra `plan` (0.5 GB). It must be told not to look for a TPU, and a process that has it
loaded is good for nothing else; so the caller starts a child, which leaves its findings in a JSON file.
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

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
LIMIT_SECONDS = 3600


def compile_for(config: Config, topology: str, cache: Path) -> dict[str, Any]:
    """What XLA says of the step of `config` on the slice: see `_analysis`; kept in `cache`, so that it is compiled once.

    Raises Refused when libtpu is missing or the slice is unknown to it.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise Refused("libtpu, the compiler for TPUs (0.5 GB), is not installed: pip install 'autoretouch-jax[plan]'")
    kept = cache / f"{_fingerprint(config, topology)}.json"
    if kept.is_file():
        return json.loads(kept.read_text()) | {"cached": True}
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder) / "request", Path(folder) / "result.json"
        request.write_bytes(pickle.dumps((config, topology)))
        environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        command = [sys.executable, "-m", "autoretouch_jax.ahead", str(request), str(result)]
        with (Path(folder) / "log").open("w+") as log:
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            _wait(child, f"compiling for {topology}, crop {config.data.crop}, batch {config.train.batch}")
            log.seek(0)
            said = log.read().strip()
        if not result.is_file():
            raise Refused(f"--topology {topology}: could not be compiled for: {_reason(said)}")
        found = json.loads(result.read_text())
    cache.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found, indent=2) + "\n")
    part.replace(kept)
    return found | {"cached": False}


def _wait(child: subprocess.Popen, what: str) -> None:
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


def _reason(said: str) -> str:
    lines = [line for line in said.splitlines() if re.match(r"\w*(Error|Exception|Refused)|.*INVALID_ARGUMENT", line)]
    return (lines or said.splitlines() or ["it ended without a word"])[-1][:300]


def _fingerprint(config: Config, topology: str) -> str:
    """Of everything the compiled program depends on: the values, the slice, the versions, and our own code of the step."""
    digest = hashlib.sha256(repr((config.generator, config.discriminator, config.loss, config.optim)).encode())
    train, parallel = config.train, config.parallel
    digest.update(repr((train.batch, train.precision, train.batch_norm, config.data.crop)).encode())
    digest.update(repr((parallel.mode, parallel.accumulate, parallel.remat, parallel.optimizer_state, topology)).encode())
    digest.update(repr([importlib.metadata.version(name) for name in ("jax", "libtpu", "flax", "optax")]).encode())
    home = Path(__file__).parent
    parts = [
        home / name for name in ("training/losses.py", "training/optim.py", "training/program.py", "parallel.py", "ahead.py")
    ]
    for path in sorted([*home.glob("models/*.py"), *home.glob("training/s*.py"), *parts]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _analysis(config: Config, topology: str) -> dict[str, Any]:
    """In the child: `{"fits", "need", "limit", "memory", "flops", "bytes", "collectives", "compile_seconds"}`, per device."""
    from autoretouch_jax import parallel
    from autoretouch_jax.training.program import lowered_step
    from autoretouch_jax.training.state import make_networks

    started = time.monotonic()
    lowered = lowered_step(config, *make_networks(config), parallel.mesh_of_slice(topology))
    try:
        compiled = lowered.compile()
    except Exception as error:
        if not (
            found := re.search(r"required for (.+?) \(([\d.]+)([GMK])\) exceeds available HBM \(([\d.]+)([GMK])\)", str(error))
        ):
            raise
        need, limit = (
            float(number) * {"G": 2**30, "M": 2**20, "K": 2**10}[unit]
            for number, unit in (found.group(2, 3), found.group(4, 5))
        )
        return {"fits": False, "need": need, "limit": limit, "compile_seconds": time.monotonic() - started}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "fits": True,
        "memory": {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds} | {"peak": memory.peak_memory_in_bytes},
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": time.monotonic() - started,
    }


def collectives(text: str) -> dict[str, dict[str, int]]:
    """`{kind: {"count", "bytes"}}` of a compiled module's text: how often it communicates, and what comes out of it."""
    found: dict[str, dict[str, int]] = {}
    for shapes, kind, started in re.findall(rf"= (.+?) ({COLLECTIVES})(-start)?\(", text):
        sizes = [_size(dtype, sides) for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes) if dtype in BYTES]
        if started and kind == "all-gather":  # its result names the operands too
            sizes = sizes[len(sizes) // 2 :]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(sizes)
    return found


def _size(dtype: str, sides: str) -> int:
    size = BYTES[dtype]
    for side in filter(None, sides.split(",")):
        size *= int(side)
    return size


if __name__ == "__main__":
    asked = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_text(json.dumps(_analysis(*asked)))
