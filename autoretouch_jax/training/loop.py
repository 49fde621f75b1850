"""The training loop: one visible path from a config to a trained model. No maths here."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import resolve
from autoretouch_jax.config.resume import in_its_precision, refuse_other_run, to_json
from autoretouch_jax.config.validation import validate
from autoretouch_jax.data import pipeline
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, BadInput, Refused
from autoretouch_jax.runtime import devices, processes, starts, storage
from autoretouch_jax.runtime.memory import keep_freed_memory
from autoretouch_jax.runtime.stop import StopRequest
from autoretouch_jax.runtime.watch import LONGEST_STEP, Watch
from autoretouch_jax.training import guard, progress, publish, resuming
from autoretouch_jax.training.checkpoints import Checkpoints, newest_checkpoint, read_clock
from autoretouch_jax.training.journal import Journal, read_rows
from autoretouch_jax.training.log import DeviceClock, Window
from autoretouch_jax.training.publish import Publisher
from autoretouch_jax.training.trainer import Trainer
from autoretouch_jax.training.validation import Validation


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
        stored, moved, notes = workdir / "config.json", list[str](), list[str]()
        with storage.reachable(f"--workdir {workdir}"):
            storage.check_bucket(workdir)
            if stored.is_file():
                moved = refuse_other_run(config, stored)
        # A resumed run restores its checkpoint and needs nothing of `train.start_from`, which may have moved meanwhile.
        first = newest_checkpoint(workdir / "checkpoints")
        if first and stored.is_file():
            config = in_its_precision(config, stored)
        trainer, validation = Trainer(config, resumed=first > 0), Validation(config)
        if first and stored.is_file():
            clock, accept = read_clock(workdir / "checkpoints", first), config.data.on_change == "accept"
            notes = resuming.check_data(workdir, trainer.source, trainer.manifest, clock, moved, accept)
            notes += filter(None, [resuming.rate_jump(trainer.config, stored, first)])
        # Every process checks its own inputs, and none may write before all checks have passed.
        processes.barrier("everything is checked", LONGEST_STEP)
        if processes.is_first():
            with storage.reachable(f"--workdir {workdir}"):
                (workdir / "samples").mkdir(parents=True, exist_ok=True)
                storage.write(stored, to_json(trainer.config))
                license = trainer.start_license(workdir if first else None)
                resuming.write_data(workdir, trainer.source, trainer.manifest, license)
        processes.check_shared(workdir, config.parallel.timeout)
        until = min(until or trainer.config.train.steps, trainer.config.train.steps)
        starts.note_start(workdir, first, config.parallel.timeout, until)
        keep_freed_memory()
        if first < until:
            trainer.compile_ahead()
        every = config.train.checkpoint_every
        with Checkpoints(workdir / "checkpoints", every) as checkpoints, Publisher(trainer, workdir) as publisher:
            return Run(trainer, workdir, checkpoints, publisher, stop, watch, validation, notes).train(until)


class Run:
    """A run that trains: what its loop and the parts of it share."""

    def __init__(
        self,
        trainer: Trainer,
        workdir: Any,
        checkpoints: Checkpoints,
        publisher: Publisher,
        stop: StopRequest,
        watch: Watch,
        validation: Validation,
        notes: Sequence[str],
    ) -> None:
        self.trainer, self.workdir, self.checkpoints, self.stop, self.watch = trainer, workdir, checkpoints, stop, watch
        self.publisher, self.validation, self.notes = publisher, validation, notes
        # Everything that must be the same after a resume is in `state`; the rest starts anew.
        self.step, clock = checkpoints.latest() or 0, {"seconds": 0.0}
        if self.step:
            self.state, clock = checkpoints.restore(self.step, trainer.shapes, trainer.init)
        else:
            self.state = trainer.init()
        self.seconds_before = clock["seconds"]
        self.started, self.skipped, self.unsaved = time.perf_counter(), self._guard_count("skipped"), set[str]()

    def train(self, until: int) -> int:
        """Trains until a step. Returns the exit status."""
        trainer, config, train = self.trainer, self.trainer.config, self.trainer.config.train
        if self.step >= until:
            self.publisher.publish(self.state, "model")  # the run may have been killed between the checkpoint and the model
            self.publisher.wait()
            if until == train.steps:
                progress.say(f"{self.workdir}: finished, {self.step} of {train.steps} steps done; raise --train.steps to go on")
            return EXIT_DONE
        progress.say(progress.describe(trainer, self.state, self.step))
        self._open_journal()
        if self.validation.ends_early():
            progress.say(self._stopped_early())
            return EXIT_DONE
        self.faults = pipeline.Faults(config.data, len(trainer.source))
        batches = self._batches()
        window, clock, metrics, done = Window(), DeviceClock(), dict[str, jax.Array](), None

        ending: Ending | None = None
        with progress.bar(self.step, train.steps) as bar:
            while ending is None:
                # ---- the next batch ----------------------------------------------------------------------------------
                asked = time.perf_counter()
                try:
                    batch = trainer.put(next(batches), self.stop.exit_code is not None)
                except (BadInput, Refused) as error:
                    if processes.count() > 1:
                        raise  # the other processes are in the middle of a step that this one cannot make
                    ending = Ending(EXIT_FAILED, True, f"stopped at step {self.step}, checkpoint written: {error}")
                    break
                window.add_step(asked, time.perf_counter(), done)

                # ---- the step, dispatched without waiting for it -----------------------------------------------------
                self.state, metrics = trainer.step(self.state, batch, trainer.frozen)
                done = clock.when_done(metrics)
                # Wait for the previous step: the host may run one step ahead, so that the devices never wait for it, but no
                # further, so that the progress bar and a stop request stay prompt.
                jax.block_until_ready(window.newest())
                self.step += 1
                trouble, at = guard.trouble(window.newest()), self.step - 1
                status = self.stop.exit_code if processes.count() == 1 else agreed_to_stop(window.newest(), self.stop)
                self.watch.step_done(self.step)
                self._check_checkpoints()
                bar.update(1)

                # ---- the log -----------------------------------------------------------------------------------------
                if self.step % train.log_every == 0 or self.step == until:
                    # The newest step is still being computed: it is read next time.
                    means = window.close(train.batch, metrics)
                    self._log(means)
                    bar.set_postfix_str(f"{means['images_per_s']:.1f} images/s", refresh=False)
                    ending = self._not_finite(means)
                window.add_metrics(metrics)

                # ---- has training gone astray? -----------------------------------------------------------------------
                validate = self.validation.is_due(self.step, train.steps)
                due = self.step % train.checkpoint_every == 0 or self.step == until or validate
                if not trouble and (due or status is not None):
                    # Before anything is kept, the newest step counts too, though reading its metrics waits for it.
                    trouble, at = guard.trouble(metrics), self.step
                if trouble and not ending:
                    ending = self._roll_back(trouble, at)
                    bar.n, batches, window, done = self.step, self._batches(), Window(), None
                    continue

                # ---- samples, validation and checkpoints -------------------------------------------------------------
                if self.step % train.sample_every == 0 or self.step == train.steps:
                    self._sample()
                if validate:
                    self._validate()
                if self.step % train.checkpoint_every == 0 and self.step < until and not ending:
                    ending = self._not_finite(metrics)
                    self._save(metrics)
                if due:
                    self.journal.verdicts(self.step, self.validation.rows)
                    self.journal.report()

                # ---- stopped or done? --------------------------------------------------------------------------------
                ending = ending or self._is_over(status, until)

        # ---- the end: save, unless the state is not finite -----------------------------------------------------------
        clock.close()
        return self._end(ending, metrics)

    # ---- the parts of the loop ----------------------------------------------------------------------------------------------

    def _open_journal(self) -> None:
        self.journal = Journal(self.workdir, self.trainer.config, self.step)
        processes.barrier("the journal is open", self.trainer.config.parallel.timeout)
        self.validation.rows = [row for row in read_rows(self.workdir / "validation.jsonl") if row["step"] <= self.step]
        steps = self.trainer.config.train.steps
        kind, text = ("resumed", "The run goes on") if self.step else ("started", "The run begins")
        self.journal.event(self.step, kind, f"{text}: steps {self.step} to {steps}.")
        for note in self.notes:
            self.journal.event(self.step, "resumed", f"{note[0].upper()}{note[1:]}.", "warning")

    def _batches(self) -> Iterator[Any]:
        """The batches from this step on. A run that went back has left some out."""
        return self.trainer.batches(self.step + self._guard_count("offset"), self.faults)

    def _guard_count(self, name: str) -> int:
        return int(getattr(self.state.guard, name)) if self.state.guard is not None else 0

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _log(self, means: dict[str, float]) -> None:
        """Writes a line of metrics, and says which examples could not be read and which updates were skipped."""
        self.journal.metrics(progress.record(self.step, means, self.trainer.config, self.faults, self._seconds()))
        for fault in self.faults.new_messages():
            self.journal.event(self.step, "fault", f"Replaced by another example: {fault}", "warning")
        skipped = int(means.get("guard/skipped", 0))
        if skipped > self.skipped:
            text = f"{skipped - self.skipped} update(s) were skipped: the gradient was not finite, or far larger than usual."
            self.journal.event(self.step, "skipped", text, "warning")
        self.skipped = skipped

    def _not_finite(self, metrics: Mapping[str, Any]) -> Ending | None:
        """Without the guard, returns the ending of a run in which a value is not finite, else None. It saves nothing more."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if self.state.guard is not None or not bad:
            return None
        return Ending(
            EXIT_FAILED,
            False,
            f"stopped at step {self.step}: {bad[0]} is not finite; the last checkpoint is from an earlier step. Go on from it "
            "with a lower --optim.generator-lr, with --optim.clip-norm 1, or with the guard: --guard.enabled True",
        )

    def _roll_back(self, trouble: float, at: int) -> Ending | None:
        """Goes back from step `at`, with a lower learning rate and without the batches since. Gives up with an ending."""
        config, failed = self.trainer.config, self.state.guard
        assert failed is not None
        why, rate = guard.reason(trouble, config.guard), config.optim.generator_lr * float(failed.rate)
        if int(failed.rollbacks) >= config.guard.rollbacks:
            text = f"gave up at step {at}: {why}, and {int(failed.rollbacks)} attempt(s) with lower learning rates ended so too"
            advice = guard.advice(trouble, rate * config.guard.rate_factor)
            self.journal.event(at, "gave_up", f"{text[0].upper()}{text[1:]}. {advice}", "bad")
            return Ending(EXIT_FAILED, False, f"{text}. {advice}")
        self.checkpoints.wait()
        self.step = self.checkpoints.periodic() or 0
        if self.step:
            self.state, _ = self.checkpoints.restore(self.step, self.trainer.shapes, self.trainer.init)
        else:
            self.state = self.trainer.init()
        self.checkpoints.forget_after(self.step)
        assert self.state.guard is not None
        memory = guard.after_rollback(self.state.guard, failed, at - self.step, config.guard)
        self.state = dataclasses.replace(self.state, guard=devices.put(memory, self.trainer.shardings.guard))
        self.validation.rows = [row for row in self.validation.rows if row["step"] <= self.step]
        self.journal.rewind(self.step)
        self.skipped = self._guard_count("skipped")
        text = f"Back to step {self.step}: {why}. The learning rates are multiplied by {float(memory.rate):.2g} from here on"
        self.journal.event(at, "rollback", f"{text}, and the batches since then are left out.", "warning")
        return None

    @functools.cached_property
    def _examples(self) -> dict[str, np.ndarray]:
        # Drawn when they are first needed: decoding them would hold up the first step.
        return publish.sample_examples(self.trainer, self.faults)

    def _sample(self) -> None:
        if processes.is_first():
            with self.journal.softly("samples/"):
                publish.sample(self.trainer, self.state, self.workdir / "samples" / f"{self.step:08d}.png", self._examples)

    def _validate(self) -> None:
        """Measures the averaged weights, and keeps the best."""
        model = publish.current_model(self.trainer, self.state)
        observe = functools.partial(self.journal.preview, self.step)
        with self.watch.patient():  # it may take longer than a step
            try:
                row = self.validation.measure(model, self.step, observe)
            except BadInput as error:
                self.journal.event(self.step, "fault", f"Nothing could be validated: {error}", "warning")
                return
        self.journal.validation(row)
        if row["best"]:
            with self.journal.softly("model-best/"):
                self.publisher.publish(self.state, "model-best")

    def _check_checkpoints(self) -> None:
        """Says so when a save in the background has failed. The next one may succeed: a disk may become free again."""
        try:
            self.checkpoints.check()
        except OSError as error:
            if processes.count() > 1:
                raise  # the others may have saved
            self._say_unsaved(error)
        try:
            self.publisher.check()
        except OSError as error:  # the first process alone writes models
            self._say_unsaved(error)

    def _say_unsaved(self, error: OSError) -> None:
        """Says once what could not be saved, and why."""
        if str(error) not in self.unsaved:
            self.journal.event(self.step, "fault", f"{error}. Training goes on, and tries again the next time.", "bad")
        self.unsaved.add(str(error))

    def _save(self, metrics: Mapping[str, jax.Array], last: bool = False) -> None:
        """Saves a checkpoint and the model, unless the objective is far off its history. Only the `last` one raises errors."""
        periodic = self.step % self.trainer.config.train.checkpoint_every == 0 and self.step < self.trainer.config.train.steps
        # A run may go back to a periodic checkpoint, so that must be a good one, even if it is a stop that makes it.
        if self._not_finite(metrics) or (periodic and not guard.good(metrics)):
            return
        images, data = self.step * self.trainer.config.train.batch, self.trainer.manifest.digest
        clock = {"step": self.step, "images": images, "seconds": self._seconds(), "data": data}
        try:
            self.checkpoints.save(self.step, self.state, clock)
            self.publisher.publish(self.state, "model")
            if last:
                self.checkpoints.wait()
                self.checkpoints.check()
        except OSError as error:
            if last or processes.count() > 1:
                raise
            self._say_unsaved(error)

    def _is_over(self, status: int | None, until: int) -> Ending | None:
        steps = self.trainer.config.train.steps
        if status is not None:
            return Ending(
                status,
                True,
                f"stopped at step {self.step} of {steps}, checkpoint written; the same command goes on from here",
            )
        if self.validation.ends_early():
            return Ending(EXIT_DONE, True, self._stopped_early())
        if self.step == until:
            done = f"{self.workdir}: done, {steps} steps; model in {self.workdir / 'model'}"
            return Ending(EXIT_DONE, True, done if until == steps else "")
        return None

    def _stopped_early(self) -> str:
        best, since = self.validation.best(), self.validation.since_best()
        where = f"; the best model, of step {best['step']}, is in {self.workdir / 'model-best'}" if best else ""
        return f"{self.workdir}: ended early at step {self.step}, after {since} validation(s) without a better one{where}"

    def _end(self, ending: Ending, metrics: Mapping[str, jax.Array]) -> int:
        """Saves what is sound, writes the last report, and returns the exit status."""
        if ending.save:
            # A state that is not finite must not replace a sound checkpoint, however the run came to its end.
            ending = self._not_finite(metrics) or ending
        if ending.save:
            self._save(metrics, last=True)
        self.checkpoints.wait()
        try:
            self.publisher.wait()
        except OSError as error:
            # A run that was stopped goes on from its checkpoint, and writes its model then.
            if ending.status == EXIT_DONE:
                raise
            self._say_unsaved(error)
        if ending.save and (latest := self.checkpoints.latest()) != self.step:
            message = ending.message.replace("checkpoint written", f"the last checkpoint is of step {latest or 0}")
            ending = ending._replace(message=message)
        if ending.message and ending.status != EXIT_FAILED:
            self.journal.event(self.step, "done" if ending.status == EXIT_DONE else "stopped", f"{ending.message}.")
        if ending.status != EXIT_FAILED:  # of a run that has failed, the last event says all
            self.journal.verdicts(self.step, self.validation.rows)
        self.journal.close()
        progress.say(ending.message, error=ending.status == EXIT_FAILED)
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
