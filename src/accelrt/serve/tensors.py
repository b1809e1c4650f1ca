"""Tensors of the Open Inference Protocol V2 as numpy arrays and back: raw bytes and JSON. Both front ends use it.

==========  ==========================  =================================================================
datatype    numpy                       JSON
==========  ==========================  =================================================================
BOOL        bool                        ``true``, ``false``
INT8..64    int8 to int64               whole numbers in range
UINT8..64   uint8 to uint64             whole numbers in range
FP16, BF16  float16, bfloat16           none: the protocol has no form for them, they are sent as bytes
FP32, FP64  float32, float64            numbers, and ``"NaN"``, ``"Infinity"``, ``"-Infinity"`` as text
BYTES       objects of type ``bytes``   text
==========  ==========================  =================================================================

Raw bytes are little endian, in C order, without padding; an element of BYTES is its length as an unsigned integer of
four bytes, then its bytes. What a client says about sizes is held against what came before anything is allocated, and a
number that its datatype cannot hold is refused, never wrapped or made infinite.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from accelrt.errors import RequestError, ServingError
from accelrt.graph.types import numpy_dtype

if TYPE_CHECKING:
    import msgspec

Array: TypeAlias = np.ndarray[Any, Any]
Buffer: TypeAlias = bytes | bytearray | memoryview

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "INT8": "int8",
        "INT16": "int16",
        "INT32": "int32",
        "INT64": "int64",
        "UINT8": "uint8",
        "UINT16": "uint16",
        "UINT32": "uint32",
        "UINT64": "uint64",
        "FP16": "float16",
        "BF16": "bfloat16",
        "FP32": "float32",
        "FP64": "float64",
        "BYTES": "string",
    }
)
"""Data types, as `accelrt.graph.types` names them, by the protocol's datatypes."""

DATATYPES: Mapping[str, str] = MappingProxyType({dtype: datatype for datatype, dtype in DTYPES.items()})
"""The protocol's datatypes by the names of data types."""

BINARY_ONLY = frozenset({"FP16", "BF16"})
"""Datatypes that have no form in JSON."""

MAX_RANK = 32
"""Most dimensions of a tensor: numpy's own limit before 2.0, and more than any operator takes."""

_LENGTH = struct.Struct("<I")
_LARGEST = sys.maxsize
_QUICK_BYTES = 4096
"""Of JSON that is read by one loop after another in Python; longer ones are quicker in numpy."""
_SHOWN = 80
_ASK_BINARY = 'Ask for it with "binary_data": true.'
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def datatype_named(dtype: str) -> str:
    """Return the datatype of a data type's name, as a signature has it.

    Raises:
        ServingError: The protocol has none: complex numbers, eight-bit floats, integers of less than a byte.
    """
    if (datatype := DATATYPES.get(dtype)) is None:
        raise ServingError(
            f"The Open Inference Protocol has no datatype for tensors of {dtype}.",
            hint=f"It has {', '.join(DTYPES)}; convert inside the model.",
        )
    return datatype


def datatype_of(array: Array) -> str:
    """Return the datatype of an array; arrays of objects and of text are BYTES.

    Raises:
        ServingError: The protocol has none for it.
    """
    return _datatype_of(array.dtype)


@cache
def _datatype_of(dtype: np.dtype[Any]) -> str:
    return "BYTES" if dtype.kind in "OSU" else datatype_named(dtype.name)


@cache
def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a datatype: little endian, and objects for BYTES.

    Raises:
        RequestError: There is no such datatype.
    """
    if (name := DTYPES.get(datatype)) is None:
        raise RequestError(f"{shown(datatype)} is no datatype.", hint=f"There are {', '.join(DTYPES)}.")
    dtype = numpy_dtype(name)
    return dtype if dtype.kind == "O" or sys.byteorder == "little" else dtype.newbyteorder("<")


def shown(text: object) -> str:
    """Return what a client sent as text for a message: quoted, and cut where it is long."""
    quoted = repr(text)
    return quoted if len(quoted) <= _SHOWN else f"{quoted[:_SHOWN]}..."


def element_count(name: str, shape: Sequence[int]) -> int:
    """Return the number of elements of a shape; it may be larger than any machine's memory, but numpy can express it.

    Args:
        name: The tensor's, for messages.
        shape: Sizes that a client sent.

    Raises:
        RequestError: A size is negative, there are too many, or no array can have this shape.
    """
    if len(shape) > MAX_RANK:
        raise RequestError(f"Tensor {shown(name)} has {len(shape)} dimensions; at most {MAX_RANK} are taken.")
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
    array: Array = np.ndarray(shape, dtype, buffer, offset)
    if datatype == "BOOL" and array.view(np.uint8).max() > 1:
        raise RequestError(f"Tensor {shown(name)} is BOOL, and holds a byte that is neither 0 nor 1.")
    return array if array.flags.aligned else array.copy()


def _texts(name: str, count: int, shape: Sequence[int], view: memoryview) -> Array:
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
    return _objects(items, shape)


def _objects(items: Sequence[bytes], shape: Sequence[int]) -> Array:
    array: Array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def to_raw(array: Array) -> bytes | memoryview:
    """Return an array's raw bytes: a view of it where it is in C order and little endian already.

    Args:
        array: Of any dtype with a datatype; elements of text or of objects are ``str`` (sent as UTF-8) or ``bytes``.

    Raises:
        ServingError: It holds something else than text, or text of more than 4 GiB.
    """
    if array.dtype.kind in "OSU":
        return b"".join(_with_length(item) for item in _as_bytes(array))
    if not array.flags.c_contiguous or not _is_little(array.dtype):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    # As numbers of eight bits, because the buffer protocol knows no bfloat16.
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _with_length(item: bytes) -> bytes:
    if len(item) > 0xFFFF_FFFF:
        raise ServingError(f"An element of {len(item)} bytes is longer than the protocol's four bytes can say.")
    return _LENGTH.pack(len(item)) + item


def _as_bytes(array: Array) -> Iterable[bytes]:
    for item in array.reshape(-1).tolist():
        if isinstance(item, str):
            yield item.encode()
        elif isinstance(item, bytes):
            yield item
        else:
            raise ServingError(f"An output of text holds a {type(item).__name__}, which is no text.")


def _is_little(dtype: np.dtype[Any]) -> bool:
    return dtype.byteorder in "<|" or (dtype.byteorder == "=" and sys.byteorder == "little")


def from_json(name: str, datatype: str, shape: Sequence[int] | None, data: msgspec.Raw | bytes) -> Array:
    """Return the array that JSON says, flat or nested as the shape is.

    Args:
        name: The tensor's, for messages.
        datatype: As the client sent it.
        shape: As the client sent it; None for that of the nested data itself.
        data: The text of the JSON value, which is not parsed yet.

    Returns:
        An array in C order; for BYTES one of objects of type ``bytes``.

    Raises:
        RequestError: The elements are too few or too many, not of the datatype or not in its range, or nested otherwise
            than the shape; or the datatype has no form in JSON.
    """
    if len(data) <= _QUICK_BYTES and shape is not None and (array := _quickly(datatype, shape, data)) is not None:
        return array
    dtype_of(datatype)
    if datatype in BINARY_ONLY:
        raise RequestError(
            f"Tensor {shown(name)} is {datatype}, which has no form in JSON.",
            hint="Send it as binary data, see the extension binary_tensor_data.",
        )
    text = bytes(data).lstrip()
    if shape is None:
        return _finished(name, datatype, _array_of(name, datatype, _depth(text), text))
    count = element_count(name, shape)
    nested = text[1:].lstrip().startswith(b"[")
    array, items = _array_of(name, datatype, len(shape) if nested else min(text[:1] == b"[", 1), text)
    if nested:
        # Where a size is zero, nothing says how the lists would go on within.
        open_ended = not count and not array.size and array.shape == tuple(shape)[: array.ndim]
        if array.shape != tuple(shape) and not open_ended:
            raise RequestError(
                f"Tensor {shown(name)} has the shape {shown(list(shape))}; its data is nested as {list(array.shape)}."
            )
    elif array.size != count:
        raise RequestError(
            f"Tensor {shown(name)} has the shape {shown(list(shape))}, {count} elements; {array.size} came."
        )
    return _finished(name, datatype, (array, items)).reshape(shape)


def _quickly(datatype: str, shape: Sequence[int], data: msgspec.Raw | bytes) -> Array | None:
    """Return the array of a short flat list of numbers, None for all else, whether it is right or wrong."""
    if (range_ := _ranges().get(datatype)) is None:
        return None
    try:
        items = _decoder(range_.kind, 1).decode(data)
    except (ValueError, RecursionError):  # of msgspec, whose errors are of this type
        return None
    # In range, so that neither numbers beyond the type nor infinite ones need be looked for in the array.
    if not items or not range_.least <= min(items) or not max(items) <= range_.most:
        return None
    if math.prod(shape) != len(items) or len(shape) > MAX_RANK or min(shape, default=1) < 1:
        return None
    return np.array(items, range_.dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Range:
    """What a datatype of numbers holds, and how its elements are parsed."""

    kind: str
    dtype: np.dtype[Any]
    least: float
    most: float


@cache
def _ranges() -> Mapping[str, _Range]:
    ranges = {}
    for datatype in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"):
        whole = np.iinfo(dtype_of(datatype))
        ranges[datatype] = _Range("int", dtype_of(datatype), int(whole.min), int(whole.max))
    for datatype in ("FP32", "FP64"):
        most = float(np.finfo(dtype_of(datatype)).max)
        ranges[datatype] = _Range("float", dtype_of(datatype), -most, most)
    return ranges


def _array_of(name: str, datatype: str, depth: int, text: bytes) -> tuple[Array, Any]:
    """Return an array and the Python lists that it was made of."""
    if depth > MAX_RANK:
        raise RequestError(f"Tensor {shown(name)} is nested {depth} deep; at most {MAX_RANK} are taken.")
    items = _elements(name, datatype, depth, text)
    try:
        with np.errstate(over="ignore"):  # looked for later
            return np.array(items, dtype_of(datatype)), items
    except (OverflowError, ValueError, TypeError) as error:
        raise RequestError(f"Tensor {shown(name)}: {_plain(error, datatype)}") from None


def _finished(name: str, datatype: str, made: tuple[Array, Any]) -> Array:
    array, items = made
    if array.dtype.kind == "f":
        _refuse_overflow(name, datatype, array, items)
    elif array.dtype.kind == "O":
        return _texts_of(name, array)
    return array


def _texts_of(name: str, array: Array) -> Array:
    items = array.reshape(-1).tolist()
    if any(not isinstance(item, str) for item in items):
        raise RequestError(f"Tensor {shown(name)}: its lists are ragged.")
    return _objects([item.encode() for item in items], array.shape)


def _depth(text: bytes) -> int:
    """Count the brackets that JSON begins with."""
    depth = 0
    for byte in text:
        if byte == ord("["):
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return depth


def _elements(name: str, datatype: str, depth: int, text: bytes) -> Any:
    """Parse JSON as lists of the datatype's elements, ``depth`` deep."""
    import msgspec

    kind = "text" if datatype == "BYTES" else "bool" if datatype == "BOOL" else "float" if datatype[0] == "F" else "int"
    try:
        return _decoder(kind, depth).decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if kind != "float":
            raise RequestError(f"Tensor {shown(name)}, {datatype}: {error}.") from None
    except RecursionError:
        raise RequestError(f"Tensor {shown(name)} is nested too deeply.") from None
    try:
        return _finite_or_named(_decoder("float or text", depth).decode(text))
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
        reason = f"{error.args[0]!r} is no number" if isinstance(error, KeyError) else str(error)
        raise RequestError(f"Tensor {shown(name)}, {datatype}: {reason}.") from None


@cache
def _decoder(kind: str, depth: int) -> msgspec.json.Decoder[Any]:
    import msgspec

    type_: Any = {"text": str, "bool": bool, "int": int, "float": float, "float or text": float | str}[kind]
    for _ in range(depth):
        type_ = list[type_]
    return msgspec.json.Decoder(type_)


def _finite_or_named(items: Any) -> Any:
    if isinstance(items, list):
        return [_finite_or_named(item) for item in items]
    return _NOT_FINITE[items] if isinstance(items, str) else items


def _refuse_overflow(name: str, datatype: str, array: Array, items: Any) -> None:
    if np.isfinite(array).all():
        return
    wide = np.array(items, np.float64)
    if (np.isinf(array) & np.isfinite(wide)).any():
        largest = np.abs(wide[np.isfinite(wide)]).max()
        raise RequestError(f"Tensor {shown(name)} holds {largest:g}, too large for {datatype}.")


def _plain(error: Exception, datatype: str) -> str:
    """Say in the protocol's words what numpy says in its own."""
    if isinstance(error, OverflowError):
        return f"a number is out of the range of {datatype}."
    return "its lists are ragged."


def numbers_of(array: Array) -> Array | None:
    """Return an array's elements, flat, as `to_json` does, if they are numbers whose JSON needs no second look.

    ``orjson`` writes null for what is not finite; with it in the text, `to_json` has to be asked.
    """
    flags = array.flags
    if not _is_number(array.dtype) or not flags.c_contiguous or not flags.aligned:
        return None
    return array.reshape(-1)


@cache
def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iuf" and _is_little(dtype) and DATATYPES.get(dtype.name, "FP16") not in BINARY_ONLY


def to_json(name: str, array: Array) -> Array | list[Any]:
    """Return an array as something that ``orjson`` writes with ``OPT_SERIALIZE_NUMPY``: its elements, flat.

    Args:
        name: The output's, for messages.
        array: Of any dtype with a form in JSON.

    Raises:
        RequestError: Its datatype has no form in JSON, or it holds bytes that are no text; the client may ask for it as
            binary data.
        ServingError: The protocol has no datatype for it.
    """
    datatype = datatype_of(array)
    if datatype in BINARY_ONLY:
        raise RequestError(f"Output {shown(name)} is {datatype}, which has no form in JSON.", hint=_ASK_BINARY)
    if datatype == "BYTES":
        try:
            return [item.decode() for item in _as_bytes(array)]
        except UnicodeDecodeError:
            raise RequestError(f"Output {shown(name)} holds bytes that are no UTF-8.", hint=_ASK_BINARY) from None
    flat = array.reshape(-1)
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        return [value if math.isfinite(value) else _word(value) for value in _shortest(flat)]
    if not _is_little(flat.dtype) or not flat.flags.c_contiguous or not flat.flags.aligned:
        flat = np.array(flat, flat.dtype.newbyteorder("="))
    return flat


def _shortest(flat: Array) -> list[float]:
    """Return Python floats that read as few digits as the dtype needs: 0.1 rather than 0.10000000149011612."""
    return [float(str(value)) for value in flat] if flat.dtype.itemsize < 8 else flat.tolist()


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
