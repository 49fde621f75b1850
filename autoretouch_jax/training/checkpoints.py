"""Checkpoints: state, data position and clock in one atomic step, written in the background. The only importer of Orbax.

A killed save leaves a folder that Orbax ignores and cleans up. The previous checkpoint stays.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.errors import Refused, first_line
from autoretouch_jax.runtime import processes

KEPT = 2  # checkpoints: the newest, and the one before it in case the disk damages it
COMMITTED = "commit_success.txt"  # where a folder cannot be renamed, Orbax writes this file last
DELETED = "deleted"  # where it can, one that is being deleted lies in this folder


def newest_checkpoint(folder: Any) -> int:
    """The step of the newest finished checkpoint, or 0. Unlike Orbax's manager, this creates nothing."""
    return max(_finished(folder), default=0)


def _finished(folder: Any) -> list[int]:
    """The steps of the finished checkpoints."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return [int(path.name) for path in steps if not is_remote(folder) or (path / COMMITTED).exists()]


class Checkpoints:
    """The folder `checkpoints/` of a run. Use it as a context manager: leaving it waits for the last save."""

    def __init__(self, folder: Any, every: int = 1) -> None:
        """`every` is the period of the run's checkpoints. Those of a stop lie between them."""
        self._every = every
        atomic = {}
        if str(folder).startswith("s3://"):
            _enable_s3()
            atomic = {"atomicity_options": AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            todelete_subdir=None if is_remote(folder) else DELETED,
            **atomic,
        )
        self._home = folder if is_remote(folder) else folder.absolute()
        self._manager = ocp.CheckpointManager(self._home, options=options)
        self._empty_deleted()  # the process that deleted may have been killed

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_exc: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # the save may wait for a process that is gone
        # An error of the save must not hide the error that is already being raised.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self._manager.wait_until_finished()
            self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest finished checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, clock: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background.

        State and clock are saved together, so that neither can be newer than the other. An error of an earlier save is raised
        here.
        """
        if step == self.latest():
            return
        self.wait()  # Orbax counts a save that still runs: were it killed, and the one before it deleted, nothing would stay
        self._delete_old()
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), clock=ocp.args.JsonSave(clock)))

    def _delete_old(self) -> None:
        """Deletes all but the newest, the one before it once another is saved, and the one that a run would go back to."""
        steps = sorted(self._manager.all_steps())
        kept = {*steps[1 - KEPT :], self.periodic()}
        for step in steps:
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Deletes a checkpoint so that a kill in the middle leaves none that seems to be finished."""
        remote, path = is_remote(self._home) and processes.is_first(), self._home / str(step)
        if remote:
            (path / COMMITTED).unlink(missing_ok=True)
        self._manager.delete(step)
        if remote:
            path.rmtree(missing_ok=True)  # in s3:// Orbax does not find what is not committed
        self._empty_deleted()

    def _empty_deleted(self) -> None:
        if not is_remote(self._home) and processes.is_first():
            shutil.rmtree(self._home / DELETED, ignore_errors=True)

    def periodic(self) -> int | None:
        """The step of the newest checkpoint that a period has made, or None.

        A run that goes astray goes back to it, and not to one that a stop has made: else it would depend on the stops.
        """
        return max((step for step in self._manager.all_steps() if step % self._every == 0), default=None)

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which the run will make again in another way."""
        self.wait()
        for later in self._manager.all_steps():
            if later > step:
                self._delete(later)

    def check(self) -> None:
        """Raises OSError when a save in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise OSError(
                f"{self._manager.directory}: a checkpoint could not be written ({first_line(error)}); free some space or "
                "fix the access, and give the same command again: it goes on from the previous checkpoint"
            ) from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, shapes: Any, fresh: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Returns `(state, clock)` of a step. `shapes` says which leaves to read, and where each of them goes.

        A field of the state that the checkpoint does not hold, because an older version wrote it or the guard was off, gets
        its value from the state that `fresh` returns. It is called for nothing else, because making a state takes seconds.
        """
        path = self._manager.directory / str(step) / "state"
        stored = {name for name, value in _stored_tree(path).items() if value}
        wanted = {name: value for name, value in _fields(shapes).items() if jax.tree.leaves(value)}
        if stored == wanted.keys():
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), clock=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=arguments)
            return restored.state, restored.clock
        clock = self._manager.restore(step, args=ocp.args.Composite(clock=ocp.args.JsonRestore())).clock
        base = shapes if wanted.keys() <= stored else fresh()
        state = dataclasses.replace(base, **_read_part(path, {name: wanted[name] for name in wanted.keys() & stored}))
        if "ema_stats" in wanted.keys() - stored:  # an older version averaged the parameters alone
            state = dataclasses.replace(state, ema_stats=jax.tree.map(jax.numpy.array, state.generator.batch_stats))
        return state, clock


def read_clock(folder: Any, step: int) -> dict[str, Any]:
    """Returns the clock of a finished checkpoint, or {} where it cannot be read. `folder` is the run's checkpoints/."""
    # Without Orbax, whose reading waits for the other processes, one of which may be refusing its data at this moment.
    try:
        return dict(json.loads((folder / str(step) / "clock" / "metadata").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _fields(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _stored_tree(path: Any) -> dict[str, Any]:
    """The tree of a stored state, with metadata in place of arrays."""
    logger = logging.getLogger("absl")
    # Orbax warns that the file of an item's own metadata is missing, where the manager has written another one.
    with _level(logger, logging.ERROR):
        return dict(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).metadata(path).item_metadata.tree)


@contextlib.contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _read_part(path: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads some branches of a stored state. `wanted` holds the shape, type and sharding of every leaf."""
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    restore = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
    return dict(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(path, args=restore))


def read_discriminator(folder: Any) -> dict[str, Any]:
    """Returns the parameters of the discriminator in a run's newest checkpoint, as NumPy arrays; {} where there is none.

    `folder` is the run's checkpoints/. Nothing else is read, and nothing written: the run may still be training.
    """
    if not (steps := _finished(folder)):
        return {}
    path = (folder if is_remote(folder) else folder.absolute()) / str(max(steps)) / "state"
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    stored = _stored_tree(path)["discriminator"]
    if not stored:
        return {}
    wanted = {"discriminator": {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored["params"])}}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    return dict(reader.restore(path, args=arguments)["discriminator"]["params"])


def _enable_s3() -> None:
    """Makes Orbax 0.12, whose only remote storage is gs://, write s3:// in the same way, with tensorstore's S3 driver.

    It replaces three private functions of Orbax. Raises Refused when one is missing, because such an Orbax was never tested.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    replaced = (
        (tensorstore_utils, "_use_gcs_driver"),
        (tensorstore_utils, "_normalize_path"),
        (gcs_utils, "get_kvstore_for_gcs"),
    )
    if missing := [name for module, name in replaced if not hasattr(module, name)]:
        raise Refused(
            f"s3://: this version of orbax-checkpoint has no {missing[0]}; install one of 0.12, or use gs:// or a disk"
        )
    if getattr(gcs_utils.get_kvstore_for_gcs, "handles_s3", False):
        return  # it has been replaced already
    original = gcs_utils.get_kvstore_for_gcs

    def kvstore(path: str) -> dict[str, Any]:
        if not str(path).startswith("s3://"):
            return original(path)
        bucket, _, key = str(path).removeprefix("s3://").partition("/")
        return {"driver": "s3", "bucket": bucket, "path": key, **_s3_access()}

    kvstore.handles_s3 = True  # type: ignore[attr-defined]
    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda path: re.sub(r"^(gs|s3):/+", r"\1://", os.path.normpath(path))


def _s3_access() -> dict[str, Any]:
    """Returns the settings that tensorstore does not read from the environment by itself."""
    access: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        access |= {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        access["aws_credentials"] = {"type": "environment"}
    return access
