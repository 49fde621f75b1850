"""Our recommended generator: it predicts an edit of the untouched input, and a mask of where to make it.

Each part answers a weakness of the published networks:

* `source + edit` cannot lose what it does not touch. The published tanh head must first learn to copy.
* The mask is supervised by where source and target differ. At inference it decides which pixels come back bit-identical.
* Blocks without norm behave the same in training and in use.
* The low-resolution levels see a whole cheek at little cost.

Images are float32 `[N, H, W, 3]` in [-1, 1], H and W multiples of `2 ** levels`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import networks
from autoretouch_jax.models.layers import (
    Conv,
    Remat,
    contrast_init,
    depth_to_space,
    leaky,
    rematerialised,
    space_to_depth,
    upsample_nearest,
)
from autoretouch_jax.models.outputs import GeneratorOutput

MASK_PRIOR = -2.0  # logit of the untrained mask, a probability of 12 %: most skin needs no edit


class Block(nn.Module):
    """`x + conv(act(conv(act(x))))`. The second convolution starts at zero (Fixup, Zhang et al. 2019)."""

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Conv(self.channels, (3, 3), dtype=self.dtype, name="first")(leaky(x))
        y = Conv(self.channels, (3, 3), dtype=self.dtype, name="second", kernel_init=nn.initializers.zeros)(leaky(y))
        return x + y


class RetouchGenerator(nn.Module):
    """A U of residual blocks from half resolution down, with heads for the edit and its mask at full resolution.

    `image = source + edit`, not clipped. The edit starts at zero, so that the untrained network is the identity.
    """

    config: networks.Retouch
    dtype: Any = jnp.float32
    axis: str | None = None  # unused: nothing here normalises over the batch
    remat: Remat = "none"

    @nn.compact
    def __call__(self, source: jax.Array, train: bool = False) -> GeneratorOutput:
        config, dtype, block = self.config, self.dtype, rematerialised(Block, self.remat)
        widths = [config.width * min(config.widest, 2**level) for level in range(config.levels)]
        # Pixels are folded into channels, so that no convolution runs at full resolution.
        x = space_to_depth(source.astype(dtype))
        x = Conv(widths[0], (3, 3), dtype=dtype, name="stem", kernel_init=contrast_init)(x)
        skips = []
        for level, width in enumerate(widths):
            if level:
                skips.append(x)
                x = Conv(width, (2, 2), (2, 2), dtype=dtype, name=f"down{level}")(x)
            for i in range(config.blocks):
                x = block(width, dtype, name=f"down{level}_block{i}")(x)
        for level in reversed(range(config.levels - 1)):
            x = upsample_nearest(Conv(widths[level], (1, 1), dtype=dtype, name=f"up{level}")(x)) + skips[level]
            for i in range(config.blocks):
                x = block(widths[level], dtype, name=f"up{level}_block{i}")(x)
        x = leaky(x)
        edit = Conv(12, (3, 3), dtype=dtype, name="edit", kernel_init=nn.initializers.zeros)(x)
        bias = nn.initializers.constant(MASK_PRIOR)
        mask = Conv(4, (3, 3), dtype=dtype, name="mask", kernel_init=nn.initializers.zeros, bias_init=bias)(x)
        # The input is added in float32: in bfloat16 the untouched pixels would be rounded.
        image = source + depth_to_space(edit).astype(jnp.float32)
        return GeneratorOutput(image, depth_to_space(mask).astype(jnp.float32))
