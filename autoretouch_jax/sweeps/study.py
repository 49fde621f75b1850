"""The trials of a sweep, shared by any number of workers, each of which may be killed at any time.

Locks are the kernel's (`flock`): they are free as soon as their holder is dead, however it died. A trial that Optuna calls
running and whose lock is free was left by a worker that died, and the next worker takes it over.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

STARTUP = 4  # trials drawn at random first; none is stopped early before as many have finished


class JournalLock:
    """The lock of Optuna's journal. Optuna's own locks are files, which stay behind when their holder is killed."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Waits for the lock, and cuts off a line that a killed worker has left unfinished."""
        self._file = open(f"{self._journal}.lock", "a")  # noqa: SIM115
        fcntl.flock(self._file, fcntl.LOCK_EX)
        text = self._journal.read_bytes()
        if text and not text.endswith(b"\n"):
            os.truncate(self._journal, text.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Releases the lock."""
        assert self._file
        self._file.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a file and holds it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> IO[str] | None:
    """Returns the file, locked as long as it is open and its holder lives, or None while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def open_study(workdir: Path, storage: str | None) -> optuna.Study:
    """Returns the study in the work directory's journal, or in the database `storage`. The first worker creates it."""
    backend: Any = storage
    if storage is None:
        journal = workdir / "journal.log"
        journal.touch()
        lock: Any = JournalLock(journal)
        backend = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
    return optuna.create_study(
        storage=backend, study_name=workdir.name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def any_running(study: optuna.Study) -> bool:
    """Whether a trial is neither finished nor waiting."""
    return any(trial.state == TrialState.RUNNING for trial in study.get_trials(deepcopy=False))


def frozen_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """Returns a trial as the storage has it now."""
    return next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)


def take_abandoned(study: optuna.Study, folder: Callable[[int], Path]) -> tuple[Trial, IO[str]] | None:
    """Returns a trial that a dead worker has left, and its lock, or None. The caller holds the sweep's lock."""
    for left in study.get_trials(deepcopy=False):
        if left.state != TrialState.RUNNING:
            continue
        lock = try_lock(folder(left.number) / "lock")
        if lock is None:
            continue
        # It may have been finished, and its lock released, after the list was read.
        if frozen_trial(study, left.number).state == TrialState.RUNNING:
            return Trial(study, left._trial_id), lock
        lock.close()
    return None


def take_new(
    study: optuna.Study,
    space: Mapping[str, Any],
    search: str,
    seed: int,
    combinations: list[dict[str, Any]],
    limit: int,
    folder: Callable[[int], Path],
) -> tuple[Trial, IO[str]] | None:
    """Returns a new trial and its lock, or None when there are `limit` already. The caller holds the sweep's lock.

    `combinations` are those of a grid; for other searches the list is empty.
    """
    trials = study.get_trials(deepcopy=False)
    number = len(trials)
    # A worker that died after queueing a combination, and before starting it, leaves a waiting trial.
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    if not waiting and number >= limit:
        return None
    if combinations and not waiting:
        study.enqueue_trial(combinations[number])
    # The seed is a function of sweep and trial: workers that all began with the same seed would repeat each other's draws.
    draw = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if search == "random":
        study.sampler = optuna.samplers.RandomSampler(draw)
    else:
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=draw)
    trial = study.ask(fixed_distributions=dict(space))
    lock = try_lock(folder(trial.number) / "lock")
    assert lock is not None  # nobody else takes trials while the sweep's lock is held
    return trial, lock
