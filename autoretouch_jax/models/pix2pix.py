"""The U-Net generator of pix2pix (Isola et al., "Image-to-image translation with conditional adversarial networks", CVPR 2017).

Section 6.1.1 and the authors' PyTorch code. Images are float32 `[N, H, W, 3]` in [-1, 1], H and W multiples of `2 ** levels`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import networks
from autoretouch_jax.models.layers import BatchNorm, Remat, TransposedConv, conv, leaky

DROPOUT_FROM = 4  # first level with dropout; the last is the innermost but one: three levels in the U-Net-256


def batch_norm(axis: str | None, name: str) -> BatchNorm:
    """PyTorch's layer with its defaults, in Flax' sense of momentum. Scales start near 1, as in the authors' code."""
    return BatchNorm(momentum=0.9, epsilon=1e-5, unbiased=True, axis=axis, scale_init=_scale_init, name=name)


def _scale_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class UNetGenerator(nn.Module):
    """`levels` stride-2 convolutions down, as many transposed ones up, skips between them, and a tanh at the end.

    The authors' activations work in place, so that a skip carries the *activated* tensor; ours carries the same. The outermost
    and the innermost convolution have no BatchNorm, and only the last layer has a bias. The result is float32.
    """

    config: networks.Pix2Pix
    dtype: Any = jnp.float32
    axis: str | None = None  # the devices along it share BatchNorm's statistics
    remat: Remat = "none"  # unused: there are no residual blocks here

    @nn.compact
    def __call__(self, source: jax.Array, train: bool = False) -> jax.Array:
        config, dtype = self.config, self.dtype
        widths = [config.width * min(8, 2**level) for level in range(config.levels)]
        last = config.levels - 1

        def norm(x: jax.Array, name: str) -> jax.Array:
            if config.norm == "none":
                return x
            return batch_norm(self.axis, name)(x, train).astype(dtype)

        x = conv(widths[0], 4, 2, 1, dtype, "down0", bias=None)(source.astype(dtype))
        # The image itself is not activated before the first convolution, because that would flatten its dark half.
        skips = []
        for level in range(1, config.levels):
            x = leaky(x)
            skips.append(x)
            x = conv(widths[level], 4, 2, 1, dtype, f"down{level}", bias=None)(x)
            x = norm(x, f"down_norm{level}") if level < last else x
        for level in reversed(range(1, config.levels)):
            x = norm(TransposedConv(widths[level - 1], 4, dtype, bias=None, name=f"up{level}")(nn.relu(x)), f"up_norm{level}")
            # Dropout is the only noise of pix2pix (section 3.3).
            if DROPOUT_FROM <= level < last and config.dropout:
                x = nn.Dropout(config.dropout, deterministic=not train)(x)
            x = jnp.concatenate([skips[level - 1], x], axis=-1)
        return jnp.tanh(TransposedConv(3, 4, dtype, name="up0")(nn.relu(x)).astype(jnp.float32))
