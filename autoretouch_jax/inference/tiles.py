"""Runs a generator on an image of any size, in tiles of one shape. Images are uint8 `[H, W, 3]`, RGB.

The image lies on a canvas whose sides are multiples of the network's grid, see `canvas_step`. To the right of the image and
below it, the canvas shows its mirror up to the next multiple. There is no mirror all around: networks are trained on crops that
end as the canvas does, and with a mirror of 16 to 224 pixels the model in the box came no nearer to what it gives where the
photograph goes on. A tile gives what the whole canvas gives, up to float32's rounding, because it

* starts at a multiple of the grid, so that the strides fall on the same pixels,
* has a halo of the receptive radius where it ends inside the canvas,
* and elsewhere ends where the canvas ends: the network then sees the same zeros beyond as it does around the whole canvas.
"""

import functools
import itertools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from autoretouch_jax.config.networks import Generator
from autoretouch_jax.models.folder import Model
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.models.outputs import generator_output
from autoretouch_jax.models.pixels import to_float, to_uint8
from autoretouch_jax.runtime import devices

WASTE = 1.3  # how many times the image's pixels may be computed, halos and all
LARGEST_ARRAY = 1 << 26  # float32 values of the largest array inside the network, 256 MiB, where WASTE permits tiles so small
CANVAS_STEP = 64  # the sides of canvases and tiles are multiples of this, in pixels, so that few shapes are compiled
SMALLEST_TILE = 256  # pixels along an axis that is cut

Area = tuple[slice, slice]  # rows and columns


# ---- the plan ---------------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """How one axis is cut, in pixels, all of them multiples of the grid."""

    canvas: int
    tile: int
    halo: int

    @property
    def starts(self) -> list[int]:
        """Where each tile starts. The last one is shifted inwards, so that it ends where the canvas ends."""
        last = self.canvas - self.tile
        return [*range(0, last, self.tile - 2 * self.halo), last] if last else [0]

    @property
    def tiles(self) -> int:
        """The number of tiles along the axis."""
        last = self.canvas - self.tile
        return 1 - -last // (self.tile - 2 * self.halo) if last else 1

    def valid(self, start: int) -> slice:
        """The part of the canvas for which the tile at `start` is right: all of it but its halos."""
        before = self.halo if start else 0
        after = self.halo if start + self.tile < self.canvas else 0
        return slice(start + before, start + self.tile - after)


class Plan(NamedTuple):
    """How an image is cut into tiles of one shape."""

    rows: Axis
    columns: Axis

    @property
    def tile(self) -> int:
        """Pixels of a tile, with its halos."""
        return self.rows.tile * self.columns.tile

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return self.rows.tiles * self.columns.tiles

    @property
    def computed(self) -> int:
        """Pixels that are computed, with all halos and with what the canvas adds to the image."""
        return self.tiles * self.tile


def plan_tiles(height: int, width: int, step: int, radius: int | None, largest: int, at_once: int = 1) -> Plan:
    """Returns the plan that takes the least time for an image of `height` × `width` pixels.

    The canvas has sides that are multiples of `step`, and so of the grid. `radius` is the network's `receptive_radius`, or None
    for a network that sees the whole image, which gets one tile. `at_once` is the number of devices, each with a tile.

    * At most `WASTE` times the image's pixels are computed. The exception are strips so narrow that their canvas alone is more
      than that, such as those of less than 3.4 × `step`: there it is at most `WASTE` times the canvas.
    * A tile has at most `largest` pixels. Where `WASTE` does not permit tiles so small, they are as small as it permits: for a
      radius of 224, 14 megapixels or less, however large the image is.

    All sizes are in pixels. Only as many tiles as there are count as computed: where the last ones are fewer than the devices,
    the other devices repeat one.
    """
    whole = Plan(*(Axis(_round_up(side, step), _round_up(side, step), radius or 0) for side in (height, width)))
    if radius is None:
        return whole
    area = height * width
    allowed = WASTE * (area if whole.computed <= WASTE * area else whole.computed)
    ways = itertools.product(*(_ways_to_cut(axis, step) for axis in whole))
    plans = [plan for plan in itertools.starmap(Plan, ways) if plan.computed <= allowed]
    small = [plan for plan in plans if plan.tile <= largest]
    if not small:
        return min(plans, key=lambda plan: (plan.tile, plan.computed))
    # The number of turns, in each of which every device computes a tile, times the time of one.
    return min(small, key=lambda plan: (-(-plan.tiles // at_once) * plan.tile, plan.tile))


def _ways_to_cut(axis: Axis, step: int) -> Iterator[Axis]:
    """Yields the axis in one tile, and in each number of tiles that could stay within `WASTE`."""
    yield axis
    canvas, halo = axis.canvas, axis.halo
    # n tiles have 2 (n - 1) halos.
    most = min(canvas // SMALLEST_TILE, 1 + int((WASTE - 1) * canvas / max(1, 2 * halo)))
    for count in range(2, most + 1):
        tile = _round_up(-(-(canvas + 2 * halo * (count - 1)) // count), step)
        if tile < canvas:
            yield Axis(canvas, tile, halo)


def _round_up(side: int, step: int) -> int:
    return -(-side // step) * step


def canvas_step(config: Generator) -> int:
    """Returns what the sides of the canvas are multiples of when a whole image is computed, in pixels."""
    # A network that sees the whole image sees all of the mirror too: for it, the canvas is as small as the grid permits.
    return config.grid if config.receptive_radius is None else max(config.grid, CANVAS_STEP)


def plan_for(config: Generator, size: tuple[int, ...], step: int = 1) -> Plan:
    """Returns the plan of an image of this size, `(H, W, …)`, on the devices of this process.

    The canvas' sides are multiples of `step` too. The result is the same only for one canvas.
    """
    radius = config.receptive_radius
    largest = 0 if radius is None else largest_tile(config)
    return plan_tiles(size[0], size[1], max(step, canvas_step(config)), radius, largest, devices.local_devices())


@functools.lru_cache
def largest_tile(config: Generator) -> int:
    """Returns the pixels of a tile in which the network's largest array has `LARGEST_ARRAY` values."""
    module, side = make_generator(config), max(256, 4 * config.grid)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    equations = jax.make_jaxpr(module.apply)(variables, image).eqns
    values = max(variable.aval.size for equation in equations for variable in equation.outvars)
    return int(LARGEST_ARRAY * side * side // values)


# ---- the network ------------------------------------------------------------------------------------------------------------


def network_output(model: Model, image: np.ndarray, plan: Plan | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the network's own 8-bit output, before gate and dead zone, and its mask, float32 `[H, W]` in [0, 1], or None.

    `plan` is by default that of `plan_for`. How the canvas is cut does not show in the result. Several threads may call this
    with one model.
    """
    plan = plan or plan_for(model.config, image.shape)
    output, mask = np.empty_like(image), None
    for (top, left), (patch, patch_mask) in _on_all_devices(model, image, plan):
        rows, columns = plan.rows.valid(top), plan.columns.valid(left)
        # What lies beyond the image is dropped.
        height, width = output[rows, columns].shape[:2]
        inside = np.s_[rows.start - top :, columns.start - left :]
        output[rows, columns] = patch[inside][:height, :width]
        if patch_mask is not None:
            mask = np.empty(image.shape[:2], np.float32) if mask is None else mask
            mask[rows, columns] = patch_mask[inside][:height, :width]
    return output, mask


# Compiled once for each network and shape of a tile.
@functools.partial(jax.jit, static_argnums=0)
def _apply(config: Generator, variables: dict, tiles: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    module, images = make_generator(config), to_float(tiles)
    if config.test_mode == "train":
        # The same key for every photograph, so that a photograph comes out the same each time.
        rngs = {"dropout": jax.random.key(0)}
        output = generator_output(module.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0])
    else:
        output = generator_output(module.apply(variables, images))
    mask = None if output.mask_logits is None else jax.nn.sigmoid(output.mask_logits[..., 0])
    return to_uint8(output.image), mask


# One thread computes at a time: two would need twice the memory, and one keeps the devices busy.
_turn = threading.Lock()

Corner = tuple[int, int]  # a tile's first row and first column on the canvas


def _on_all_devices(
    model: Model, image: np.ndarray, plan: Plan
) -> Iterator[tuple[Corner, tuple[np.ndarray, np.ndarray | None]]]:
    """Yields each tile's corner, and the network's output and mask there. Each device computes one tile at a time."""
    corners = list(itertools.product(plan.rows.starts, plan.columns.starts))
    at_once = min(len(corners), devices.local_devices())
    variables = model.on_devices(at_once)
    for first in range(0, len(corners), at_once):
        group = corners[first : first + at_once]
        # The last group is filled up, because another number of tiles would be compiled again.
        filled = [*group, *[group[-1]] * (at_once - len(group))]
        tiles = np.stack([_tile(image, plan, corner) for corner in filled])
        with _turn:
            patches, masks = jax.device_get(_apply(model.config, variables, devices.spread_over_local_devices(tiles)))
        for i, corner in enumerate(group):
            yield corner, (patches[i], None if masks is None else masks[i])


def _tile(image: np.ndarray, plan: Plan, corner: Corner) -> np.ndarray:
    """Cuts a tile out of the canvas."""
    rows, columns = (
        _mirrored(start, start + axis.tile, side) for start, axis, side in zip(corner, plan, image.shape, strict=False)
    )
    return image[rows[:, None], columns]


def _mirrored(start: int, stop: int, side: int) -> np.ndarray:
    """Returns which pixel of a side the canvas shows at `start` … `stop`: beyond the image its mirror, again and again."""
    # A mirror and no zeros: the image must not end in an edge that the network would take for a part of it.
    period = max(1, 2 * side - 2)
    positions = np.arange(start, stop) % period
    return np.minimum(positions, period - positions)
