"""How values get into and out of onnxruntime's sessions: as numpy arrays, as OrtValues where numpy has no type."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from accelrt.backend import Executable
from accelrt.graph.types import OptionalType, SequenceType, Signature, TensorType, Value, ValueType, numpy_dtype


def executable(ort: Any, session: Any, signature: Signature, *, io_binding: bool) -> Executable:
    """Wrap a session: the short way where numpy can hold every value, through OrtValues where it cannot."""
    types = [port.type for port in (*signature.inputs, *signature.outputs)]
    if io_binding and all(isinstance(type_, TensorType) for type_ in types):
        return _Bound(ort, session, signature)
    if all(map(_is_plain, types)):
        return _Plain(session, signature)
    return _Extended(ort, session, signature)


def _is_plain(type_: ValueType) -> bool:
    """Whether onnxruntime's binding converts the type from and to numpy by itself."""
    match type_:
        case TensorType(dtype):
            return dtype not in _SAME_BITS and dtype not in _WIDER
        case SequenceType(element):
            return _is_plain(element)
        case OptionalType():
            return False


def _needs_bits(type_: ValueType) -> bool:
    return _base(type_).dtype in (*_SAME_BITS, *_WIDER)


def _base(type_: ValueType) -> TensorType:
    while not isinstance(type_, TensorType):
        type_ = type_.element
    return type_


def _is_sequence(type_: ValueType) -> bool:
    return isinstance(type_, SequenceType) or (isinstance(type_, OptionalType) and _is_sequence(type_.element))


def unreachable(signature: Signature) -> str | None:
    """Return which values onnxruntime's Python binding has no way to hand over, None if it has for all."""
    for port in (*signature.inputs, *signature.outputs):
        if _is_sequence(port.type) and _needs_bits(port.type):
            return f"{port.name!r} is a {port.type}"
    if any(_needs_bits(port.type) for port in signature.outputs):
        for port in signature.inputs:
            if _is_sequence(port.type):
                return f"the input {port.name!r} is a {port.type} while an output is of a type that numpy lacks"
    return None


# How types that numpy lacks travel: with the same bits, in an unsigned integer of the same width.
_SAME_BITS = {
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e4m3fnuz": np.uint8,
    "float8_e5m2": np.uint8,
    "float8_e5m2fnuz": np.uint8,
    "float8_e8m0fnu": np.uint8,
}
# How types of less than a byte travel: cast, without loss, at the borders of the program.
_WIDER = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}


def widen_borders(proto: Any, signature: Signature) -> None:
    """Let values of less than a byte enter and leave as bytes: the binding cannot hand them over."""
    from onnx import helper

    from accelrt.graph.convert import elem_type

    for ports, values, entering in (
        (signature.inputs, proto.graph.input, True),
        (signature.outputs, proto.graph.output, False),
    ):
        for port, value in zip(ports, values, strict=True):
            if not isinstance(port.type, TensorType) or port.type.dtype not in _WIDER:
                continue
            inner = f"{port.name}__narrow"
            for node in proto.graph.node:
                names = node.input if entering else node.output
                names[:] = [inner if name == port.name else name for name in names]
                if not entering:  # what is an output may be read inside as well
                    node.input[:] = [inner if name == port.name else name for name in node.input]
            wide = elem_type(np.dtype(_WIDER[port.type.dtype]).name)
            value.type.tensor_type.elem_type = wide
            if entering:
                cast = helper.make_node("Cast", [port.name], [inner], to=elem_type(port.type.dtype))
                proto.graph.node.insert(0, cast)
            else:
                proto.graph.node.append(helper.make_node("Cast", [inner], [port.name], to=wide))


class _Plain(Executable):
    def __init__(self, session: Any, signature: Signature) -> None:
        self._session = session
        self._outputs = list(signature.output_names)
        # The binding below InferenceSession.run: the same call without checks that the session has already made.
        inner = getattr(session, "_sess", None)
        self._run = inner.run if inner is not None else session.run

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        return dict(zip(self._outputs, self._run(self._outputs, inputs, None), strict=True))

    def close(self) -> None:
        self._run = _closed
        self._session = None


class _Bound(Executable):
    """Tensors by IO binding: inputs are not copied, outputs are onnxruntime's own buffers."""

    def __init__(self, ort: Any, session: Any, signature: Signature) -> None:
        self._session, self._signature = session, signature
        self._feeder = _Feeder(ort)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        # A binding belongs to one call: several threads may be here at once.
        binding = self._session.io_binding()
        feeds = [(port.name, self._feeder.to_ort(inputs[port.name], port.type)) for port in self._signature.inputs]
        for name, value in feeds:
            binding.bind_ortvalue_input(name, value)
        for port in self._signature.outputs:
            binding.bind_output(port.name)
        self._session.run_with_iobinding(binding)
        outputs = zip(self._signature.outputs, binding.get_outputs(), strict=True)
        return {port.name: _from_ort(value, port.type) for port, value in outputs}

    def close(self) -> None:
        self._session = None


class _Extended(Executable):
    """Types that numpy lacks, optionals, and sequences beside them."""

    def __init__(self, ort: Any, session: Any, signature: Signature) -> None:
        self._session, self._signature = session, signature
        self._feeder = _Feeder(ort)
        # Outputs that numpy lacks are had as OrtValues only; sequences can then not be inputs (see `unreachable`).
        self._by_value = any(_needs_bits(port.type) for port in signature.outputs)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        feeds = {port.name: self._feeder.to_ort(inputs[port.name], port.type) for port in self._signature.inputs}
        feeds = {name: value for name, value in feeds.items() if value is not None}
        names = list(self._signature.output_names)
        if not self._by_value:
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        values = self._session.run_with_ort_values(names, feeds)
        outputs = zip(self._signature.outputs, values, strict=True)
        return {port.name: _from_ort(value, port.type) for port, value in outputs}

    def close(self) -> None:
        self._session = None


class _Feeder:
    """Makes OrtValues."""

    def __init__(self, ort: Any) -> None:
        from accelrt.graph.convert import elem_type

        self._make = ort.OrtValue
        self._elem_types = {name: elem_type(name) for name in _SAME_BITS}

    def to_ort(self, value: Value, type_: ValueType) -> Any:
        """Return a tensor as an OrtValue, a sequence as it is, None for an empty optional."""
        match type_:
            case TensorType(dtype) if dtype in _SAME_BITS:
                bits = value.view(_SAME_BITS[dtype])
                return self._make.ortvalue_from_numpy_with_onnx_type(bits, self._elem_types[dtype])
            case TensorType(dtype):
                return self._make.ortvalue_from_numpy(np.asarray(value, _WIDER.get(dtype)))
            case OptionalType(element):
                return None if value is None else self.to_ort(value, element)
            case SequenceType():
                return value


def _from_ort(value: Any, type_: ValueType) -> Value:
    if not value.has_value():
        return None
    match type_:
        case TensorType(dtype) if dtype in _SAME_BITS:
            return _bits_of(value).view(numpy_dtype(dtype)).reshape(value.shape())
        case TensorType(dtype) if dtype in _WIDER:
            return value.numpy().astype(numpy_dtype(dtype))
    return value.numpy()


def _bits_of(value: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Copy the bytes of an OrtValue whose type its own `numpy` does not know."""
    size = value.tensor_size_in_bytes()
    if size == 0:
        return np.empty(0, np.uint8)
    held = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(held, np.uint8).copy()


def _closed(*_: object) -> Any:
    raise RuntimeError("the executable was closed")
