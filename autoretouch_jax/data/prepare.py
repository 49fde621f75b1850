"""`autoretouch data prepare`: pairs → records made for training (`records.py`), in parallel, resumable, verified bit by bit.

A shard holds a fixed range of pairs. The shard, and the file that describes it, appear whole or not at all. So the same pairs
give the same bytes, however many workers there are and however often the work was interrupted.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from autoretouch_jax.data import tile_codec
from autoretouch_jax.data.audit_file import Audit
from autoretouch_jax.data.crops import CELL
from autoretouch_jax.data.records import (
    FORMAT,
    INDEX,
    WRITER_OPTIONS,
    Entry,
    RecordSource,
    tile_side,
    write_example,
)
from autoretouch_jax.data.shards import READER_OPTIONS
from autoretouch_jax.errors import BadInput, Refused, summarise
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.cores import cores

DIGITS = 16  # of a pair's digest that the index keeps: enough to see that it has changed
SHARD_PIXELS = 1 << 26  # pixels of the pairs in one shard: 64 pairs of 1024², about 90 MB


class Pairs(Protocol):
    """The pairs to prepare. They are sent to the worker processes, so they must be picklable."""

    @property
    def names(self) -> list[str]:
        """A name for each pair."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each pair, in pixels."""

    @property
    def license(self) -> str | None:
        """The data's licence, if it is stated."""

    @property
    def edit_threshold(self) -> float | None:
        """The levels from which a change counts as an edit; None: measured for each pair."""

    def part(self, indices: Sequence[int]) -> "Pairs":
        """Returns the pairs of these indices: those of a shard, or those that an audit found sound."""

    def stamp(self, index: int) -> str:
        """Returns a text that changes when the pair does."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and target, `uint8[h, w, 3]`. Raises BadInput when they cannot be decoded."""


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    path: Path
    pairs: Pairs
    on_bad: str


def run(
    pairs: Pairs, out: Path, workers: int, on_bad: str, license: str | None, weights: dict[str, float] | None = None
) -> int:
    """Writes or completes the records in `out`. Returns the exit status: 1 when pairs had to be left out.

    The `weights` of an audit go into the index, and training takes them from there.
    """
    # Everything that can be refused is refused before a shard is touched.
    if not pairs.names:
        raise Refused("there are no pairs to prepare")
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Remove the unfinished files of a killed run, and the index: while shards change, no index may describe them.
        for stale in [*out.glob("*.part"), out / INDEX]:
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(f"--out {out}: cannot be written ({error}); choose another folder") from error
    # A shard holds a fixed range of pairs, whatever the number of workers. That makes the bytes reproducible.
    parts = [pairs.part(indices) for indices in _split(pairs.sizes)]
    jobs = [Job(out / f"shard-{number:05d}.arrayrecord", part, on_bad) for number, part in enumerate(parts)]
    _remove_surplus(out, jobs)
    stated = {"license": license or pairs.license, "edit_threshold": pairs.edit_threshold}
    return _finish(out, _write_all(jobs, workers or cores()), stated, weights)


def sound(pairs: Pairs, audit: Audit) -> Pairs:
    """Returns the pairs of a data set that an audit does not weigh 0, and prints what it does not know."""
    for warning in audit.check(pairs.names):
        print(warning, file=sys.stderr)
    return pairs.part([index for index, name in enumerate(pairs.names) if audit.keeps(name)])


def _write_all(jobs: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """Returns every shard's description, in order. The first exception cancels the jobs that have not begun."""
    shards: list[dict[str, Any]] = [{}] * len(jobs)
    with _bar(sum(len(job.pairs.names) for job in jobs)) as bar, _pool(workers, len(jobs)) as pool:
        # Shards are finished in any order. Their descriptions are returned in the order of the jobs.
        futures = {pool.submit(_shard, job): number for number, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(futures):
                number = futures[future]
                shards[number] = future.result()
                if reason := shards[number].pop("rewritten", ""):
                    bar.write(f"{jobs[number].path}: {reason}; written again", file=sys.stderr)
                bar.update(len(jobs[number].pairs.names))
        except BaseException:
            # Shards that are being written are finished, so that the next run need not write them again.
            pool.shutdown(cancel_futures=True)
            raise
    return shards


def _finish(out: Path, shards: list[dict[str, Any]], stated: dict[str, Any], weights: dict[str, float] | None) -> int:
    """Writes the index, with what is `stated` of all pairs, prints a summary, and returns the exit status."""
    # Entries get the number of their shard here, because a shard does not know its position in the list.
    examples = [
        astuple(Entry(name, height, width, side, number, first))
        for number, shard in enumerate(shards)
        for name, height, width, side, first in shard["examples"]
    ]
    faults = [fault for shard in shards for fault in shard["faults"]]
    if not examples:
        raise BadInput(f"no pair could be read: {summarise(faults)}")
    # The digests let a host check a shard that it has copied from a bucket.
    kept = [{key: shard[key] for key in ("file", "bytes", "sha256")} for shard in shards]
    index: dict[str, Any] = {"format": FORMAT, "cell": CELL, "shards": kept, "examples": examples} | stated
    # Those of the pixels let a run notice which pairs have changed. An earlier version's shards state none.
    if all("digests" in shard for shard in shards):
        index["digests"] = [digest for shard in shards for digest in shard["digests"]]
    if weights is not None:
        index["weights"] = {name: weights[name] for name, *_ in examples if weights.get(name, 1.0) != 1.0}
    storage.write(out / INDEX, json.dumps(index))
    size, pixels = (sum(shard[key] for shard in shards) for key in ("bytes", "pixels"))
    density = 8 * size / max(1, pixels)
    print(f"{out}: {len(examples)} pairs in {len(shards)} shard(s), {size / 1e6:.1f} MB, {density:.2f} bits a pair of pixels")
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    return 1 if faults else 0


def verify(root: Path) -> int:
    """Reads and decodes every pair, and names the damaged ones. Returns the exit status."""
    # Opening reads the index alone; every tile is decoded below.
    source = RecordSource(root)
    faults = []
    for pair in tqdm((source[i] for i in range(len(source))), total=len(source), desc="verifying", unit="pair", disable=None):
        try:
            pair.edits()
            pair.cut((0, 0, pair.height, pair.width))
        except BadInput as error:
            faults.append(str(error))
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{root}: {len(source) - len(faults)} of {len(source)} pairs are whole")
    return 1 if faults else 0


def _split(sizes: Sequence[tuple[int, int]]) -> Iterator[range]:
    """Yields ranges of pairs of at most SHARD_PIXELS in total, in order. A larger pair has a shard of its own."""
    start, pixels = 0, 0
    for index, (height, width) in enumerate(sizes):
        # A shard is closed before it grows too large, but holds one pair at least.
        if index > start and pixels + height * width > SHARD_PIXELS:
            yield range(start, index)
            start, pixels = index, 0
        pixels += height * width
    yield range(start, len(sizes))


def _remove_surplus(out: Path, jobs: Sequence[Job]) -> None:
    """Removes shards that an earlier, longer list of pairs has left."""
    needed = {job.path.name for job in jobs}
    surplus = [path for path in out.glob("shard-*.arrayrecord") if path.name not in needed]
    for path in surplus:
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)


def _pool(workers: int, jobs: int) -> concurrent.futures.Executor:
    if min(workers, jobs) == 1:
        return concurrent.futures.ThreadPoolExecutor(1)  # because a process takes a second to start
    # Spawned and not forked: a fork of a process that has started JAX can hang.
    return concurrent.futures.ProcessPoolExecutor(min(workers, jobs), mp_context=multiprocessing.get_context("spawn"))


def _bar(total: int) -> tqdm:
    return tqdm(total=total, desc="preparing", unit="pair", dynamic_ncols=True, disable=None)


def _shard(job: Job) -> dict[str, Any]:
    """Writes one shard, unless it is there and whole, and returns its description."""
    pairs = job.pairs
    # The stamp covers all that the shard's bytes depend on.
    inputs = [FORMAT, tile_codec.LEVELS, [(name, pairs.stamp(index)) for index, name in enumerate(pairs.names)]]
    stamp = hashlib.sha256(repr(inputs).encode()).hexdigest()
    description = job.path.with_suffix(".json")
    before = json.loads(description.read_text()) if description.is_file() else None
    # With --on-bad fail, a shard from which an earlier run left out pairs must be written again, which raises the error.
    if before and before["stamp"] == stamp and not (before["faults"] and job.on_bad == "fail"):
        if job.path.is_file() and storage.sha256(job.path) == before["sha256"]:
            return before
        return _write_shard(job, stamp) | {"rewritten": "was damaged"}
    return _write_shard(job, stamp)


def _write_shard(job: Job, stamp: str) -> dict[str, Any]:
    examples: list[tuple[Any, ...]] = []
    digests, faults, first, pixels = [], [], 0, 0
    with storage.replacing(job.path) as part:
        writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
        for index, name in enumerate(job.pairs.names):
            try:
                source, target = job.pairs.read(index)
            except BadInput as error:
                if job.on_bad == "fail":
                    raise
                faults.append(str(error))
                continue
            height, width = source.shape[:2]
            write_example(writer, source, target)
            entry = Entry(name, height, width, tile_side(height, width), 0, first)
            examples.append((entry.name, height, width, entry.side, first))
            # Only a digest is kept, because the pixels of a shard take 400 MB.
            digests.append(_digest(source, target))
            first += entry.records
            pixels += height * width
        # Read the shard back: in 70,000 pairs, faults of memory and disks do occur.
        writer.close()
        _verify_shard(part, examples, digests)
        description = {
            "file": job.path.name,
            "bytes": part.stat().st_size,
            "sha256": storage.sha256(part),
            "stamp": stamp,
            "pixels": pixels,
            "examples": examples,
            "digests": [digest.hex()[:DIGITS] for digest in digests],
            "faults": faults,
        }
    # The description comes second: killed in between, the shard is found without one and written again.
    storage.write(job.path.with_suffix(".json"), json.dumps(description))
    return description


def _verify_shard(path: Path, examples: Sequence[tuple[Any, ...]], digests: Sequence[bytes]) -> None:
    """Decodes a shard and compares its pixels with the digests of the originals. Raises BadInput when they differ."""
    reader = ArrayRecordReader(str(path), READER_OPTIONS)
    for (name, height, width, side, first), digest in zip(examples, digests, strict=True):
        entry = Entry(name, height, width, side, 0, first)
        data = reader.read(list(range(first + 1, first + entry.records)))
        if _digest(*tile_codec.decode(data, entry.grid[1], side, (0, 0, height, width))) != digest:
            raise BadInput(f"{path}: {name} did not come back as it was written; is the disk or the memory faulty?")
    reader.close()


def _digest(source: np.ndarray, target: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(source).tobytes() + np.ascontiguousarray(target).tobytes()).digest()
