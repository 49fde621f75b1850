"""Builds ONNX graphs with `onnx`' helper functions: nodes, weights, and the mirror at an image's border.

Feature maps are `[N, C, H, W]`, as ONNX wants them. Every method returns the name of a result, which the next one takes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from autoretouch_jax.errors import Refused

# Old ones, because telephones and browsers run old software: onnxruntime 1.12 of 2022 reads both.
OPSET, IR_VERSION = 17, 8
LARGEST_FILE = 2**31 - 1  # bytes: protobuf, in which ONNX is stored, writes no larger message


class Graph:
    """The nodes and the weights of a graph. `dtype`, float32 or float16, is what the network's layers compute in."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._results: dict[tuple[Any, ...], str] = {}

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of this kind. A node that is there already is not added again."""
        # Equal nodes are shared because each mirrored border needs the same arithmetic on sizes.
        key = (kind, inputs, repr(sorted(attributes.items())))
        if key not in self._results:
            name = f"{kind}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
            self._results[key] = name
        return self._results[key]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Adds a small constant: a number or a list of numbers."""
        array = np.asarray(value, dtype)
        key = ("constant", array.dtype.name, array.shape, array.tobytes())
        if key not in self._results:
            self._results[key] = self.weight(f"constant_{len(self.initializers)}", array)
        return self._results[key]

    def weight(self, name: str, value: np.ndarray) -> str:
        """Adds an array under this name."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def to(self, x: str, dtype: Any) -> str:
        """Converts to another type."""
        return self.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def computed(self, x: str) -> str:
        """Converts float32 to the type in which layers compute."""
        return x if self.dtype == np.float32 else self.to(x, self.dtype)

    def exact(self, x: str) -> str:
        """Converts what layers computed to float32."""
        return x if self.dtype == np.float32 else self.to(x, np.float32)

    # ---- sizes --------------------------------------------------------------------------------------------------------------

    def size(self, x: str, axis: int) -> str:
        """The size along an axis, an int64 scalar."""
        return self.add("Gather", self.add("Shape", x), self.constant(axis, np.int64), axis=0)

    def number(self, kind: str, *inputs: str | int) -> str:
        """Arithmetic on int64 numbers: `number("Mul", size, 2)`."""
        return self.add(kind, *(self.constant(value, np.int64) if isinstance(value, int) else value for value in inputs))

    def mirrored(self, x: str, axis: int, size: str, start: int, stop: str) -> str:
        """Returns `x` from `start` to `stop` along an axis of this size: beyond its ends its mirror, again and again."""
        # ONNX' own Pad mirrors once, and fails on images that are smaller than the margin.
        period = self.number("Max", self.number("Sub", self.number("Mul", size, 2), 2), 1)
        indices = self.number("Mod", self.number("Range", start, stop, 1), period)
        return self.add("Gather", x, self.number("Min", indices, self.number("Sub", period, indices)), axis=axis)

    # ---- the whole ----------------------------------------------------------------------------------------------------------

    def model(
        self, inputs: Sequence[ValueInfoProto], outputs: Sequence[tuple[str, ValueInfoProto]], metadata: Mapping[str, str]
    ) -> ModelProto:
        """The graph as a checked ONNX model. `outputs` pairs results with the outputs that they become.

        Raises Refused where the weights are more than a file holds.
        """
        names = [helper.make_node("Identity", [result], [value.name]) for result, value in outputs]
        values = [value for _, value in outputs]
        graph = helper.make_graph([*self.nodes, *names], "autoretouch", list(inputs), values, self.initializers)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="autoretouch-jax"
        )
        helper.set_model_props(model, dict(metadata))
        if model.ByteSize() > LARGEST_FILE:
            raise Refused(f"the weights are {model.ByteSize() / 1e9:.1f} GB; an ONNX file holds 2.1; try --precision float16")
        checker.check_model(model, full_check=True)
        return model
