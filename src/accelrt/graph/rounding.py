"""Round a graph's float32 values to fewer bits and back, at the borders of its operators.

What a chip does that reads float32 tensors in a narrower type and accumulates in float32, said in operators that every
runtime has: values stay float32, but those at the borders are ones that the narrower type can hold. Inputs and outputs
of the graph keep their names and types; constants and weights are rounded once, here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from accelrt.errors import GraphError
from accelrt.graph.convert import elem_type
from accelrt.graph.model import Graph, names_in
from accelrt.graph.node import Node
from accelrt.graph.types import TensorType, numpy_dtype
from accelrt.graph.weights import is_external, stub

FloatKind: TypeAlias = Literal["bfloat16", "float16", "tf32", "float8_e4m3fn"]
"""What values are rounded to; ``tf32`` has the range of float32 and 10 bits after the point."""

Borders: TypeAlias = Literal["none", "inputs", "both"]
"""Which values of a node are rounded: its inputs alone where the result is handed on in float32."""

_CAST_SINCE = {"bfloat16": 13, "float16": 1, "float8_e4m3fn": 19}
"""The opset since which Cast takes the type."""
_GUARD_SINCE = 10
"""The opset of IsInf, which rounding by arithmetic needs."""
_SIGNIFICAND = {"bfloat16": 8, "tf32": 11}
"""Bits of the significand, the implicit one included, of the kinds with float32's exponents."""
_DOUBLE_BITS = 53
_FP8_MAX = 448.0
_STRUCTURE = {"Resize": {1, 2}, "Upsample": {1}, "Dropout": {1}}
"""Float32 inputs that say what the operator is rather than what it computes on."""


def rounding_problem(kind: FloatKind, opset: int) -> str | None:
    """Return why a graph of this opset cannot hold the rounding, None if it can."""
    if opset >= _CAST_SINCE.get(kind, _GUARD_SINCE) or (kind in _SIGNIFICAND and opset >= _GUARD_SINCE):
        return None
    needed = _GUARD_SINCE if kind in _SIGNIFICAND else _CAST_SINCE[kind]
    return f"rounding to {kind} needs opset {needed}, and the model is of opset {opset}"


def round_array(array: np.ndarray[Any, Any], kind: FloatKind) -> np.ndarray[Any, Any]:
    """Return float32 values rounded to the nearest that ``kind`` holds; float8 saturates, the others overflow."""
    if kind == "tf32":
        wide = array.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = wide * _factor(kind)
            narrow = (scaled - (scaled - wide)).astype(np.float32)
        return np.where(np.isfinite(array), narrow, array)
    if kind == "float8_e4m3fn":
        array = np.clip(array, -_FP8_MAX, _FP8_MAX)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: np.ndarray[Any, Any] = array.astype(numpy_dtype(kind)).astype(np.float32)
    return rounded


def round_floats(graph: Graph, kind: FloatKind, borders: Callable[[Node], Borders]) -> Graph:
    """Return a graph whose operators see, and where asked make, float32 values of fewer bits.

    Args:
        graph: What to rewrite, without control flow; it stays as it is.
        kind: What to round to.
        borders: Says for each node which of its values are rounded.

    Raises:
        GraphError: The opset of the graph has no operator to round with, or a node carries bodies.
    """
    if problem := rounding_problem(kind, graph.opsets.get("", 1)):
        raise GraphError(f"The graph cannot be rewritten: {problem}.")
    return _Rounder(graph, kind).rewrite(borders)


def _factor(kind: str) -> float:
    # Veltkamp's splitting: x*f - (x*f - x) keeps the leading bits of x, rounded to nearest.
    return float(2 ** (_DOUBLE_BITS - _SIGNIFICAND[kind]) + 1)


@dataclass(frozen=True, slots=True)
class _Added:
    nodes: list[onnx.NodeProto]
    tensors: dict[str, onnx.TensorProto]
    weights: dict[str, Any]


class _Rounder:
    def __init__(self, graph: Graph, kind: FloatKind) -> None:
        self._graph, self._kind = graph, kind
        self._taken = names_in(graph.proto.graph)
        self._node_names = {node.name for node in graph.proto.graph.node}
        self._rounded: dict[str, str] = {}  # value -> the value that is it, rounded
        self._added = _Added([], {}, {})
        self._by_cast = graph.opsets.get("", 1) >= _CAST_SINCE.get(kind, 1 << 30)

    def rewrite(self, borders: Callable[[Node], Borders]) -> Graph:
        for node in self._graph.nodes:
            if node.is_control_flow:
                raise GraphError(f"{node.name!r} ({node.kind}) carries graphs, which are not rewritten.")
            where = borders(node)
            proto = onnx.NodeProto()
            proto.CopyFrom(node.proto)
            if where != "none":
                structure = _STRUCTURE.get(node.op_type, set())
                for index, name in enumerate(node.inputs):
                    if name and index not in structure and node.input_dtype(index) == "float32":
                        proto.input[index] = self._want(name)
            self._added.nodes.append(proto)
            if where == "both":
                for index, name in enumerate(node.outputs):
                    if name and node.output_dtype(index) == "float32":
                        proto.output[index] = raw = self._name(f"{name}__exact")
                        self._round(raw, name)
                        self._rounded[name] = name
        return self._finish()

    def _want(self, name: str) -> str:
        if name not in self._rounded:
            new = self._rounded[name] = self._name(f"{name}__{self._kind}")
            tensor = self._graph.initializers.get(name)
            if tensor is None:
                self._round(name, new)
            elif is_external(tensor):
                array = round_array(np.asarray(self._graph.weights[name].numpy()), self._kind)
                held = ir.tensor(array, name=new)
                self._added.weights[new] = held
                self._added.tensors[new] = stub(new, held)
            else:
                array = round_array(numpy_helper.to_array(tensor), self._kind)
                self._added.tensors[new] = numpy_helper.from_array(array, new)
        return self._rounded[name]

    def _round(self, name: str, new: str) -> None:
        """Add nodes that round the value ``name`` to ``new``."""
        if self._by_cast:
            narrow = self._add("Cast", [name], to=elem_type(self._kind))
            self._add("Cast", [narrow], new, to=elem_type("float32"))
            return
        wide = self._add("Cast", [name], to=elem_type("float64"))
        scaled = self._add("Mul", [wide, self._constant(_factor(self._kind))])
        rest = self._add("Sub", [scaled, wide])
        kept = self._add("Cast", [self._add("Sub", [scaled, rest])], to=elem_type("float32"))
        self._add("Where", [self._add("IsInf", [name]), name, kept], new)

    def _constant(self, value: float) -> str:
        name = f"accelrt_factor_{self._kind}"
        if name not in self._added.tensors:
            self._added.tensors[name] = numpy_helper.from_array(np.asarray(value, np.float64), name)
        return name

    def _add(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or self._name(f"{inputs[0]}__{operator}")
        name = f"{output}/{operator}"
        while name in self._node_names:
            name += "_"
        self._node_names.add(name)
        self._added.nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output

    def _name(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _finish(self) -> Graph:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._graph.proto)
        proto.ir_version = max(proto.ir_version, 9)  # the first that knows 8-bit floats
        del proto.graph.node[:]
        del proto.graph.value_info[:]
        proto.graph.node.extend(self._added.nodes)
        read = {name for node in self._added.nodes for name in node.input}
        read.update(value.name for value in proto.graph.output)
        kept = [t for t in (*proto.graph.initializer, *self._added.tensors.values()) if t.name in read]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        weights = {**self._graph.weights, **self._added.weights}
        return Graph(proto, {name: tensor for name, tensor in weights.items() if name in read})


def float_bytes(type_: TensorType, kind: FloatKind | None) -> int | None:
    """Return the bytes of a tensor of which float32 is held as ``kind``; None where a size is open."""
    from accelrt.graph.types import static_bytes

    size = static_bytes(type_)
    if size is None or type_.dtype != "float32" or kind is None:
        return size
    return size // {"bfloat16": 2, "float16": 2, "tf32": 1, "float8_e4m3fn": 4}[kind]
