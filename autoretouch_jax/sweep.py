"""`autoretouch sweep`: many runs of one config over a space of values, searched by Optuna, the worst stopped early.

Any number of workers may run the same command on the same folder; each takes the next trial, or one whose worker has died. A
trial is an ordinary run in `trials/NNNN`, so it resumes exactly, and none is lost or made twice. What decides are pairs that no
trial is trained on.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import runpy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from autoretouch_jax import config as configs
from autoretouch_jax import files, rules, sweep_report
from autoretouch_jax.config import Config
from autoretouch_jax.data.sources import PairSource
from autoretouch_jax.errors import Refused
from autoretouch_jax.evaluation.evaluate import evaluate
from autoretouch_jax.models.bundle import load_model
from autoretouch_jax.stop import EXIT_DONE, EXIT_FAILED, StopRequest
from autoretouch_jax.training import loop

POLL = 2.0  # seconds
STARTUP = 4  # trials that are never stopped early, and are drawn at random


@dataclass(frozen=True)
class Sweep:
    """What all workers of a sweep have in common."""

    config: Config
    space: Mapping[str, Any]  # key → Optuna distribution
    trials: int
    workdir: Path
    search: str
    metric: str
    rungs: int
    storage: str | None

    @property
    def stops(self) -> list[int]:
        """The steps at which a trial is measured: the last, half of it, a quarter …"""
        steps = self.config.train.steps
        return sorted({max(1, steps >> k) for k in range(self.rungs)})

    def folder(self, number: int) -> Path:
        """The work directory of a trial."""
        return self.workdir / "trials" / f"{number:04d}"


class _Lock:
    """The journal's lock, held by the kernel: it is free as soon as its holder is dead. A line that was torn is cut off."""

    def __init__(self, journal: Path):
        self._journal = journal
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = open(f"{self._journal}.lock", "a")  # noqa: SIM115
        fcntl.flock(self._file, fcntl.LOCK_EX)
        text = self._journal.read_bytes()
        if not text.endswith(b"\n") and text:
            os.truncate(self._journal, text.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        assert self._file
        self._file.close()


def run(sweep: Sweep, pairs: PairSource) -> int:
    """Work until every trial is finished, then write the report. Returns the exit status."""
    sweep = dataclasses.replace(sweep, config=_checked(sweep))
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with StopRequest() as stop, _held(sweep.workdir / "lock"):
        _remember(sweep)
        study = _study(sweep)
    with stop:
        while True:
            taken = _take(sweep, study)
            if taken is None:
                if not _others_work(study):
                    with _held(sweep.workdir / "lock"):
                        return sweep_report.write(sweep, study)
                if stop.exit_code is not None:
                    return stop.exit_code
                time.sleep(POLL)  # a worker that dies leaves a trial to this one
                continue
            trial, lock = taken
            with lock:
                status = _work(sweep, study, trial, pairs, stop)
            if status is not None:
                print(f"{sweep.workdir}: stopped in trial {trial.number}; the same command goes on with it")
                return status


def read_space(path: Path) -> dict[str, Any]:
    """`space = {key: distribution}` of a Python file. Raises Refused, naming it, for anything else."""
    if not path.is_file():
        raise Refused(f"--space {path}: no such file; configs/sweeps/lr.py shows how one is written")
    try:
        space = runpy.run_path(str(path)).get("space")
    except Exception as error:
        raise Refused(f"--space {path}: {type(error).__name__}: {error}") from error
    kinds = optuna.distributions.BaseDistribution
    if not isinstance(space, dict) or not space or not all(isinstance(kind, kinds) for kind in space.values()):
        raise Refused(f"--space {path}: must define `space = {{KEY: an optuna.distributions object, …}}`")
    return space


def _checked(sweep: Sweep) -> Config:
    """The config that every trial starts from; refuses what no trial could run with."""
    config = configs.resolve(sweep.config)
    known = configs.flatten(config)
    for key in sweep.space:
        if key not in known:
            raise Refused(f"--space: {key} is no key of the config{configs.nearest(key, list(known))}")
    if not config.train.steps:
        raise Refused("--train.steps 0: a sweep compares trials at the same steps; give a number")
    if sweep.search == "grid" and (endless := [key for key, kind in sweep.space.items() if not _values(kind)]):
        raise Refused(f"--search grid: {endless[0]} has no finite list of values; use CategoricalDistribution([…])")
    rules.validate(configs.with_values(config, {key: _lowest(kind) for key, kind in sweep.space.items()}))
    return config


def _lowest(kind: Any) -> Any:
    return kind.choices[0] if hasattr(kind, "choices") else kind.low


def _values(kind: Any) -> list[Any]:
    """All values of a distribution, or nothing where they are endless."""
    if hasattr(kind, "choices"):
        return list(kind.choices)
    if not kind.step or kind.log:
        return []
    return [kind.low + i * kind.step for i in range(round((kind.high - kind.low) / kind.step) + 1)]


def _remember(sweep: Sweep) -> None:
    """`sweep.json`, by which a folder refuses to become another sweep."""
    path = sweep.workdir / "sweep.json"
    described = {
        "config": dataclasses.asdict(dataclasses.replace(sweep.config, parallel=configs.ParallelConfig())),
        "space": {key: repr(kind) for key, kind in sweep.space.items()},
        "search": sweep.search,
        "metric": sweep.metric,
        "rungs": sweep.rungs,
    }
    described = json.loads(json.dumps(described))
    if path.is_file() and (before := json.loads(path.read_text())) != described:
        changed = [key for key in described if before.get(key) != described[key]]
        raise Refused(f"--workdir {sweep.workdir} holds another sweep: {', '.join(changed)} differ(s); choose another folder")
    files.write(path, json.dumps(described, indent=2) + "\n")


def _study(sweep: Sweep) -> optuna.Study:
    """The study, made by whoever comes first."""
    storage: Any = sweep.storage
    if storage is None:
        journal = sweep.workdir / "journal.log"
        journal.touch()
        backend = JournalFileBackend(str(journal), _Lock(journal))  # type: ignore[arg-type]
        storage = optuna.storages.JournalStorage(backend)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
    return optuna.create_study(
        storage=storage, study_name=sweep.workdir.name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _others_work(study: optuna.Study) -> bool:
    return any(trial.state == TrialState.RUNNING for trial in study.get_trials(deepcopy=False))


def _take(sweep: Sweep, study: optuna.Study) -> tuple[Trial, Any] | None:
    """A trial nobody works on, with its lock: one that was left, or a new one while there are fewer than `trials`."""
    with _held(sweep.workdir / "lock"):
        trials = study.get_trials(deepcopy=False)
        for left in trials:
            if left.state == TrialState.RUNNING and (lock := _try(sweep.folder(left.number) / "lock")) is not None:
                if _frozen(study, left.number).state == TrialState.RUNNING:  # not finished between the two looks
                    return Trial(study, left._trial_id), lock
                lock.close()
        number, grid = len(trials), _grid(sweep)
        waiting = any(trial.state == TrialState.WAITING for trial in trials)  # put in line by a worker that died
        if not waiting and number >= (len(grid) or sweep.trials):
            return None
        if grid and not waiting:
            study.enqueue_trial(grid[number])
        # Of the sweep and the trial alone: workers with seeds of their own would repeat each other's draws.
        seed = int(np.random.SeedSequence([sweep.config.train.seed, number]).generate_state(1)[0])
        random = sweep.search == "random"
        samplers = optuna.samplers
        study.sampler = samplers.RandomSampler(seed) if random else samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
        trial = study.ask(fixed_distributions=dict(sweep.space))
        lock = _try(sweep.folder(trial.number) / "lock")
        assert lock is not None
        return trial, lock


def _grid(sweep: Sweep) -> list[dict[str, Any]]:
    """Every combination, for `search="grid"`; otherwise nothing."""
    if sweep.search != "grid":
        return []
    combinations = itertools.product(*(_values(kind) for kind in sweep.space.values()))
    return [dict(zip(sweep.space, values, strict=True)) for values in combinations]


def _work(sweep: Sweep, study: optuna.Study, trial: Trial, pairs: PairSource, stop: StopRequest) -> int | None:
    """Train a trial from stop to stop, measuring and perhaps giving up at each; an exit status when this worker was stopped."""
    folder, before = sweep.folder(trial.number), _frozen(study, trial.number)
    known, kept = before.intermediate_values, before.user_attrs.get("kept", 0)
    values = {key: _suggested(trial, key, kind) for key, kind in sweep.space.items()}
    config = configs.with_values(sweep.config, values)
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()]
    print(f"trial {trial.number}: {', '.join(shown)}")
    for until in sweep.stops:
        if until not in known:
            try:
                status = loop.run(config, folder, stop, until)
            except Refused as error:  # values that do not go together
                _failed(study, trial, str(error))
                return None
            if status == EXIT_FAILED:
                _failed(study, trial, "training ended early; see above")
                return None
            if status != EXIT_DONE:
                return status
            score = evaluate({"model": load_model(folder)}, pairs)[0]["model"][sweep.metric]
            if score is None:
                _failed(study, trial, f"{sweep.metric} is not defined for its output")
                return None
            trial.report(score, until)
            known = known | {until: score}
            print(f"trial {trial.number}: {sweep.metric} {score:.4f} after {until} of {config.train.steps} steps")
        if kept < until < sweep.stops[-1]:
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                print(f"trial {trial.number}: stopped early, below the median")
                return None
            trial.set_user_attr("kept", until)  # asked again after a crash, with more peers, the answer might be another
    study.tell(trial, known[sweep.stops[-1]])
    return None


def _suggested(trial: Trial, key: str, kind: Any) -> Any:
    """The trial's value: drawn now, or as it was drawn before."""
    if hasattr(kind, "choices"):
        return trial.suggest_categorical(key, kind.choices)
    suggest: Any = trial.suggest_int if isinstance(kind, optuna.distributions.IntDistribution) else trial.suggest_float
    return suggest(key, kind.low, kind.high, step=kind.step, log=kind.log)


def _failed(study: optuna.Study, trial: Trial, reason: str) -> None:
    print(f"trial {trial.number}: failed: {reason}")
    trial.set_user_attr("failed", reason)
    study.tell(trial, state=TrialState.FAIL)


def _frozen(study: optuna.Study, number: int) -> FrozenTrial:
    return next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try(path: Path) -> IO[str] | None:
    """The file, locked for as long as it is open or its holder lives; None while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
