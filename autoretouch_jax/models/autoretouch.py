"""The AutoRetouch generator (Shafaei, Little and Schmidt, WACV 2021, section 4).

Images are float32 `[N, H, W, 3]` in [-1, 1], H and W even.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import networks
from autoretouch_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvBeforeNorm,
    Remat,
    contrast_init,
    leaky,
    rematerialised,
    upsample_nearest,
)

GLOROT = nn.initializers.glorot_uniform()  # Keras' default, for the kernels of the published network


def batch_norm(axis: str | None, name: str) -> BatchNorm:
    """Keras' layer with the reference implementation's momentum, which its moving averages confirm."""
    return BatchNorm(momentum=0.8, epsilon=1e-3, unbiased=False, axis=axis, name=name)


class ResidualBlock(nn.Module):
    """`x + act(norm(conv(act(norm(conv(x))))))`: `[N, h, w, C]` → the same."""

    channels: int
    norm: str
    dtype: Any
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        # Without norm the second convolution starts at zero, so that fifteen blocks do not multiply the signal's scale
        # (Fixup, Zhang et al. 2019).
        inits = (GLOROT, GLOROT) if self.norm == "batch" else (nn.initializers.lecun_normal(), nn.initializers.zeros)
        for i, init in enumerate(inits):
            if self.norm == "batch":
                y, bias = ConvBeforeNorm(self.channels, self.dtype, init, name=f"Conv_{i}")(y)
                y = batch_norm(self.axis, f"BatchNorm_{i}")(y, train, bias).astype(self.dtype)
            else:
                y = Conv(self.channels, (3, 3), dtype=self.dtype, kernel_init=init)(y)
            y = leaky(y)
        return x + y


class AutoRetouchGenerator(nn.Module):
    """7×7 stem, one stride-2 convolution, residual blocks, ×2 upsampling, one skip from the stem, head.

    `head="tanh"` is the paper's. `head="residual"` returns `source + delta`, not clipped, with a zero-initialised delta, so
    that the untrained network is the identity. The returned image is float32.
    """

    config: networks.AutoRetouch
    dtype: Any = jnp.float32
    axis: str | None = None  # the devices along it share BatchNorm's statistics
    remat: Remat = "none"

    @nn.compact
    def __call__(self, source: jax.Array, train: bool = False) -> jax.Array:
        width, dtype = self.config.width, self.dtype
        # The published network has Keras' initial values; the one without norm has ours.
        published = self.config.norm == "batch"
        init, first = (GLOROT, GLOROT) if published else (nn.initializers.lecun_normal(), contrast_init)
        stem = leaky(Conv(width, (7, 7), dtype=dtype, name="stem", kernel_init=first)(source.astype(dtype)))
        x = Conv(2 * width, (3, 3), (2, 2), dtype=dtype, name="down", kernel_init=init)(stem)
        block = rematerialised(ResidualBlock, self.remat, static=(2,))
        # Unrolled: under `nn.scan` the backward pass is 9 to 21 times slower on a CPU.
        for i in range(self.config.blocks):
            x = block(2 * width, self.config.norm, dtype, self.axis, name=f"block{i}")(x, train)
        # The convolution comes before the upsampling: at half resolution it is a quarter of the work.
        x = Conv(width, (3, 3), dtype=dtype, name="up", kernel_init=init)(x)
        x = leaky(upsample_nearest(x)) + stem
        if self.config.head == "tanh":
            return jnp.tanh(Conv(3, (3, 3), dtype=dtype, name="head", kernel_init=init)(x).astype(jnp.float32))
        delta = Conv(3, (3, 3), dtype=dtype, name="head", kernel_init=nn.initializers.zeros)(x)
        return source + delta.astype(jnp.float32)
