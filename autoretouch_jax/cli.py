"""The `autoretouch` command: one short function per verb. A verb's module is imported when the verb is called.

Exit status: 0 done; 1 some items failed, the rest is written; 2 refused before anything was started; 75 stopped early with a
checkpoint, requeue; 130 interrupted from the keyboard, checkpoint written.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from autoretouch_jax import __version__
from autoretouch_jax import config as configs
from autoretouch_jax.arguments import (
    Audit,
    BenchData,
    Build,
    Convert,
    Demo,
    Doctor,
    Evaluate,
    Models,
    Plan,
    Prepare,
    Retouch,
    Sweep,
    Train,
    Verify,
)
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.stop import StopRequest, seconds

T = TypeVar("T")


def _train(argv: Sequence[str]) -> int:
    named = next((arg for arg in argv if arg.endswith(".py")), None)
    default = configs.load(named) if named else configs.Config()
    start = Train(Path("CONFIG.py"), tyro.MISSING, run=configs.choose_data(default, argv))
    arguments = parse("train", Train, argv, start)
    if named is None:
        raise Refused("CONFIG is missing: name a Python file such as configs/portraits.py")
    stop = StopRequest(seconds(arguments.max_time) if arguments.max_time else 0)
    with stop:  # before the imports, which take seconds
        from autoretouch_jax.training import loop

        return loop.run(arguments.run, arguments.workdir, stop)


def _plan(argv: Sequence[str]) -> int:
    named = next((arg for arg in argv if arg.endswith(".py")), None)
    default = configs.load(named) if named else configs.Config()
    arguments = parse("plan", Plan, argv, Plan(Path("CONFIG.py"), run=default))
    if named is None:
        raise Refused("CONFIG is missing: name a Python file such as configs/retouch.py")
    from autoretouch_jax import plan

    return plan.run(arguments.run, arguments.topology, arguments.fit, arguments.json)


def _sweep(argv: Sequence[str]) -> int:
    named = next((arg for arg in argv if arg.endswith(".py")), None)
    default = configs.load(named) if named else configs.Config()
    missing = tyro.MISSING
    start = Sweep(Path("CONFIG.py"), missing, missing, missing, missing, run=configs.choose_data(default, argv))
    arguments = parse("sweep", Sweep, argv, start)
    try:
        from autoretouch_jax import sweep
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: pip install 'autoretouch-jax[sweep]'") from error
    from autoretouch_jax.data.sources import PairSource

    space = sweep.read_space(arguments.space)
    place = (arguments.workdir, arguments.search, arguments.metric, arguments.rungs, arguments.storage)
    common = sweep.Sweep(arguments.run, space, arguments.trials, *place)
    return sweep.run(common, PairSource(arguments.source, arguments.target))


def _doctor(argv: Sequence[str]) -> int:
    arguments = parse("doctor", Doctor, argv)
    from autoretouch_jax import doctor

    return doctor.run(arguments.workdir)


def _evaluate(argv: Sequence[str]) -> int:
    arguments = parse("evaluate", Evaluate, argv)
    from autoretouch_jax import hosts
    from autoretouch_jax.data.sources import PairSource
    from autoretouch_jax.evaluation import evaluate, lpips

    if not arguments.models:
        raise Refused("MODEL is missing: name a run, or its model/ folder")
    pairs = PairSource(arguments.source, arguments.target)
    with hosts.one_run(configs.ParallelConfig()):
        metric = None
        if arguments.lpips != "none":
            metric = lpips.load(arguments.lpips, arguments.lpips_weights, arguments.lpips_heads)
        return evaluate.run(arguments.models, pairs, arguments.json, arguments.pictures, metric)


def _models(argv: Sequence[str]) -> int:
    parse("models", Models, argv)
    from autoretouch_jax import catalogue

    return catalogue.run()


def _convert(argv: Sequence[str]) -> int:
    arguments = parse("convert", Convert, argv)
    from autoretouch_jax.models import bundle, peers, weights

    config, variables = peers.generator(weights.read_arrays(arguments.weights))
    bundle.check_shapes(arguments.weights, config, variables)
    bundle.save_model(arguments.out, config, variables["params"], variables.get("batch_stats"), 0)
    print(f"{arguments.out}: {config}")
    return 0


def _retouch(argv: Sequence[str]) -> int:
    arguments = parse("retouch", Retouch, argv)
    from autoretouch_jax.inference import retoucher

    return retoucher.run(arguments.model, arguments.photos, arguments.out, arguments.strength)


def _demo(argv: Sequence[str]) -> int:
    arguments = parse("demo", Demo, argv)
    from autoretouch_jax import demo

    return demo.run(arguments.minutes, arguments.workdir)


def _data_prepare(argv: Sequence[str]) -> int:
    arguments = parse("data prepare", Prepare, argv)
    if arguments.tfds is None and len(arguments.pairs) != 2:
        raise Refused("give two folders, before and after retouching, or --tfds FOLDER")
    if arguments.tfds and arguments.pairs:
        raise Refused("--tfds and two folders exclude each other")
    from autoretouch_jax.data import prepare, sources

    if arguments.tfds:
        from autoretouch_jax.data.builders import TfdsPairs

        pairs: prepare.Pairs = TfdsPairs.open(arguments.tfds, arguments.split)
    else:
        pairs = sources.checked_pairs(*arguments.pairs)[0]
    return prepare.run(pairs, arguments.out, arguments.workers, arguments.on_bad, arguments.license)


def _data_verify(argv: Sequence[str]) -> int:
    arguments = parse("data verify", Verify, argv)
    from autoretouch_jax.data import prepare

    return prepare.verify(arguments.records)


def _data_audit(argv: Sequence[str]) -> int:
    arguments = parse("data audit", Audit, argv)
    from autoretouch_jax.data import audit

    return audit.run(arguments.source, arguments.target, arguments.json, arguments.html, arguments.workers, arguments.labels)


def _data_build(argv: Sequence[str]) -> int:
    arguments = parse("data build", Build, argv)
    from autoretouch_jax.data import builders

    place: dict[str, Any] = {"source": arguments.source, "target": arguments.target, "data_dir": str(arguments.out)}
    if arguments.kind == "ffhqr":
        return builders.build(builders.Ffhqr(md5=arguments.md5, **place))
    place |= {"validation": arguments.validation, "test": arguments.test, "license": arguments.license}
    return builders.build(builders.RetouchPairs(**place))


def _bench_data(argv: Sequence[str]) -> int:
    arguments = parse("bench data", BenchData, argv)
    if bool(arguments.source) != bool(arguments.target):
        raise Refused("--source and --target belong together")
    from autoretouch_jax import bench

    return bench.data(arguments.source, arguments.target, arguments.pairs, arguments.seconds, arguments.json)


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], type]] = {
    "demo": (_demo, Demo),
    "train": (_train, Train),
    "plan": (_plan, Plan),
    "sweep": (_sweep, Sweep),
    "doctor": (_doctor, Doctor),
    "evaluate": (_evaluate, Evaluate),
    "retouch": (_retouch, Retouch),
    "models": (_models, Models),
    "convert": (_convert, Convert),
    "data prepare": (_data_prepare, Prepare),
    "data audit": (_data_audit, Audit),
    "data build": (_data_build, Build),
    "data verify": (_data_verify, Verify),
    "bench data": (_bench_data, BenchData),
}


def parse(verb: str, arguments: type[T], argv: Sequence[str], default: Any = tyro.MISSING_NONPROP) -> T:
    """Typed arguments of a verb; raises Refused, in one line and with the nearest known key, when they do not parse."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(
                arguments,
                prog=f"autoretouch {verb}",
                args=list(argv),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", heard.getvalue()).split()).split(" For full helptext")[0]
    raise Refused(f"{text}; see autoretouch {verb} --help")


def usage(group: str = "") -> str:
    """What `autoretouch --help` prints, or `autoretouch data --help` for a group."""
    lines = [f"usage: autoretouch {group}VERB …", "", "Train face retouching on your own pairs, measure it, use it.", ""]
    verbs = {name: kind for name, (_, kind) in VERBS.items() if name.startswith(group)}
    lines += [f"  {name:14}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in verbs.items()]
    return "\n".join([*lines, "", "autoretouch VERB --help explains a verb; autoretouch --version prints the version."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    words = 2 if any(verb.startswith(f"{argv[0]} ") for verb in VERBS) else 1
    if argv[words - 1 : words] in ([], ["-h"], ["--help"]):
        print(usage(f"{argv[0]} "))
        return 0 if len(argv) == words else 2
    verb = " ".join(argv[:words])
    try:
        if verb not in VERBS:
            raise Refused(f"no such verb; the verbs are {', '.join(VERBS)}{configs.nearest(verb, list(VERBS))}")
        return VERBS[verb][0](argv[words:])
    except Refused as error:
        print(f"autoretouch {verb}: {error}", file=sys.stderr)
        return 2
    except (BadInput, OSError) as error:  # a full disk, a file that vanished
        print(f"autoretouch {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
