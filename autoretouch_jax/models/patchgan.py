"""PatchGAN discriminators: a (source, image) pair in, one logit per overlapping patch out.

Images are float32 `[N, H, W, 3]` in [-1, 1].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.config import DiscriminatorConfig
from autoretouch_jax.models.autoretouch import batch_norm, leaky


class SeedPatchGAN(nn.Module):
    """Four stride-2 4×4 convolutions and one of stride 1; LeakyReLU *before* BatchNorm; 94-pixel receptive field.

    `[N, H, W, 3] × 2` → float32 logits `[N, H/16, W/16, 1]`.
    """

    config: DiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, source: jax.Array, image: jax.Array, train: bool = False) -> jax.Array:
        x = jnp.concatenate([source, image], axis=-1).astype(self.dtype)
        for i, multiple in enumerate((1, 2, 4, 8)):
            x = leaky(nn.Conv(self.config.width * multiple, (4, 4), (2, 2), dtype=self.dtype, name=f"conv{i}")(x))
            if i > 0 and self.config.norm == "batch":
                x = batch_norm(train, name=f"norm{i}")(x).astype(self.dtype)
        return nn.Conv(1, (4, 4), dtype=self.dtype, name="logits")(x).astype(jnp.float32)
