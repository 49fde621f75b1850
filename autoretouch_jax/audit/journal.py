"""The journal of an audit: results are appended as they come, so that the same command goes on after a stop.

A line of the file is `[kind, key, stamp, value]` in JSON. The stamp changes when what was looked at changes; then the result no
longer counts. The first line says which audit the journal belongs to.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOMS = ("audit", "data")  # whose code the results depend on


class Journal:
    """Results by kind and key. Without a path nothing is kept."""

    def __init__(self, path: Path | None, about: list[str]) -> None:
        self.path = path
        self._known: dict[tuple[str, str], tuple[str, Any]] = {}
        if path is None:
            return
        header = json.dumps(["audit", *about, _code_digest()]) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = self._read(path, header) if path.is_file() else 0
        self._file = path.open("ab")
        # A killed process may have left half a line. What follows it would be lost with it.
        self._file.truncate(length)
        if not length:
            self._append(header)

    def _read(self, path: Path, header: str) -> int:
        """Reads what is known, and returns the number of bytes up to the first line that is not whole."""
        length = 0
        with path.open("rb") as file:
            for line in file:
                if not length and line != header.encode():
                    print(f"{path}: is of another audit, or of another version; beginning again", file=sys.stderr)
                    return 0
                # Without its end, the next result would continue this line.
                if not line.endswith(b"\n"):
                    break
                try:
                    if length:
                        kind, key, stamp, value = json.loads(line)
                        self._known[kind, key] = stamp, value
                except ValueError:
                    break
                length += len(line)
        return length

    def _append(self, line: str) -> None:
        # Flushed for each line: what the system has taken outlives a killed process.
        self._file.write(line.encode())
        self._file.flush()

    def section(self, kind: str, stamp: Callable[[str], str]) -> "Section":
        """Returns the results of one kind. `stamp(key)` is called once for each key, before its result is made."""
        return Section(self, kind, stamp)

    def take(self, kind: str, key: str, stamp: str) -> Any:
        """Returns a result, or None where it is not known or no longer counts. The journal forgets it."""
        # Forgotten, because the results of 70,000 pairs would stay in memory twice.
        before, value = self._known.pop((kind, key), ("", None))
        return value if before == stamp else None

    def add(self, kind: str, key: str, stamp: str, value: Any) -> None:
        """Appends a result."""
        if self.path is not None:
            self._append(json.dumps([kind, key, stamp, value]) + "\n")

    def remove(self) -> None:
        """Removes the file: everything in it is written elsewhere."""
        if self.path is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)


class Section:
    """The results of one kind in a journal, as JSON values by key."""

    def __init__(self, journal: Journal, kind: str, stamp: Callable[[str], str]) -> None:
        self._journal, self._kind, self._stamp = journal, kind, stamp
        self._stamps: dict[str, str] = {}

    def get(self, key: str) -> Any:
        """Returns what is known of a key, or None."""
        return self._journal.take(self._kind, key, self._stamp_of(key))

    def __setitem__(self, key: str, value: Any) -> None:
        self._journal.add(self._kind, key, self._stamp_of(key), value)

    def _stamp_of(self, key: str) -> str:
        # The stamp from before the work: a file that changes meanwhile must be looked at again.
        if key not in self._stamps:
            self._stamps[key] = self._stamp(key)
        return self._stamps[key]


def _code_digest() -> str:
    """A digest of the code that the results depend on. A number that is raised by hand would be forgotten."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (package / room).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
