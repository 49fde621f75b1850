"""Checkpoints: state, data position and clock in one atomic step, written in the background. The only importer of Orbax.

A save that is killed leaves a folder that Orbax ignores and cleans up; the previous checkpoint stays.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2  # the newest, and one before it in case a disk lets us down


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a finished step. Looks only; creates nothing."""
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
    """`checkpoints/` of a run. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_exc: object) -> None:
        if kind is None:  # otherwise what is being saved may be waiting for a process that is gone
            self._manager.wait_until_finished()
            self._manager.close()

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, clock: dict[str, Any]) -> None:
        """Copy the state off the devices and write it in the background; an error of an earlier save is raised here."""
        if step == self.latest():
            return
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), clock=ocp.args.JsonSave(clock)))

    def check(self) -> None:
        """Raise what went wrong in a save in the background, if anything did."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Return when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """`(state, clock)` of a step; `like` gives the tree, shapes and types, `shardings` where every leaf goes."""
        abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, shardings)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), clock=ocp.args.JsonRestore())
        )
        return restored.state, restored.clock
