"""Chooses where crops are cut: more often around an edit, each with the weight that keeps the losses unbiased."""

import numpy as np

from autoretouch_jax.data.edits import edit_mask

CELL = 16  # side of the squares, in pixels, in which edits are counted

Box = tuple[int, int, int, int]  # top, left, height, width


def edit_map(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`uint8[h, w, 3]` twice → `uint8[⌈h / 16⌉, ⌈w / 16⌉]`: the share of edited pixels of each cell, in 1/255, rounded up."""
    changed = edit_mask(source, target)
    height, width = changed.shape
    changed = np.pad(changed, ((0, -height % CELL), (0, -width % CELL)))
    counts = changed.reshape(changed.shape[0] // CELL, CELL, -1, CELL).sum((1, 3))
    return np.ceil(counts * (255 / CELL**2)).astype(np.uint8)


def draw(
    rng: np.random.Generator, height: int, width: int, edits: np.ndarray, side: int, share: float, limit: float = 0.0
) -> tuple[int, int, float]:
    """Returns top and left of a square crop, and its weight.

    A share of the crops is placed around an edited cell, the rest anywhere. The weight is the density of the position under
    uniform drawing, divided by the density with which it was drawn (importance sampling). So weighted means over crops have the
    same expectation as means over crops drawn anywhere.

    A `limit` above 0 clips the weight to [1 / limit, limit]. Where that raises a weight w, the crop counts
    1 / (limit · w) times as much as among crops drawn anywhere: weighted means are biased towards edits.
    """
    places = (height - side + 1, width - side + 1)
    chances = np.sqrt(edits, dtype=np.float64)  # the root, so that small spots are drawn too
    total = chances.sum()
    # Without an edit every place is as good as any other.
    if share == 0 or total == 0:
        return int(rng.integers(places[0])), int(rng.integers(places[1])), 1.0
    chances /= total
    (low_y, high_y, centre_y), (low_x, high_x, centre_x) = (
        _reach(cells, size, side) for cells, size in zip(edits.shape, (height, width), strict=True)
    )
    # Draw a cell by its chance, then a position at which the crop holds the cell's centre.
    if rng.random() < share:
        row, column = divmod(int(np.searchsorted(chances.cumsum(), rng.random() * (1 - 1e-12), side="right")), edits.shape[1])
        row = min(row, edits.shape[0] - 1)
        top, left = int(rng.integers(low_y[row], high_y[row])), int(rng.integers(low_x[column], high_x[column]))
    else:
        top, left = int(rng.integers(places[0])), int(rng.integers(places[1]))
    # The density sums over all edited cells whose crops could have been this one.
    rows = (centre_y >= top) & (centre_y < top + side)
    columns = (centre_x >= left) & (centre_x < left + side)
    inside = chances[np.ix_(rows, columns)]
    density = ((inside / (high_y - low_y)[rows][:, None]) / (high_x - low_x)[columns]).sum()
    weight = 1.0 / (1 - share + share * float(density) * places[0] * places[1])
    return top, left, min(max(weight, 1 / limit), limit) if limit else weight


def _reach(cells: int, size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each cell along an axis, the first crop position that holds its centre, the end of these, and the centre."""
    centre = np.minimum(np.arange(cells) * CELL + CELL // 2, size - 1)
    return np.maximum(0, centre - side + 1), np.minimum(centre, size - side) + 1, centre
