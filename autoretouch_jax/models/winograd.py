"""3×3 convolutions on a CPU with 2.25 times fewer multiplications: Winograd's F(2×2, 3×3) (Lavin and Gray 2016, section 4.1).

Every 4×4 pixels of the input give 2×2 of the output. Input and kernel are transformed by sums and halves of their values, the
channels are then summed by 16 matrix products instead of 36, and the result is transformed back. The sums are the same but for
their order. Larger tiles would save more, but lose digits: F(4×4, 3×3) has ten times the rounding error.

Arrays are float32 `[N, H, W, C]`, kernels `[3, 3, C, C']`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoretouch_jax.models.apart import apart

SMALLEST_CHANNELS = 32  # of input and output; fewer were not measured
LARGEST_BAND = 2**26  # bytes of transformed pixels that are held at a time
FEWEST_TILES = 128  # of an array; with half of them the gain was within the noise

# The matrices of Lavin and Gray's equation 7, but for two signs that cancel: every row of `INPUT` and `OUTPUT`ᵀ has a 1.
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, 1))
KERNEL_PLACES = np.kron(KERNEL, KERNEL).astype(np.float32)  # [16, 9]: what `KERNEL` does to rows and columns at once

Grid = Sequence[Sequence[jax.Array]]  # arrays in rows and columns, one for each place within a tile
Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right


def suits(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding) -> bool:
    """Whether `convolve` can compute this convolution, and pays."""
    if kernel.shape[:2] != (3, 3) or {*strides} != {1} or not {*sum(padding, ())} <= {0, 1, 2}:
        return False
    return min(kernel.shape[2:]) >= SMALLEST_CHANNELS and x.size // x.shape[3] // 4 >= FEWEST_TILES


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """The convolution of an image and a kernel. It has no forward-mode derivative."""
    return _sums(x, kernel, padding)


# Jitted, so that JAX traces each shape once, and not once for each of a network's many layers.
@functools.partial(jax.jit, static_argnums=2)
def _sums(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    return apart(_convolve_bands, padding=padding)(x, kernel)


def _convolve_bands(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    kernels = _stored(_transformed_kernel(kernel))
    cut = _Bands(x, padding)

    def convolve_band(x: jax.Array) -> jax.Array:
        inputs = _stored(_transform(INPUT, _tiles(x, 4)))
        products = [[_product(a, b) for a, b in zip(*row, strict=True)] for row in zip(inputs, kernels, strict=True)]
        places = _transform(OUTPUT, _stored(products))
        # The four places of a tile, side by side.
        out = jnp.stack([jnp.stack(row, axis=3) for row in places], axis=2)  # [N, h, 2, w, 2, C]
        n, h, _, w, _, c = out.shape
        return out.reshape(n, 2 * h, 2 * w, c)

    bands = cut.of_input(x)
    out = convolve_band(bands[0])[None] if len(bands) == 1 else jax.lax.map(convolve_band, bands)
    return cut.joined(out)


def _forward(x: jax.Array, kernel: jax.Array, padding: Padding) -> Any:
    return convolve(x, kernel, padding), (x, kernel)


@functools.partial(jax.jit, static_argnums=0)
def _backward(padding: Padding, kept: Any, gradient: jax.Array) -> Any:
    x, kernel = kept
    # By the input: a convolution with the kernel turned by half a turn, over all that an input pixel reached.
    (top, bottom), (left, right) = padding
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    by_input = convolve(gradient, turned, ((2 - top, 2 - bottom), (2 - left, 2 - right)))
    return by_input, apart(_by_kernel, padding=padding)(x, gradient)


def _by_kernel(x: jax.Array, gradient: jax.Array, padding: Padding) -> jax.Array:
    """Returns the gradient by the kernel: the transforms in reverse."""
    cut = _Bands(x, padding)

    def by_kernel_of_band(x: jax.Array, gradient: jax.Array) -> Any:
        inputs = _stored(_transform(INPUT, _tiles(x, 4)))
        outputs = _stored(_transform(_transposed(OUTPUT), _tiles(gradient, 2)))
        pairs = zip(inputs, outputs, strict=True)
        return [[_product_over_tiles(a, b) for a, b in zip(*row, strict=True)] for row in pairs]

    bands = cut.of_input(x), cut.of_output(gradient)
    if len(bands[0]) == 1:
        products = by_kernel_of_band(bands[0][0], bands[1][0])
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(by_kernel_of_band, *(b[0] for b in bands)))
        add = lambda total, band: (jax.tree.map(jnp.add, total, by_kernel_of_band(*band)), None)  # noqa: E731
        products, _ = jax.lax.scan(add, zeros, bands)
    return _transformed_back(products)


convolve.defvjp(_forward, _backward)


class _Bands:
    """Cuts a convolution into bands of rows, so that what is transformed, four times its input, does not fill the memory.

    A small batch is one band, `[1, N, …]`. Else there are one or more for each image, `[N × bands, 1, …]`, one after another.
    That is slower: within a loop XLA computes the transforms in one thread.
    """

    def __init__(self, x: jax.Array, padding: Padding) -> None:
        n, height, width, channels = x.shape
        self.padding = padding
        self.height, self.width = (size + sum(margin) - 2 for size, margin in zip((height, width), padding, strict=True))
        rows, columns = -(-self.height // 2), -(-self.width // 2)  # of tiles
        transformed = 16 * rows * columns * channels * x.dtype.itemsize  # bytes of an image's
        self.whole = n * transformed <= LARGEST_BAND
        self.count = 1 if self.whole else min(rows, -(-transformed // LARGEST_BAND))
        self.rows = -(-rows // self.count)
        # Zeros below and to the right, up to whole tiles and bands.
        self.missing = (2 * self.rows * self.count - self.height, 2 * columns - self.width)

    def of_input(self, x: jax.Array) -> jax.Array:
        """Returns the bands of the convolution's input. Each has two rows of the next one."""
        margins = [(before, after + more) for (before, after), more in zip(self.padding, self.missing, strict=True)]
        x = jnp.pad(x, ((0, 0), *margins, (0, 0)))
        if self.whole:
            return x[None]
        bands = [x[:, i * 2 * self.rows : (i + 1) * 2 * self.rows + 2] for i in range(self.count)]
        return jnp.stack(bands, axis=1).reshape(-1, 1, *bands[0].shape[1:])

    def of_output(self, gradient: jax.Array) -> jax.Array:
        """Returns the bands of an array of the output's shape."""
        gradient = jnp.pad(gradient, ((0, 0), *((0, more) for more in self.missing), (0, 0)))
        if self.whole:
            return gradient[None]
        return gradient.reshape(-1, 1, 2 * self.rows, *gradient.shape[2:])

    def joined(self, bands: jax.Array) -> jax.Array:
        """The inverse of `of_output`."""
        out = bands[0] if self.whole else bands.reshape(-1, 2 * self.rows * self.count, *bands.shape[3:])
        return out[:, : self.height, : self.width]


def _tiles(x: jax.Array, size: int) -> Grid:
    """Returns the pixels at each place within the tiles of `size` × `size`, which begin at every second pixel."""
    n, h, w, c = x.shape

    def place(row: int, column: int) -> jax.Array:
        return jax.lax.slice(x, (0, row, column, 0), (n, h - size + row + 1, w - size + column + 1, c), (1, 2, 2, 1))

    return [[place(row, column) for column in range(size)] for row in range(size)]


def _transform(matrix: Sequence[Sequence[float]], grid: Grid) -> Grid:
    """Returns `matrix @ grid @ matrixᵀ`."""
    columns = [_combinations(matrix, column) for column in zip(*grid, strict=True)]
    return [_combinations(matrix, row) for row in zip(*columns, strict=True)]


def _transformed_kernel(kernel: jax.Array) -> Grid:
    """`_transform(KERNEL, …)` of a kernel, as one product: written out, it would be a sixth of the program's instructions."""
    places = jnp.matmul(KERNEL_PLACES, kernel.reshape(9, -1)).reshape(4, 4, *kernel.shape[2:])
    return [[places[row, column] for column in range(4)] for row in range(4)]


def _transformed_back(products: Grid) -> jax.Array:
    """The transpose of `_transformed_kernel`: 16 arrays `[C, C']` → `[3, 3, C, C']`."""
    places = jnp.stack([place for row in products for place in row])
    return jnp.matmul(KERNEL_PLACES.T, places.reshape(16, -1)).reshape(3, 3, *places.shape[1:])


def _stored(grid: Grid) -> Grid:
    """Keeps XLA from computing the arrays again for every reader, and in shapes whose loops it cannot vectorise."""
    return jax.lax.optimization_barrier(grid)


def _combinations(matrix: Sequence[Sequence[float]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix @ arrays`, for factors of 0, 1 and -1, of which a row has a 1. Nothing is multiplied."""
    combinations = []
    for factors in matrix:
        added, subtracted = ([x for x, factor in zip(arrays, factors, strict=True) if factor == sign] for sign in (1, -1))
        combinations.append(functools.reduce(jnp.subtract, subtracted, functools.reduce(jnp.add, added)))
    return combinations


def _transposed(matrix: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*matrix, strict=True))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[N, h, w, C]` × `[C, C']` → `[N, h, w, C']`, as one product of matrices."""
    return (a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[-1])


def _product_over_tiles(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[N, h, w, C]` × `[N, h, w, C']` → `[C, C']`."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])
