"""A way around HTTP/2 for a client on the server's own machine: the messages of inference over a Unix socket.

What gRPC takes for a call of a hundred bytes between two processes of one machine is many times what it takes the
kernel to carry them. A server that listens on a socket besides names it among its extensions, as `advertised` writes
it. The socket is in Linux's abstract namespace: it goes with its process, and is seen in the same network namespace
only, where the loopback interface is the same.

Both directions carry frames: a head of two numbers of 64 bits, little endian, and as many bytes as the first says.

=========  =============================================  =====================================================
frame      second number                                  bytes
=========  =============================================  =====================================================
the first  0                                              the call's metadata, as a JSON list of pairs
a call     microseconds that the client waits; 0: always  ``ModelInferRequest``
a reply    0, or 1 where it is no success                 ``ModelInferResponse``; nothing for the first; where it
                                                          is no success, JSON: code, details, kind, retry_after_s
=========  =============================================  =====================================================

A connection carries one call at a time; calls side by side have one each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from accelrt.errors import AccelrtError
from accelrt.protocol.faults import error_of
from accelrt.protocol.wire import MOST_MESSAGE_BYTES, Buffer

HEAD = struct.Struct("<QQ")
OFFERED = sys.platform == "linux"
"""Whether this system has an abstract namespace for sockets."""

_EXTENSION = re.compile(r"accelrt_local_socket\((accelrt-[0-9a-f]{32})\)", re.ASCII)
_GREETING_S = 1.0
_READ_AT_ONCE = 1 << 16
_JOINED = 1 << 14
"""A call up to this size is copied behind its head; for a larger one the kernel gathers the two."""


def advertised(name: str) -> str:
    """Return the extension that names a server's socket: ``accelrt-`` and 32 hexadecimal digits."""
    return f"accelrt_local_socket({name})"


def socket_named(extensions: Iterable[str]) -> str | None:
    """Return the socket that a server's extensions name, None if there is none. No other name is taken for one."""
    for extension in extensions:
        if (found := _EXTENSION.fullmatch(extension)) is not None:
            return found[1]
    return None


def abstract(name: str) -> str:
    """Return the address of a socket as the kernel has it."""
    return f"\0{name}"


def room(size: int) -> memoryview:
    """Return memory for so many bytes, not touched before they are written: who only announces them costs none."""
    flat: Any = np.empty(size, np.uint8)
    return memoryview(flat)


class LocalSocket:
    """Connections to a server's socket, as many as calls were under way at a time. Thread-safe.

    Args:
        name: The socket's.
        metadata: What gRPC would carry with each call.
    """

    def __init__(self, name: str, metadata: Iterable[tuple[str, str]]) -> None:
        self._address = abstract(name)
        self._greeting = json.dumps(list(metadata)).encode()
        self._idle: deque[socket.socket] = deque()
        self._process = os.getpid()

    def connect(self) -> None:
        """Make a first connection.

        Raises:
            OSError: There is no such socket here, or what listens on it does not greet.
            AccelrtError: The server does not let this client in.
        """
        self._idle.append(self._connected())

    def call(self, data: bytes, timeout_s: float) -> Buffer:
        """Return the reply to a ``ModelInferRequest``.

        Raises:
            TimeoutError: No answer in time.
            OSError: The connection was lost, or cannot be made.
            ServingError: What the server answered instead: `accelrt.protocol.faults.error_of`.
        """
        if self._process != os.getpid():  # a child must not write where its parent does
            self._idle, self._process = deque(), os.getpid()
        deadline = time.monotonic() + timeout_s
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connected()
        try:
            failed, reply = _exchange(connection, data, int(timeout_s * 1e6), deadline)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        if failed:
            raise _error(reply)
        return reply

    def close(self) -> None:
        """Close all connections that no call uses."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(_GREETING_S)
            made.connect(self._address)
            failed, reply = _exchange(made, self._greeting, 0, time.monotonic() + _GREETING_S)
            if failed:
                raise _error(reply)
        except TimeoutError as error:  # a call has its own time, which is not over
            made.close()
            raise ConnectionError("the server does not greet") from error
        except BaseException:
            made.close()
            raise
        return made


def _exchange(connection: socket.socket, data: bytes, microseconds: int, deadline: float) -> tuple[int, Buffer]:
    """Send a frame, and return the second number and the bytes of the one that answers it.

    Raises:
        OSError: The connection was lost. `TimeoutError`: The deadline has passed.
    """
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    head = HEAD.pack(len(data), microseconds)
    if len(data) <= _JOINED:
        connection.sendall(head + data)
    else:
        sent = connection.sendmsg((head, data))
        if (sent := sent - len(head)) < 0:
            connection.sendall(head[sent:])
            sent = 0
        if sent < len(data):
            connection.sendall(memoryview(data)[sent:])
    reply = connection.recv(_READ_AT_ONCE)
    while 0 < len(reply) < HEAD.size:
        reply += _more(connection, deadline)
    if not reply:
        raise ConnectionResetError("the server has closed the connection")
    size, status = HEAD.unpack_from(reply)
    if size + HEAD.size == len(reply):
        return status, reply[HEAD.size :]
    at = len(reply) - HEAD.size
    if not at <= size <= MOST_MESSAGE_BYTES:
        raise ConnectionAbortedError("what the server has sent is no reply")
    whole = room(size)
    whole[:at] = reply[HEAD.size :]
    while at < size:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        count = connection.recv_into(whole[at:])
        if not count:
            raise ConnectionResetError("the server has closed the connection within a reply")
        at += count
    return status, whole


def _more(connection: socket.socket, deadline: float) -> bytes:
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    found = connection.recv(_READ_AT_ONCE)
    if not found:
        raise ConnectionResetError("the server has closed the connection within a reply")
    return found


def _error(reply: Buffer) -> AccelrtError:
    told: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        found = json.loads(bytes(reply))
        told = found if isinstance(found, dict) else {}
    error = error_of(str(told.get("code")), str(told.get("details", "")), told.get("kind"))
    if isinstance(after := told.get("retry_after_s"), int | float):
        error.retry_after_s = float(after)  # type: ignore[attr-defined]
    return error
