"""Clients of the Open Inference Protocol, over HTTP and gRPC: the same suite against accelrt's server and a real Triton.

Where the two differ, `DIFFERENCES` says how and why. Everything else passes on both.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.protocol_servers import MAX_BATCH, ONNX_TYPES, Server, start_accelrt, start_triton, stop

http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[all]")
grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[all]")
pytest.importorskip("fastapi", reason="needs the extra serve")

from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # noqa: E402

TRITON = os.environ.get("ACCELRT_TRITON")

DIFFERENCES = {
    "unknown models": "Triton answers 400 to inference over HTTP, and INVALID_ARGUMENT to statistics over gRPC, where it "
    "does not know the model or version; accelrt 404 and NOT_FOUND, as the protocol's table of errors has it.",
    "unloading what is not there": "Triton answers that it unloaded a model that it never had; accelrt 404, because a "
    "misspelt name would go unnoticed.",
    "configuration of a load": "Triton keeps a configuration that came with a load for later loads without one, until "
    "the model is unloaded; accelrt goes back to the repository's, so that a load always means the same.",
    "configuration and model": "Triton's Python backend takes a configuration for the truth; accelrt holds it against "
    "the model, and refuses one of another rank, size or type, as Triton's ONNX backend does.",
    "readiness after a failed load": "A load that failed makes Triton say that it is not ready from then on, although "
    "all models that answered go on to; accelrt stays ready, because one client's mistake is not the server's state.",
    "text": "ONNX text is UTF-8: accelrt refuses elements of BYTES that are not, Triton's Python backend has no types.",
    "negative sizes": "Triton takes a shape of (-2, -3) for six elements, hands it on, and its Python backend's "
    "process dies; accelrt refuses it.",
    "late requests": "Triton answers 503 (UNAVAILABLE) to a request whose own timeout passed in the queue; accelrt 504 "
    "(DEADLINE_EXCEEDED), because asking again at once is no remedy.",
    "timeouts without a default": "Triton heeds a request's timeout only where the model's configuration has a default "
    "that is longer; accelrt wherever requests may have their own.",
    "classification": "accelrt does not have the extension, does not advertise it, and refuses its parameter.",
    "sequences": "accelrt does not have the extension: it refuses a sequence_id, which Triton ignores for models without "
    "a sequence batcher; a client that counts on state would be answered wrongly.",
    "settings by requests": "Triton lets clients change its log and its traces; accelrt refuses, because they are the "
    "operator's.",
    "CUDA shared memory": "accelrt does not have the extension, does not advertise it, and refuses its routes.",
}
"""What differs, and why. A case that differs asserts both: what accelrt does, and what Triton 2.51 was seen to do."""


def differs(server: Server, what: str) -> bool:
    """Tell whether a server is the one that differs from accelrt in something that `DIFFERENCES` lists."""
    assert what in DIFFERENCES
    return server.kind == "triton"


@pytest.fixture(scope="module", params=["accelrt", "triton"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param) / "models"
    folder.mkdir()
    if request.param == "triton":
        if TRITON is None:
            pytest.skip("no Triton here: set ACCELRT_TRITON to the folder that has bin/tritonserver")
        process, running = start_triton(folder, Path(TRITON))
    else:
        process, running = start_accelrt(folder)
    yield running
    stop(process, running)


class Client:
    """tritonclient by either protocol, as one: the two differ in what binary tensors are called."""

    def __init__(self, server: Server, kind: str) -> None:
        self.kind, self.server = kind, server
        self.module = http if kind == "http" else grpc
        self.raw = self.module.InferenceServerClient(server.http if kind == "http" else server.grpc)

    def input(self, name: str, array: np.ndarray, datatype: str | None = None, *, binary: bool = True) -> Any:
        made = self.module.InferInput(name, list(array.shape), datatype or np_to_triton_dtype(array.dtype))
        if self.kind == "http":
            made.set_data_from_numpy(array, binary_data=binary)
        else:
            made.set_data_from_numpy(array)
        return made

    def output(self, name: str, *, binary: bool = True) -> Any:
        if self.kind == "http":
            return http.InferRequestedOutput(name, binary_data=binary)
        return grpc.InferRequestedOutput(name)

    def json(self, answer: Any) -> Any:
        """An answer of a control call as plain data."""
        if self.kind == "http":
            return answer
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(answer, preserving_proto_field_name=True)


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    made = Client(server, request.param)
    yield made
    made.raw.close()


def values(datatype: str, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    random = np.random.default_rng(7)
    count = int(np.prod(shape))
    if datatype == "BOOL":
        return (random.integers(0, 2, count) > 0).reshape(shape)
    if datatype == "BYTES":
        texts = [b"", "grüß".encode(), b"\x00\x7f\x01", b"x" * 1000, b"4", "日本".encode()]
        return np.array([texts[i % len(texts)] for i in range(count)], dtype=object).reshape(shape)
    if datatype in ("FP16", "FP32", "FP64"):
        dtype = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}[datatype]
        return random.standard_normal(count).astype(dtype).reshape(shape)
    if datatype == "BF16":
        import ml_dtypes

        return random.standard_normal(count).astype(ml_dtypes.bfloat16).reshape(shape)
    info = np.iinfo(datatype.lower())
    made = random.integers(info.min, info.max, count, dtype=info.dtype, endpoint=True)
    made[0], made[-1] = info.min, info.max
    return made.reshape(shape)


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    if wanted.dtype == object:
        assert [bytes(one) if isinstance(one, bytes) else str(one).encode() for one in got.ravel()] == list(
            wanted.ravel()
        )
    else:
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


# Health, metadata


def test_live(client: Client) -> None:
    assert client.raw.is_server_live()


def test_ready(client: Client) -> None:
    assert client.raw.is_server_ready()


@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_is_ready(client: Client, version: str) -> None:
    assert client.raw.is_model_ready("id_FP32", version)


@pytest.mark.parametrize(("name", "version"), [("nobody", ""), ("id_FP32", "7")])
def test_an_unknown_model_is_not_ready(client: Client, name: str, version: str) -> None:
    assert not client.raw.is_model_ready(name, version)


def test_server_metadata(client: Client) -> None:
    found = client.json(client.raw.get_server_metadata())
    assert found["name"] and found["version"]
    wanted = {"binary_tensor_data", "model_configuration", "model_repository", "statistics", "schedule_policy"}
    assert wanted <= set(found["extensions"])


@pytest.mark.parametrize("datatype", ONNX_TYPES)
def test_model_metadata(client: Client, datatype: str) -> None:
    found = client.json(client.raw.get_model_metadata(f"id_{datatype}"))
    assert found["name"] == f"id_{datatype}"
    assert found["versions"] == ["1"]
    for side, name in (("inputs", "x"), ("outputs", "y")):
        (port,) = found[side]
        assert (port["name"], port["datatype"]) == (name, datatype)
        assert [int(d) for d in port["shape"]] == [-1, -1]


def test_metadata_of_a_batched_model_has_the_batch_axis(client: Client) -> None:
    found = client.json(client.raw.get_model_metadata("batched"))
    assert [int(d) for d in found["inputs"][0]["shape"]] == [-1, 3]


def test_metadata_of_an_unknown_model_fails(client: Client) -> None:
    with pytest.raises(InferenceServerException, match=r"nobody"):
        client.raw.get_model_metadata("nobody")


def test_config(client: Client) -> None:
    answer = client.json(client.raw.get_model_config("batched"))
    found = answer.get("config", answer)
    assert found["name"] == "batched"
    assert found["max_batch_size"] == MAX_BATCH
    assert "dynamic_batching" in found
    (port,) = found["input"]
    assert (port["name"], port["data_type"], [int(d) for d in port["dims"]]) == ("x", "TYPE_FP32", [3])


def test_config_of_a_version(client: Client) -> None:
    answer = client.json(client.raw.get_model_config("sum_diff", "1"))
    assert [port["name"] for port in answer.get("config", answer)["output"]] == ["sum", "diff"]


def test_config_of_an_unknown_model_fails(client: Client) -> None:
    with pytest.raises(InferenceServerException):
        client.raw.get_model_config("nobody")


def _statistics(client: Client, name: str) -> Any:
    (found,) = client.json(client.raw.get_inference_statistics(name))["model_stats"]
    return found


def test_statistics_count_requests_and_rows(client: Client) -> None:
    def read() -> tuple[int, int, int, int]:
        found = _statistics(client, "batched")
        stats = found.get("inference_stats", {})
        success = stats.get("success", {})
        return (
            int(found.get("inference_count", 0)),
            int(found.get("execution_count", 0)),
            int(success.get("count", 0)),
            int(success.get("ns", 0)),
        )

    before = read()
    for rows in (1, 4):
        client.raw.infer("batched", [client.input("x", np.ones((rows, 3), np.float32))])
    after = read()
    assert after[0] - before[0] == 5
    assert 1 <= after[1] - before[1] <= 2
    assert after[2] - before[2] == 2
    assert after[3] > before[3]


def test_statistics_of_all_models(client: Client) -> None:
    found = client.json(client.raw.get_inference_statistics())["model_stats"]
    assert {"batched", "sum_diff", "id_FP32"} <= {one["name"] for one in found}


def test_statistics_count_failures_of_the_model(client: Client) -> None:
    found = _statistics(client, "sum_diff")
    assert int(found.get("inference_stats", {}).get("fail", {}).get("count", 0)) >= 0


# The repository


def test_index(client: Client) -> None:
    answer = client.json(client.raw.get_model_repository_index())
    found = answer.get("models", []) if isinstance(answer, dict) else answer
    states = {one["name"]: one.get("state") for one in found}
    assert states["id_FP32"] == "READY"
    assert {f"id_{datatype}" for datatype in ONNX_TYPES} <= set(states)


def test_unload_and_load(client: Client) -> None:
    client.raw.unload_model("double")
    assert _soon(lambda: not client.raw.is_model_ready("double"))
    with pytest.raises(InferenceServerException):
        client.raw.infer("double", [client.input("x", np.ones((1, 1), np.float32))])
    client.raw.load_model("double")
    assert client.raw.is_model_ready("double")
    same(_double(client, "double"), np.full((2, 2), 6, np.float32))


def test_load_with_a_config(client: Client) -> None:
    try:
        client.raw.load_model("double", config=json.dumps(_config(client, "double", [2, -1])))
        found = client.json(client.raw.get_model_metadata("double"))
        assert [int(d) for d in found["inputs"][0]["shape"]] == [2, -1]
        answer = client.json(client.raw.get_model_config("double"))
        assert [int(d) for d in answer.get("config", answer)["input"][0]["dims"]] == [2, -1]
    finally:
        _as_it_was(client)
    found = client.json(client.raw.get_model_metadata("double"))
    assert [int(d) for d in found["inputs"][0]["shape"]] == [-1, -1]


def test_load_with_an_uploaded_file(client: Client) -> None:
    name = f"sent_{client.kind}"
    config = _config(client, name, [-1, -1])
    files = {f"file:1/{client.server.upload_name}": client.server.upload}
    client.raw.load_model(name, config=json.dumps(config), files=files)
    try:
        same(_double(client, name), np.full((2, 2), 6, np.float32))
    finally:
        client.raw.unload_model(name)
    assert _soon(lambda: not client.raw.is_model_ready(name))


def test_loading_an_unknown_model_fails(client: Client) -> None:
    with pytest.raises(InferenceServerException, match="nobody"):
        client.raw.load_model("nobody")


def test_an_upload_that_is_no_model_fails_and_leaves_the_server_well(client: Client) -> None:
    files = {f"file:1/{client.server.upload_name}": b"this is no model (((" * 10}
    config = json.dumps({"name": "junk", **({"backend": "python"} if client.server.kind == "triton" else {})})
    with pytest.raises(InferenceServerException):
        client.raw.load_model("junk", config=config, files=files)
    assert client.raw.is_server_live()
    assert client.raw.is_model_ready("id_FP32")
    assert not client.raw.is_model_ready("junk")
    answer = client.json(client.raw.get_model_repository_index())
    assert "junk" not in str(answer)
    assert client.raw.is_server_ready() != differs(client.server, "readiness after a failed load")


def test_a_load_that_fails_leaves_what_answers(client: Client) -> None:
    files = {f"file:1/{client.server.upload_name}": b"this is no model (((" * 10}
    config = json.dumps({"name": "double", **({"backend": "python"} if client.server.kind == "triton" else {})})
    with pytest.raises(InferenceServerException) as caught:
        client.raw.load_model("double", config=config, files=files)
    assert _status(caught.value) in ("400", "INVALID_ARGUMENT")
    assert "/tmp" not in str(caught.value)
    assert client.raw.is_model_ready("double")
    same(_double(client, "double"), np.full((2, 2), 6, np.float32))
    assert client.raw.is_server_ready() != differs(client.server, "readiness after a failed load")
    _as_it_was(client)


@pytest.mark.parametrize(
    ("dims", "datatype"), [([-1], "FP32"), ([2, 2, 2], "FP32"), ([-1, -1], "INT32")], ids=["rank 1", "rank 3", "type"]
)
def test_a_config_that_does_not_fit_the_model(client: Client, dims: list[int], datatype: str) -> None:
    config = json.dumps(_config(client, "double", dims, datatype))
    if differs(client.server, "configuration and model"):
        client.raw.load_model("double", config=config)
    else:
        with pytest.raises(InferenceServerException, match="'x'"):
            client.raw.load_model("double", config=config)
    _as_it_was(client)


def test_a_config_that_is_no_json_fails(client: Client) -> None:
    with pytest.raises(InferenceServerException):
        client.raw.load_model("double", config="{")
    assert client.raw.is_model_ready("double")


def test_a_config_narrows_what_is_taken(client: Client) -> None:
    client.raw.load_model("double", config=json.dumps(_config(client, "double", [2, -1])))
    try:
        same(_double(client, "double"), np.full((2, 2), 6, np.float32))
        error = _fails(client, "double", [client.input("x", np.ones((3, 2), np.float32))])
        assert _status(error) in ("400", "INVALID_ARGUMENT")
    finally:
        _as_it_was(client)
    three = client.raw.infer("double", [client.input("x", np.ones((3, 2), np.float32))])
    same(three.as_numpy("y"), np.full((3, 2), 2, np.float32))


def test_what_becomes_of_a_config_after_the_next_load(client: Client) -> None:
    client.raw.load_model("double", config=json.dumps(_config(client, "double", [2, -1])))
    client.raw.load_model("double")
    found = client.json(client.raw.get_model_metadata("double"))
    kept = [int(d) for d in found["inputs"][0]["shape"]] == [2, -1]
    assert kept == differs(client.server, "configuration of a load")
    _as_it_was(client)


def test_unloading_an_unknown_model(client: Client) -> None:
    if differs(client.server, "unloading what is not there"):
        client.raw.unload_model("nobody")
    else:
        with pytest.raises(InferenceServerException, match="nobody"):
            client.raw.unload_model("nobody")


def _config(client: Client, name: str, dims: list[int], datatype: str = "FP32") -> dict[str, Any]:
    return {
        "name": name,
        "max_batch_size": 0,
        "input": [{"name": "x", "data_type": f"TYPE_{datatype}", "dims": dims}],
        "output": [{"name": "y", "data_type": f"TYPE_{datatype}", "dims": dims}],
        **({"backend": "python"} if client.server.kind == "triton" else {"platform": "onnxruntime_onnx"}),
    }


def _as_it_was(client: Client) -> None:
    """Load the model ``double`` from the repository, with its own configuration."""
    client.raw.unload_model("double")  # Triton keeps a configuration until then
    assert _soon(lambda: not client.raw.is_model_ready("double"))
    client.raw.load_model("double")
    assert client.raw.is_model_ready("double")


def _double(client: Client, name: str) -> np.ndarray:
    return client.raw.infer(name, [client.input("x", np.full((2, 2), 3, np.float32))]).as_numpy("y")


def _soon(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


# Tensors


@pytest.mark.parametrize("datatype", ONNX_TYPES)
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (64, 65)], ids=str)
def test_binary_tensors_come_back_as_they_went(client: Client, datatype: str, shape: tuple[int, ...]) -> None:
    x = values(datatype, shape)
    answer = client.raw.infer(f"id_{datatype}", [client.input("x", x, datatype)])
    same(answer.as_numpy("y"), x)


def test_text_that_is_no_utf8(client: Client) -> None:
    x = np.array([[b"\x00\xff\x01", b"fine"]], dtype=object)
    if differs(client.server, "text"):
        same(client.raw.infer("id_BYTES", [client.input("x", x)]).as_numpy("y"), x)
        return
    error = _fails(client, "id_BYTES", [client.input("x", x)])
    assert "UTF-8" in str(error) and _status(error) in ("400", "INVALID_ARGUMENT")


@pytest.mark.parametrize("datatype", [one for one in ONNX_TYPES if one not in ("BF16", "FP16")])
def test_json_tensors_come_back_as_they_went(server: Server, datatype: str) -> None:
    client = Client(server, "http")
    x = values(datatype)
    if datatype == "BYTES":
        x = np.array([b"", "grüß".encode(), b"4"], dtype=object).reshape(1, 3)  # JSON holds text only
    answer = client.raw.infer(
        f"id_{datatype}", [client.input("x", x, datatype, binary=False)], outputs=[client.output("y", binary=False)]
    )
    same(answer.as_numpy("y"), x)
    client.raw.close()


@pytest.mark.parametrize(("sent", "wanted"), [(True, False), (False, True)])
def test_json_and_binary_mix(server: Server, sent: bool, wanted: bool) -> None:
    client = Client(server, "http")
    x = values("FP32")
    answer = client.raw.infer(
        "id_FP32", [client.input("x", x, binary=sent)], outputs=[client.output("y", binary=wanted)]
    )
    same(answer.as_numpy("y"), x)
    client.raw.close()


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL"])
def test_empty_tensors(client: Client, datatype: str) -> None:
    x = values(datatype, (0, 3)) if datatype != "INT64" else np.zeros((0, 3), np.int64)
    same(client.raw.infer(f"id_{datatype}", [client.input("x", x)]).as_numpy("y"), x)


def test_special_floats_survive(client: Client) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, -0.0, np.float32(1e-45)]], np.float32)
    got = client.raw.infer("id_FP32", [client.input("x", x)]).as_numpy("y")
    assert got.tobytes() == x.tobytes()


def test_large_tensors(client: Client) -> None:
    x = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    same(client.raw.infer("id_FP32", [client.input("x", x)]).as_numpy("y"), x)


def test_several_inputs_in_any_order(client: Client) -> None:
    a, b = np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((2, 4), np.float32)
    answer = client.raw.infer("sum_diff", [client.input("b", b), client.input("a", a)])
    same(answer.as_numpy("sum"), a + b)
    same(answer.as_numpy("diff"), a - b)


def _pair(client: Client) -> list[Any]:
    a = np.arange(8, dtype=np.float32).reshape(2, 4)
    return [client.input("a", a), client.input("b", np.ones((2, 4), np.float32))]


@pytest.mark.parametrize("names", [["diff"], ["sum"], ["diff", "sum"]], ids="-".join)
def test_only_the_outputs_asked_for_come_back(client: Client, names: list[str]) -> None:
    answer = client.raw.infer("sum_diff", _pair(client), outputs=[client.output(name) for name in names])
    for name in ("sum", "diff"):
        assert (answer.as_numpy(name) is not None) == (name in names)


@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH])
def test_a_batched_model_takes_any_batch(client: Client, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 3), dtype=np.float32)
    same(client.raw.infer("batched", [client.input("x", x)]).as_numpy("y"), 2 * x)


def test_a_batch_larger_than_the_models_fails(client: Client) -> None:
    with pytest.raises(InferenceServerException, match="batch"):
        client.raw.infer("batched", [client.input("x", np.ones((MAX_BATCH + 1, 3), np.float32))])


# Versions


def test_metadata_names_all_versions(client: Client) -> None:
    assert client.json(client.raw.get_model_metadata("twofold"))["versions"] == ["1", "3"]


@pytest.mark.parametrize("version", ["1", "3"])
def test_metadata_and_readiness_of_each_version(client: Client, version: str) -> None:
    assert client.raw.is_model_ready("twofold", version)
    assert client.json(client.raw.get_model_metadata("twofold", version))["name"] == "twofold"


@pytest.mark.parametrize(("asked", "answers"), [("", "3"), ("1", "1"), ("3", "3")])
def test_the_highest_version_answers_unless_one_is_named(client: Client, asked: str, answers: str) -> None:
    x = np.arange(3, dtype=np.float32)
    answer = client.raw.infer("twofold", [client.input("x", x)], model_version=asked)
    same(answer.as_numpy("y"), -x)
    response = answer.get_response()
    assert (response["model_version"] if client.kind == "http" else response.model_version) == answers


def test_a_version_between_others_is_not_there(client: Client) -> None:
    assert not client.raw.is_model_ready("twofold", "2")
    error = _fails(client, "twofold", [client.input("x", np.ones(3, np.float32))], model_version="2")
    assert _status(error) in _unknown(client)


def test_statistics_are_kept_for_each_version(client: Client) -> None:
    def count(version: str) -> int:
        (found,) = client.json(client.raw.get_inference_statistics("twofold", version))["model_stats"]
        assert found["version"] == version
        return int(found.get("inference_count", 0))

    before = count("1"), count("3")
    client.raw.infer("twofold", [client.input("x", np.ones(3, np.float32))], model_version="1")
    assert (count("1"), count("3")) == (before[0] + 1, before[1])


def test_statistics_of_an_unknown_model_fail(client: Client) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.raw.get_inference_statistics("nobody")
    expected = ("400", "INVALID_ARGUMENT") if differs(client.server, "unknown models") else ("404", "NOT_FOUND")
    assert _status(caught.value) in expected


# Queues that are busy


class Call(threading.Thread):
    """One request by a client in a thread of its own; it is about to be sent when this returns."""

    def __init__(self, client: Client, model: str, **options: Any) -> None:
        super().__init__()
        self._server, self._kind, self._model, self._options = client.server, client.kind, model, options
        self._sent = threading.Event()
        self.error: Exception | None = None
        self.answered = 0.0
        self.start()
        assert self._sent.wait(60)

    def run(self) -> None:
        client = Client(self._server, self._kind)  # here, because the HTTP client may not leave its thread
        client.raw.is_server_live()  # connects
        inputs = [client.input("x", np.ones((1, 1), np.float32))]
        self._sent.set()
        try:
            client.raw.infer(self._model, inputs, **self._options)
        except Exception as error:
            self.error = error
        self.answered = time.monotonic()
        client.raw.close()

    def done(self) -> Call:
        self.join(120)
        assert self.answered
        return self


def _behind(client: Client, model: str, *options: Mapping[str, Any]) -> tuple[Call, list[Call]]:
    """Send a request that takes its time and others while it does; again, if this machine was too slow for that."""
    for _ in range(4):
        first = Call(client, model)
        time.sleep(0.15)
        others = []
        for one in options:
            others.append(Call(client, model, **one))
            time.sleep(0.05)
        if first.is_alive():
            assert first.done().error is None
            return first, [one.done() for one in others]
        for call in (first, *others):
            call.done()
    raise AssertionError("the slow model answered before the other requests were sent")


def _executions(client: Client, name: str) -> int:
    return int(_statistics(client, name).get("execution_count", 0))


def test_the_config_tells_of_the_queue(client: Client) -> None:
    answer = client.json(client.raw.get_model_config("slow"))
    found = answer.get("config", answer)["dynamic_batching"]
    assert int(found["priority_levels"]) == 2 and int(found["default_priority_level"]) == 2
    policy = found["default_queue_policy"]
    assert policy["allow_timeout_override"] is True and int(policy["default_timeout_microseconds"]) == 60_000_000


def test_priority_1_overtakes_priority_2(client: Client) -> None:
    _, (later, latest, urgent) = _behind(client, "slow", {"priority": 2}, {"priority": 2}, {"priority": 1})
    assert [later.error, latest.error, urgent.error] == [None] * 3
    assert urgent.answered < later.answered < latest.answered


def test_no_priority_is_the_default_one(client: Client) -> None:
    _, (unsaid, urgent) = _behind(client, "slow", {}, {"priority": 1})
    assert (unsaid.error, urgent.error) == (None, None)
    assert urgent.answered < unsaid.answered


def test_a_request_that_is_late_is_not_computed(client: Client) -> None:
    before = _executions(client, "slow")
    for number in range(1, 5):  # a try may have to be made again, see `_behind`
        first, (late,) = _behind(client, "slow", {"timeout": 1000})
        assert first.error is None and isinstance(late.error, InferenceServerException)
        expected = ("503", "UNAVAILABLE") if differs(client.server, "late requests") else ("504", "DEADLINE_EXCEEDED")
        assert _status(late.error) in expected, late.error
        if _executions(client, "slow") == before + number:
            return
    raise AssertionError("what was late was computed")


def test_a_timeout_where_the_model_has_none(client: Client) -> None:
    _, (late,) = _behind(client, "narrow", {"timeout": 1000})
    if differs(client.server, "timeouts without a default"):
        assert late.error is None
    else:
        assert isinstance(late.error, InferenceServerException) and _status(late.error) in ("504", "DEADLINE_EXCEEDED")


def test_a_full_queue_turns_requests_away(client: Client) -> None:
    _, (waits, refused) = _behind(client, "narrow", {}, {})
    assert waits.error is None
    assert isinstance(refused.error, InferenceServerException) and _status(refused.error) in ("503", "UNAVAILABLE")
    assert refused.answered < waits.answered


# Requests


def test_the_id_comes_back(client: Client) -> None:
    answer = client.raw.infer("sum_diff", _pair(client), request_id="my-id-1")
    response = answer.get_response()
    assert (response["id"] if client.kind == "http" else response.id) == "my-id-1"


def test_the_answer_names_the_model(client: Client) -> None:
    response = client.raw.infer("sum_diff", _pair(client)).get_response()
    name, version = (
        (response["model_name"], response["model_version"])
        if client.kind == "http"
        else (response.model_name, response.model_version)
    )
    assert (name, version) == ("sum_diff", "1")


@pytest.mark.parametrize("version", ["", "1"])
def test_a_version_can_be_named(client: Client, version: str) -> None:
    answer = client.raw.infer("sum_diff", _pair(client), model_version=version)
    assert answer.as_numpy("sum").shape == (2, 4)


@pytest.mark.parametrize("priority", [0, 1, 2])
def test_a_priority_is_taken(client: Client, priority: int) -> None:
    assert client.raw.infer("batched", [client.input("x", np.ones((1, 3), np.float32))], priority=priority)


def test_a_timeout_that_is_long_enough_changes_nothing(client: Client) -> None:
    answer = client.raw.infer("batched", [client.input("x", np.ones((1, 3), np.float32))], timeout=10_000_000)
    same(answer.as_numpy("y"), np.full((1, 3), 2, np.float32))


def test_parameters_of_ones_own_are_taken(client: Client) -> None:
    answer = client.raw.infer("sum_diff", _pair(client), parameters={"tenant": "a", "flag": True, "n": 3})
    assert answer.as_numpy("sum") is not None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("side", ["request", "response", "both"])
def test_compression_over_http(server: Server, algorithm: str, side: str) -> None:
    client = Client(server, "http")
    x = np.zeros((64, 64), np.float32)
    options = {}
    if side in ("request", "both"):
        options["request_compression_algorithm"] = algorithm
    if side in ("response", "both"):
        options["response_compression_algorithm"] = algorithm
    same(client.raw.infer("id_FP32", [client.input("x", x)], **options).as_numpy("y"), x)
    client.raw.close()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_over_grpc(server: Server, algorithm: str) -> None:
    client = Client(server, "grpc")
    x = np.zeros((64, 64), np.float32)
    answer = client.raw.infer("id_FP32", [client.input("x", x)], compression_algorithm=algorithm)
    same(answer.as_numpy("y"), x)
    client.raw.close()


# Errors


def _status(error: InferenceServerException) -> str:
    return str(error.status() or "").removeprefix("StatusCode.")


def _fails(client: Client, name: str, inputs: list[Any], **options: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        client.raw.infer(name, inputs, **options)
    assert client.raw.is_server_live()
    return caught.value


def _unknown(client: Client) -> tuple[str, ...]:
    """The statuses of a model that is not known; see `DIFFERENCES`."""
    return ("404", "NOT_FOUND", "400") if differs(client.server, "unknown models") else ("404", "NOT_FOUND")


def test_an_unknown_model_fails(client: Client) -> None:
    error = _fails(client, "nobody", [client.input("x", np.ones((1, 1), np.float32))])
    assert "nobody" in str(error)
    assert _status(error) in _unknown(client)


def test_an_unknown_version_fails(client: Client) -> None:
    error = _fails(client, "id_FP32", [client.input("x", np.ones((1, 1), np.float32))], model_version="9")
    assert _status(error) in _unknown(client)


def test_a_version_that_is_no_number_fails(client: Client) -> None:
    error = _fails(client, "id_FP32", [client.input("x", np.ones((1, 1), np.float32))], model_version="one")
    assert _status(error) in ("404", "400", "NOT_FOUND", "INVALID_ARGUMENT")


def test_a_missing_input_fails(client: Client) -> None:
    error = _fails(client, "sum_diff", _pair(client)[:1])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_an_extra_input_fails(client: Client) -> None:
    error = _fails(client, "sum_diff", [*_pair(client), client.input("c", np.ones((2, 4), np.float32))])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_an_input_of_another_name_fails(client: Client) -> None:
    error = _fails(client, "id_FP32", [client.input("nope", np.ones((1, 1), np.float32))])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_an_input_twice_fails(client: Client) -> None:
    a, b = _pair(client)
    error = _fails(client, "sum_diff", [a, b, a])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


@pytest.mark.parametrize("datatype", ["INT32", "FP64", "BYTES"])
def test_another_datatype_fails(client: Client, datatype: str) -> None:
    error = _fails(client, "id_FP32", [client.input("x", values(datatype), datatype)])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


@pytest.mark.parametrize("shape", [(4,), (2, 4, 1), (2, 3)], ids=str)
def test_another_shape_fails(client: Client, shape: tuple[int, ...]) -> None:
    wrong = client.input("a", np.ones(shape, np.float32))
    error = _fails(client, "sum_diff", [wrong, client.input("b", np.ones((2, 4), np.float32))])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_an_unknown_output_fails(client: Client) -> None:
    error = _fails(client, "sum_diff", _pair(client), outputs=[client.output("product")])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_data_that_is_too_short_fails(client: Client) -> None:
    x = client.input("x", np.ones((2, 2), np.float32))
    x.set_shape([2, 3])
    error = _fails(client, "id_FP32", [x])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_data_that_is_too_long_fails(client: Client) -> None:
    x = client.input("x", np.ones((2, 3), np.float32))
    x.set_shape([1, 3])
    error = _fails(client, "id_FP32", [x])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_a_negative_size_fails(client: Client) -> None:
    if differs(client.server, "negative sizes"):
        pytest.skip(DIFFERENCES["negative sizes"])  # it would not survive
    x = client.input("x", np.ones((2, 3), np.float32))
    x.set_shape([-2, -3])
    error = _fails(client, "id_FP32", [x])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


def test_text_that_lies_about_its_length_fails(client: Client) -> None:
    x = client.module.InferInput("x", [1, 1], "BYTES")
    x.set_data_from_numpy(np.array([[b"abcd"]], dtype=object))
    x._raw_data = b"\xff\x00\x00\x00abcd"
    if client.kind == "grpc":
        x._raw_content = x._raw_data
    error = _fails(client, "id_BYTES", [x])
    assert _status(error) in ("400", "INVALID_ARGUMENT")


# What accelrt does not have


def test_classification(client: Client) -> None:
    wanted = client.module.InferRequestedOutput("y", class_count=1)
    x = client.input("x", np.array([[1, 3]], np.float32))
    if differs(client.server, "classification"):
        assert client.raw.infer("id_FP32", [x], outputs=[wanted]).as_numpy("y").ravel()[0].endswith(b":1")
        return
    error = _fails(client, "id_FP32", [x], outputs=[wanted])
    assert "lassification" in str(error) and _status(error) in ("400", "INVALID_ARGUMENT")


def test_sequences(client: Client) -> None:
    x = np.ones((1, 1), np.float32)
    if differs(client.server, "sequences"):
        same(client.raw.infer("id_FP32", [client.input("x", x)], sequence_id=5, sequence_start=True).as_numpy("y"), x)
        return
    error = _fails(client, "id_FP32", [client.input("x", x)], sequence_id=5, sequence_start=True)
    assert "equences" in str(error) and _status(error) in ("400", "INVALID_ARGUMENT")


@pytest.mark.parametrize("what", ["get_log_settings", "get_trace_settings"])
def test_settings_by_requests(client: Client, what: str) -> None:
    ask = getattr(client.raw, what)
    if differs(client.server, "settings by requests"):
        assert ask()
        return
    with pytest.raises(InferenceServerException) as caught:
        ask()
    assert _status(caught.value) in ("501", "UNIMPLEMENTED")


def test_cuda_shared_memory(client: Client) -> None:
    if differs(client.server, "CUDA shared memory"):
        client.raw.get_cuda_shared_memory_status()
        return
    with pytest.raises(InferenceServerException) as caught:
        client.raw.get_cuda_shared_memory_status()
    assert _status(caught.value) in ("501", "UNIMPLEMENTED")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_what_is_advertised_is_the_same_by_both(server: Server, kind: str) -> None:
    found = [
        set(client.json(client.raw.get_server_metadata())["extensions"])
        for client in (Client(server, "http"), Client(server, kind))
    ]
    # A socket for clients on this machine takes gRPC's messages, and only gRPC names it.
    found = [{name for name in each if not name.startswith("accelrt_local_socket(")} for each in found]
    assert found[0] == found[1] >= {"binary_tensor_data", "system_shared_memory", "parameters"}
    missing = {"classification", "sequence", "cuda_shared_memory", "trace", "logging"}
    assert bool(found[0] & missing) == differs(server, "classification")


# Many at once


def test_async_calls_over_http(server: Server) -> None:
    with http.InferenceServerClient(server.http, concurrency=4) as client:
        xs = [np.full((1, 2), i, np.float32) for i in range(24)]
        waiting = []
        for x in xs:
            tensor = http.InferInput("x", [1, 2], "FP32")
            tensor.set_data_from_numpy(x)
            waiting.append(client.async_infer("id_FP32", [tensor]))
        for x, one in zip(xs, waiting, strict=True):
            same(one.get_result().as_numpy("y"), x)


def test_async_calls_over_grpc(server: Server) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc) as client:
        for i in range(24):
            tensor = grpc.InferInput("x", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.full((1, 2), i, np.float32))
            client.async_infer(
                "id_FP32", [tensor], lambda result, error: answers.put((result, error)), request_id=str(i)
            )
        for _ in range(24):
            result, error = answers.get(timeout=30)
            assert error is None
            same(result.as_numpy("y"), np.full((1, 2), int(result.get_response().id), np.float32))


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_asyncio_clients(server: Server, kind: str) -> None:
    async def run() -> None:
        if kind == "http":
            import tritonclient.http.aio as module

            client = module.InferenceServerClient(server.http)
        else:
            import tritonclient.grpc.aio as module

            client = module.InferenceServerClient(server.grpc)
        assert await client.is_server_live()

        async def one(i: int) -> None:
            tensor = module.InferInput("x", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.full((1, 2), i, np.float32))
            answer = await client.infer("id_FP32", [tensor])
            same(answer.as_numpy("y"), np.full((1, 2), i, np.float32))

        await asyncio.gather(*(one(i) for i in range(32)))
        with pytest.raises(InferenceServerException):
            await client.get_model_metadata("nobody")
        await client.close()

    asyncio.run(run())


def test_a_stream_answers_each_request_once(server: Server) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client = grpc.InferenceServerClient(server.grpc)
    client.start_stream(lambda result, error: answers.put((result, error)))
    ids = [uuid.uuid4().hex for _ in range(16)]
    for number, id_ in enumerate(ids):
        tensor = grpc.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.full((1, 1), number, np.float32))
        client.async_stream_infer("id_FP32", [tensor], request_id=id_)
    found = {}
    for _ in ids:
        result, error = answers.get(timeout=30)
        assert error is None
        found[result.get_response().id] = float(result.as_numpy("y")[0, 0])
    client.stop_stream()
    assert found == {id_: float(number) for number, id_ in enumerate(ids)}
    client.close()


def test_a_stream_survives_a_request_that_fails(server: Server) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client = grpc.InferenceServerClient(server.grpc)
    client.start_stream(lambda result, error: answers.put((result, error)))
    tensor = grpc.InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    client.async_stream_infer("nobody", [tensor])
    _, error = answers.get(timeout=30)
    assert isinstance(error, InferenceServerException)
    client.async_stream_infer("id_FP32", [tensor])
    result, error = answers.get(timeout=30)
    assert error is None
    same(result.as_numpy("y"), np.ones((1, 1), np.float32))
    client.stop_stream()
    client.close()


# Shared memory


def test_system_shared_memory(client: Client) -> None:
    shm = pytest.importorskip("tritonclient.utils.shared_memory")
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    name = f"accelrt_{uuid.uuid4().hex[:12]}"
    handle = shm.create_shared_memory_region(name, f"/{name}", 2 * x.nbytes)
    try:
        shm.set_shared_memory_region(handle, [x])
        client.raw.register_system_shared_memory(name, f"/{name}", 2 * x.nbytes)
        known = client.json(client.raw.get_system_shared_memory_status())
        assert name in str(known)
        tensor = client.module.InferInput("x", [3, 4], "FP32")
        tensor.set_shared_memory(name, x.nbytes)
        wanted = client.output("y")
        wanted.set_shared_memory(name, x.nbytes, offset=x.nbytes)
        client.raw.infer("id_FP32", [tensor], outputs=[wanted])
        got = shm.get_contents_as_numpy(handle, np.float32, [3, 4], offset=x.nbytes)
        same(np.array(got), x)
        client.raw.unregister_system_shared_memory(name)
        assert name not in str(client.json(client.raw.get_system_shared_memory_status()))
    finally:
        shm.destroy_shared_memory_region(handle)


def test_shared_memory_that_is_not_registered_fails(client: Client) -> None:
    tensor = client.module.InferInput("x", [1, 1], "FP32")
    tensor.set_shared_memory("never_registered", 4)
    error = _fails(client, "id_FP32", [tensor])
    assert "never_registered" in str(error)


def test_shared_memory_beyond_its_end_fails(client: Client) -> None:
    shm = pytest.importorskip("tritonclient.utils.shared_memory")
    name = f"accelrt_{uuid.uuid4().hex[:12]}"
    handle = shm.create_shared_memory_region(name, f"/{name}", 64)
    try:
        client.raw.register_system_shared_memory(name, f"/{name}", 64)
        tensor = client.module.InferInput("x", [8, 8], "FP32")
        tensor.set_shared_memory(name, 256)
        _fails(client, "id_FP32", [tensor])
        client.raw.unregister_system_shared_memory(name)
    finally:
        shm.destroy_shared_memory_region(handle)


@contextmanager
def region(size: int) -> Iterator[tuple[str, Any]]:
    """A region of shared memory under a new name, with its handle; not registered."""
    shm = pytest.importorskip("tritonclient.utils.shared_memory")
    name = f"accelrt_{uuid.uuid4().hex[:12]}"
    handle = shm.create_shared_memory_region(name, f"/{name}", size)
    try:
        yield name, handle
    finally:
        shm.destroy_shared_memory_region(handle)


def _regions(client: Client) -> list[dict[str, Any]]:
    answer = client.json(client.raw.get_system_shared_memory_status())
    return answer if isinstance(answer, list) else list(answer.get("regions", {}).values())


def test_the_status_of_a_region(client: Client) -> None:
    with region(8192) as (name, _):  # Triton takes whole pages for the offset
        client.raw.register_system_shared_memory(name, f"/{name}", 128, offset=4096)
        (found,) = [one for one in _regions(client) if one["name"] == name]
        assert (found["key"], int(found["offset"]), int(found["byte_size"])) == (f"/{name}", 4096, 128)
        client.raw.unregister_system_shared_memory(name)
        client.raw.unregister_system_shared_memory(name)  # what is not there need not go
        with pytest.raises(InferenceServerException):
            client.raw.get_system_shared_memory_status(name)


def test_a_region_twice_fails(client: Client) -> None:
    with region(64) as (name, _):
        client.raw.register_system_shared_memory(name, f"/{name}", 64)
        with pytest.raises(InferenceServerException):
            client.raw.register_system_shared_memory(name, f"/{name}", 64)
        client.raw.unregister_system_shared_memory(name)


def test_all_regions_can_be_unregistered(client: Client) -> None:
    with region(64) as (one, _), region(64) as (other, _):
        for name in (one, other):
            client.raw.register_system_shared_memory(name, f"/{name}", 64)
        client.raw.unregister_system_shared_memory()
        assert not _regions(client)


def test_an_output_that_does_not_fit_its_region_fails(client: Client) -> None:
    with region(64) as (name, _):
        client.raw.register_system_shared_memory(name, f"/{name}", 64)
        wanted = client.output("y")
        wanted.set_shared_memory(name, 32)
        error = _fails(client, "id_FP32", [client.input("x", np.ones((4, 4), np.float32))], outputs=[wanted])
        assert _status(error) in ("400", "INVALID_ARGUMENT", "500", "INTERNAL")
        client.raw.unregister_system_shared_memory(name)


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "UINT64", "FP16", "BF16", "FP64", "BYTES"])
def test_datatypes_in_shared_memory(client: Client, datatype: str) -> None:
    shm = pytest.importorskip("tritonclient.utils.shared_memory")
    from tritonclient.utils import serialize_byte_tensor

    x = values(datatype)
    raw = serialize_byte_tensor(x).item() if datatype == "BYTES" else x.tobytes()
    with region(4096) as (name, handle):
        shm.set_shared_memory_region(handle, [np.frombuffer(raw, np.uint8)], offset=128)
        client.raw.register_system_shared_memory(name, f"/{name}", 4096)
        tensor = client.module.InferInput("x", list(x.shape), datatype)
        tensor.set_shared_memory(name, len(raw), offset=128)
        same(client.raw.infer(f"id_{datatype}", [tensor]).as_numpy("y"), x)
        client.raw.unregister_system_shared_memory(name)


def test_both_protocols_share_their_regions(server: Server) -> None:
    shm = pytest.importorskip("tritonclient.utils.shared_memory")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    over_http, over_grpc = Client(server, "http"), Client(server, "grpc")
    with region(x.nbytes) as (name, handle):
        shm.set_shared_memory_region(handle, [x])
        over_http.raw.register_system_shared_memory(name, f"/{name}", x.nbytes)
        tensor = grpc.InferInput("x", [2, 3], "FP32")
        tensor.set_shared_memory(name, x.nbytes)
        same(over_grpc.raw.infer("id_FP32", [tensor]).as_numpy("y"), x)
        over_grpc.raw.unregister_system_shared_memory(name)
        assert name not in str(_regions(over_http))
    over_http.raw.close()
    over_grpc.raw.close()


def test_a_region_that_does_not_exist_cannot_be_registered(client: Client) -> None:
    with pytest.raises(InferenceServerException):
        client.raw.register_system_shared_memory("ghost", "/accelrt_no_such_region", 64)
