"""Prometheus metrics on a port of their own, with the meanings that Triton gives its ``nv_inference_*``.

Counts are read when somebody asks; nothing is kept for them on the way of a request.
"""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.registry import Collector

import accelrt
from accelrt.errors import ServingError
from accelrt.serve.http.access import Doorman
from accelrt.serve.interface import Duration, ModelStatistics, Service
from accelrt.serve.settings import ServerSettings, is_loopback, tls_context

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_LABELS = ("model", "version")

READ_S = 10.0
"""How long a client may take to say what it wants."""


class ModelCollector(Collector):
    """Reads a service's statistics and states whenever metrics are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield every family, one sample a version."""
        statistics = self._service.statistics()
        yield from _requests(statistics)
        for name, help_, read in _DURATIONS:
            family = CounterMetricFamily(f"accelrt_inference_{name}_us", help_, labels=_LABELS)
            for one in statistics:
                family.add_metric((one.name, one.version), read(one).ns / 1e3)
            yield family
        yield from self._states()

    def _states(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("accelrt_model_ready", "1 if the version answers", labels=_LABELS)
        held = GaugeMetricFamily("accelrt_model_resident_bytes", "Memory that a version holds", labels=_LABELS)
        restarts = CounterMetricFamily(
            "accelrt_model_worker_restarts", "Times that a version's worker process was started again", labels=_LABELS
        )
        loads = CounterMetricFamily("accelrt_model_loads", "Times that a version was loaded", labels=_LABELS)
        latency = GaugeMetricFamily(
            "accelrt_request_latency_seconds",
            "Time from a request's arrival to its answer, since the version was loaded",
            labels=(*_LABELS, "quantile"),
        )
        for one in self._service.snapshot():
            labels = (one.name, one.version)
            ready.add_metric(labels, float(one.state == "READY"))
            held.add_metric(labels, one.resident_bytes)
            restarts.add_metric(labels, one.restarts)
            loads.add_metric(labels, one.loads)
            for quantile, value in (("0.5", one.p50_ms), ("0.99", one.p99_ms)):
                if value is not None:
                    latency.add_metric((*labels, quantile), value / 1e3)
        yield from (ready, held, restarts, loads, latency)
        info = GaugeMetricFamily("accelrt_info", "The server's version", labels=("version",))
        info.add_metric((accelrt.__version__,), 1)
        yield info


_DURATIONS: tuple[tuple[str, str, Callable[[ModelStatistics], Duration]], ...] = (
    ("request_duration", "Microseconds from arrival to answer, of requests that succeeded", lambda s: s.success),
    ("queue_duration", "Microseconds in the queue", lambda s: s.queue),
    ("compute_input_duration", "Microseconds of putting inputs together", lambda s: s.compute_input),
    ("compute_infer_duration", "Microseconds of computing", lambda s: s.compute_infer),
    ("compute_output_duration", "Microseconds of taking outputs apart", lambda s: s.compute_output),
)


def _requests(statistics: Iterable[ModelStatistics]) -> Iterator[Metric]:
    success = CounterMetricFamily("accelrt_inference_request_success", "Requests that succeeded", labels=_LABELS)
    failure = CounterMetricFamily(
        "accelrt_inference_request_failure",
        "Requests that failed: REJECTED by a full queue, TIMEOUT before their turn, BACKEND in the model or before it",
        labels=(*_LABELS, "reason"),
    )
    rows = CounterMetricFamily("accelrt_inference_count", "Rows that were computed", labels=_LABELS)
    runs = CounterMetricFamily("accelrt_inference_exec_count", "Runs of the model", labels=_LABELS)
    pending = GaugeMetricFamily("accelrt_inference_pending_request_count", "Requests waiting", labels=_LABELS)
    for one in statistics:
        labels = (one.name, one.version)
        success.add_metric(labels, one.success.count)
        reasons = {
            "REJECTED": one.rejected,
            "TIMEOUT": one.timed_out,
            "BACKEND": max(0, one.fail.count - one.rejected - one.timed_out),
        }
        for reason, count in reasons.items():
            failure.add_metric((*labels, reason), count)
        rows.add_metric(labels, one.inference_count)
        runs.add_metric(labels, one.execution_count)
        pending.add_metric(labels, one.pending)
    yield from (success, failure, rows, runs, pending)


class MetricsServer:
    """A running endpoint; made by `start`. It has threads of its own: a slow scraper holds up nothing."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="accelrt-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is listened at."""
        return int(self._server.server_port)

    async def stop(self, grace_s: float) -> None:
        """Close; scrapes under way are cut."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()


class _ThreadingServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = READ_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scraper comes every few seconds."""


def guarded(app: WSGIApplication, doorman: Doorman) -> WSGIApplication:
    """Return an application behind the same door as the HTTP front end."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        names = {"HTTP_HOST": b"host", "HTTP_ORIGIN": b"origin", "HTTP_AUTHORIZATION": b"authorization"}
        names["HTTP_X_API_KEY"] = b"x-api-key"
        headers = {name: environ[key].encode("latin-1") for key, name in names.items() if key in environ}
        target = environ.get("PATH_INFO", "/").encode("latin-1")
        refused = doorman.refusal(target, headers)
        if refused is None and environ.get("PATH_INFO") in ("/metrics", "/"):
            return app(environ, start_response)
        if refused is not None:
            start_response(f"{refused.status} Refused", [("Content-Type", "application/json")])
            return [refused.body]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"Metrics are at /metrics.\n"]

    return answer


async def start(service: Service, settings: ServerSettings) -> MetricsServer:
    """Start the endpoint.

    Raises:
        ServingError: The address cannot be had.
        OptionError: The TLS files cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(ModelCollector(service))
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    keyless = not settings.api_keys
    doorman = Doorman(settings.api_keys, local=keyless and is_loopback(settings.host))
    app = guarded(make_wsgi_app(registry), doorman)
    try:
        server = make_server(settings.host, settings.metrics_port or 0, app, _ThreadingServer, _Quiet)
    except OSError as error:
        where = f"{settings.host}:{settings.metrics_port}"
        raise ServingError(
            f"Metrics cannot be served at {where}: {error.strerror or error}.", hint="Give another --metrics-port."
        ) from error
    if (tls := tls_context(settings.tls)) is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return MetricsServer(server)
