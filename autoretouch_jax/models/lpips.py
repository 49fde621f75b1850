"""LPIPS (Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018), version 0.1.

Images are float32 `[N, H, W, 3]`, RGB, in [-1, 1]. A frozen ImageNet network computes features of both images, and each pixel's
features are scaled to unit length. Their squared differences are weighted per channel by the learned heads, averaged over space
and summed over layers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from autoretouch_jax.errors import Refused
from autoretouch_jax.models.vgg import VGG
from autoretouch_jax.models.vgg_weights import vgg_params

Backbone = Literal["alex", "vgg16", "squeeze"]
SHIFT, SCALE = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # ImageNet's, for images in [-1, 1]
UNIT_EPSILON = 1e-10  # of the reference code
VGG_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
# For each fire module its index in torchvision's Sequential, and the channels of its squeeze and of each expand layer.
FIRES = ((3, 16, 64), (4, 16, 64), (6, 32, 128), (7, 32, 128), (9, 48, 192), (10, 48, 192), (11, 64, 256), (12, 64, 256))
SQUEEZE_TAPS = (1, 4, 7, 9, 10, 11, 12)  # indices in torchvision's Sequential
# For each convolution its index, channels, kernel size, stride and padding.
ALEX = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))


def max_pool(x: jax.Array, ceil: bool) -> jax.Array:
    """3×3 max-pool with stride 2. `ceil` keeps a last, incomplete window, as PyTorch's `ceil_mode`."""
    margins = [(0, (-(size - 3)) % 2 if ceil else 0) for size in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), padding=margins)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016) as torchvision's: seven activations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        x = nn.relu(nn.Conv(64, (3, 3), (2, 2), padding="VALID", name="features0")(x))
        taps = [x]
        for index, squeeze, expand in FIRES:
            # torchvision's Sequential has its pools before these fire modules.
            if index in (3, 6, 9):
                x = max_pool(x, ceil=True)
            x = nn.relu(nn.Conv(squeeze, (1, 1), name=f"features{index}_squeeze")(x))
            one = nn.Conv(expand, (1, 1), name=f"features{index}_expand1x1")(x)
            three = nn.Conv(expand, (3, 3), name=f"features{index}_expand3x3")(x)
            x = nn.relu(jnp.concatenate([one, three], axis=-1))
            if index in SQUEEZE_TAPS:
                taps.append(x)
        return taps


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky 2014) as torchvision's: five activations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        taps = []
        for index, channels, size, stride, padding in ALEX:
            # torchvision's Sequential has its pools before these convolutions.
            if index in (3, 6):
                x = max_pool(x, ceil=False)
            margins = ((padding, padding), (padding, padding))
            x = nn.relu(nn.Conv(channels, (size, size), (stride, stride), padding=margins, name=f"features{index}")(x))
            taps.append(x)
        return taps


def features(backbone: Backbone, params: Any, image: jax.Array) -> list[jax.Array]:
    """The activations that are compared, for images in [-1, 1]."""
    x = (image - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    if backbone == "vgg16":
        return list(VGG("vgg16", VGG_TAPS, "raw").apply({"params": params}, x).values())
    network: nn.Module = AlexNet() if backbone == "alex" else SqueezeNet()
    return network.apply({"params": params}, x)


def distance(backbone: Backbone, params: Any, heads: list[jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    """`[N, H, W, 3] × 2` → float32 `[N]`, 0 for equal images. `heads` has a weight per channel for each activation."""

    def unit(x: jax.Array) -> jax.Array:
        return x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)) + UNIT_EPSILON)

    total = jnp.zeros(a.shape[0], jnp.float32)
    for head, x, y in zip(heads, features(backbone, params, a), features(backbone, params, b), strict=True):
        total += jnp.sum(jnp.square(unit(x) - unit(y)) * head, axis=-1).mean((1, 2))
    return total


def params_from_torchvision(backbone: Backbone, arrays: Mapping[str, np.ndarray]) -> Any:
    """torchvision's `features.N….weight` (OIHW) → Flax parameters. Raises Refused, naming the first missing tensor."""
    if backbone == "vgg16":
        params, kind = vgg_params(arrays, "vgg16", VGG_TAPS)
        if kind != "torchvision":
            raise Refused("LPIPS with VGG16 needs torchvision's weights (features.0.weight …), these are Keras'")
        return params
    layers = [f"features.{index}" for index, *_ in ALEX]
    if backbone == "squeeze":
        parts = ("squeeze", "expand1x1", "expand3x3")
        layers = ["features.0", *(f"features.{index}.{part}" for index, *_ in FIRES for part in parts)]
    params = {}
    for layer in layers:
        if missing := [key for key in (f"{layer}.weight", f"{layer}.bias") if key not in arrays]:
            raise Refused(f"the {backbone} weights lack {missing[0]}; give torchvision's file")
        kernel, bias = (np.asarray(arrays[f"{layer}.{leaf}"], np.float32) for leaf in ("weight", "bias"))
        params[layer.replace("features.", "features").replace(".", "_")] = {
            "kernel": kernel.transpose(2, 3, 1, 0),
            "bias": bias,
        }
    return params


def heads_from_file(backbone: Backbone, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The linear heads, named `lin0` … or, as published, `lin0.model.1.weight` …, as a vector of channel weights each."""
    count = {"alex": len(ALEX), "vgg16": len(VGG_TAPS), "squeeze": len(SQUEEZE_TAPS)}[backbone]
    heads = []
    for i in range(count):
        key = next((name for name in (f"lin{i}", f"lin{i}.model.1.weight") if name in arrays), None)
        if key is None:
            raise Refused(f"the LPIPS heads lack lin{i}; {backbone} needs {count} of them")
        heads.append(np.asarray(arrays[key], np.float32).reshape(-1))
    return heads
