"""Functions whose operations XLA keeps together, instead of inlining them among all others of a program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.scheduling_groups import xla_metadata_call


def apart(function: Callable[..., jax.Array], **fixed: Any) -> Callable[..., jax.Array]:
    """Returns a function with some arguments fixed, whose operations are a computation of their own.

    Otherwise XLA's schedule for a CPU begins several convolutions before it has ended one, and holds the unfolded pixels of all
    of them. And when XLA reads a compiled program, it compares each operation with each other of the same computation.
    """
    return xla_metadata_call(functools.partial(function, **fixed), inlineable="false")
