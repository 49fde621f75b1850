"""`report.html`: the state of a run as one page that opens anywhere. It says first whether the run is healthy."""

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from autoretouch_jax.evaluation.metrics import score
from autoretouch_jax.evaluation.report import COLUMNS, cell
from autoretouch_jax.runtime import storage
from autoretouch_jax.training import history
from autoretouch_jax.training.curves import Curve, chart, environment
from autoretouch_jax.training.history import History, Points, items, number, scores
from autoretouch_jax.training.report_pictures import faces

LEVELS = ("good", "note", "warning", "bad")  # from the best to the worst
HEADLINES = {"good": "Healthy", "note": "No problem found", "warning": "Needs attention", "bad": "Not healthy"}
# Metrics of which more, or less, is better than doing nothing. Doing nothing never harms, so the others have no winner.
BETTER = {
    **dict.fromkeys(("psnr_pooled", "psnr_rgb_u8", "ssim_rgb_u8_gauss11", "edit_psnr_pooled", "edit_recovered"), 1),
    "lpips": -1,
}
SHOWN_EVENTS, SHOWN_WORST = 60, 8
RECENT = 20  # logged lines over which speed is taken: their median is not moved by a validation or a restart


def write_report(workdir: Any, config_json: dict[str, Any] | None = None) -> None:
    """Writes `report.html` from what the run has written into `workdir` so far.

    `workdir` is a `Path` or one in an object store; `config_json` replaces what `config.json` says. Missing or cut files
    are left out. Raises OSError when the page cannot be written.
    """
    storage.write(workdir / "report.html", render(workdir, config_json))


def render(workdir: Any, config_json: dict[str, Any] | None = None) -> str:
    """Returns the page. No request leaves it: pictures, styles and scripts are inside."""
    run = history.read(workdir)
    config = run.config if config_json is None else config_json
    shown = faces(workdir)
    return (
        environment("autoretouch_jax.training")
        .get_template("report.html")
        .render(
            name=workdir.name or str(workdir),
            health=health(run),
            facts=_facts(run, config),
            progress=_progress(run, config),
            written=time.time(),
            written_text=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            table=validation_table(run),
            charts=_chart_groups(run),
            faces=shown,
            pictures=[{key: face[key] for key in ("source", "target", "outputs")} for face in shown],
            worst=_worst(run),
            changed=_most_changed(run),
            events=list(reversed(run.events))[:SHOWN_EVENTS],
            event_count=len(run.events),
            config=list(flat(config)),
            license=run.license,
        )
    )


def health(run: History) -> dict[str, Any]:
    """Returns the `level` of the run, a `headline` in words, and the `sentences` that explain it."""
    sentences = [{"text": str(event.get("text", "")), "level": level_of(event)} for event in run.verdicts]
    # What ended the run for good comes after any verdict.
    if run.ending and run.ending["kind"] == "gave_up":
        sentences.insert(0, {"text": str(run.ending.get("text", "the run gave up")), "level": "bad"})
    if not sentences:
        return {"level": "note", "headline": "No verdict yet", "sentences": []}
    level = max((sentence["level"] for sentence in sentences), key=LEVELS.index)
    sentences.sort(key=lambda sentence: -LEVELS.index(sentence["level"]))
    # Notes without a good word are those of the first steps, and of a run of which nothing else is known.
    alone = all(sentence["level"] == "note" for sentence in sentences)
    return {"level": level, "headline": "Too early to tell" if alone else HEADLINES[level], "sentences": sentences}


def level_of(event: dict[str, Any]) -> str:
    """Returns an event's level, `note` where it names no known one."""
    return event["level"] if event.get("level") in LEVELS else "note"


def state_of(run: History) -> str:
    """Returns whether the run trains, in a few words."""
    words = {"done": "finished", "stopped": "stopped early, can be resumed", "gave_up": "gave up"}
    return words[run.ending["kind"]] if run.ending else "no end noted: it trains, or was killed"


def images_per_second(run: History) -> float | None:
    """Returns the usual speed of late, in images per second, or None."""
    return _recent(run, "images_per_s")


def input_wait(run: History) -> float | None:
    """Returns the share of the time, of late, in which the devices waited for input, or None."""
    return _recent(run, "input_wait_share")


def validation_table(run: History) -> dict[str, Any] | None:
    """Returns `columns` and `rows` of the last validation and the best one beside doing nothing, or None without any."""
    if not run.validations:
        return None
    last, best = run.validations[-1], run.best
    rows = [("doing nothing", scores(last, "identity"))]
    if best and best is not last:
        rows.append((f"best, step {best['step']:,}", scores(best, "model")))
    rows.append((f"last, step {last['step']:,}" + (" (the best)" if best is last else ""), scores(last, "model")))
    keys = [key for key in COLUMNS if any(key in values for _, values in rows[1:])]
    # All rows are compared with doing nothing on the pairs of the last validation.
    identity = rows[0][1]
    cells = [(name, [(cell(key, values), _compared(key, values, identity)) for key in keys]) for name, values in rows]
    decides = COLUMNS.get(str(last.get("metric")), (last.get("metric"), ""))[0]
    return {"columns": [COLUMNS[key][0] for key in keys], "rows": cells, "decides": decides, "n": number(last.get("n"))}


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the keys of nested groups, such as `train.steps`, with their values as text."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


# ---- progress ---------------------------------------------------------------------------------------------------------------


def steps_of(config: dict[str, Any], key: str = "steps") -> int:
    """Returns a number of the group `train`, 0 where it is not known."""
    train = config.get("train")
    return int(number(train.get(key)) or 0) if isinstance(train, dict) else 0


def _progress(run: History, config: dict[str, Any]) -> dict[str, Any]:
    steps = steps_of(config)
    return {"step": run.step, "steps": steps, "share": min(1.0, run.step / steps) if steps else None}


def _facts(run: History, config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the top: a name, a value, and a remark."""
    # A figure that would say nothing, such as no skipped update, is left out: the first screen is small.
    steps, speed, wait = steps_of(config), images_per_second(run), input_wait(run)
    seconds, skipped, rate = run.last("seconds"), run.last("guard/skipped"), run.last("guard/rate")
    facts = [("step", f"{run.step:,}", f"of {steps:,}" if steps else ""), ("state", state_of(run), "")]
    if seconds is not None:
        left = (steps - run.step) * steps_of(config, "batch") / speed if speed and steps else 0
        facts.append(
            ("time trained", _duration(seconds), f"about {_duration(left)} left" if left > 0 and not run.ending else "")
        )
    if speed is not None:
        facts.append(("speed", f"{speed:,.1f}", "images/s"))
    if wait is not None:
        facts.append(("input wait", f"{wait:.0%}", "of the time"))
    if (identity := run.last("loss/pixel_identity")) and (loss := run.last("loss/pixel")) is not None:
        gap = f"{abs(1 - loss / identity):.0%} {'below' if loss < identity else 'above'} doing nothing"
        facts.append(("pixel loss", f"{loss:.3g}", gap))
    if skipped:
        facts.append(("updates skipped", f"{skipped:,.0f}", "not finite or too large"))
    if rate is not None and rate != 1:
        facts.append(("learning rate", f"× {rate:g}", "by the guard"))
    if bad := run.last("bad_examples"):
        facts.append(("bad examples", f"{bad:,.0f}", "replaced by others"))
    return facts


def _recent(run: History, key: str) -> float | None:
    values = [value for _, value in run.curve(key)[-RECENT:] if value is not None]
    return statistics.median(values) if values else None


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


# ---- tables -----------------------------------------------------------------------------------------------------------------


def _compared(key: str, values: dict[str, Any], identity: dict[str, Any]) -> str:
    """The style of a cell: better or worse than doing nothing."""
    value, other = score(values, key), score(identity, key)
    if values is identity or key not in BETTER or value is None or other is None or value == other:
        return ""
    return "good" if (value > other) == (BETTER[key] > 0) else "bad"


def _worst(run: History) -> list[tuple[str, str, str, str, str]]:
    """The images of the last validation with the smallest gain over doing nothing: name, gain, PSNR of both, edit recovered."""
    rows = []
    for image in items(run.validations[-1] if run.validations else None, "images"):
        model, identity = scores(image, "model"), scores(image, "identity")
        ours, theirs = number(model.get("psnr_rgb_u8")), number(identity.get("psnr_rgb_u8"))
        if ours is not None and theirs is not None:
            rows.append((ours - theirs, image["name"], ours, theirs, cell("edit_recovered", model)))
    rows.sort(key=lambda row: row[0])  # the means above hide that single images may be worse than doing nothing
    return [
        (name, f"{gain:+.2f} dB", f"{ours:.2f}", f"{theirs:.2f}", recovered)
        for gain, name, ours, theirs, recovered in rows[:SHOWN_WORST]
    ]


def _most_changed(run: History) -> list[tuple[str, str, str]]:
    """The photographs of the last validation that should not change and changed most: name, error, share left identical."""
    photographs = [
        (error, item["name"], scores(item, "model"))
        for item in items(run.validations[-1] if run.validations else None, "alone")
        if (error := number(scores(item, "model").get("alone_error"))) is not None
    ]
    photographs.sort(key=lambda row: -row[0])
    shown = ("alone_error", "alone_identical")
    return [(name, *(cell(key, values) for key in shown)) for _, name, values in photographs[:SHOWN_WORST]]


# ---- curves -----------------------------------------------------------------------------------------------------------------


def _chart_groups(run: History) -> list[tuple[str, list[dict[str, Any]]]]:
    """The charts under their headings. A chart without a value is left out."""
    marks = [
        (event["step"], level_of(event), f"{event['kind']}, step {event['step']}: {event.get('text', '')}")
        for event in run.events
        if event.get("kind") in ("rollback", "gave_up")
    ][:SHOWN_EVENTS]

    def charts(*specs: tuple[str, list[Curve], dict[str, Any]]) -> list[dict[str, Any]]:
        return [drawn for title, curves, options in specs if (drawn := chart(title, curves, marks=marks, **options))]

    return [
        ("Is it better than doing nothing?", charts(*_quality(run))),
        ("Do the losses behave?", charts(*_losses(run))),
        ("Is it fast?", charts(*_speed(run))),
    ]


def _quality(run: History) -> Iterator[tuple[str, list[Curve], dict[str, Any]]]:
    nothing = Curve("doing nothing", run.curve("loss/pixel_identity"), dashed=True)
    yield (
        "Pixel loss",
        [Curve("model", run.curve("loss/pixel")), nothing],
        {"hint": "training crops; should fall below the dashed line"},
    )
    identity = Curve("doing nothing", run.validation("psnr_pooled", "identity"), dashed=True)
    psnr = [Curve("model", run.validation("psnr_pooled")), identity]
    yield "Validation PSNR", psnr, {"unit": "dB", "hint": "should rise above the dashed line"}
    made = [Curve("training crops", _edit_made(run)), Curve("validation", run.validation("edit_recovered"))]
    # By its definition doing nothing recovers nothing, so its line needs no measurement.
    zero: Points = [(step, 0.0) for step, _ in made[1].points or made[0].points]
    yield "Edit recovered", [*made, Curve("doing nothing", zero, dashed=True)], {"hint": "1 is all of the retoucher's edit"}
    outside = [
        Curve("training crops", run.curve("edit/outside")),
        Curve("validation", run.validation("outside_error")),
        Curve("leave-alone photographs", run.validation("alone_error")),
    ]
    yield "Change where nothing should change", outside, {"unit": "/255", "hint": "doing nothing is 0"}


def _losses(run: History) -> Iterator[tuple[str, list[Curve], dict[str, Any]]]:
    names = sorted({key for record in run.metrics for key in record if key.startswith("loss/")})
    shown = [name for name in names if name not in ("loss/pixel", "loss/pixel_identity")]
    yield (
        "Losses",
        [Curve(name.removeprefix("loss/"), run.curve(name)) for name in shown],
        {"log": True, "hint": "logarithmic where they lie far apart"},
    )
    logits = [Curve(name, run.curve(f"logits/{name}")) for name in ("real", "fake")]
    yield "Discriminator: logits", logits, {"hint": "should stay apart by a little, and not run away"}
    accuracy = [Curve(name, _times(run.curve(f"accuracy/{name}"), 100)) for name in ("real", "fake")]
    # Half of the answers are right by chance.
    half: Points = [(step, 50.0) for step, _ in accuracy[0].points]
    chance = Curve("chance", half, dashed=True)
    yield (
        "Discriminator: accuracy",
        [*accuracy, chance],
        {"unit": "%", "hint": "100 % on both for long: it has won, and teaches little"},
    )
    norms = [Curve(name, run.curve(f"{name}_gradient_norm")) for name in ("generator", "discriminator")]
    yield "Gradient norms", norms, {"log": True}
    shares = sorted({key for record in run.metrics for key in record if key.startswith("share/")})
    curves = [Curve(name.removeprefix("share/"), _times(run.curve(name), 100)) for name in shares]
    yield "Share of each loss in the gradient", curves, {"unit": "%"}
    yield "Learning rate", [Curve("generator", run.curve("learning_rate"))], {}


def _speed(run: History) -> Iterator[tuple[str, list[Curve], dict[str, Any]]]:
    yield "Images per second", [Curve("images/s", run.curve("images_per_s"))], {}
    wait = [Curve("waiting", _times(run.curve("input_wait_share"), 100))]
    yield "Time spent waiting for input", wait, {"unit": "%", "hint": "should be near 0"}


def _edit_made(run: History) -> Points:
    """Which share of the edit the model makes on the training crops."""
    left, drawn = run.curve("edit/left"), dict(run.curve("edit/drawn"))
    return [(step, 1 - value / whole if value is not None and (whole := drawn.get(step)) else None) for step, value in left]


def _times(points: Points, factor: float) -> Points:
    return [(step, None if value is None else value * factor) for step, value in points]
