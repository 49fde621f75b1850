"""The definition of a sweep: its config, its space, and how its trials are searched and compared."""

from dataclasses import dataclass
from pathlib import Path

from autoretouch_jax.config import Config
from autoretouch_jax.sweeps.space import Space


@dataclass(frozen=True)
class Sweep:
    """The values that all workers of a sweep share."""

    config: Config
    space: Space
    trials: int
    workdir: Path
    search: str
    metric: str
    rungs: int
    storage: str | None

    @property
    def measured_at(self) -> list[int]:
        """The steps at which a trial is measured: the last one, half of it, a quarter …"""
        steps = self.config.train.steps
        return sorted({max(1, steps >> rung) for rung in range(self.rungs)})

    def folder(self, number: int) -> Path:
        """The work directory of a trial."""
        return self.workdir / "trials" / f"{number:04d}"
