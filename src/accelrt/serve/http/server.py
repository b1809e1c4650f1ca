"""The HTTP server: listens, hands requests for inference on without a detour, and all others to the control routes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from functools import partial
from typing import Any
from urllib.parse import unquote

from accelrt.errors import ServingError
from accelrt.serve.http.access import Doorman
from accelrt.serve.http.asgi import AsgiApp, through
from accelrt.serve.http.connection import Connection, Incoming
from accelrt.serve.http.control import control_app
from accelrt.serve.http.inference import Inference, TracedInference
from accelrt.serve.http.replies import ID_HEADER, Reply, clean_id, reply_of
from accelrt.serve.http.web import could_be_name
from accelrt.serve.interface import Service
from accelrt.serve.settings import Limits, ServerSettings, is_loopback, tls_context
from accelrt.serve.shared_memory import SharedMemoryRegistry
from accelrt.serve.telemetry import Telemetry, traced

request_logger = logging.getLogger("accelrt.serve.requests")

CHECK_S = 0.5
"""Between two looks at the times of all connections."""

BACKLOG = 2048
_MOST_ROUTES, _LONGEST_ROUTE = 4096, 512


class HttpServer:
    """A running server; made by `start`. It is the host of its connections."""

    def __init__(
        self,
        service: Service,
        settings: ServerSettings,
        regions: SharedMemoryRegistry | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        if regions is None:
            regions = SharedMemoryRegistry(enabled=settings.shared_memory, largest=settings.limits.body_bytes)
        self.limits: Limits = settings.limits
        self.draining = False
        self.connections: set[Connection] = set()
        self.date = ""
        self.on_reply: Callable[[Incoming, Reply], str] | None = self._ids_and_logs
        self._logs = settings.log_requests
        if telemetry is None:
            self._inference = Inference(service, settings.limits, regions)
        else:
            self._inference = TracedInference(traced(service, telemetry), settings.limits, regions, telemetry)
        self._control: AsgiApp = control_app(service, settings, self._inference, draining=lambda: self.draining)
        keyless = not settings.api_keys
        self._doorman = Doorman(settings.api_keys, local=keyless and is_loopback(settings.host))
        self._routes: dict[bytes, tuple[str, str] | None] = {}
        self._listener: asyncio.Server | None = None
        self._checks: asyncio.Task[None] | None = None
        self.refusal = self._doorman.refusal

    @property
    def port(self) -> int:
        """The port that is listened at."""
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    async def listen(self, settings: ServerSettings) -> None:
        """Begin to accept connections.

        Raises:
            ServingError: The address cannot be had.
            OptionError: The TLS files cannot be used.
        """
        loop = asyncio.get_running_loop()
        tls = tls_context(settings.tls)
        self._tick()
        try:
            self._listener = await loop.create_server(
                lambda: Connection(self, loop),
                settings.host,
                settings.http_port or 0,
                ssl=tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=None if tls is None else self.limits.header_s,
            )
        except (OSError, OverflowError) as error:
            where = f"{settings.host}:{settings.http_port}"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ServingError(f"The server cannot listen at {where}: {reason}.", hint="Give another port.") from error
        for listening in self._listener.sockets:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._checks = loop.create_task(self._check_always())

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, answer what is under way for ``grace_s`` seconds at most, and close.

        Cancelling it, as a second signal does, closes at once.
        """
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        deadline = time.monotonic() + grace_s
        try:
            while self.connections and time.monotonic() < deadline:
                for connection in list(self.connections):
                    connection.drain()
                await asyncio.sleep(0.01)
        finally:
            for connection in list(self.connections):
                connection.abort()
            if self._checks is not None:
                self._checks.cancel()
        await asyncio.sleep(0)  # so that the transports hear of it

    def answer(self, request: Incoming) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer a request; see `accelrt.serve.http.connection.Host`."""
        target = request.target
        try:
            route = self._routes[target]
        except KeyError:
            route = self._route(target)
        if route is not None and request.method == b"POST":
            return self._inference.answer(
                route[0], route[1], request.headers, request.body, request.arrived_ns, request.peer
            )
        return through(self._control, request)

    def _route(self, target: bytes) -> tuple[str, str] | None:
        """Return model and version of a target for inference, None for other targets; remembers some."""
        route = infer_route(target)
        if len(target) <= _LONGEST_ROUTE:
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()
            self._routes[target] = route
        return route

    def _ids_and_logs(self, request: Incoming, reply: Reply) -> str:
        """Return the header of the request's id, and log the request where that is wanted."""
        given = request.headers.get(ID_HEADER)
        if given is None and not self._logs:
            return ""
        id_ = clean_id(given) or secrets.token_hex(8)
        if self._logs:
            milliseconds = (time.monotonic_ns() - request.arrived_ns) / 1e6
            request_logger.info(
                "request",
                extra={
                    "request_id": id_,
                    "method": request.method.decode("latin-1"),
                    "target": request.target.partition(b"?")[0].decode("latin-1")[:512],
                    "status": reply.status,
                    "bytes_in": len(request.body),
                    "bytes_out": reply.length,
                    "ms": round(milliseconds, 3),
                    "peer": request.peer,
                },
            )
        return f"x-request-id: {id_}\r\n"

    def _tick(self) -> None:
        self.date = f"date: {formatdate(usegmt=True)}\r\n"

    async def _check_always(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._tick()
            self._keep_memory()
            now = time.monotonic()
            for connection in list(self.connections):
                _safely(connection, partial(Connection.check, now=now))

    def _keep_memory(self) -> None:
        """Refuse the largest bodies that are coming in while all of them together pass the limit."""
        connections = [connection for connection in self.connections if connection.receiving]
        total = sum(connection.receiving for connection in connections)
        if total <= self.limits.receiving_bytes:
            return
        for connection in sorted(connections, key=lambda one: one.receiving, reverse=True):
            total -= connection.receiving
            _safely(connection, Connection.refuse_for_memory)
            if total <= self.limits.receiving_bytes:
                return


def _safely(connection: Connection, check: Callable[[Connection], None]) -> None:
    """Check a connection; one that fails must not end the checks of all."""
    try:
        check(connection)
    except Exception as error:  # noqa: BLE001 see above
        reply_of(error)  # logs it
        connection.abort()


def infer_route(target: bytes) -> tuple[str, str] | None:
    """Return model and version of ``/v2/models/NAME[/versions/VERSION]/infer``, None for any other target."""
    path = target.partition(b"?")[0]
    if not path.startswith(b"/v2/models/") or not path.endswith(b"/infer"):
        return None
    parts = path[len(b"/v2/models/") : -len(b"/infer")].split(b"/")
    if len(parts) == 1 and parts[0]:
        return _harmless(parts[0], b"")
    if len(parts) == 3 and parts[0] and parts[1] == b"versions" and parts[2]:
        return _harmless(parts[0], parts[2])
    return None


def _harmless(name: bytes, version: bytes) -> tuple[str, str] | None:
    """Return the two as text; those that could be paths go the slow way, where they are refused."""
    plain = unquote(name.decode("latin-1")), unquote(version.decode("latin-1"))
    return plain if could_be_name(plain[0]) and (not version or could_be_name(plain[1])) else None


async def start(
    service: Service,
    settings: ServerSettings,
    *,
    regions: SharedMemoryRegistry | None = None,
    telemetry: Telemetry | None = None,
) -> HttpServer:
    """Start a server for a service, on the running event loop.

    Args:
        service: The models.
        settings: How.
        regions: Shared memory, if it is shared with another front end.
        telemetry: Where traces go; None for nowhere.

    Returns:
        The server, with its ``port`` and ``stop(grace_s)``.

    Raises:
        ServingError: The address cannot be had.
        OptionError: The TLS files cannot be used.
    """
    server = HttpServer(service, settings, regions, telemetry)
    await server.listen(settings)
    return server
