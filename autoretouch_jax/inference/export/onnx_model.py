"""A model as ONNX: a photograph of any size goes in and comes out, and what is to be left alone comes back exactly.

Input `image`, uint8 `[batch, height, width, 3]`, sRGB. Outputs `retouched`, the same, with gate and dead zone applied, and
`ungated`, without them. Where the network predicts a mask there is `mask`, float32 `[batch, height, width]` in [0, 1].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from autoretouch_jax.errors import Refused
from autoretouch_jax.inference.export.onnx_graph import Graph
from autoretouch_jax.inference.export.onnx_networks import NETWORKS, Layers
from autoretouch_jax.inference.tiles import canvas_step
from autoretouch_jax.models.folder import Model

NAMES = ("image", "retouched", "ungated")  # the input and the outputs that are images
IMAGE_SHAPE = ["batch", "height", "width", 3]


def onnx_model(model: Model, gate: float, metadata: Mapping[str, str], dtype: Any) -> ModelProto:
    """Returns the model as ONNX.

    Where the mask is below `gate` a pixel is left alone. The layers compute in `dtype`, float32 or float16. Raises Refused,
    naming the network, for one that has no ONNX graph here.
    """
    network = NETWORKS.get(type(model.config))
    if network is None:
        known = ", ".join(kind.network for kind in NETWORKS)
        raise Refused(f"network {model.config.network}: cannot be written as ONNX; {known} can")
    graph, step = Graph(dtype), canvas_step(model.config)
    height, width = (graph.size("image", axis) for axis in (1, 2))
    canvas = "image"
    for axis, size in ((1, height), (2, width)):
        steps = graph.number("Div", graph.number("Add", size, step - 1), step)
        canvas = graph.mirrored(canvas, axis, size, 0, graph.number("Mul", steps, step))
    source = graph.add("Sub", graph.add("Div", graph.to(canvas, np.float32), graph.constant(127.5)), graph.constant(1))
    source = graph.add("Transpose", source, perm=[0, 3, 1, 2])
    output, logits = network(Layers(graph, model.variables), model.config, source)
    levels = _levels(graph, _cropped(graph, output, height, width))
    conditions, outputs = [], []
    if logits is not None:
        mask = graph.add("Sigmoid", _cropped(graph, logits, height, width))
        conditions.append(graph.add("Transpose", graph.add("GreaterOrEqual", mask, graph.constant(gate)), perm=[0, 2, 3, 1]))
        mask = graph.add("Squeeze", mask, graph.constant([1], np.int64))
        outputs.append((mask, helper.make_tensor_value_info("mask", TensorProto.FLOAT, IMAGE_SHAPE[:3])))
    if model.config.dead_zone:
        conditions.append(_above_dead_zone(graph, levels, model.config.dead_zone))
    ungated = graph.to(levels, np.uint8)
    retouched = ungated
    for condition in conditions:
        retouched = graph.add("Where", condition, retouched, "image")
    image, *images = (helper.make_tensor_value_info(name, TensorProto.UINT8, IMAGE_SHAPE) for name in NAMES)
    return graph.model([image], [*zip((retouched, ungated), images, strict=True), *outputs], metadata)


def _cropped(graph: Graph, x: str, height: str, width: str) -> str:
    """Removes what the canvas added to the image."""
    axis = graph.constant([0], np.int64)
    ends = graph.add("Concat", *(graph.add("Unsqueeze", size, axis) for size in (height, width)), axis=0)
    return graph.add("Slice", x, graph.constant([0, 0], np.int64), ends, graph.constant([2, 3], np.int64))


def _levels(graph: Graph, x: str) -> str:
    """float32 `[N, 3, H, W]` in [-1, 1] → 8-bit levels, float32 `[N, H, W, 3]`, as `models.pixels.to_uint8`."""
    x = graph.add("Clip", x, graph.constant(-1), graph.constant(1))
    x = graph.add("Round", graph.add("Mul", graph.add("Add", x, graph.constant(1)), graph.constant(127.5)))
    return graph.add("Transpose", x, perm=[0, 2, 3, 1])


def _above_dead_zone(graph: Graph, levels: str, dead_zone: int) -> str:
    """Whether a channel of the pixel changes by more than the dead zone: `[N, H, W, 1]`."""
    change = graph.add("Abs", graph.add("Sub", levels, graph.to("image", np.float32)))
    return graph.add("Greater", graph.add("ReduceMax", change, axes=[3], keepdims=1), graph.constant(dead_zone))
