"""Files, in a folder on this machine or in `gs://…` and `s3://…` (extras `gs` and `s3`), read and written through epath.

An object store can neither append nor rename, and a process may be killed while it writes. So a file is always written whole:
it appears with all of its content or not at all.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.errors import Refused, first_line

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
# Top-level modules whose exceptions mean that a store cannot be used: no access, no bucket, no network.
STORE_MODULES = ("botocore", "aiobotocore", "gcsfs", "google", "aiohttp")
BLOCK = 1 << 22  # bytes read at a time


def open_path(path: Any) -> Any:
    """Returns a `Path`, or for an object store its `epath.Path`, which has the same methods.

    Raises Refused when the package for that store is not installed.
    """
    if not is_remote(path):
        return Path(path)
    scheme = str(path)[:2]
    try:
        __import__(PACKAGES[scheme])
    except ModuleNotFoundError as error:
        raise Refused(f"{path}: {scheme}:// needs {error.name}: pip install 'autoretouch-jax[{scheme}]'") from error
    import fsspec  # type: ignore[import-untyped]

    # By default fsspec caches folder listings for ever, and would not see the files that other processes write.
    for store in ("s3", "gcs"):
        fsspec.config.conf.setdefault(store, {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "0")
    from etils import epath  # type: ignore[import-untyped]

    return epath.Path(str(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to. A block that succeeds moves it to `path`; else it is removed."""
    # The name is random because several processes may write the same file, into a cache for example.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(paths: Iterable[Path]) -> None:
    """Removes what `replacing` has left beside these files when its process was killed. Nothing may be writing them now."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, own in names.items():
        for part in folder.glob("*.????????.part"):
            if part.name.rsplit(".", 2)[0] in own:
                part.unlink(missing_ok=True)


def write(path: Any, content: bytes | str) -> None:
    """Writes a file that appears whole or not at all, and that is on the disk when this returns."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)  # an object appears whole by itself
        return
    with replacing(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_output(path: Path, content: str) -> None:
    """Writes a file that the user asked for by name, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)


def stamp(path: Path) -> str:
    """Returns a text that changes when another file takes this one's place. The file is not read."""
    status = path.stat()
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_store(error: BaseException) -> bool:
    """Whether an object store's library raised this exception."""
    return type(error).__module__.split(".")[0] in STORE_MODULES


@contextlib.contextmanager
def reachable(what: str) -> Iterator[None]:
    """Raises Refused, with a message that begins with `what`, when a disk or an object store cannot be used."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if not from_store(error) and not isinstance(error, OSError | ValueError):
            raise
        reason = first_line(error)
        raise Refused(f"{what}: cannot be used ({reason}); check the path, the bucket and the credentials") from error


def check_bucket(path: Any) -> None:
    """Refuses a bucket that does not exist, because some libraries would silently create it."""
    if is_remote(path):
        scheme, rest = str(path).split("://", 1)
        bucket = f"{scheme}://{rest.split('/', 1)[0]}"
        if not open_path(bucket).exists():
            raise Refused(f"{path}: there is no bucket {bucket}, or it cannot be accessed; create it, or check the credentials")


def cache_folder() -> Path:
    """`$AUTORETOUCH_CACHE`, or `autoretouch` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AUTORETOUCH_CACHE") or Path(base) / "autoretouch")
