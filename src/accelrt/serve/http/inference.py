"""The way of an inference request: from its bytes to the model and back, at once where the model answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any

from accelrt.serve.http.access import local_regions
from accelrt.serve.http.bodies import SMALLEST_COMPRESSED, accepted, compressed, decompressed
from accelrt.serve.http.replies import ID_HEADER, Reply, reply_of
from accelrt.serve.http.wire import HEADER_LENGTH, Wishes, header_length, read_raw_request, read_request, write_response
from accelrt.serve.interface import InferRequest, ServedModel, Service
from accelrt.serve.settings import Limits
from accelrt.serve.shared_memory import SharedMemoryRegistry
from accelrt.serve.telemetry import CARRIED, RequestSpan, Telemetry

_LENGTH_HEADER = HEADER_LENGTH.encode()


class Inference:
    """Answers requests for inference, whichever server brings them.

    Args:
        service: The models.
        limits: What is taken of a client.
        regions: Shared memory; none may be used without it.
    """

    def __init__(self, service: Service, limits: Limits, regions: SharedMemoryRegistry | None = None) -> None:
        self._service = service
        self._limits = limits
        self.regions = regions or SharedMemoryRegistry(enabled=False)

    def answer(
        self,
        name: str,
        version: str,
        headers: Mapping[bytes, bytes],
        body: bytes | memoryview,
        arrived_ns: int,
        peer: str = "",
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer a request, at once or later. It never raises: errors are replies.

        Args:
            name: The model's.
            version: Empty for the highest.
            headers: By name in lower case.
            body: All of it.
            arrived_ns: When its last byte came.
            peer: The client's address and port; only those of this machine may name shared memory.
        """
        encoding = headers.get(b"content-encoding")
        wanted = headers.get(b"accept-encoding")
        if encoding is not None:
            return self._decompress_first(name, version, headers, body, arrived_ns, peer, encoding)
        try:
            stated = headers.get(_LENGTH_HEADER)
            length = None if stated is None else header_length(stated.decode("latin-1"))
            if length == 0:
                return self._raw(name, version, headers, body, arrived_ns)
            request, wishes = read_request(body, length, self._limits, arrived_ns, partial(self._reach, peer))
            model = self._service.find(name, version)
            response = None if model is None else model.infer_now(request)
            if response is None:
                return self._wait(model, name, version, request, wishes, headers)
            reply = write_response(response, wishes, self.regions)
        except Exception as error:  # noqa: BLE001 a request must not end the connection, whatever it meets
            return reply_of(error, headers.get(ID_HEADER))
        return reply if wanted is None else _compress(reply, wanted)

    async def _wait(
        self,
        model: ServedModel | None,
        name: str,
        version: str,
        request: InferRequest,
        wishes: Wishes,
        headers: Mapping[bytes, bytes],
    ) -> Reply:
        try:
            if model is None:
                model = await self._service.model(name, version)
            reply = write_response(await model.infer(request), wishes, self.regions)
        except Exception as error:  # noqa: BLE001 as above
            return reply_of(error, headers.get(ID_HEADER))
        wanted = headers.get(b"accept-encoding")
        return await _settled(reply if wanted is None else _compress(reply, wanted))

    async def _raw(
        self, name: str, version: str, headers: Mapping[bytes, bytes], body: bytes | memoryview, arrived_ns: int
    ) -> Reply:
        try:
            model = self._service.find(name, version) or await self._service.model(name, version)
            request, wishes = read_raw_request(body, model.metadata, arrived_ns)
        except Exception as error:  # noqa: BLE001 as above
            return reply_of(error, headers.get(ID_HEADER))
        return await self._wait(model, name, version, request, wishes, headers)

    async def _decompress_first(
        self,
        name: str,
        version: str,
        headers: Mapping[bytes, bytes],
        body: bytes | memoryview,
        arrived_ns: int,
        peer: str,
        encoding: bytes,
    ) -> Reply:
        try:
            # In a thread: zlib lets others run, and a body may take it a while.
            plain = await asyncio.to_thread(decompressed, body, encoding.decode("latin-1"), self._limits.body_bytes)
        except Exception as error:  # noqa: BLE001 as above
            return reply_of(error)
        rest = {key: value for key, value in headers.items() if key != b"content-encoding"}
        return await _settled(self.answer(name, version, rest, plain, arrived_ns, peer))

    def _reach(self, peer: str) -> SharedMemoryRegistry:
        return local_regions(self.regions, peer)


class TracedInference(Inference):
    """Answers requests for inference, and leaves a span for each.

    Args:
        service: The models, traced as well.
        limits: What is taken of a client.
        regions: Shared memory.
        telemetry: Where the spans go.
    """

    def __init__(self, service: Service, limits: Limits, regions: SharedMemoryRegistry, telemetry: Telemetry) -> None:
        super().__init__(service, limits, regions)
        self._telemetry = telemetry

    def answer(
        self,
        name: str,
        version: str,
        headers: Mapping[bytes, bytes],
        body: bytes | memoryview,
        arrived_ns: int,
        peer: str = "",
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer a request; see `Inference`."""
        if b"content-encoding" in headers:  # it comes here again when it is decompressed
            return super().answer(name, version, headers, body, arrived_ns, peer)
        carrier = {key: text for key in CARRIED if (text := _text(headers.get(key.encode()))) is not None}
        span = self._telemetry.request("http", carrier, arrived_ns)
        with span.current():
            answer = super().answer(name, version, headers, body, arrived_ns, peer)
        if not isinstance(answer, Reply):
            return self._later(answer, span)
        span.end_http(answer.status)
        return answer

    async def _later(self, answer: Coroutine[Any, Any, Reply], span: RequestSpan) -> Reply:
        try:
            with span.current():
                reply = await answer
        except BaseException:
            span.end_cancelled()  # whatever else happens is a reply
            raise
        span.end_http(reply.status)
        return reply


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


async def _settled(answer: Reply | Coroutine[Any, Any, Reply]) -> Reply:
    return answer if isinstance(answer, Reply) else await answer


def _compress(reply: Reply, wanted: bytes) -> Reply | Coroutine[Any, Any, Reply]:
    """Compress a reply if the client asked for it and it is worth the time."""
    encoding = accepted(wanted.decode("latin-1"))
    if not encoding or reply.length < SMALLEST_COMPRESSED:
        return reply
    return _compressed(reply, encoding)


async def _compressed(reply: Reply, encoding: str) -> Reply:
    body = await asyncio.to_thread(compressed, b"".join((reply.body, *reply.parts)), encoding)
    headers = {**(reply.headers or {}), "content-encoding": encoding, "vary": "accept-encoding"}
    return Reply(reply.status, body, reply.content_type, headers)
