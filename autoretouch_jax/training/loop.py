"""The training loop: one visible path from a config to a trained model. No maths here."""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from autoretouch_jax import config as configs
from autoretouch_jax import files, hosts, parallel, rules
from autoretouch_jax.config import Config
from autoretouch_jax.data import pipeline
from autoretouch_jax.data.sources import open_source
from autoretouch_jax.errors import BadInput
from autoretouch_jax.evaluation import report
from autoretouch_jax.models.bundle import Model, load_model, retouch_array, save_model
from autoretouch_jax.stop import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, StopRequest
from autoretouch_jax.training.checkpoint import Checkpoints, has_checkpoint
from autoretouch_jax.training.log import MetricsLog
from autoretouch_jax.training.program import compiled_step
from autoretouch_jax.training.state import State, check_start, count, init_state, make_networks, start_from

SAMPLES = 6


class Trainer:
    """What a run needs before its first step: checked data, networks, the compiled step. Building it writes nothing."""

    def __init__(self, config: Config, start: Path | str | None = None):
        """`start` is the model to start with, `train.start_from` where it is not given."""
        rules.validate(config)
        self.mesh = parallel.make_mesh(config.parallel, config.train.batch)
        self.source = open_source(config.data)
        self.config = config = _with_steps(config, len(self.source))
        start = start or config.train.start_from
        self.start = load_model(start) if start else None
        if self.start:
            check_start(self.start, config)
        self.networks, frozen = make_networks(config)
        self.frozen = parallel.replicate(frozen, self.mesh)
        self.shardings, self.step = compiled_step(config, self.networks, self.mesh)

    def init(self) -> State:
        """A fresh state on the devices; the generator's weights are `train.start_from`'s where it names a model."""
        state = init_state(self.config, self.networks)
        return parallel.place(start_from(state, self.start, self.config) if self.start else state, self.shardings)

    def batches(self, first_step: int, faults: pipeline.Faults | None = None) -> Iterator[Any]:
        """Host batches from a step on; examples that cannot be read are noted in `faults`."""
        host = pipeline.Host(hosts.number(), hosts.count())
        return pipeline.batches(self.source, self.config, first_step, host=host, faults=faults)

    def put(self, batch: Any, leaving: int | None = None) -> Any:
        """This process's share of a batch onto its devices. Among several the step also carries who was asked to stop."""
        if hosts.count() > 1:
            batch = batch | {"stop": np.full(len(batch["source"]), leaving is not None, np.float32)}
        return parallel.shard_batch(batch, self.mesh, self.config.parallel.mode)


def _with_steps(config: Config, images: int) -> Config:
    """`train.epochs` as steps, where `train.steps` is 0."""
    if config.train.steps:
        return config
    steps = math.ceil(config.train.epochs * images / config.train.batch)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def run(config: Config, workdir: Any, stop: StopRequest | None = None, until: int | None = None) -> int:
    """Train until `train.steps`, resuming what `workdir` holds. Returns the exit status (see the README).

    `stop` is asked for the end before its time; `until` ends this call after that many steps, with nothing else changed. Raises
    Refused, before anything is written, when the config, the data, a weight file or the work directory do not fit.
    """
    config, workdir = configs.resolve(config), files.place(workdir)
    rules.validate(config)
    with stop or StopRequest() as stop, hosts.one_run(config.parallel), hosts.Watch(config.parallel.timeout) as watch:
        stored = workdir / "config.json"
        with files.reachable(f"--workdir {workdir}"):
            files.check_bucket(workdir)
            if stored.is_file():
                configs.refuse_other_run(config, stored)
        # A resumed run takes everything from its checkpoint; `train.start_from` may have moved meanwhile.
        resumed = has_checkpoint(workdir / "checkpoints") and (workdir / "model" / "model.json").is_file()
        trainer = Trainer(config, workdir if resumed else None)
        config = trainer.config
        hosts.barrier("everything is checked", hosts.LONGEST_STEP)
        if hosts.is_first():
            with files.reachable(f"--workdir {workdir}"):
                (workdir / "samples").mkdir(parents=True, exist_ok=True)
                configs.write_json(config, stored)
        hosts.barrier("the work directory is there", config.parallel.timeout)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return _train(trainer, workdir, checkpoints, stop, watch, min(until or config.train.steps, config.train.steps))


def _train(trainer: Trainer, workdir: Path, checkpoints: Checkpoints, stop: StopRequest, watch: hosts.Watch, until: int) -> int:
    config, steps, first_host = trainer.config, trainer.config.train.steps, hosts.is_first()

    # ---- start or resume -------------------------------------------------------------------------------------------
    state, seconds = trainer.init(), 0.0
    if (latest := checkpoints.latest()) is not None:
        state, clock = checkpoints.restore(latest, state, trainer.shardings)
        seconds = clock["seconds"]
    first = latest or 0
    log = MetricsLog(workdir / "metrics.jsonl", first, silent=not first_host)
    if first >= until:
        _publish(trainer, workdir, state)
        if first_host and until == steps:
            print(f"{workdir}: finished, {first} of {steps} steps done; raise --train.steps to go on")
        return EXIT_DONE
    _announce(trainer, state, first)

    # ---- the loop --------------------------------------------------------------------------------------------------
    faults = pipeline.Faults(config.data, len(trainer.source))
    batches, examples = trainer.batches(first, faults), _sample_examples(trainer, faults)
    window: list[dict[str, jax.Array]] = []
    waited, started = 0.0, time.perf_counter()
    since, since_step, step = started, first, first
    metrics: dict[str, jax.Array] = {}
    leaving: int | None = None  # the exit status, once all processes have agreed to stop

    def save() -> None:
        clock = {"step": step, "images": step * config.train.batch, "seconds": seconds + time.perf_counter() - started}
        checkpoints.save(step, state, clock)
        _publish(trainer, workdir, state)

    with _bar(first, steps) as bar:
        while step < until and leaving is None:
            before = time.perf_counter()
            try:
                batch = trainer.put(next(batches), stop.exit_code)
            except BadInput as error:
                if hosts.count() > 1:  # the others are in the middle of a step that this process cannot make
                    raise
                save()
                print(f"stopped at step {step}, checkpoint written: {error}", file=sys.stderr)
                return EXIT_FAILED
            waited += time.perf_counter() - before
            state, metrics = trainer.step(state, batch, trainer.frozen)
            if window:  # one step ahead of the devices and no further, so that the bar and a stop request are prompt
                jax.block_until_ready(window[-1])
            step += 1
            leaving = stop.exit_code if hosts.count() == 1 else _agreed(window, stop)
            watch.step(step)
            checkpoints.check()
            bar.update(1)

            if step % config.train.log_every == 0 or step == until:
                # The newest step is still being computed and is read next time.
                means = _means(window or [metrics])
                window, now = [], time.perf_counter()
                speed = (step - since_step) * config.train.batch / (now - since)
                record = {"step": step, "images": step * config.train.batch, **means, "images_per_s": round(speed, 3)}
                record |= {"input_wait_share": round(waited / (now - since), 4), "bad_examples": len(faults.named)}
                for fault in faults.news():
                    bar.write(f"replaced by another example: {fault}", file=sys.stderr)
                log.write(record | {"seconds": round(seconds + now - started, 3)})
                bar.set_postfix_str(f"{speed:.1f} images/s", refresh=False)
                since, since_step, waited = now, step, 0.0
                if _exploded(means, step):
                    return EXIT_FAILED
            window.append(metrics)
            if step % config.train.sample_every == 0 or step == steps:
                _sample(trainer, state, workdir / "samples" / f"{step:08d}.png", examples)
            if step % config.train.checkpoint_every == 0 and step < until:
                if _exploded(metrics, step):
                    return EXIT_FAILED
                save()
        if _exploded(metrics, step):
            return EXIT_FAILED
        save()
    checkpoints.wait()
    if leaving is not None and first_host:
        print(f"stopped at step {step} of {steps}, checkpoint written; the same command goes on from here")
    elif first_host and until == steps:
        print(f"{workdir}: done, {steps} steps; model in {workdir / 'model'}")
    return EXIT_DONE if leaving is None else leaving


def _agreed(window: list[dict[str, jax.Array]], stop: StopRequest) -> int | None:
    """The exit status when some process was asked to stop before the last finished step: the same step for all of them."""
    if not window or float(window[-1]["stop"]) == 0:
        return None
    return stop.exit_code or EXIT_REQUEUE


def _bar(first: int, steps: int) -> tqdm:
    """A progress bar with time left; in a log file a line every half a minute."""
    shown = hosts.is_first()
    interval = 0.1 if sys.stdout.isatty() else 30.0
    return tqdm(
        total=steps,
        initial=first,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        file=sys.stdout,
        mininterval=interval,
        disable=not shown,
    )


def _exploded(metrics: Mapping[str, Any], step: int) -> bool:
    """Whether any value is not finite, and if so says what to do. Nothing is saved after that."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        print(
            f"stopped at step {step}: {bad[0]} is not finite; the last checkpoint is from before. Lower "
            "--optim.generator-lr, or set --optim.clip-norm 1, in a new --workdir",
            file=sys.stderr,
        )
    return bool(bad)


def _means(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    fetched = jax.device_get(window)
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0] if name != "stop"}


def _announce(trainer: Trainer, state: State, first: int) -> None:
    if not hosts.is_first():
        return
    config = trainer.config
    parts = [f"generator {count(state.generator.params):,} parameters"]
    if state.discriminator is not None:
        parts.append(f"discriminator {count(state.discriminator.params):,}")
    device = trainer.mesh.devices.flat[0]
    print(
        f"{', '.join(parts)}; batch {config.train.batch} on {trainer.mesh.size} {device.platform} device(s) of "
        f"{hosts.count()} process(es) "
        f"({config.parallel.mode}, {config.train.precision}); {len(trainer.source)} images, crop {config.data.crop}; "
        f"steps {first} → {config.train.steps}",
        flush=True,
    )


def _sample_examples(trainer: Trainer, faults: pipeline.Faults) -> dict[str, np.ndarray]:
    """A few fixed training crops to look at, the same for the whole life of the run."""
    collected: list[dict[str, np.ndarray]] = []
    batches = pipeline.batches(trainer.source, trainer.config, 0, seed_offset=1, faults=faults)
    while sum(len(batch["source"]) for batch in collected) < SAMPLES:
        collected.append(next(batches))
    return {name: np.concatenate([batch[name] for batch in collected])[:SAMPLES] for name in collected[0]}


def _ema_model(trainer: Trainer, state: State) -> Model:
    params = state.ema if trainer.config.optim.ema else state.generator.params
    stats = {"batch_stats": state.generator.stats} if state.generator.stats else {}
    return Model(trainer.config.generator, parallel.local({"params": params, **stats}))


def _sample(trainer: Trainer, state: State, path: Path, examples: dict[str, np.ndarray]) -> None:
    if not hosts.is_first():
        return
    model = _ema_model(trainer, state)
    output = np.stack([retouch_array(model, image) for image in examples["source"]])
    rows = report.comparison(examples["source"], output, examples["target"])
    report.save_picture(path, rows.reshape(-1, *rows.shape[2:]))


def _publish(trainer: Trainer, workdir: Path, state: State) -> None:
    """Write `model/`."""
    if not hosts.is_first():
        return
    variables = _ema_model(trainer, state).variables
    licenses = [trainer.source.license, trainer.start.data_license if trainer.start else None]
    save_model(
        workdir / "model",
        trainer.config.generator,
        variables["params"],
        variables.get("batch_stats"),
        int(state.step),
        "; ".join(dict.fromkeys(filter(None, licenses))) or None,
    )
