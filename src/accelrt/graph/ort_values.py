"""How values get into and out of onnxruntime's sessions, for every backend that has one; it is handed in, not imported.

Types that numpy lacks travel as bits in OrtValues; types of less than a byte are widened at a program's borders.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from accelrt.graph.types import OptionalType, SequenceType, Signature, TensorType, Value, ValueType, numpy_dtype

# How types that numpy lacks travel: with the same bits, in an unsigned integer of the same width.
SAME_BITS = {
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e4m3fnuz": np.uint8,
    "float8_e5m2": np.uint8,
    "float8_e5m2fnuz": np.uint8,
    "float8_e8m0fnu": np.uint8,
}
# How types of less than a byte travel: cast, without loss, at the borders of the program.
WIDER = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}


def is_plain(type_: ValueType) -> bool:
    """Whether onnxruntime's binding converts the type from and to numpy by itself."""
    match type_:
        case TensorType(dtype):
            return dtype not in SAME_BITS and dtype not in WIDER
        case SequenceType(element):
            return is_plain(element)
        case OptionalType():
            return False


def needs_bits(type_: ValueType) -> bool:
    """Whether numpy has no such type, so that values travel as bits, or wider."""
    return _base(type_).dtype in (*SAME_BITS, *WIDER)


def _base(type_: ValueType) -> TensorType:
    while not isinstance(type_, TensorType):
        type_ = type_.element
    return type_


def _is_sequence(type_: ValueType) -> bool:
    return isinstance(type_, SequenceType) or (isinstance(type_, OptionalType) and _is_sequence(type_.element))


def unreachable(signature: Signature) -> str | None:
    """Return which values onnxruntime's Python binding has no way to hand over, None if it has for all."""
    for port in (*signature.inputs, *signature.outputs):
        if _is_sequence(port.type) and needs_bits(port.type):
            return f"{port.name!r} is a {port.type}"
    if any(needs_bits(port.type) for port in signature.outputs):
        for port in signature.inputs:
            if _is_sequence(port.type):
                return f"the input {port.name!r} is a {port.type} while an output is of a type that numpy lacks"
    return None


def widen_borders(proto: Any, signature: Signature) -> None:
    """Let values of less than a byte enter and leave as bytes: the binding cannot hand them over."""
    from onnx import helper

    from accelrt.graph.convert import elem_type

    for ports, values, entering in (
        (signature.inputs, proto.graph.input, True),
        (signature.outputs, proto.graph.output, False),
    ):
        for port, value in zip(ports, values, strict=True):
            if not isinstance(port.type, TensorType) or port.type.dtype not in WIDER:
                continue
            inner = f"{port.name}__narrow"
            for node in proto.graph.node:
                names = node.input if entering else node.output
                names[:] = [inner if name == port.name else name for name in names]
                if not entering:  # what is an output may be read inside as well
                    node.input[:] = [inner if name == port.name else name for name in node.input]
            wide = elem_type(np.dtype(WIDER[port.type.dtype]).name)
            value.type.tensor_type.elem_type = wide
            if entering:
                cast = helper.make_node("Cast", [port.name], [inner], to=elem_type(port.type.dtype))
                proto.graph.node.insert(0, cast)
            else:
                proto.graph.node.append(helper.make_node("Cast", [inner], [port.name], to=wide))


class Feeder:
    """Makes OrtValues."""

    def __init__(self, ort: Any) -> None:
        from accelrt.graph.convert import elem_type

        self._make = ort.OrtValue
        self._elem_types = {name: elem_type(name) for name in SAME_BITS}

    def to_ort(self, value: Value, type_: ValueType) -> Any:
        """Return a tensor as an OrtValue, a sequence as it is, None for an empty optional."""
        match type_:
            case TensorType(dtype) if dtype in SAME_BITS:
                bits = value.view(SAME_BITS[dtype])
                return self._make.ortvalue_from_numpy_with_onnx_type(bits, self._elem_types[dtype])
            case TensorType(dtype):
                return self._make.ortvalue_from_numpy(np.asarray(value, WIDER.get(dtype)))
            case OptionalType(element):
                return None if value is None else self.to_ort(value, element)
            case SequenceType():
                return value


def from_ort(value: Any, type_: ValueType) -> Value:
    """Return an OrtValue on the CPU as an array, None if it is an empty optional."""
    if not value.has_value():
        return None
    match type_:
        case TensorType(dtype) if dtype in SAME_BITS:
            return _bits_of(value).view(numpy_dtype(dtype)).reshape(value.shape())
        case TensorType(dtype) if dtype in WIDER:
            return value.numpy().astype(numpy_dtype(dtype))
    return value.numpy()


def _bits_of(value: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Copy the bytes of an OrtValue whose type its own `numpy` does not know."""
    size = value.tensor_size_in_bytes()
    if size == 0:
        return np.empty(0, np.uint8)
    held = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(held, np.uint8).copy()
