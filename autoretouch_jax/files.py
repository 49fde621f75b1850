"""Where files live: a folder on this machine, or `gs://…` and `s3://…` (extras `gs` and `s3`), read and written through epath.

An object store knows neither appending nor renaming, and a file that is being written may be left half there; but one object
appears whole or not at all. So whatever is written here is written whole.
"""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoretouch_jax.errors import BadInput, Refused

REMOTE = re.compile(r"(gs|s3)://[^/]")
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def is_remote(path: Any) -> bool:
    """Whether it names an object store."""
    return bool(REMOTE.match(str(path)))


def place(path: Any) -> Any:
    """A `Path`, or for an object store its `epath.Path`, which has the same methods.

    Raises Refused when what that store needs is not installed.
    """
    if not is_remote(path):
        return Path(path)
    scheme = str(path)[:2]
    try:
        __import__(PACKAGES[scheme])
    except ModuleNotFoundError as error:
        raise Refused(f"{path}: {scheme}:// needs {error.name}: pip install 'autoretouch-jax[{scheme}]'") from error
    import fsspec  # type: ignore[import-untyped]

    for store in ("s3", "gcs"):  # listings are kept for ever otherwise: what other processes write would stay unseen
        fsspec.config.conf.setdefault(store, {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "0")
    from etils import epath  # type: ignore[import-untyped]

    return epath.Path(str(path))


def absolute(path: str) -> str:
    """The same place from any folder; an object store's is that already."""
    return path if is_remote(path) else str(Path(path).expanduser().resolve())


def write(path: Any, content: bytes | str) -> None:
    """Write a file that appears whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


@contextlib.contextmanager
def reachable(what: str) -> Iterator[None]:
    """Turn what a disk or an object store says when it cannot be used into Refused. `what` begins the message."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        foreign = type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "gcsfs", "google", "aiohttp")
        if not foreign and not isinstance(error, OSError | ValueError):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise Refused(f"{what}: cannot be used ({said}); check the path, the bucket and the credentials") from error


def check_bucket(path: Any) -> None:
    """Refuse a bucket that does not exist: some libraries would silently make one."""
    if is_remote(path):
        scheme, rest = str(path).split("://", 1)
        bucket = f"{scheme}://{rest.split('/', 1)[0]}"
        if not place(bucket).exists():
            raise Refused(f"{path}: there is no bucket {bucket}, or it may not be looked at; make it, or check the credentials")


def cache_folder() -> Path:
    """`$AUTORETOUCH_CACHE`, or `autoretouch` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AUTORETOUCH_CACHE") or Path(base) / "autoretouch")


def cached(path: Any, sha256: str) -> Path:
    """A file of an object store on this machine's disk, fetched when first asked for; raises BadInput when it is damaged."""
    kept = cache_folder() / "objects" / sha256
    if kept.is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(dir=kept.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out, path.open("rb") as source:
            while block := source.read(1 << 22):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != sha256:
            raise BadInput(f"{path}: damaged, its SHA-256 is not the one in the index; copy it to the bucket again")
        os.replace(name, kept)
    finally:
        Path(name).unlink(missing_ok=True)
    return kept
