"""Inconsistent labels: spots left in a target that look like spots removed elsewhere.

A small network learns from all pairs at once where an edit is wanted: from sources (there, where source and target differ) and
from targets (nowhere). What it still wants to edit in a *target* is a spot that retouchers of other pairs remove. It is too
small to learn a pair's own omissions by heart, and by seeing every face it learns which marks are that face's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from skimage.measure import label, regionprops
from tqdm import tqdm

FEWEST_PAIRS = 12  # fewer do not show what is usual
MOST_LEARNED = 300  # pairs that are learned from
CROP, CROPS, BATCH, STEPS = 96, 10, 16, 600
LEARNING_RATE, BIASES_LEARNING_RATE = 0.03, 5e-3  # Muon's for kernels (half as good with Adam), Adam's for the rest
RARE = 5.0  # how many times an edited pixel counts: they are few
WIDTH = 24
TILE, TILE_STEP, HALO = 512, 64, 32  # windows are at most TILE + 2 HALO wide; in steps, so that few shapes are compiled
EDITED = 6  # levels from which a change is an edit to be learned
WANTED = 0.5  # what the network says from which pixels make a spot
SMALLEST = 3  # pixels of half resolution that make one
SURE = 6  # power of a spot's probability by which it counts: two doubtful ones weigh less than a sure one
PRIOR = 0.5  # spots added to those found, so that one alone says little
INCONSISTENT = 0.3  # share of the spots left from which a pair is accused; see benchmarks/README.md for what it was fixed on

Pair = tuple[np.ndarray, np.ndarray]  # source and target, uint8[h, w, 3]
Spot = tuple[float, float, float, float]  # row, column, radius in pixels, probability that its like is removed
Finding = dict[str, Any]  # "score", "left", "removed", "spots": [(row, column, radius)]


class Wanted(nn.Module):
    """`float32[N, H, W, 3]` in [-1, 1] → `logits[N, H/2, W/2]`: is an edit wanted here? Sees 51 pixels."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """See the class."""
        n, height, width, _ = image.shape
        around = jnp.pad(image, ((0, 0), (7, 7), (7, 7), (0, 0)), mode="edge")
        image = 4 * (image - nn.avg_pool(around, (15, 15), padding="VALID"))  # contrast, not complexion
        x = (
            image.reshape(n, height // 2, 2, width // 2, 2, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(n, height // 2, width // 2, 12)
        )
        for dilation in (1, 1, 2, 4):
            x = nn.relu(nn.Conv(WIDTH, (3, 3), kernel_dilation=dilation)(x))
        return nn.Conv(1, (1, 1), bias_init=nn.initializers.constant(-3.0))(x)[..., 0]


def find(names: Sequence[str], read: Callable[[str], Pair]) -> dict[str, Finding]:
    """For each pair the share of its spots that were left, and where they are. With too few pairs, nothing.

    Every spot counts by how surely its like is removed elsewhere. Skin has marks that nobody removes: what is left in the
    median pair is taken off everywhere.
    """
    if len(names) < FEWEST_PAIRS:
        return {}
    spots: dict[str, tuple[list[Spot], list[Spot]]] = {}
    learned = [names[i] for i in np.random.default_rng(0).permutation(len(names))[:MOST_LEARNED]]
    params = _learn(learned, read)
    for name in tqdm(names, desc="looking for spots that were left", unit="pair", disable=None):
        spots[name] = _judge(params, *read(name))
    usual = float(np.median([_count(left) for _, left in spots.values()]))
    return {name: _finding(removed, left, usual) for name, (removed, left) in spots.items()}


def _count(spots: Sequence[Spot]) -> float:
    return sum(spot[3] ** SURE for spot in spots)


def _finding(removed: Sequence[Spot], left: Sequence[Spot], usual: float) -> Finding:
    unusual = max(0.0, _count(left) - usual)
    sure = [spot[:3] for spot in left if spot[3] > 0.5]
    return {
        "score": unusual / (unusual + _count(removed) + PRIOR),
        "left": len(sure),
        "removed": sum(spot[3] > 0.5 for spot in removed),
        "spots": sure,
    }


def _crops(names: Sequence[str], read: Callable[[str], Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Crops of sources and targets, `uint8[N, 96, 96, 3]`, and where to edit them, `bool[N, 48, 48]`."""
    rng = np.random.default_rng(1)
    images, masks = [], []
    for name in names:
        source, target = (_padded(image, CROP) for image in read(name))
        edit = np.abs(source.astype(np.int16) - target).max(-1) >= EDITED
        places = np.flatnonzero(edit)
        height, width = edit.shape
        for number in range(CROPS):
            row, column = divmod(int(rng.choice(places)), width) if places.size and number % 2 else (
                int(rng.integers(height)), int(rng.integers(width)))  # fmt: skip
            top = min(max(row - int(rng.integers(CROP)), 0), height - CROP)
            left = min(max(column - int(rng.integers(CROP)), 0), width - CROP)
            place = np.s_[top : top + CROP, left : left + CROP]
            images += [source[place], target[place]]
            wanted = edit[place].reshape(CROP // 2, 2, CROP // 2, 2).any((1, 3))
            masks += [wanted, np.zeros_like(wanted)]
    return np.stack(images), np.stack(masks)


def _learn(names: Sequence[str], read: Callable[[str], Pair]) -> Any:
    images, masks = _crops(names, read)
    rng = np.random.default_rng(0)
    params = jax.jit(Wanted().init)(jax.random.key(0, impl="rbg"), np.zeros((1, CROP, CROP, 3), np.float32))
    optimizer = muon(
        optax.cosine_decay_schedule(LEARNING_RATE, STEPS),
        adam_learning_rate=BIASES_LEARNING_RATE,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda x: MuonDimensionNumbers((0, 1, 2), 3) if x.ndim == 4 else None, params
        ),
    )

    @jax.jit
    def step(params: Any, state: Any, image: jax.Array, mask: jax.Array):
        def loss(params: Any) -> jax.Array:
            logits = Wanted().apply(params, image.astype(jnp.float32) / 127.5 - 1)
            losses = optax.sigmoid_binary_cross_entropy(logits, mask.astype(jnp.float32))
            return (losses * jnp.where(mask, RARE, 1.0)).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in tqdm(range(STEPS), desc="learning what is usually removed", unit="step", disable=None):
        chosen = rng.integers(len(images), size=BATCH)
        flip, turn = rng.random() < 0.5, int(rng.integers(4))
        batch, wanted = (np.rot90(array[chosen], turn, (1, 2)) for array in (images, masks))
        batch, wanted = (array[:, :, ::-1] if flip else array for array in (batch, wanted))
        params, state = step(params, state, np.ascontiguousarray(batch), np.ascontiguousarray(wanted))
    return params


def _judge(params: Any, source: np.ndarray, target: np.ndarray) -> tuple[list[Spot], list[Spot]]:
    """Spots wanted in the source that were removed, and spots wanted in the target: those that were left."""
    edit = np.abs(source.astype(np.int16) - target).max(-1) >= EDITED
    before, after = (_spots(params, image) for image in (source, target))
    removed = [spot for spot in before if edit[_around(spot, edit.shape)].any()]
    return removed, [spot for spot in after if not edit[_around(spot, edit.shape)].any()]


def _around(spot: Spot, shape: tuple[int, ...]) -> tuple[slice, slice]:
    row, column, radius, _ = spot
    ranges = [(max(0, int(centre - radius)), int(centre + radius) + 1) for centre in (row, column)]
    return slice(*ranges[0]), slice(*ranges[1])


def _spots(params: Any, image: np.ndarray) -> list[Spot]:
    """What is wanted to be edited."""
    wanted = _wanted(params, image)
    spots = []
    for region in regionprops(label(wanted > WANTED), wanted):
        if region.area >= SMALLEST:
            row, column = (2 * centre + 0.5 for centre in region.centroid)
            says = float(region.intensity_max)
            spots.append((row, column, max(2.0, float(np.sqrt(4 * region.area / np.pi))), says / (says + RARE * (1 - says))))
    return spots


@jax.jit
def _probability(params: Any, window: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(Wanted().apply(params, window[None].astype(jnp.float32) / 127.5 - 1))[0]


def _wanted(params: Any, image: np.ndarray) -> np.ndarray:
    """`uint8[h, w, 3]` → `float32[⌈h/2⌉, ⌈w/2⌉]`, window by window."""
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
            found = _probability(params, window)[inside, inside]
            out[top // 2 : (top + tile) // 2, left // 2 : (left + tile) // 2] = found
    return out[: -(-height // 2), : -(-width // 2)]


def _padded(image: np.ndarray, side: int) -> np.ndarray:
    missing = [max(0, side - size) for size in image.shape[:2]]
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric") if any(missing) else image
