"""Tensors of the Open Inference Protocol V2 in JSON as numpy arrays, and back. Raw bytes are `accelrt.protocol`'s.

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

A number that its datatype cannot hold is refused, never wrapped or made infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from accelrt.errors import RequestError
from accelrt.protocol.datatypes import (
    DATATYPES,
    MOST_DIMENSIONS,
    Array,
    datatype_of,
    dtype_of,
    element_count,
    is_little,
    objects_of,
    shown,
    texts_of,
)

if TYPE_CHECKING:
    import msgspec

BINARY_ONLY = frozenset({"FP16", "BF16"})
"""Datatypes that have no form in JSON."""

_QUICK_BYTES = 4096
"""Of JSON that is read by one loop after another in Python; longer ones are quicker in numpy."""
_ASK_BINARY = 'Ask for it with "binary_data": true.'
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


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
    if math.prod(shape) != len(items) or len(shape) > MOST_DIMENSIONS or min(shape, default=1) < 1:
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
    if depth > MOST_DIMENSIONS:
        raise RequestError(f"Tensor {shown(name)} is nested {depth} deep; at most {MOST_DIMENSIONS} are taken.")
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
    return objects_of([item.encode() for item in items], array.shape)


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
    return dtype.kind in "iuf" and is_little(dtype) and DATATYPES.get(dtype.name, "FP16") not in BINARY_ONLY


def to_json(name: str, array: Array) -> Array | list[Any]:
    """Return an array as something that ``orjson`` writes with ``OPT_SERIALIZE_NUMPY``: its elements, flat.

    Args:
        name: The output's, for messages.
        array: Of any dtype with a form in JSON.

    Raises:
        RequestError: Its datatype has no form in JSON, or it holds bytes that are no text; the client may ask for it as
            binary data. Or the protocol has no datatype for it.
    """
    datatype = datatype_of(array)
    if datatype in BINARY_ONLY:
        raise RequestError(f"Output {shown(name)} is {datatype}, which has no form in JSON.", hint=_ASK_BINARY)
    if datatype == "BYTES":
        try:
            return [item.decode() for item in texts_of(array)]
        except UnicodeDecodeError:
            raise RequestError(f"Output {shown(name)} holds bytes that are no UTF-8.", hint=_ASK_BINARY) from None
    flat = array.reshape(-1)
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        return [value if math.isfinite(value) else _word(value) for value in _shortest(flat)]
    if not is_little(flat.dtype) or not flat.flags.c_contiguous or not flat.flags.aligned:
        flat = np.array(flat, flat.dtype.newbyteorder("="))
    return flat


def _shortest(flat: Array) -> list[float]:
    """Return Python floats that read as few digits as the dtype needs: 0.1 rather than 0.10000000149011612."""
    return [float(str(value)) for value in flat] if flat.dtype.itemsize < 8 else flat.tolist()


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
