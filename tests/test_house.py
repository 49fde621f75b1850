"""The rules of the house, held by reflection: which rooms may import which, sizes, docstrings, comments, import cost."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autoretouch_jax"
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top. A room imports from the lines above its own; rooms on the same line do not know each other.
FLOORS = (
    ("errors",),
    ("config",),
    ("runtime",),
    ("models", "data"),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("audit", "planning", "sweeps", "demo"),
    ("tools",),
    ("arguments",),
    ("cli", "__init__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_ROOMS = 16
# What belongs to one file: other files use it through that one.
ONLY_IMPORTER = {
    "etils": ("runtime/storage.py",),
    "orbax": ("training/checkpoints.py",),
    "grain": ("data/pipeline.py",),
    "jpeglib": ("inference/files/blocks.py",),
    "pyvips": ("data/libvips.py",),
    "dlib": ("data/faces.py",),
    "zstandard": ("data/tile_codec.py", "runtime/compile_cache.py"),
    "tabulate": ("runtime/tables.py",),
    "tyro": ("arguments/__init__.py", "arguments/data.py", "arguments/photographs.py", "arguments/training.py", "cli.py"),
    "tensorflow_datasets": ("data/tfds_builders.py", "data/tfds_source.py"),
}
LONGEST_FUNCTION, LONGEST_FILE = 40, 400
LONG_BY_NATURE = {"train_step": 60, "objective_gradient": 75, "train": 90}  # read in one pass, from top to bottom


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, as a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != PACKAGE.name:
            continue
        # `from a.b import c` imports the module a.b.c where there is one, else the name c of a.b.
        for end in range(len(parts), 1, -1):
            module = PACKAGE.joinpath(*parts[1:end])
            file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
            if file.is_file():
                found.add(file)
                break
    return found - {path}


# ---- rooms ------------------------------------------------------------------------------------------------------------------


def test_there_are_few_rooms_and_every_one_has_its_floor():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(FLOOR)
    assert len(rooms) <= MOST_ROOMS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downwards(path):
    own = room_of(path)
    for file in imported_files(path):
        room = room_of(file)
        assert room == own or FLOOR[room] < FLOOR[own], f"{name_of(path)} imports {name_of(file)}, which is not below it"


def test_no_imports_run_in_a_circle():
    below = {path: imported_files(path) for path in FILES}
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " → ".join(name_of(step) for step in (*way, path))
        if path not in done:
            for other in below[path]:
                visit(other, (*way, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


@pytest.mark.parametrize("library", list(ONLY_IMPORTER))
def test_a_library_has_one_importer(library):
    importers = {name_of(path) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
    assert importers == set(ONLY_IMPORTER[library])


def test_only_devices_names_devices():
    for path in FILES:
        if name_of(path) != "runtime/devices.py":
            words = ("jax.devices(", "NamedSharding", "PartitionSpec", "pmean")
            assert not any(word in path.read_text() for word in words), name_of(path)


def test_only_photo_and_report_write_images():
    writers = {name_of(path) for path in FILES if ".save(" in path.read_text()}
    # A PNG for a data set, a JPEG in memory, a picture on a page, the pairs of a benchmark, and a checkpoint are no photographs
    # of a user.
    others = {
        "data/degrade.py",
        "data/edits.py",
        "data/tfds_builders.py",
        "audit/inputs.py",
        "audit/page.py",
        "inference/compare.py",
        "tools/bench.py",
        "training/checkpoints.py",
        "training/loop.py",
    }
    assert writers - others == {"inference/files/encoding.py", "evaluation/report.py"}


def test_no_isinstance_chain_over_networks():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                names = {n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node.args[1]) if hasattr(n, "ctx")}
                networks = {"AutoRetouch", "Retouch", "Pix2Pix", "Pix2PixHDGlobal", "Pix2PixHDLocal", "PatchGAN"}
                assert not names & networks, f"{name_of(path)}:{node.lineno}"


# ---- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes_and_docstrings(path):
    text = path.read_text()
    tree = ast.parse(text)
    first_line = (ast.get_docstring(tree) or "").split("\n")[0]
    assert first_line, "the first line of a file says what it is for"
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = LONG_BY_NATURE.get(node.name, LONGEST_FUNCTION)
            assert node.end_lineno - node.lineno < limit, f"{node.name} has more than {limit} lines"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def docstrings() -> list[tuple[str, str]]:
    """Every docstring of the package, with where it stands."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append((f"{name_of(path)}: {getattr(node, 'name', 'the file')}", text))
    return found


def test_docstrings_end_with_a_full_stop():
    for where, text in docstrings():
        last = text.splitlines()[-1]
        assert last[-1] in ".:?`)…" or "autoretouch " in last, f"{where}: {last!r}"  # a help text may end with a command


# Words that once stood for a term of the field, or for nothing that a newcomer could know.
METAPHORS = (
    "accuse",
    "a crop costs",
    "dearer",
    "is felt",
    "way back",
    "weighs down",
    "goodbye",
    "farewell",
    "lonely",
    "in vain:",
)


def test_no_metaphor_stands_for_a_term():
    for path in [*FILES, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]:
        text = path.read_text().lower()
        assert not [word for word in METAPHORS if word in text], path.name


def test_one_line_in_fourteen_is_a_comment():
    comments = lines = 0
    for path in FILES:
        text = path.read_text()
        lines += sum(bool(line.strip()) for line in text.splitlines())
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += sum(token.type == tokenize.COMMENT and "noqa" not in token.string for token in tokens)
    assert comments / lines >= 1 / 14, f"{comments} comments in {lines} lines, one in {lines / comments:.1f}"


def test_there_is_a_line_of_tests_for_two_of_source():
    count = lambda folder: sum(path.read_text().count("\n") for path in folder.rglob("*.py"))  # noqa: E731
    assert count(ROOT / "tests") >= 0.5 * count(PACKAGE)


# ---- importing --------------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, autoretouch_jax; print(sorted({'jax', 'numpy', 'grain', 'orbax'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_config_needs_one_import_and_no_jax():
    code = """
import sys
from autoretouch_jax.config import AutoRetouch, Config, DataConfig, PatchGAN, TrainConfig
Config(generator=AutoRetouch(width=8), discriminator=PatchGAN(), data=DataConfig(root="faces"), train=TrainConfig(steps=3))
print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_public_names_exist():
    import autoretouch_jax

    for name in autoretouch_jax.__all__:
        assert callable(getattr(autoretouch_jax, name))
    with pytest.raises(AttributeError, match="it offers Retoucher"):
        _ = autoretouch_jax.load_modle
