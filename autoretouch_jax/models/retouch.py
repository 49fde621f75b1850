"""Our recommended generator: an edit of the untouched input, and where to make it.

What its parts answer: `source + edit` cannot lose what it does not touch (the published tanh head must first learn to copy);
the mask, supervised from where source and target differ, decides at inference which pixels come back bit-identical; norm-free
blocks behave alike in training and use; the low-resolution levels see a cheek for the price of a pore.
Images are float32 `[N, H, W, 3]` in [-1, 1], H and W multiples of `2 ** levels`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax import architecture
from autoretouch_jax.models.layers import (
    Remat,
    contrast_init,
    depth_to_space,
    leaky,
    rematerialised,
    space_to_depth,
    upsample_nearest,
)

MASK_PRIOR = -2.0  # the untrained mask says 12 %: most skin needs nothing


class Retouched(NamedTuple):
    """The image, float32 `[N, H, W, 3]`, and the logits of each pixel's need for an edit, `[N, H, W, 1]`, where predicted."""

    image: jax.Array
    mask_logits: jax.Array | None


class Block(nn.Module):
    """`x + conv(act(conv(act(x))))`; the second convolution starts at zero (Fixup, Zhang et al. 2019)."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="first")(leaky(x))
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="second", kernel_init=nn.initializers.zeros)(leaky(y))
        return x + y


class RetouchGenerator(nn.Module):
    """A U of residual blocks from half resolution down; heads for the edit and its mask at full resolution.

    `image = source + edit`, not clipped; the edit starts at zero, so that the untrained network is the identity.
    """

    config: architecture.Retouch
    dtype: Any = jnp.float32
    axis: str | None = None  # nothing here normalises over the batch
    remat: Remat = "none"

    @nn.compact
    def __call__(self, source: jax.Array, train: bool = False) -> Retouched:
        config, dtype, block = self.config, self.dtype, rematerialised(Block, self.remat)
        widths = [config.width * min(config.widest, 2**level) for level in range(config.levels)]
        x = space_to_depth(source.astype(dtype))
        x = nn.Conv(widths[0], (3, 3), dtype=dtype, name="stem", kernel_init=contrast_init)(x)
        skips = []
        for level, width in enumerate(widths):
            if level:
                skips.append(x)
                x = nn.Conv(width, (2, 2), (2, 2), dtype=dtype, name=f"down{level}")(x)
            for i in range(config.blocks):
                x = block(width, dtype, name=f"down{level}_block{i}")(x)
        for level in reversed(range(config.levels - 1)):
            x = upsample_nearest(nn.Conv(widths[level], (1, 1), dtype=dtype, name=f"up{level}")(x)) + skips[level]
            for i in range(config.blocks):
                x = block(widths[level], dtype, name=f"up{level}_block{i}")(x)
        x = leaky(x)
        edit = nn.Conv(12, (3, 3), dtype=dtype, name="edit", kernel_init=nn.initializers.zeros)(x)
        bias = nn.initializers.constant(MASK_PRIOR)
        mask = nn.Conv(4, (3, 3), dtype=dtype, name="mask", kernel_init=nn.initializers.zeros, bias_init=bias)(x)
        image = source + depth_to_space(edit).astype(jnp.float32)
        return Retouched(image, depth_to_space(mask).astype(jnp.float32))


def receptive_radius(config: architecture.Retouch) -> int:
    """How far, in pixels, an output pixel sees: an upper bound and a multiple of `2 ** levels`, as tiles need."""
    radius = 1 + 2 * 2  # space to depth and back; stem and head, 3×3 at half resolution
    for level in range(config.levels):
        passes = 1 if level == config.levels - 1 else 2
        radius += 2 ** (level + 1) * (2 * config.blocks * passes + 1)  # + 1: the grid of the level's own downsampling
    grid = 2**config.levels
    return -(-radius // grid) * grid
