"""Any number of shards is read with few file handles, from several threads, and downloads do not wait for each other."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from autoretouch_jax.data import records, shards
from autoretouch_jax.data.shards import Shards
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.runtime import cache


def write_shard(path: Path, *contents: bytes) -> dict:
    """Writes records, and returns the shard's part of an index."""
    writer = ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
    for content in contents:
        writer.write(content)
    writer.close()
    data = path.read_bytes()
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def many(folder: Path, count: int) -> list[dict]:
    return [write_shard(folder / f"shard-{number:05d}.arrayrecord", b"%d" % number) for number in range(count)]


def open_files(folder: Path) -> int:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.lexists(link))


# ---- many shards, few handles -----------------------------------------------------------------------------------------------

READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from autoretouch_jax.data.records import RecordSource

source = RecordSource(Path(sys.argv[1]))
def read(index):
    pair = source[index]
    images = pair.cut((0, 0, 16, 16))
    assert pair.edits()[0, 0] == 1 and (images["target"][0, 0] == (images["source"] ^ 1)[0, 0]).all()
    assert images["source"][8, 8, 0] == index % 30
    return index
# Neighbours in this order are far apart in the folder.
order = [(7 * k) % len(source) for k in range(len(source))]
with ThreadPoolExecutor(4) as threads:
    assert list(threads.map(read, order)) == order
print(len(source), "read")
"""


def test_three_thousand_shards_are_read_with_256_file_handles(tmp_path):
    index = {"format": records.FORMAT, "license": None, "shards": [], "examples": []}
    for number in range(3000):
        path = tmp_path / f"shard-{number:05d}.arrayrecord"
        if number < 30:
            writer = ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
            source = np.full((16, 16, 3), number, np.uint8)
            target = source.copy()
            target[0, 0] ^= 1
            records.write_example(writer, source, target)
            writer.close()
        else:  # to the reader a hard link is another file, and it is made faster
            path.hardlink_to(tmp_path / f"shard-{number % 30:05d}.arrayrecord")
        index["shards"].append({"file": path.name})
        index["examples"].append([f"{number:04d}", 16, 16, 16, number, 0])
    (tmp_path / "index.json").write_text(json.dumps(index))
    ran = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.stdout == "3000 read\n", ran.stderr


def test_a_reader_is_closed_only_when_no_thread_reads_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    source = Shards(tmp_path, many(tmp_path, 20))
    numbers = np.random.default_rng(0).integers(0, 20, 3000).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda number: source.read(number, [0]), numbers)) == [[b"%d" % n] for n in numbers]
    assert open_files(tmp_path) == 2
    source.read(5, [0])
    source.read(6, [0])
    source.read(5, [0])
    source.read(7, [0])
    assert list(source._open) == [5, 7], "the least recently used reader is closed"
    source.close()
    assert open_files(tmp_path) == 0


@pytest.mark.parametrize(("handles", "most"), [(256, 64), (1024, 256), (20_000, 512), (2, 1), (-1, 512)])
def test_readers_take_a_quarter_of_the_handles(monkeypatch, handles, most):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda kind: (handles, handles))
    assert shards.most_open() == most


OUT_OF_HANDLES = """
import os, resource, sys
from pathlib import Path
from autoretouch_jax.data.shards import Shards
from autoretouch_jax.errors import Refused

source = Shards(Path(sys.argv[1]), [{"file": name} for name in sorted(os.listdir(sys.argv[1]))])
source.read(0, [0]), source.read(1, [0])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
assert source.read(2, [0]) == [b"2"], "its own readers are closed first"
source.close()
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
try:
    source.read(1, [0])
except Refused as refused:
    print(refused)
os.close(held.pop())
assert source.read(1, [0]) == [b"1"], "a failure is not remembered"
"""


def test_too_many_open_files_are_named_and_not_called_damage(tmp_path):
    many(tmp_path, 3)
    ran = subprocess.run([sys.executable, "-c", OUT_OF_HANDLES, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "shard-00001.arrayrecord: too many open files; this process may open 64 at a time" in ran.stdout, ran.stderr
    assert "ulimit -n" in ran.stdout
    assert ran.returncode == 0, ran.stderr


# ---- shards in an object store ----------------------------------------------------------------------------------------------


class Bucket:
    """A path of an object store whose objects are local files. `before_read` is called with the name of each that is read."""

    def __init__(self, folder: Path, before_read=lambda name: None) -> None:
        self.folder, self.before_read = folder, before_read

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(self.folder / name, self.before_read)

    def __str__(self) -> str:
        return f"gs://bucket/{self.folder.name}"

    def open(self, mode: str):
        self.before_read(self.folder.name)
        return self.folder.open(mode)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def test_two_shards_are_downloaded_at_the_same_time(home):
    both = threading.Barrier(2, timeout=20)  # breaks, and fails the test, when one download waits for the other
    source = Shards(Bucket(home, lambda name: both.wait()), many(home, 2))
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda number: source.read(number, [0]), (0, 1))) == [[b"0"], [b"1"]]


def test_threads_that_need_one_shard_wait_for_one_download_and_others_read_on(home):
    asked, finish, downloads = threading.Event(), threading.Event(), []

    def before_read(name):
        downloads.append(name)
        if "00001" in name:
            asked.set()
            assert finish.wait(20)

    source = Shards(Bucket(home, before_read), many(home, 2))
    assert source.read(0, [0]) == [b"0"]
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(source.read, 1, [0]) for _ in range(4)]
        assert asked.wait(20)
        assert source.read(0, [0]) == [b"0"]
        assert not any(future.done() for future in waiting)
        finish.set()
        assert [future.result() for future in waiting] == [[b"1"]] * 4
    assert downloads == ["shard-00000.arrayrecord", "shard-00001.arrayrecord"]


def test_a_copy_that_another_process_deletes_is_read_on_and_then_fetched_again(home, tmp_path, monkeypatch):
    downloads = []
    source = Shards(Bucket(home, downloads.append), many(home, 1))
    assert source.read(0, [0]) == [b"0"]
    (copy,) = (tmp_path / "cache" / "objects").iterdir()
    copy.unlink()
    assert source.read(0, [0]) == [b"0"], "an open file outlives its name"
    source.close()
    # It is deleted once more, just before it is opened.
    real, deletions = cache.cached, iter([True])

    def cached(path, digest):
        found = real(path, digest)
        if next(deletions, False):
            found.path.unlink()
        return found

    monkeypatch.setattr(cache, "cached", cached)
    assert source.read(0, [0]) == [b"0"]
    assert len(downloads) == 3


def test_open_shards_take_at_most_half_of_the_cache(home, tmp_path, monkeypatch, capsys):
    index = [write_shard(home / f"shard-{n:05d}.arrayrecord", os.urandom(300_000)) for n in range(8)]
    monkeypatch.setenv(cache.VARIABLE, "0.0016")  # four shards
    source = Shards(Bucket(home), index)
    for number in range(8):
        source.read(number, [0])
        assert len(list((tmp_path / "cache" / "objects").iterdir())) <= 4
    assert list(source._open) == [6, 7]
    assert "shards will be downloaded more than once. Set AUTORETOUCH_CACHE" in capsys.readouterr().err
    Shards(Bucket(home), index[:4])
    assert not capsys.readouterr().err


def test_threads_read_rightly_while_copies_come_and_go(home, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "0.0002")  # three shards of 64 KiB
    source = Shards(Bucket(home), many(home, 12))
    numbers = np.random.default_rng(0).integers(0, 12, 400).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda number: source.read(number, [0]), numbers)) == [[b"%d" % n] for n in numbers]
    assert len(list(cache.folder().iterdir())) <= 3 + 8, "a copy that a thread holds may exceed the limit"


def test_a_store_that_fails_is_not_called_damage(home):
    def before_read(name):
        raise ConnectionResetError("reset by peer")

    with pytest.raises(BadInput, match=r"gs://bucket/shard-00000.arrayrecord: cannot be copied to .*reset by peer.*network"):
        Shards(Bucket(home, before_read), many(home, 1)).read(0, [0])
    with pytest.raises(Refused, match="too many open files"):
        Shards(Bucket(home, lambda name: open_failing()), many(home, 1)).read(0, [0])


def open_failing() -> None:
    raise OSError(24, os.strerror(24))
