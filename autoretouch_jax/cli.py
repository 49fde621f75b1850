"""The `autoretouch` command: one short function per verb. A verb's module is imported when the verb is called.

Exit status: 0 done; 1 some items failed, the rest is written; 2 refused before anything was started; 75 stopped early with a
checkpoint, requeue; 130 interrupted from the keyboard, checkpoint written.
"""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autoretouch_jax.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    BadInput,
    Refused,
    did_you_mean,
    needing,
)
from autoretouch_jax.runtime.stop import StopRequest, parse_duration, requeue_on_sigterm

Argv = Sequence[str]

# Verbs that take the flags of a run. A scheduler may stop and start them again: on SIGTERM they exit with 75, even during
# their imports.
RESTARTABLE = ("train", "sweep")
WITHOUT_DATA = ("plan", "bench step", "bench infer")  # verbs that take those flags too, and read no data


# ---- the verbs --------------------------------------------------------------------------------------------------------------


def _train(argv: Argv) -> int:
    arguments = parse_with_config("train", argv)
    # Entered before the imports, which take seconds: a signal must be caught from the first moment on.
    with StopRequest(parse_duration(arguments.max_time) if arguments.max_time else 0) as stop:
        from autoretouch_jax.training import kept_step

        kept_step.read_ahead(arguments.run, arguments.workdir)
        from autoretouch_jax.training import loop

        return loop.run(arguments.run, arguments.workdir, stop)


def _plan(argv: Argv) -> int:
    arguments = parse_with_config("plan", argv)
    from autoretouch_jax.planning import plan

    return plan.run(arguments.run, arguments.topology, arguments.fit, arguments.json)


def _sweep(argv: Argv) -> int:
    arguments = parse_with_config("sweep", argv)
    with needing("sweep"):  # Optuna is an extra: without it, every other verb works
        from autoretouch_jax.sweeps import space, sweep
    from autoretouch_jax.data.folders import PairSource

    search = (arguments.workdir, arguments.search, arguments.metric, arguments.rungs, arguments.storage)
    definition = sweep.Sweep(arguments.run, space.read_space(arguments.space), arguments.trials, *search)
    # Trials are trained and measured with one definition of the edit.
    threshold = arguments.run.data.edit_threshold
    return sweep.run(definition, PairSource(arguments.source, arguments.target, edit_threshold=threshold))


def _doctor(argv: Argv) -> int:
    arguments = parse("doctor", argv)
    from autoretouch_jax.tools import doctor

    return doctor.run(arguments.workdir)


def _evaluate(argv: Argv) -> int:
    arguments = parse("evaluate", argv)
    if not arguments.models:
        raise Refused("MODEL is missing: name a run, or its model/ folder, or pretrained")
    if bool(arguments.source) != bool(arguments.target) or not (arguments.source or arguments.leave_alone):
        raise Refused("give --source BEFORE and --target AFTER, or --leave-alone PHOTOS, or all three")
    from autoretouch_jax.config import ParallelConfig
    from autoretouch_jax.data.folders import PairSource, PhotoSource
    from autoretouch_jax.evaluation import evaluate, lpips
    from autoretouch_jax.runtime import processes

    # Every process checks the folders by itself, before it waits for the others.
    pairs = None
    if arguments.source:
        pairs = PairSource(arguments.source, arguments.target, edit_threshold=arguments.edit_threshold)
    alone = PhotoSource(arguments.leave_alone, "--leave-alone") if arguments.leave_alone else None
    # The same command on several hosts shares the pairs among them.
    with processes.one_run(ParallelConfig()):
        metric = None
        if arguments.lpips != "none":
            metric = lpips.load(arguments.lpips, arguments.lpips_weights, arguments.lpips_heads)
        output = (arguments.json, arguments.pictures)
        return evaluate.run(arguments.models, pairs, *output, metric, arguments.faces, alone, arguments.csv)


def _compare(argv: Argv) -> int:
    arguments = parse("compare", argv)
    from autoretouch_jax.tools import compare

    return compare.run(arguments.runs, arguments.html)


def _models(argv: Argv) -> int:
    parse("models", argv)
    from autoretouch_jax.tools import catalogue

    return catalogue.run()


def _average(argv: Argv) -> int:
    arguments = parse("average", argv)
    from autoretouch_jax.models import average

    return average.run(arguments.models, arguments.out)


def _convert(argv: Argv) -> int:
    arguments = parse("convert", argv)
    from autoretouch_jax.models import pytorch_import

    return pytorch_import.run(arguments.weights, arguments.out, arguments.test_mode)


def _retouch(argv: Argv) -> int:
    arguments = parse("retouch", argv)
    # Entered before the imports, as in `_train`: on SIGTERM the photographs that are begun are left out, and none is torn.
    with StopRequest() as stop:
        from autoretouch_jax.inference import job

        given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(job.Job)}
        return job.run(job.Job(**given), arguments.model, arguments.face_size, stop)


def _export(argv: Argv) -> int:
    arguments = parse("export", argv)
    from autoretouch_jax.inference.export import export

    return export.run(arguments.model, arguments.to, arguments.out, arguments.precision)


def _serve(argv: Argv) -> int:
    arguments = parse("serve", argv)
    with needing("serve"):  # so is the web server
        from autoretouch_jax.inference import serve

    size = (round(1e6 * arguments.max_megabytes), round(1e6 * arguments.max_megapixels))
    limits = serve.Limits(*size, arguments.timeout, arguments.at_once, arguments.waiting)
    return serve.run(arguments.model, arguments.host, arguments.port, limits)


def _demo(argv: Argv) -> int:
    arguments = parse("demo", argv)
    from autoretouch_jax.demo import demo

    return demo.run(arguments.minutes, arguments.workdir)


def _data_prepare(argv: Argv) -> int:
    arguments = parse("data prepare", argv)
    if arguments.tfds is None and len(arguments.pairs) != 2:
        raise Refused("give two folders, before and after retouching, or --tfds FOLDER")
    if arguments.tfds and arguments.pairs:
        raise Refused("--tfds and two folders exclude each other")
    from autoretouch_jax.data import folders, prepare
    from autoretouch_jax.data.audit_file import advising_an_audit, read_audit

    audit = read_audit(arguments.audit, "--audit") if arguments.audit else None
    if arguments.tfds:
        from autoretouch_jax.data.tfds_source import TfdsPairs

        pairs: prepare.Pairs = TfdsPairs.open(arguments.tfds, arguments.split, arguments.edit_threshold)
        pairs = prepare.sound(pairs, audit) if audit else pairs
    else:
        source, target = arguments.pairs
        with advising_an_audit("--audit", audit, (source, target)):
            files, _ = folders.checked_pairs(source, target, audit, arguments.edit_threshold)
        for warning in files.warnings:
            print(warning, file=sys.stderr)
        pairs = files
    weights = audit.weights if audit else None
    return prepare.run(pairs, arguments.out, arguments.workers, arguments.on_bad, arguments.license, weights)


def _data_verify(argv: Argv) -> int:
    arguments = parse("data verify", argv)
    from autoretouch_jax.data import prepare

    return prepare.verify(arguments.records)


def _data_audit(argv: Argv) -> int:
    arguments = parse("data audit", argv)
    if bool(arguments.pairs) + bool(arguments.records) + bool(arguments.tfds) != 1 or len(arguments.pairs) not in (0, 2):
        raise Refused("give two folders, before and after retouching, or --records FOLDER, or --tfds FOLDER")
    from autoretouch_jax.audit import audit, inputs

    if arguments.records:
        audited = inputs.from_records(arguments.records)
    elif arguments.tfds:
        audited = inputs.from_tfds(arguments.tfds, arguments.split)
    else:
        audited = inputs.from_files(*arguments.pairs)
    search = arguments.labels, arguments.labels_sample
    return audit.run(audited, arguments.json, arguments.html, arguments.workers, *search)


def _data_build(argv: Argv) -> int:
    arguments = parse("data build", argv)
    from autoretouch_jax.data import tfds_builders

    given: dict[str, Any] = {"source": arguments.source, "target": arguments.target, "data_dir": str(arguments.out)}
    if arguments.kind == "ffhqr":
        if arguments.audit:
            raise Refused("--audit is for retouch_pairs; ffhqr keeps to the published data set and its split")
        return tfds_builders.build(tfds_builders.Ffhqr(md5=arguments.md5, **given))
    given |= {"validation": arguments.validation, "test": arguments.test, "license": arguments.license}
    given["audit"] = arguments.audit
    return tfds_builders.build(tfds_builders.RetouchPairs(**given))


def _bench_step(argv: Argv) -> int:
    arguments = parse_with_config("bench step", argv)
    from autoretouch_jax.tools import bench_step

    return bench_step.step(arguments.run, arguments.steps, arguments.profile, arguments.json)


def _bench_infer(argv: Argv) -> int:
    arguments = parse_with_config("bench infer", argv)
    from autoretouch_jax.tools import bench_step

    return bench_step.infer(arguments.run, arguments.sizes, arguments.steps, arguments.profile, arguments.json)


def _bench_e2e(argv: Argv) -> int:
    arguments = parse_with_config("bench e2e", argv)
    from autoretouch_jax.tools import bench_step

    return bench_step.e2e(arguments.run, arguments.steps, arguments.json)


def _bench_data(argv: Argv) -> int:
    arguments = parse("bench data", argv)
    if bool(arguments.source) != bool(arguments.target):
        raise Refused("--source and --target belong together")
    from autoretouch_jax.tools import bench

    return bench.data(arguments.source, arguments.target, arguments.pairs, arguments.seconds, arguments.json)


VERBS: dict[str, Callable[[Argv], int]] = {
    "demo": _demo,
    "train": _train,
    "plan": _plan,
    "sweep": _sweep,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "compare": _compare,
    "retouch": _retouch,
    "export": _export,
    "serve": _serve,
    "models": _models,
    "average": _average,
    "convert": _convert,
    "data prepare": _data_prepare,
    "data audit": _data_audit,
    "data build": _data_build,
    "data verify": _data_verify,
    "bench step": _bench_step,
    "bench infer": _bench_infer,
    "bench e2e": _bench_e2e,
    "bench data": _bench_data,
}


# ---- arguments --------------------------------------------------------------------------------------------------------------


def parse_with_config(verb: str, argv: Argv) -> Any:
    """Returns the arguments of a verb that takes a CONFIG, whose values are then the defaults of its flags.

    Raises Refused as `parse` does, and when CONFIG is missing.
    """
    from autoretouch_jax.arguments import switches, with_defaults
    from autoretouch_jax.config import Config
    from autoretouch_jax.config.loading import choose_data, config_argument, load

    path = config_argument(argv, switches(verb))
    default = load(path) if path else Config()
    if verb not in WITHOUT_DATA:
        default = choose_data(default, argv)
    arguments = parse(verb, argv, with_defaults(verb, default))
    if path is None:
        raise Refused("CONFIG is missing: name a Python file such as configs/retouch.py")
    if arguments.config != Path(path):  # a flag has taken CONFIG as one more of its values
        raise Refused(f"CONFIG {path} cannot be told from a flag's value here; give it first")
    return arguments


def parse(verb: str, argv: Argv, default: Any = None) -> Any:
    """Returns the typed arguments of a verb, see `arguments/`.

    Raises Refused, in one line and with the nearest known key, when they do not parse.
    """
    import tyro

    from autoretouch_jax.arguments import ARGUMENTS

    # tyro prints a page for a mistake. A refusal is one line, so its output is caught and shortened.
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                ARGUMENTS[verb],
                prog=f"autoretouch {verb}",
                args=list(argv),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # tyro draws a box around its message and ends it with a hint of its own.
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", messages.getvalue()).split()).split(" For full helptext")[0]
    raise Refused(f"{text}; see autoretouch {verb} --help")


def usage(group: str = "") -> str:
    """Returns what `autoretouch --help` prints, or `autoretouch data --help` for a group of verbs."""
    from autoretouch_jax.arguments import ARGUMENTS

    lines = [f"usage: autoretouch {group}VERB …", "", "Train face retouching on your own pairs, measure it, use it.", ""]
    summaries = {verb: (ARGUMENTS[verb].__doc__ or "").splitlines()[0] for verb in VERBS if verb.startswith(group)}
    lines += [f"  {verb:14}{summary}" for verb, summary in summaries.items()]
    return "\n".join([*lines, "", "autoretouch VERB --help explains a verb; autoretouch --version prints the version."])


# ---- the command ------------------------------------------------------------------------------------------------------------


def main(argv: Argv | None = None) -> int:
    """Runs a verb and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_DONE if argv else EXIT_REFUSED
    # `--help` and `--version` import nothing heavy, so they answer at once.
    if argv[0] == "--version":
        from autoretouch_jax import __version__

        print(__version__)
        return EXIT_DONE
    # Verbs such as `data audit` are two words.
    words = 2 if any(verb.startswith(f"{argv[0]} ") for verb in VERBS) else 1
    if argv[words - 1 : words] in ([], ["-h"], ["--help"]):  # a group of verbs without a verb
        print(usage(f"{argv[0]} "))
        return EXIT_DONE if len(argv) == words else EXIT_REFUSED
    verb = " ".join(argv[:words])
    with requeue_on_sigterm() if verb in RESTARTABLE else contextlib.nullcontext():
        return _run(verb, argv[words:])


def _run(verb: str, argv: Argv) -> int:
    """Runs a verb, and turns its errors into a message and an exit status."""
    try:
        if verb not in VERBS:
            raise Refused(f"no such verb; the verbs are {', '.join(VERBS)}{did_you_mean(verb, list(VERBS))}")
        if not verb.startswith("bench"):  # a benchmark measures how long compiling takes
            from autoretouch_jax.runtime import compile_cache

            compile_cache.enable()
        return VERBS[verb](argv)
    except Refused as error:
        print(f"autoretouch {verb}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except (BadInput, OSError) as error:  # an OSError: a full disk, a file that vanished
        print(f"autoretouch {verb}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except RuntimeError as error:  # too little memory, a step that XLA cannot compile; any other is a bug
        from autoretouch_jax.runtime.failures import explain

        failure = explain(error, training=verb in RESTARTABLE)
        if failure is None:
            raise
        print(f"autoretouch {verb}: {failure}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
