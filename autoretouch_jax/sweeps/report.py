"""The report of a sweep: a table, a plot, and the best trial's config as a file that `train` accepts."""

import csv
import dataclasses
import pprint
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt
import optuna
from optuna.trial import FrozenTrial, TrialState

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import with_values
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.tables import text_table
from autoretouch_jax.sweeps.definition import Sweep


def write(sweep: Sweep, study: optuna.Study) -> int:
    """Prints the table and writes `trials.csv`, `sweep.png` and `best.py`.

    Returns the exit status: 1 when no trial was finished.
    """
    trials = sorted(study.get_trials(deepcopy=False), key=_rank, reverse=True)
    rows = [_row(sweep, trial) for trial in trials]
    with (sweep.workdir / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(text_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows], left=()))
    _plot(sweep, study, sweep.workdir / "sweep.png")
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        print(f"{sweep.workdir}: no trial was finished; see the reasons above")
        return EXIT_FAILED
    best = study.best_trial
    summary = f"Trial {best.number} of the sweep {sweep.workdir.name}: {sweep.metric} {best.value:.4f} on the validation pairs"
    # The best of a few poor trials may be worse than no retouch at all.
    nothing = best.user_attrs.get("identity")
    summary += "." if nothing is None else f"; doing nothing scores {nothing:.4f}."
    storage.write(sweep.workdir / "best.py", as_python(with_values(sweep.config, best.params), summary))
    print(f"{summary}\nIts config: {sweep.workdir / 'best.py'}; its model: {sweep.folder(best.number) / 'model'}")
    return EXIT_DONE


def as_python(config: Config, docstring: str) -> str:
    """Returns a config file with every value written out."""
    groups = {type(getattr(config, field.name)).__name__ for field in dataclasses.fields(config)}
    names = ", ".join(sorted({"BlemishConfig", "Config", "ValidationConfig", *groups}))
    values = pprint.pformat(config, width=120)
    return f'"""{docstring}"""\n\nfrom autoretouch_jax.config import {names}\n\nconfig = {values}\n'


def _rank(trial: FrozenTrial) -> tuple[bool, float, float]:
    """The sort key of a trial: finished ones rank highest, by value, then the others by the steps they made."""
    done, last = trial.state == TrialState.COMPLETE, max(trial.intermediate_values, default=-1)
    return done, 0.0 if done else last, trial.intermediate_values.get(last, float("-inf"))


def _row(sweep: Sweep, trial: FrozenTrial) -> dict[str, Any]:
    last = max(trial.intermediate_values, default=0)
    state = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early"}.get(trial.state, trial.state.name.lower())
    return {
        "trial": trial.number,
        "state": state,
        "steps": last,
        sweep.metric: trial.intermediate_values.get(last),
        **{key: trial.params.get(key) for key in sweep.space},
        "reason": trial.user_attrs.get("failed", ""),
    }


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(sweep: Sweep, study: optuna.Study, path: Path) -> None:
    """Plots the metric over the steps of each trial, and against each value that was searched."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    figure, axes = plt.subplots(1, len(sweep.space) + 1, figsize=(4 * (len(sweep.space) + 1), 3.6), layout="constrained")
    for trial in trials:
        steps = sorted(trial.intermediate_values)
        done = trial.state == TrialState.COMPLETE
        points = [trial.intermediate_values[step] for step in steps]
        axes[0].plot(steps, points, marker="o", color="tab:blue" if done else "tab:grey", alpha=1 if done else 0.5)
    axes[0].set(xlabel="steps", ylabel=sweep.metric, title="each trial (grey: stopped early)")
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for axis, (key, kind) in zip(axes[1:], sweep.space.items(), strict=True):
        chosen = [trial.params[key] for trial in finished]
        # Choices are shown as names, side by side: they need not be numbers.
        x = [str(value) for value in chosen] if hasattr(kind, "choices") else chosen
        axis.scatter(x, [trial.value for trial in finished])
        axis.set(xlabel=key, title="finished trials", xscale="log" if getattr(kind, "log", False) else axis.get_xscale())
    figure.savefig(path, dpi=120)
    plt.close(figure)
