"""Plain convolutions on a CPU whose gradient by the kernel is a few products of matrices.

XLA computes that gradient as a convolution whose kernel is as large as the image. With few channels or with strides it takes up
to five times as long as these products, which are the same sums in another order.

Arrays are float32 `[N, H, W, C]`, kernels `[k, k', C, C']`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autoretouch_jax.models.apart import apart

LARGEST = 2**26  # bytes of patches that are held at a time, unless a single image has more
NUMBERS = ("NHWC", "HWIO", "NHWC")

Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right; negative: pixels cut off


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """The convolution of an image and a kernel. It has no forward-mode derivative."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NUMBERS)


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> Any:
    return convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides: tuple[int, int], padding: Padding, kept: Any, gradient: jax.Array) -> Any:
    x, kernel = kept
    by_input = jax.linear_transpose(lambda x: convolve.fun(x, kernel, strides, padding), x)(gradient)[0]
    sides = kernel.shape[:2]
    # What has fewer channels is unfolded. Without strides, images and gradients can change roles.
    if strides == (1, 1) and gradient.shape[3] < x.shape[3]:
        margins = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(sides, padding, strict=True))
        swapped = apart(_by_kernel, sides=sides, strides=strides, padding=margins)(gradient, x)
        return by_input, swapped[::-1, ::-1].swapaxes(2, 3)
    return by_input, apart(_by_kernel, sides=sides, strides=strides, padding=padding)(x, gradient)


convolve.defvjp(_forward, _backward)


def _by_kernel(
    x: jax.Array, gradient: jax.Array, sides: Sequence[int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Returns the sum over all places of the outer product of an image's patch with the gradient there, `[k, k', C, C']`."""
    margins = [(max(0, before), max(0, after)) for before, after in padding]
    cut = [slice(max(0, -before), size - max(0, -after)) for size, (before, after) in zip(x.shape[1:3], padding, strict=True)]
    x = jnp.pad(x[:, cut[0], cut[1]], ((0, 0), *margins, (0, 0)))
    images = functools.partial(_of_images, sides=sides, strides=strides)
    patches = x.nbytes * sides[1] // strides[1]
    if patches <= LARGEST or len(x) == 1:
        return images(x, gradient)
    # One image after another, so that the patches do not fill the memory.
    start = jnp.zeros((*sides, x.shape[3], gradient.shape[3]), x.dtype)
    add = lambda total, pair: (total + images(pair[0][None], pair[1][None]), None)  # noqa: E731
    return jax.lax.scan(add, start, (x, gradient))[0]


def _of_images(x: jax.Array, gradient: jax.Array, sides: Sequence[int], strides: tuple[int, int]) -> jax.Array:
    n, h, w, features = gradient.shape
    _, height, _, channels = x.shape

    def columns(start: int) -> jax.Array:
        end = start + strides[1] * (w - 1) + 1
        return jax.lax.slice(x, (0, 0, start, 0), (n, height, end, channels), (1, 1, strides[1], 1))

    # A row of the kernel at each place, side by side. The barrier keeps XLA from putting it together again for each row.
    rows = jax.lax.optimization_barrier(jnp.concatenate([columns(start) for start in range(sides[1])], axis=3))
    gradient = gradient.reshape(-1, features)

    def products(start: int) -> jax.Array:
        end = start + strides[0] * (h - 1) + 1
        row = jax.lax.slice(rows, (0, start, 0, 0), (n, end, w, rows.shape[3]), (1, strides[0], 1, 1))
        return row.reshape(-1, rows.shape[3]).T @ gradient

    return jnp.stack([products(start) for start in range(sides[0])]).reshape(*sides, channels, features)
