"""A request that has come in whole, through an ASGI application and back as a reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import unquote

from accelrt.serve.http.connection import Incoming
from accelrt.serve.http.replies import ID_HEADER, Reply, reply_of

Message: TypeAlias = MutableMapping[str, Any]
AsgiApp: TypeAlias = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_OWN = frozenset({"content-length", "content-type", "connection", "date", "transfer-encoding"})


async def through(app: AsgiApp, request: Incoming) -> Reply:
    """Return an application's reply to a request; one that fails is a reply too."""
    path, _, query = request.target.partition(b"?")
    if b"://" in path[:8]:
        path = b"/" + path.split(b"://", 1)[1].partition(b"/")[2]  # the form that proxies use
    host, _, port = request.peer.rpartition(":")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method.decode("latin-1"),
        "scheme": "http",
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(request.headers.items()),
        "client": (host, int(port)) if port.isdecimal() else None,
        "server": None,
        "state": {},
    }
    reply = Reply(500, content_type="")
    body = bytearray()
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": bytes(request.body), "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message.get("headers", ())
            }
            reply.content_type = headers.get("content-type", "")
            reply.headers = {name: value for name, value in headers.items() if name not in _OWN} or None
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception as error:  # noqa: BLE001 a request must not end the connection, whatever it meets
        return reply_of(error, request.headers.get(ID_HEADER))
    reply.body = bytes(body)
    return reply
