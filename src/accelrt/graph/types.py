"""Types of values that flow along a graph, and the signature of a model. Needs nothing but numpy.

Data types are named as numpy and ml_dtypes name them: ``float32``, ``bfloat16``, ``float8_e4m3fn``, ``int4``,
``bool``; text is ``string`` and held in object arrays, as ONNX's own Python tools do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np

Dim: TypeAlias = int | str | None
"""A static size, the name of a symbolic one, or None where nothing is known."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor of ``dtype`` and ``shape``; a shape of None means that even the rank is unknown."""

    dtype: str
    shape: tuple[Dim, ...] | None = None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[...]"
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True, slots=True)
class SequenceType:
    """A Python list of values of one type."""

    element: ValueType

    def __str__(self) -> str:
        return f"sequence({self.element})"


@dataclass(frozen=True, slots=True)
class OptionalType:
    """A value of one type, or None."""

    element: ValueType

    def __str__(self) -> str:
        return f"optional({self.element})"


ValueType: TypeAlias = TensorType | SequenceType | OptionalType

Value: TypeAlias = Any
"""What flows at run time: a numpy array, a list of values (sequence), or None (empty optional)."""


@dataclass(frozen=True, slots=True)
class Port:
    """One named input or output of a model."""

    name: str
    type: ValueType

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs and outputs of a model, in its own order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(port.name for port in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(port.name for port in self.outputs)

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"

    def to_json(self) -> dict[str, object]:
        """Return plain data that `from_json` reads back."""
        return {
            side: [{"name": port.name, "type": type_to_json(port.type)} for port in ports]
            for side, ports in (("inputs", self.inputs), ("outputs", self.outputs))
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """Rebuild a signature.

        Raises:
            ValueError, KeyError, TypeError: ``data`` is not what `to_json` writes.
        """
        return cls(*(_ports(data[side]) for side in ("inputs", "outputs")))


def _ports(items: object) -> tuple[Port, ...]:
    if not isinstance(items, list):
        raise TypeError(f"ports must be a list, not {type(items).__name__}")
    for item in items:
        if not isinstance(item["name"], str):
            raise TypeError(f"the name of a port must be text, not {item['name']!r}")
    return tuple(Port(item["name"], type_from_json(item["type"])) for item in items)


def type_to_json(type_: ValueType) -> dict[str, object]:
    """Return a value type as plain data."""
    match type_:
        case TensorType(dtype, shape):
            return {"tensor": dtype, "shape": None if shape is None else list(shape)}
        case SequenceType(element):
            return {"sequence": type_to_json(element)}
        case OptionalType(element):
            return {"optional": type_to_json(element)}


def type_from_json(data: Mapping[str, Any], depth: int = 0) -> ValueType:
    """Rebuild a value type.

    Raises:
        ValueError, KeyError, TypeError: ``data`` is not what `type_to_json` writes.
    """
    if depth > 8:
        raise ValueError("a value type nests more than eight deep")
    if "sequence" in data:
        return SequenceType(type_from_json(data["sequence"], depth + 1))
    if "optional" in data:
        return OptionalType(type_from_json(data["optional"], depth + 1))
    numpy_dtype(data["tensor"])
    shape = data["shape"]
    if shape is None:
        return TensorType(data["tensor"])
    if not isinstance(shape, list) or not all(_is_dim(d) for d in shape):
        raise ValueError(f"not a shape: {shape!r}")
    return TensorType(data["tensor"], tuple(shape))


def _is_dim(dim: object) -> bool:
    return dim is None or isinstance(dim, str) or (type(dim) is int and dim >= 0)


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a data type's name; text is an object array.

    Raises:
        ValueError: No data type has this name.
    """
    if name == "string":
        return np.dtype(object)
    if name in _NATIVE:
        return np.dtype(name)
    if name in _EXTENDED:
        import ml_dtypes  # an import of 5 ms that most models never need

        return cast("np.dtype[Any]", np.dtype(getattr(ml_dtypes, name)))
    raise ValueError(f"not a data type: {name!r}")


_NATIVE = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)
_EXTENDED = frozenset(
    {"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"}
    | {"float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int4", "uint4", "int2", "uint2"}
)
_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}


def bits_of(dtype: str) -> int:
    """Return the stored size of one element in bits: sub-byte types are packed; text counts as 0."""
    if dtype == "string":
        return 0
    return _BITS.get(dtype) or numpy_dtype(dtype).itemsize * 8


def static_bytes(type_: ValueType | None) -> int | None:
    """Return the size of a value in bytes where its type tells it, None where a dimension is open."""
    if not isinstance(type_, TensorType) or type_.shape is None or type_.dtype == "string":
        return None
    count = 1
    for dim in type_.shape:
        if not isinstance(dim, int):
            return None
        count *= dim
    return (count * bits_of(type_.dtype) + 7) // 8


def shareable(type_: ValueType | None) -> bool:
    """Tell whether values of a type can be handed from one runtime to another where they lie: tensors of numpy's own
    dtypes, which every reader of DLPack knows."""
    return isinstance(type_, TensorType) and type_.dtype in _NATIVE
