"""Makes the Flax module of a network from its description. A new network is added here."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from autoretouch_jax.config import networks
from autoretouch_jax.models import autoretouch, patchgan, pix2pix, pix2pixhd, retouch
from autoretouch_jax.models.layers import Remat

# By the class of the description, so that a network needs no registration and no base class.
GENERATORS: dict[type, Any] = {
    networks.AutoRetouch: autoretouch.AutoRetouchGenerator,
    networks.Retouch: retouch.RetouchGenerator,
    networks.Pix2Pix: pix2pix.UNetGenerator,
    networks.Pix2PixHDGlobal: pix2pixhd.GlobalGenerator,
    networks.Pix2PixHDLocal: pix2pixhd.LocalEnhancer,
}
DISCRIMINATORS: dict[type, Any] = {
    networks.AutoRetouchPatchGAN: patchgan.AutoRetouchPatchGAN,
    networks.PatchGAN: patchgan.MultiScalePatchGAN,
}


def make_generator(
    config: networks.Generator, dtype: Any = jnp.float32, axis: str | None = None, remat: Remat = "none"
) -> nn.Module:
    """Returns the module: `apply(variables, source[, train])`, `[N, H, W, 3]` → an image, or a `GeneratorOutput`.

    `dtype` is the compute type. With `axis`, BatchNorm's statistics are those of all devices along it. For `remat` see
    `layers.rematerialised`.
    """
    return GENERATORS[type(config)](config, dtype, axis, remat)


def make_discriminator(config: networks.Discriminator, dtype: Any = jnp.float32, axis: str | None = None) -> nn.Module:
    """Returns the module: `apply(variables, source, image[, train])` → logits, or a list of features for each scale."""
    return DISCRIMINATORS[type(config)](config, dtype, axis)
