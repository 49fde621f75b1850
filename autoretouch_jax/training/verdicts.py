"""Says in words how a run is doing, from its last logged lines and its validations, and what to change.

The limits are ours. Each rule is a function: the lines → a sentence and its level, or None.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.evaluation.metrics import score
from autoretouch_jax.evaluation.report import cell
from autoretouch_jax.runtime.cores import MOST_INPUT_THREADS, cores, input_threads

RECENT = 2000  # steps that a verdict looks back on
# Nothing is said about the networks before this step, or this share of a shorter run: at first every one of them does nothing.
EARLY, EARLY_SHARE = 500, 0.8

Line = dict[str, Any]  # a line of metrics.jsonl or of validation.jsonl


class Verdict(NamedTuple):
    """A sentence about the run, and how bad it is: `good`, `note`, `warning` or `bad`."""

    level: str
    text: str


def judge(lines: Sequence[Line], rows: Sequence[Line], config: Config) -> list[Verdict]:
    """Returns what is to be said about a run, the worst first. `lines` are logged, `rows` are validations, oldest first."""
    if not lines:
        return []
    step = lines[-1]["step"]
    recent = [line for line in lines if line["step"] > step - RECENT]
    if step < min(EARLY, EARLY_SHARE * (config.train.steps or EARLY)):
        troubles = [verdict for rule in _FROM_THE_START if (verdict := rule(recent, rows, config))]
        return troubles or [Verdict("note", f"It is too early to tell: {step} steps.")]
    found = [verdict for rule in _RULES if (verdict := rule(recent, rows, config))]
    order = ("bad", "warning", "note", "good")
    found.sort(key=lambda verdict: order.index(verdict.level))
    if not found or found[0].level in ("note", "good"):
        found.append(Verdict("good", _progress(recent, rows)))
    return found


def _mean(lines: Sequence[Line], key: str) -> float | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return float(np.mean(values)) if values else None


def _made(lines: Sequence[Line]) -> float | None:
    """The share of the edit that the generator makes in training: 0 none, 1 all, negative where it makes matters worse."""
    left, drawn = _mean(lines, "edit/left"), _mean(lines, "edit/drawn")
    return 1 - left / drawn if left is not None and drawn else None


def _progress(lines: Sequence[Line], rows: Sequence[Line]) -> str:
    made = _made(lines)
    text = "The run is healthy."
    if made is not None:
        text += f" On training crops {made:.0%} of the edit is made."
    if rows and (best := next((row for row in reversed(rows) if row.get("best")), None)):
        key = best["metric"]
        text += f" The best validation is that of step {best['step']}: {key} {cell(key, best['model'])}."
    if not rows:
        text += " Without a validation (data.validation) nothing is known about images that it is not trained on."
    return text


# ---- the rules --------------------------------------------------------------------------------------------------------------


def _skips(lines: Sequence[Line], _rows: Sequence[Line], _config: Config) -> Verdict | None:
    counts = [line["guard/skipped"] for line in lines if line.get("guard/skipped") is not None]
    skipped = counts[-1] - counts[0] if counts else 0
    share = skipped / max(1, lines[-1]["step"] - lines[0]["step"])
    if share < 0.01 or skipped < 5:
        return None
    return Verdict(
        "warning",
        f"The guard has skipped {share:.1%} of the last updates: lower --optim.generator-lr, or set --optim.clip-norm 1.",
    )


def _went_back(lines: Sequence[Line], _rows: Sequence[Line], _config: Config) -> Verdict | None:
    rate = lines[-1].get("guard/rate")
    if rate is None or rate >= 1:
        return None
    return Verdict(
        "warning",
        f"The run went astray and has gone back: the guard multiplies the learning rates by {rate:.2g} since then. "
        "If it goes back again, start anew with a lower --optim.generator-lr.",
    )


def _does_nothing(lines: Sequence[Line], _rows: Sequence[Line], _config: Config) -> Verdict | None:
    made, outside = _made(lines), _mean(lines, "edit/outside")
    if made is None or abs(made) > 0.02 or (outside or 0) > 0.5:
        return None
    return Verdict(
        "warning",
        f"The generator does nothing yet: {made:.1%} of the edit is made. Raise --loss.edit-weight, crop around the edits "
        "with --data.edit-crops 0.5, or look at the pairs: do source and target differ?",
    )


def _worse_than_nothing(lines: Sequence[Line], _rows: Sequence[Line], config: Config) -> Verdict | None:
    pixel, identity = _mean(lines, "loss/pixel"), _mean(lines, "loss/pixel_identity")
    if lines[-1]["step"] < 0.05 * config.train.steps or pixel is None or not identity or pixel < 1.2 * identity:
        return None
    worse = f"The output is {pixel / identity:.1f} times as far from the target as the source is"
    if config.optim.decay_share and _mean(lines, "learning_rate") == lines[-1].get("learning_rate"):
        # Measured with Muon: all of the gain came while the rate fell.
        return Verdict("note", f"{worse}. At a constant learning rate this is usual; it should end when the rate falls.")
    return Verdict("warning", f"{worse}: lower --optim.generator-lr or the weight of the adversarial loss.")


def _discriminator_wins(lines: Sequence[Line], _rows: Sequence[Line], _config: Config) -> Verdict | None:
    real, fake = _mean(lines, "accuracy/real"), _mean(lines, "accuracy/fake")
    if real is None or fake is None or min(real, fake) < 0.97:
        return None
    steps = lines[-1]["step"] - lines[0]["step"]
    return Verdict(
        "warning",
        f"The discriminator has won for {steps:,} steps: it tells {real:.0%} of the real and {fake:.0%} of the fake patches. "
        "Lower --optim.discriminator-lr, or raise --loss.r1-weight, or set spectral_norm in the discriminator.",
    )


def _discriminator_is_blind(lines: Sequence[Line], _rows: Sequence[Line], _config: Config) -> Verdict | None:
    real, fake = _mean(lines, "accuracy/real"), _mean(lines, "accuracy/fake")
    # Fooled by a perfect generator, it would be right about half of each; here it says one thing of all patches.
    if real is None or fake is None or max(real, fake) < 0.99 or min(real, fake) > 0.01:
        return None
    return Verdict(
        "warning",
        f"The discriminator calls every patch {'real' if real > fake else 'fake'}: it has stopped learning. "
        "Raise --optim.discriminator-lr, or start again with a lower --loss.r1-weight.",
    )


def _no_say(lines: Sequence[Line], _rows: Sequence[Line], config: Config) -> Verdict | None:
    for line in ("adversarial", "perceptual"):
        share = _mean(lines, f"share/{line}")
        weight = getattr(config.loss, f"{line}_weight")
        if share is not None and share < 0.002 and weight:
            return Verdict(
                "note",
                f"The {line} loss makes {share:.2%} of the gradient: it is computed and has no say. "
                f"Raise --loss.{line}-weight, or set it to 0 and save its time.",
            )
    return None


def _starved(lines: Sequence[Line], _rows: Sequence[Line], config: Config) -> Verdict | None:
    wait = _mean(lines, "input_wait_share")
    if wait is None or wait < 0.2:
        return None
    most, threads = min(MOST_INPUT_THREADS, cores()), input_threads(config.parallel.input_threads)
    more = f", or raise --parallel.input-threads above {threads}" if threads < cores() else ""
    if config.parallel.input_processes < most and most > 2:
        more = f", or make the batches in processes: --parallel.input-processes {most}"
    return Verdict(
        "warning",
        f"The devices stand still for {wait:.0%} of the time, waiting for data: pack the pairs with "
        f"`autoretouch data prepare`{more}.",
    )


def _validation(_lines: Sequence[Line], rows: Sequence[Line], _config: Config) -> Verdict | None:
    if not rows:
        return None
    ours, theirs = (score(rows[-1][row], "psnr_pooled") for row in ("model", "identity"))
    if ours is None or theirs is None:
        return None
    if ours < theirs:
        # Where nothing is to be edited, doing nothing is perfect and any change infinitely worse.
        loss = "" if np.isinf(theirs) else f"{theirs - ours:.2f} dB "
        return Verdict("warning", f"On the validation images the model is {loss}worse than doing nothing.")
    best = max((number for number, row in enumerate(rows) if row.get("best")), default=0)
    if (since := len(rows) - 1 - best) >= 5:
        return Verdict(
            "note",
            f"No validation has been better than that of step {rows[best]['step']} for {since} validations: model-best/ holds "
            "that model; more data, or an end, would help more than more steps.",
        )
    return None


Rule = Callable[[Sequence[Line], Sequence[Line], Config], Verdict | None]
_FROM_THE_START: tuple[Rule, ...] = (_went_back, _skips)
_RULES: tuple[Rule, ...] = (
    *_FROM_THE_START,
    _does_nothing,
    _worse_than_nothing,
    _discriminator_wins,
    _discriminator_is_blind,
    _no_say,
    _starved,
    _validation,
)
