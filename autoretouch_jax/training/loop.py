"""The training loop: one visible path from a config to a trained model. No maths here."""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.config.resume import refuse_other_run, to_json
from autoretouch_jax.config.validation import validate
from autoretouch_jax.data import pipeline
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, BadInput
from autoretouch_jax.evaluation import report
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.models.folder import Model, save_model
from autoretouch_jax.runtime import devices, processes, storage
from autoretouch_jax.runtime.stop import StopRequest
from autoretouch_jax.runtime.watch import LONGEST_STEP, Watch
from autoretouch_jax.training.checkpoints import Checkpoints, has_checkpoint
from autoretouch_jax.training.log import MetricsLog, Window
from autoretouch_jax.training.state import State, parameter_count
from autoretouch_jax.training.trainer import Trainer

SAMPLES = 6  # crops in a picture of samples


class Ending(NamedTuple):
    """The end of a run: its exit status, whether to save the state, and the message to print."""

    status: int
    save: bool
    message: str


def run(config: Config, workdir: Any, stop: StopRequest | None = None, until: int | None = None) -> int:
    """Trains until `train.steps`, resuming what `workdir` holds. Returns the exit status (`errors.py`).

    `stop` may ask the run to end early. `until` ends this call at that step, and changes nothing else. Raises
    Refused, before anything is written, when the config, the data, a weight file or the work directory do not fit.
    """
    config, workdir = resolve(config), storage.open_path(workdir)
    validate(config)
    with stop or StopRequest() as stop, processes.one_run(config.parallel), Watch(config.parallel.timeout) as watch:
        stored = workdir / "config.json"
        with storage.reachable(f"--workdir {workdir}"):
            storage.check_bucket(workdir)
            if stored.is_file():
                refuse_other_run(config, stored)
        # A resumed run starts from its own model/, for the data's licence, and then restores its checkpoint:
        # `train.start_from` may have moved meanwhile.
        resumed = has_checkpoint(workdir / "checkpoints") and (workdir / "model" / "model.json").is_file()
        trainer = Trainer(config, workdir if resumed else None)
        # Every process checks its own inputs, and none may write before all checks have passed.
        processes.barrier("everything is checked", LONGEST_STEP)
        if processes.is_first():
            with storage.reachable(f"--workdir {workdir}"):
                (workdir / "samples").mkdir(parents=True, exist_ok=True)
                storage.write(stored, to_json(trainer.config))
        processes.barrier("the work directory is there", config.parallel.timeout)
        steps = trainer.config.train.steps
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return _train(trainer, workdir, checkpoints, stop, watch, min(until or steps, steps))


def _train(trainer: Trainer, workdir: Any, checkpoints: Checkpoints, stop: StopRequest, watch: Watch, until: int) -> int:
    config, train = trainer.config, trainer.config.train

    # ---- start or resume -------------------------------------------------------------------------------------------
    state, step, seconds_before = trainer.init(), 0, 0.0
    if (latest := checkpoints.latest()) is not None:
        state, clock = checkpoints.restore(latest, state, trainer.shardings)
        step, seconds_before = latest, clock["seconds"]
    if step >= until:
        _publish(trainer, workdir, state)  # the run may have been killed between the checkpoint and the model
        if until == train.steps:
            _say(f"{workdir}: finished, {step} of {train.steps} steps done; raise --train.steps to go on")
        return EXIT_DONE
    _say(_describe(trainer, state, step))
    faults = pipeline.Faults(config.data, len(trainer.source))
    batches, examples = trainer.batches(step, faults), _sample_examples(trainer, faults)
    log = MetricsLog(workdir / "metrics.jsonl", step, silent=not processes.is_first())
    started, window, metrics = time.perf_counter(), Window(), dict[str, jax.Array]()

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    def save() -> None:
        checkpoints.save(step, state, {"step": step, "images": step * train.batch, "seconds": seconds()})
        _publish(trainer, workdir, state)

    ending: Ending | None = None
    with _bar(step, train.steps) as bar:
        while ending is None:
            # ---- the next batch ------------------------------------------------------------------------------------
            waiting = time.perf_counter()
            try:
                batch = trainer.put(next(batches), stop.exit_code is not None)
            except BadInput as error:
                if processes.count() > 1:
                    raise  # the other processes are in the middle of a step that this one cannot make
                ending = Ending(EXIT_FAILED, True, f"stopped at step {step}, checkpoint written: {error}")
                break
            window.add_step(time.perf_counter() - waiting)

            # ---- the step, dispatched without waiting for it -------------------------------------------------------
            state, metrics = trainer.step(state, batch, trainer.frozen)
            # Wait for the previous step: the host may run one step ahead, so that the devices never wait for it, but no
            # further, so that the progress bar and a stop request stay prompt.
            jax.block_until_ready(window.newest())
            step += 1
            status = stop.exit_code if processes.count() == 1 else agreed_to_stop(window.newest(), stop)
            watch.step_done(step)
            checkpoints.check()
            bar.update(1)

            # ---- the log -------------------------------------------------------------------------------------------
            if step % train.log_every == 0 or step == until:
                # The newest step is still being computed: it is read next time.
                means = window.close(train.batch, metrics)
                log.write(_record(step, means, config, faults, seconds()))
                for fault in faults.new_messages():
                    bar.write(f"replaced by another example: {fault}", file=sys.stderr)
                bar.set_postfix_str(f"{means['images_per_s']:.1f} images/s", refresh=False)
                if ending := _not_finite(means, step):
                    break
            window.add_metrics(metrics)

            # ---- samples and checkpoints ---------------------------------------------------------------------------
            if step % train.sample_every == 0 or step == train.steps:
                _sample(trainer, state, workdir / "samples" / f"{step:08d}.png", examples)
            if step % train.checkpoint_every == 0 and step < until:
                if ending := _not_finite(metrics, step):
                    break
                save()

            # ---- stopped or done? ----------------------------------------------------------------------------------
            if status is not None:
                message = f"stopped at step {step} of {train.steps}, checkpoint written; the same command goes on from here"
                ending = Ending(status, True, message)
            elif step == until:
                done = f"{workdir}: done, {train.steps} steps; model in {workdir / 'model'}"
                ending = Ending(EXIT_DONE, True, done if until == train.steps else "")

        # ---- the end: save, unless the state is not finite -------------------------------------------------------------
        if ending.save:
            # A state that is not finite must not replace a sound checkpoint, however the run came to its end.
            ending = _not_finite(metrics, step) or ending
        if ending.save:
            save()
    checkpoints.wait()
    _say(ending.message, error=ending.status == EXIT_FAILED)
    return ending.status


def agreed_to_stop(metrics: Mapping[str, jax.Array] | None, stop: StopRequest) -> int | None:
    """Returns the exit status if any process had been asked to stop when the last finished step began. All stop together.

    Every process sends its answer with its share of the batch, and the step averages the answers in an all-reduce that
    it makes anyway. `multihost_utils.reached_preemption_sync_point` would not do: it knows nothing of SIGINT and `--max-time`,
    and its C++ handler of SIGTERM replaces ours, which must work in a single process and before JAX is started.
    """
    if metrics is None or float(metrics["stop"]) == 0:
        return None
    return stop.exit_code or EXIT_REQUEUE


def _not_finite(metrics: Mapping[str, Any], step: int) -> Ending | None:
    """Returns the ending of a run in which a value is not finite, or None. Such a run saves nothing more."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not bad:
        return None
    return Ending(
        EXIT_FAILED,
        False,
        f"stopped at step {step}: {bad[0]} is not finite; the last checkpoint is from an earlier step. Start again "
        "in a new --workdir with a lower --optim.generator-lr, or with --optim.clip-norm 1",
    )


# ---- messages, samples and the model ----------------------------------------------------------------------------------------


def _say(message: str, error: bool = False) -> None:
    """Prints a message on the first of several processes, or on every process if it is an error."""
    if message and (error or processes.is_first()):
        print(message, file=sys.stderr if error else sys.stdout, flush=True)


def _bar(first: int, steps: int) -> tqdm:
    """Returns a progress bar with the time left. In a log file it prints a line every half minute."""
    interval = 0.1 if sys.stdout.isatty() else 30.0
    return tqdm(
        total=steps,
        initial=first,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        file=sys.stdout,
        mininterval=interval,
        disable=not processes.is_first(),
    )


def _record(step: int, means: dict[str, float], config: Config, faults: pipeline.Faults, seconds: float) -> dict[str, Any]:
    """Returns a line of `metrics.jsonl`."""
    progress = {"step": step, "images": step * config.train.batch}
    return progress | means | {"bad_examples": len(faults.messages), "seconds": round(seconds, 3)}


def _describe(trainer: Trainer, state: State, first: int) -> str:
    """Returns the first line that a run prints: networks, devices, data, steps."""
    config, device = trainer.config, trainer.mesh.devices.flat[0]
    networks = f"generator {parameter_count(state.generator.params):,} parameters"
    if state.discriminator is not None:
        networks += f", discriminator {parameter_count(state.discriminator.params):,}"
    return (
        f"{networks}; batch {config.train.batch} on {trainer.mesh.size} {device.platform} device(s) of "
        f"{processes.count()} process(es) ({config.parallel.mode}, {config.train.precision}); "
        f"{len(trainer.source)} images, crop {config.data.crop}; steps {first} → {config.train.steps}"
    )


def _sample_examples(trainer: Trainer, faults: pipeline.Faults) -> dict[str, np.ndarray]:
    """Returns a few training crops, the same for the whole life of the run, so that pictures can be compared."""
    collected: list[dict[str, np.ndarray]] = []
    batches = pipeline.batches(trainer.source, trainer.config, 0, seed_offset=1, faults=faults, negatives=trainer.negatives)
    while sum(len(batch["source"]) for batch in collected) < SAMPLES:
        collected.append(next(batches))
    return {name: np.concatenate([batch[name] for batch in collected])[:SAMPLES] for name in collected[0]}


def _sample(trainer: Trainer, state: State, path: Any, examples: dict[str, np.ndarray]) -> None:
    """Writes a picture: source, output, target and difference of each sample."""
    if not processes.is_first():
        return
    model = _current_model(trainer, state)
    output = np.stack([retouch_array(model, image, faces="off") for image in examples["source"]])
    rows = report.comparison(examples["source"], output, examples["target"])
    report.save_picture(path, rows.reshape(-1, *rows.shape[2:]))


def _current_model(trainer: Trainer, state: State) -> Model:
    """Returns the model as it is now: the generator's moving average, or its weights where there is none."""
    params = state.generator.params if state.ema is None else state.ema
    batch_stats = {"batch_stats": state.generator.batch_stats} if state.generator.batch_stats else {}
    return Model(trainer.config.generator, devices.to_host({"params": params, **batch_stats}))


def _publish(trainer: Trainer, workdir: Any, state: State) -> None:
    """Writes `model/`, with the licences of all data that it was trained on."""
    if not processes.is_first():
        return
    licenses = [trainer.source.license, trainer.start.data_license if trainer.start else None]
    data_license = "; ".join(dict.fromkeys(filter(None, licenses))) or None
    model = dataclasses.replace(_current_model(trainer, state), data_license=data_license, face_size=trainer.face_size)
    save_model(workdir / "model", model, int(state.step))
