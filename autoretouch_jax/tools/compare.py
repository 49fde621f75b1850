"""`autoretouch compare`: runs side by side, in a table and as curves over one another on a page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoretouch_jax.errors import EXIT_DONE, Refused
from autoretouch_jax.evaluation.report import COLUMNS, cell
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.tables import text_table
from autoretouch_jax.training import history
from autoretouch_jax.training.curves import Curve, chart, environment
from autoretouch_jax.training.history import History, Points, scores
from autoretouch_jax.training.report import (
    flat,
    health,
    images_per_second,
    input_wait,
    state_of,
)

Runs = dict[str, History]  # a run under its shortest distinct name
# What differs between any two runs and says nothing about them.
PLACES = ("workdir", "data.cache")
CHARTS = (("loss/pixel", "Pixel loss", ""), ("loss/generator", "Generator loss", ""), ("images_per_s", "Images per second", ""))


def run(paths: Sequence[str], html: Path | None) -> int:
    """Prints the table and the config keys that differ, and writes the page. Returns the exit status.

    Raises Refused for a path that is not a run.
    """
    runs = _read(paths)
    header, rows = table(runs)
    print(text_table(header, rows, left=(0, len(header) - 1)))
    if len({_pairs(run) for run in runs.values() if run.validations}) > 1:
        print("the runs were validated on different numbers of pairs, or doing nothing scores differently: compare with care")
    differing = differing_keys(runs)
    if len(runs) > 1:
        print("\nconfig keys that differ:" + ("" if differing else " none"))
    if differing:
        print(text_table(["", *runs], [[key, *values] for key, values in differing]))
    if html:
        storage.write_output(html, page(runs))
        print(f"\n{html}: the curves over one another")
    return EXIT_DONE


def table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows as text: one for doing nothing, where a run was validated, and one for each run."""
    chosen = {name: run.best or (run.validations[-1] if run.validations else None) for name, run in runs.items()}
    validated = [record for record in chosen.values() if record]
    keys = [key for key in COLUMNS if any(key in scores(record, "model") for record in validated)]
    header = ["run", "step", "best at", *(COLUMNS[key][0] for key in keys), "images/s", "input wait", "verdict"]
    rows = []
    # Of runs that were validated on different pairs the first one gives this row; `run` says so.
    if validated:
        identity = scores(validated[0], "identity")
        rows.append(["doing nothing", "", "", *(cell(key, identity) for key in keys), "", "", ""])
    for name, run in runs.items():
        record = chosen[name]
        values = scores(record, "model") if record else {}
        speed, wait = images_per_second(run), input_wait(run)
        figures = ["–" if speed is None else f"{speed:.1f}", "–" if wait is None else f"{wait:.0%}"]
        best = f"{record['step']:,}" if record else "–"
        # The sentences are in each run's report; a table has room for the headline.
        verdict = f"{health(run)['headline'].lower()}, {state_of(run)}"
        rows.append([name, f"{run.step:,}", best, *(cell(key, values) for key in keys), *figures, verdict])
    return header, rows


def differing_keys(runs: Runs) -> list[tuple[str, list[str]]]:
    """Returns the config keys whose values are not the same in all runs, with the values. A missing key is a dash."""
    configs = [dict(flat(run.config)) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config if key not in PLACES)
    values = {key: [config.get(key, "–") for config in configs] for key in keys}
    return [(key, found) for key, found in values.items() if len(set(found)) > 1]


def page(runs: Runs) -> str:
    """Returns the page: the table, the curves over one another, and the config keys that differ. No request leaves it."""
    header, rows = table(runs)
    drawn = [*_validation_charts(runs), *(_training_chart(runs, *spec) for spec in CHARTS)]
    return (
        environment("autoretouch_jax.tools")
        .get_template("compare.html")
        .render(header=header, rows=rows, charts=[c for c in drawn if c], names=list(runs), differing=differing_keys(runs))
    )


def _validation_charts(runs: Runs) -> list[dict[str, Any] | None]:
    charts = []
    for key, (title, _) in COLUMNS.items():
        curves = [Curve(name, run.validation(key)) for name, run in runs.items()]
        # Runs that were validated on the same pairs share the line of doing nothing: the longest one is drawn.
        nothing: Points = max((run.validation(key, "identity") for run in runs.values()), key=len)
        shown = any(curve.points for curve in curves)
        charts.append(chart(f"Validation: {title}", [*curves, Curve("doing nothing", nothing, True)]) if shown else None)
    return charts


def _training_chart(runs: Runs, key: str, title: str, unit: str) -> dict[str, Any] | None:
    return chart(title, [Curve(name, run.curve(key)) for name, run in runs.items()], unit=unit)


def _pairs(run: History) -> tuple[Any, str]:
    """What two runs that were validated on the same pairs have in common."""
    last = run.validations[-1]
    return last.get("n"), cell("psnr_pooled", scores(last, "identity"))


def _read(paths: Sequence[str]) -> Runs:
    if not paths:
        raise Refused("RUN is missing: name one work directory of train or more, such as runs/a runs/b")
    if len(set(paths)) < len(paths):
        raise Refused("a RUN is named twice; name different work directories")
    found = {}
    # Every path is read before anything is printed.
    for path in paths:
        with storage.reachable(path):
            workdir = storage.open_path(path)
            run = history.read(workdir)
        if not (run.config or run.metrics or run.validations):
            raise Refused(f"{path}: not a run, there is no config.json or metrics.jsonl; name the --workdir of a training")
        found[path.rstrip("/")] = run
    # runs/a and runs/b are shown as a and b, and a/run and b/run as they are.
    names = [os.path.basename(path) for path in found]
    return dict(zip(names, found.values(), strict=True)) if len(set(names)) == len(names) else found
