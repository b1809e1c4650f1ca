"""ONNX types and attributes as the plain data of `accelrt.graph.types` and `accelrt.graph.node`."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, numpy_helper

from accelrt.errors import GraphError
from accelrt.graph.types import Dim, OptionalType, SequenceType, TensorType, ValueType, numpy_dtype


def dtype_name(elem_type: int) -> str | None:
    """Return the name of an ONNX element type; None for UNDEFINED.

    Raises:
        GraphError: ONNX of this version has no such type.
    """
    if elem_type == onnx.TensorProto.UNDEFINED:
        return None
    try:
        return "string" if elem_type == onnx.TensorProto.STRING else helper.tensor_dtype_to_np_dtype(elem_type).name
    except KeyError as error:
        raise GraphError(
            f"A value has element type {elem_type}, which ONNX {onnx.__version__} does not know."
        ) from error


def elem_type(dtype: str) -> int:
    """Return the ONNX element type of a data type's name."""
    if dtype == "string":
        return int(onnx.TensorProto.STRING)
    return int(helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype)))


def from_type_proto(proto: onnx.TypeProto) -> ValueType | None:
    """Return the value type of a TypeProto; None where it is unknown or of a kind that has no counterpart (maps)."""
    which = proto.WhichOneof("value")
    if which == "tensor_type":
        dtype = dtype_name(proto.tensor_type.elem_type)
        return None if dtype is None else TensorType(dtype, _shape(proto.tensor_type))
    if which == "sequence_type":
        element = from_type_proto(proto.sequence_type.elem_type)
        return None if element is None else SequenceType(element)
    if which == "optional_type":
        element = from_type_proto(proto.optional_type.elem_type)
        return None if element is None else OptionalType(element)
    return None


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[Dim, ...] | None:
    if not tensor.HasField("shape"):
        return None
    dims: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param or None)
    return tuple(dims)


def to_type_proto(type_: ValueType) -> onnx.TypeProto:
    """Return the TypeProto of a value type."""
    match type_:
        case TensorType(dtype, shape):
            return helper.make_tensor_type_proto(elem_type(dtype), shape)
        case SequenceType(element):
            return helper.make_sequence_type_proto(to_type_proto(element))
        case OptionalType(element):
            return helper.make_optional_type_proto(to_type_proto(element))


def attribute_value(attribute: onnx.AttributeProto) -> Any:
    """Return an attribute as plain Python or numpy data; graphs are left to the caller."""
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list) or type(value).__name__ == "RepeatedScalarContainer":
        return tuple(item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else item for item in value)
    return value
