"""Traces: which spans a request leaves, whose they are, and that there are none unless somebody wants them."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelrt.errors import OptionError
from accelrt.protocol.messages import METHODS, message
from accelrt.serve.grpc import GrpcSettings
from accelrt.serve.interface import InferRequest
from accelrt.serve.models import ModelService, ServiceSettings
from accelrt.serve.telemetry import Telemetry, connect, traced
from tests.serve.serve_client import Running, ask, post
from tests.serve.test_serve_command import process
from tests.unit.serve_cases import line, put, run

grpc = pytest.importorskip("grpc")
pytest.importorskip("opentelemetry.sdk", reason="needs the extra telemetry")

from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from accelrt.serve.grpc import start as start_grpc  # noqa: E402

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


class Traced:
    """Both front ends over one model ``a`` (y = 2 x) whose spans are kept in memory."""

    def __init__(self, root: Path, direct_us: float) -> None:
        self.kept = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.kept))
        telemetry = Telemetry(provider)
        self.models = ModelService(ServiceSettings((root,), direct_us=direct_us))
        self.http = Running(self.models, telemetry=telemetry)
        self.http.do(self.models.start())
        self._handle = self.http.do(start_grpc(self.models, GrpcSettings(), telemetry=telemetry))
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self._handle.port}")

    def spans(self) -> list[Any]:
        """The spans since the last call, the request's first, then in order of their beginnings."""
        found = sorted(self.kept.get_finished_spans(), key=lambda span: (span.name[:5] != "infer", span.start_time))
        self.kept.clear()
        return found

    def over_http(self, body: bytes, *headers: str, name: str = "a") -> int:
        return ask(self.http.port, post(f"/v2/models/{name}/infer", body, *headers)).status

    def over_grpc(self, shape: list[int], metadata: Any = (), name: str = "a") -> Any:
        made = METHODS["ModelInfer"]
        stub = self.channel.unary_unary(
            made.path, request_serializer=made.request.SerializeToString, response_deserializer=made.response.FromString
        )
        tensor = message("ModelInferRequest.InferInputTensor")(name="x", datatype="FP32", shape=shape)
        raw = bytes(4 * int(np.prod(shape)))
        return stub(made.request(model_name=name, inputs=[tensor], raw_input_contents=[raw]), metadata=metadata)

    def close(self) -> None:
        self.channel.close()
        self.http.do(self._handle.stop(0.0))
        self.http.do(self.models.drain(30.0))
        self.http.close()


def _body(*rows: list[float]) -> bytes:
    tensor = {"name": "x", "shape": [len(rows), len(rows[0])], "datatype": "FP32", "data": list(rows)}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.fixture(scope="module", params=["queued", "direct"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    root = tmp_path_factory.mktemp("models")
    put(root / "a.onnx", line(2))
    made = Traced(root, 0.0 if request.param == "queued" else 1e9)
    yield made
    made.close()


def _is_whole(spans: list[Any], name: str) -> None:
    """A request's span with its parts, one after the other and within it."""
    root, *parts = spans
    assert root.name == name and root.kind.name == "SERVER"
    assert [part.name for part in parts] in (["queue", "compute"], ["compute"])
    assert all(part.parent.span_id == root.context.span_id for part in parts)
    assert all(part.context.trace_id == root.context.trace_id for part in parts)
    times = [root.start_time, *(time for part in parts for time in (part.start_time, part.end_time)), root.end_time]
    # Wall and monotonic clocks are read one after the other, which may differ by a little.
    assert all(later >= earlier - 1_000_000 for earlier, later in pairwise(times)), times


def test_a_request_over_http(server: Traced) -> None:
    assert server.over_http(_body([1, 2], [3, 4]), f"traceparent: {PARENT}", "tracestate: v=1") == 200
    spans = server.spans()
    _is_whole(spans, "infer a")
    root = spans[0]
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == SPAN
    assert root.context.trace_state.get("v") == "1"
    assert root.attributes["accelrt.model"] == "a" and root.attributes["accelrt.version"] == "1"
    assert root.attributes["http.response.status_code"] == 200
    assert root.status.status_code.name == "UNSET"
    if spans[1].name == "queue":
        assert spans[2].attributes["accelrt.rows"] == 2


def test_a_request_over_grpc(server: Traced) -> None:
    server.over_grpc([3, 2], (("traceparent", PARENT), ("x-other", "1")))
    spans = server.spans()
    _is_whole(spans, "infer a")
    root = spans[0]
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == SPAN
    assert root.attributes["rpc.system"] == "grpc" and root.attributes["rpc.response.status_code"] == "OK"


def test_requests_without_a_trace_begin_their_own(server: Traced) -> None:
    for _ in range(2):
        server.over_http(_body([1, 2]))
        server.over_http(_body([1, 2]), "traceparent: 00-nonsense-01")
        server.over_grpc([1, 2])
    roots = [span for span in server.spans() if span.name == "infer a"]
    assert len({span.context.trace_id for span in roots}) == len(roots) == 6
    assert all(span.parent is None for span in roots)


def test_a_compressed_request_is_one_request(server: Traced) -> None:
    assert server.over_http(gzip.compress(_body([1, 2])), f"traceparent: {PARENT}", "content-encoding: gzip") == 200
    _is_whole(server.spans(), "infer a")


def test_the_clients_mistakes_are_no_failures_of_the_server(server: Traced) -> None:
    assert server.over_http(_body([1, 2, 3])) == 400
    assert server.over_http(b"{") == 400
    assert server.over_http(_body([1, 2]), name="nobody") == 404
    with pytest.raises(grpc.RpcError):
        server.over_grpc([1, 3])
    with pytest.raises(grpc.RpcError):
        server.over_grpc([1, 2], name="nobody")
    roots = [span for span in server.spans() if span.name.startswith("infer")]
    assert len(roots) == 5 and all(span.status.status_code.name == "UNSET" for span in roots)
    told = [
        span.attributes.get("http.response.status_code", span.attributes.get("rpc.response.status_code"))
        for span in roots
    ]
    assert sorted(map(str, told)) == ["400", "400", "404", "INVALID_ARGUMENT", "NOT_FOUND"]


def test_a_servers_failure_is_one(server: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    live = server.models.find("a")
    assert live is not None

    def broken(inputs: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(live, "_predict", broken)
    monkeypatch.setattr(live.queue, "_predict", broken)  # type: ignore[attr-defined]
    assert server.over_http(_body([1, 2])) == 500
    with pytest.raises(grpc.RpcError):
        server.over_grpc([1, 2])
    roots = [span for span in server.spans() if span.name == "infer a"]
    assert [span.status.status_code.name for span in roots] == ["ERROR"] * 2
    assert sorted(span.attributes["error.type"] for span in roots) == ["500", "INTERNAL"]


def test_other_routes_leave_no_spans(server: Traced) -> None:
    for target in ("/v2/health/live", "/v2/models/a", "/v2"):
        assert ask(server.http.port, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).status == 200
    assert server.spans() == []


def test_requests_at_once_keep_their_own_traces(server: Traced) -> None:
    ids = [f"{number:032x}" for number in range(1, 25)]

    def one(trace: str) -> None:
        assert server.over_http(_body([1, 2]), f"traceparent: 00-{trace}-{SPAN}-01") == 200

    threads = [threading.Thread(target=one, args=(trace,)) for trace in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = server.spans()
    for trace in ids:
        _is_whole([span for span in spans if f"{span.context.trace_id:032x}" == trace], "infer a")


# Without traces


def test_without_traces_nothing_is_wrapped(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,))) as models:
            assert traced(models, None) is models
            asked = InferRequest({"x": np.ones((1, 2), np.float32)})
            await (await models.model("a")).infer(asked)
            assert asked.clock is None

    run(scenario())


def test_a_server_without_traces_does_not_import_opentelemetry() -> None:
    # FastAPI imports OpenTelemetry's API by itself where it is installed, but never what makes spans.
    code = (
        "import sys, accelrt.serve.run, accelrt.serve.grpc.server, accelrt.serve.models.service\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        "import accelrt.serve.http.server\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "", "http://"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(OptionError, match="Traces cannot be sent"):
        connect(endpoint)


# To a collector


class Collector(http.server.BaseHTTPRequestHandler):
    """What little of OTLP over HTTP a collector has to do."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.path, body))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_sends_its_spans_to_a_collector(tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    put(tmp_path / "a.onnx", line(2))
    received: list[tuple[str, bytes]] = []
    handler = type("Handler", (Collector,), {"received": received})
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
    arguments = ["--http-port", "0", "--grpc-port", "-1", "--metrics-port", "-1", "--otlp-endpoint", endpoint]
    try:
        with process("accelrt", "serve", str(tmp_path / "a.onnx"), *arguments) as made:
            assert made.stdout is not None
            line_ = made.stdout.readline().strip()
            assert line_.startswith("http: "), made.stderr and made.stderr.read()
            port = int(line_.rpartition(":")[2])
            assert ask(port, post("/v2/models/a/infer", _body([1, 2]), f"traceparent: {PARENT}")).status == 200
            made.terminate()
            assert made.wait(60) == 0  # what was not sent yet is sent at the end
    finally:
        collector.shutdown()
        collector.server_close()
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = [ExportTraceServiceRequest.FromString(body) for _, body in received]
    resources = [resource for one in sent for resource in one.resource_spans]
    names = {each.key: each.value.string_value for each in resources[0].resource.attributes}
    assert names["service.name"] == "accelrt"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {"infer a", "compute"} <= {span.name for span in spans}
    assert all(span.trace_id.hex() == TRACE for span in spans)


def test_a_collector_that_is_not_there_costs_no_request(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))

    async def scenario() -> None:
        telemetry = connect("http://127.0.0.1:9")
        async with ModelService(ServiceSettings((tmp_path,))) as models:
            model = await traced(models, telemetry).model("a")
            for _ in range(20):
                await model.infer(InferRequest({"x": np.ones((1, 2), np.float32)}))
        await asyncio.wait_for(telemetry.close(), 60)

    run(scenario())
