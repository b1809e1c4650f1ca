"""Models as TensorRT's parser is to see them: nodes on trial, and segments cast to 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from accelrt.graph.cast import cast_floats
from accelrt.graph.convert import elem_type
from accelrt.graph.load import load_graph
from accelrt.graph.model import bodies_of, captures_of
from accelrt.graph.node import Node
from accelrt.graph.trial import single_node_model
from accelrt.graph.types import TensorType, bits_of, numpy_dtype
from accelrt.graph.weights import Extent, WeightFile, is_external, point_at

DTYPES = frozenset(
    {
        "float32",
        "float16",
        "bfloat16",
        "int8",
        "uint8",
        "int32",
        "int64",
        "bool",
        "float8_e4m3fn",
        "int4",
        "float4_e2m1fn",
    }
)
"""What TensorRT computes in or takes. Its parser also takes float64, and narrows it to float32 unasked."""

HALF = {"fp16": "float16", "bf16": "bfloat16"}

SENSITIVE = frozenset(
    {
        "Exp", "Log", "Pow", "Softmax", "LogSoftmax", "CumSum", "LayerNormalization", "GroupNormalization",
        "InstanceNormalization", "RMSNormalization", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
        "ReduceProd", "ReduceSum", "ReduceSumSquare", "SoftmaxCrossEntropyLoss", "Resize", "GridSample", "Range",
    }
)  # fmt: skip
"""Operators that stay in float32: their sums and powers leave the range of 16 bits, or their inputs are positions. In a
strongly typed network the builder does not choose, so this does what its own choice did up to TensorRT 10."""

_PARAMETERS: Mapping[str, Sequence[int]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "BatchNormalization": (1, 2, 3, 4),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (0, 1, 2),
    "PRelu": (1,),
}
"""Inputs that are weights in nearly every model, and that the parser may want to be: on trial they are, if their sizes
are known. A model that computes them may then be refused when it is built, and goes to the next engine."""

_FILLED = 1 << 16
_ZEROS = "zeros.bin"


def unusual(node: Node) -> str | None:
    """Return why TensorRT is not asked about a node: values that it does not have, or would change."""
    for name, type_ in zip(
        (*node.inputs, *node.captures, *node.outputs),
        (*node.input_types, *node.capture_types, *node.output_types),
        strict=True,
    ):
        if not name:
            continue
        if type_ is None:
            return f"the type of {name!r} is not known"
        if not isinstance(type_, TensorType):
            return f"{name!r} is {type_}, no tensor"
        if type_.dtype not in DTYPES:
            return f"TensorRT does not compute in {type_.dtype}, which {name!r} is of"
        if type_.shape is None and name not in node.outputs:
            return f"the rank of {name!r} is not known"
    for body in node.bodies:
        for inner in body:
            wrong = (t for t in inner.output_types if isinstance(t, TensorType) and t.dtype not in DTYPES)
            if (found := next(wrong, None)) is not None:
                return f"TensorRT does not compute in {found.dtype}, which its body {inner.name!r} does"
    return None


def key_of(node: Node) -> tuple[object, ...]:
    """Return all that a verdict on a node depends on."""
    types = (*node.input_types, *node.output_types, *node.capture_types)
    return (node.signature, tuple(str(type_) for type_ in types))


def trial_of(node: Node) -> tuple[bytes, list[str]]:
    """Return a node as a model of its own, and the inputs that are to be weights in it."""
    places = _PARAMETERS.get(node.op_type, ()) if not node.domain else ()
    weights = [
        node.inputs[place]
        for place in places
        if node.has_input(place)
        and place not in node.constants
        and all(isinstance(dim, int) for dim in node.input_shape(place) or (None,))
    ]
    return bytes(single_node_model(node).SerializeToString()), weights


def prepared(data: bytes, weights: Sequence[str], precision: str, prefix: str) -> onnx.ModelProto:
    """Return a trial as the parser is to see it: cast, its weights initialisers, and every name behind a prefix.

    Raises:
        AccelrtError: It cannot be cast.
    """
    proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    proto.graph.node[0].name = proto.graph.node[0].name or proto.graph.node[0].op_type
    if (dtype := HALF.get(precision)) is not None:
        proto = _halved(proto, dtype, weights)
    for value in [value for value in proto.graph.input if value.name in set(weights)]:
        tensor = value.type.tensor_type
        _give_weight(proto.graph, value.name, tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim])
        proto.graph.input.remove(value)
    _prefix(proto.graph, prefix)
    return proto


def _halved(proto: onnx.ModelProto, dtype: str, weights: Sequence[str]) -> onnx.ModelProto:
    halved = onnx.ModelProto()
    halved.CopyFrom(cast_floats(load_graph(proto), dtype, _is_sensitive).proto)
    for node in [node for node in halved.graph.node if node.op_type == "Cast" and node.input[0] in set(weights)]:
        # What a session casts once and for all is a weight of 16 bits, not a weight behind a Cast.
        source = next(value for value in halved.graph.input if value.name == node.input[0])
        dims = [dim.dim_value for dim in source.type.tensor_type.shape.dim]
        _give_weight(halved.graph, node.output[0], elem_type(dtype), dims)
        halved.graph.node.remove(node)
        if not any(source.name in other.input for other in halved.graph.node):
            halved.graph.input.remove(source)
    return halved


def _is_sensitive(node: Node) -> bool:
    return node.op_type in SENSITIVE


def _give_weight(graph: onnx.GraphProto, name: str, kind: int, dims: Sequence[int]) -> None:
    """Add a weight whose values do not matter: ones where there are few, since scales must not be 0; else zeros."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    count = int(np.prod(dims, dtype=np.int64))
    size = (count * bits_of(dtype.name) + 7) // 8
    if size <= _FILLED and bits_of(dtype.name) >= 8:
        value = np.ones(dims, dtype) if dtype.kind not in "iu" else np.zeros(dims, dtype)
        graph.initializer.append(numpy_helper.from_array(value, name))
        return
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims)
    point_at(tensor, Extent(0, size), _ZEROS)
    graph.initializer.append(tensor)


def _prefix(graph: onnx.GraphProto, prefix: str) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = prefix + value.name
    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = [prefix + name if name else "" for name in node.input]
        node.output[:] = [prefix + name if name else "" for name in node.output]
        for body in bodies_of(node):
            _prefix(body, prefix)


def together(models: Iterable[onnx.ModelProto]) -> onnx.ModelProto:
    """Return one model of many, side by side; all import the same operator sets."""
    whole = onnx.ModelProto(ir_version=onnx.IR_VERSION)
    whole.graph.name = "trial"
    for model in models:
        if not whole.opset_import:
            whole.opset_import.extend(model.opset_import)
        whole.graph.node.extend(model.graph.node)
        whole.graph.input.extend(model.graph.input)
        whole.graph.output.extend(model.graph.output)
        whole.graph.initializer.extend(model.graph.initializer)
    return whole


def write_zeros(folder: Path, models: Iterable[onnx.ModelProto]) -> None:
    """Write the file that stands for large weights: a hole as long as the longest, which takes no room on the disk."""
    sizes = (
        int(entry.value)
        for model in models
        for tensor in model.graph.initializer
        if is_external(tensor)
        for entry in tensor.external_data
        if entry.key == "length"
    )
    with (folder / _ZEROS).open("wb") as file:
        file.truncate(max(sizes, default=0))


def segment(model: Path, precision: str, halves: WeightFile) -> bytes:
    """Return the structure of a segment as the parser is to see it; its weights stay in the files beside ``model``.

    Args:
        model: The ONNX file.
        precision: What to compute in; ``fp16`` and ``bf16`` cast.
        halves: Takes the weights that are cast, each once. In the folder of the model.

    Raises:
        GraphError: It cannot be read.
    """
    dtype = HALF.get(precision)
    if dtype is None:
        return model.read_bytes()
    graph = load_graph(model)
    proto = onnx.ModelProto()
    proto.CopyFrom(cast_floats(graph, dtype, _is_sensitive).proto)
    where = {tensor.name: tensor for tensor in onnx.load(model, load_external_data=False).graph.initializer}
    for tensor in proto.graph.initializer:
        if is_external(tensor):
            tensor.CopyFrom(where[tensor.name])
    _halve_weights(proto.graph, graph.weights, dtype, halves)
    return bytes(proto.SerializeToString())


def _halve_weights(graph: onnx.GraphProto, weights: Mapping[str, Any], dtype: str, halves: WeightFile) -> None:
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
        if node.op_type == "Cast" and node.input[0] in weights and to == elem_type(dtype):
            with np.errstate(over="ignore"):
                value = np.asarray(weights[node.input[0]].numpy()).astype(numpy_dtype(dtype))
            tensor = onnx.TensorProto(name=node.output[0], data_type=elem_type(dtype), dims=value.shape)
            point_at(tensor, halves.add(value.reshape(-1).view(np.uint8).data), halves.path.name)
            graph.initializer.append(tensor)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in graph.node for name in (*node.input, *captures_of(node))}
    read.update(value.name for value in graph.output)
    wanted = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(wanted)
    halves.flush()
