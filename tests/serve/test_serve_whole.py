"""Both front ends over real models: what neither can show alone."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelrt.errors import NotAllowed, RequestError
from accelrt.serve.http.access import is_local
from accelrt.serve.interface import InferRequest, is_ready
from accelrt.serve.models import ModelService, ServiceSettings
from accelrt.serve.shared_memory import SharedMemoryRegistry
from tests.serve.serve_client import Running, ask, post
from tests.unit.serve_cases import line, put, run

grpc = pytest.importorskip("grpc")

from accelrt.protocol.messages import METHODS, message  # noqa: E402
from accelrt.serve.grpc import GrpcSettings  # noqa: E402
from accelrt.serve.grpc import start as start_grpc  # noqa: E402


class Whole:
    """A `ModelService` behind HTTP and gRPC, on an event loop of its own thread."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.models = ModelService(ServiceSettings((root,), **settings))
        self.regions = SharedMemoryRegistry()
        self.http = Running(self.models, regions=self.regions)
        self.http.do(self.models.start())
        self._handle = self.http.do(start_grpc(self.models, GrpcSettings(), regions=self.regions))
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self._handle.port}")

    def call(self, method: str, **fields: Any) -> Any:
        """Call a method of the protocol over gRPC."""
        made = METHODS[method]
        stub = self.channel.unary_unary(
            made.path, request_serializer=made.request.SerializeToString, response_deserializer=made.response.FromString
        )
        return stub(made.request(**fields), timeout=60)

    def ready(self, name: str) -> tuple[int, bool]:
        """What both front ends say of a model: HTTP's status, gRPC's answer."""
        answer = ask(self.http.port, f"GET /v2/models/{name}/ready HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return answer.status, self.call("ModelReady", name=name).ready

    def infer(self, name: str, rows: list[list[float]]) -> list[float]:
        given = {"name": "x", "shape": [len(rows), 2], "datatype": "FP32", "data": rows}
        answer = ask(self.http.port, post(f"/v2/models/{name}/infer", json.dumps({"inputs": [given]}).encode()))
        assert answer.status == 200, answer.body
        return answer.json["outputs"][0]["data"]  # type: ignore[no-any-return]

    def close(self) -> None:
        self.channel.close()
        self.http.do(self._handle.stop(0.0))
        self.http.do(self.models.drain(30.0))
        self.http.close()


@contextmanager
def whole(root: Path, **settings: Any) -> Iterator[Whole]:
    made = Whole(root, **settings)
    try:
        yield made
    finally:
        made.close()


def test_a_model_that_made_room_is_ready_by_both(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"m{number}.onnx", line(number + 1))
    with whole(tmp_path, max_resident_models=1) as server:
        assert server.infer("m2", [[1, 2]]) == [3, 6]
        out = [name for name in ("m0", "m1") if server.models.find(name) is None]
        assert out, "all of them are in memory, so that the test tells nothing"
        for name in ("m0", "m1", "m2"):
            assert server.ready(name) == (200, True)
        assert server.ready("m3") == (404, False)
        # Asking whether it is ready loads nothing.
        assert [name for name in ("m0", "m1") if server.models.find(name) is None] == out
        assert not is_ready(server.models, "m0", "2")


def test_a_model_that_failed_a_grpc_call_is_unloaded_at_once(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    with whole(tmp_path, control="explicit", load_models=("a",), drain_s=30.0) as server:
        tensor = message("ModelInferRequest.InferInputTensor")(name="x", datatype="FP32", shape=[1, 3])
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                server.call("ModelInfer", model_name="a", inputs=[tensor], raw_input_contents=[bytes(12)])
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        start = time.monotonic()
        server.call("RepositoryModelUnload", model_name="a")
        assert time.monotonic() - start < 15, "somebody held the model, and unloading waited for the whole drain time"


# Shared memory over HTTP


@contextmanager
def region(size: int) -> Iterator[tuple[str, Path]]:
    name = f"accelrt_{uuid.uuid4().hex[:12]}"
    path = Path("/dev/shm") / name
    path.write_bytes(bytes(size))
    try:
        yield name, path
    finally:
        path.unlink()


def _register(port: int, name: str, **given: Any) -> int:
    return ask(port, post(f"/v2/systemsharedmemory/region/{name}/register", json.dumps(given).encode())).status


def _infer_in(port: int, input_: dict[str, Any], output: dict[str, Any]) -> Any:
    document = {
        "inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "parameters": input_}],
        "outputs": [{"name": "y", "parameters": output}],
    }
    return ask(port, post("/v2/models/a/infer", json.dumps(document).encode()))


def test_tensors_in_shared_memory_over_http(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(3))
    with whole(tmp_path) as server, region(64) as (name, path):
        port = server.http.port
        x = np.array([[1, 2], [3, 4]], np.float32)
        path.write_bytes(bytes(16) + x.tobytes() + bytes(32))
        assert _register(port, name, key=f"/{name}", offset=16, byte_size=48) == 200
        place = {"shared_memory_region": name, "shared_memory_byte_size": 16}
        answer = _infer_in(port, place, place | {"shared_memory_offset": 32})
        assert answer.status == 200
        (output,) = answer.json["outputs"]
        assert "data" not in output and output["parameters"] == place | {"shared_memory_offset": 32}
        assert np.frombuffer(path.read_bytes()[48:], np.float32).tolist() == (3 * x).ravel().tolist()
        # The same region over gRPC, and away for both.
        assert [one.name for one in server.call("SystemSharedMemoryStatus").regions.values()] == [name]
        server.call("SystemSharedMemoryUnregister", name=name)
        assert ask(port, b"GET /v2/systemsharedmemory/status HTTP/1.1\r\nHost: localhost\r\n\r\n").json == []
        assert _infer_in(port, place, {}).status == 400


@pytest.mark.parametrize(
    ("input_", "output", "status"),
    [
        ({"shared_memory_byte_size": 64}, {}, 400),  # more than the shape says
        ({"shared_memory_byte_size": 16, "shared_memory_offset": 60}, {}, 400),
        ({"shared_memory_byte_size": 16, "shared_memory_offset": -1}, {}, 400),
        ({"shared_memory_byte_size": -16}, {}, 400),
        ({"shared_memory_byte_size": 1 << 62}, {}, 413),
        ({}, {}, 400),
        ({"shared_memory_byte_size": 16}, {"shared_memory_region": "R", "shared_memory_byte_size": 8}, 400),
        ({"shared_memory_byte_size": 16}, {"shared_memory_region": "R"}, 400),
        ({"shared_memory_byte_size": 16}, {"shared_memory_region": "none", "shared_memory_byte_size": 16}, 400),
    ],
)
def test_lies_about_shared_memory_are_refused(
    tmp_path: Path, input_: dict[str, Any], output: dict[str, Any], status: int
) -> None:
    put(tmp_path / "a.onnx", line(3))
    with whole(tmp_path) as server, region(64) as (name, _):
        port = server.http.port
        assert _register(port, name, key=f"/{name}", byte_size=64) == 200
        if output.get("shared_memory_region") == "R":
            output = output | {"shared_memory_region": name}
        answer = _infer_in(port, input_ | {"shared_memory_region": name}, output)
        assert answer.status == status and list(answer.json) == ["error"]


def test_what_may_not_be_registered_over_http(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(3))
    with whole(tmp_path) as server, region(64) as (name, _):
        port = server.http.port
        for given, status in (
            ({"key": f"/{name}", "byte_size": 65}, 400),
            ({"key": f"/{name}", "byte_size": 0}, 400),
            ({"key": f"/{name}", "byte_size": "64"}, 400),
            ({"key": f"/{name}"}, 400),
            ({"byte_size": 64}, 400),
            ({"key": "/../etc/passwd", "byte_size": 64}, 403),
            ({"key": "/accelrt_nothing_here", "byte_size": 64}, 400),
        ):
            assert _register(port, "r", **given) == status, given
        assert not server.regions.status()


def test_only_clients_of_this_machine_reach_shared_memory(tmp_path: Path) -> None:
    from accelrt.serve.http.inference import Inference
    from accelrt.serve.settings import Limits

    for peer in ("127.0.0.1:5", "127.9.0.1:5", "::1:5", "::ffff:127.0.0.1:5"):
        assert is_local(peer)
    for peer in ("10.0.0.1:5", "2001:db8::1:5", "", "127.0.0.1", "1270.0.0.1:5", "::11:5", "::ffff:10.0.0.1:5"):
        assert not is_local(peer)

    put(tmp_path / "a.onnx", line(3))

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,))) as models:
            with region(64) as (name, _):
                regions = SharedMemoryRegistry()
                regions.register(name, f"/{name}", 0, 64)
                inference = Inference(models, Limits(), regions)
                place = {"shared_memory_region": name, "shared_memory_byte_size": 16}
                for input_, output in ((place, {}), ({}, place)):
                    tensor = {"name": "x", "shape": [2, 2], "datatype": "FP32", "parameters": input_}
                    tensor |= {} if input_ else {"data": [1, 2, 3, 4]}
                    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": output}]}).encode()
                    for peer, status in (("127.0.0.1:5", 200), ("10.0.0.1:5", 403), ("", 403)):
                        reply = inference.answer("a", "", {}, body, 0, peer)
                        reply = await reply if asyncio.iscoroutine(reply) else reply
                        assert reply.status == status, (peer, reply.body)  # type: ignore[union-attr]

    run(scenario())


def test_switched_off_it_is_not_advertised() -> None:
    from accelrt.serve.extensions import extensions

    assert "system_shared_memory" in extensions(shared_memory=True)
    assert "system_shared_memory" not in extensions(shared_memory=False)
    with pytest.raises(NotAllowed, match="switched off"):
        SharedMemoryRegistry(enabled=False).register("r", "/r", 0, 1)


# Loads that fail


JUNK = {"file:1/model.onnx": b"this is no model" * 10}


def test_an_upload_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", line(2))

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,), control="explicit", load_models=("a",))) as models:
            with pytest.raises(RequestError) as caught:
                await models.load("junk", JUNK)
            assert "cannot be loaded: 1/model.onnx is" in caught.value.message, "without the server's folder"
            assert [entry.name for entry in models.index()] == ["a"]
            assert models.ready()
            for parameters in (JUNK, {"file:7/model.onnx": JUNK["file:1/model.onnx"]}, {"config": '{"input": [{}]}'}):
                with pytest.raises(RequestError):
                    await models.load("a", parameters)
                assert models.ready()
                (entry,) = models.index()
                assert (entry.version, entry.state) == ("1", "READY")
                found = await models.model("a")
                assert (await found.infer(InferRequest({"x": np.ones((1, 2), np.float32)}))).outputs["y"].tolist() == [
                    [2, 2]
                ]
            await models.unload("a")
            with pytest.raises(RequestError):
                await models.load("a", JUNK)
            assert models.ready() and models.index()[0].state == "UNAVAILABLE"
            await models.load("a", {})
            assert models.ready() and models.index()[0].state == "READY"

    run(scenario())


def test_a_model_of_the_repository_that_fails_says_why_and_nothing_else_changes(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", line(2))
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "model.onnx").write_bytes(b"nothing")

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,), control="explicit", load_models=("a",))) as models:
            with pytest.raises(RequestError):
                await models.load("bad", {})
            states = {entry.name: entry for entry in models.index()}
            assert states["bad"].state == "UNAVAILABLE" and "model.onnx" in states["bad"].reason
            assert str(tmp_path) not in states["bad"].reason
            assert models.ready(), "nobody needs it"
            # A new version that cannot be loaded: the old one goes on, and the server is ready.
            (tmp_path / "a" / "2").mkdir()
            (tmp_path / "a" / "2" / "model.onnx").write_bytes(b"nothing")
            with pytest.raises(RequestError):
                await models.load("a", {})
            assert models.ready() and (await models.model("a")).version == "1"
            put(tmp_path / "a" / "2" / "model.onnx", line(5))
            await models.load("a", {})
            assert (await models.model("a")).version == "2"

    run(scenario())


# What a configuration allows


def test_a_configuration_bounds_rows_and_sizes_both_ways(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", line(2))
    config = 'max_batch_size: 4 input [{name: "x" data_type: TYPE_FP32 dims: [2]}] dynamic_batching {}'
    (tmp_path / "a" / "config.pbtxt").write_text(config)

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,), direct_us=1e9)) as models:
            model = await models.model("a")
            four, five = (InferRequest({"x": np.ones((rows, 2), np.float32)}) for rows in (4, 5))
            await model.infer(four)  # sizes up to this are known to be fast from here on
            assert model.infer_now(four) is not None
            with pytest.raises(Exception, match="max_batch_size is 4"):
                await model.infer(five)
            with pytest.raises(Exception, match="max_batch_size is 4"):
                model.infer_now(InferRequest({"x": np.ones((5, 1), np.float32)[:, :0].repeat(2, 1)}))
            # Rows of several requests are put together up to the limit, and no request is refused for the others.
            answers = await asyncio.gather(*(model.infer(four) for _ in range(8)))
            assert all(answer.outputs["y"].tolist() == [[2, 2]] * 4 for answer in answers)

    run(scenario())


def test_without_a_configuration_any_number_of_rows_is_taken(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", line(2))
    (tmp_path / "a" / "accelrt.json").write_text('{"max_batch_size": 4}')

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,))) as models:
            answer = await (await models.model("a")).infer(InferRequest({"x": np.ones((50, 2), np.float32)}))
            assert answer.outputs["y"].shape == (50, 2)

    run(scenario())


# The end, and the server's defaults


def test_draining_gives_up_a_model_that_hangs(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1" / "model.onnx", line(2))

    async def scenario() -> None:
        models = ModelService(ServiceSettings((tmp_path,), drain_s=60.0))
        await models.start()
        held = await models.model("a")
        held.queue.close = lambda: time.sleep(3)  # type: ignore[attr-defined]
        start = time.monotonic()
        await models.drain(0.3)
        assert time.monotonic() - start < 2.5

    run(scenario())


def test_the_servers_defaults_reach_models_that_do_not_say(tmp_path: Path) -> None:
    import accelrt
    from accelrt.serve.models.settings import ModelSettings

    put(tmp_path / "a" / "1" / "model.onnx", line(2))
    put(tmp_path / "own" / "1" / "model.onnx", line(2))
    (tmp_path / "own" / "accelrt.json").write_text('{"max_batch_size": 3}')
    accelrt.compile(line(4)).save(tmp_path / "made.accel")
    defaults = ModelSettings(backend="cpu", precision="fp32", max_batch_size=7, max_queue_delay_us=50, max_queue=5)

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,), defaults=defaults)) as models:
            assert {entry.name: entry.state for entry in models.index()} == dict.fromkeys(("a", "own", "made"), "READY")
            for name, rows in (("a", 7), ("own", 3), ("made", 7)):
                config = (await models.model(name)).config
                assert config["max_batch_size"] == rows
                batching = config["dynamic_batching"]
                assert batching["max_queue_delay_microseconds"] == 50
                assert batching["default_queue_policy"]["max_queue_size"] == 5

    run(scenario())


def test_a_json_file_of_another_kind_is_nobodys_settings(tmp_path: Path) -> None:
    put(tmp_path / "a.onnx", line(2))
    (tmp_path / "a.json").write_text('{"accuracy": 0.98}')
    (tmp_path / "b.json").write_text("[")
    put(tmp_path / "b.onnx", line(2))
    (tmp_path / "b.accelrt.json").write_text('{"max_batch_size": 2}')

    async def scenario() -> None:
        async with ModelService(ServiceSettings((tmp_path,))) as models:
            assert models.ready()
            assert (await models.model("b")).config["max_batch_size"] == 2

    run(scenario())
