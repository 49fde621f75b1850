"""Convolutions in the form that is fastest where they run."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from autoretouch_jax.models import forms, kernel_gradient, winograd

NAME = "convolution"  # of the results, for rematerialisation


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> jax.Array:
    """The convolution of `[N, H, W, C]` with `[k, k', C, C']`. `padding` is SAME, VALID, or the zeros on each side.

    On a CPU it is Winograd's (`winograd.py`), or the plain one with the gradient of `kernel_gradient.py`.
    """
    if not forms.of_cpu(x) or kernel.shape[:2] == (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=kernel_gradient.NUMBERS)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    margins = (int(top), int(bottom)), (int(left), int(right))
    if winograd.suits(x, kernel, strides, margins):
        return checkpoint_name(winograd.convolve(x, kernel, margins), NAME)
    return checkpoint_name(kernel_gradient.convolve(x, kernel, tuple(strides), margins), NAME)
