"""Folds batch normalisations into the convolutions before them, so that no engine has to.

``y = (conv(x, W) + b - mean) * scale / sqrt(variance + epsilon) + shift`` is a convolution of scaled weights with
another bias. Both are computed in float64 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from accelrt.graph.model import Graph, captures_of, names_in
from accelrt.graph.weights import stub

_SINCE = 9
"""The opset from which BatchNormalization has one scale a channel and no mode for tests."""
_EPSILON = 1e-5
"""The default of BatchNormalization's attribute."""


def fold_batch_norms(graph: Graph) -> Graph:
    """Return a graph without the batch normalisations whose input is a convolution that nothing else reads.

    Weights and statistics must be constants. The same object is returned where there is nothing to do; the argument
    is never changed.
    """
    if graph.opsets.get("", 0) < _SINCE:
        return graph
    folder = _Folder(graph)
    return folder.folded()


class _Folder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.taken = names_in(graph.proto.graph)
        self.new: dict[str, Any] = {}  # tensors of onnx_ir

    def folded(self) -> Graph:
        nodes = list(self.graph.proto.graph.node)
        uses = Counter(name for node in nodes for name in (*node.input, *captures_of(node)))
        uses.update(value.name for value in self.graph.proto.graph.output)
        makers = {name: index for index, node in enumerate(nodes) for name in node.output}
        replaced: dict[int, onnx.NodeProto | None] = {}
        for index, norm in enumerate(nodes):
            before = makers.get(norm.input[0]) if _normalises(norm) else None
            if before is None or uses[norm.input[0]] != 1 or before in replaced:
                continue
            if (conv := self._joined(nodes[before], norm)) is not None:
                replaced[before], replaced[index] = conv, None
        if not replaced:
            return self.graph
        kept = [replaced.get(index, node) for index, node in enumerate(nodes)]
        return self._with([node for node in kept if node is not None])

    def _joined(self, conv: onnx.NodeProto, norm: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return a convolution that does the work of both, None if something is no constant."""
        if conv.op_type != "Conv" or conv.domain not in ("", "ai.onnx"):
            return None
        weight = self._value(conv.input[1])
        bias = self._value(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else np.zeros((), np.float32)
        statistics = [self._value(name) for name in norm.input[1:5]]
        if weight is None or bias is None or any(item is None for item in statistics):
            return None
        if weight.dtype not in (np.float32, np.float64):
            return None  # what is rounded already would be rounded again
        scale, shift, mean, variance = (np.asarray(item, np.float64) for item in statistics)
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _EPSILON)
        factor = scale / np.sqrt(variance + epsilon)
        if not np.isfinite(factor).all():
            return None
        scaled = np.asarray(weight, np.float64) * factor.reshape([-1] + [1] * (weight.ndim - 1))
        moved = (np.asarray(bias, np.float64) - mean) * factor + shift
        joined = onnx.NodeProto()
        joined.CopyFrom(conv)
        del joined.input[1:]
        joined.input.extend(
            [self._add(f"{conv.input[1]}_folded", scaled, weight.dtype), self._add("bias_folded", moved, weight.dtype)]
        )
        joined.output[0] = norm.output[0]
        return joined

    def _value(self, name: str) -> Any:
        if name in self.graph.weights:
            return self.graph.weights[name].numpy()
        return self.graph.constants.get(name)

    def _add(self, name: str, array: np.ndarray[Any, Any], dtype: Any) -> str:
        unique, count = name, 1
        while unique in self.taken:
            unique, count = f"{name}_{count}", count + 1
        self.taken.add(unique)
        self.new[unique] = ir.tensor(array.astype(dtype), name=unique)
        return unique

    def _with(self, nodes: list[onnx.NodeProto]) -> Graph:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.graph.proto)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        read = {name for node in nodes for name in (*node.input, *captures_of(node))}
        read.update(value.name for value in proto.graph.output)
        kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend([*kept, *(stub(name, tensor) for name, tensor in self.new.items())])
        weights: Mapping[str, Any] = {
            **{name: tensor for name, tensor in self.graph.weights.items() if name in read},
            **self.new,
        }
        return Graph(proto, weights)


def _normalises(node: onnx.NodeProto) -> bool:
    """Tell whether a node is a batch normalisation as it is after training, with one output."""
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
        return False
    return len([name for name in node.output if name]) == 1 and not any(
        a.name == "training_mode" and a.i for a in node.attribute
    )
