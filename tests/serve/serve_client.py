"""A server on a thread, and a client that can misbehave, for tests of the HTTP front end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httptools

from accelrt.serve.http.server import HttpServer, start
from accelrt.serve.settings import ServerSettings


class Running:
    """A server on an event loop of its own thread."""

    def __init__(self, service: Any, *, regions: Any = None, telemetry: Any = None, **settings: Any) -> None:
        self.service = service
        self.settings = ServerSettings(Path(), **{"http_port": 0, **settings})
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server: HttpServer = self.do(start(service, self.settings, regions=regions, telemetry=telemetry))
        self.port = self.server.port
        self.address = f"127.0.0.1:{self.port}"

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def close(self) -> None:
        self.do(self.server.stop(0.0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextmanager
def running(service: Any, **settings: Any) -> Iterator[Running]:
    server = Running(service, **settings)
    try:
        yield server
    finally:
        server.close()


class Answer:
    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""
        self.whole = False

    # what httptools calls
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True

    status = 0

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Raw:
    """A socket that sends just what it is told to."""

    def __init__(self, port: int, timeout: float = 10.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        """Read one reply, and keep what follows it."""
        data = self._rest
        while b"\r\n\r\n" not in data:
            got = self.socket.recv(65536)
            if not got:
                raise EOFError(data)
            data += got
        head, _, rest = data.partition(b"\r\n\r\n")
        answer = Answer()
        parser = httptools.HttpResponseParser(answer)
        parser.feed_data(head + b"\r\n\r\n")
        answer.status = parser.get_status_code()
        if answer.status == 100:
            self._rest = rest
            return answer
        length = int(answer.headers["content-length"])
        while len(rest) < length:
            got = self.socket.recv(65536)
            if not got:
                raise EOFError(rest)
            rest += got
        answer.body, self._rest = rest[:length], rest[length:]
        return answer

    def ends(self) -> bool:
        """Tell whether the server closes the connection, sending nothing more."""
        try:
            return not self._rest and self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def post(target: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """The bytes of a POST."""
    lines = [
        f"POST {target} HTTP/1.1",
        "Host: localhost",
        *headers,
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ask(port: int, request: bytes) -> Answer:
    with Raw(port) as raw:
        raw.send(request)
        return raw.answer()
