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
from autoretouch_jax.training import optimizers

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


def write_data(workdir: Any, source: Source, start_license: str | None) -> None:
    """Writes `data.json`. `start_license` is that of the data on which the model to start from was trained."""
    content = describe_data(source) | {"start_license": start_license}
    storage.write(workdir / "data.json", json.dumps(content, indent=2) + "\n")


def check_data(workdir: Any, source: Source, moved: list[str]) -> list[str]:
    """Returns messages about data that have changed since the last start. `moved` are the keys whose path has changed.

    Raises Refused when the data have moved and are not the same: the run would go on with others.
    """
    before, now = read_data(workdir), describe_data(source)
    same = {key: before.get(key) for key in ("examples", "names")} == {key: now[key] for key in ("examples", "names")}
    keys = ", ".join(f"--{key.replace('_', '-')}" for key in moved)
    if same or not before:
        return [f"{keys}: at another path than before, with the same names"] if moved else []
    counts = f"{before.get('examples')} examples there, {now['examples']} here"
    if moved:
        raise Refused(
            f"{keys}: holds other data than the run in {workdir} was started with ({counts}, or other names); "
            "give the same data, or choose another --workdir and --train.start-from"
        )
    return [f"the data have changed since the last start ({counts}, or other names): from here on this is another run"]


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
