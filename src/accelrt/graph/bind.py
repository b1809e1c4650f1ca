"""Bind the first dimension of every input to a number: how one graph is specialised to a batch size."""

from __future__ import annotations

import onnx

from accelrt.errors import GraphError
from accelrt.graph.model import Graph
from accelrt.graph.types import Signature, TensorType


def first_dimension(signature: Signature) -> tuple[str | None, str]:
    """Find the open first dimension that all inputs and outputs share.

    Dimensions without a name fit any. Outputs may call theirs as they like, since exporters often do not say; whether
    it is the same one is for `accelrt.partition.rows` to prove.

    Returns:
        Its name, None if no input names it, and the reason why there is none: empty if there is.
    """
    if not signature.inputs or not signature.outputs:
        return None, "the model has no inputs or no outputs"
    names: dict[str, str] = {}
    for port in (*signature.inputs, *signature.outputs):
        kind = "input" if port in signature.inputs else "output"
        if not isinstance(port.type, TensorType):
            return None, f"{kind} {port.name!r} is {port.type}, no tensor"
        if not (shape := port.type.shape):
            return None, f"{kind} {port.name!r} is {'of unknown rank' if shape is None else 'a scalar'}"
        if isinstance(shape[0], int) and kind == "input":
            return None, f"the first dimension of input {port.name!r} is fixed to {shape[0]}"
        if isinstance(shape[0], int):
            return None, f"the first dimension of output {port.name!r} is {shape[0]} whatever the inputs are"
        if kind == "input" and isinstance(shape[0], str):
            names.setdefault(shape[0], port.name)
    if len(names) > 1:
        (one, first), (two, second), *_ = names.items()
        return None, f"inputs {first!r} and {second!r} begin with different dimensions, {one!r} and {two!r}"
    name = next(iter(names), None)
    for port in signature.inputs:
        if isinstance(port.type, TensorType) and name is not None and name in (port.type.shape or ())[1:]:
            return None, f"input {port.name!r} has the dimension {name!r} a second time"
    return name, ""


def bind_first_dimension(graph: Graph, size: int) -> Graph:
    """Return the graph with the first dimension of every input set to ``size``; names of nodes and values stay.

    Raises:
        GraphError: There is no such dimension.
    """
    name, reason = first_dimension(graph.signature)
    if reason:
        raise GraphError(f"The model has no batch dimension to bind: {reason}.")
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = size
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if name is None or value.type.WhichOneof("value") != "tensor_type":
            continue
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == name:
                dim.dim_value = size
    for value in proto.graph.output:
        # Inference knows better what an output's dimension is than a name that nothing is bound to.
        first = value.type.tensor_type.shape.dim
        if first and first[0].HasField("dim_param"):
            first[0].Clear()
    return graph.with_proto(proto)
