"""A sweep: many runs of one config over a space of values, searched by Optuna, the worst stopped early.

Any number of workers may run the same command on the same folder. Each takes the next trial, or one whose worker has died. A
trial is an ordinary run in `trials/NNNN`, so it resumes exactly, and none is lost or made twice. Trials are compared on pairs
that none is trained on.
"""

import dataclasses
import json
import time
from typing import IO

import optuna
from optuna.trial import Trial, TrialState

from autoretouch_jax.config import Config, ParallelConfig
from autoretouch_jax.config.loading import flatten, resolve, with_values
from autoretouch_jax.config.validation import validate
from autoretouch_jax.data.folders import PairSource
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, Refused, did_you_mean
from autoretouch_jax.evaluation.evaluate import evaluate
from autoretouch_jax.evaluation.metrics import score
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.runtime import devices, storage
from autoretouch_jax.runtime.failures import explain
from autoretouch_jax.runtime.stop import StopRequest
from autoretouch_jax.sweeps import report
from autoretouch_jax.sweeps.definition import Sweep
from autoretouch_jax.sweeps.space import endless_keys, grid, smallest_values, trial_values
from autoretouch_jax.sweeps.study import any_running, frozen_trial, locked, open_study, take_abandoned, take_new
from autoretouch_jax.training import loop

# A worker is a run of its own, whatever started it beside others. Slurm's tasks would join, and average the gradients of
# different trials.
ALONE = {"parallel.distributed": "off"}
# Keys that would join the workers.
JOINING = ("parallel.distributed", "parallel.coordinator", "parallel.processes", "parallel.process")
POLL = 2.0  # seconds between two looks for a trial that another worker may have left


def run(sweep: Sweep, pairs: PairSource) -> int:
    """Works on trials until all are finished, then writes the report. Returns the exit status."""
    sweep = dataclasses.replace(sweep, config=_checked_config(sweep))
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with StopRequest() as stop:
        # Under the lock, because the worker that comes first creates the study and decides which sweep this is.
        with locked(sweep.workdir / "lock"):
            sweep = _in_one_precision(sweep)
            _refuse_other_sweep(sweep)
            study = open_study(sweep.workdir, sweep.storage)
        while True:
            taken = _take_trial(sweep, study)
            if taken is not None:
                trial, lock = taken
                with lock:
                    status = _run_trial(sweep, study, trial, pairs, stop)
                if status is not None:
                    print(f"{sweep.workdir}: stopped in trial {trial.number}; the same command goes on with it")
                    return status
            elif not any_running(study):
                with locked(sweep.workdir / "lock"):
                    return report.write(sweep, study)
            elif stop.exit_code is not None:
                return stop.exit_code
            else:
                # Other workers are busy with the last trials. One that dies leaves its trial to this worker.
                time.sleep(POLL)


def _checked_config(sweep: Sweep) -> Config:
    """Returns the config that every trial starts from. Refuses what no trial could run with."""
    config = resolve(sweep.config)
    known = flatten(config)
    for key in sweep.space:
        if key not in known:
            raise Refused(f"--space: {key} is no key of the config{did_you_mean(key, list(known))}")
    for flag, value in (("--trials", sweep.trials), ("--rungs", sweep.rungs)):
        if value < 1:
            raise Refused(f"{flag} {value}: must be at least 1")
    if not config.train.steps:
        raise Refused("--train.steps 0: a sweep compares trials at the same steps; give a number")
    if sweep.search == "grid" and (endless := endless_keys(sweep.space)):
        raise Refused(f"--search grid: {endless[0]} has no finite list of values; use CategoricalDistribution([…])")
    _refuse_joined_workers(sweep)
    validate(with_values(config, smallest_values(sweep.space)))
    return config


def _refuse_joined_workers(sweep: Sweep) -> None:
    """Refuses a config or a space by which the workers would become the processes of one run."""
    parallel, alone = sweep.config.parallel, "every worker of a sweep is a run of its own; leave it out"
    if parallel.distributed == "on":
        raise Refused(f"--parallel.distributed on: {alone}")
    if parallel.coordinator:
        raise Refused(f"--parallel.coordinator {parallel.coordinator}: {alone}")
    # A space could still join the workers, trial by trial.
    for key in sweep.space:
        if key in JOINING:
            raise Refused(f"--space: {key}: {alone}")


def _in_one_precision(sweep: Sweep) -> Sweep:
    """Fills in `train.precision` where it is `auto`: the first worker's devices decide for all of them.

    Trials in different types could not be compared.
    """
    config, path = sweep.config, sweep.workdir / "sweep.json"
    if config.train.precision == "auto" and path.is_file():
        config = with_values(config, {"train.precision": json.loads(path.read_text())["config"]["train"]["precision"]})
    return dataclasses.replace(sweep, config=devices.with_precision(config))


def _refuse_other_sweep(sweep: Sweep) -> None:
    """Refuses a folder that holds another sweep, and writes `sweep.json`."""
    path = sweep.workdir / "sweep.json"
    description = {
        # Workers may have different devices, so `parallel` is not part of the sweep's identity.
        "config": dataclasses.asdict(dataclasses.replace(sweep.config, parallel=ParallelConfig())),
        "space": {key: repr(kind) for key, kind in sweep.space.items()},
        "search": sweep.search,
        "metric": sweep.metric,
        "rungs": sweep.rungs,
    }
    description = json.loads(json.dumps(description))  # tuples become lists, as in the file
    if path.is_file() and (before := json.loads(path.read_text())) != description:
        changed = [key for key in description if before.get(key) != description[key]]
        raise Refused(f"--workdir {sweep.workdir} holds another sweep: {', '.join(changed)} differ(s); choose another folder")
    storage.write(path, json.dumps(description, indent=2) + "\n")


def _take_trial(sweep: Sweep, study: optuna.Study) -> tuple[Trial, IO[str]] | None:
    """Returns a trial that nobody works on, with its lock: an abandoned or a new one. None when there is neither."""
    combinations = grid(sweep.space) if sweep.search == "grid" else []
    limit = len(combinations) or sweep.trials
    with locked(sweep.workdir / "lock"):
        left = take_abandoned(study, sweep.folder)
        if left is not None:
            return left
        return take_new(study, sweep.space, sweep.search, sweep.config.train.seed, combinations, limit, sweep.folder)


def _run_trial(sweep: Sweep, study: optuna.Study, trial: Trial, pairs: PairSource, stop: StopRequest) -> int | None:
    """Trains a trial and measures it at every rung. Returns an exit status when this worker was stopped, else None."""
    # A trial that was taken over may have been measured at some rungs already, and passed the pruner there.
    before = frozen_trial(study, trial.number)
    measured, kept_at = dict(before.intermediate_values), before.user_attrs.get("kept", 0)
    values = trial_values(trial, sweep.space)
    config = with_values(sweep.config, values | ALONE)
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()]
    print(f"trial {trial.number}: {', '.join(shown)}")
    last = sweep.measured_at[-1]
    for steps in sweep.measured_at:
        if steps not in measured:
            try:
                status = loop.run(config, sweep.folder(trial.number), stop, steps)
            except (Refused, RuntimeError) as error:
                _fail(study, trial, _unsuitable(error))
                return None
            if status == EXIT_FAILED:
                _fail(study, trial, "training ended early; see above")
                return None
            if status != EXIT_DONE:
                return status
            result, _ = evaluate({"model": load_model(sweep.folder(trial.number))}, pairs)
            value = score(result["model"], sweep.metric)
            if value is None:
                _fail(study, trial, f"{sweep.metric} is not defined: none of these pairs has an edit, or all are too small")
                return None
            trial.set_user_attr("identity", score(result["identity"], sweep.metric))
            trial.report(value, steps)
            measured[steps] = value
            print(f"trial {trial.number}: {sweep.metric} {value:.4f} after {steps} of {config.train.steps} steps")
        if kept_at < steps < last:
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                print(f"trial {trial.number}: stopped early, below the median")
                return None
            # Recorded, because after a crash, with more trials to compare, the pruner might decide differently.
            trial.set_user_attr("kept", steps)
    study.tell(trial, measured[last])
    return None


def _unsuitable(error: Refused | RuntimeError) -> str:
    """Returns why a trial's values cannot be trained with: they do not go together, or need too much memory.

    Raises any other error again.
    """
    # If too little memory ended this worker, the trial would end the next worker too.
    reason = str(error) if isinstance(error, Refused) else explain(error)
    if reason is None:
        raise error
    return reason


def _fail(study: optuna.Study, trial: Trial, reason: str) -> None:
    """Records that a trial has failed. The sweep goes on."""
    print(f"trial {trial.number}: failed: {reason}")
    trial.set_user_attr("failed", reason)
    study.tell(trial, state=TrialState.FAIL)
