"""Says where a graph of float32 is computed in bfloat16 or float16, by Casts that say so in the graph.

Products (convolutions, matrix products, attention) read and give halves. What follows them stays in halves where torch
accumulates in float32 by itself (normalisations, softmax, pools) or where one rounding more does not matter (sums,
activations, moves). Powers, roots, exponentials, reductions and whatever is not listed are computed in float32, and so
is what leads from integers to integers: a position of 257 is none in bfloat16. Inputs and outputs keep their types.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import onnx
from onnx import helper

from accelrt.graph.convert import elem_type, to_type_proto
from accelrt.graph.model import Graph, names_in
from accelrt.graph.node import Node
from accelrt.graph.types import TensorType

Half: TypeAlias = Literal["bfloat16", "float16"]

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention"})
FOLLOWERS = frozenset(
    "Add Sub Mul Div Neg Abs Relu LeakyRelu PRelu Elu Selu Celu Clip HardSigmoid HardSwish Mish Swish Gelu Erf Tanh "  # noqa: SIM905
    "Sigmoid Softplus Softsign ThresholdedRelu Shrink Sum Mean Max Min Where Identity Reshape Flatten Transpose "
    "Squeeze Unsqueeze Expand Tile Concat Split Slice Pad DepthToSpace SpaceToDepth Gather GatherElements GatherND "
    "Resize BatchNormalization InstanceNormalization LayerNormalization GroupNormalization RMSNormalization Softmax "
    "Dropout MaxPool AveragePool GlobalAveragePool GlobalMaxPool".split()
)
"""Operators that compute in halves where one of their inputs is in halves already."""
_ONE_OUTPUT = frozenset({"LayerNormalization", "BatchNormalization", "Dropout"})
"""Their further outputs are statistics or masks with types of their own."""
_FLOAT_INPUTS = {"Resize": {1, 2}, "Dropout": {1}, "BatchNormalization": {1, 2, 3, 4}}
"""Inputs that stay float32: they say what the operator is, or may have a type of their own."""
_CAST_SINCE = {"bfloat16": 13, "float16": 1}


def half_problem(opset: int, half: Half) -> str | None:
    """Return why a graph of this opset cannot say that it computes in halves, None if it can."""
    since = _CAST_SINCE[half]
    return None if opset >= since else f"{half} needs ONNX opset {since}, and the model is of opset {opset}"


def in_halves(graph: Graph, half: Half) -> Graph:
    """Return a graph that computes in ``half`` where that is worth it; the argument is not changed."""
    return _Halver(graph, half).halved()


class _Halver:
    def __init__(self, graph: Graph, half: Half) -> None:
        self.graph, self.half = graph, half
        self.taken = names_in(graph.proto.graph)
        self.halves: dict[str, str] = {}
        """The name that a value goes by in halves, for values that are to be had so."""
        self.native: set[str] = set()
        """Values that were computed in halves."""
        self.unmade: set[str] = set()
        """Those of them that nobody has wanted in float32 so far."""
        self.nodes: list[onnx.NodeProto] = []
        self.infos: list[onnx.ValueInfoProto] = []

    def halved(self) -> Graph:
        for node, proto in zip(self.graph.nodes, self.graph.proto.graph.node, strict=True):
            self._node(node, proto)
        for value in self.graph.proto.graph.output:
            self._in_float32(value.name)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.graph.proto)
        del proto.graph.node[:]
        proto.graph.node.extend(self.nodes)
        proto.graph.value_info.extend(self.infos)
        return Graph(proto, self.graph.weights)

    def _node(self, node: Node, proto: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(proto)
        if not self._computes_in_halves(node):
            for name in node.reads:
                self._in_float32(name)
            self.nodes.append(copy)
            return
        stays = _FLOAT_INPUTS.get(node.op_type, set())
        for index, name in enumerate(node.inputs):
            if node.input_dtype(index) != "float32":
                continue
            if index in stays:
                self._in_float32(name)
            else:
                copy.input[index] = self._in_half(name)
        for index, name in enumerate(node.outputs):
            if name and node.output_dtype(index) == "float32":
                copy.output[index] = self.halves[name] = self._unique(name)
                self.native.add(name)
                self.unmade.add(name)
                self._declare(name)
        self.nodes.append(copy)

    def _computes_in_halves(self, node: Node) -> bool:
        if node.domain or node.bodies or node.output_dtype(0) != "float32":
            return False
        if node.op_type in PRODUCTS:
            return True
        if node.op_type not in FOLLOWERS:
            return False
        if node.op_type in _ONE_OUTPUT and len(node.writes) > 1:
            return False
        if node.op_type == "Gather" and node.inputs[0] in self.graph.initializers:
            return len(node.input_shape(0) or ()) > 1  # a table of embeddings
        return any(name in self.native for name in node.inputs)

    def _in_half(self, name: str) -> str:
        if name not in self.halves:
            self.halves[name] = self._unique(name)
            self._declare(name)
            self.nodes.append(helper.make_node("Cast", [name], [self.halves[name]], to=elem_type(self.half)))
        return self.halves[name]

    def _in_float32(self, name: str) -> None:
        """See that a value is there in float32, under its own name."""
        if name in self.unmade:
            self.unmade.discard(name)
            self.nodes.append(helper.make_node("Cast", [self.halves[name]], [name], to=onnx.TensorProto.FLOAT))

    def _declare(self, name: str) -> None:
        type_ = self.graph.types.get(name)
        if isinstance(type_, TensorType):
            info = onnx.ValueInfoProto(name=self.halves[name])
            info.type.CopyFrom(to_type_proto(TensorType(self.half, type_.shape)))
            self.infos.append(info)

    def _unique(self, name: str) -> str:
        unique, count = f"{name}_half", 1
        while unique in self.taken:
            unique, count = f"{name}_half_{count}", count + 1
        self.taken.add(unique)
        return unique
