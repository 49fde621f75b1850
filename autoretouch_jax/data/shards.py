"""The shards of a `RecordSource`: a limited number of them is open at a time, and several threads read from them.

Opening a shard of 64 pairs of 1024² takes about 0.3 ms, a tenth of what a crop of 256² takes. So a shard that was closed is
simply opened again.
"""

import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from autoretouch_jax.config.paths import is_remote
from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime import cache, worker

READER_OPTIONS = "readahead_buffer_size:0"  # reads are random, so the records that follow are seldom needed
MOST_OPEN = 512  # a reader of a full shard takes about 0.2 MB
HANDLES_SHARE = 4  # validation data are open too, and checkpoints, images and sockets need handles
CACHE_SHARE = 2  # the other half of the cache is for shards that are not open
TOO_MANY = tuple(os.strerror(number) for number in cache.NO_HANDLES)  # ArrayRecord passes on the text and not the number


@dataclass(frozen=True)
class _Open:
    """A reader, the copy in the cache from which it reads, and the bytes of that copy."""

    reader: ArrayRecordReader
    copy: cache.Copy | None = None
    size: int = 0


class Shards:
    """Reads records of shards, from several threads. The least recently used readers are closed beyond a limit."""

    def __init__(self, root: Any, shards: Sequence[dict[str, Any]]) -> None:
        """`shards` are the index's: a file name each, and `bytes` and `sha256`, which only an object store needs."""
        self.root, self.shards = root, shards
        self._open_nothing()
        if is_remote(root):
            limit, size = cache.limit(), sum(shard["bytes"] for shard in shards)
            if size > limit:
                print(
                    f"{root}: {size / 1e9:.1f} GB of records, of which {cache.folder()} may hold {limit / 1e9:.1f} GB: shards "
                    "will be downloaded more than once. Set AUTORETOUCH_CACHE to a folder on a larger disk, or raise "
                    f"{cache.VARIABLE}",
                    file=sys.stderr,
                )

    def _open_nothing(self) -> None:
        self._most_open = most_open()
        # Copies that are read cannot make room for others, so they may take only a part of the cache.
        self._most_bytes = cache.limit() / CACHE_SHARE / worker.siblings() if is_remote(self.root) else 0.0
        self._open: OrderedDict[int, _Open] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A worker process opens shards of its own.
        self.root, self.shards = state["root"], state["shards"]
        self._open_nothing()

    def read(self, number: int, records: Sequence[int]) -> list[bytes]:
        """Returns records of a shard.

        Raises RuntimeError, ValueError or IndexError when they cannot be read, BadInput when the shard cannot be copied from
        its store, and Refused when the process has no file handle left.
        """
        # While a thread reads, this name refers to the reader. ArrayRecord closes the file of a reader without references, so
        # a reader that another thread drops from the dictionary stays open until the read has ended.
        opened = self._opened(number)
        return opened.reader.read(records)

    def close(self) -> None:
        """Closes every reader that no thread is reading from."""
        with self._lock:
            self._open.clear()

    def _opened(self, number: int) -> _Open:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Opened without the lock: a shard may first have to be downloaded, and the others can be read meanwhile.
        try:
            opened = self._opening(number)
        except (RuntimeError, Refused):
            # Other parts of the program may hold most handles, or another process may have deleted the copy in the cache.
            self.close()
            opened = self._opening(number)
        with self._lock:
            # Two threads may have opened the same shard. The second reader replaces the first one.
            self._open[number] = opened
            self._open.move_to_end(number)
            self._drop_oldest()
        return opened

    def _opening(self, number: int) -> _Open:
        shard = self.shards[number]
        path, copy = self.root / shard["file"], None
        if is_remote(path):  # ArrayRecord cannot open it, and for s3:// it does not say so
            copy = cache.cached(path, shard["sha256"])
        reader = ArrayRecordReader(str(copy.path if copy else path), READER_OPTIONS)
        if not reader.ok():
            try:
                reader.read([0])  # raises the error with which opening failed
            except RuntimeError as error:
                if any(text in str(error) for text in TOO_MANY):
                    raise cache.out_of_handles(path) from error
                raise
        return _Open(reader, copy, shard["bytes"] if copy else 0)

    def _drop_oldest(self) -> None:
        # The newest reader stays, however large its shard is.
        while len(self._open) > 1 and (
            len(self._open) > self._most_open or sum(opened.size for opened in self._open.values()) > self._most_bytes
        ):
            self._open.popitem(last=False)


def most_open() -> int:
    """How many shards one `Shards` keeps open: a quarter of the file handles that this process may have, 512 at most."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if handles == resource.RLIM_INFINITY:
        return MOST_OPEN
    return max(1, min(MOST_OPEN, handles // HANDLES_SHARE))
