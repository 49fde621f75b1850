"""Validation while training: the current model on held-out images, the best one so far, and when to end early."""

from collections.abc import Callable
from typing import Any

from autoretouch_jax.config import Config
from autoretouch_jax.data.held_out import open_validation
from autoretouch_jax.evaluation.evaluate import evaluate
from autoretouch_jax.evaluation.metrics import score
from autoretouch_jax.models.folder import Model

PREVIEWS = 4  # images of which small pictures are kept, to see how they change over the run


class Validation:
    """The validations of a run. `rows` are the lines of validation.jsonl so far."""

    def __init__(self, config: Config) -> None:
        """Raises Refused, naming the fault, when the images of `data.validation` cannot be opened."""
        self.config = config.data.validation
        self.pairs, self.alone = open_validation(config.data)
        self.rows: list[dict[str, Any]] = []

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the model is measured after this step. Once more at the end."""
        wanted = self.pairs is not None or self.alone is not None
        return wanted and (step % self.config.every == 0 or step == steps) and not self.covers(step)

    def covers(self, step: int) -> bool:
        """Whether this step has been measured already."""
        return bool(self.rows) and self.rows[-1]["step"] >= step

    def measure(self, model: Model, step: int, observe: Callable[..., None]) -> dict[str, Any]:
        """Measures the model, adds a row and returns it. Every process measures a share, and all get the same row.

        `observe(name, source, output, target)` is called with each pair of the first few images.
        """
        names = set() if self.pairs is None else set(self.pairs.names[:PREVIEWS])

        def observe_some(name: str, *images: Any) -> None:
            if name in names:
                observe(name, *images)

        result, _ = evaluate({"model": model}, self.pairs, alone=self.alone, observe=observe_some, quiet=True)
        row = {"step": step} | {key: result[key] for key in ("n", "edit_threshold", "identity", "model")}
        row |= {"metric": self.config.metric, "best": self._is_better(score(result["model"], self.config.metric))}
        row |= {"images": result["images"]} | ({"alone": result["alone"]} if "alone" in result else {})
        self.rows.append(row)
        return row

    def _is_better(self, value: float | None) -> bool:
        values = [score(row["model"], self.config.metric) for row in self.rows]
        return value is not None and all(value > other for other in values if other is not None)

    def since_best(self) -> int:
        """How many validations there have been since the best one."""
        best = [number for number, row in enumerate(self.rows) if row["best"]]
        return len(self.rows) - 1 - best[-1] if best else len(self.rows)

    def ends_early(self) -> bool:
        """Whether the run ends here, because it has not become better for `patience` validations."""
        return self.config.patience > 0 and self.since_best() >= self.config.patience

    def best(self) -> dict[str, Any] | None:
        """The best row so far, or None."""
        return next((row for row in reversed(self.rows) if row["best"]), None)
