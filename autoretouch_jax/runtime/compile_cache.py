"""JAX's cache of compiled programs, in the user's cache folder: a second start of the same program compiles nothing.

JAX reads its settings from the environment when it is imported, so `enable` sets them there before. A folder that the user has
chosen with `JAX_COMPILATION_CACHE_DIR` stays, and `JAX_ENABLE_COMPILATION_CACHE=false` switches the cache off.

JAX can limit a folder itself, but then a process that is killed while it writes an entry keeps the others from ever writing
again, and a read-only folder cannot be read. So the folder is tidied here, at each start.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import time
from pathlib import Path

from autoretouch_jax.runtime import storage

FOLDER = "JAX_COMPILATION_CACHE_DIR"
LIMIT = 2e9  # bytes; a full-size step takes 1 to 30 MB
# Programs that compile faster are not kept: reading them would take about as long.
SHORTEST = "0.05"  # seconds
RECENT = 60.0  # seconds within which an entry may still be being written
NO_SPACE = 1e9  # free bytes below which no cache is used: the space is left to checkpoints
JAX_OWN, WHOLE, POINTER = "-cache", ".whole", ".name"  # ends of JAX's entries, and of those of `kept_programs.py`
CHECKED = "checked"  # a file: entries older than it are whole


def enable() -> None:
    """Makes JAX keep compiled programs, unless the user has decided otherwise. It never fails."""
    if FOLDER in os.environ:
        return
    # Without a cache the programs are compiled, so no fault of the disk may end a run here.
    with contextlib.suppress(OSError):
        home = folder()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(home) or shutil.disk_usage(home).free < NO_SPACE:
            return
        os.environ[FOLDER] = str(home)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", SHORTEST)
        tidy(home.parent, LIMIT)


def folder() -> Path:
    """The folder of the compiled programs of this user on machines like this one."""
    # Whoever can write to the folder can make the user run anything, so users that share a cache have a folder each.
    return storage.cache_folder() / f"compiled-{os.getuid()}" / _processor()


def _own(home: Path) -> bool:
    """Whether only this user can write there, and can do so now."""
    return all(path.stat().st_uid == os.getuid() for path in (home, home.parent)) and os.access(home, os.W_OK)


def _processor() -> str:
    """A digest of the instructions that the processor knows. A home may be shared by machines of which some know fewer."""
    features = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        features += next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def tidy(home: Path, most: float) -> None:
    """Deletes entries that are cut short, and the least recently used ones until the rest takes `most` bytes."""
    mark, now = home / CHECKED, time.time()
    for part in home.rglob("*.part"):  # of a process that was killed while it wrote
        if part.stat().st_mtime < now - RECENT:
            part.unlink(missing_ok=True)
    entries = [(path.stat(), path) for end in (JAX_OWN, WHOLE) for path in home.rglob(f"*{end}")]
    checked = mark.stat().st_mtime if mark.exists() else 0.0
    for status, path in entries:
        # JAX warns of an entry that a killed process or a full disk has cut short, but does not replace it.
        if checked < status.st_mtime < now - RECENT and _is_cut(path):
            path.unlink(missing_ok=True)
    mark.touch()
    os.utime(mark, (now - RECENT, now - RECENT))
    total = sum(status.st_size for status, _ in entries)
    for status, path in sorted(entries, key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime)):
        if total <= most:
            break
        path.unlink(missing_ok=True)
        total -= status.st_size
    for pointer in home.rglob(f"*{POINTER}"):
        with contextlib.suppress(ValueError):  # what it holds is no name
            if pointer.with_name(pointer.read_text()).is_file():
                continue
        pointer.unlink(missing_ok=True)


def _is_cut(path: Path) -> bool:
    import zstandard

    try:
        read_entry(path)
    except zstandard.ZstdError:
        return True
    return False


def read_entry(path: Path) -> bytes:
    """Returns what an entry holds. Raises OSError or ZstdError for one that cannot be read."""
    import zstandard

    return zstandard.ZstdDecompressor().decompress(path.read_bytes())


def write_entry(path: Path, content: bytes) -> None:
    """Writes an entry whole or not at all, packed as JAX packs its own. Raises OSError."""
    import zstandard

    storage.write(path, zstandard.ZstdCompressor().compress(content))
