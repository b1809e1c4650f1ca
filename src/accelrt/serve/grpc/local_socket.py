"""Calls over a Unix socket, from clients on this machine; the frames are those of `accelrt.protocol.local_socket`."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any, Protocol, cast

from accelrt.errors import NotAllowed, Overloaded, RequestError, RequestTooLarge
from accelrt.protocol.client import INFER
from accelrt.protocol.local_socket import HEAD, OFFERED, abstract, room
from accelrt.protocol.wire import Buffer, Parts
from accelrt.serve.grpc.access import Keys
from accelrt.serve.grpc.outcomes import failure_of
from accelrt.serve.grpc.settings import GrpcSettings

logger = logging.getLogger("accelrt.serve")

_GREETING_BYTES, _GREETING_S = 1 << 14, 5.0
_FRAME_S = 60.0
"""How long the bytes of a call may take to come, once its head is there."""

_READ_AT_ONCE = 4096
"""Small calls come in one piece."""


class Answering(Protocol):
    """What answers calls: the front end of gRPC."""

    keys: Keys

    def answer(self, data: Buffer, context: Any, *, streamed: bool) -> Parts | Coroutine[Any, Any, Parts]:
        """Return the parts of the answer to a ``ModelInferRequest``, at once or later."""
        ...


def bound(settings: GrpcSettings) -> Listener | None:
    """Return a socket for clients on this machine that does not listen yet; None where there is to be none."""
    if not (settings.local_socket and OFFERED and settings.certificate is None):
        return None
    name = f"accelrt-{uuid.uuid4().hex}"
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(abstract(name))
    except OSError as error:  # some sandboxes have no such sockets; gRPC does without
        made.close()
        logger.info("no socket for clients on this machine: %s", error)
        return None
    return Listener(name, made, settings)


class Listener:
    """The socket and its connections; ``name`` is what clients are told."""

    def __init__(self, name: str, bound_socket: socket.socket, settings: GrpcSettings) -> None:
        self.name, self.settings = name, settings
        self.connections: set[_Connection] = set()
        self._socket = bound_socket
        self._server: asyncio.Server | None = None

    async def start(self, front: Answering) -> None:
        """Listen in the running event loop."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self, front), sock=self._socket)

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, wait up to ``grace_s`` seconds for the calls under way, and close."""
        if self._server is None:
            self._socket.close()
            return
        self._server.close()
        calls = [call for call in (connection.finish() for connection in self.connections) if call is not None]
        if calls:
            await asyncio.wait(calls, timeout=grace_s)
        for connection in list(self.connections):
            connection.abort()


class _Call:
    """What `FrontEnd.answer` asks of gRPC's context."""

    __slots__ = ("_deadline", "_metadata")

    def __init__(self, metadata: Sequence[tuple[str, str]], microseconds: int) -> None:
        self._metadata = metadata
        self._deadline = monotonic() + microseconds / 1e6 if microseconds else None

    def peer(self) -> str:
        return "unix:"

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())


class _Connection(asyncio.BufferedProtocol):
    """One client's connection: a greeting, then one call after the other."""

    def __init__(self, listener: Listener, front: Answering) -> None:
        self._listener, self._front = listener, front
        self._metadata: Sequence[tuple[str, str]] | None = None
        self._first = bytearray(_READ_AT_ONCE)
        self._into = memoryview(self._first)
        self._body: memoryview | None = None
        self._microseconds = 0
        self._call: asyncio.Task[None] | None = None
        self._finishing = self._unread = False
        self._alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._loop = asyncio.get_running_loop()
        self._listener.connections.add(self)
        self._allow(_GREETING_S)
        if len(self._listener.connections) > self._listener.settings.max_calls:
            self._refuse(Overloaded("The server has as many connections as it may."))

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.connections.discard(self)
        self._allow(None)
        if self._call is not None:
            self._call.cancel()

    def pause_writing(self) -> None:
        # A client that does not read its answers is not heard until it does.
        self._unread = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._unread = False
        self._listen()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._into

    def buffer_updated(self, nbytes: int) -> None:
        self._into = self._into[nbytes:]
        if self._body is None:
            came = len(self._first) - len(self._into)
            if came < HEAD.size or not self._begin(came):
                return
        if self._into:
            return
        assert self._body is not None
        body, self._body, self._into = self._body, None, memoryview(self._first)
        if self._metadata is None:
            self._greet(body)
            return
        if self._alarm is not None:
            self._allow(None)
        try:
            found = self._front.answer(body, _Call(self._metadata, self._microseconds), streamed=False)
            if isinstance(found, list):
                self._reply(0, found)
                return
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told and the server goes on
            self._fail(error)
            return
        # The client waits for the answer before it asks again; what it sends before that is left where it is.
        self._transport.pause_reading()
        self._call = self._loop.create_task(self._answer(found))

    def _begin(self, came: int) -> bool:
        """Take the head of a frame, and what came with it; return whether there is to be more of it."""
        size, self._microseconds = HEAD.unpack_from(self._first)
        most = _GREETING_BYTES if self._metadata is None else self._listener.settings.max_message_bytes
        if size > most:
            self._refuse(RequestTooLarge(f"A message of {size} bytes was announced; the server takes {most}."))
            return False
        if came - HEAD.size > size:
            self._refuse(RequestError("More bytes came than were announced: calls wait for each other."))
            return False
        self._body = self._into = room(size)
        self._into[: came - HEAD.size] = memoryview(self._first)[HEAD.size : came]
        self._into = self._into[came - HEAD.size :]
        if self._into and self._alarm is None:
            self._allow(_FRAME_S)
        return True

    def finish(self) -> asyncio.Task[None] | None:
        """Close now, or when the call that is under way, which is returned, has been answered."""
        self._finishing = True
        if self._call is None:
            self._transport.close()
        return self._call

    def abort(self) -> None:
        """Close, whatever is under way."""
        self._transport.abort()

    def _greet(self, body: memoryview) -> None:
        try:
            metadata = [(str(key), str(value)) for key, value in json.loads(bytes(body))]
        except (ValueError, TypeError):
            self._refuse(RequestError("The first frame is no list of metadata."))
            return
        if not self._front.keys.admit(INFER, metadata):
            self._refuse(NotAllowed("The client shows no API key that this server knows."))
            return
        self._metadata = metadata
        self._allow(None)
        self._transport.write(HEAD.pack(0, 0))

    async def _answer(self, coming: Coroutine[Any, Any, Parts]) -> None:
        try:
            self._reply(0, await coming)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
        self._call = None
        if self._finishing:
            self._transport.close()
        else:
            self._listen()

    def _listen(self) -> None:
        """Read on, unless something has to be done before."""
        if self._call is None and not self._unread and not self._transport.is_closing():
            self._transport.resume_reading()

    def _fail(self, error: Exception) -> None:
        self._reply(1, [json.dumps(asdict(failure_of(error))).encode()])

    def _reply(self, failed: int, parts: Parts) -> None:
        self._transport.write(b"".join((HEAD.pack(sum(map(len, parts)), failed), *parts)))

    def _refuse(self, error: Exception) -> None:
        """Say why, and close."""
        self._fail(error)
        self._transport.close()

    def _allow(self, seconds: float | None) -> None:
        """Close the connection after so many seconds, or leave it."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if seconds is None else self._loop.call_later(seconds, self._transport.abort)
