"""From the description of a network to its module, and one shape for what the modules return."""

from typing import Any

import jax
import jax.numpy as jnp

from autoretouch_jax import architecture
from autoretouch_jax.models import autoretouch, patchgan, pix2pix, pix2pixhd, retouch
from autoretouch_jax.models.layers import Remat
from autoretouch_jax.models.retouch import Retouched

GENERATORS: dict[type, Any] = {
    architecture.AutoRetouch: autoretouch.AutoRetouchGenerator,
    architecture.Retouch: retouch.RetouchGenerator,
    architecture.Pix2Pix: pix2pix.UNetGenerator,
    architecture.Pix2PixHDGlobal: pix2pixhd.GlobalGenerator,
    architecture.Pix2PixHDLocal: pix2pixhd.LocalEnhancer,
}
DISCRIMINATORS: dict[type, Any] = {
    architecture.SeedPatchGAN: patchgan.SeedPatchGAN,
    architecture.PatchGAN: patchgan.MultiScalePatchGAN,
}


def generator(config: architecture.Generator, dtype: Any = jnp.float32, axis: str | None = None, remat: Remat = "none") -> Any:
    """The module: `apply(variables, source[, train])`, `[N, H, W, 3]` → an image, or `Retouched`.

    With `axis` BatchNorm's statistics are those of all devices along it; `remat`: see `layers.rematerialised`.
    """
    return GENERATORS[type(config)](config, dtype, axis, remat)


def discriminator(config: architecture.Discriminator, dtype: Any = jnp.float32, axis: str | None = None) -> Any:
    """The module: `apply(variables, source, image[, train])` → logits, or per scale a list of features with the logits last."""
    return DISCRIMINATORS[type(config)](config, dtype, axis)


def retouched(output: jax.Array | Retouched) -> Retouched:
    """A generator's output with its mask logits, which are None for networks that predict no mask."""
    return output if isinstance(output, Retouched) else Retouched(output, None)


def scales(output: jax.Array | list[list[jax.Array]]) -> list[list[jax.Array]]:
    """A discriminator's output as a list of scales, each a list of features with the logits last."""
    return output if isinstance(output, list) else [[output]]


def receptive_radius(config: architecture.Generator) -> int | None:
    """How far an output pixel sees, rounded up to the grid; None for the networks that look at the whole image at once."""
    if isinstance(config, architecture.AutoRetouch):
        return autoretouch.receptive_radius(config)
    if isinstance(config, architecture.Retouch):
        return retouch.receptive_radius(config)
    return None
