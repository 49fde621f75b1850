"""What a sweep found: a table, a plot, and the winner's config as a file that `train` accepts."""

import csv
import dataclasses
import pprint
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from optuna.trial import TrialState

from autoretouch_jax import config as configs
from autoretouch_jax.config import Config


def write(sweep: Any, study: Any) -> int:
    """Print the table; write `trials.csv`, `sweep.png` and `best.py`. Returns the exit status: 1 when no trial was finished."""
    trials = sorted(study.get_trials(deepcopy=False), key=_score, reverse=True)
    rows = [_row(sweep, trial) for trial in trials]
    with (sweep.workdir / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(_table(rows))
    _plot(sweep, study, sweep.workdir / "sweep.png")
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        print(f"{sweep.workdir}: no trial was finished; see the reasons above")
        return 1
    best = study.best_trial
    config = configs.with_values(sweep.config, best.params)
    described = (
        f"Trial {best.number} of the sweep {sweep.workdir.name}: {sweep.metric} {best.value:.4f} on the validation pairs."
    )
    (sweep.workdir / "best.py").write_text(as_python(config, described))
    print(f"{described}\nIts config: {sweep.workdir / 'best.py'}; its model: {sweep.folder(best.number) / 'model'}")
    return 0


def as_python(config: Config, described: str) -> str:
    """A config file with every value written out."""
    kinds = sorted({type(getattr(config, name)).__name__ for name in ("generator", "discriminator")})
    others = sorted({type(getattr(config, field.name)).__name__ for field in dataclasses.fields(config)} - set(kinds))
    names = ", ".join(sorted({"BlemishConfig", "Config", *others}))
    imports = f"from autoretouch_jax.architecture import {', '.join(kinds)}\nfrom autoretouch_jax.config import {names}"
    return f'"""{described}"""\n\n{imports}\n\nconfig = {pprint.pformat(config, width=120)}\n'


def _score(trial: Any) -> tuple[bool, float, float]:
    """Finished trials first, by value; then by how far they came."""
    done, last = trial.state == TrialState.COMPLETE, max(trial.intermediate_values, default=-1)
    return done, 0.0 if done else last, trial.intermediate_values.get(last, float("-inf"))


def _row(sweep: Any, trial: Any) -> dict[str, Any]:
    last = max(trial.intermediate_values, default=0)
    state = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early"}.get(trial.state, trial.state.name.lower())
    values = {key: trial.params.get(key) for key in sweep.space}
    found = trial.intermediate_values.get(last)
    return {
        "trial": trial.number,
        "state": state,
        "steps": last,
        sweep.metric: found,
        **values,
        "reason": trial.user_attrs.get("failed", ""),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str("–" if value is None else value) for value in row.values()]
        for row in rows
    ]
    cells.insert(0, list(rows[0]))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _plot(sweep: Any, study: Any, path: Path) -> None:
    """The metric against each value that was searched, and over the steps of each trial."""
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
        axis.scatter(
            [str(value) for value in chosen] if hasattr(kind, "choices") else chosen, [trial.value for trial in finished]
        )
        axis.set(xlabel=key, title="finished trials", xscale="log" if getattr(kind, "log", False) else axis.get_xscale())
    figure.savefig(path, dpi=120)
    plt.close(figure)
