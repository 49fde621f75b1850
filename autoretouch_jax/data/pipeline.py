"""The Grain graph: number → crop, flip, colour, blemishes → batch → threads that work ahead.

The batch of step k is a function of (seed, k) alone, however many hosts share it: there is no position to save but k itself.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from PIL import Image

from autoretouch_jax.config import Config, DataConfig
from autoretouch_jax.data import crops
from autoretouch_jax.data.blemish import add_blemishes, skin_mask
from autoretouch_jax.data.sources import Decoded, Example, Images, Source, some, whole
from autoretouch_jax.errors import BadInput

SKIN_TRIES = 4  # places looked at for a crop with skin in it
BAD_SHARE = 0.001  # of the examples may be unreadable (one is always allowed) before a run stops


class Host(NamedTuple):
    """Which of the processes that share every batch this is."""

    number: int = 0
    total: int = 1


class Faults:
    """The examples that could not be read, by name. Past the limit the next one raises BadInput with the whole list."""

    def __init__(self, config: DataConfig, examples: int):
        self.limit = 0 if config.on_bad == "fail" else max(1, int(BAD_SHARE * examples))
        self.named: dict[str, str] = {}
        self._told = 0
        self._lock = threading.Lock()

    def note(self, name: str, error: BadInput) -> None:
        """Remember an example."""
        with self._lock:
            self.named.setdefault(name, str(error))
            if len(self.named) > self.limit:
                raise BadInput(f"{len(self.named)} example(s) could not be read: {some(list(self.named.values()))}") from error

    def news(self) -> list[str]:
        """What was noted since the last call."""
        with self._lock:
            found = list(self.named.values())[self._told :]
            self._told = len(self.named)
        return found


class Crops(grain.transforms.RandomMap):
    """A number → one training crop `{"source", "target": uint8[crop, crop, 3], "weight": float32[]}`.

    An example that cannot be read is replaced by the next one that can.
    """

    def __init__(self, source: Source, config: DataConfig, faults: Faults):
        self.source, self.config, self.faults = source, config, faults

    def random_map(self, element: int, rng: np.random.Generator) -> Images:
        """Any crop of that example, a function of the generator passed in."""
        for number in range(element, element + len(self.source)):
            index = number % len(self.source)
            try:
                return augment(self.source[index], self.config, rng)
            except BadInput as error:
                self.faults.note(self.source.names[index], error)
        raise BadInput("no example can be read")


def augment(example: Example, config: DataConfig, rng: np.random.Generator) -> Images:
    """One crop: the same place, zoom, flip and colours for both images, and the weight it has in the loss.

    Faces get fresh blemishes; pairs too where `extra_blemishes` says so, on the source alone.
    """
    if config.resize:
        square = (config.resize, config.resize)
        resized = {name: _resize(image, square, Image.Resampling.BICUBIC) for name, image in whole(example).items()}
        example = Decoded(example.name, resized, example.weight)
    synthetic = bool(config.root)
    low, high = np.log(config.zoom)
    side = round(config.crop / float(np.exp(rng.uniform(low, high))))
    side = min(side, example.height, example.width)
    if synthetic:
        (top, left), weight = _place_on_skin(example, side, rng), 1.0
    else:
        edits = example.edits() if config.edit_crops else np.zeros((1, 1), np.uint8)
        top, left, weight = crops.draw(rng, example.height, example.width, edits, side, config.edit_crops)
    crop = (config.crop, config.crop)
    pair = {
        name: image if side == config.crop else _resize(image, crop, Image.Resampling.LANCZOS)
        for name, image in example.cut((top, left, side, side)).items()
    }
    if config.flip and rng.random() < 0.5:
        pair = {name: image[:, ::-1] for name, image in pair.items()}
    if config.colour:
        table = _colour_table(rng, config.colour)
        pair = {name: table[np.arange(3), image] for name, image in pair.items()}
    pair = {name: np.ascontiguousarray(image) for name, image in pair.items()}
    if synthetic:
        pair["source"] = add_blemishes(rng, pair["target"], config.blemish)
    elif config.extra_blemishes and rng.random() < config.extra_blemishes:
        pair["source"] = add_blemishes(rng, pair["source"], config.blemish)
    return pair | {"weight": np.asarray(weight * example.weight, np.float32)}


def _place_on_skin(example: Example, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop where there is skin, if a few tries find any."""
    step = max(1, side // 16)
    for _ in range(SKIN_TRIES):
        top, left = int(rng.integers(example.height - side + 1)), int(rng.integers(example.width - side + 1))
        if skin_mask(example.cut((top, left, side, side))["target"][::step, ::step]).mean() > 0.3:
            break
    return top, left


def _colour_table(rng: np.random.Generator, strength: float) -> np.ndarray:
    """`uint8[3, 256]`: a gamma and a gain for each channel, within ± strength, mostly shared by the three."""
    gamma, gain = np.exp(strength * (rng.uniform(-1, 1, (2, 1)) + 0.3 * rng.uniform(-1, 1, (2, 3))))
    levels = np.linspace(0, 1, 256)
    return np.clip(np.rint(255 * gain[:, None] * levels ** gamma[:, None]), 0, 255).astype(np.uint8)


def _resize(image: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, how))


def batches(
    source: Source,
    config: Config,
    first_step: int,
    seed_offset: int = 0,
    host: Host = Host(),  # noqa: B008
    faults: Faults | None = None,
) -> Iterator[Images]:
    """Batches `{"source", "target": uint8[n, crop, crop, 3], "weight": float32[n]}` from `first_step` on, without end.

    Each host gets its run of n = `train.batch` / hosts examples of every batch: the hosts' shares, put one after another, are
    the batch that one host would have got. Another `seed_offset` gives other crops and blemishes of the same images.
    """
    crop = Crops(source, config.data, faults or Faults(config.data, len(source)))
    examples = grain.MapDataset.range(len(source)).seed(config.train.seed + seed_offset).shuffle().repeat().random_map(crop)
    if config.train.batch % host.total:
        raise ValueError(f"a batch of {config.train.batch} cannot be shared by {host.total} hosts")
    share = config.train.batch // host.total
    shares = examples.batch(share, drop_remainder=True)[first_step * host.total + host.number :: host.total]
    ahead = max(1, config.parallel.prefetch // share)
    threads = config.parallel.input_threads
    return iter(shares.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * ahead)))
