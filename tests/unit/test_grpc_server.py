"""The gRPC front end against real clients of the protocol, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import mmap
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
client_module = pytest.importorskip("tritonclient.grpc")

from tritonclient.grpc import aio as client_aio  # noqa: E402
from tritonclient.grpc import service_pb2  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

from accelrt.errors import BackendUnavailable, ModelNotFound, NotAllowed, OptionError, RequestError, ServingError  # noqa: E402
from accelrt.graph.types import numpy_dtype  # noqa: E402
from accelrt.protocol.datatypes import DTYPES  # noqa: E402
from accelrt.protocol.messages import METHODS, message  # noqa: E402
from accelrt.serve.grpc import GrpcSettings, start  # noqa: E402
from accelrt.serve.shared_memory import SharedMemoryRegistry  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins" / "serving"))
from small_service import SmallService, standard  # noqa: E402

SERVICE = "/inference.GRPCInferenceService/"


@contextlib.contextmanager
def served(service: Any, settings: GrpcSettings | None = None, **how: Any) -> Iterator[Any]:
    """Serve in an event loop of a thread of its own; yields the handle."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    handle = asyncio.run_coroutine_threadsafe(start(service, settings, **how), loop).result(30)
    handle.loop = loop
    try:
        yield handle
    finally:
        asyncio.run_coroutine_threadsafe(handle.stop(1), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture(scope="module")
def service() -> SmallService:
    return standard()


@pytest.fixture(scope="module")
def server(service: SmallService) -> Iterator[Any]:
    with served(service) as handle:
        yield handle


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with client_module.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


@pytest.fixture
def channel(server: Any) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as found:
        yield found


def tensor(name: str, array: Any, datatype: str) -> Any:
    found = client_module.InferInput(name, array.shape, datatype)
    return found.set_data_from_numpy(array)


def sample(datatype: str) -> Any:
    generator = np.random.default_rng(3)
    if datatype == "BYTES":
        return np.array([[b"", b"one", "zwei \u00e4".encode()], [b"\x00\xff", b"a" * 300, b"."]], object)
    if datatype == "BOOL":
        return generator.random((2, 3)) > 0.5
    dtype = numpy_dtype(DTYPES[datatype])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.array([[limits.min, 0, 1], [limits.max, 7, 5]], dtype)
    values = generator.standard_normal((2, 3))
    values[0, 0] = np.nan
    values[1, 1] = -np.inf
    return values.astype(dtype)


def call(channel: Any, method: str, request: Any, metadata: Any = None, timeout: float = 20) -> Any:
    known = METHODS[method]
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return channel.unary_unary(
        SERVICE + method, request_serializer=bytes, response_deserializer=known.response.FromString
    )(data, timeout=timeout, metadata=metadata)


def refused(channel: Any, method: str, request: Any, **how: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, request, **how)
    return caught.value


# What clients of the protocol see


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_travels_raw(client: Any, datatype: str) -> None:
    x = sample(datatype)
    name = f"echo-{DTYPES[datatype]}"
    result = client.infer(name, [tensor("x", x, datatype)], request_id="r1")
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r1", name, "1")
    assert response.outputs[0].datatype == datatype
    found = result.as_numpy("y")
    assert found.dtype == x.dtype
    assert found.tolist() == x.tolist() if datatype == "BYTES" else found.tobytes() == x.tobytes()


@pytest.mark.parametrize("datatype", sorted(set(DTYPES) - {"FP16", "BF16"}))
def test_typed_contents_are_answered_typed(channel: Any, datatype: str) -> None:
    x = sample(datatype)
    request = service_pb2.ModelInferRequest(model_name=f"echo-{DTYPES[datatype]}")
    one = request.inputs.add(name="x", datatype=datatype, shape=x.shape)
    field = {"I": "int_contents", "U": "uint_contents"}.get(datatype[0]) or {
        "BOOL": "bool_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents"
    }[datatype]  # fmt: skip
    if datatype in ("INT64", "UINT64"):
        field = f"{datatype.lower()}_contents"
    getattr(one.contents, field).extend(x.reshape(-1).tolist())
    reply = call(channel, "ModelInfer", request)
    assert not reply.raw_output_contents
    found = np.array(getattr(reply.outputs[0].contents, field), x.dtype).reshape(list(reply.outputs[0].shape))
    np.testing.assert_array_equal(found, x)


def test_typed_half_precision_is_refused(channel: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="echo-float16")
    one = request.inputs.add(name="x", datatype="FP16", shape=[1, 1])
    one.contents.fp32_contents.append(1)
    error = refused(channel, "ModelInfer", request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "raw" in error.details()


def test_several_tensors_and_outputs_by_name(client: Any) -> None:
    inputs = [tensor("b", np.arange(3), "INT64"), tensor("a", np.float32([1, 2]), "FP32")]
    wanted = [client_module.InferRequestedOutput("same"), client_module.InferRequestedOutput("twice")]
    result = client.infer("double-first", inputs, outputs=wanted)
    assert [one.name for one in result.get_response().outputs] == ["same", "twice"]
    np.testing.assert_array_equal(result.as_numpy("twice"), [2, 4])
    np.testing.assert_array_equal(result.as_numpy("same"), [0, 1, 2])
    only = client.infer("double-first", inputs, outputs=wanted[1:])
    assert [one.name for one in only.get_response().outputs] == ["twice"]


def test_priority_timeout_and_parameters_reach_the_model(client: Any, service: SmallService) -> None:
    client.infer(
        "echo-float32",
        [tensor("x", np.zeros((1, 1), np.float32), "FP32")],
        priority=3,
        timeout=1_500_000,
        request_id="p",
        parameters={"colour": "red", "count": -7, "on": True, "share": 0.25},
    )
    seen = service.models["echo-float32"].seen[-1]
    assert (seen.priority, seen.timeout_us, seen.id, seen.outputs) == (3, 1_500_000, "p", None)
    assert seen.parameters == {"colour": "red", "count": -7, "on": True, "share": 0.25}
    assert 0 < time.monotonic_ns() - seen.arrived_ns < 60e9


def test_a_clients_deadline_bounds_the_wait_in_the_queue(client: Any, service: SmallService) -> None:
    x = [tensor("x", np.zeros((1, 1), np.float32), "FP32")]
    client.infer("echo-float32", x, client_timeout=5)
    assert 1_000_000 < service.models["echo-float32"].seen[-1].timeout_us < 5_500_000  # gRPC rounds


def test_server_and_models_describe_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo-int8")
    assert client.is_model_ready("echo-int8", "1")
    assert not client.is_model_ready("echo-int8", "2")
    assert not client.is_model_ready("nobody")
    told = client.get_server_metadata()
    assert told.name == "accelrt"
    assert "system_shared_memory" in told.extensions
    model = client.get_model_metadata("double-first", as_json=True)
    assert model["inputs"] == [
        {"name": "a", "datatype": "FP32", "shape": ["-1"]},
        {"name": "b", "datatype": "INT64", "shape": ["-1"]},
    ]
    assert model["platform"] == "accelrt_cpu/onnxruntime"
    config = client.get_model_config("echo-string").config
    assert config.input[0].data_type == 13  # TYPE_STRING
    assert config.parameters["origin"].string_value == "small"
    statistics = client.get_inference_statistics("echo-int8").model_stats[0]
    assert statistics.last_inference == 1234
    assert statistics.inference_stats.compute_infer.count == statistics.inference_count
    assert statistics.batch_stats[0].compute_infer.ns == 7
    assert {one.name for one in client.get_model_repository_index().models} >= {"slow", "echo-bool"}


def test_models_are_loaded_from_files_in_the_request_and_unloaded(client: Any, service: SmallService) -> None:
    from accelrt.testing.models import mlp

    client.load_model("mlp", config="{}", files={"file:1/model.onnx": mlp().SerializeToString()})
    assert client.is_model_ready("mlp")
    shape = [dim if isinstance(dim, int) else 2 for dim in service.models["mlp"].signature.inputs[0].type.shape]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    answer = client.infer("mlp", [tensor(service.models["mlp"].signature.input_names[0], x, "FP32")])
    assert answer.get_response().outputs[0].shape[0] == 2
    client.unload_model("mlp")
    assert not client.is_model_ready("mlp")
    with pytest.raises(InferenceServerException, match="not in the repository"):
        client.load_model("mlp")


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ("nobody", "NOT_FOUND", "no model 'nobody'"),
        ("failing", "INTERNAL", "ZeroDivisionError"),
        ("full", "UNAVAILABLE", "8 requests wait"),
        ("double-first", "INVALID_ARGUMENT", "missing"),
    ],
)
def test_errors_have_tritons_status_codes(client: Any, model: str, code: str, said: str) -> None:
    with pytest.raises(InferenceServerException, match=said) as caught:
        client.infer(model, [tensor("x", np.float32([1]), "FP32")])
    assert caught.value.status() == f"StatusCode.{code}"
    assert "secret" not in caught.value.message()


def test_an_error_names_its_class_and_when_to_come_back(channel: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="full")
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    request.raw_input_contents.append(bytes(4))
    trailing = dict(refused(channel, "ModelInfer", request).trailing_metadata())
    assert trailing["accelrt-error"] == "Overloaded"
    assert trailing["retry-after-ms"] == "250"


def test_what_is_not_offered_is_unimplemented(client: Any) -> None:
    for ask in (client.get_cuda_shared_memory_status, client.get_trace_settings, client.get_log_settings):
        with pytest.raises(InferenceServerException, match="by this server") as caught:
            ask()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_a_deadline_and_a_cancelled_call_reach_the_model(client: Any, service: SmallService) -> None:
    slow = service.models["slow"]
    x = [tensor("x", np.float32([1]), "FP32")]
    before = slow.cancelled
    with pytest.raises(InferenceServerException) as caught:
        client.infer("slow", x, client_timeout=0.1)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    done = threading.Event()
    under_way = client.async_infer("slow", x, lambda result, error: done.set())
    time.sleep(0.1)
    under_way.cancel()
    assert done.wait(5)
    deadline = time.monotonic() + 5
    while slow.cancelled < before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.cancelled == before + 2
    np.testing.assert_array_equal(client.infer("slow", x).as_numpy("y"), [2])


def test_many_callers_at_once_get_their_own_answers(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    for number in range(64):
        x = np.full((1, 50), number, np.float32)
        client.async_infer(
            "echo-float32",
            [tensor("x", x, "FP32")],
            lambda result, error: answers.put((result, error)),
            request_id=str(number),
        )
    seen = set()
    for _ in range(64):
        result, error = answers.get(timeout=30)
        assert error is None
        number = int(result.get_response().id)
        assert (result.as_numpy("y") == number).all()
        seen.add(number)
    assert seen == set(range(64))


def test_asyncio_clients(server: Any) -> None:
    async def talk() -> None:
        async with client_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            inputs = [client_aio.InferInput("x", [2, 3], "FP32").set_data_from_numpy(x)]
            results = await asyncio.gather(*(client.infer("echo-float32", inputs) for _ in range(16)))
            for result in results:
                np.testing.assert_array_equal(result.as_numpy("y"), x)

            async def requests() -> Any:
                for number in range(5):
                    yield {"model_name": "echo-float32", "inputs": inputs, "request_id": str(number)}

            seen = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                seen.append(result.get_response().id)
            assert seen == list("01234")

    asyncio.run(talk())


def test_a_stream_answers_in_order_and_outlives_an_error(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    x = [tensor("x", np.float32([5]), "FP32")]
    client.async_stream_infer("slow", x, request_id="first")
    client.async_stream_infer("nobody", x, request_id="second")
    client.async_stream_infer("slow", x, request_id="third", enable_empty_final_response=True)
    first, second, third = (answers.get(timeout=20) for _ in range(3))
    client.stop_stream()
    assert first[0].get_response().id == "first"
    np.testing.assert_array_equal(first[0].as_numpy("y"), [6])
    assert second[0] is None
    assert "no model 'nobody'" in second[1].message()
    assert third[0].get_response().parameters["triton_final_response"].bool_param is True


def test_an_error_in_a_stream_says_whose_it_is(channel: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="nobody", id="mine")
    stream = channel.stream_stream(
        SERVICE + "ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )(iter([request]))
    reply = next(stream)
    assert reply.infer_response.id == "mine"
    assert "nobody" in reply.error_message
    assert list(stream) == []


def test_a_stream_that_is_cut_leaves_nothing_running(client: Any, service: SmallService) -> None:
    slow = service.models["slow"]
    before = slow.cancelled
    client.start_stream(lambda result, error: None)
    for _ in range(4):
        client.async_stream_infer("slow", [tensor("x", np.float32([5]), "FP32")])
    time.sleep(0.2)
    client.stop_stream(cancel_requests=True)
    deadline = time.monotonic() + 5
    while slow.cancelled < before + 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.cancelled == before + 4


# Messages


def test_messages_are_those_of_the_public_protocol() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert [method.name for method in theirs.methods] == list(METHODS)
    names = list(service_pb2.DESCRIPTOR.message_types_by_name)
    from tritonclient.grpc import model_config_pb2

    for module in (service_pb2, model_config_pb2):
        for name, descriptor in module.DESCRIPTOR.message_types_by_name.items():
            _alike(descriptor, message(name).DESCRIPTOR)
    assert len(names) > 40
    assert message("ModelInferRequest") is not service_pb2.ModelInferRequest


def _alike(theirs: Any, ours: Any) -> None:
    def plain(descriptor: Any) -> Any:
        return {
            (
                field.name,
                field.number,
                field.type,
                field.is_repeated,
                field.message_type and field.message_type.full_name,
            )
            for field in descriptor.fields
        }

    assert plain(theirs) == plain(ours), theirs.full_name
    for nested in theirs.nested_types:
        _alike(nested, ours.nested_types_by_name[nested.name])


def test_compiled_messages_are_those_of_the_proto_files(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("needs grpcio-tools")
    from google.protobuf import descriptor_pb2

    import accelrt.protocol

    folder = Path(accelrt.protocol.__file__).parent
    out = tmp_path / "messages.binpb"
    # In a process of its own: the compiler has another release of gRPC's libraries inside than gRPC itself.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder.parents[1]}", "--include_imports"]
    command += [f"--descriptor_set_out={out}", f"{folder}/inference.proto"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found, kept = (
        descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (out, folder / "messages.binpb")
    )
    assert found == kept


# Hostile and mistaken requests


def infer_request(**fields: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name="echo-float32")
    one = request.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    for key, value in fields.items():
        if key == "raw":
            request.raw_input_contents.extend(value)
        elif key == "typed":
            one.contents.fp32_contents.extend(value)
        elif key == "shape":
            del one.shape[:]
            one.shape.extend(value)
        else:
            setattr(one, key, value)
    return request


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (infer_request(raw=[bytes(15)]), "takes 16 bytes; 15 came"),
        (infer_request(raw=[bytes(16), bytes(16)]), "more than it has inputs for"),
        (infer_request(raw=[bytes(16)], typed=[1.0]), "in one of the two ways"),
        (infer_request(typed=[1.0]), "takes 4 elements, and 1 came"),
        (infer_request(), "takes 4 elements, and 0 came"),
        (infer_request(raw=[bytes(16)], datatype="FP99"), "no datatype 'FP99'"),
        (infer_request(raw=[bytes(16)], shape=[-2, -2]), "with a negative size"),
        (infer_request(raw=[bytes(16)], shape=[1] * 65), "has 65 dimensions"),
        (infer_request(raw=[bytes(16)], shape=[1 << 62, 1 << 62]), "which no array can have"),
        (infer_request(raw=[bytes(16)], datatype="BYTES", shape=[2]), "8 bytes are left over"),
        (infer_request(raw=[b"\xff" * 16], datatype="BYTES"), "Element 0 of tensor"),
        (infer_request(raw=[bytes(16)], datatype="BYTES", shape=[1 << 40]), "the most is"),
        (infer_request(typed=[1.0] * 4, datatype="INT8"), "takes int_contents"),
    ],
)
def test_tensors_that_do_not_add_up_are_refused(channel: Any, request_: Any, said: str) -> None:
    error = refused(channel, "ModelInfer", request_)
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert said in error.details()


def test_two_inputs_of_one_name_are_refused(channel: Any) -> None:
    request = infer_request(raw=[bytes(16), bytes(16)])
    request.inputs.append(request.inputs[0])
    assert "two inputs 'x'" in refused(channel, "ModelInfer", request).details()


def test_classification_is_refused_and_not_ignored(client: Any) -> None:
    wanted = [client_module.InferRequestedOutput("y", class_count=3)]
    with pytest.raises(InferenceServerException, match="classification"):
        client.infer("echo-float32", [tensor("x", np.zeros((1, 1), np.float32), "FP32")], outputs=wanted)


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05ab", b"\x2a\x80\x80\x80", b"\x0a\x02\xff\xfe", b"\x0b", b"\x80" * 30]
)
def test_bytes_that_are_no_message_are_refused(channel: Any, data: bytes) -> None:
    error = refused(channel, "ModelInfer", data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "protobuf" in error.details()
    with pytest.raises(grpc.RpcError):
        call(channel, "ModelReady", b"\xff\xff")
    assert call(channel, "ServerLive", b"").live


def test_numbers_beyond_their_datatype_are_refused(channel: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="echo-int8")
    one = request.inputs.add(name="x", datatype="INT8", shape=[1, 1])
    one.contents.int_contents.append(200)
    assert "INT8 cannot hold" in refused(channel, "ModelInfer", request).details()


def test_a_message_that_is_too_long_is_refused_and_the_server_goes_on() -> None:
    with (
        served(standard(), GrpcSettings(max_message_bytes=1 << 20)) as handle,
        grpc.insecure_channel(f"127.0.0.1:{handle.port}") as channel,
    ):
        request = infer_request(raw=[bytes(2 << 20)])
        assert refused(channel, "ModelInfer", request).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(channel, "ServerLive", b"").live


def test_rubbish_on_the_socket_does_not_stop_the_server(server: Any, client: Any) -> None:
    import socket

    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(512)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(rubbish)
            connection.settimeout(2)
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass
    assert client.is_server_live()


# Shared memory


@pytest.fixture
def shm_file() -> Iterator[tuple[str, Path]]:
    name = f"accelrt_test_{uuid.uuid4().hex}"
    path = Path("/dev/shm") / name
    path.write_bytes(bytes(4096))
    try:
        yield f"/{name}", path
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("mode", [0o600, 0o666])  # mapped, and too open to be mapped
def test_tensors_in_shared_memory(client: Any, shm_file: tuple[str, Path], mode: int) -> None:
    key, path = shm_file
    path.chmod(mode)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        memory[256:288] = x.tobytes()
        client.register_system_shared_memory("region", key, 2048 + 1024, offset=128)
        status = client.get_system_shared_memory_status().regions["region"]
        assert (status.key, status.offset, status.byte_size) == (key, 128, 3072)
        given = client_module.InferInput("x", [2, 4], "FP32")
        given.set_shared_memory("region", 32, offset=128)
        wanted = client_module.InferRequestedOutput("y")
        wanted.set_shared_memory("region", 64, offset=1024)
        result = client.infer("echo-float32", [given], outputs=[wanted])
        output = result.get_output("y")
        assert output.parameters["shared_memory_byte_size"].int64_param == 32
        assert list(output.shape) == [2, 4]
        np.testing.assert_array_equal(np.frombuffer(memory[1152 : 1152 + 32], np.float32).reshape(2, 4), x)
        mixed = client.infer("echo-float32", [given])  # one side only
        np.testing.assert_array_equal(mixed.as_numpy("y"), x)
        wanted.set_shared_memory("region", 16, offset=0)
        with pytest.raises(InferenceServerException, match="does not fit"):
            client.infer("echo-float32", [given], outputs=[wanted])
        given.set_shared_memory("region", 32, offset=3070)
        with pytest.raises(InferenceServerException, match="not within region"):
            client.infer("echo-float32", [given])
    client.unregister_system_shared_memory("region")
    client.unregister_system_shared_memory()
    with pytest.raises(InferenceServerException, match="no shared memory region"):
        client.infer("echo-float32", [given])


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_a_region_that_is_cut_short_is_an_error_not_a_crash(client: Any, shm_file: tuple[str, Path], mode: int) -> None:
    key, path = shm_file
    path.chmod(mode)
    client.register_system_shared_memory("short", key, 4096)
    given = client_module.InferInput("x", [1, 1024], "FP32")
    given.set_shared_memory("short", 4096)
    os.truncate(path, 100)
    with pytest.raises(InferenceServerException, match="made shorter"):
        client.infer("echo-float32", [given])
    assert client.is_server_live()
    client.unregister_system_shared_memory("short")


@pytest.mark.parametrize(
    "key", ["../etc/passwd", "/../etc/passwd", "/a/b", "", "/", "..", "/.hidden", "/a\x00b", "/" + "a" * 300]
)
def test_keys_that_reach_elsewhere_are_refused(client: Any, key: str) -> None:
    with pytest.raises(InferenceServerException, match="cannot be registered"):
        client.register_system_shared_memory("bad", key, 16)
    assert not client.get_system_shared_memory_status().regions


def test_tensors_are_looked_at_where_they_lie_and_stay_when_the_region_goes(tmp_path: Path) -> None:
    registry = SharedMemoryRegistry(folder=tmp_path)
    (tmp_path / "f").write_bytes(bytes(range(200)) * 100)
    registry.register("r", "/f", 0, 20_000)
    array = np.frombuffer(registry.read("r", 5, 9_000), np.uint8)
    assert not array.flags.writeable
    with (tmp_path / "f").open("r+b") as file:
        file.seek(5)
        file.write(b"\xff")
    assert array[0] == 255
    registry.unregister("r")
    (tmp_path / "f").unlink()
    assert array[-1] == (5 + 8_999) % 200


def test_tensors_of_files_that_others_could_shorten_are_copied(tmp_path: Path) -> None:
    registry = SharedMemoryRegistry(folder=tmp_path)
    (tmp_path / "f").write_bytes(bytes(range(200)) * 100)
    (tmp_path / "f").chmod(0o666)
    registry.register("r", "/f", 0, 20_000)
    array = np.frombuffer(registry.read("r", 5, 9_000), np.uint8)
    (tmp_path / "f").write_bytes(b"")
    assert array[0] == 5 and array[-1] == (5 + 8_999) % 200


def test_links_folders_and_pipes_are_no_regions(tmp_path: Path) -> None:
    registry = SharedMemoryRegistry(folder=tmp_path, prefix="ok")
    (tmp_path / "real").write_bytes(bytes(10))
    (tmp_path / "ok_link").symlink_to(tmp_path / "real")
    (tmp_path / "ok_folder").mkdir()
    os.mkfifo(tmp_path / "ok_pipe")
    for name in ("ok_link", "ok_folder"):
        with pytest.raises(RequestError, match="cannot be opened"):
            registry.register("r", f"/{name}", 0, 1)
    with pytest.raises(NotAllowed, match="plain file"):
        registry.register("r", "/ok_pipe", 0, 1)
    with pytest.raises(NotAllowed, match="begins with ok"):
        registry.register("r", "/real", 0, 10)
    (tmp_path / "ok").write_bytes(bytes(10))
    with pytest.raises(RequestError, match="which has 10"):
        registry.register("r", "/ok", 1, 10)
    registry.register("r", "/ok", 0, 10)
    with pytest.raises(RequestError, match="already"):
        registry.register("r", "/ok", 0, 10)
    with pytest.raises(ModelNotFound):
        registry.status("other")
    with pytest.raises(NotAllowed, match="switched off"):
        SharedMemoryRegistry(enabled=False).register("r", "/ok", 0, 10)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    registry.unregister()
    assert len(list(Path("/proc/self/fd").iterdir())) < open_files


# Who may call


def test_api_keys() -> None:
    keys = ("a-key-of-sufficient-length", "another-key-of-this-length")
    with (
        served(standard(), GrpcSettings(api_keys=keys)) as handle,
        grpc.insecure_channel(f"127.0.0.1:{handle.port}") as channel,
    ):
        assert call(channel, "ServerLive", b"").live
        wrong = (("authorization", "Bearer wrong-key-of-some-length"),)
        for metadata in (None, wrong, (("x-api-key", ""),), (("authorization", keys[0] + "x"),)):
            error = refused(channel, "ServerMetadata", b"", metadata=metadata)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert refused(channel, "ModelInfer", infer_request(raw=[bytes(16)]), metadata=metadata)
        for metadata in ((("authorization", f"Bearer {keys[1]}"),), (("x-api-key", keys[0]),)):
            assert call(channel, "ServerMetadata", b"", metadata=metadata).name == "accelrt"
        with client_module.InferenceServerClient(f"127.0.0.1:{handle.port}") as client:
            errors: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: errors.put(error))
            with contextlib.suppress(InferenceServerException):  # the refusal may be quicker than the request
                client.async_stream_infer("echo-float32", [tensor("x", np.zeros((1, 1), np.float32), "FP32")])
            assert "UNAUTHENTICATED" in str(errors.get(timeout=10).status())
            client.stop_stream()


def make_certificates(folder: Path) -> None:
    """Write an authority and certificates that it signed for a server and a client, all as PEM."""
    import subprocess

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, cwd=folder, capture_output=True)

    new = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


def test_mutual_tls(certificates: Path) -> None:
    pem = {path.name: path.read_bytes() for path in certificates.iterdir()}
    settings = GrpcSettings(
        certificate=certificates / "server.pem",
        private_key=certificates / "server.key",
        client_ca=certificates / "ca.pem",
    )
    with served(standard(), settings) as handle:
        known = grpc.ssl_channel_credentials(pem["ca.pem"], pem["client.key"], pem["client.pem"])
        with grpc.secure_channel(f"localhost:{handle.port}", known) as channel:
            assert call(channel, "ServerLive", b"").live
        for stranger in (
            grpc.secure_channel(f"localhost:{handle.port}", grpc.ssl_channel_credentials(pem["ca.pem"])),
            grpc.insecure_channel(f"localhost:{handle.port}"),
        ):
            with stranger as channel:
                assert refused(channel, "ServerLive", b"", timeout=5).code() is grpc.StatusCode.UNAVAILABLE


def test_settings_that_cannot_be(tmp_path: Path, server: Any) -> None:
    for wrong in (
        {"certificate": tmp_path / "c"}, {"client_ca": tmp_path / "c"}, {"api_keys": ("short",)}, {"port": 70000},
        {"max_message_bytes": 1}, {"stream_window": 0}, {"keepalive_s": 0},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            GrpcSettings(**wrong)
    (tmp_path / "c").write_text("nothing")
    with pytest.raises(OptionError, match="no PEM"):
        asyncio.run(start(standard(), GrpcSettings(certificate=tmp_path / "c", private_key=tmp_path / "c")))
    with pytest.raises(OptionError, match="cannot be read"):
        asyncio.run(start(standard(), GrpcSettings(certificate=tmp_path / "d", private_key=tmp_path / "d")))
    with pytest.raises(ServingError, match="cannot listen"):
        asyncio.run(start(standard(), GrpcSettings(port=server.port)))


def test_missing_grpc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "accelrt.serve.grpc.server", raising=False)
    with pytest.raises(BackendUnavailable, match="pip install 'accelrt\\[serve\\]'"):
        asyncio.run(start(standard()))


def test_stopping_answers_what_is_under_way() -> None:
    service = standard()
    with served(service) as handle, client_module.InferenceServerClient(f"127.0.0.1:{handle.port}") as client:
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            "slow", [tensor("x", np.float32([1]), "FP32")], lambda result, error: answers.put((result, error))
        )
        while not service.models["slow"].seen:
            time.sleep(0.01)
        asyncio.run_coroutine_threadsafe(handle.stop(5), handle.loop).result(10)
        result, error = answers.get(timeout=5)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), [2])
        with pytest.raises(InferenceServerException):
            client.infer("slow", [tensor("x", np.float32([1]), "FP32")])


def test_health_as_load_balancers_ask_for_it(channel: Any) -> None:
    assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5) == b"\x08\x01"
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_more_calls_than_are_taken_are_refused_at_once() -> None:
    service = standard()
    with (
        served(service, GrpcSettings(max_calls=2)) as handle,
        client_module.InferenceServerClient(f"127.0.0.1:{handle.port}") as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()
        x = [tensor("x", np.float32([1]), "FP32")]
        for _ in range(6):
            client.async_infer("slow", x, lambda result, error: answers.put(error))
        codes = [error and error.status() for error in (answers.get(timeout=20) for _ in range(6))]
        assert codes.count(None) == 2
        assert codes.count("StatusCode.RESOURCE_EXHAUSTED") == 4


def test_a_stream_takes_no_more_than_its_window_at_a_time() -> None:
    service = standard(delay=0.1)
    with (
        served(service, GrpcSettings(stream_window=3)) as handle,
        client_module.InferenceServerClient(f"127.0.0.1:{handle.port}") as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(result))
        for number in range(10):
            client.async_stream_infer("slow", [tensor("x", np.float32([number]), "FP32")], request_id=str(number))
        first = answers.get(timeout=20)
        seen = len(service.models["slow"].seen)
        rest = [answers.get(timeout=20) for _ in range(9)]
        client.stop_stream()
        assert [one.get_response().id for one in (first, *rest)] == [str(number) for number in range(10)]
        assert seen <= 6


def test_who_is_on_this_machine() -> None:
    from accelrt.serve.grpc.access import is_local
    from accelrt.serve.grpc.control import local_regions

    for peer in ("ipv4:127.0.0.1:5", "ipv4:127.8.0.1:5", "ipv6:[::1]:5", "ipv6:%5B::1%5D:5", "unix:/run/s"):
        assert is_local(peer)
    registry = SharedMemoryRegistry()
    for peer in ("ipv4:10.0.0.1:5", "ipv6:[2001:db8::1]:5", "ipv4:1270.0.0.1:5", "", "ipv6:[::11]:5"):
        assert not is_local(peer)
        with pytest.raises(NotAllowed, match="own machine"):
            local_regions(registry, peer)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ModelStreamInfer"}))
def test_bytes_that_are_no_message_are_the_clients_mistake(channel: Any, name: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(METHODS[name].path)(b"\x0a\xff\xff\xff\xff\x0f", timeout=10)
    assert refused.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
    assert refused.value.details()


def test_a_stream_takes_no_more_than_so_many_bytes_at_a_time() -> None:
    service = standard(delay=0.2)
    with (
        served(service) as handle,
        client_module.InferenceServerClient(f"127.0.0.1:{handle.port}") as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(result))
        for number in range(10):  # 3 MiB each, of which two fit under 8 MiB; the count alone would let all of them in
            x = np.full(3 << 18, number, np.float32)
            client.async_stream_infer("slow", [tensor("x", x, "FP32")], request_id=str(number))
        first = answers.get(timeout=20)
        seen = len(service.models["slow"].seen)
        rest = [answers.get(timeout=20) for _ in range(9)]
        client.stop_stream()
        assert [one.get_response().id for one in (first, *rest)] == [str(number) for number in range(10)]
        assert seen <= 4
