"""What a run that goes on is told: whether its data are still the same, and where its learning rate jumps."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.config.resume import stored_values
from autoretouch_jax.data.sources import Source
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import storage
from autoretouch_jax.training import manifest, optimizers
from autoretouch_jax.training.manifest import Manifest, read_manifest

JUMP = 1.5  # a rise of the learning rate by this factor is worth a message


def describe_data(source: Source) -> dict[str, Any]:
    """Returns what `data.json` says about the data: how many examples, and a digest of their names."""
    names = hashlib.sha256("\n".join(source.names).encode()).hexdigest()
    return {"examples": len(source), "names": names, "license": source.license}


def read_data(workdir: Any) -> dict[str, Any]:
    """Returns what `data.json` says, or {} for a run of an earlier version, and where the file is damaged."""
    try:
        return dict(json.loads((workdir / "data.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_data(workdir: Any, source: Source, data: Manifest, start_license: str | None) -> None:
    """Writes `manifest.json` and `data.json`.

    `start_license` is that of the data on which the model to start from was trained.
    """
    storage.write(workdir / manifest.FILE, data.to_json())
    content = describe_data(source) | {"start_license": start_license}
    storage.write(workdir / "data.json", json.dumps(content, indent=2) + "\n")


def check_data(workdir: Any, source: Source, now: Manifest, clock: dict[str, Any], moved: list[str], accept: bool) -> list[str]:
    """Compares the data with those of the last start, and of the checkpoint whose `clock` is given. Returns messages.

    `moved` are the keys whose path has changed. Raises Refused, naming what has changed, unless the change is to be accepted.
    """
    before, keys = read_manifest(workdir), ", ".join(f"--{key.replace('_', '-')}" for key in moved)
    saved = str(clock.get("data", ""))
    # A start that accepted other data may have ended before its first checkpoint; then both sets are the run's own.
    if now.digest == saved or (before and now.digest == before.digest):
        return [f"{keys}: at another path than before, with the same files"] if moved else []
    if before:
        changes = before.changes_to(now)
    else:  # an earlier version knew the names alone
        old, new = read_data(workdir), describe_data(source)
        same = all(old.get(key) == new[key] for key in ("examples", "names"))
        if not saved.startswith(f"{manifest.FORMAT}:") and (same or not old):
            return [f"{keys}: at another path than before, with the same names"] if moved else []
        changes = f"{old.get('examples')} examples there, {new['examples']} here, or other names, files or weights"
    if accept:
        return [f"the data have changed since the last start: {changes}. From here on this is another run"]
    raise Refused(
        f"{keys or '--data'}: other data than the run in {workdir} was started with: {changes}. Give the same data, go on with "
        "the changed ones by --data.on-change accept, or choose another --workdir and --train.start-from"
    )


def rate_jump(config: Config, stored: Any, step: int) -> str | None:
    """Returns a message where the learning rate at `step` rises, against the config.json at the path `stored`, else None."""
    before = stored_values(stored)
    steps = before.get("train.steps") or config.train.steps
    optim = dataclasses.replace(config.optim, generator_lr=before.get("optim.generator_lr", config.optim.generator_lr))
    # The last step that was made, because at the very end of a run the rate would be zero.
    old = optim.generator_lr * float(optimizers.schedule(optim, steps, np.int32(max(0, step - 1))))
    new = config.optim.generator_lr * float(optimizers.schedule(config.optim, config.train.steps, np.int32(step)))
    if new < JUMP * old:
        return None
    return (
        f"the learning rate rises from {old:.2g} to {new:.2g} at step {step}, because --train.steps or "
        f"--optim.generator-lr has changed ({steps} steps before, {config.train.steps} now); "
        f"--optim.generator-lr {config.optim.generator_lr * old / new:.2g} would go on smoothly"
    )
