"""8-bit levels and the values that networks see: uint8 in 0 … 255, float32 in [-1, 1]."""

import jax
import jax.numpy as jnp


def to_float(image: jax.Array) -> jax.Array:
    """uint8 → float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array) -> jax.Array:
    """float32 → uint8, values outside [-1, 1] clipped, rounded to the nearest level."""
    return jnp.rint((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)
