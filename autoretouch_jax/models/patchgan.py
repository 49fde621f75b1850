"""PatchGAN discriminators: a source and an image in, one logit for each of many overlapping patches out.

Images are float32 `[N, H, W, 3]` in [-1, 1].
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import networks
from autoretouch_jax.models import autoretouch, pix2pix
from autoretouch_jax.models.autoretouch import GLOROT
from autoretouch_jax.models.layers import Conv, apply_layer, conv, instance_norm, leaky, pytorch_bias
from autoretouch_jax.models.pix2pixhd import average_pool


class AutoRetouchPatchGAN(nn.Module):
    """The discriminator of AutoRetouch's reference implementation: LeakyReLU *before* BatchNorm, receptive field of 94 pixels.

    Four stride-2 4×4 convolutions and one of stride 1. `[N, H, W, 3] × 2` → float32 logits `[N, H/16, W/16, 1]`.
    """

    config: networks.AutoRetouchPatchGAN
    dtype: Any = jnp.float32
    axis: str | None = None  # the devices along it share BatchNorm's statistics

    @nn.compact
    def __call__(self, source: jax.Array, image: jax.Array, train: bool = False) -> jax.Array:
        x = jnp.concatenate([source, image], axis=-1).astype(self.dtype)
        width, dtype = self.config.width, self.dtype
        spectral, convolution = self.config.spectral_norm, functools.partial(Conv, dtype=dtype, kernel_init=GLOROT)
        for i, multiple in enumerate((1, 2, 4, 8)):
            x = leaky(apply_layer(convolution(width * multiple, (4, 4), (2, 2), name=f"conv{i}"), x, train, spectral))
            if i and self.config.norm == "batch":
                x = autoretouch.batch_norm(self.axis, f"norm{i}")(x, train).astype(dtype)
        return apply_layer(convolution(1, (4, 4), name="logits"), x, train, spectral).astype(jnp.float32)


class PatchGAN(nn.Module):
    """The PatchGAN of pix2pix (Isola et al. 2017, section 6.1.2): LeakyReLU *after* the norm, receptive field of 70 pixels.

    `[N, H, W, 6]` → every layer's activation, with the float32 logits last. All convolutions have a bias.
    """

    config: networks.PatchGAN
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, pair: jax.Array, train: bool = False) -> list[jax.Array]:
        config, dtype, padding, spectral = self.config, self.dtype, self.config.padding, self.config.spectral_norm

        def bias(x: jax.Array) -> Any:
            # pix2pixHD's authors leave the biases as PyTorch makes them; pix2pix' set them to 0.
            return pytorch_bias(4 * 4 * x.shape[-1]) if config.norm == "instance" else nn.initializers.zeros

        x, features = pair, []
        for i in range(config.layers + 1):
            # The last but one convolution keeps the resolution, as in the authors' code.
            stride = 2 if i < config.layers else 1
            channels = min(config.width * 2**i, config.widest or 8 * config.width)
            x = apply_layer(conv(channels, 4, stride, padding, dtype, f"conv{i}", bias=bias(x)), x, train, spectral)
            # The first convolution has no norm (section 6.1.2).
            if i and config.norm == "batch":
                x = pix2pix.batch_norm(self.axis, f"norm{i}")(x, train).astype(dtype)
            elif i and config.norm == "instance":
                x = instance_norm(x)
            x = leaky(x)
            features.append(x)
        logits = apply_layer(conv(1, 4, 1, padding, dtype, "logits", bias=bias(x)), x, train, spectral)
        return [*features, logits.astype(jnp.float32)]


class MultiScalePatchGAN(nn.Module):
    """PatchGANs on the image at 1, 1/2, 1/4 … of its resolution (Wang et al. 2018, section 3.2).

    `[N, H, W, 3] × 2` → what `PatchGAN` returns, for each scale, the finest first.
    """

    config: networks.PatchGAN
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, source: jax.Array, image: jax.Array, train: bool = False) -> list[list[jax.Array]]:
        pair, scales = jnp.concatenate([source, image], axis=-1), []
        for scale in range(self.config.scales):
            # The coarser scales see the pair itself at lower resolution, not features.
            pair = average_pool(pair) if scale else pair
            scales.append(PatchGAN(self.config, self.dtype, self.axis, name=f"scale{scale}")(pair, train))
        return scales
