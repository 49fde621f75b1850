"""The Grain graph: a number → an example's crop → a batch, made ahead by threads or processes. The only importer of Grain.

The batch of step k is a function of (seed, k) alone, however many processes share it. So a checkpoint needs no position of the
data but the step itself.
"""

import concurrent.futures
import functools
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from autoretouch_jax.config import Config, DataConfig, ParallelConfig
from autoretouch_jax.data.augment import augment, augment_negative
from autoretouch_jax.data.negatives import Negatives
from autoretouch_jax.data.sources import Images, Source
from autoretouch_jax.errors import BadInput, summarise
from autoretouch_jax.runtime import memory, worker
from autoretouch_jax.runtime.cores import input_threads

BAD_SHARE = 0.001  # share of the examples that may be unreadable before a run stops; one always may
DEAD_WORKER = "Worker process was terminated unexpectedly"  # in Grain's message


class Share(NamedTuple):
    """Which part of every batch this process gets: part `number`, from 0, of `total` equal ones."""

    number: int = 0
    total: int = 1


Found = tuple[tuple[str, str], ...]  # the examples that a crop or batch is without: their names, and why


class Faults:
    """The examples that could not be read, by name. The first one above the limit raises BadInput, which lists them."""

    def __init__(self, config: DataConfig, examples: int) -> None:
        self.limit = _limit(config, examples)
        self.messages: dict[str, str] = {}
        self._reported = 0

    def note(self, found: Found) -> None:
        """Notes examples that cannot be read. Raises BadInput when there are more of them than the limit."""
        for name, message in found:
            self.messages.setdefault(name, message)
        if len(self.messages) > self.limit:
            raise _too_many(self.messages.values())

    def new_messages(self) -> list[str]:
        """Returns the messages that were noted since the last call."""
        new = list(self.messages.values())[self._reported :]
        self._reported = len(self.messages)
        return new


def _limit(config: DataConfig, examples: int) -> int:
    return 0 if config.on_bad == "fail" else max(1, int(BAD_SHARE * examples))


def _too_many(messages: Iterable[str]) -> BadInput:
    listed = list(messages)
    return BadInput(f"{len(listed)} example(s) could not be read: {summarise(listed)}")


class Crops(grain.transforms.RandomMap):
    """The number of an example → one training crop of it, see `augment`, and what could not be read for it.

    An unreadable example is replaced by the next one.
    """

    def __init__(self, source: Source, config: DataConfig, negatives: Negatives | None) -> None:
        self.source, self.config, self.negatives = source, config, negatives

    def random_map(self, element: int, rng: np.random.Generator) -> tuple[Images, Found]:
        """Returns a crop. All of its randomness comes from the generator passed in."""
        try:
            return self._crop(element, rng)
        except Exception as error:
            if _can_be_sent(error):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def _crop(self, element: int, rng: np.random.Generator) -> tuple[Images, Found]:
        found: list[tuple[str, str]] = []
        if self.negatives and rng.random() < self.config.negative_share:
            crop = self.negatives.draw(rng, lambda name, error: found.append((name, str(error))))
            return augment_negative(crop, self.config, rng), tuple(found)
        # An unreadable example is replaced by the next one, so that the batch stays a function of seed and step.
        for number in range(element, element + len(self.source)):
            index = number % len(self.source)
            try:
                return augment(self.source[index], self.config, rng), tuple(found)
            except BadInput as error:
                found.append((self.source.names[index], str(error)))
                if len(found) > _limit(self.config, len(self.source)):
                    break
        raise _too_many(message for _, message in found)


def _can_be_sent(error: Exception) -> bool:
    """Whether an error comes through to another process. One that does not would leave that process waiting for ever."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def batches(
    source: Source,
    config: Config,
    first_step: int,
    seed_offset: int = 0,
    share: Share = Share(),  # noqa: B008
    faults: Faults | None = None,
    negatives: Negatives | None = None,
) -> Iterator[Images]:
    """Yields batches `{"source", "target": uint8[n, crop, crop, 3], "weight": float32[n]}` from `first_step` on, without end.

    Each process gets n = `train.batch` / total examples of every batch. The shares of all processes, one after another, are the
    batch that a single process would have got. Another `seed_offset` gives other crops and blemishes of the same images.
    A share `data.negative_share` of the crops comes from `negatives`, if there are any. What cannot be read is noted in
    `faults` when its batch is taken.
    """
    crop = Crops(source, config.data, negatives)
    # Shuffled anew in every epoch, and repeated without end.
    examples = grain.MapDataset.range(len(source)).seed(config.train.seed + seed_offset).shuffle().repeat().random_map(crop)
    if config.train.batch % share.total:
        raise ValueError(f"a batch of {config.train.batch} cannot be shared by {share.total} processes")
    size = config.train.batch // share.total
    # The batch of step k is `total` batches of this size, from number k · total on. Each process takes one of them.
    own = examples.batch(size, drop_remainder=True, batch_fn=_batch)[first_step * share.total + share.number :: share.total]
    # The processes take turns, one batch each.
    number = max(1, config.parallel.input_processes)
    streams = [_ahead(own[first::number] if number > 1 else own, size, config.parallel) for first in range(number)]
    return _Batches(streams, faults or Faults(config.data, len(source)), config.parallel.input_processes)


def _batch(crops: Sequence[tuple[Images, Found]]) -> tuple[Images, Found]:
    images = {name: np.stack([crop[name] for crop, _ in crops]) for name in crops[0][0]}
    return images, tuple(one for _, found in crops for one in found)


def _ahead(batches: grain.MapDataset, size: int, config: ParallelConfig) -> grain.DatasetIterator:
    """Makes batches of this size ahead, in threads, and these in a process of their own where the config wants any."""
    ahead = max(1, config.prefetch // size)
    threads = max(1, input_threads(config.input_threads) // max(1, config.input_processes))
    # Decoding and NumPy release Python's lock for most of their time, so that threads are enough for a few cores. Batches of
    # processes come through shared memory.
    made = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * ahead))
    if config.input_processes:
        # Grain reads flags of Abseil's before it starts a process, and fails where no program has parsed them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(1, per_worker_buffer_size=ahead)
        made = made.mp_prefetch(options, functools.partial(_start_worker, config.input_processes))
    return iter(made)


def _start_worker(total: int, *_grains: int) -> None:
    worker.start(total)
    memory.keep_freed_memory()


class _Batches(Iterator[Images]):
    """The images of batches from streams that take turns. What was not read for a batch is noted when it is taken.

    The streams are closed with `close`, or when nothing refers to this object any more, or when the program ends.
    """

    def __init__(self, streams: list[grain.DatasetIterator], faults: Faults, processes: int) -> None:
        self._streams, self._faults, self._processes = streams, faults, processes
        self._waiting: deque[tuple[Images, Found]] = deque()
        self._turn = 0
        self.close = weakref.finalize(self, _close, streams)

    def __next__(self) -> Images:
        if not self._streams:
            raise StopIteration
        if self._processes and not self._turn:
            # All at once, because a process takes seconds to start.
            with worker.signals_held_back(), concurrent.futures.ThreadPoolExecutor(len(self._streams)) as together:
                self._waiting.extend(together.map(_next, self._streams))
        stream = self._streams[self._turn % len(self._streams)]
        images, found = self._waiting.popleft() if self._waiting else _next(stream)
        self._turn += 1
        self._faults.note(found)
        return images


def _close(streams: list[grain.DatasetIterator]) -> None:
    # At the same time: each waits for the batch that its process is making.
    threads = [threading.Thread(target=stream.close) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Let go while the program still has its modules, which Grain needs to clean up.
    streams.clear()


def _next(stream: grain.DatasetIterator) -> tuple[Images, Found]:
    try:
        images, found = next(stream)
        # What lies in shared memory is copied, so that it is free again at once. Grain's arrays are of another class then.
        return {name: image if type(image) is np.ndarray else np.array(image) for name, image in images.items()}, found
    except RuntimeError as error:
        if DEAD_WORKER not in str(error):
            raise
        raise BadInput(
            "a process that makes batches has died: out of memory, no room in /dev/shm (with Docker: --shm-size 4g), or a "
            "fault of a decoder; with a lower --parallel.input-processes it takes less memory"
        ) from error
