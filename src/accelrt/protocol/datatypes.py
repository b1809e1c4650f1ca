"""Data types as the protocol names them, and tensors as it lays them out raw: for clients and for both front ends.

Raw bytes are little endian, in C order, without padding; an element of BYTES is its length as an unsigned integer of
four bytes, then its bytes. What the other side says about sizes is held against what came before anything is allocated.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from accelrt.errors import RequestError, RequestTooLarge, ServingError
from accelrt.graph.types import numpy_dtype

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview

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
"""numpy's own limit before 2.0, and more than any operator takes."""

MOST_TEXTS = 1 << 20
"""Elements of one BYTES tensor: an empty text is four bytes on the wire and some forty in memory."""

_LENGTH = struct.Struct("<I")
_LARGEST = sys.maxsize
_SHOWN = 80


def shown(text: object) -> str:
    """Return what the other side sent as text for a message: quoted, and cut where it is long."""
    quoted = repr(text)
    return quoted if len(quoted) <= _SHOWN else f"{quoted[:_SHOWN]}..."


@cache
def _known(datatype: str) -> np.dtype[Any]:
    dtype = numpy_dtype(DTYPES[datatype])
    return dtype if dtype.kind == "O" or sys.byteorder == "little" else dtype.newbyteorder("<")


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a datatype: little endian, and objects for BYTES.

    Raises:
        RequestError: The protocol has no such datatype.
    """
    try:
        return _known(datatype)
    except KeyError:
        raise RequestError(
            f"The protocol has no datatype {shown(datatype)}.", hint=f"It has {', '.join(DTYPES)}."
        ) from None


def datatype_of(array: Array) -> str:
    """Return the datatype of an array; arrays of objects and of text are BYTES.

    Raises:
        RequestError: The protocol has none for it: complex numbers, eight-bit floats, integers of less than a byte.
    """
    return _datatype_of(array.dtype)


@cache  # numpy makes the name of a dtype anew each time, in microseconds
def _datatype_of(dtype: np.dtype[Any]) -> str:
    name = "string" if dtype.kind in "OSU" else dtype.name
    if (datatype := DATATYPES.get(name)) is None:
        raise RequestError(
            f"The protocol cannot carry tensors of {name}: it has no datatype for them.",
            hint=f"It has {', '.join(DTYPES)}; name other outputs, or convert inside the model.",
        )
    return datatype


def element_count(name: str, shape: Sequence[int]) -> int:
    """Return the number of elements of a shape; it may be larger than any machine's memory, but numpy can express it.

    Args:
        name: The tensor's, for messages.
        shape: Sizes that the other side sent.

    Raises:
        RequestError: A size is negative, there are too many, or no array can have this shape.
    """
    if len(shape) > MOST_DIMENSIONS:
        raise RequestError(f"Tensor {shown(name)} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are taken.")
    if shape and min(shape) < 0:
        raise RequestError(f"Tensor {shown(name)} has the shape {shown(list(shape))}, with a negative size.")
    count = math.prod(shape)
    # Sizes of empty arrays count too: numpy multiplies those that are not zero.
    if count > _LARGEST // 8 or (count == 0 and math.prod(size for size in shape if size) > _LARGEST // 8):
        raise RequestError(f"Tensor {shown(name)} has the shape {shown(list(shape))}, which no array can have.")
    return count


def from_raw(
    name: str, datatype: str, shape: Sequence[int], buffer: Buffer, offset: int = 0, size: int | None = None
) -> Array:
    """Return the array whose raw bytes lie in a buffer: a view of it, read-only if the buffer is.

    There is a copy only where elements would not be aligned to their size, which kernels may take for granted.

    Args:
        name: The tensor's, for messages.
        datatype: As the client sent it.
        shape: As the client sent it.
        buffer: Holds the bytes; it must not change while the array is in use.
        offset: Where the tensor begins in it.
        size: How many bytes are the tensor's, None for all that are left.

    Returns:
        An array in C order; for BYTES one of objects of type ``bytes``.

    Raises:
        RequestError: Datatype, shape and bytes do not agree.
        RequestTooLarge: More than `MOST_TEXTS` texts.
    """
    dtype = dtype_of(datatype)
    left = len(buffer) - offset
    size = left if size is None else size
    if not 0 <= size <= left:
        raise RequestError(f"Tensor {shown(name)} is said to take {size} bytes; {max(left, 0)} are left.")
    count = element_count(name, shape)
    if datatype == "BYTES":
        return _texts(name, count, shape, memoryview(buffer)[offset : offset + size])
    if count * dtype.itemsize != size:
        raise RequestError(
            f"Tensor {shown(name)}, {datatype} of shape {shown(list(shape))}, takes {count * dtype.itemsize} bytes; "
            f"{size} came."
        )
    if not count:
        return np.empty(shape, dtype)
    # Not `np.ndarray(buffer=...)`: it keeps what a memoryview looks at, but not the view, by which the owner of memory
    # that is used again knows that somebody still looks at it.
    array: Array = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
    if datatype == "BOOL" and array.view(np.uint8).max() > 1:
        raise RequestError(f"Tensor {shown(name)} is BOOL, and holds a byte that is neither 0 nor 1.")
    return array if array.flags.aligned else array.copy()


def _texts(name: str, count: int, shape: Sequence[int], view: memoryview) -> Array:
    if count > MOST_TEXTS:
        raise RequestTooLarge(f"Tensor {shown(name)} has {count} texts; the most is {MOST_TEXTS}.")
    if count * _LENGTH.size > len(view):
        raise RequestError(
            f"Tensor {shown(name)} has {count} elements of BYTES, each with a length of {_LENGTH.size} bytes; "
            f"{len(view)} bytes came."
        )
    items, at, end = [], 0, len(view)
    for number in range(count):
        if at + _LENGTH.size > end:
            raise RequestError(f"Tensor {shown(name)} ends within the length of element {number}.")
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if length > end - at:
            raise RequestError(
                f"Element {number} of tensor {shown(name)} is said to have {length} bytes; {end - at} are left."
            )
        items.append(bytes(view[at : at + length]))
        at += length
    if at != end:
        raise RequestError(f"Tensor {shown(name)} is {count} elements of BYTES; {end - at} bytes are left over.")
    return objects_of(items, shape)


def objects_of(items: Sequence[bytes], shape: Sequence[int]) -> Array:
    """Return texts as an array of objects."""
    array: Array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def to_raw(array: Array) -> bytes | memoryview:
    """Return an array's raw bytes: a view of it where it is in C order and little endian already.

    Args:
        array: Of any dtype with a datatype; elements of text or of objects are ``str`` (sent as UTF-8) or ``bytes``.

    Raises:
        RequestError: The protocol has no datatype for it.
        ServingError: It holds something else than text, or text of more than 4 GiB.
    """
    if _datatype_of(array.dtype) == "BYTES":
        return b"".join(_with_length(item) for item in texts_of(array))
    if not array.flags.c_contiguous or not is_little(array.dtype):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    # As numbers of eight bits, because the buffer protocol knows no bfloat16.
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _with_length(item: bytes) -> bytes:
    if len(item) > 0xFFFF_FFFF:
        raise ServingError(f"An element of {len(item)} bytes is longer than the protocol's four bytes can say.")
    return _LENGTH.pack(len(item)) + item


def texts_of(array: Array) -> Iterator[bytes]:
    """Yield the elements of an array of text as bytes; ``str`` as UTF-8.

    Raises:
        ServingError: It holds something else than text.
    """
    for item in array.reshape(-1).tolist():
        if isinstance(item, str):
            yield item.encode()
        elif isinstance(item, bytes):
            yield item
        else:
            raise ServingError(f"An output of text holds a {type(item).__name__}, which is no text.")


def is_little(dtype: np.dtype[Any]) -> bool:
    """Tell whether numbers of a dtype lie in memory as the protocol sends them."""
    return dtype.byteorder in "<|" or (dtype.byteorder == "=" and sys.byteorder == "little")


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

    count, dtype = element_count(name, shape), dtype_of(datatype)
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
    values = list(texts_of(array)) if datatype == "BYTES" else array.reshape(-1).tolist()
    return bytes(message("InferTensorContents")(**{_FIELDS[datatype]: values}).SerializeToString())
