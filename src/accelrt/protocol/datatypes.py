"""Data types as the protocol names them, and tensors as it lays them out raw.

Raw tensors are C order and little endian; each element of BYTES is preceded by its length in four bytes.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from accelrt.errors import RequestError, RequestTooLarge
from accelrt.graph.types import numpy_dtype

Array: TypeAlias = npt.NDArray[Any]

DTYPES = MappingProxyType(
    {
        "BOOL": "bool",
        "UINT8": "uint8",
        "UINT16": "uint16",
        "UINT32": "uint32",
        "UINT64": "uint64",
        "INT8": "int8",
        "INT16": "int16",
        "INT32": "int32",
        "INT64": "int64",
        "FP16": "float16",
        "BF16": "bfloat16",
        "FP32": "float32",
        "FP64": "float64",
        "BYTES": "string",
    }
)
"""accelrt's name of each of the protocol's data types."""

DATATYPES = MappingProxyType({dtype: datatype for datatype, dtype in DTYPES.items()})
"""The protocol's name of each of accelrt's that it has one for."""

MOST_DIMENSIONS = 32
"""More than any model has; numpy's own limit is 64."""

MOST_TEXTS = 1 << 20
"""Elements of one BYTES tensor: an empty text is four bytes on the wire and some forty in memory."""

_SWAP = sys.byteorder == "big"
_LENGTH = struct.Struct("<I")


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a datatype; text is an object array.

    Raises:
        RequestError: The protocol has no such datatype.
    """
    try:
        return numpy_dtype(DTYPES[datatype])
    except KeyError:
        raise RequestError(
            f"The protocol has no datatype {datatype[:40]!r}.", hint=f"It has {', '.join(DTYPES)}."
        ) from None


def datatype_of(array: Array) -> str:
    """Return the protocol's name of an array's type.

    Raises:
        RequestError: The protocol has none for it.
    """
    return _datatype_of(array.dtype)


@lru_cache(256)  # numpy makes the name of a dtype anew each time, in microseconds
def _datatype_of(dtype: np.dtype[Any]) -> str:
    name = "string" if dtype.hasobject or dtype.kind in "SU" else dtype.name
    try:
        return DATATYPES[name]
    except KeyError:
        raise RequestError(
            f"The protocol cannot carry tensors of {dtype.name}.", hint=f"It has {', '.join(DTYPES)}."
        ) from None


def elements(name: str, shape: Sequence[int]) -> int:
    """Return how many elements a shape has.

    Raises:
        RequestError: A size is negative, or there are more than `MOST_DIMENSIONS`.
    """
    if len(shape) > MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise RequestError(f"Tensor {name!r} has no possible shape: {list(shape[: MOST_DIMENSIONS + 1])}.")
    return prod(shape)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> Array:
    """Return a tensor from its raw bytes: a view of them where they are aligned, else a copy.

    Raises:
        RequestError: They are not what the datatype and the shape say.
        RequestTooLarge: More than `MOST_TEXTS` texts.
    """
    count, dtype = elements(name, shape), dtype_of(datatype)
    if datatype == "BYTES":
        return _texts(name, shape, count, raw)
    if count * dtype.itemsize != len(raw):
        raise RequestError(
            f"Tensor {name!r} of {datatype}{list(shape)} takes {count * dtype.itemsize} bytes, and {len(raw)} came."
        )
    if count == 0:
        return np.empty(shape, dtype)
    array: Array = np.frombuffer(raw, np.uint8)
    if datatype == "BOOL":
        # Any other byte would be a bool that is neither true nor false.
        return (array != 0).reshape(shape) if array.max() > 1 else array.view(np.bool_).reshape(shape)
    array = array.view(dtype).reshape(shape)
    if _SWAP:
        return array.byteswap()
    return array if array.flags.aligned else array.copy()


def to_raw(array: Array) -> bytes | memoryview:
    """Return a tensor's raw bytes: a view of its memory where that is in order.

    Raises:
        RequestError: Its type has no name in the protocol.
    """
    if datatype_of(array) == "BYTES":
        return b"".join(part for text in _as_bytes(array) for part in (_LENGTH.pack(len(text)), text))
    if _SWAP:
        array = array.byteswap()
    if not array.size:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _as_bytes(array: Array) -> list[bytes]:
    return [text if isinstance(text, bytes) else str(text).encode() for text in array.reshape(-1).tolist()]


def _texts(name: str, shape: Sequence[int], count: int, raw: memoryview) -> Array:
    if count > MOST_TEXTS:
        raise RequestTooLarge(f"Tensor {name!r} has {count} texts; the most is {MOST_TEXTS}.")
    if count * 4 > len(raw):
        raise RequestError(f"Tensor {name!r} has {count} texts, and {len(raw)} bytes came.")
    data, at, end = bytes(raw), 0, len(raw)
    array = np.empty(count, object)
    for index in range(count):
        start = at + 4
        at = start + _LENGTH.unpack_from(data, at)[0] if start <= end else end + 1
        if at > end:
            raise RequestError(f"Tensor {name!r} ends within its text {index} of {count}.")
        array[index] = data[start:at]
    if at != end:
        raise RequestError(f"Tensor {name!r} has {end - at} bytes after its {count} texts.")
    return array.reshape(shape)


_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
TYPED = frozenset(_FIELDS)
"""Datatypes that can be sent as typed contents; the others are sent raw only."""


def from_contents(name: str, datatype: str, shape: Sequence[int], contents: bytes | memoryview) -> Array:
    """Return a tensor from its typed contents, a serialised ``InferTensorContents``.

    Raises:
        RequestError: They are not what the datatype and the shape say.
        RequestTooLarge: More than `MOST_TEXTS` texts.
    """
    from google.protobuf.message import DecodeError

    from accelrt.protocol.messages import message

    count, dtype = elements(name, shape), dtype_of(datatype)
    if datatype not in TYPED:
        raise RequestError(f"Tensor {name!r} is of {datatype}, which is sent raw only.", hint="Use raw_input_contents.")
    if count > MOST_TEXTS and datatype == "BYTES":
        raise RequestTooLarge(f"Tensor {name!r} has {count} texts; the most is {MOST_TEXTS}.")
    try:
        parsed = message("InferTensorContents").FromString(bytes(contents))
    except DecodeError:
        raise RequestError(f"The contents of tensor {name!r} are no InferTensorContents.") from None
    field = _FIELDS[datatype]
    if others := [found.name for found, _ in parsed.ListFields() if found.name != field]:
        raise RequestError(f"Tensor {name!r} of {datatype} takes {field}, and {', '.join(others)} came.")
    values = getattr(parsed, field)
    if len(values) != count:
        raise RequestError(
            f"Tensor {name!r} of {datatype}{list(shape)} takes {count} elements, and {len(values)} came."
        )
    if datatype == "BYTES":
        texts = np.empty(count, object)
        texts[:] = list(values)
        return texts.reshape(shape)
    wide: Any = {"int_contents": np.int32, "uint_contents": np.uint32}.get(field, dtype)
    array = np.fromiter(values, wide, count)
    narrow = array.astype(dtype)
    if not np.array_equal(narrow, array, equal_nan=dtype.kind == "f"):
        raise RequestError(f"Tensor {name!r} has numbers that {datatype} cannot hold.")
    return narrow.reshape(shape)


def to_contents(array: Array) -> bytes:
    """Return a tensor of a datatype in `TYPED` as a serialised ``InferTensorContents``."""
    from accelrt.protocol.messages import message

    datatype = datatype_of(array)
    values = _as_bytes(array) if datatype == "BYTES" else array.reshape(-1).tolist()
    return bytes(message("InferTensorContents")(**{_FIELDS[datatype]: values}).SerializeToString())
