"""Where files live: a folder on this machine, or `gs://…` and `s3://…`."""

import re
from pathlib import Path
from typing import Any

REMOTE = re.compile(r"(gs|s3)://")


def is_remote(path: Any) -> bool:
    """Whether it names an object store."""
    return bool(REMOTE.match(str(path)))


def place(path: Any) -> Any:
    """A `Path`, or for an object store its `epath.Path`, which has the same methods."""
    if not is_remote(path):
        return Path(path)
    from etils import epath  # type: ignore[import-untyped]

    return epath.Path(str(path))
