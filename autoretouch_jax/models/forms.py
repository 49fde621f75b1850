"""Which form an operation takes: the plain one, or one that is faster on a CPU, and equal to it but for rounding.

GPUs and TPUs multiply faster than they move memory, so there the plain forms stay.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from autoretouch_jax.runtime import devices

_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """What is traced inside has only plain forms: for other devices than this process runs on, and to count FLOPs."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def of_cpu(x: jax.Array) -> bool:
    """Whether an operation on this array may take a form for CPUs."""
    # Exported programs have sides without a number.
    known = all(isinstance(side, int) for side in x.shape)
    return not _plain.get() and devices.on_cpu() and known and x.dtype == jnp.float32
