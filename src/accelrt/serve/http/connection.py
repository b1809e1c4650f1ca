"""One connection of HTTP/1.1: llhttp parses, this keeps order, limits and time.

Nothing lies between it and an answer that is ready at once: no task, no queue, one write. Servers for ASGI make a task
and an event for each request and copy its body twice, and have no limits on headers nor on the time they take.

A client sends the same head again and again. One that was just parsed, and is there again byte for byte, means what it
meant: it is not parsed again.

A body whose length is known is received where its tensors will be aligned, so that they can be used where they lie.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import httptools
import numpy as np

from accelrt.errors import RequestTimeout
from accelrt.serve.http.replies import Reply, failure, reply_of
from accelrt.serve.settings import Limits

MOST_PIPELINED = 16
"""Requests that wait behind one of the same connection before it is no longer read."""

LARGE_PIPELINED = 64 * 2**10
"""Bytes of a body behind which a connection is no longer read until it was answered."""

MOST_UPGRADES = 16
"""Offers to upgrade on one connection that are not heard; clients make one."""

LINGER_S = 2.0
"""How long what a refused client still sends is thrown away, so that it gets to read why."""

SLOWEST_BODY = 64 * 2**10
"""Bytes a second that a client must keep up after `Limits.body_s`."""

_IDLE, _HEAD, _BODY, _DEAF = range(4)
_ALIGNED = 64
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


@dataclass(slots=True)
class Incoming:
    """A request that has come in whole.

    Attributes:
        method: ``POST``.
        target: Path and query as they were sent.
        headers: Names in lower case; those that came several times joined by commas.
        body: All of it.
        keep_alive: Whether the client wants to go on with the connection.
        arrived_ns: `time.monotonic_ns` when its last byte came.
        peer: The client's address.
    """

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    body: bytes | memoryview
    keep_alive: bool
    arrived_ns: int
    peer: str


@dataclass(frozen=True, slots=True)
class _KnownHead:
    """A head that was parsed, taken in, and whose connection goes on after its request.

    Attributes:
        head: Its bytes, from the method to the empty line.
        whole: Bytes of the request, the body included.
    """

    head: bytes
    whole: int
    method: bytes
    target: bytes
    headers: dict[bytes, bytes]


class Host(Protocol):
    """What a connection asks of the server that it belongs to."""

    limits: Limits
    draining: bool
    connections: set[Connection]
    date: str
    """The header of the current second, with its line end."""
    on_reply: Callable[[Incoming, Reply], str] | None
    """Called with each reply before it is sent, for logs and request ids; returns header lines to add."""

    def refusal(self, target: bytes, headers: dict[bytes, bytes]) -> Reply | None:
        """Return why a request is not even read, None if it is; the same for the same arguments, always."""
        ...

    def answer(self, request: Incoming) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer, at once or later; it does not raise."""
        ...


class _RefusedError(Exception):
    """Ends the parser's work on a connection; the reply is on its way."""


class Connection(asyncio.Protocol):
    """Reads requests, has them answered one after another, and writes replies in their order."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._limits = host.limits
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._peer = ""
        self._waiting: deque[Incoming | Reply] = deque()
        self._task: asyncio.Task[None] | None = None
        self._task_since = 0.0
        self._timed_out = False
        self._reading, self._since = _IDLE, time.monotonic()
        self._read_paused = self._write_paused = self._ended = False
        self._write_since, self._unwritten = 0.0, 0
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = self._header_count = 0
        self._length: int | None = None
        self._body: bytes | memoryview = b""
        self._gathered = bytearray()
        self._received = 0
        self._upgrading = self._upgrades = 0
        self._completed = 0
        self._known: _KnownHead | None = None

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        address = transport.get_extra_info("peername")
        self._peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else ""
        self._host.connections.add(self)
        if len(self._host.connections) > self._limits.connections:
            self._refuse(failure(503, "The server has as many connections as it takes.", {"retry-after": "1"}))

    def connection_lost(self, error: Exception | None) -> None:
        self._host.connections.discard(self)
        self._ended, self._reading = True, _DEAF
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> bool:
        """The client will send no more, and may still want to read."""
        if self._reading in (_HEAD, _BODY):
            return False  # what it was sending will never be whole
        self._ended, self._reading = True, _DEAF
        return self.busy

    def pause_writing(self) -> None:
        self._write_paused, self._write_since = True, time.monotonic()
        self._unwritten = self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self._write_paused = False
        self._go_on()

    def data_received(self, data: bytes) -> None:
        rest = data if self._known is None else self._take_known(data, self._known)
        while rest:
            rest = self._feed(rest)

    def _take_known(self, data: bytes, known: _KnownHead) -> bytes:
        """Take in whole requests with the head of the one before, and return the rest, for the parser."""
        head, whole, at = known.head, known.whole, 0
        # The parser is between two messages, and would be there again after each of these.
        while self._reading == _IDLE and len(data) - at >= whole and data.startswith(head, at):
            body = data[at + len(head) : at + whole]
            at += whole
            self._take(known.method, known.target, known.headers, body, keep_alive=True)
        return data[at:] if at else data

    def _know(self, data: bytes) -> None:
        """Remember the head of a request that was all of ``data``, if there is nothing special about it."""
        length, headers = self._length, self._headers
        if length is None or len(data) - length > self._limits.header_bytes or b"upgrade" in headers:
            return
        if b"transfer-encoding" in headers or b"expect" in headers or not self._parser.should_keep_alive():
            return
        end = data.find(b"\r\n\r\n") + 4
        if end >= 4 and end + length == len(data):
            self._known = _KnownHead(data[:end], len(data), self._parser.get_method(), self._target, headers)

    def _feed(self, data: bytes) -> bytes:
        """Read bytes, and return those that are to be read anew, which are none but after an upgrade."""
        reading = self._reading
        if reading == _DEAF:
            return b""
        if self._upgrading:
            return self._read_plainly(data)
        if reading == _HEAD:
            self._head_bytes += len(data)
        self._known, self._completed = None, 0
        upgraded_at = -1
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            upgraded_at = upgrade.args[0]
        except httptools.HttpParserError as error:
            self._give_up(error)
            return b""
        if upgraded_at >= 0:
            return self._ignore_upgrade(data[upgraded_at:])
        if self._reading == _HEAD and self._head_bytes > self._limits.header_bytes:
            self._refuse_head()
        elif reading == self._reading == _IDLE and self._completed == 1:
            self._know(data)
        return b""

    def _give_up(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if cause is not None and not isinstance(cause, _RefusedError | httptools.HttpParserError):
            self._refuse(reply_of(cause))  # a mistake of this server, not of the client
        elif self._reading != _DEAF:
            self._refuse(failure(400, f"This is no request of HTTP/1.1: {error or 'it cannot be parsed'}."))

    # What the parser calls

    def on_message_begin(self) -> None:
        self._reading, self._since = _HEAD, time.monotonic()
        self._target = b""
        self._headers = {}
        self._head_bytes = self._header_count = 0
        self._length, self._body, self._received = None, b"", 0

    def on_url(self, url: bytes) -> None:
        self._target += url
        if len(self._target) > self._limits.header_bytes:
            self._refuse(failure(414, f"The request line is longer than {self._limits.header_bytes} bytes."))
            raise _RefusedError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        self._head_bytes += len(name) + len(value)
        # Counted twice where headers come in pieces, which only makes the limit come a little early for those.
        if self._header_count > self._limits.headers or self._head_bytes > 2 * self._limits.header_bytes:
            self._refuse_head()
            raise _RefusedError
        if self._reading == _BODY:
            return  # a trailer, which nobody asked for
        name = name.lower()
        headers = self._headers
        headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        headers = self._headers
        self._reading, self._since = _BODY, time.monotonic()
        refusal = self._host.refusal(self._target, headers)
        if refusal is not None:
            self._refuse(refusal)
            raise _RefusedError
        length = headers.get(b"content-length")
        if length is not None:
            self._length = int(length)  # digits only, as the parser has checked
            if self._length > self._limits.body_bytes:
                self._refuse_body()
                raise _RefusedError
        if b"expect" in headers:
            self._expect(headers[b"expect"])

    def on_body(self, body: bytes) -> None:
        received = self._received + len(body)
        length = self._length
        if length is None:
            if received > self._limits.body_bytes:
                self._refuse_body()
                raise _RefusedError
            self._gathered += body
        elif received == length and not self._received:
            self._body = body
        else:
            if not self._received:
                self._body = self._room(length)
            self._body[self._received : received] = body  # type: ignore[index]
        self._received = received

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # not before its body is read, see `_ignore_upgrade`
        self._complete(self._parser.should_keep_alive())

    def _complete(self, keep_alive: bool) -> None:
        if self._gathered:
            self._body = memoryview(self._gathered).toreadonly()
            self._gathered = bytearray()
        body, self._body = self._body, b""
        self._completed += 1
        self._take(self._parser.get_method(), self._target, self._headers, body, keep_alive)

    def _take(
        self, method: bytes, target: bytes, headers: dict[bytes, bytes], body: bytes | memoryview, keep_alive: bool
    ) -> None:
        """Have a request answered that has come in whole, now or after those before it."""
        now = time.monotonic_ns()
        request = Incoming(method, target, headers, body, keep_alive, now, self._peer)
        self._reading, self._since = _IDLE, now / 1e9
        if self._task is None and not self._waiting and not self._write_paused:
            self._run(request)
            return
        self._waiting.append(request)
        # What waits is held in memory, so behind a large request nothing more is read.
        full = len(self._waiting) >= MOST_PIPELINED or len(request.body) > LARGE_PIPELINED
        if full and not self._read_paused:
            self._read_paused = True
            self._transport.pause_reading()

    def _room(self, length: int) -> memoryview:
        """Return where a body goes: so that what follows its JSON lies on a boundary of 64 bytes."""
        text = self._headers.get(b"inference-header-content-length", b"0")
        json_length = int(text) if text.isdigit() and len(text) < 10 else 0
        # Not touched before it is written to: a client that only promises a large body costs no memory.
        flat: Any = np.empty(length + _ALIGNED, np.uint8)
        start = -(flat.ctypes.data + json_length) % _ALIGNED
        return memoryview(flat)[start : start + length]

    def _expect(self, value: bytes) -> None:
        if value.lower() != b"100-continue":
            self._refuse(failure(417, "The only expectation that is met is 100-continue."))
            raise _RefusedError
        if not self.busy:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # Upgrades: Java's client asks for HTTP/2 with its first request. Nobody has to agree, so it is not heard; but the
    # parser stops at such a request, and takes its body for the other protocol.

    def _ignore_upgrade(self, rest: bytes) -> bytes:
        self._upgrades += 1
        chunked, method = b"transfer-encoding" in self._headers, self._parser.get_method()
        if chunked or method == b"CONNECT" or self._upgrades > MOST_UPGRADES:
            self._refuse(failure(501, "The server speaks HTTP/1.1 only; send the request without Upgrade."))
            return b""
        if self._length:
            self._upgrading, self._reading = self._length, _BODY
            return self._read_plainly(rest)
        self._end_upgrade()
        return rest

    def _read_plainly(self, data: bytes) -> bytes:
        mine, rest = data[: self._upgrading], data[self._upgrading :]
        self._upgrading -= len(mine)
        if mine:
            self.on_body(mine)
        if not self._upgrading:
            self._end_upgrade()
        return rest

    def _end_upgrade(self) -> None:
        self._complete(keep_alive=True)
        self._parser = httptools.HttpRequestParser(self)

    # Answers

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or waits for it."""
        return self._task is not None or bool(self._waiting)

    def _run(self, request: Incoming) -> None:
        answer = self._host.answer(request)
        if type(answer) is Reply:
            self._send(request, answer)
            return
        self._task_since = time.monotonic()
        self._task = self._loop.create_task(self._later(request, answer))  # type: ignore[arg-type]

    async def _later(self, request: Incoming, answer: Coroutine[Any, Any, Reply]) -> None:
        try:
            reply = await answer
        except asyncio.CancelledError:
            if not self._timed_out:
                self._task = None
                raise
            limit = self._limits.request_s
            reply = reply_of(RequestTimeout(f"The request was not answered within {limit:g} seconds."))
            reply.close = True
        self._task = None
        if self._transport.is_closing():
            return
        self._send(request, reply)
        self._go_on()

    def _go_on(self) -> None:
        """Answer what has come in meanwhile."""
        while self._waiting and self._task is None and not self._write_paused:
            if self._transport.is_closing():
                self._waiting.clear()
                return
            item = self._waiting.popleft()
            if isinstance(item, Reply):
                self._send(None, item)
            else:
                self._run(item)
        if self._read_paused and not self._waiting and not self._transport.is_closing():
            self._read_paused = False
            self._transport.resume_reading()

    def _send(self, request: Incoming | None, reply: Reply) -> None:
        host, transport = self._host, self._transport
        if transport.is_closing():
            return
        body = reply.body
        length = len(body) if not reply.parts else reply.length
        head = f"{_STATUS_LINES[reply.status]}content-length: {length}\r\n{host.date}"
        if reply.content_type:
            head += f"content-type: {reply.content_type}\r\n"
        if reply.headers is not None:
            for name, value in reply.headers.items():
                head += f"{name}: {value}\r\n"
        ends = reply.close or host.draining or (self._ended and not self._waiting)
        if request is not None:
            ends = ends or not request.keep_alive
            if host.on_reply is not None:
                head += host.on_reply(request, reply)
            if not ends and b"connection" in request.headers:
                head += "connection: keep-alive\r\n"  # what a client of HTTP/1.0 must be told
            if request.method == b"HEAD":
                reply.parts, body = (), b""
        if ends:
            head += "connection: close\r\n"
        first = f"{head}\r\n".encode("latin-1") + body
        if reply.parts:
            transport.writelines((first, *reply.parts))
        else:
            transport.write(first)
        if not ends:
            return
        self._waiting.clear()
        if self._reading == _IDLE or self._ended:
            self._reading = _DEAF
            transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Close in two steps: a connection closed while bytes come in is reset, and the reply is lost with it."""
        self._reading, self._since = _DEAF, time.monotonic()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()

    def _refuse(self, reply: Reply) -> None:
        """Send a reply after those that are due before it, read nothing more, and close."""
        reply.close = True
        self._reading, self._since = _DEAF, time.monotonic()
        self._gathered, self._body = bytearray(), b""
        if self.busy:
            self._waiting.append(reply)
        else:
            self._send(None, reply)

    def _refuse_head(self) -> None:
        limits = self._limits
        self._refuse(failure(431, f"At most {limits.headers} headers of {limits.header_bytes} bytes are taken."))

    def _refuse_body(self) -> None:
        self._refuse(failure(413, f"The body is larger than {self._limits.body_bytes} bytes, which is the limit."))

    # What the server calls

    def check(self, now: float) -> None:
        """Close the connection, or give up its request, where a time is over."""
        limits = self._limits
        waited = now - self._since
        if self._write_paused and self._transport.get_write_buffer_size() < self._unwritten:
            self._write_since, self._unwritten = now, self._transport.get_write_buffer_size()
        if self._write_paused and now - self._write_since > limits.write_s:
            self._transport.abort()
        elif self._task is not None:
            if now - self._task_since > limits.request_s and not self._timed_out:
                self._timed_out = True
                self._task.cancel()
        elif self._reading == _DEAF:
            if waited > LINGER_S and not self._write_paused and not self._waiting:
                self._transport.abort()
        elif self._reading == _HEAD:
            if waited > limits.header_s:
                self._refuse(failure(408, f"The headers did not come within {limits.header_s:g} seconds."))
        elif self._reading == _BODY:
            if waited > limits.body_s + self._received / SLOWEST_BODY:
                self._refuse(failure(408, "The body came too slowly."))
        elif waited > limits.idle_s and not self._waiting:
            self._transport.close()

    @property
    def receiving(self) -> int:
        """Bytes that came of a body which is not whole yet."""
        return self._received if self._reading == _BODY else 0

    def refuse_for_memory(self) -> None:
        """Give up the body that is coming in, because those of all connections take too much memory."""
        self._refuse(failure(503, "The server is receiving as much as it takes at once.", {"retry-after": "1"}))

    def drain(self) -> None:
        """Close the connection as soon as nothing is under way on it."""
        if not self.busy and self._reading in (_IDLE, _DEAF):
            self._transport.close()

    def abort(self) -> None:
        """Close the connection now."""
        self._transport.abort()
