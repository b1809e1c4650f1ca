"""Traces for OpenTelemetry: a span for each request for inference, and in it one for its wait and one for computing it.

Nothing of this is in a request's way unless the server was told where traces go. Then the front ends use what is made
here in place of what they use otherwise: the models are wrapped, and the request's span is the current one while its
front end works on it. Times are those that the server takes anyway, so that a span costs nothing before its end.

Needs the extra ``telemetry``; importing this module does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import accelrt
from accelrt.errors import AccelrtError, OptionError, ServingError
from accelrt.protocol.faults import code_of
from accelrt.serve.interface import Clock, InferRequest, InferResponse, ServedModel, Service

CARRIED = ("traceparent", "tracestate")
"""Headers, and keys of gRPC's metadata, that say which trace a request belongs to (W3C Trace Context)."""

_TRACES = "/v1/traces"
_SERVER_FAULTS = frozenset({"DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE"})
"""Statuses of gRPC that make a server's span one that failed; the others are the client's."""


class RequestSpan:
    """The span of one request."""

    __slots__ = ("_attach", "_detach", "_span", "_within")

    def __init__(self, span: Any, within: Any, attach: Any, detach: Any) -> None:
        self._span, self._within, self._attach, self._detach = span, within, attach, detach

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it the span that others begin in, for as long as this thread or task works on the request."""
        token = self._attach(self._within)
        try:
            yield
        finally:
            self._detach(token)

    def end_http(self, status: int) -> None:
        """End it with HTTP's status."""
        self._span.set_attribute("http.response.status_code", status)
        self._end("" if status < 500 else str(status))

    def end_grpc(self, error: BaseException | None = None) -> None:
        """End it with what a call ended with."""
        if error is None:
            code = "OK"
        elif isinstance(error, AccelrtError):
            code = code_of(error)
        else:
            code = "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL"
        self._span.set_attribute("rpc.response.status_code", code)
        self._end(code if code in _SERVER_FAULTS else "")

    def end_cancelled(self) -> None:
        """End it because nobody waits for the answer any more."""
        self._end("cancelled")

    def _end(self, error: str) -> None:
        if error:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Telemetry:
    """Makes spans.

    Args:
        provider: OpenTelemetry's ``TracerProvider``; it is shut down by `close`.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._trace, self._context = provider, trace, context
        self._tracer = provider.get_tracer("accelrt.serve", accelrt.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, protocol: str, carrier: Mapping[str, str], arrived_ns: int) -> RequestSpan:
        """Begin the span of a request.

        Args:
            protocol: ``http`` or ``grpc``.
            carrier: What the client sent of `CARRIED`.
            arrived_ns: When the request's last byte came, of `time.monotonic_ns`.
        """
        # With a context of its own: what the event loop happens to work in is nobody's trace.
        parent = self._propagator.extract(carrier, self._context.Context())
        span = self._tracer.start_span(
            "infer",
            parent,
            kind=self._trace.SpanKind.SERVER,
            attributes={"rpc.system" if protocol == "grpc" else "network.protocol.name": protocol},
            start_time=_wall(arrived_ns),
        )
        within = self._trace.set_span_in_context(span, parent)
        return RequestSpan(span, within, self._context.attach, self._context.detach)

    def name(self, model: str, version: str) -> None:
        """Say which model the current request is for."""
        span = self._trace.get_current_span()
        span.update_name(f"infer {model}")
        span.set_attribute("accelrt.model", model)
        span.set_attribute("accelrt.version", version)

    def part(self, name: str, begun_ns: int, ended_ns: int, rows: int = 0) -> None:
        """Tell of a part of the current request that is over; times are of `time.monotonic_ns`."""
        attributes = {"accelrt.rows": rows} if rows else None
        span = self._tracer.start_span(name, attributes=attributes, start_time=_wall(begun_ns))
        span.end(_wall(max(begun_ns, ended_ns)))

    async def close(self) -> None:
        """Send what was not sent yet."""
        await asyncio.to_thread(self._provider.shutdown)


def connect(endpoint: str) -> Telemetry:
    """Return what sends spans to a collector by OTLP over HTTP, in the background.

    Which requests are recorded, and how they are sent, can be told further by OpenTelemetry's own environment variables
    (``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME``, ``OTEL_BSP_...``).

    Args:
        endpoint: A URL; ``/v1/traces`` is added where it has no path.

    Raises:
        OptionError: It is no URL of HTTP.
        ServingError: OpenTelemetry is not installed.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise OptionError(f"Traces cannot be sent to {endpoint!r}.", hint="Give a URL such as http://localhost:4318.")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ServingError(
            f"Traces need OpenTelemetry, of which {error.name or error} is not installed.",
            hint="Install it with: pip install 'accelrt[telemetry]'",
        ) from error
    target = endpoint if parts.path.strip("/") else endpoint.rstrip("/") + _TRACES
    # The environment's attributes win, as OpenTelemetry's users expect.
    resource = Resource({"service.name": "accelrt", "service.version": accelrt.__version__}).merge(_told())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=target)))
    return Telemetry(provider)


def _told() -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    # Only what was said: the detector answers with a service.name of its own where none was.
    found = dict(OTELResourceDetector().detect().attributes)
    if str(found.get("service.name", "")).startswith("unknown_service"):
        del found["service.name"]
    return Resource(found)


def _wall(monotonic_ns: int) -> int:
    return time.time_ns() - time.monotonic_ns() + monotonic_ns


class TracedModel:
    """A model whose requests leave spans."""

    def __init__(self, model: ServedModel, telemetry: Telemetry) -> None:
        self._model, self._telemetry = model, telemetry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """Answer at once; see `ServedModel`."""
        self._telemetry.name(self._model.name, self._model.version)
        begun = time.monotonic_ns()
        answered = True
        try:
            response = self._model.infer_now(request)
            answered = response is not None
            return response
        finally:
            if answered:
                self._telemetry.part("compute", begun, time.monotonic_ns())

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer in turn; see `ServedModel`."""
        self._telemetry.name(self._model.name, self._model.version)
        begun = request.arrived_ns or time.monotonic_ns()
        clock = request.clock = Clock()
        try:
            return await self._model.infer(request)
        finally:
            now = time.monotonic_ns()
            self._telemetry.part("queue", begun, clock.begun_ns or now)
            if clock.begun_ns:
                self._telemetry.part("compute", clock.begun_ns, clock.ended_ns or now, clock.rows)


class TracedService:
    """A service whose models leave spans; in all else the service itself."""

    def __init__(self, service: Service, telemetry: Telemetry) -> None:
        self._service, self._telemetry = service, telemetry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    def find(self, name: str, version: str = "") -> ServedModel | None:
        """See `Service`."""
        found = self._service.find(name, version)
        return None if found is None else cast("ServedModel", TracedModel(found, self._telemetry))

    async def model(self, name: str, version: str = "") -> ServedModel:
        """See `Service`."""
        return cast("ServedModel", TracedModel(await self._service.model(name, version), self._telemetry))


def traced(service: Service, telemetry: Telemetry | None) -> Service:
    """Return a service whose models leave spans, or just the service where there are no traces."""
    return service if telemetry is None else cast("Service", TracedService(service, telemetry))
