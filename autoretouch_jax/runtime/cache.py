"""Copies of objects of `gs://…` and `s3://…` on this machine's disk: made when first needed, checked, and limited in size.

The copies lie in `$AUTORETOUCH_CACHE/objects`, named by their SHA-256, and several processes may share them. Beyond the limit
the least recently used ones are deleted. A file that is deleted while it is open can still be read.
"""

import contextlib
import errno
import hashlib
import math
import os
import resource
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoretouch_jax.errors import BadInput, Refused, first_line
from autoretouch_jax.runtime import storage

VARIABLE = "AUTORETOUCH_CACHE_GB"
# Some space is left for checkpoints, which often lie on the same disk.
SHARE = 0.8  # of the space that would be free without the copies, where the variable is not set
STALE = 24 * 3600  # seconds after which a partial download that nobody writes to was left by a killed process
NO_HANDLES = (errno.EMFILE, errno.ENFILE)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Copy:
    """A copy on this machine's disk. While this object is referred to, this process does not delete the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()  # held while it is downloaded


# A copy leaves the dictionary when nothing refers to it any more, in particular no open reader.
_copies: weakref.WeakValueDictionary[Path, Copy] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def folder() -> Path:
    """The folder of the copies."""
    return storage.cache_folder() / "objects"


def cached(path: Any, digest: str) -> Copy:
    """Returns the copy of an object, which is downloaded if it is not there. Threads that need the same object wait for it.

    Raises BadInput when the object cannot be read or its SHA-256 is not `digest`, and Refused when the disk is full or no file
    handle is left.
    """
    place = folder() / digest
    with _lock:
        copy = _copies.get(place) or Copy(place)
        _copies[place] = copy
    with copy.lock:
        if place.is_file():
            # The time of change says when the copy was last used. Disks are often mounted without times of access.
            with contextlib.suppress(OSError):
                os.utime(place)
        else:
            _download(path, digest, place)
            evict(limit())
    return copy


def limit() -> float:
    """How many bytes the copies may take: `$AUTORETOUCH_CACHE_GB` in GB, or a share of the disk. 0 GB sets no limit."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        # The folder may not be there yet.
        free = shutil.disk_usage(next(path for path in (folder(), *folder().parents) if path.exists())).free
        return SHARE * (free + sum(size for _, size, _ in _files()))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1
    if not 0 <= gigabytes < math.inf:
        raise Refused(f"{VARIABLE}={text}: not a number of gigabytes; give one such as 200, or 0 for no limit")
    return gigabytes * 1e9 if gigabytes else math.inf


def evict(most: float) -> None:
    """Deletes partial downloads of killed processes, and the least recently used copies until the rest takes `most` bytes.

    Copies that this process uses stay.
    """
    with _lock:  # so that no thread takes a copy between the question and the deletion
        copies = []
        for changed, size, path in _files():
            if path.suffix != ".part":
                copies.append((changed, size, path))
            elif time.time() - changed > STALE:
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= most:
                break
            # In a folder that several users share, some copies are not ours to delete.
            with contextlib.suppress(PermissionError):
                if path not in _copies:
                    path.unlink(missing_ok=True)
                    total -= size


def out_of_handles(path: Any) -> Refused:
    """Returns the exception for a file that cannot be opened because too many others are open. The file may be sound."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Refused(
        f"{path}: too many open files; this process may open {handles} at a time. Raise the limit with `ulimit -n 4096` before "
        "the command, or end other programs that hold files"
    )


def _files() -> Iterator[tuple[float, int, Path]]:
    """Yields time of change, size in bytes and path of every file among the copies, partial ones included."""
    for path in folder().iterdir() if folder().is_dir() else ():
        # Another process may delete files at the same time.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _download(path: Any, digest: str, place: Path) -> None:
    with _explained(path, place.parent):
        try:
            _copy(path, digest, place)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # Another program may have filled the disk, while the copies are still below their limit.
            evict(0)
            _copy(path, digest, place)


@contextlib.contextmanager
def _explained(path: Any, home: Path) -> Iterator[None]:
    """Raises the errors of a download as what they mean to the user. BadInput, and what is a bug, stay as they are."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in NO_HANDLES:
            raise out_of_handles(path) from error
        if number in NO_SPACE:
            raise Refused(
                f"{home}: the disk is full, and {path} cannot be copied to it; free space there, or set AUTORETOUCH_CACHE to "
                "a folder on another disk"
            ) from error
        if not storage.from_store(error) and not isinstance(error, OSError):
            raise
        reason = first_line(error)
        raise BadInput(f"{path}: cannot be copied to {home} ({reason}); check the bucket and the network") from error


def _copy(path: Any, digest: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    actual = hashlib.sha256()
    with storage.replacing(place) as part:
        with part.open("wb") as out, path.open("rb") as source:
            while block := source.read(storage.BLOCK):
                actual.update(block)
                out.write(block)
        if actual.hexdigest() != digest:
            raise BadInput(f"{path}: damaged, its SHA-256 is not the one in the index; copy it to the bucket again")
