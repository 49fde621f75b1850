"""The rules of the house, held by reflection: who may import whom, sizes, docstrings, import cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autoretouch_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
RANK = {"errors": -1, "stop": 0, "files": 0, "architecture": 0, "config": 1, "rules": 2, "parallel": 2, "hosts": 2,
        "models": 3, "data": 3, "evaluation": 4, "training": 5, "inference": 5, "chips": 5, "demo": 6, "catalogue": 6,
        "bench": 6, "ahead": 6, "arithmetic": 6, "doctor": 6, "sweep_report": 6, "plan": 7, "sweep": 7, "arguments": 7,
        "cli": 8, "start": 9, "__init__": 8}  # fmt: skip
ALONE = {"etils": "files.py", "orbax": "training/checkpoint.py", "grain": "data/pipeline.py", "zstandard": "data/tiles.py",
         "tensorflow_datasets": "data/builders.py"}  # fmt: skip
LONGEST_FUNCTION, LONGEST_LOOP, LONGEST_FILE = 40, 200, 400


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "autoretouch_jax" and len(parts) > 1 and parts[1] in RANK and parts[1] != room(path):
            allowed = RANK[parts[1]] < RANK[room(path)]
            assert allowed, f"{path.name} imports {name}, which is not below it"
        if parts[0] in ALONE:
            assert path.relative_to(PACKAGE).as_posix() == ALONE[parts[0]], f"only {ALONE[parts[0]]} imports {parts[0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_sizes_and_docstrings(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "every file says what it is for"
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = LONGEST_LOOP if node.name == "_train" else LONGEST_FUNCTION
            assert node.end_lineno - node.lineno < limit, f"{node.name} has more than {limit} lines"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_only_parallel_names_devices_and_only_photo_writes_photos():
    for path in FILES:
        text, name = path.read_text(), path.relative_to(PACKAGE).as_posix()
        if name != "parallel.py":
            assert not any(word in text for word in ("jax.devices(", "NamedSharding", "PartitionSpec", "pmean")), name
        if name not in ("inference/photo.py", "evaluation/report.py"):
            assert ".save(part" not in text, name


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, autoretouch_jax; print(sorted({'jax', 'numpy', 'grain', 'orbax'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_public_names_exist():
    import autoretouch_jax

    for name in autoretouch_jax.__all__:
        assert callable(getattr(autoretouch_jax, name))
