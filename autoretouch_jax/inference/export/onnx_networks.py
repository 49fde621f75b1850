"""The generators as ONNX graphs, layer by layer as in `models/`. BatchNorm is folded into the convolution before it.

A function takes the layers, the description and the name of the source, float32 `[N, 3, H, W]` in [-1, 1], H and W multiples
of the network's grid. It returns the names of the image and of the mask's logits, or None, both float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from autoretouch_jax.config import networks
from autoretouch_jax.inference.export.onnx_graph import Graph
from autoretouch_jax.models import autoretouch, pix2pix
from autoretouch_jax.models.layers import INSTANCE_EPSILON, LEAK

Outputs = tuple[str, str | None]


class Layers:
    """The layers of a network or of a part of it, under the names of their parameters in Flax."""

    def __init__(self, graph: Graph, variables: Mapping[str, Any], path: str = "") -> None:
        self.graph = graph
        self._params = variables["params"]
        self._stats = variables.get("batch_stats", {})
        self._path = path

    def part(self, name: str) -> "Layers":
        """The layers of the part of this name."""
        variables = {"params": self._params[name], "batch_stats": self._stats.get(name, {})}
        return Layers(self.graph, variables, f"{self._path}{name}/")

    def weights(self, name: str, norm: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns a convolution's kernel, `[k, k, in, out]`, and bias, `[out]`, with a BatchNorm after it folded in."""
        # In float64, so that folding adds no rounding of its own.
        kernel = np.asarray(self._params[name]["kernel"], np.float64)
        bias = np.asarray(self._params[name].get("bias", np.zeros(kernel.shape[-1])), np.float64)
        if norm is None:
            return kernel, bias
        values = {**self._stats[norm.name], **self._params[norm.name]}
        mean, var, scale, shift = (np.asarray(values[key], np.float64) for key in ("mean", "var", "scale", "bias"))
        factor = scale / np.sqrt(var + norm.epsilon)
        return kernel * factor, (bias - mean) * factor + shift

    def convolve(self, x: str, name: str, kernel: np.ndarray, bias: np.ndarray, stride: int, pads: list[int]) -> str:
        """Adds a convolution with these weights. `pads` are zeros: top, left, bottom, right."""
        weights = self._stored(name, kernel.transpose(3, 2, 0, 1), bias)
        return self.graph.add("Conv", x, *weights, kernel_shape=kernel.shape[:2], strides=[stride] * 2, pads=pads)

    def conv(self, x: str, name: str, stride: int = 1, pads: list[int] | None = None, norm: Any = None) -> str:
        """Adds the convolution of this name. By default zeros around its input keep the size."""
        kernel, bias = self.weights(name, norm)
        return self.convolve(x, name, kernel, bias, stride, pads or [kernel.shape[0] // 2] * 4)

    def mirrored_conv(self, x: str, name: str, sizes: list[str]) -> str:
        """Adds the convolution of this name on an input of these sizes that is mirrored at its borders and keeps its size."""
        kernel, bias = self.weights(name)
        margin = kernel.shape[0] // 2
        for axis, size in zip((2, 3), sizes, strict=True):
            x = self.graph.mirrored(x, axis, size, -margin, self.graph.number("Add", size, margin))
        return self.convolve(x, name, kernel, bias, 1, [0] * 4)

    def transposed(self, x: str, name: str, norm: Any = None) -> str:
        """Adds the transposed convolution of this name, which doubles the sides (`models.layers.TransposedConv`)."""
        kernel, bias = self.weights(name, norm)
        weights = self._stored(name, kernel.transpose(2, 3, 0, 1), bias)
        size = kernel.shape[0]
        shape = {"kernel_shape": [size] * 2, "strides": [2, 2], "pads": [1] * 4, "output_padding": [4 - size] * 2}
        return self.graph.add("ConvTranspose", x, *weights, **shape)

    def leaky(self, x: str) -> str:
        """Adds a LeakyReLU."""
        return self.graph.add("LeakyRelu", x, alpha=LEAK)

    def upsample(self, x: str) -> str:
        """Adds a ×2 upsampling by nearest neighbour."""
        nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.graph.add("Resize", x, "", self.graph.constant([1, 1, 2, 2]), **nearest)

    def _stored(self, name: str, kernel: np.ndarray, bias: np.ndarray) -> list[str]:
        arrays = {"kernel": kernel, "bias": bias}
        return [self.graph.weight(f"{self._path}{name}/{key}", array.astype(self.graph.dtype)) for key, array in arrays.items()]


def _autoretouch(layers: Layers, config: networks.AutoRetouch, source: str) -> Outputs:
    graph = layers.graph
    stem = layers.leaky(layers.conv(graph.computed(source), "stem"))
    # Flax pads an even side for a stride of 2 at its end alone.
    x = layers.conv(stem, "down", stride=2, pads=[0, 0, 1, 1])
    for i in range(config.blocks):
        block, y = layers.part(f"block{i}"), x
        for number in (0, 1):
            norm = autoretouch.batch_norm(None, f"BatchNorm_{number}") if config.norm == "batch" else None
            y = layers.leaky(block.conv(y, f"Conv_{number}", norm=norm))
        x = graph.add("Add", x, y)
    # Activated before it is upsampled: the same values at a quarter of the work.
    x = graph.add("Add", layers.upsample(layers.leaky(layers.conv(x, "up"))), stem)
    head = graph.exact(layers.conv(x, "head"))
    return (graph.add("Tanh", head) if config.head == "tanh" else graph.add("Add", source, head)), None


def _retouch(layers: Layers, config: networks.Retouch, source: str) -> Outputs:
    graph = layers.graph

    def blocks(x: str, name: str) -> str:
        for i in range(config.blocks):
            block = layers.part(f"{name}_block{i}")
            x = graph.add("Add", x, block.conv(layers.leaky(block.conv(layers.leaky(x), "first")), "second"))
        return x

    # Folding 2×2 pixels into channels and a 3×3 convolution are one 6×6 convolution with stride 2. Few runtimes for telephones
    # and browsers can fold.
    kernel, bias = layers.weights("stem")
    kernel = kernel.reshape(3, 3, 2, 2, 3, -1).transpose(0, 2, 1, 3, 4, 5).reshape(6, 6, 3, -1)
    x = layers.convolve(graph.computed(source), "stem", kernel, bias, 2, [2] * 4)
    x, skips = blocks(x, "down0"), []
    for level in range(1, config.levels):
        skips.append(x)
        x = blocks(layers.conv(x, f"down{level}", stride=2, pads=[0] * 4), f"down{level}")
    for level in reversed(range(config.levels - 1)):
        x = blocks(graph.add("Add", layers.upsample(layers.conv(x, f"up{level}")), skips[level]), f"up{level}")
    # Edit and mask come from one convolution: for each of the four pixels three channels of the one, then one of the other.
    (edit, edit_bias), (mask, mask_bias) = layers.weights("edit"), layers.weights("mask")
    kernel = np.concatenate([edit.reshape(*edit.shape[:3], 4, 3), mask[..., None]], axis=-1).reshape(*edit.shape[:3], 16)
    bias = np.concatenate([edit_bias.reshape(4, 3), mask_bias[:, None]], axis=-1).reshape(16)
    heads = layers.convolve(layers.leaky(x), "edit_and_mask", kernel, bias, 1, [1] * 4)
    heads = graph.exact(graph.add("DepthToSpace", heads, blocksize=2, mode="DCR"))
    parts = [graph.add("Slice", heads, *(graph.constant([n], np.int64) for n in (*ends, 1))) for ends in ((0, 3), (3, 4))]
    return graph.add("Add", source, parts[0]), parts[1]


def _pix2pix(layers: Layers, config: networks.Pix2Pix, source: str) -> Outputs:
    graph, last = layers.graph, config.levels - 1

    def norm(name: str) -> Any:
        return pix2pix.batch_norm(None, name) if config.norm == "batch" else None

    x, skips = layers.conv(graph.computed(source), "down0", stride=2, pads=[1] * 4), []
    for level in range(1, config.levels):
        # A skip carries what is activated, see models/pix2pix.py.
        x = layers.leaky(x)
        skips.append(x)
        normed = norm(f"down_norm{level}") if level < last else None
        x = layers.conv(x, f"down{level}", stride=2, pads=[1] * 4, norm=normed)
    for level in reversed(range(1, config.levels)):
        x = layers.transposed(graph.add("Relu", x), f"up{level}", norm(f"up_norm{level}"))
        x = graph.add("Concat", skips[level - 1], x, axis=1)
    return graph.add("Tanh", graph.exact(layers.transposed(graph.add("Relu", x), "up0"))), None


# ---- pix2pixHD --------------------------------------------------------------------------------------------------------------


def _sizes(graph: Graph, source: str, halvings: int) -> list[str]:
    """The source's height and width, halved so often."""
    return [graph.number("Div", graph.size(source, axis), 2**halvings) for axis in (2, 3)]


def _normed(layers: Layers, x: str, name: str, norm: str) -> str:
    """Adds the norm after the convolution of this name."""
    if norm == "none":
        return x
    graph, channels = layers.graph, layers.weights(name)[1].shape
    ones, zeros = graph.constant(np.ones(channels)), graph.constant(np.zeros(channels))
    # In float32, as in training: float16 cannot hold the sum over an image.
    return graph.computed(graph.add("InstanceNormalization", graph.exact(x), ones, zeros, epsilon=INSTANCE_EPSILON))


def _block(layers: Layers, x: str, sizes: list[str], norm: str) -> str:
    y = layers.graph.add("Relu", _normed(layers, layers.mirrored_conv(x, "first", sizes), "first", norm))
    return layers.graph.add("Add", x, _normed(layers, layers.mirrored_conv(y, "second", sizes), "second", norm))


def _global_features(layers: Layers, config: networks.Pix2PixHDGlobal, x: str, sizes: Callable[[int], list[str]]) -> str:
    """The global generator up to its last layer. `sizes` returns the sides of `x`, halved so often."""
    graph = layers.graph

    def activated(x: str, name: str) -> str:
        return graph.add("Relu", _normed(layers, x, name, config.norm))

    x = activated(layers.mirrored_conv(x, "stem", sizes(0)), "stem")
    for level in range(1, config.downs + 1):
        x = activated(layers.conv(x, f"down{level}", stride=2, pads=[1] * 4), f"down{level}")
    for i in range(config.blocks):
        x = _block(layers.part(f"block{i}"), x, sizes(config.downs), config.norm)
    for level in reversed(range(config.downs)):
        x = activated(layers.transposed(x, f"up{level}"), f"up{level}")
    return x


def _head(layers: Layers, x: str, sizes: list[str]) -> Outputs:
    graph = layers.graph
    return graph.add("Tanh", graph.exact(layers.mirrored_conv(x, "head", sizes))), None


def _pix2pixhd_global(layers: Layers, config: networks.Pix2PixHDGlobal, source: str) -> Outputs:
    graph = layers.graph
    x = _global_features(layers.part("global"), config, graph.computed(source), lambda level: _sizes(graph, source, level))
    return _head(layers, x, _sizes(graph, source, 0))


def _pix2pixhd_local(layers: Layers, config: networks.Pix2PixHDLocal, source: str) -> Outputs:
    graph, x = layers.graph, layers.graph.computed(source)

    def activated(x: str, name: str) -> str:
        return graph.add("Relu", _normed(layers, x, name, config.norm))

    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": 0}
    half = graph.add("AveragePool", x, **window)
    half = _global_features(layers.part("global"), config.global_generator, half, lambda n: _sizes(graph, source, n + 1))
    x = activated(layers.mirrored_conv(x, "stem", _sizes(graph, source, 0)), "stem")
    x = graph.add("Add", activated(layers.conv(x, "down", stride=2, pads=[1] * 4), "down"), half)
    for i in range(config.local_blocks):
        x = _block(layers.part(f"block{i}"), x, _sizes(graph, source, 1), config.norm)
    return _head(layers, activated(layers.transposed(x, "up"), "up"), _sizes(graph, source, 0))


# By the class of the description, as in models/modules.py. A network that is not here cannot be exported to ONNX.
NETWORKS: dict[Any, Callable[[Layers, Any, str], Outputs]] = {
    networks.AutoRetouch: _autoretouch,
    networks.Retouch: _retouch,
    networks.Pix2Pix: _pix2pix,
    networks.Pix2PixHDGlobal: _pix2pixhd_global,
    networks.Pix2PixHDLocal: _pix2pixhd_local,
}
