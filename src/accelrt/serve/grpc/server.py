"""The server: gRPC's asyncio server in the caller's event loop, with bytes in and bytes out where tensors travel."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from time import monotonic_ns
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from accelrt.errors import NotAllowed, OptionError, RequestError, ServingError
from accelrt.protocol.faults import KIND, RETRY_AFTER
from accelrt.protocol.leases import TOKEN, is_token
from accelrt.protocol.local_socket import advertised
from accelrt.protocol.messages import METHODS
from accelrt.protocol.wire import Buffer, Parts, read_request, write_stream_response
from accelrt.serve.extensions import extensions
from accelrt.serve.grpc.access import Keys
from accelrt.serve.grpc.control import ABSENT, Control, local_regions
from accelrt.serve.grpc.local_socket import Listener, bound
from accelrt.serve.grpc.outcomes import failure_of
from accelrt.serve.grpc.settings import GrpcSettings
from accelrt.serve.grpc.tensors import request_of, response_of, uses_shared_memory
from accelrt.serve.interface import Lending, ServedModel, Service
from accelrt.serve.shared_memory import SharedMemoryRegistry
from accelrt.serve.telemetry import CARRIED, Telemetry, traced

_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
STREAM_BYTES = 8 << 20
"""Bytes of requests of one stream that are under way at a time, or one request that is larger."""


class Handle:
    """A server that runs; ``port`` is where it listens."""

    def __init__(self, server: grpc.aio.Server, port: int, stopping: asyncio.Event, local: Listener | None) -> None:
        self._server, self.port, self._stopping, self._local = server, port, stopping, local

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, wait up to ``grace_s`` seconds for those under way, and cut off the rest."""
        self._stopping.set()
        local = [] if self._local is None else [self._local.stop(grace_s)]
        await asyncio.gather(self._server.stop(grace_s), *local)


async def serve(
    service: Service,
    settings: GrpcSettings,
    regions: SharedMemoryRegistry | None,
    lender: Lending | None = None,
    telemetry: Telemetry | None = None,
) -> Handle:
    """Start a server; see `accelrt.serve.grpc.start`."""
    if regions is None:
        regions = SharedMemoryRegistry(enabled=settings.shared_memory, largest=settings.max_message_bytes)
    credentials = _credentials(settings)
    server = grpc.aio.server(options=_options(settings), maximum_concurrent_rpcs=settings.max_calls)
    stopping = asyncio.Event()
    local = bound(settings)
    if telemetry is None:
        front = FrontEnd(service, regions, settings, stopping, lender, local)
    else:
        front = TracedFrontEnd(service, regions, settings, stopping, telemetry, lender, local)
    server.add_generic_rpc_handlers((front,))
    address = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
        if port == 0:
            raise RuntimeError("the port cannot be had")
    except RuntimeError as error:
        raise ServingError(
            f"gRPC cannot listen on {address}: {error}.", hint="Is another server running there?"
        ) from error
    await server.start()
    if local is not None:
        await local.start(front)
    return Handle(server, port, stopping, local)


class FrontEnd(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds what answers a method, for callers who may call it."""

    def __init__(
        self,
        service: Service,
        regions: SharedMemoryRegistry,
        settings: GrpcSettings,
        stopping: asyncio.Event,
        lender: Lending | None = None,
        local: Listener | None = None,
    ) -> None:
        self._service, self._regions, self._settings, self._stopping = service, regions, settings, stopping
        self._lender = lender
        # Regions are the whole server's, and clients who share a machine may not read each other's.
        offered = extensions(shared_memory=regions.enabled)
        socket = () if local is None else (advertised(local.name),)
        self._extensions = (*offered, *(lender.extensions if lender is not None else ()), *socket)
        self.keys = Keys(settings.api_keys)
        self._refused = grpc.stream_stream_rpc_method_handler(_refuse_key)
        self._handlers = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self.infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.stream),
            **{name: self._control_handler(name) for name in self._control(service)},
            **{name: grpc.unary_unary_rpc_method_handler(_absent(reason)) for name, reason in ABSENT.items()},
        }
        self._handlers = {METHODS[name].path: handler for name, handler in self._handlers.items()}
        self._handlers[_HEALTH] = grpc.unary_unary_rpc_method_handler(self.health)

    def service(self, details: Any) -> Any:
        """Return the handler of a call; None makes it UNIMPLEMENTED."""
        if not self.keys.admit(details.method, details.invocation_metadata):
            return self._refused
        return self._handlers.get(details.method)

    async def infer(self, data: bytes, context: Any) -> bytes:
        """Answer one ``ModelInfer``."""
        try:
            found = self.answer(data, context, streamed=False)
            return b"".join(found if isinstance(found, list) else await found)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status and the server goes on
            return bytes(await _abort(context, error))

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answer the requests of one stream, in their order, several of them under way at a time."""
        in_order: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._settings.stream_window)
        under_way: set[asyncio.Task[Any]] = set()
        # Answers that the client does not read are kept, so that a count of requests alone would be no bound on memory.
        held, sizes, answered = 0, deque[int](), asyncio.Event()

        async def read() -> None:
            nonlocal held
            try:
                async for data in requests:
                    if self._stopping.is_set():
                        break
                    await room.acquire()
                    while held and held + len(data) > STREAM_BYTES:
                        answered.clear()
                        await answered.wait()
                    held += len(data)
                    sizes.append(len(data))
                    task = asyncio.ensure_future(self._answer_in_stream(data, context))
                    under_way.add(task)
                    in_order.put_nowait(task)
            finally:
                in_order.put_nowait(None)

        reader = asyncio.ensure_future(read())
        try:
            while (task := await in_order.get()) is not None:
                answer = await task
                under_way.discard(task)
                yield answer
                room.release()
                held -= sizes.popleft()
                answered.set()
        finally:
            # The client went away, or all is answered and there is nothing left to cancel.
            left = [reader, *under_way]
            for one in left:
                one.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _of(self, context: Any) -> Service:
        """Return what the caller may ask: the service, or where slices are lent, its own."""
        if self._lender is None:
            return self._service
        metadata = context.invocation_metadata()
        token = next((value for name, value in metadata if name == TOKEN), None)
        if token is not None and not (isinstance(token, str) and is_token(token)):
            raise NotAllowed(
                f"The metadata {TOKEN} is no token: those are 32 to 128 letters, digits, '-' and '_'.",
                hint='Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"',
            )
        return self._lender.of(self.keys.who(metadata), token)

    def _control(self, service: Service) -> Mapping[str, Callable[[Any, str], Awaitable[Any]]]:
        return Control(service, self._regions, self._extensions).methods()

    def _control_handler(self, name: str) -> Any:
        method = METHODS[name]

        async def handle(data: bytes, context: Any) -> Any:
            try:
                try:
                    request = method.request.FromString(data)
                except DecodeError as error:  # gRPC itself would call it UNKNOWN: a server's own mistake
                    raise RequestError(f"The request is no {method.request.DESCRIPTOR.name}: {error}") from error
                return await self._control(self._of(context))[name](request, context.peer())
            except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status and the server goes on
                return await _abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle, response_serializer=method.response.SerializeToString)

    async def health(self, data: bytes, context: Any) -> bytes:
        """Answer ``grpc.health.v1.Health/Check``; whatever service is named, the answer is the server's."""
        return _SERVING if self._service.ready() and not self._stopping.is_set() else _NOT_SERVING

    def answer(self, data: Buffer, context: Any, *, streamed: bool) -> Parts | Coroutine[Any, Any, Parts]:
        """Return the parts of the answer to a ``ModelInferRequest``, at once or later.

        Raises:
            AccelrtError: Whatever the client is to be told.
        """
        arrived = monotonic_ns()
        wire = read_request(data)
        if uses_shared_memory(wire):
            local_regions(self._regions, context.peer())
        service = self._service if self._lender is None else self._of(context)
        request, answering = request_of(wire, self._regions, arrived)
        if not streamed and (left := context.time_remaining()) is not None:
            # What is not begun when the client stops waiting need not be begun at all.
            left_us = max(1, int(left * 1e6))
            request.timeout_us = min(request.timeout_us, left_us) if request.timeout_us else left_us
        model: ServedModel | None = service.find(wire.model_name, wire.model_version)
        response = None if model is None else model.infer_now(request)
        if response is not None:
            return response_of(response, answering, self._regions, streamed=streamed)

        async def later() -> Parts:
            found = model or await service.model(wire.model_name, wire.model_version)
            return response_of(await found.infer(request), answering, self._regions, streamed=streamed)

        return later()

    async def _answer_in_stream(self, data: bytes, context: Any) -> bytes:
        try:
            found = self.answer(data, context, streamed=True)
            return write_stream_response(found if isinstance(found, list) else await found)
        except Exception as error:  # noqa: BLE001 - an error answers its own request; the stream goes on
            return write_stream_response(_error_head(data), failure_of(error).details)


class TracedFrontEnd(FrontEnd):
    """A front end that leaves a span for each request for inference, those of streams too."""

    def __init__(
        self,
        service: Service,
        regions: SharedMemoryRegistry,
        settings: GrpcSettings,
        stopping: asyncio.Event,
        telemetry: Telemetry,
        lender: Lending | None = None,
        local: Listener | None = None,
    ) -> None:
        super().__init__(traced(service, telemetry), regions, settings, stopping, lender, local)
        self._telemetry = telemetry

    def answer(self, data: Buffer, context: Any, *, streamed: bool) -> Coroutine[Any, Any, Parts]:
        """Return what the other front end does, within a span."""
        return self._traced(super().answer, data, context, streamed)

    async def _traced(self, answer: Callable[..., Any], data: Buffer, context: Any, streamed: bool) -> Parts:
        carrier = {key: str(value) for key, value in context.invocation_metadata() or () if key in CARRIED}
        span = self._telemetry.request("grpc", carrier, monotonic_ns())
        try:
            with span.current():
                found = answer(data, context, streamed=streamed)
                parts: Parts = found if isinstance(found, list) else await found
        except BaseException as error:
            span.end_grpc(error)
            raise
        span.end_grpc()
        return parts


def _error_head(data: bytes) -> Parts:
    """Return a response without tensors, so that a client knows which of its requests an error belongs to."""
    from accelrt.protocol.wire import write_response

    try:
        wire = read_request(data)
    except RequestError:
        return []
    return write_response(wire.model_name, wire.model_version, {}, id=wire.id)


def _absent(reason: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def refuse(data: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{reason} by this server.")
        raise AssertionError  # abort raises

    return refuse


async def _refuse_key(requests: AsyncIterator[bytes], context: Any) -> None:
    # Whatever the method is, it is answered as a stream would be: before anything of the request is read.
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "The call carries no API key that this server knows. Send the metadata 'authorization: Bearer <key>'.",
        ((KIND, "NotAllowed"),),
    )


async def _abort(context: Any, error: Exception) -> Any:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    failure = failure_of(error)
    trailing = [(KIND, failure.kind)] if failure.kind is not None else []
    if failure.retry_after_s is not None:
        trailing.append((RETRY_AFTER, str(int(failure.retry_after_s * 1000))))
    await context.abort(grpc.StatusCode[failure.code], failure.details, tuple(trailing))


def _options(settings: GrpcSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", settings.max_streams),
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a way to share load
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(settings.least_ping_s * 1000)),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _credentials(settings: GrpcSettings) -> grpc.ServerCredentials | None:
    if settings.certificate is None or settings.private_key is None:
        return None
    pair = (_pem(settings.private_key), _pem(settings.certificate))
    ca = _pem(settings.client_ca) if settings.client_ca is not None else None
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def _pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from error
    if b"-----BEGIN" not in data:
        raise OptionError(f"{path} is no PEM file.")
    return data
