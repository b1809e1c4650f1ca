"""The messages that carry tensors, read and written without protobuf.

protobuf's classes copy every tensor three times on its way; here a tensor is read where it lies in the message, and
written with one copy. The rest of a message is some hundred bytes, for which Python is quick enough
(`docs/decisions/0025-a-network-is-an-accelerator.md` has the figures). The wire format is protobuf's: fields in any
order, unknown ones skipped, the last of a single field wins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from accelrt.errors import RequestError
from accelrt.protocol.datatypes import Array, datatype_of, to_raw

Parameter: TypeAlias = bool | int | float | str
Parameters: TypeAlias = Mapping[str, Parameter]
Buffer: TypeAlias = bytes | memoryview
Parts: TypeAlias = list[Buffer]
"""Of a message, to be joined."""

MOST_MESSAGE_BYTES = (1 << 31) - 1
"""protobuf and gRPC count a message's bytes in 31 bits."""

REGION, BYTE_SIZE, OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
"""The parameters of a tensor that lies in shared memory."""

_MOST_REMEMBERED, _MOST_REMEMBERED_BYTES = 256, 1024
_OF_ONE_LENGTH = 4
"""Messages of one length that are remembered: those of so many models that take and give the same."""

_DOUBLE = struct.Struct("<d")
_NONE: Parameters = {}


@dataclass(slots=True)
class WireTensor:
    """A tensor of a message, or what is said of one that lies elsewhere; ``contents`` is its serialised typed form."""

    name: str = ""
    datatype: str = ""
    shape: tuple[int, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    contents: Buffer | None = None


@dataclass(slots=True)
class WireInfer:
    """A ``ModelInferRequest`` or a ``ModelInferResponse``, which differ in the numbers of their last fields only.

    ``asked`` are the outputs that a request names. ``raw`` are views of the message's bytes.
    """

    model_name: str = ""
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    tensors: list[WireTensor] = field(default_factory=list)
    asked: list[tuple[str, Parameters]] = field(default_factory=list)
    raw: list[memoryview] = field(default_factory=list)


_PADDING = 15
"""The number of a field that the protocol does not have, and whose tag is one byte long."""

_ALIGNMENT = 16
"""Of what follows the head of a Python ``bytes``, and enough for every datatype."""

_WORTH_ALIGNING = 16 << 10


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What was read of a message, but for its raw contents, and all bytes that are not theirs, by their places."""

    read: WireInfer
    raw: tuple[slice, ...]
    others: tuple[tuple[slice, bytes], ...]


_remembered: dict[tuple[int, int], tuple[_Remembered, ...]] = {}


def read_request(data: Buffer) -> WireInfer:
    """Read a ``ModelInferRequest``; what is returned is not to be changed.

    Raises:
        RequestError: The bytes are no such message.
    """
    return _recalled(data, raw=7, asked=6)


def read_response(data: Buffer) -> WireInfer:
    """Read a ``ModelInferResponse``; what is returned is not to be changed.

    Raises:
        RequestError: The bytes are no such message.
    """
    return _recalled(data, raw=6, asked=0)


def _recalled(data: Buffer, raw: int, asked: int) -> WireInfer:
    """Read a message. Those of one model differ in their tensors' bytes only: what else there was is remembered."""
    view = memoryview(data)
    key = (raw, len(data))
    remembered = _remembered.get(key, ())
    for known in remembered:
        for place, other in known.others:
            if view[place] != other:
                break
        else:
            read = known.read
            return WireInfer(
                read.model_name,
                read.model_version,
                read.id,
                read.parameters,
                read.tensors,
                read.asked,
                [view[place] for place in known.raw],
            )
    found, places = _read(data, view, 0, len(data), raw=raw, asked=asked)
    if len(data) - sum(map(len, found.raw)) <= _MOST_REMEMBERED_BYTES and all(
        tensor.contents is None for tensor in found.tensors
    ):
        ends = [0, *(place.stop for place in places)]
        starts = [*(place.start for place in places), len(data)]
        others = tuple((slice(*each), bytes(view[slice(*each)])) for each in zip(ends, starts, strict=True))
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        made = _Remembered(replace(found, raw=[]), tuple(places), others)
        _remembered[key] = (made, *remembered[: _OF_ONE_LENGTH - 1])
    return found


def write_request(
    model_name: str,
    model_version: str,
    inputs: Mapping[str, Array],
    *,
    placed: Mapping[str, Parameters] = _NONE,  # type: ignore[assignment]
    outputs: Iterable[tuple[str, Parameters]] = (),
    parameters: Parameters = _NONE,
    id: str = "",
) -> bytes:
    """Write a ``ModelInferRequest`` with raw tensors.

    Args:
        model_name: The model's.
        model_version: Its version, empty for the server's choice.
        inputs: Arrays by name.
        placed: Inputs whose bytes lie in shared memory, and the parameters that say where.
        outputs: Names asked for, with their parameters; none for all.
        parameters: Those of the request.
        id: Returned by the server as it is.

    Raises:
        RequestError: The protocol has no name for the type of an input.
    """
    parts = _head(model_name, model_version, id, parameters)
    raw: list[Buffer] = []
    for name, array in inputs.items():
        where = placed.get(name, _NONE)
        _tensor(parts, name, datatype_of(array), array.shape, where)
        if not where:
            raw.append(to_raw(array))
    for name, told in outputs:
        body: list[Buffer] = [_text(1, name)]
        _parameters(body, 2, told)
        _enclose(parts, 6, body)
    at = sum(map(len, parts))
    for buffer in raw:
        start = at + 1 + len(_varint(len(buffer)))
        if len(buffer) >= _WORTH_ALIGNING and start % _ALIGNMENT:
            # A field that no reader knows moves the tensor to where it can be used without a copy.
            padding = bytes((-start - 2) % _ALIGNMENT)
            _bytes(parts, _PADDING, padding)
            start += 2 + len(padding)
        _bytes(parts, 7, buffer)
        at = start + len(buffer)
    return b"".join(parts)


def write_response(
    model_name: str,
    model_version: str,
    outputs: Mapping[str, Array],
    *,
    placed: Mapping[str, Parameters] = _NONE,  # type: ignore[assignment]
    typed: Mapping[str, bytes] | None = None,
    parameters: Parameters = _NONE,
    id: str = "",
) -> Parts:
    """Write a ``ModelInferResponse``, as parts to be joined.

    Args:
        model_name: The model's.
        model_version: The version that answered.
        outputs: Arrays by name.
        placed: Outputs whose bytes were put into shared memory, and the parameters that say where. Each has an empty
            entry among the raw ones, so that clients find the others by their place.
        typed: Serialised typed contents of all outputs, in place of raw ones.
        parameters: Those of the response.
        id: The request's.

    Raises:
        RequestError: The protocol has no name for the type of an output.
    """
    parts = _head(model_name, model_version, id, parameters)
    raw: list[Buffer] = []
    for name, array in outputs.items():
        where = placed.get(name, _NONE)
        contents = typed.get(name) if typed is not None and not where else None
        _tensor(parts, name, datatype_of(array), array.shape, where, contents)
        raw.append(b"" if where else b"" if typed is not None else to_raw(array))
    if typed is None:
        for buffer in raw:
            _bytes(parts, 6, buffer)
    return parts


def write_stream_response(response: list[Buffer] | None, error: str = "") -> bytes:
    """Write a ``ModelStreamInferResponse`` of a response's parts, an error, or both."""
    parts: list[Buffer] = [_text(1, error)] if error else []
    if response is not None:
        _enclose(parts, 2, response)
    return b"".join(parts)


# Writing


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _SMALL[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = [bytes([value]) for value in range(0x80)]


def _text(number: int, text: str) -> bytes:
    data = text.encode()
    return _SMALL[number << 3 | 2] + _varint(len(data)) + data


def _bytes(parts: list[Buffer], number: int, data: Buffer) -> None:
    parts += (_SMALL[number << 3 | 2], _varint(len(data)), data)


def _enclose(parts: list[Buffer], number: int, body: list[Buffer]) -> None:
    parts += (_SMALL[number << 3 | 2], _varint(sum(map(len, body))), *body)


def _head(model_name: str, model_version: str, id: str, parameters: Parameters) -> list[Buffer]:
    parts: list[Buffer] = [_text(1, model_name)]
    if model_version:
        parts.append(_text(2, model_version))
    if id:
        parts.append(_text(3, id))
    _parameters(parts, 4, parameters)
    return parts


def _tensor(
    parts: list[Buffer],
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    parameters: Parameters,
    contents: bytes | None = None,
) -> None:
    body: list[Buffer] = [_text(1, name), _text(2, datatype)]
    if shape:
        _bytes(body, 3, b"".join(map(_varint, shape)))
    _parameters(body, 4, parameters)
    if contents is not None:
        _bytes(body, 5, contents)
    _enclose(parts, 5, body)


def _parameters(parts: list[Buffer], number: int, parameters: Parameters) -> None:
    for key, value in parameters.items():
        match value:
            case bool():
                chosen = b"\x08" + _SMALL[value]
            case int() if value >= 1 << 63:
                chosen = b"\x28" + _varint(value)
            case int():
                chosen = b"\x10" + _varint(value & 0xFFFFFFFFFFFFFFFF)
            case float():
                chosen = b"\x21" + _DOUBLE.pack(value)
            case _:
                chosen = _text(3, str(value))
        _enclose(parts, number, [_text(1, key), b"\x12" + _varint(len(chosen)) + chosen])


# Reading

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_DEEPEST_VARINT = 10


def _read_varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    for index in range(at, min(end, at + _DEEPEST_VARINT)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, index + 1
        shift += 7
    raise RequestError("The message is not protobuf: a number in it does not end.")


def _fields(data: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, and either the place (start, end) of a field's bytes or (value, 0)."""
    while at < end:
        tag = data[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = _read_varint(data, at, end)
        kind = tag & 7
        if kind == _DELIMITED:
            size, at = _read_varint(data, at, end)
            if size > end - at:
                raise RequestError("The message is not protobuf: a field is longer than what it is in.")
            yield tag >> 3, kind, at, at + size
            at += size
        elif kind == _VARINT:
            value, at = _read_varint(data, at, end)
            yield tag >> 3, kind, value, 0
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
            if size > end - at:
                raise RequestError("The message is not protobuf: it ends within a field.")
            yield tag >> 3, kind, at, at + size
            at += size
        else:
            raise RequestError(f"The message is not protobuf of this protocol: it has a field of wire type {kind}.")


def _string(data: Buffer, start: int, stop: int) -> str:
    try:
        return str(data[start:stop], "utf-8")
    except UnicodeDecodeError:
        raise RequestError("The message is not protobuf: a text in it is not UTF-8.") from None


def _read(data: Buffer, view: memoryview, at: int, end: int, *, raw: int, asked: int) -> tuple[WireInfer, list[slice]]:
    """Return what a message says, and where its raw contents are."""
    found, places = WireInfer(), list[slice]()
    for number, kind, start, stop in _fields(data, at, end):
        if kind != _DELIMITED:
            continue
        if number == raw:
            places.append(slice(start, stop))
            found.raw.append(view[start:stop])
        elif number == 5:
            found.tensors.append(_read_tensor(data, view, start, stop))
        elif number == asked:
            found.asked.append(_read_asked(data, start, stop))
        elif number == 1:
            found.model_name = _string(data, start, stop)
        elif number == 2:
            found.model_version = _string(data, start, stop)
        elif number == 3:
            found.id = _string(data, start, stop)
        elif number == 4:
            _read_parameter(data, start, stop, found.parameters)
    return found, places


def _read_tensor(data: Buffer, view: memoryview, at: int, end: int) -> WireTensor:
    name = datatype = ""
    shape: list[int] = []
    parameters: dict[str, Parameter] = {}
    contents: Buffer | None = None
    for number, kind, start, stop in _fields(data, at, end):
        if number == 3:
            if kind == _DELIMITED:
                place = start
                while place < stop:
                    size, place = _read_varint(data, place, stop)
                    shape.append(_signed(size))
            elif kind == _VARINT:
                shape.append(_signed(start))
        elif kind != _DELIMITED:
            continue
        elif number == 1:
            name = _string(data, start, stop)
        elif number == 2:
            datatype = _string(data, start, stop)
        elif number == 4:
            _read_parameter(data, start, stop, parameters)
        elif number == 5:
            contents = view[start:stop] if contents is None else bytes(contents) + data[start:stop]  # they are merged
    return WireTensor(name, datatype, tuple(shape), parameters, contents)


def _read_asked(data: Buffer, at: int, end: int) -> tuple[str, Parameters]:
    name, parameters = "", dict[str, Parameter]()
    for number, kind, start, stop in _fields(data, at, end):
        if kind == _DELIMITED and number == 1:
            name = _string(data, start, stop)
        elif kind == _DELIMITED and number == 2:
            _read_parameter(data, start, stop, parameters)
    return name, parameters


def _read_parameter(data: Buffer, at: int, end: int, into: dict[str, Any]) -> None:
    key = ""
    value: Parameter | None = None
    for number, kind, start, stop in _fields(data, at, end):
        if kind == _DELIMITED and number == 1:
            key = _string(data, start, stop)
        elif kind == _DELIMITED and number == 2:
            for choice, form, first, last in _fields(data, start, stop):
                if choice == 1 and form == _VARINT:
                    value = first != 0
                elif choice == 2 and form == _VARINT:
                    value = _signed(first)
                elif choice == 5 and form == _VARINT:
                    value = first
                elif choice == 3 and form == _DELIMITED:
                    value = _string(data, first, last)
                elif choice == 4 and form == _FIXED64:
                    value = float(_DOUBLE.unpack_from(data, first)[0])
    if value is not None:
        into[key] = value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
