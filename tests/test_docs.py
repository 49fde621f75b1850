"""Every command of the README and of docs/, as it stands, in a small world; and what these pages promise about the code."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from test_builders import make_ffhq

from autoretouch_jax import cli
from autoretouch_jax.config import loading, networks
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.demo import faces

# In this order, because later pages use what earlier ones have made.
PAGES = ["docs/training.md", "docs/monitoring.md", "docs/data.md", "README.md", "docs/metrics.md", "docs/planning.md",
         "docs/sweeps.md", "docs/many_devices.md", "docs/retouching.md",
         "docs/speed.md", "docs/export.md"]  # fmt: skip
OTHER_PAGES = ["docs/exit_statuses.md", "docs/published.md", "docs/extending.md", "docs/serving.md"]
SMALL = {
    "autoretouch": {"width": 4, "blocks": 1},
    "retouch": {"width": 4, "levels": 2, "blocks": 1},
    "pix2pix": {"width": 2, "levels": 5},
    "pix2pixhd_global": {"width": 2, "downs": 2, "blocks": 1},
    "pix2pixhd_local": {"width": 2, "downs": 2, "global_blocks": 1, "local_blocks": 1},
}
STEPS = 2  # that a training command makes here


def code(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def commands(page: str) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in code(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


# ---- a small world ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, module_pairs, face_folder) -> Path:
    """A folder with all that the pages' commands name."""
    home = tmp_path_factory.mktemp("world")
    for name, source in {
        "BEFORE": module_pairs[0],
        "AFTER": module_pairs[1],
        "FACES": face_folder,
        "FOLDER": face_folder,
        "PHOTOS": face_folder,
    }.items():
        shutil.copytree(source, home / name)
    shutil.copytree(module_pairs[0], home / "VALIDATION_BEFORE")
    shutil.copytree(module_pairs[1], home / "VALIDATION_AFTER")
    for folder in ("configs", "launch"):
        shutil.copytree(ROOT / folder, home / folder)
    for name in ("PHOTO.jpg", "photo.jpg"):
        Image.fromarray(faces.draw_face(3, 96)).save(home / name, quality=95)
    Image.fromarray(np.full((96, 96), 255, np.uint8)).save(home / "MASK.png")
    make_ffhq(home, "FFHQ", "FFHQR", "ffhq-dataset-v2.json")
    (home / "latest_net_G.pth").write_bytes(b"see small_programs")
    return home


@pytest.fixture
def small_programs(monkeypatch, world):
    """The commands run as they stand, with small networks, few steps, and nothing downloaded."""
    from autoretouch_jax.demo import demo
    from autoretouch_jax.evaluation import lpips
    from autoretouch_jax.models import weights_file
    from autoretouch_jax.planning import gpu, tpu
    from autoretouch_jax.sweeps import sweep
    from autoretouch_jax.tools import catalogue
    from autoretouch_jax.training import loop

    load, run, run_sweep = loading.load, loop.run, sweep.run

    def small(path):
        config = load(path)
        layers = {"perceptual_layers": ("relu1_1",), "perceptual_layer_weights": (), "vgg_weights": "random"}
        return dataclasses.replace(
            config,
            # What starts from the model in the box has its network.
            generator=config.generator
            if config.train.start_from
            else dataclasses.replace(config.generator, **SMALL[config.generator.network]),
            discriminator=dataclasses.replace(config.discriminator, width=4),
            loss=dataclasses.replace(config.loss, **layers),
            data=dataclasses.replace(config.data, crop=32, resize=0),
            train=dataclasses.replace(config.train, batch=2, log_every=1),
            parallel=dataclasses.replace(config.parallel, devices=1),
        )

    def unet(_path):
        with np.load(GOLDEN / "pix2pix_unet128_ngf2.npz") as arrays:
            return {key.split("|")[1]: arrays[key] for key in arrays.files if "|" in key}

    def estimated(config, topology, _cache):
        figures = gpu.estimate(config, 4)
        return figures | {"fits": True, "compile_seconds": 1.0, "cached": False}

    monkeypatch.chdir(world)
    monkeypatch.setattr(loading, "load", small)
    monkeypatch.setattr(demo, "load", small)
    monkeypatch.setattr(demo, "steps_for", lambda *_: STEPS)
    monkeypatch.setattr(demo, "TRAINING_FACES", 2)
    monkeypatch.setattr(demo, "TRAINING_PHOTOS", 2)
    monkeypatch.setattr(demo, "HELD_OUT_FACES", 1)
    monkeypatch.setattr(loop, "run", lambda c, w, stop=None, until=None: run(c, w, stop, min(until or STEPS, STEPS)))
    monkeypatch.setattr(sweep, "run", lambda s, pairs: run_sweep(dataclasses.replace(s, trials=2), pairs))
    monkeypatch.setattr(weights_file, "read_arrays", unet)
    monkeypatch.setattr(lpips, "load", lambda *_: lambda a, b: 0.5)
    monkeypatch.setattr(tpu, "compile_for", estimated)
    monkeypatch.setattr(catalogue, "NETWORKS", {"patchgan": (networks.PatchGAN(width=2), "Isola et al.")})


# ---- the commands -----------------------------------------------------------------------------------------------------------


def check_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def check_install(text: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\[([\w,]+)\]", text)
    assert extras or "-e ." in text, text
    assert {extra for names in extras for extra in names.split(",")} <= set(project["optional-dependencies"]), text


def check_launcher(words: list[str]) -> None:
    """The script is there, and what follows CONFIG is what the verb takes."""
    script = next(word for word in words if word.startswith("launch/"))
    assert (ROOT / script).is_file(), script
    config = next((i for i, word in enumerate(words) if word.startswith("configs/")), None)
    if config is not None:
        verb = "sweep" if "sweep" in script else "train"
        assert cli.parse_with_config(verb, words[config:]).config == Path(words[config])


def check(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        check_make(words[1:])
    elif "pip install" in line:
        check_install(line)
    elif words[0] in ("bash", "sbatch", "docker"):
        check_launcher(words)
    elif "gs://" in line:  # test_storage.py runs them against a local server; here their words must be right
        parse = cli.parse_with_config if words[1] in ("train", "sweep") else cli.parse
        assert parse(words[1], words[2:])
    elif words[:2] == ["autoretouch", "serve"]:  # it would serve until somebody stops it
        assert cli.parse("serve", words[2:])
    else:
        assert words[0] == "autoretouch", f"no way to check {line!r}"
        try:
            status = cli.main(words[1:])
        except SystemExit as end:  # --help
            status = end.code or 0
        # The drawn pairs are small and densely blemished, so an audit may flag them.
        assert status in ((0, 1) if words[1:3] == ["data", "audit"] else (0,)), line


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs_as_it_stands(page, small_programs, capsys):
    lines = commands(page)
    assert lines
    for line in lines:
        check(line)
        capsys.readouterr()


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_the_python_of_a_page_runs(page, world, monkeypatch):
    monkeypatch.chdir(world)
    if page == "docs/extending.md":
        pytest.skip("test_extending.py runs these")  # in a copy of the package
    for block in code(page, "python"):
        exec(compile(block, page, "exec"), {})


def test_what_the_commands_left_behind_is_what_the_pages_say(world):
    assert {"config.json", "metrics.jsonl", "samples", "checkpoints", "model"} <= {
        p.name for p in (world / "runs/pairs").iterdir()
    }
    assert RecordSource(world / "records").license == "CC BY 4.0"
    assert (world / "retouched" / "PHOTO.jpg").is_file()
    assert (world / "runs/sweep/best.py").is_file()
    assert (world / "pictures").is_dir()


# ---- what the pages promise -------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert len(prose.split()) <= 700
    for page in [*PAGES, *OTHER_PAGES]:
        if page != "README.md":
            assert f"({page})" in text, page


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES, "benchmarks/README.md", "benchmarks/RESULTS.md"])
def test_links_and_files_named_are_there(page):
    text = (ROOT / page).read_text()
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
        if "://" not in link:
            target = (ROOT / page).parent / link if link else ROOT / page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.M) if anchor else []
            # As GitHub names a heading: its words in lower case, without punctuation.
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings], anchor
    for name in re.findall(r"`((?:configs|launch|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_flags_named_in_a_page_exist():
    from autoretouch_jax.arguments import ARGUMENTS

    known = {f"--{key.replace('_', '-')}" for key in loading.flatten(loading.Config())}
    for name in (ROOT / "configs").glob("*.py"):
        known |= {f"--{key.replace('_', '-')}" for key in loading.flatten(loading.load(name))}
    known |= {f"--{field.name.replace('_', '-')}" for kind in ARGUMENTS.values() for field in dataclasses.fields(kind)}
    known |= {"--help", "--version", "--build-arg", "--shm-size", "--logdir", "--data-binary"}
    for page in [*PAGES, *OTHER_PAGES]:
        if page == "docs/extending.md":  # its example adds a flag
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", (ROOT / page).read_text()):
            assert flag in known, f"{page} names {flag}"


def test_the_benchmarks_start():
    for path in (ROOT / "benchmarks").glob("*.py"):
        ended = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True)
        assert "usage" in ended.stdout


def test_make_help_lists_the_targets():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", text, re.M)[0].split())
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines() if line.startswith("  ")} == targets


# ---- from the command line to the loss --------------------------------------------------------------------------------------


def path_in_the_readme() -> list[str]:
    """The files that the README names on the way from the command line to the loss."""
    block = (ROOT / "README.md").read_text().split("From the command line to the loss")[1].split("\n\n")[1]
    return re.findall(r"`([\w/]+\.py)`", block)


WALK = """
import inspect, pickle, sys, traceback
from pathlib import Path

import autoretouch_jax
from autoretouch_jax.training import losses

package = Path(autoretouch_jax.__file__).parent
entered, stack = [], []

def profile(frame, event, _argument):
    path = Path(frame.f_code.co_filename)
    is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # the bodies of modules and classes run at import
    if event == "call" and is_function and path.is_relative_to(package):
        name = path.relative_to(package).as_posix()
        if name not in entered:
            entered.append(name)

real = losses._per_image

def per_image(values):
    # Every loss ends here. Once it is reached, the way to it is known, and nothing need be compiled.
    files = [Path(frame.filename) for frame in traceback.extract_stack()]
    names = [path.relative_to(package).as_posix() for path in files if path.is_relative_to(package)]
    stack.extend(name for i, name in enumerate(names) if name not in names[:i])
    raise SystemExit

losses._per_image = per_image

from autoretouch_jax import cli
from autoretouch_jax.training.trainer import Trainer

Trainer.compile_ahead = lambda self: None  # it comes to the loss in another thread
sys.setprofile(profile)
try:
    cli.main(sys.argv[2:])
except SystemExit:
    sys.setprofile(None)
Path(sys.argv[1]).write_bytes(pickle.dumps((entered, stack)))
"""


def test_the_readme_names_the_files_from_the_command_line_to_the_loss(face_folder, tmp_path):
    """They are walked by a real run: the first call of each comes in this order, and the loss is called through no other."""
    import pickle

    named = path_in_the_readme()
    small = ["--generator.width", "4", "--generator.blocks", "1", "--generator.levels", "2", "--discriminator.width", "4"]
    run = ["--data.root", str(face_folder), "--data.crop", "32", "--train.steps", "1", "--parallel.devices", "1"]
    words = ["train", "configs/demo.py", *small, *run, "--workdir", str(tmp_path / "run")]
    subprocess.run([sys.executable, "-c", WALK, str(tmp_path / "walk"), *words], check=True, cwd=ROOT, capture_output=True)
    entered, stack = pickle.loads((tmp_path / "walk").read_bytes())
    assert named == sorted(named, key=entered.index)
    assert [name for name in named if name in stack] == [name for name in stack if name in named]
    assert stack == ["cli.py", "training/loop.py", "training/compilation.py", "training/step.py", "training/losses.py"]
