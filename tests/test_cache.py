"""Copies of remote objects: checked, limited in size, shared with other processes; full disks and cut downloads are named."""

import errno
import hashlib
import math
import os
import time
from pathlib import Path

import pytest

from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.runtime import cache


@pytest.fixture(autouse=True)
def objects(tmp_path, monkeypatch) -> Path:
    """The folder of the copies."""
    monkeypatch.setenv("AUTORETOUCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "objects"


def made(folder: Path, name: str, size: int = 1000) -> tuple[Path, str]:
    """An object, and its digest. It is local: `cached` asks only for its `open`."""
    content = name.encode() * (size // len(name))
    (folder / name).write_bytes(content)
    return folder / name, hashlib.sha256(content).hexdigest()


def ages(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_least_recently_used_copies_make_room(tmp_path, objects, monkeypatch):
    things = [made(tmp_path, name) for name in ("a", "b", "c", "d")]
    monkeypatch.setenv(cache.VARIABLE, "0.000003")  # three of them
    for age, thing in zip((300, 200, 100), things, strict=False):
        ages(cache.cached(*thing).path, age)
    cache.cached(*things[0])  # used again, so that b is now the oldest
    cache.cached(*things[3])
    assert {path.name for path in objects.iterdir()} == {things[0][1], things[2][1], things[3][1]}


def test_what_is_in_use_stays_and_a_large_object_may_be_alone(tmp_path, objects, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "0.000001")
    old = cache.cached(*made(tmp_path, "old"))
    ages(old.path, 1000)
    large = cache.cached(*made(tmp_path, "large", 5000))
    assert old.path.exists()
    del old
    cache.evict(cache.limit())
    assert list(objects.iterdir()) == [large.path], "the one in use stays, though it alone is above the limit"


def test_a_copy_that_another_process_deleted_is_fetched_again(tmp_path):
    thing = made(tmp_path, "a")
    copy = cache.cached(*thing)
    copy.path.unlink()
    assert cache.cached(*thing).path.read_bytes() == thing[0].read_bytes()


def test_copies_of_other_users_are_left(tmp_path, objects, monkeypatch):
    copy = cache.cached(*made(tmp_path, "a"))
    path = copy.path
    del copy

    def unlink(self, missing_ok=False):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(Path, "unlink", unlink)
    cache.evict(0)
    assert path.exists()


def test_partial_downloads_of_killed_processes_are_removed_and_others_are_not(tmp_path, objects):
    objects.mkdir(parents=True)
    for name, age in (("old", cache.STALE + 60), ("new", 60)):
        (objects / f"{name}.part").write_bytes(b"half")
        ages(objects / f"{name}.part", age)
    copy = cache.cached(*made(tmp_path, "a"))
    assert {path.name for path in objects.iterdir()} == {"new.part", copy.path.name}


def test_the_limit_is_the_variables_or_a_share_of_the_disk(tmp_path, monkeypatch):
    copy = cache.cached(*made(tmp_path, "a", 10_000))
    usage = type("Usage", (), {"free": 90_000})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    assert cache.limit() == pytest.approx(0.8 * 100_000), "the copies themselves count as free"
    copy.path.unlink()
    for text, limit in (("2.5", 2.5e9), ("0", math.inf)):
        monkeypatch.setenv(cache.VARIABLE, text)
        assert cache.limit() == limit
    for text in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(cache.VARIABLE, text)
        with pytest.raises(Refused, match=f"AUTORETOUCH_CACHE_GB={text}: not a number of gigabytes"):
            cache.limit()


def full_disk(monkeypatch, times: float) -> list[str]:
    """Makes the next downloads fail as on a full disk. Returns the list of all attempts."""
    real, attempts = cache._copy, []

    def copy(path, digest, place):
        attempts.append(path.name)
        if len(attempts) <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, digest, place)

    monkeypatch.setattr(cache, "_copy", copy)
    return attempts


def test_on_a_full_disk_copies_make_room_and_then_the_disk_is_named(tmp_path, objects, monkeypatch):
    cache.cached(*made(tmp_path, "a"))
    attempts = full_disk(monkeypatch, 1)
    second = cache.cached(*made(tmp_path, "b"))
    assert attempts == ["b", "b"]
    assert list(objects.iterdir()) == [second.path]
    full_disk(monkeypatch, math.inf)
    with pytest.raises(Refused, match=r"objects: the disk is full, and .*/c cannot be copied to it; free space there, or set"):
        cache.cached(*made(tmp_path, "c"))


def test_a_wrong_digest_and_a_cut_connection_leave_nothing_behind(tmp_path, objects):
    thing, _ = made(tmp_path, "a")
    with pytest.raises(BadInput, match="a: damaged, its SHA-256"):
        cache.cached(thing, "0" * 64)

    class Cut:
        def open(self, mode):
            raise TimeoutError("timed out")

    with pytest.raises(BadInput, match=r"cannot be copied to .*objects \(timed out\); check the bucket and the network"):
        cache.cached(Cut(), "1" * 64)
    assert not list(objects.iterdir())


def test_a_bug_keeps_its_traceback(tmp_path):
    class Broken:
        def open(self, mode):
            raise KeyError("bug")

    with pytest.raises(KeyError):
        cache.cached(Broken(), "2" * 64)
