"""VGG16 and VGG19 features (Simonyan and Zisserman, 2015) for the perceptual loss.

Images are float32 `[N, H, W, 3]`, RGB, in [-1, 1]. The module converts them to what its weights expect.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.models.layers import Conv

Preprocess = Literal["torchvision", "keras", "raw"]  # how a framework's weights expect their images

CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision, RGB in [0, 1]
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)  # Keras and the original release, BGR in [0, 255]


def layer_names(network: str) -> list[str]:
    """The activations `relu1_1` … `relu5_4`, in order."""
    return [f"relu{b + 1}_{c + 1}" for b, count in enumerate(CONVOLUTIONS[network]) for c in range(count)]


def preprocess(image: jax.Array, kind: Preprocess) -> jax.Array:
    """[-1, 1] RGB → the images that the weights were trained on. `raw` changes nothing, as in pix2pixHD's published code."""
    if kind == "raw":
        return image
    unit = image * 0.5 + 0.5
    if kind == "torchvision":
        return (unit - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
    return unit[..., ::-1] * 255.0 - jnp.asarray(CAFFE_MEAN_BGR)


def max_pool(x: jax.Array) -> jax.Array:
    """2×2 max-pool. The gradient of XLA's own, select-and-scatter, does not compile in deterministic GPU mode.

    On a CPU, and by XLA's estimate on a TPU, strided slices are faster than the largest along two sides of a reshaped array.
    """
    height, width = (side // 2 * 2 for side in x.shape[1:3])
    upper, lower = (jnp.maximum(x[:, i:height:2, 0:width:2], x[:, i:height:2, 1:width:2]) for i in (0, 1))
    return jnp.maximum(upper, lower)


class VGG(nn.Module):
    """`[N, H, W, 3]` → `{layer: [N, H/2^b, W/2^b, C]}` for the requested layers. Nothing after the last one is computed."""

    network: Literal["vgg16", "vgg19"]
    layers: Sequence[str]
    kind: Preprocess
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        requested, features = set(self.layers), {}
        x = preprocess(image, self.kind).astype(self.dtype)
        for name in layer_names(self.network):
            block, index = int(name[4]), int(name[6])
            if index == 1 and block > 1:
                x = max_pool(x)
            x = nn.relu(Conv(CHANNELS[block - 1], (3, 3), dtype=self.dtype, name=f"conv{block}_{index}")(x))
            if name in requested:
                features[name] = x
            if len(features) == len(requested):
                break
        return features
