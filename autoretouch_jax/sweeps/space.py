"""The space of a sweep: keys of the config, and Optuna's distributions of their values."""

import itertools
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial

from autoretouch_jax.errors import Refused

Space = Mapping[str, Any]  # key → Optuna distribution


def read_space(path: Path) -> Space:
    """Returns the `space = {key: distribution}` of a Python file. Raises Refused, naming it, for anything else."""
    if not path.is_file():
        raise Refused(f"--space {path}: no such file; configs/sweeps/lr.py shows how one is written")
    try:
        space = runpy.run_path(str(path)).get("space")
    except Exception as error:
        raise Refused(f"--space {path}: {type(error).__name__}: {error}") from error
    kinds = optuna.distributions.BaseDistribution
    if not isinstance(space, dict) or not space or not all(isinstance(kind, kinds) for kind in space.values()):
        raise Refused(f"--space {path}: must define `space = {{KEY: an optuna.distributions object, …}}`")
    return space


def smallest_values(space: Space) -> dict[str, Any]:
    """Returns one value for each key, the lowest or the first: enough to check whether a trial could run."""
    return {key: kind.choices[0] if hasattr(kind, "choices") else kind.low for key, kind in space.items()}


def endless_keys(space: Space) -> list[str]:
    """Returns the keys whose values cannot be listed, so that no grid can be made of them."""
    return [key for key, kind in space.items() if not _values(kind)]


def grid(space: Space) -> list[dict[str, Any]]:
    """Returns every combination of the values."""
    combinations = itertools.product(*(_values(kind) for kind in space.values()))
    return [dict(zip(space, values, strict=True)) for values in combinations]


def _values(kind: Any) -> list[Any]:
    if hasattr(kind, "choices"):
        return list(kind.choices)
    if not kind.step or kind.log:
        return []
    return [kind.low + i * kind.step for i in range(round((kind.high - kind.low) / kind.step) + 1)]


def trial_values(trial: Trial, space: Space) -> dict[str, Any]:
    """Returns a trial's values. Optuna draws them once and returns the same ones ever after."""
    return {key: _suggest(trial, key, kind) for key, kind in space.items()}


def _suggest(trial: Trial, key: str, kind: Any) -> Any:
    if hasattr(kind, "choices"):
        return trial.suggest_categorical(key, kind.choices)
    suggest: Any = trial.suggest_int if isinstance(kind, optuna.distributions.IntDistribution) else trial.suggest_float
    return suggest(key, kind.low, kind.high, step=kind.step, log=kind.log)
