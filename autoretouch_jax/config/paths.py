"""Paths as text: which of them name an object store, and how they are made absolute. No file is opened here."""

import re
from pathlib import Path
from typing import Any

PRETRAINED = "pretrained"  # stands for the model in the box where a model is asked for
# The bucket's first character, so that a file named gs: is not taken for a store.
REMOTE = re.compile(r"(gs|s3)://[^/]")


def is_remote(path: Any) -> bool:
    """Whether the path names an object store: `gs://…` or `s3://…`."""
    return bool(REMOTE.match(str(path)))


def absolute(path: str) -> str:
    """The same file or folder from any working directory. An object store's path is absolute already."""
    return path if is_remote(path) else str(Path(path).expanduser().resolve())
