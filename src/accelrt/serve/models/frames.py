"""What travels between a server and a model's worker process: a head of JSON, then raw bytes. No pickle.

A frame is two lengths (of the head, and of the bytes after it; little endian, 4 and 8 bytes), the head, and the bytes
of the arrays in the order in which the head lists them, each filled up to a multiple of 16 so that all are aligned.
Text is written as the protocol does: four bytes of length, then the bytes.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from accelrt import errors
from accelrt.errors import AccelrtError, ExecutionError
from accelrt.graph.types import Value, numpy_dtype

_PREFIX = struct.Struct("<IQ")
_LENGTH = struct.Struct("<I")
MAX_HEAD = 16 << 20
MAX_DEPTH = 8
_ALIGNED = 16
_SMALL = 1 << 16
"""Arrays below this many bytes are copied into one buffer with their neighbours, to be sent by one call."""


class BrokenFrame(Exception):
    """What came is no frame: the other side is not to be trusted any more."""


def send(connection: socket.socket, head: Mapping[str, Any], values: Mapping[str, Value] | None = None) -> None:
    """Send a frame. One thread at a time.

    Raises:
        OSError: The other side is gone.
    """
    buffers: list[bytes | memoryview] = []
    described = {name: _describe(value, buffers) for name, value in (values or {}).items()}
    text = json.dumps({**head, "values": described} if values is not None else dict(head)).encode()
    pending = bytearray(_PREFIX.pack(len(text), sum(map(len, buffers))))
    pending += text
    for buffer in buffers:
        if len(buffer) < _SMALL:
            pending += buffer
            continue
        if pending:
            connection.sendall(pending)
            pending = bytearray()
        connection.sendall(buffer)
    if pending:
        connection.sendall(pending)


def receive(connection: socket.socket) -> tuple[dict[str, Any], dict[str, Value]] | None:
    """Wait for a frame; None when the other side has ended.

    Raises:
        BrokenFrame: What came is none.
        OSError: The connection failed.
    """
    prefix = _exactly(connection, _PREFIX.size)
    if prefix is None:
        return None
    length, size = _PREFIX.unpack(prefix)
    if length > MAX_HEAD:
        raise BrokenFrame(f"a head of {length} bytes")
    text = _exactly(connection, length)
    if text is None:
        return None
    try:
        head = json.loads(text)
        if not isinstance(head, dict):
            raise BrokenFrame("a head that is no object")
        described = head.pop("values", {})
        total = sum(_bytes_of(each, 0) for each in described.values())
        if total != size:
            raise BrokenFrame(f"{size} bytes where the head tells of {total}")
        data = _exactly(connection, size)
        if data is None:
            return None
        reader = _Arrays(memoryview(data))
        return head, {name: reader.read(each) for name, each in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, struct.error) as error:
        raise BrokenFrame(f"{type(error).__name__}: {error}") from error


def error_to_json(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data."""
    known = isinstance(error, AccelrtError)
    return {
        "type": type(error).__name__ if known else "ExecutionError",
        "message": error.message if isinstance(error, AccelrtError) else f"{type(error).__name__}: {error}",
        "hint": error.hint if isinstance(error, AccelrtError) else None,
        "backend": error.backend if isinstance(error, AccelrtError) else None,
    }


def error_from_json(data: Mapping[str, Any]) -> AccelrtError:
    """Return the error that `error_to_json` described, of its class where that is one of accelrt's."""
    cls = getattr(errors, str(data.get("type")), None)
    if not (isinstance(cls, type) and issubclass(cls, AccelrtError)):
        cls = ExecutionError
    return cls(str(data.get("message")), hint=data.get("hint"), backend=data.get("backend"))


def _describe(value: Value, buffers: list[bytes | memoryview]) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_describe(each, buffers) for each in value]
    array = np.asarray(value)
    if array.dtype == object:
        pieces = [
            each if isinstance(each, bytes) else str(each).encode("utf-8", "surrogateescape") for each in array.flat
        ]
        data = b"".join(_LENGTH.pack(len(each)) + each for each in pieces)
        _append(buffers, data)
        return {"dtype": "string", "shape": array.shape, "bytes": len(data)}
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.nbytes:
        _append(buffers, array.reshape(-1).view(np.uint8).data)
    return {"dtype": array.dtype.name, "shape": array.shape}


def _append(buffers: list[bytes | memoryview], data: bytes | memoryview) -> None:
    buffers.append(data)
    if rest := -len(data) % _ALIGNED:
        buffers.append(bytes(rest))


def _filled_up(size: int) -> int:
    return size + -size % _ALIGNED


def _bytes_of(described: Any, depth: int) -> int:
    if described is None:
        return 0
    if isinstance(described, list):
        if depth >= MAX_DEPTH:
            raise BrokenFrame("lists in lists")
        return sum(_bytes_of(each, depth + 1) for each in described)
    if described["dtype"] == "string":
        return _filled_up(_size(described["bytes"]))
    return _filled_up(numpy_dtype(described["dtype"]).itemsize * _count(described["shape"]))


def _count(shape: Any) -> int:
    count = 1
    for each in shape:
        count *= _size(each)
    return count


def _size(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise BrokenFrame(f"a size {number!r}")
    return number


class _Arrays:
    """Takes arrays out of a frame's bytes; they share its memory."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def read(self, described: Any) -> Value:
        if described is None:
            return None
        if isinstance(described, list):
            return [self.read(each) for each in described]
        shape = tuple(described["shape"])
        if described["dtype"] == "string":
            return self._text(_count(shape), described["bytes"]).reshape(shape)
        dtype = numpy_dtype(described["dtype"])
        count = _count(shape)
        array = np.frombuffer(self._data, dtype, count, self._at) if count else np.empty(0, dtype)
        self._at += _filled_up(count * dtype.itemsize)
        return array.reshape(shape)

    def _text(self, count: int, size: int) -> np.ndarray[Any, Any]:
        if count * _LENGTH.size > size:
            raise BrokenFrame(f"{count} texts in {size} bytes")
        texts = np.empty(count, object)
        begin, end = self._at, self._at + size
        for index in range(count):
            (length,) = _LENGTH.unpack_from(self._data, self._at)
            start = self._at + _LENGTH.size
            if start + length > end:
                raise BrokenFrame("a text that ends after its frame")
            texts[index] = bytes(self._data[start : start + length]).decode("utf-8", "surrogateescape")
            self._at = start + length
        self._at = begin + _filled_up(size)
        return texts


def _exactly(connection: socket.socket, size: int) -> bytearray | None:
    """Read so many bytes; None if the other side ends before."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return data
