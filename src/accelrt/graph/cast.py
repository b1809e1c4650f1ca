"""Cast a graph's float32 to another float type, with Casts wherever the two meet.

Inputs and outputs keep their types. A value may exist in both types: ``x`` is the float32 one, ``x__float64`` the
cast one; each is made when the first node wants it. Nodes with bodies, and operators that do not take the type, stay
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from accelrt.graph.convert import elem_type
from accelrt.graph.model import Graph, names_in, with_nodes
from accelrt.graph.node import Node
from accelrt.graph.types import TensorType, numpy_dtype

_FLOAT = int(onnx.TensorProto.FLOAT)
_TYPE_NAMES = {"float64": "tensor(double)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def cast_floats(graph: Graph, dtype: str, keep: Callable[[Node], bool] = lambda _: False) -> Graph:
    """Return a graph that computes in ``dtype`` what this one computes in float32.

    Args:
        graph: What to cast; it stays as it is.
        dtype: ``float64``, ``float16`` or ``bfloat16``.
        keep: Tells the nodes that stay in float32.
    """
    return _Caster(graph, dtype).cast(keep)


class _Caster:
    def __init__(self, graph: Graph, dtype: str) -> None:
        self._graph, self._dtype, self._type_name = graph, dtype, _TYPE_NAMES[dtype]
        self._elem_type = elem_type(dtype)
        self._taken = names_in(graph.proto.graph)
        self._cast: dict[str, str] = {}  # float32 name -> name of the cast value
        self._plain: set[str] = {value.name for value in graph.proto.graph.input} | set(graph.initializers)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []

    def cast(self, keep: Callable[[Node], bool]) -> Graph:
        for node in self._graph.nodes:
            places = None if keep(node) else self._places(node)
            proto = onnx.NodeProto()
            proto.CopyFrom(node.proto)
            if places is None:
                for name in node.reads:
                    self._want_plain(name)
                self._plain.update(node.writes)
            else:
                reads, writes = places
                for index, name in enumerate(node.inputs):
                    if index in reads:
                        proto.input[index] = self._want_cast(name)
                    elif name:
                        self._want_plain(name)
                for index, name in enumerate(node.outputs):
                    if index in writes:
                        proto.output[index] = self._cast[name] = self._name(name)
                    elif name:
                        self._plain.add(name)
                if node.op_type == "Cast":
                    next(a for a in proto.attribute if a.name == "to").i = self._elem_type
            self._nodes.append(proto)
        for value in self._graph.proto.graph.output:
            self._want_plain(value.name)
        return with_nodes(self._graph, self._nodes, self._tensors)

    def _places(self, node: Node) -> tuple[set[int], set[int]] | None:
        """Return which inputs and outputs of a node take the type, None if it stays in float32."""
        if node.is_control_flow:
            return None
        try:
            schema = onnx.defs.get_schema(node.op_type, node.opset, node.domain)
        except onnx.defs.SchemaError:
            return None
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        reads = self._chosen(node.inputs, node.input_types, schema.inputs, allowed)
        writes = self._chosen(node.outputs, node.output_types, schema.outputs, allowed)
        if reads is None or writes is None or not writes or (not reads and node.op_type != "Cast"):
            return None
        return reads, writes

    def _chosen(
        self, names: tuple[str, ...], types: tuple[Any, ...], parameters: Any, allowed: dict[str, set[str]]
    ) -> set[int] | None:
        chosen: set[int] = set()
        for index, (name, type_) in enumerate(zip(names, types, strict=True)):
            if not name or not isinstance(type_, TensorType) or type_.dtype != "float32":
                continue
            variable = parameters[min(index, len(parameters) - 1)].type_str
            if variable not in allowed:
                continue  # always float32
            if self._type_name not in allowed[variable]:
                return None
            chosen.add(index)
        return chosen

    def _name(self, name: str) -> str:
        new = f"{name}__{self._dtype}"
        while new in self._taken:
            new += "_"
        self._taken.add(new)
        return new

    def _want_cast(self, name: str) -> str:
        if name not in self._cast:
            self._cast[name] = new = self._name(name)
            if (value := self._graph.constants.get(name)) is not None:
                with np.errstate(over="ignore"):
                    self._tensors.append(numpy_helper.from_array(value.astype(numpy_dtype(self._dtype)), new))
            else:
                self._nodes.append(helper.make_node("Cast", [name], [new], name=new, to=self._elem_type))
        return self._cast[name]

    def _want_plain(self, name: str) -> None:
        if name not in self._plain and name in self._cast:
            self._plain.add(name)
            self._nodes.append(helper.make_node("Cast", [self._cast[name]], [name], name=f"{name}__float32", to=_FLOAT))
