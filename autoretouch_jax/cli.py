"""The `autoretouch` command: one short function per verb. A verb's module is imported when the verb is called.

Exit status: 0 done; 1 some items failed, the rest is written; 2 refused before anything was started; 75 stopped early with a
checkpoint, requeue; 130 interrupted from the keyboard, checkpoint written.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from autoretouch_jax import __version__
from autoretouch_jax import config as configs
from autoretouch_jax.errors import BadInput, Refused

T = TypeVar("T")


@dataclass(frozen=True)
class Train:
    """Train a retoucher. The same command again resumes.

    Clean faces, blemishes made on the fly:  autoretouch train configs/portraits.py --data.root FACES --workdir runs/a

    Before/after pairs:  autoretouch train configs/autoretouch.py --data.source BEFORE --data.target AFTER --workdir runs/b
    """

    config: Positional[Path]
    """A Python file that defines `config`; name it to see its values in this help."""
    workdir: Path
    """Where config.json, metrics.jsonl, checkpoints/, samples/ and model/ go."""
    run: Annotated[configs.Config, tyro.conf.arg(name="")] = field(default_factory=configs.Config)


@dataclass(frozen=True)
class Evaluate:
    """Measure models on pairs, beside doing nothing (the identity row)."""

    models: Positional[tuple[Path, ...]]
    """Runs, or their model/ folders: a row each."""
    source: Path
    """Folder of images before retouching."""
    target: Path
    """Folder of images after retouching, paired by name."""
    json: Path | None = None
    """Also write every number to this file."""
    pictures: Path | None = None
    """Also write source, output, target and amplified difference of each pair to this folder."""
    lpips: Literal["none", "squeeze", "alex", "vgg16"] = "none"
    """Also the perceptual distance LPIPS 0.1 to the target, with this backbone."""
    lpips_weights: str = "download"
    """The backbone's ImageNet weights as torchvision names them (.pth, .npz), or `download`."""
    lpips_heads: str = "download"
    """LPIPS' linear heads (.pth, .npz), or `download`."""


@dataclass(frozen=True)
class Retouch:
    """Retouch photographs of any size. Colour profile, EXIF and format are kept."""

    model: Positional[Path]
    """A run, or its model/ folder."""
    photos: Positional[tuple[Path, ...]]
    """Photos, or folders of photos."""
    out: Path
    """Folder for the results, each under its photo's name."""
    strength: float = 1.0
    """0 leaves the photo as it is, 1 applies all of the model's retouch."""


@dataclass(frozen=True)
class Demo:
    """Watch a small model learn to remove blemishes: no data set, no network, no weights needed."""

    minutes: float = 3.0
    """Training time; making data and evaluating come on top."""
    workdir: Path = Path("runs/demo")
    """An ordinary run: evaluate, retouch and train take it."""


@dataclass(frozen=True)
class Models:
    """List the networks: parameters, receptive field, multiply-accumulates at 512² and 1024², source."""


@dataclass(frozen=True)
class Convert:
    """Bring a trained PyTorch pix2pix or pix2pixHD generator along: its state dict becomes a model/ folder."""

    weights: Positional[Path]
    """A .pth state dict (read without executing it) or .npz: pix2pix' U-Net, pix2pixHD's global generator or local enhancer."""
    out: Path
    """The model folder to write; evaluate and retouch take it."""


@dataclass(frozen=True)
class Prepare:
    """Turn pairs into records made for training: lossless, checksummed, a crop costs a crop. The same command again completes.

    From two folders:  autoretouch data prepare BEFORE AFTER --out records

    From a TFDS data set:  autoretouch data prepare --tfds FOLDER --split train --out records

    Then:  autoretouch train configs/retouch.py --data.records records --workdir runs/a
    """

    pairs: Positional[tuple[Path, ...]] = ()
    """Folder before retouching, folder after retouching; none with --tfds."""
    out: Path = tyro.MISSING
    """Folder for the records."""
    tfds: Path | None = None
    """Take the pairs from this TFDS data set instead."""
    split: str = "train"
    """Its split."""
    workers: int = 0
    """Processes; 0: one for each core."""
    on_bad: Literal["skip", "fail"] = "skip"
    """A pair that cannot be decoded is left out and named (exit status 1), or stops the work."""
    license: str | None = None
    """The data's licence; models trained on the records carry it."""


@dataclass(frozen=True)
class Verify:
    """Read and decode all records; name what is damaged (exit status 1)."""

    records: Positional[Path]
    """A folder that `data prepare` wrote."""


@dataclass(frozen=True)
class Audit:
    """Find what is wrong with pairs before training on them: a page with pictures, a JSON file, exit status 1 if anything.

    autoretouch data audit BEFORE AFTER --html audit.html --json audit.json

    Then:  autoretouch train configs/retouch.py --data.source BEFORE --data.target AFTER --data.audit audit.json …
    """

    source: Positional[Path]
    """Folder of images before retouching."""
    target: Positional[Path]
    """Folder of images after retouching, paired by name."""
    html: Path | None = Path("audit.html")
    """The page."""
    json: Path | None = Path("audit.json")
    """Every pair's weight, reasons and measures; `--data.audit` takes it."""
    labels: bool = True
    """Also look for spots left in a target that look like spots removed elsewhere; the longest part."""
    workers: int = 0
    """Processes; 0: one for each core."""


@dataclass(frozen=True)
class Build:
    """Write a TFDS data set (ArrayRecord, no TensorFlow needed), for sharing and for `--data.tfds`.

    FFHQ and FFHQR in the official split:  autoretouch data build ffhqr FFHQ FFHQR --md5 ffhq-dataset-v2.json --out data

    Your own two folders:  autoretouch data build retouch_pairs BEFORE AFTER --out data --license "all rights reserved"
    """

    kind: Positional[Literal["ffhqr", "retouch_pairs"]]
    """Which builder."""
    source: Positional[Path]
    """Images before retouching: a folder or an uncompressed tar file."""
    target: Positional[Path]
    """Images after retouching."""
    out: Path
    """TFDS' data_dir: the data set goes to OUT/KIND/1.0.0."""
    md5: Path | None = None
    """FFHQ's ffhq-dataset-v2.json, to check every source before anything is written."""
    validation: float = 0.1
    """Share of `retouch_pairs` in the split `validation`, chosen by name; `ffhqr` has its own."""
    test: float = 0.1
    """Share in the split `test`."""
    license: str | None = None
    """The licence of `retouch_pairs`; models trained on it carry it."""


@dataclass(frozen=True)
class BenchData:
    """Pairs per second of records against the usual way: decode two PNGs with Pillow and cut. One core, one run, one table.

    autoretouch bench data  draws faces of 1024²; --source and --target take your own pairs.
    """

    source: Path | None = None
    """Folder of PNGs before retouching; drawn faces where none is given."""
    target: Path | None = None
    """Folder of PNGs after retouching."""
    pairs: int = 16
    """How many pairs at most."""
    seconds: float = 3.0
    """Time for each line of the table, on each side."""
    json: Path | None = None
    """Also write the numbers to this file."""


def _train(argv: Sequence[str]) -> int:
    named = next((arg for arg in argv if arg.endswith(".py")), None)
    default = configs.load(named) if named else configs.Config()
    arguments = parse("train", Train, argv, Train(Path("CONFIG.py"), tyro.MISSING, configs.choose_data(default, argv)))
    if named is None:
        raise Refused("CONFIG is missing: name a Python file such as configs/portraits.py")
    from autoretouch_jax.training import loop

    return loop.run(arguments.run, arguments.workdir)


def _evaluate(argv: Sequence[str]) -> int:
    arguments = parse("evaluate", Evaluate, argv)
    from autoretouch_jax.data.sources import PairSource
    from autoretouch_jax.evaluation import evaluate, lpips

    if not arguments.models:
        raise Refused("MODEL is missing: name a run, or its model/ folder")
    pairs = PairSource(arguments.source, arguments.target)
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
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
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
