"""The generators of pix2pixHD (Wang et al., "High-resolution image synthesis … with conditional GANs", CVPR 2018).

Section 3.2 and the authors' PyTorch code. Images are float32 `[N, H, W, 3]` in [-1, 1]. H and W are multiples of `2 ** downs`,
or, for the local enhancer, of twice that.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import networks
from autoretouch_jax.models.layers import (
    NORMAL_INIT,
    Remat,
    TransposedConv,
    conv,
    instance_norm,
    pytorch_bias,
    reflect,
    rematerialised,
)


def _norm(x: jax.Array, kind: str) -> jax.Array:
    return instance_norm(x) if kind == "instance" else x


def _bias(norm: str, fan_in: int) -> Any:
    """PyTorch's default, which the authors leave as it is. Without norm, ours, a block starts as the identity."""
    return pytorch_bias(fan_in) if norm == "instance" else nn.initializers.zeros


class Block(nn.Module):
    """`x + norm(conv(relu(norm(conv(x)))))`, mirrored at the borders. Without norm the second convolution starts at zero."""

    channels: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, bias = NORMAL_INIT if self.norm == "instance" else nn.initializers.zeros, _bias(self.norm, 9 * self.channels)
        y = nn.relu(_norm(conv(self.channels, 3, 1, 0, self.dtype, "first", bias=bias)(reflect(x, 1)), self.norm))
        return x + _norm(conv(self.channels, 3, 1, 0, self.dtype, "second", init, bias)(reflect(y, 1)), self.norm)


class GlobalFeatures(nn.Module):
    """The global generator up to its last layer: stem, downsampling, residual blocks, upsampling → `[N, H, W, width]`."""

    config: networks.Pix2PixHDGlobal
    dtype: Any
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, norm, dtype = self.config.width, self.config.norm, self.dtype
        bias = _bias(norm, 49 * x.shape[-1])
        x = nn.relu(_norm(conv(width, 7, 1, 0, dtype, "stem", bias=bias)(reflect(x.astype(dtype), 3)), norm))
        for level in range(1, self.config.downs + 1):
            bias = _bias(norm, 9 * x.shape[-1])
            x = nn.relu(_norm(conv(width * 2**level, 3, 2, 1, dtype, f"down{level}", bias=bias)(x), norm))
        for i in range(self.config.blocks):
            x = rematerialised(Block, self.remat)(width * 2**self.config.downs, norm, dtype, name=f"block{i}")(x)
        # Transposed convolutions with the authors' output padding, see TransposedConv.
        for level in reversed(range(self.config.downs)):
            channels = width * 2**level
            up = TransposedConv(channels, 3, dtype, _bias(norm, 9 * channels), name=f"up{level}")
            x = nn.relu(_norm(up(x), norm))
        return x


class GlobalGenerator(nn.Module):
    """The global generator: `[N, H, W, 3]` → the same shape, in [-1, 1] by a tanh, float32."""

    config: networks.Pix2PixHDGlobal
    dtype: Any = jnp.float32
    axis: str | None = None  # unused: instance norm does not look at the batch
    remat: Remat = "none"

    @nn.compact
    def __call__(self, source: jax.Array, train: bool = False) -> jax.Array:
        del train  # instance norm behaves the same in training and in use
        x = GlobalFeatures(self.config, self.dtype, self.remat, name="global")(source)
        return _head(x, self.config.norm, self.dtype)


class LocalEnhancer(nn.Module):
    """A global generator at half resolution whose features are added to those of an enhancer at full resolution; float32."""

    config: networks.Pix2PixHDLocal
    dtype: Any = jnp.float32
    axis: str | None = None
    remat: Remat = "none"

    @nn.compact
    def __call__(self, source: jax.Array, train: bool = False) -> jax.Array:
        del train
        config, dtype, norm = self.config, self.dtype, self.config.norm
        x = source.astype(dtype)
        # The global generator without its head: its features, not its image, join the enhancer's.
        half = GlobalFeatures(config.global_generator, dtype, self.remat, name="global")(average_pool(x))
        bias = _bias(norm, 49 * x.shape[-1])
        x = nn.relu(_norm(conv(config.width, 7, 1, 0, dtype, "stem", bias=bias)(reflect(x, 3)), norm))
        bias = _bias(norm, 9 * config.width)
        x = nn.relu(_norm(conv(2 * config.width, 3, 2, 1, dtype, "down", bias=bias)(x), norm)) + half
        for i in range(config.local_blocks):
            x = rematerialised(Block, self.remat)(2 * config.width, norm, dtype, name=f"block{i}")(x)
        x = nn.relu(_norm(TransposedConv(config.width, 3, dtype, bias, name="up")(x), norm))
        return _head(x, norm, dtype)


def _head(x: jax.Array, norm: str, dtype: Any) -> jax.Array:
    """The last convolution: features `[N, H, W, C]` → a float32 image. It has to be called inside a module's `__call__`."""
    return jnp.tanh(conv(3, 7, 1, 0, dtype, "head", bias=_bias(norm, 49 * x.shape[-1]))(reflect(x, 3)).astype(jnp.float32))


def average_pool(x: jax.Array) -> jax.Array:
    """3×3 mean with stride 2: `[N, H, W, C]` → half the sides, rounded up. At the borders it averages the pixels that exist."""
    return nn.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)), count_include_pad=False)
