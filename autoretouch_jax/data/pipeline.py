"""The Grain graph: a number → an example's crop → a batch, made ahead by threads. The only importer of Grain.

The batch of step k is a function of (seed, k) alone, however many processes share it. So a checkpoint needs no position of the
data but the step itself.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from autoretouch_jax.config import Config, DataConfig
from autoretouch_jax.data.augment import augment, augment_negative
from autoretouch_jax.data.negatives import Negatives
from autoretouch_jax.data.sources import Images, Source
from autoretouch_jax.errors import BadInput, summarise
from autoretouch_jax.runtime.cores import input_threads

BAD_SHARE = 0.001  # share of the examples that may be unreadable before a run stops; one always may


class Share(NamedTuple):
    """Which part of every batch this process gets: part `number`, from 0, of `total` equal ones."""

    number: int = 0
    total: int = 1


class Faults:
    """The examples that could not be read, by name. The first one above the limit raises BadInput, which lists them."""

    def __init__(self, config: DataConfig, examples: int) -> None:
        self.limit = 0 if config.on_bad == "fail" else max(1, int(BAD_SHARE * examples))
        self.messages: dict[str, str] = {}
        self._reported = 0
        self._lock = threading.Lock()  # Grain's threads note faults while the loop reads them

    def note(self, name: str, error: BadInput) -> None:
        """Notes an example that cannot be read. Raises BadInput when there are more of them than the limit."""
        with self._lock:
            self.messages.setdefault(name, str(error))
            if len(self.messages) > self.limit:
                faults = summarise(list(self.messages.values()))
                raise BadInput(f"{len(self.messages)} example(s) could not be read: {faults}") from error

    def new_messages(self) -> list[str]:
        """Returns the messages that were noted since the last call."""
        with self._lock:
            new = list(self.messages.values())[self._reported :]
            self._reported = len(self.messages)
        return new


class Crops(grain.transforms.RandomMap):
    """The number of an example → one training crop of it, see `augment`. An unreadable example is replaced by the next one."""

    def __init__(self, source: Source, config: DataConfig, faults: Faults, negatives: Negatives | None) -> None:
        self.source, self.config, self.faults, self.negatives = source, config, faults, negatives

    def random_map(self, element: int, rng: np.random.Generator) -> Images:
        """Returns a crop. All of its randomness comes from the generator passed in."""
        if self.negatives and rng.random() < self.config.negative_share:
            return augment_negative(self.negatives.draw(rng, self.faults.note), self.config, rng)
        # An unreadable example is replaced by the next one, so that the batch stays a function of seed and step.
        for number in range(element, element + len(self.source)):
            index = number % len(self.source)
            try:
                return augment(self.source[index], self.config, rng)
            except BadInput as error:
                self.faults.note(self.source.names[index], error)
        raise BadInput("no example can be read")


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
    A share `data.negative_share` of the crops comes from `negatives`, if there are any.
    """
    crop = Crops(source, config.data, faults or Faults(config.data, len(source)), negatives)
    # Shuffled anew in every epoch, and repeated without end.
    examples = grain.MapDataset.range(len(source)).seed(config.train.seed + seed_offset).shuffle().repeat().random_map(crop)
    if config.train.batch % share.total:
        raise ValueError(f"a batch of {config.train.batch} cannot be shared by {share.total} processes")
    size = config.train.batch // share.total
    # The batch of step k is `total` batches of this size, from number k · total on. Each process takes one of them.
    own = examples.batch(size, drop_remainder=True)[first_step * share.total + share.number :: share.total]
    ahead = max(1, config.parallel.prefetch // size)
    threads = input_threads(config.parallel.input_threads)
    # Threads, not processes: decoding and NumPy release the GIL, and examples need not be copied between processes.
    return iter(own.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * ahead)))
