"""Inconsistent labels: spots left in a target although spots of their kind are removed elsewhere.

A small network learns from many pairs at once where an edit belongs: in sources, where the target differs, and in targets,
nowhere. A spot that it would still edit in a *target* is one that the retouchers of other pairs remove. The network is too
small to memorise the spots that a single pair left, and because it sees many faces it learns which marks belong to a face.

Pairs are read at a reduced scale (`reading.py`), so that spots are about as large in all of them, and a 24 MP pair takes no
longer than one of 2 MP.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import msgpack_restore, msgpack_serialize
from optax.contrib import MuonDimensionNumbers, muon
from skimage.measure import label, regionprops
from tqdm import tqdm

from autoretouch_jax.audit.reading import ahead
from autoretouch_jax.models.layers import space_to_depth
from autoretouch_jax.models.pixels import to_float

FEWEST_PAIRS = 12  # fewer pairs do not show what is usually removed
MOST_LEARNED = 300  # the most pairs that the network learns from
CROP, CROPS_PER_PAIR, BATCH, STEPS = 96, 10, 16, 600
LEARNING_RATE, BIAS_LEARNING_RATE = 0.03, 5e-3  # of Muon for kernels, and of Adam for the rest; Adam alone is half as good
EDIT_WEIGHT = 5.0  # how many times an edited pixel counts in the loss, because there are few of them
WIDTH = 24  # channels
TILE, TILE_STEP, HALO = 512, 64, 32  # windows are at most TILE + 2 HALO wide, in few sizes, so that few are compiled
EDITED = 6  # levels from which a change counts as an edit
THRESHOLD = 0.5  # probability above which a pixel belongs to a spot
SMALLEST = 3  # pixels, at half resolution, that make a spot
POWER = 6  # of a spot's probability in the count of spots, so that two doubtful ones count less than a sure one
PRIOR = 0.5  # spots added to the count, so that a single one says little
INCONSISTENT = 0.3  # share of left spots from which a pair is flagged; benchmarks/README.md says how it was chosen

Pair = tuple[np.ndarray, np.ndarray]  # source and target, uint8[h, w, 3]
Read = Callable[[str], tuple[Pair, float] | None]  # a pair and how many times it was reduced, or None if it is unreadable


class Known(Protocol):
    """Results of an audit that was stopped, JSON values by key. Assigning adds one."""

    def get(self, key: str) -> Any:
        """Returns the result, or None."""

    def __setitem__(self, key: str, value: Any) -> None: ...


class Spot(NamedTuple):
    """A spot: its centre and radius in pixels, and the probability that spots of its kind are removed."""

    row: float
    column: float
    radius: float
    probability: float


class Finding(TypedDict):
    """The result for a pair: the share of its spots that were left, how many were left and removed, and the left ones."""

    score: float
    left: int
    removed: int
    left_spots: list[tuple[float, float, float]]  # row, column, radius


class SpotDetector(nn.Module):
    """`float32[N, H, W, 3]` in [-1, 1] → logits `[N, H/2, W/2]` of an edit. The receptive field is 48 pixels."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """See the class."""
        surroundings = jnp.pad(image, ((0, 0), (7, 7), (7, 7), (0, 0)), mode="edge")
        # By rows, then by columns: XLA's windows of 15 × 15 take longer on a CPU than all convolutions together.
        surroundings = nn.avg_pool(nn.avg_pool(surroundings, (15, 1), padding="VALID"), (1, 15), padding="VALID")
        # The difference from the surroundings, because a spot is a contrast, whatever the complexion.
        contrast = 4 * (image - surroundings)
        x = space_to_depth(contrast)
        for dilation in (1, 1, 2, 4):
            x = nn.relu(nn.Conv(WIDTH, (3, 3), kernel_dilation=dilation)(x))
        # The bias starts at a probability of 5 %, because hardly any pixel is edited.
        return nn.Conv(1, (1, 1), bias_init=nn.initializers.constant(-3.0))(x)[..., 0]


def find(names: Sequence[str], read: Read, params: Known, spots: Known) -> dict[str, Finding]:
    """Returns, for each pair, the share of its spots that were left, and where they are. It is empty for too few pairs.

    Pairs that cannot be read are left out. `params` and `spots` hold what an earlier, stopped search has learned and seen.
    """
    if len(names) < FEWEST_PAIRS:
        return {}
    seen = {name: spots.get(name) for name in names}
    rest = [name for name in names if seen[name] is None]
    if rest:
        learned = _remembered(params, lambda: _learn(learned_from(names), read))
    progress = {"total": len(names), "initial": len(names) - len(rest), "desc": "looking for spots that were left"}
    # Several pairs at a time: XLA uses one core for images of this size.
    looked_at = ahead(rest, lambda name: None if (example := read(name)) is None else _removed_and_left(learned, *example))
    with tqdm(**progress, unit="pair", dynamic_ncols=True, disable=None) as bar:
        for name, sides in looked_at:
            if sides is not None:
                seen[name] = spots[name] = sides
            bar.update()
    # From JSON, spots are lists.
    both = {name: [list(map(Spot._make, side)) for side in sides] for name, sides in seen.items() if sides is not None}
    # Skin has marks that nobody removes. The count of the median pair is subtracted from that of every pair.
    usual = float(np.median([_count(left) for _, left in both.values()])) if both else 0.0
    return {name: _finding(removed, left, usual) for name, (removed, left) in both.items()}


def learned_from(names: Sequence[str]) -> list[str]:
    """Returns the pairs that the network learns from, chosen at random, and always the same ones of the same names."""
    return [names[i] for i in np.random.default_rng(0).permutation(len(names))[:MOST_LEARNED]]


def _remembered(params: Known, learn: Callable[[], Any]) -> Any:
    """Returns the parameters that an earlier search has learned, or else those of this one."""
    if (data := params.get("params")) is not None:
        return msgpack_restore(base64.b64decode(data))
    learned = jax.device_get(learn())
    params["params"] = base64.b64encode(msgpack_serialize(learned)).decode()
    return learned


def _count(spots: Sequence[Spot]) -> float:
    """The number of spots, each counted by how surely its kind is removed."""
    return sum(spot.probability**POWER for spot in spots)


def _finding(removed: Sequence[Spot], left: Sequence[Spot], usual: float) -> Finding:
    unusual = max(0.0, _count(left) - usual)
    sure = [(spot.row, spot.column, spot.radius) for spot in left if spot.probability > 0.5]
    return {
        "score": unusual / (unusual + _count(removed) + PRIOR),
        "left": len(sure),
        "removed": sum(spot.probability > 0.5 for spot in removed),
        "left_spots": sure,
    }


# ---- learning what is usually removed ---------------------------------------------------------------------------------------


def _crops(names: Sequence[str], read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Returns crops of sources and targets, `uint8[N, 96, 96, 3]`, and where to edit them, `bool[N, 48, 48]`."""
    rng = np.random.default_rng(1)
    images, masks = [], []
    reading = tqdm(ahead(names, read), "reading pairs to learn from", len(names), unit="pair", disable=None)
    for _, example in reading:
        if example is None:
            continue
        source, target = (_pad_to(image, CROP) for image in example[0])
        edit = _edit(source, target)
        edited = np.flatnonzero(edit)
        height, width = edit.shape
        for number in range(CROPS_PER_PAIR):
            # Every second crop holds an edited pixel: random crops would hold few.
            row, column = divmod(int(rng.choice(edited)), width) if edited.size and number % 2 else (
                int(rng.integers(height)), int(rng.integers(width)))  # fmt: skip
            top = min(max(row - int(rng.integers(CROP)), 0), height - CROP)
            left = min(max(column - int(rng.integers(CROP)), 0), width - CROP)
            crop = np.s_[top : top + CROP, left : left + CROP]
            # Copies: views would keep all photographs in memory, 3 GB of 300 pairs.
            images += [source[crop].copy(), target[crop].copy()]
            mask = edit[crop].reshape(CROP // 2, 2, CROP // 2, 2).any((1, 3))
            masks += [mask, np.zeros_like(mask)]  # in a target, nothing is to be edited
    return np.stack(images), np.stack(masks)


def _edit(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.abs(source.astype(np.int16) - target).max(-1) >= EDITED


def _optimizer() -> optax.GradientTransformation:
    def dimensions(params: Any) -> Any:
        return jax.tree.map(lambda x: MuonDimensionNumbers((0, 1, 2), 3) if x.ndim == 4 else None, params)

    return muon(
        optax.cosine_decay_schedule(LEARNING_RATE, STEPS),
        adam_learning_rate=BIAS_LEARNING_RATE,
        muon_weight_dimension_numbers=dimensions,
    )


def _learn(names: Sequence[str], read: Read) -> Any:
    """Trains the detector on these pairs and returns its parameters. The same pairs give the same parameters."""
    images, masks = _crops(names, read)
    rng = np.random.default_rng(0)
    # rbg keys, because an initialisation over threefry keys takes long to compile on a CPU.
    params = jax.jit(SpotDetector().init)(jax.random.key(0, impl="rbg"), np.zeros((1, CROP, CROP, 3), np.float32))
    optimizer = _optimizer()

    @jax.jit
    def step(params: Any, state: Any, image: jax.Array, mask: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = SpotDetector().apply(params, to_float(image))
            losses = optax.sigmoid_binary_cross_entropy(logits, mask.astype(jnp.float32))
            return (losses * jnp.where(mask, EDIT_WEIGHT, 1.0)).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in tqdm(range(STEPS), desc="learning what is usually removed", unit="step", disable=None):
        chosen = rng.integers(len(images), size=BATCH)
        flip, turns = rng.random() < 0.5, int(rng.integers(4))
        batch, mask = (np.rot90(array[chosen], turns, (1, 2)) for array in (images, masks))
        batch, mask = (array[:, :, ::-1] if flip else array for array in (batch, mask))
        params, state = step(params, state, np.ascontiguousarray(batch), np.ascontiguousarray(mask))
    return params


# ---- looking at one pair ----------------------------------------------------------------------------------------------------


def _removed_and_left(params: Any, pair: Pair, reduced: float) -> tuple[list[Spot], list[Spot]]:
    """Returns the spots of the source that were removed, and the spots of the target, which were left, in the file's pixels."""
    edit = _edit(*pair)
    before, after = (_detect(params, image) for image in pair)
    removed = [spot for spot in before if edit[_box(spot, edit.shape)].any()]
    # A spot of the target where something was edited is a poor retouch, not one that was left out.
    left = [spot for spot in after if not edit[_box(spot, edit.shape)].any()]
    return _enlarged(removed, reduced), _enlarged(left, reduced)


def _enlarged(spots: Sequence[Spot], factor: float) -> list[Spot]:
    """Returns spots of a reduced image in the pixels of the file, rounded: the journal holds a hundred thousand."""
    enlarged = []
    for row, column, radius, probability in spots:
        # The centre of the first pixel is 0.
        row, column = (round(factor * (value + 0.5) - 0.5, 1) for value in (row, column))
        enlarged.append(Spot(row, column, round(factor * radius, 1), round(probability, 4)))
    return enlarged


def _box(spot: Spot, shape: tuple[int, ...]) -> tuple[slice, slice]:
    ranges = [(max(0, int(centre - spot.radius)), int(centre + spot.radius) + 1) for centre in (spot.row, spot.column)]
    return slice(*ranges[0]), slice(*ranges[1])


def _detect(params: Any, image: np.ndarray) -> list[Spot]:
    """Detects spots that the network would edit."""
    probability = _probability_map(params, image)
    spots = []
    for region in regionprops(label(probability > THRESHOLD), probability):
        if region.area < SMALLEST:
            continue
        row, column = (2 * centre + 0.5 for centre in region.centroid)  # from half resolution to pixels
        radius = max(2.0, float(np.sqrt(4 * region.area / np.pi)))
        peak = float(region.intensity_max)
        # The loss weights edited pixels higher, which inflates the probability. This undoes it.
        spots.append(Spot(row, column, radius, peak / (peak + EDIT_WEIGHT * (1 - peak))))
    return spots


@jax.jit
def _probability(params: Any, window: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(SpotDetector().apply(params, to_float(window[None])))[0]


def _probability_map(params: Any, image: np.ndarray) -> np.ndarray:
    """`uint8[h, w, 3]` → `float32[⌈h/2⌉, ⌈w/2⌉]`, computed window by window so that memory stays bounded."""
    height, width = image.shape[:2]
    tile = min(TILE, -(-max(height, width) // TILE_STEP) * TILE_STEP)
    rows, columns = -(-height // tile), -(-width // tile)
    margins = ((HALO, HALO + rows * tile - height), (HALO, HALO + columns * tile - width), (0, 0))
    padded = np.pad(image, margins, mode="symmetric")
    out = np.empty((rows * tile // 2, columns * tile // 2), np.float32)
    inside = slice(HALO // 2, (HALO + tile) // 2)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            window = padded[top : top + tile + 2 * HALO, left : left + tile + 2 * HALO]
            out[top // 2 : (top + tile) // 2, left // 2 : (left + tile) // 2] = _probability(params, window)[inside, inside]
    return out[: -(-height // 2), : -(-width // 2)]


def _pad_to(image: np.ndarray, side: int) -> np.ndarray:
    """Mirrors an image at the bottom and right where it is smaller than `side`."""
    missing = [max(0, side - size) for size in image.shape[:2]]
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric") if any(missing) else image
