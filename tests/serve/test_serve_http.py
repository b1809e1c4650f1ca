"""The HTTP front end over real sockets: the protocol, its limits, and clients that mean ill."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import itertools
import json
import socket
import ssl
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from accelrt.errors import (
    AccelrtError,
    ExecutionError,
    ModelNotFound,
    NotAllowed,
    OptionError,
    Overloaded,
    RequestTimeout,
    ServingError,
)
from accelrt.graph.types import numpy_dtype
from accelrt.protocol.datatypes import DTYPES
from accelrt.serve.http import bodies, loose
from accelrt.serve.http import server as http_server
from accelrt.serve.http.connection import Connection
from accelrt.serve.http.inference import Inference
from accelrt.serve.http.replies import Reply, reason_of, reply_of, status_of
from accelrt.serve.settings import Limits, ServerSettings, TlsFiles, read_api_keys
from accelrt.serve.tensors import BINARY_ONLY
from tests.serve.serve_client import Raw, Running, ask, post, running
from tests.serve.served_models import ELEMENTS, SmallService, bad_input, identity, sample, two_inputs

JSON_BODY = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2.5]}]}'
INFER = "/v2/models/fp32/infer"


def _service() -> SmallService:
    models = {datatype.lower(): identity(datatype) for datatype in ELEMENTS}
    return SmallService(models | {"two": two_inputs(), "slow": identity("FP32"), "broken": identity("FP32")})


@pytest.fixture(scope="module")
def service() -> Iterator[SmallService]:
    made = _service()
    made.models["slow"].wait_s = 0.4
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(service: SmallService) -> Iterator[Running]:
    with running(service) as server:
        yield server


@pytest.fixture
def client(plain: Running) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(plain.address)
    yield made
    made.close()


def _given(name: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


# Triton's client


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("datatype", list(DTYPES))
def test_every_datatype_with_tritons_client(
    client: triton.InferenceServerClient, datatype: str, binary_in: bool, binary_out: bool
) -> None:
    array = sample(datatype, (3, 5))
    if datatype in BINARY_ONLY and not binary_in:
        pytest.skip("the protocol has no JSON for it, and the client refuses to make any")
    inputs = [_given("x", array, datatype, binary=binary_in)]
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    if datatype in BINARY_ONLY and not binary_out:
        with pytest.raises(InferenceServerException, match="no form in JSON") as refused:
            client.infer(datatype.lower(), inputs, outputs=outputs)
        assert refused.value.status() == "400"
        return
    result = client.infer(datatype.lower(), inputs, outputs=outputs, request_id="r1")
    back = result.as_numpy("y")
    assert result.get_response()["id"] == "r1"
    assert result.get_output("y")["datatype"] == datatype
    if datatype == "BYTES":
        texts = [item if isinstance(item, bytes) else item.encode() for item in back.reshape(-1).tolist()]
        assert texts == array.reshape(-1).tolist() and back.shape == array.shape
    else:
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_control_routes_with_tritons_client(client: triton.InferenceServerClient, service: SmallService) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("two", "1")
    assert not client.is_model_ready("nothing")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "accelrt" and "binary_tensor_data" in metadata["extensions"]
    model = client.get_model_metadata("two", "1")
    assert [item["name"] for item in model["inputs"]] == ["a", "b"] and model["inputs"][0]["shape"] == [-1, 3]
    assert client.get_model_config("two")["name"] == "two"
    assert {item["name"] for item in client.get_model_repository_index()} == set(service.models)
    statistics = client.get_inference_statistics("two")["model_stats"][0]
    assert statistics["inference_stats"]["success"]["ns"] == 5 and statistics["batch_stats"][0]["batch_size"] == 1
    assert len(client.get_inference_statistics()["model_stats"]) == len(service.models)


def test_loading_with_tritons_client(client: triton.InferenceServerClient, service: SmallService) -> None:
    client.unload_model("two", unload_dependents=True)
    try:
        assert not client.is_model_ready("two") and not client.is_server_ready()
        states = {item["name"]: item["state"] for item in client.get_model_repository_index()}
        assert states["two"] == "UNAVAILABLE"
        with pytest.raises(InferenceServerException) as unavailable:
            client.infer("two", [_given("a", sample("FP32", (1, 3)), "FP32", binary=True)])
        assert unavailable.value.status() == "503"
    finally:
        client.load_model("two", config='{"max_batch_size":4}', files={"file:1/model.onnx": b"\x00\x01model"})
    name, parameters = service.loads[-1]
    assert name == "two" and parameters == {"config": '{"max_batch_size":4}', "file:1/model.onnx": b"\x00\x01model"}
    assert client.is_server_ready()
    service.explicit = False
    try:
        with pytest.raises(InferenceServerException, match="by the server itself") as refused:
            client.load_model("two")
        assert refused.value.status() == "403"
    finally:
        service.explicit = True
    with pytest.raises(InferenceServerException) as missing:
        client.load_model("nothing")
    assert missing.value.status() == "404"


def test_two_inputs_some_outputs_mixed_forms(client: triton.InferenceServerClient) -> None:
    a, b = sample("FP32", (2, 3), 1), sample("FP32", (2, 3), 2)
    inputs = [_given("a", a, "FP32", binary=True), _given("b", b, "FP32", binary=False)]
    wanted = [
        triton.InferRequestedOutput("product", binary_data=False),
        triton.InferRequestedOutput("sum", binary_data=True),
    ]
    result = client.infer("two", inputs, outputs=wanted)
    assert [item["name"] for item in result.get_response()["outputs"]] == ["product", "sum"]
    np.testing.assert_array_equal(result.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(result.as_numpy("product"), a * b)
    only = client.infer("two", inputs, outputs=wanted[1:])
    assert only.as_numpy("product") is None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_with_tritons_client(client: triton.InferenceServerClient, algorithm: str) -> None:
    array = np.zeros((64, 256), np.float32)
    result = client.infer(
        "fp32",
        [_given("x", array, "FP32", binary=True)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), array)


def test_parameters_reach_the_model(client: triton.InferenceServerClient, service: SmallService) -> None:
    client.infer(
        "fp32",
        [_given("x", sample("FP32", (1, 1)), "FP32", binary=True)],
        priority=2,
        timeout=1_000_000,
        parameters={"tenant": "a", "beam": 3},
    )
    request = service.models["fp32"].seen[-1]
    assert (request.priority, request.timeout_us, request.parameters) == (2, 1_000_000, {"tenant": "a", "beam": 3})
    assert abs(time.monotonic_ns() - request.arrived_ns) < 60e9


def test_timeout_of_a_request(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as late:
        client.infer("slow", [_given("x", sample("FP32", (1, 1)), "FP32", binary=True)], timeout=1000)
    assert late.value.status() == "504"


def test_asynchronous_and_large(client: triton.InferenceServerClient, plain: Running) -> None:
    many = triton.InferenceServerClient(plain.address, concurrency=4)
    arrays = [sample("FP32", (300, 1000), seed) for seed in range(4)]
    pending = [many.async_infer("slow", [_given("x", array, "FP32", binary=True)]) for array in arrays]
    for array, request in zip(arrays, pending, strict=True):
        np.testing.assert_array_equal(request.get_result().as_numpy("y"), array)
    many.close()


# What the wire looks like


def test_large_bodies_are_received_where_their_tensors_are_aligned(plain: Running, service: SmallService) -> None:
    array = sample("FP64", (500, 500))
    request = {
        "inputs": [
            {"name": "x", "shape": [500, 500], "datatype": "FP64", "parameters": {"binary_data_size": array.nbytes}}
        ]
    }
    text = json.dumps(request).encode()
    text += b" " * (3 - len(text) % 8)
    answer = ask(
        plain.port,
        post("/v2/models/fp64/infer", text + array.tobytes(), f"Inference-Header-Content-Length: {len(text)}"),
    )
    assert answer.status == 200
    seen = service.models["fp64"].seen[-1].inputs["x"]
    assert not seen.flags.owndata and seen.ctypes.data % 64 == 0
    np.testing.assert_array_equal(seen, array)


def test_raw_body_of_the_only_input(plain: Running) -> None:
    def raw(model: str, body: bytes) -> Any:
        return ask(plain.port, post(f"/v2/models/{model}/infer", body, "Inference-Header-Content-Length: 0"))

    service = SmallService({"rows": identity("INT32", ("n", 2)), "text": identity("BYTES", (1,)), "two": two_inputs()})
    with running(service) as server:
        plain = server
        answer = raw("rows", np.arange(6, dtype=np.int32).tobytes())
        length = int(answer.headers["inference-header-content-length"])
        assert json.loads(answer.body[:length])["outputs"][0]["shape"] == [3, 2]
        assert np.frombuffer(answer.body[length:], np.int32).tolist() == [0, 1, 2, 3, 4, 5]
        assert raw("text", b"hello").body.endswith(b"\x05\x00\x00\x00hello")
        for model, body in (("rows", b"1234567"), ("two", bytes(12))):
            assert raw(model, body).status == 400
    service.close()


def test_health_has_a_body_for_everybody(plain: Running) -> None:
    for state in ("live", "ready"):
        answer = ask(plain.port, f"GET /v2/health/{state} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert answer.status == 200 and answer.json == {"live": True, "ready": True}


def test_numbers_that_json_has_no_word_for(plain: Running) -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[NaN,-Infinity,"Infinity",0.1]}]}'
    answer = ask(plain.port, post(INFER, body))
    assert answer.status == 200
    assert json.loads(answer.body, parse_constant=pytest.fail)["outputs"][0]["data"] == [
        "NaN",
        "-Infinity",
        "Infinity",
        0.1,
    ]


def test_request_ids(plain: Running) -> None:
    answer = ask(plain.port, post(INFER, JSON_BODY, "X-Request-Id: abc-1"))
    assert answer.headers["x-request-id"] == "abc-1"
    strange = ask(plain.port, post(INFER, JSON_BODY, "X-Request-Id: a b<script>"))
    assert strange.headers["x-request-id"] != "a b<script>"
    assert "x-request-id" not in ask(plain.port, post(INFER, JSON_BODY)).headers


def test_openapi_describes_all_routes(plain: Running) -> None:
    paths = ask(plain.port, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n").json["paths"]
    assert {"/v2", "/v2/health/ready", "/v2/models/{name}/infer", "/v2/repository/models/{name}/load"} <= set(paths)
    assert "requestBody" in paths["/v2/models/{name}/infer"]["post"]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/nothing/ready", 404),
        ("GET", "/v2/models/fp32/versions/7/ready", 404),
        ("GET", "/v2/models/nothing/stats", 404),
        ("GET", "/v2/models/..%2F..%2Fetc", 404),
        ("POST", "/v2/models/..%2F..%2Fetc/infer", 404),
        ("POST", "/v2/models/%00/infer", 404),
        ("POST", "/v2/models/.hidden/infer", 404),
        ("POST", "/v2/models/nothing/infer", 404),
        ("POST", "/v2/models/fp32/versions/2/infer", 404),
        ("POST", "/v2/repository/models/..%2F..%2Fetc/load", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2/models/fp32", 405),
        ("GET", "/v2/logging", 501),
        ("POST", "/v2/trace/setting", 501),
        ("POST", "/v2/models/fp32/generate", 501),
        ("POST", "/v2/cudasharedmemory/region/a/register", 501),
        ("POST", "/v2/systemsharedmemory/region/a/register", 400),
        ("GET", "/v2/systemsharedmemory/region/a/status", 404),
        ("GET", "/docs", 404),
    ],
)
def test_errors_of_routes(plain: Running, method: str, target: str, status: int) -> None:
    body = JSON_BODY if method == "POST" and target.endswith("infer") else b""
    answer = ask(plain.port, post(target, body).replace(b"POST", method.encode(), 1))
    assert answer.status == status
    assert list(answer.json) == ["error"] and answer.json["error"]


BAD_REQUESTS: list[Any] = [
    b"",
    b"{",
    b"[]",
    b"nonsense",
    b"\xff\xfe",
    {},
    {"inputs": []} | {"outputs": [{"name": "z"}]},
    {"inputs": {}},
    {"inputs": [{}]},
    {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32"}]},
    {"inputs": [{"name": "x", "shape": "1", "datatype": "FP32", "data": [1]}]},
    {
        "inputs": [
            {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], "parameters": {"binary_data_size": 8}}
        ]
    },
    {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}]},
    {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"shared_memory_region": "r"}}]},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}] * 2},
    {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "INT32", "data": [1]}]},
    {"inputs": [{"name": "q", "shape": [1, 1], "datatype": "FP32", "data": [1]}]},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "outputs": [{"name": "z"}]},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "outputs": [{"name": "y"}] * 2},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "parameters": {"priority": -1}},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "parameters": {"timeout": 1.5}},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "parameters": {"a": []}},
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}], "parameters": {"sequence_id": 4}},
    {
        "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}],
        "parameters": {"binary_data_output": 1},
    },
    {
        "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}],
        "outputs": [{"name": "y", "parameters": {"classification": 2}}],
    },
    b'{"id":"\\ud800","inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1]}]}',
    b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"BYTES","data":["\xff"]}]}',
    b'{"inputs":' + b"[" * 100_000,
    b'{"inputs":' + b'{"a":' * 100_000,
    b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 5000 + b"]" * 5000 + b"}]}",
]


@pytest.mark.parametrize("document", BAD_REQUESTS, ids=lambda d: str(d)[:60])
def test_malformed_requests_are_the_clients_fault(plain: Running, document: Any) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    answer = ask(plain.port, post(INFER, body))
    assert answer.status in (400, 413), answer.body
    assert len(answer.json["error"]) < 700


def test_lies_about_the_length_of_json(plain: Running) -> None:
    for length in ("99999", "-1", "1e3", "abc", "71", "73", "", "1, 2", "9" * 30, "٣"):
        header = f"Inference-Header-Content-Length: {length}"
        assert ask(plain.port, post(INFER, JSON_BODY, header)).status == 400, length
    good = f"Inference-Header-Content-Length: {len(JSON_BODY)}"
    assert ask(plain.port, post(INFER, JSON_BODY, good)).status == 200
    assert ask(plain.port, post(INFER, JSON_BODY + b"?", good)).status == 400
    assert ask(plain.port, post(INFER, JSON_BODY, good, good)).status == 400


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.none() | st.integers(-5, 300).map(str) | st.text(max_size=5),
    sizes=st.lists(st.integers(-(2**65), 2**65) | st.integers(-4, 40), min_size=1, max_size=3),
    shape=st.lists(st.integers(-3, 4) | st.integers(-(2**65), 2**65), max_size=4),
    datatype=st.sampled_from([*DTYPES, "X"]),
    tail=st.binary(max_size=80),
    cut=st.integers(0, 20),
    encoding=st.sampled_from([None, b"gzip", b"deflate", b"br", b"identity", b"\xff"]),
    parameters=st.none()
    | st.dictionaries(
        st.sampled_from(["priority", "timeout", "binary_data_output", "z"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    ),
)
def test_no_lie_is_the_servers_fault(
    service: SmallService,
    length: str | None,
    sizes: list[int],
    shape: list[int],
    datatype: str,
    tail: bytes,
    cut: int,
    encoding: bytes | None,
    parameters: Any,
) -> None:
    inputs = [
        {"name": f"x{i}" if i else "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
        for i, size in enumerate(sizes)
    ]
    text = json.dumps({"inputs": inputs} | ({"parameters": parameters} if parameters is not None else {})).encode()
    body = text + tail
    headers = {} if length is None else {b"inference-header-content-length": length.encode()}
    if length is not None and len(length) == 1:
        headers = {b"inference-header-content-length": str(len(text)).encode()}  # the truth, now and then
    if encoding is not None:
        headers[b"content-encoding"] = encoding
    inference = Inference(service, Limits())
    reply = inference.answer("fp32", "", headers, body[: len(body) - cut], 0)
    if not isinstance(reply, Reply):
        reply = asyncio.run(_settle(reply))
    assert reply.status in (200, 400, 413), reply.body


async def _settle(answer: Any) -> Reply:
    return await answer


# Errors of models


class _Odd(Exception):
    pass


def test_errors_have_their_status(plain: Running, service: SmallService) -> None:
    full = Overloaded("The queue of model 'm' is full.")
    full.retry_after_s = 1.2
    cases: list[tuple[Exception, int]] = [
        (bad_input(), 400),
        (full, 503),
        (ModelNotFound("No."), 404),
        (NotAllowed("No."), 403),
        (RequestTimeout("Late."), 504),
        (ExecutionError("All engines failed at /srv/secret/model.onnx line 3."), 500),
        (ServingError("An output is a list."), 500),
        (_Odd("boom in /home/me/file.py"), 500),
        (MemoryError(), 500),
    ]
    for error, status in cases:
        service.models["broken"].fails = error
        answer = ask(plain.port, post("/v2/models/broken/infer", JSON_BODY))
        assert answer.status == status == status_of(error)
        text = answer.json["error"]
        assert "/srv" not in text and "/home" not in text and "boom" not in text and "Traceback" not in text
        if error is full:
            assert answer.headers["retry-after"] == "2"


def test_long_reasons_are_cut() -> None:
    assert len(reason_of(ExecutionError("x" * 10_000))) < 600
    assert reply_of(AccelrtError("a\r\nSet-Cookie: b")).headers is None


# Limits and time


def test_bodies_beyond_the_limit(service: SmallService) -> None:
    with running(service, limits=Limits(body_bytes=1000)) as server:
        with Raw(server.port) as raw:  # promised only: refused before it comes
            raw.send(post(INFER, b"", length=10**12))
            answer = raw.answer()
            assert answer.status == 413 and answer.headers["connection"] == "close"
        with Raw(server.port) as raw:  # sent as well: the reply is not lost in a reset
            raw.send(post(INFER, bytes(5_000_000)))
            assert raw.answer().status == 413 and raw.ends()
        with Raw(server.port) as raw:  # without a promise
            raw.send(b"POST /v2/models/fp32/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                raw.send(b"190\r\n" + bytes(400) + b"\r\n")
            assert raw.answer().status == 413
        bomb = gzip.compress(bytes(10_000_000))[:999]
        for encoding, body in (("gzip", gzip.compress(bytes(100_000))), ("deflate", zlib.compress(bytes(100_000)))):
            assert ask(server.port, post(INFER, body, f"Content-Encoding: {encoding}")).status == 413
        assert ask(server.port, post(INFER, bomb, "Content-Encoding: gzip")).status in (400, 413)
        assert ask(server.port, post(INFER, b"no gzip", "Content-Encoding: gzip")).status == 400
        assert ask(server.port, post(INFER, b"x", "Content-Encoding: br")).status == 400


def test_bodies_of_all_together(service: SmallService) -> None:
    limits = Limits(receiving_bytes=300_000)
    with running(service, limits=limits) as server, Raw(server.port) as small, Raw(server.port) as large:
        small.send(post(INFER, JSON_BODY[:10], length=len(JSON_BODY)))
        large.send(post(INFER, bytes(400_000), length=500_000))
        answer = large.answer()
        assert answer.status == 503 and answer.headers["retry-after"] and large.ends()
        small.send(JSON_BODY[10:])
        assert small.answer().status == 200


def test_headers_beyond_the_limit(service: SmallService) -> None:
    with running(service, limits=Limits(header_bytes=2000, headers=20)) as server:
        for head in (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 30 + b"\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 5000 + b"\r\n\r\n",
            b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            assert ask(server.port, head).status in (431, 414)
        with Raw(server.port) as raw:  # a header without an end
            raw.send(b"GET / HTTP/1.1\r\nx: ")
            for _ in range(40):
                try:
                    raw.send(b"a" * 100)
                except OSError:
                    break
                time.sleep(0.002)
            assert raw.answer().status == 431


def test_slow_clients(service: SmallService) -> None:
    limits = Limits(header_s=0.6, body_s=0.6, idle_s=0.6)
    with running(service, limits=limits) as server:
        start = time.monotonic()
        with Raw(server.port) as silent, Raw(server.port) as dripping, Raw(server.port) as bodiless:
            dripping.send(b"POST /v2/models/fp32/infer HTTP/1.1\r\n")
            bodiless.send(post(INFER, b"{", length=100))
            for _ in range(4):
                time.sleep(0.1)
                dripping.send(b"a: b\r\n")
            assert ask(server.port, post(INFER, JSON_BODY)).status == 200  # the others are served meanwhile
            assert dripping.answer().status == 408
            assert bodiless.answer().status == 408
            assert silent.ends()
        assert time.monotonic() - start < 8
        deadline = time.monotonic() + 8
        while server.server.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.server.connections


def test_a_client_that_does_not_read(service: SmallService) -> None:
    with running(service, limits=Limits(write_s=0.6, idle_s=60)) as server:
        array = np.zeros((1, 4_000_000), np.float32)
        text = json.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "shape": [1, 4_000_000],
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": array.nbytes},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        with Raw(server.port) as raw:
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.send(post(INFER, text + array.tobytes(), f"Inference-Header-Content-Length: {len(text)}"))
            deadline = time.monotonic() + 10
            while server.server.connections and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not server.server.connections


def test_more_connections_than_are_taken(service: SmallService) -> None:
    with running(service, limits=Limits(connections=2)) as server, Raw(server.port) as one, Raw(server.port) as two:
        for raw in (one, two):
            raw.send(post(INFER, JSON_BODY))
            assert raw.answer().status == 200
        with Raw(server.port) as third:
            answer = third.answer()
            assert answer.status == 503 and answer.headers["retry-after"]
        one.send(post(INFER, JSON_BODY))
        assert one.answer().status == 200


def test_time_for_an_answer(service: SmallService) -> None:
    service.models["slow"].cancelled = 0
    with running(service, limits=Limits(request_s=0.05)) as server:
        service.models["slow"].wait_s = 3.0
        try:
            answer = ask(server.port, post("/v2/models/slow/infer", JSON_BODY))
        finally:
            service.models["slow"].wait_s = 0.4
        assert answer.status == 504 and service.models["slow"].cancelled == 1


def test_a_client_that_leaves_takes_its_request_with_it(plain: Running, service: SmallService) -> None:
    service.models["slow"].cancelled = 0
    with Raw(plain.port) as raw:
        raw.send(post("/v2/models/slow/infer", JSON_BODY))
        time.sleep(0.15)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets
    deadline = time.monotonic() + 5
    while not service.models["slow"].cancelled and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.models["slow"].cancelled == 1


# HTTP as it may be spoken


def test_pipelined_requests_are_answered_in_order(plain: Running) -> None:
    with Raw(plain.port) as raw:
        targets = ["/v2/models/slow/infer", INFER, "/v2/models/nothing/infer", INFER] * 10
        raw.send(b"".join(post(target, JSON_BODY.replace(b"2.5", str(i).encode())) for i, target in enumerate(targets)))
        for i, target in enumerate(targets):
            answer = raw.answer()
            assert answer.status == (404 if "nothing" in target else 200)
            if answer.status == 200:
                assert answer.json["outputs"][0]["data"] == [1.0, float(i)]
        raw.send(post(INFER, JSON_BODY))
        assert raw.answer().status == 200
        large = JSON_BODY + b" " * 300_000
        raw.send(post("/v2/models/slow/infer", JSON_BODY) + post(INFER, large) * 4)
        assert [raw.answer().status for _ in range(5)] == [200] * 5


_OTHER_BODY = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[4,8]}]}'
_CHUNKED = (
    f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{len(JSON_BODY):x}\r\n".encode()
    + JSON_BODY
    + b"\r\n0\r\n\r\n"
)
_VARIANTS: list[tuple[bytes, int, object]] = [
    (post(INFER, JSON_BODY), 200, [1.0, 2.5]),
    (post(INFER, JSON_BODY.replace(b"2.5", b"3.5")), 200, [1.0, 3.5]),  # the same head
    (post(INFER, _OTHER_BODY), 200, [4.0, 8.0]),
    (post(INFER, b"X" * len(JSON_BODY)), 400, None),  # the same head, and a body that is none
    (post(INFER, JSON_BODY, "X-Other: 1"), 200, [1.0, 2.5]),
    (post("/v2/models/nothing/infer", JSON_BODY), 404, None),
    (post("/v2/models/slow/infer", JSON_BODY), 200, [1.0, 2.5]),
    (b"\r\n" + post(INFER, JSON_BODY), 200, [1.0, 2.5]),  # an empty line before a request is allowed
    (b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", 200, None),
    (_CHUNKED, 200, [1.0, 2.5]),
]


@pytest.fixture
def soon(service: SmallService) -> Iterator[None]:
    """Answers of the slow model come later than those of others, but not much."""
    service.models["slow"].wait_s = 0.01
    yield
    service.models["slow"].wait_s = 0.4


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_heads_that_come_again_mean_what_they_meant(plain: Running, soon: None, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(_VARIANTS), min_size=2, max_size=12))
    repeated = [each for each in chosen for _ in range(data.draw(st.integers(1, 3)))]
    stream = b"".join(request for request, _, _ in repeated)
    starts = list(itertools.accumulate(len(request) for request, _, _ in repeated))
    # Cut where requests end, which is what is quick, and anywhere.
    anywhere = data.draw(st.lists(st.integers(0, len(stream)), max_size=4))
    cuts = sorted({0, len(stream), *data.draw(st.lists(st.sampled_from(starts), max_size=12)), *anywhere})
    with Raw(plain.port) as raw:
        for start, stop in itertools.pairwise(cuts):
            raw.send(stream[start:stop])
            if data.draw(st.booleans()):
                time.sleep(0.002)  # so that the server reads what it was sent so far
        for _, status, values in repeated:
            answer = raw.answer()
            assert answer.status == status
            if values is not None:
                assert answer.json["outputs"][0]["data"] == values
        raw.send(post(INFER, JSON_BODY, "Connection: close"))
        assert raw.answer().status == 200
        assert raw.ends()  # nothing was answered twice


class _Sink:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        return None


def test_a_head_that_comes_again_is_not_parsed_again(service: SmallService, monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> list[bytes]:
        host = http_server.HttpServer(service, ServerSettings(Path()))
        connection, sink = Connection(host, asyncio.get_running_loop()), _Sink()
        connection.connection_made(sink)  # type: ignore[arg-type]
        headers: list[bytes] = []
        parsed = Connection.on_header
        monkeypatch.setattr(Connection, "on_header", lambda *given: (headers.append(given[1]), parsed(*given))[1])
        made = Connection(host, asyncio.get_running_loop())
        made.connection_made(sink)  # type: ignore[arg-type]
        request = post(INFER, JSON_BODY)
        made.data_received(request)
        seen = len(headers)
        assert seen
        made.data_received(request.replace(b"2.5", b"3.5") * 3)
        assert len(headers) == seen
        made.data_received(request[:40])  # in pieces, or with another length, it is
        made.data_received(request[40:])
        made.data_received(post(INFER, JSON_BODY + b" "))
        assert len(headers) == 3 * seen
        return sink.written

    replies = asyncio.run(talk())
    assert len(replies) == 6
    assert all(reply.startswith(b"HTTP/1.1 200 ") for reply in replies)
    assert [reply.count(b"3.5") for reply in replies] == [0, 1, 1, 1, 0, 0]


def test_requests_in_pieces(plain: Running) -> None:
    request = post(INFER, JSON_BODY)
    with Raw(plain.port) as raw:
        for at in range(0, len(request), 7):
            raw.send(request[at : at + 7])
            time.sleep(0.0005)
        assert raw.answer().status == 200


def test_chunked_requests(plain: Running) -> None:
    head = b"POST /v2/models/fp32/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Raw(plain.port) as raw:
        for _ in range(2):
            raw.send(head)
            for at in range(0, len(JSON_BODY), 10):
                piece = JSON_BODY[at : at + 10]
                raw.send(f"{len(piece):x};ext=1\r\n".encode() + piece + b"\r\n")
            raw.send(b"0\r\nTrailer: ignored\r\n\r\n")
            assert raw.answer().json["outputs"][0]["data"] == [1.0, 2.5]


def test_half_closed_connections(plain: Running) -> None:
    for target in (INFER, "/v2/models/slow/infer"):
        with Raw(plain.port) as raw:
            raw.send(post(target, JSON_BODY))
            raw.socket.shutdown(socket.SHUT_WR)
            assert raw.answer().status == 200 and raw.ends()
    with Raw(plain.port) as raw:  # in the middle of a body
        raw.send(post(INFER, JSON_BODY, length=1000))
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.ends()


def test_expectations(plain: Running) -> None:
    with Raw(plain.port) as raw:
        raw.send(post(INFER, b"", "Expect: 100-continue", length=len(JSON_BODY)))
        assert raw.answer().status == 100
        raw.send(JSON_BODY)
        assert raw.answer().status == 200
    with Raw(plain.port) as raw:
        raw.send(post(INFER, b"", "Expect: 100-continue", length=10**12))
        assert raw.answer().status == 413
    assert ask(plain.port, post(INFER, JSON_BODY, "Expect: miracles")).status == 417


def test_offers_to_upgrade_are_not_heard(plain: Running) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    with Raw(plain.port) as raw:
        for _ in range(2):
            request = post(INFER, JSON_BODY, *offer)
            raw.send(request[:-10])
            time.sleep(0.02)
            raw.send(request[-10:])
            assert raw.answer().json["outputs"][0]["data"] == [1.0, 2.5]
        raw.send(
            b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n"
            + "\r\n".join(offer).encode()
            + b"\r\n\r\n"
            + post(INFER, JSON_BODY)
        )
        assert raw.answer().json["name"] == "accelrt"
        assert raw.answer().status == 200
    with Raw(plain.port) as raw:  # who asks for nothing else is sent away, and not answered for ever
        raw.send((b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + "\r\n".join(offer).encode() + b"\r\n\r\n") * 2000)
        assert [raw.answer().status for _ in range(17)] == [200] * 16 + [501]


def test_old_and_closing_clients(plain: Running) -> None:
    request = post(INFER, JSON_BODY)
    with Raw(plain.port) as raw:
        raw.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert raw.answer().headers["connection"] == "close" and raw.ends()
    with Raw(plain.port) as raw:
        for _ in range(2):
            raw.send(request.replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\nConnection: keep-alive\r\n"))
            assert raw.answer().headers["connection"] == "keep-alive"
    with Raw(plain.port) as raw:
        raw.send(post(INFER, JSON_BODY, "Connection: close") + request)
        assert raw.answer().status == 200 and raw.ends()


def test_head_has_no_body(plain: Running) -> None:
    with Raw(plain.port) as raw:
        raw.send(b"HEAD /v2 HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        while data.count(b"HTTP/1.1") < 2 or not data.endswith(b"}"):
            data += raw.socket.recv(65536)
        _, _, rest = data.partition(b"\r\n\r\n")
        assert rest.startswith(b"HTTP/1.1 200 OK"), data


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\x00c\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=str,
)
def test_what_is_no_http(plain: Running, request_: bytes) -> None:
    with Raw(plain.port) as raw:
        raw.send(request_)
        answer = raw.answer()
        assert 400 <= answer.status < 500 and answer.json["error"]
        assert raw.ends()
    assert ask(plain.port, post(INFER, JSON_BODY)).status == 200


@pytest.fixture(scope="module")
def deaf(service: SmallService) -> http_server.HttpServer:
    """A server that does not listen: connections are made by hand."""
    return http_server.HttpServer(service, ServerSettings(Path()))


class _Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, parts: Any) -> None:
        self.written += b"".join(bytes(part) for part in parts)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


WHOLE = (
    post(INFER, JSON_BODY)
    + post("/v2/models/nothing/infer", JSON_BODY, "Content-Encoding: gzip")
    + b'POST /v2/models/fp32/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"inp\r\n0\r\n\r\n'
    + post(
        INFER, JSON_BODY, "Connection: Upgrade", "Upgrade: h2c", f"Inference-Header-Content-Length: {len(JSON_BODY)}"
    )
    + b"GET /v2 HTTP/1.1\r\n\r\n"
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 6), st.binary(max_size=6)), max_size=6),
    cuts=st.lists(st.integers(0, len(WHOLE)), max_size=8),
    ends=st.booleans(),
)
def test_no_bytes_are_the_servers_fault(
    deaf: http_server.HttpServer,
    caplog: pytest.LogCaptureFixture,
    edits: list[tuple[int, int, bytes]],
    cuts: list[int],
    ends: bool,
) -> None:
    data = WHOLE
    for at, length, text in edits:
        data = data[:at] + text + data[at + length :]
    caplog.clear()

    async def talk() -> bytes:
        wire, connection = _Wire(), Connection(deaf, asyncio.get_running_loop())
        connection.connection_made(wire)
        places = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
        for start, stop in itertools.pairwise(places):
            connection.data_received(data[start:stop])
            await asyncio.sleep(0)
        if ends:
            connection.eof_received()
        while connection.busy and not wire.closed:
            await asyncio.sleep(0.001)
        connection.connection_lost(None)
        assert connection not in deaf.connections
        return wire.written

    written = asyncio.run(talk())
    assert b"HTTP/1.1 5" not in written.replace(b"HTTP/1.1 501", b"")
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


# Who may ask


def test_api_keys(service: SmallService) -> None:
    key = "k" * 20
    with running(service, api_keys=(key, "j" * 20)) as server:
        for header in (f"Authorization: Bearer {key}", f"X-API-Key: {'j' * 20}", f"authorization: bearer {key}"):
            assert ask(server.port, post(INFER, JSON_BODY, header)).status == 200
        for headers in (
            (),
            (f"Authorization: Basic {key}",),
            ("X-API-Key: wrong",),
            (f"X-API-Key: {key}k",),
            ("Authorization: Bearer",),
        ):
            answer = ask(server.port, post(INFER, JSON_BODY, *headers))
            assert (
                answer.status == 401 and answer.headers["www-authenticate"] == "Bearer" and key not in str(answer.json)
            )
        assert ask(server.port, b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n").status == 200
        assert ask(server.port, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n").status == 401
        assert ask(server.port, b"GET /v2/health/ready/../../models/stats HTTP/1.1\r\nHost: x\r\n\r\n").status == 401


def test_pages_of_other_sites(plain: Running) -> None:
    assert ask(plain.port, post(INFER, JSON_BODY, "Origin: http://evil.example")).status == 403
    assert ask(plain.port, post(INFER, JSON_BODY, "Origin: http://localhost")).status == 200
    rebound = post(INFER, JSON_BODY).replace(b"Host: localhost", b"Host: evil.example:8000")
    assert ask(plain.port, rebound).status == 403
    for host in (b"127.0.0.1:8000", b"[::1]:8000", b"localhost:1"):
        assert ask(plain.port, post(INFER, JSON_BODY).replace(b"Host: localhost", b"Host: " + host)).status == 200


def test_settings_that_would_open_the_server() -> None:
    with pytest.raises(OptionError, match="this machine only"):
        ServerSettings(Path(), host="0.0.0.0")
    ServerSettings(Path(), host="0.0.0.0", api_keys=("k" * 20,))
    ServerSettings(Path(), host="0.0.0.0", insecure=True)
    assert "kkkk" not in repr(ServerSettings(Path(), api_keys=("k" * 20,)))
    for wrong in ({"control_mode": "some"}, {"http_port": 70000}, {"grpc_port": -1}):
        with pytest.raises(OptionError):
            ServerSettings(Path(), **wrong)
    with pytest.raises(OptionError):
        Limits(header_s=0)


def test_files_of_api_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n" + "a" * 20 + "\n\n" + "b" * 20 + "\n")
    file.chmod(0o600)
    assert read_api_keys(file, {"ACCELRT_API_KEYS": "c" * 20 + "," + "a" * 20}) == ("c" * 20, "a" * 20, "b" * 20)
    assert read_api_keys(None, {}) == ()
    file.chmod(0o666)
    with pytest.raises(OptionError, match="written by other"):
        read_api_keys(file, {})
    file.chmod(0o600)
    for text in ("", "short\n"):
        file.write_text(text)
        with pytest.raises(OptionError):
            read_api_keys(file, {})
    with pytest.raises(OptionError):
        read_api_keys(tmp_path / "nothing", {})


def test_tls(service: SmallService, tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with running(service, tls=TlsFiles(certificate, key)) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection("localhost", server.port, context=context, timeout=10)
        array = sample("FP32", (300, 300))
        body = {"inputs": [{"name": "x", "shape": [300, 300], "datatype": "FP32", "data": array.reshape(-1).tolist()}]}
        for _ in range(2):
            connection.request("POST", INFER, json.dumps(body))
            answer = connection.getresponse()
            data = json.loads(answer.read())["outputs"][0]["data"]
            np.testing.assert_array_equal(np.array(data, np.float32).reshape(300, 300), array)
        connection.close()
        with Raw(server.port) as raw:  # plain text where TLS is spoken
            raw.send(post(INFER, JSON_BODY))
            assert not raw.socket.recv(100).startswith(b"HTTP")
    with pytest.raises(OptionError, match="TLS"), running(service, tls=TlsFiles(key, certificate)):
        pass


def test_a_port_that_is_taken(plain: Running, service: SmallService) -> None:
    with pytest.raises(ServingError, match="cannot listen"), running(service, http_port=plain.port):
        pass


# The end


def test_draining_answers_what_is_under_way(service: SmallService) -> None:
    server = Running(service)
    with Raw(server.port) as busy, Raw(server.port) as idle, Raw(server.port) as reading:
        idle.send(post(INFER, JSON_BODY))
        assert idle.answer().status == 200
        busy.send(post("/v2/models/slow/infer", JSON_BODY))
        reading.send(post(INFER, JSON_BODY[:10], length=len(JSON_BODY)))
        time.sleep(0.1)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(10.0), server.loop)
        assert idle.ends()
        with pytest.raises(OSError):
            Raw(server.port)
        reading.send(JSON_BODY[10:])
        answer = reading.answer()
        assert answer.status == 200 and answer.headers["connection"] == "close"
        answer = busy.answer()
        assert answer.status == 200 and answer.headers["connection"] == "close" and busy.ends()
        stopping.result(5)
    server.close()


def test_draining_has_an_end(service: SmallService) -> None:
    server = Running(service)
    service.models["slow"].wait_s = 30.0
    try:
        with Raw(server.port) as busy:
            busy.send(post("/v2/models/slow/infer", JSON_BODY))
            time.sleep(0.1)
            start = time.monotonic()
            server.do(server.server.stop(0.3))
            assert time.monotonic() - start < 3 and busy.ends()
    finally:
        service.models["slow"].wait_s = 0.4
        server.close()


def test_a_draining_server_is_not_ready(service: SmallService, plain: Running) -> None:
    plain.server.draining = True
    try:
        for target in ("/v2/health/ready", "/v2/models/fp32/ready"):
            answer = ask(plain.port, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert answer.status == 400 and answer.json["ready"] is False and answer.headers["connection"] == "close"
    finally:
        plain.server.draining = False


# Without our own server


def test_the_application_runs_under_any_server(service: SmallService) -> None:
    import httpx

    from accelrt.serve.http.control import control_app

    server_settings = ServerSettings(Path(), limits=Limits(body_bytes=10_000))
    app = control_app(service, server_settings, Inference(service, server_settings.limits), draining=lambda: False)

    async def talk() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            assert (await client.get("/v2/health/ready")).status_code == 200
            for model in ("fp32", "slow"):
                answer = await client.post(f"/v2/models/{model}/versions/1/infer", content=JSON_BODY)
                assert answer.json()["outputs"][0]["data"] == [1.0, 2.5]
            assert (await client.post(INFER, content=bytes(20_000))).status_code == 413
            assert (await client.post("/v2/models/a%2Fb/infer", content=JSON_BODY)).status_code == 404

    asyncio.run(talk())


def test_routes_of_targets() -> None:
    route = http_server.infer_route
    assert route(b"/v2/models/a%20b/infer?x=1") == ("a b", "")
    assert route(b"/v2/models/m/versions/3/infer") == ("m", "3")
    for target in (
        b"/v2/models//infer",
        b"/v2/models/infer",
        b"/v2/models/a/b/infer",
        b"/v2/models/..%2fa/infer",
        b"/v2/models/m/versions//infer",
        b"/v2/models/m/versions/%2e%2e/infer",
    ):
        assert route(target) is None, target


# Bodies


def test_depth_of_json() -> None:
    bodies.guard_depth(b'["' + b"[" * 100 + b'", "\\"[[[[[[", []]', 4)
    bodies.guard_depth(b"[]" * 1000, 4)
    bodies.guard_depth(b"[" + b"[[]]," * 1000 + b"[]]", 3)
    for text in (b"[" * 5, b'{"a":' * 5, b'["]]]]]",[[[["]]]]"]]]]'):
        with pytest.raises(AccelrtError, match="nested"):
            bodies.guard_depth(text, 4)


NESTED = st.recursive(
    st.integers() | st.text(alphabet='[]{}"\\\\a', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[]{}"\\\\', max_size=3), inner, max_size=3)
    ),
)


def _depth(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


@given(NESTED, st.integers(0, 6))
def test_depth_is_that_of_the_value(value: Any, limit: int) -> None:
    text = json.dumps(value).encode()
    if _depth(value) <= limit:
        bodies.guard_depth(text, limit)
    else:
        with pytest.raises(AccelrtError):
            bodies.guard_depth(text, limit)


@given(NESTED)
def test_good_json_is_the_same_with_words_quoted(value: Any) -> None:
    quoted = bodies.quote_not_finite(json.dumps([value, "NaN"]).encode())
    assert quoted is not None and json.loads(quoted) == [value, "NaN"]


@pytest.mark.parametrize(
    "text",
    [b'"' + b'\\"' * 2_000_000, b'"' * 2_000_001, b'["a",' * 500_000, b"NaN," * 500_000 + b'"' + b"\\" * 999_999],
    ids=len,
)
def test_hostile_text_takes_no_time(text: bytes) -> None:
    start = time.process_time()
    with contextlib.suppress(AccelrtError):
        bodies.guard_depth(b"[" * 65 + text, 64)
    bodies.quote_not_finite(text + b"NaN")
    assert time.process_time() - start < 5  # seconds where a second look at each quote would take hours


def test_gzip_of_many_pieces_is_refused() -> None:
    with pytest.raises(AccelrtError, match="pieces"):
        bodies.decompressed(gzip.compress(b"") * 10_000, "gzip", 1000)


def test_bare_words_are_quoted_outside_text_only() -> None:
    assert bodies.quote_not_finite(b'{"NaN":[NaN,-Infinity,"a\\"NaN"]}') == b'{"NaN":["NaN","-Infinity","a\\"NaN"]}'
    assert bodies.quote_not_finite(b"[1]") is None


def test_too_much_text(service: SmallService) -> None:
    with running(service, limits=Limits(json_bytes=500), sagemaker=True, default_model="fp32") as server:
        large = JSON_BODY + b" " * 500
        assert ask(server.port, post(INFER, large)).status == 413
        assert ask(server.port, post("/invocations", b"[[1]]" + b" " * 500)).status == 413
        length = f"Inference-Header-Content-Length: {len(large)}"
        assert ask(server.port, post(INFER, large, length)).status == 413
        assert ask(server.port, post(INFER, JSON_BODY)).status == 200


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]))
def test_compression_is_undone(body: bytes, encoding: str) -> None:
    assert bodies.decompressed(bodies.compressed(body, encoding), encoding, 1000) == body
    raw = zlib.compressobj(wbits=-15)
    assert bodies.decompressed(raw.compress(body) + raw.flush(), "deflate", 1000) == body
    assert bodies.decompressed(gzip.compress(body) * 2, "gzip", 1000) == body * 2


def test_what_encodings_are_accepted() -> None:
    assert bodies.accepted("br, gzip;q=0.5, deflate") == "gzip"
    assert bodies.accepted("gzip;q=0, deflate") == "deflate"
    assert bodies.accepted("identity, *;q=0") == bodies.accepted("") == ""


# Older ways to ask


@pytest.fixture(scope="module")
def classic() -> Iterator[Running]:
    service = SmallService(
        {
            "model0": identity("FP32", ("n", 2)),
            "model2": two_inputs(),
            "model10": identity("BYTES", ("n", 1)),
            "half": identity("FP16", ("n", 2)),
            "image": identity("INT8", ("n", 2, 2)),
            "flag": identity("BOOL", ("n", 2)),
        }
    )
    with running(service, sagemaker=True, default_model="model0") as server:
        yield server
    service.close()


def _get(server: Running, target: str) -> Any:
    return ask(server.port, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def test_predictions(classic: Running) -> None:
    assert _get(classic, "/").json == {"Status": "Healthy"}
    assert _get(classic, "/predictions/model0?seq_0=%5B1,2%5D").json == {"detail": [[1.0, 2.0]]}
    assert _get(classic, "/predictions/model0?x=[[1,2],[3,4]]").json == {"detail": [[1.0, 2.0], [3.0, 4.0]]}
    both = _get(classic, "/predictions/model2?seq_0=[1,2,3]&seq_1=[4,5,6]").json["detail"]
    assert both == {"sum": [[5.0, 7.0, 9.0]], "product": [[4.0, 10.0, 18.0]]}
    assert _get(classic, "/predictions/model10?seq_0=plain%20text").json == {"detail": [["plain text"]]}
    missing = _get(classic, "/predictions/model11")
    assert missing.status == 404
    assert missing.json == {"detail": "Model model11 does not exist. Try a model name up to model10"}
    posted = ask(classic.port, post("/predictions/half", b'{"inputs": {"x": [[1.5, 2]]}}'))
    assert posted.json == {"detail": [[1.5, 2.0]]}
    for target in (
        "/predictions/model0?seq_7=1",
        "/predictions/model0?x=[1,2]&seq_0=[1,2]",
        "/predictions/model0?x=[[[",
        "/predictions/model0",
    ):
        assert _get(classic, target).status == 400


def _invoke(server: Running, body: bytes, kind: str = "application/json", accept: str = "") -> Any:
    headers = [f"Content-Type: {kind}", *([f"Accept: {accept}"] if accept else [])]
    return ask(server.port, post("/invocations", body, *headers))


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype == object)
    return stream.getvalue()


def test_sagemaker(classic: Running) -> None:
    with Raw(classic.port) as raw:
        raw.send(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.answer().status == 200
    rows = [[1.0, 2.0], [3.0, 4.5]]
    for body in (
        rows,
        {"inputs": rows},
        {"x": rows},
        {"instances": rows},
        {"instances": [{"x": row} for row in rows]},
        {"inputs": {"x": rows}},
    ):
        assert _invoke(classic, json.dumps(body).encode()).json == {"predictions": rows}
    assert _invoke(classic, b"1,2\n3,4.5\n", "text/csv").json == {"predictions": rows}
    assert _invoke(classic, b"1,2\n3,4.5\n", "text/csv", "text/csv").body == b"1.0,2.0\n3.0,4.5\n"
    answer = _invoke(classic, _npy(np.array(rows)), "application/x-npy", "application/x-npy")
    assert answer.headers["content-type"] == "application/x-npy"
    assert loose.read_npy(answer.body).tolist() == rows
    assert _invoke(classic, _npy(np.array(rows, np.float32, order="F")), "application/x-npy").json == {
        "predictions": rows
    }
    assert _invoke(classic, JSON_BODY).json["outputs"][0]["data"] == [1.0, 2.5]
    text = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}}],"parameters":{"binary_data_output":true}}'
    answer = _invoke(
        classic, text + bytes(8), f"application/vnd.sagemaker-triton.binary+json;json-header-size={len(text)}"
    )
    assert answer.headers["content-type"].startswith("application/vnd.sagemaker-triton.binary+json;json-header-size=")
    assert answer.body.endswith(bytes(8))


def _header_of(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"1,two\n", "text/csv", 400),
        (b"1,2\n3\n", "text/csv", 400),
        (b"", "text/csv", 400),
        (b"\xff\xfe\x00", "text/csv", 400),
        (b'"1,2\n', "text/csv", 400),
        (b"1e99,2\n", "text/csv", 400),
        (b"", "application/x-npy", 400),
        (b"\x93NUMPY", "application/x-npy", 400),
        (_header_of("(1099511627776, 2)"), "application/x-npy", 400),
        (_header_of("(-1, 2)") + bytes(8), "application/x-npy", 400),
        (_header_of("(1, 2)", "'|O'") + bytes(16), "application/x-npy", 400),
        (_header_of("(1, 2)", "'<c8'") + bytes(16), "application/x-npy", 400),
        (_header_of("(" * 500), "application/x-npy", 400),
        (_npy(np.array([[1e300, 2]])), "application/x-npy", 400),
        (_npy(np.array([[True, False]])), "application/x-npy", 400),
        (_npy(np.array([["a", None]], object)), "application/x-npy", 400),
        (b"{}", "image/png", 415),
        (b"{", "application/json", 400),
        (b'{"instances": 1}', "application/json", 400),
        (b'{"instances": [{"x": [1,2]}, {"y": [1,2]}]}', "application/json", 400),
        (b'{"q": [1]}', "application/json", 400),
        (b"[[123456789012345678901234567890, 1]]", "application/json", 400),
        (b"[[1, 2, 3]]", "application/json", 400),
        (b"[" * 1000, "application/json", 413),
    ],
    ids=lambda v: str(v)[:30],
)
def test_invocations_that_do_not_fit(classic: Running, body: bytes, kind: str, status: int) -> None:
    answer = _invoke(classic, body, kind)
    assert answer.status == status, answer.body
    assert answer.json["error"]


def test_formats_that_cannot_be_made(classic: Running) -> None:
    assert _invoke(classic, b"[[1,2]]", accept="image/png").status == 406
    assert _invoke(classic, b"[[1,2]]", accept="image/png, application/json;q=0.1").status == 200


def test_inputs_without_datatypes_take_the_models() -> None:
    from accelrt.serve.interface import TensorMetadata

    image = TensorMetadata("x", "INT8", (-1, 2, 2))
    assert loose.inputs_of_csv(b"1,2,3,4\n5,6,7,8\n", [image])["x"].shape == (2, 2, 2)
    assert loose.inputs_of_json([[1, 2], [3, 4]], [image])["x"].shape == (1, 2, 2)
    assert loose.inputs_of_npy(_npy(np.array([[1, 2], [3, 4]])), [image])["x"].dtype == np.int8
    for array in (np.array([[300, 2], [3, 4]]), np.array([[1.0, 2], [3, 4]])):
        with pytest.raises(AccelrtError):
            loose.inputs_of_npy(_npy(array), [image])
    flag = TensorMetadata("x", "BOOL", (-1, 2))
    assert loose.inputs_of_csv(b"1,0\n", [flag])["x"].tolist() == [[True, False]]
    with pytest.raises(AccelrtError):
        loose.inputs_of_csv(b"1,2\n", [flag])
    half = TensorMetadata("x", "BF16", (-1, 1))
    assert loose.inputs_of_json([[1.5]], [half])["x"].dtype == numpy_dtype("bfloat16")
    with pytest.raises(AccelrtError):
        loose.inputs_of_json([[1e39]], [half])
    line = TensorMetadata("x", "FP32", (-1,))
    assert loose.inputs_of_csv(b"1\n2\n", [line])["x"].tolist() == [1, 2]
