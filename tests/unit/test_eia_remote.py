"""The engine eia/remote against servers in processes of their own: killed, cut off, hung and started anew."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("grpc")

import accelrt
from accelrt.backend import CompileJob
from accelrt.errors import (
    AccelrtError,
    CompileError,
    CoresUnavailable,
    DeviceError,
    DeviceLost,
    ExecutionError,
    IncompatibleProgram,
    ModelNotFound,
    NotAllowed,
    OptionError,
    OutOfDeviceMemory,
    Overloaded,
    RequestTimeout,
)
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.protocol.address import Address, is_address, parse_address
from accelrt.protocol.client import ClientSettings, Endpoint
from accelrt.registry import REGISTRY
from accelrt.testing.models import Builder, mlp, small_cnn
from accelrt_eia import EiaBackend
from accelrt_eia.accelerators import addresses
from accelrt_eia.remote import RemoteOptions

SERVER = Path(__file__).parents[1] / "stand_ins" / "serving" / "small_service.py"
INFER = "/inference.GRPCInferenceService/ModelInfer"


class Server:
    """A server in a process of its own, that can be killed and started again on the same port."""

    def __init__(self, *arguments: str) -> None:
        self.port, self._arguments = 0, arguments
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(self.port), *self._arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"


class Proxy:
    """A TCP proxy that can cut connections after so many bytes of the server's."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_after: int | None = None
        self.cuts = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._pairs.append((client, server))
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if from_server and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after <= 0:
                        self.cut_after = None
                        self.cuts += 1
                        sink.sendall(data[: len(data) // 2])
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for pair in self._pairs:
            for end in pair:
                end.close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    try:
        yield found
    finally:
        found.kill()


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[EiaBackend]:
    """A backend of the test's own, so that no connection and no health is remembered."""
    monkeypatch.delenv("ACCELRT_EIA_ACCELERATORS", raising=False)
    fresh = EiaBackend()
    monkeypatch.setattr(type(REGISTRY), "backend", _backend_with(fresh, type(REGISTRY).backend))
    yield fresh


def _backend_with(fresh: EiaBackend, original: Any) -> Any:
    return lambda registry, name: fresh if name == "eia" else original(registry, name)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def name(*urls: str) -> None:
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", ",".join(urls))

    return name


MODEL = small_cnn()


def draw(rows: int, seed: int = 0) -> dict[str, Any]:
    return {"image": np.random.default_rng(seed).standard_normal((rows, 3, 16, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def oracle() -> Iterator[Any]:
    with accelrt.load(MODEL, backend="cpu") as session:
        yield session


def endpoint_of(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(parse_address(server.url), ClientSettings(**settings))


def compiled(**options: Any) -> Any:
    return accelrt.compile(MODEL, "eia/remote", options=options, fallback="error")


# What is named


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("grpc://host", Address("host", 8001)),
        ("grpcs://a.b-c.example:443/", Address("a.b-c.example", 443, True)),
        ("grpc://[::1]:9000/resnet50", Address("[::1]", 9000, False, "resnet50")),
        ("grpc://10.0.0.1/some.model-2/17", Address("10.0.0.1", 8001, False, "some.model-2", "17")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert is_address(text)
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "grpc://",
        "grpc://host:0",
        "grpc://host:99999",
        "http://host",
        "grpc://a b",
        "grpc://h/m/v/x",
        "grpc://user@host",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(OptionError, match="no address"):
        parse_address(text)


def test_the_environment_names_accelerators(backend: EiaBackend, use: Any, server: Server) -> None:
    assert backend.devices() == ()
    use(server.url, "grpc://127.0.0.1:1")
    first, second = backend.devices()
    assert (first.name, first.properties["health"]) == ("eia:0", "ready")
    assert "accelrt" in first.description
    assert (second.name, second.description) == ("eia:1", "grpc://127.0.0.1:1, unreachable")
    assert "cannot be reached" in second.properties["health"]
    start = time.perf_counter()
    backend.devices()
    assert time.perf_counter() - start < 0.5  # it is remembered
    for wrong in ("nonsense", f"{server.url},{server.url}", f"{server.url}/model"):
        use(wrong)
        assert backend.devices() == ()
        status = backend.engines[0].status()
        assert not status.usable
        assert status.reason
    with pytest.raises(OptionError, match="names a model"):
        addresses({"ACCELRT_EIA_ACCELERATORS": "grpc://h/m"})


# Answers


def test_answers_are_right_and_a_second_client_uploads_nothing(server: Server, use: Any, oracle: Any) -> None:
    use(server.url)
    endpoint = endpoint_of(server)
    artifact = compiled()
    with accelrt.load(artifact, fallback="error") as session:
        for rows in (1, 5):
            np.testing.assert_allclose(
                session.predict(draw(rows))["scores"], oracle.predict(draw(rows))["scores"], rtol=1e-5, atol=1e-6
            )
        index = {one.name for one in endpoint.ask("RepositoryIndex", 5).models if one.name.startswith("accelrt-")}
        assert len(index) == 1
        (name,) = index
        calls = endpoint.ask("ModelStatistics", 5, name=name).model_stats[0].execution_count
        assert calls == 2
        with accelrt.load(artifact, fallback="error") as other:
            other.predict(draw(1))
        # Another upload would have begun its count anew.
        assert endpoint.ask("ModelStatistics", 5, name=name).model_stats[0].execution_count == calls + 1
    code = (
        "import sys, numpy as np, accelrt; from accelrt.testing.models import small_cnn;"
        "from accelrt_eia import EiaBackend; from accelrt.registry import REGISTRY;"
        "'eia' in REGISTRY.names() or accelrt.register(EiaBackend);"
        "s = accelrt.load(small_cnn(), backend='eia/remote', fallback='error');"
        "s.predict(np.zeros((1, 3, 16, 16), np.float32))"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert endpoint.ask("ModelStatistics", 5, name=name).model_stats[0].execution_count == calls + 2
    assert len([one for one in endpoint.ask("RepositoryIndex", 5).models if one.name.startswith("accelrt-")]) == 1


def test_one_upload_serves_threads_that_load_at_once(server: Server, use: Any) -> None:
    use(server.url)
    artifact = compiled()
    with ThreadPoolExecutor(4) as pool:
        sessions = list(pool.map(lambda _: accelrt.load(artifact, fallback="error"), range(4)))
    for session in sessions:
        session.predict(draw(1))
    (one,) = [one for one in endpoint_of(server).ask("RepositoryIndex", 5).models if one.name.startswith("accelrt-")]
    assert endpoint_of(server).ask("ModelStatistics", 5, name=one.name).model_stats[0].execution_count == 4
    for session in sessions:
        session.close()


def _identity(*types: tuple[str, str]) -> onnx.ModelProto:
    """Build a model that passes tensors through, each with an operator that does something."""
    net = Builder("pass")
    for name, dtype in types:
        x = net.input(name, ("n", "m"), dtype)
        net.output(net.node("Transpose", x, perm=[1, 0], name=f"{name}_out"), ("m", "n"), dtype)
    return net.model()


@pytest.mark.parametrize("share", [True, False])
def test_large_and_small_tensors_by_message_and_in_shared_memory(server: Server, use: Any, share: bool) -> None:
    use(server.url)
    proto = _identity(("big", "float32"), ("small", "int64"), ("half", "float16"), ("flags", "bool"))
    session = accelrt.load(proto, backend="eia/remote", options={"shared_memory": share}, fallback="error")
    generator = np.random.default_rng(0)
    executable = _executable(session)
    with session:
        for round_ in range(4):
            size = 100 + 60 * round_  # grows, so that the region has to
            inputs = {
                "big": generator.standard_normal((size, 301)).astype(np.float32),
                "small": generator.integers(-5, 5, (3, 4)),
                "half": generator.standard_normal((300, 200)).astype(np.float16),
                "flags": generator.random((2, 7)) > 0.5,
            }
            for _ in range(3):
                outputs = session.predict(inputs)
                for name, array in inputs.items():
                    np.testing.assert_array_equal(outputs[f"{name}_out"], array.T)
                    assert outputs[f"{name}_out"].flags.writeable
            regions = endpoint_of(server).ask("SystemSharedMemoryStatus", 5).regions
            assert len(regions) == (1 if share else 0), "one region at a time, and the old one is forgotten"
        assert (executable._caller._slots is not None) == share
        assert not list(Path("/dev/shm").glob(f"accelrt-{os.getpid()}-*"))
    assert not endpoint_of(server).ask("SystemSharedMemoryStatus", 5).regions


def _executable(session: Any) -> Any:
    (replica,) = session._replicas
    return replica._steps[0].executable


def test_many_threads_share_slots_and_keep_their_answers_apart(server: Server, use: Any) -> None:
    use(server.url)
    with accelrt.load(_identity(("x", "float32")), backend="eia/remote", fallback="error") as session:
        calls = [np.full((100, 150 + number), number, np.float32) for number in range(40)]
        with ThreadPoolExecutor(16) as pool:
            for number, outputs in enumerate(pool.map(session.predict, calls)):
                assert outputs["x_out"].shape == (150 + number, 100)
                assert (outputs["x_out"] == number).all()


def test_text_travels(server: Server, use: Any) -> None:
    use(server.url)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.STRING, [None]) for name in "xy")
    node = onnx.helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    graph = onnx.helper.make_graph([node], "text", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    with accelrt.load(model, backend="eia/remote", fallback="error") as session:
        found = session.predict(np.array(["a", "zwei \u00e4"], object))["y"]
    assert found.tolist() == ["a", "zwei \u00e4", "a", "zwei \u00e4"]


# What is refused


def test_what_a_server_cannot_promise_is_refused(tmp_path: Path, backend: EiaBackend) -> None:
    engine = backend.engines[0]
    onnx.save(MODEL, tmp_path / "m.onnx")
    odd = Signature((Port("x", TensorType("float8_e4m3fn", (1,))),), ())
    with pytest.raises(CompileError, match="float8_e4m3fn"):
        engine.compile(CompileJob(tmp_path / "m.onnx", odd, "fp32", RemoteOptions()), tmp_path)
    for wrong in ({"timeout_s": 0.0}, {"lost_after_s": -1.0}, {"load_timeout_s": -1.0}):
        with pytest.raises(OptionError):
            RemoteOptions(**wrong)


def test_a_precision_is_the_servers_to_confirm(server: Server, use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody to ask yet: the program says so.
    unasked = accelrt.compile(MODEL, "eia/remote", precision="fp16", fallback="error", cache=False)
    assert "must say that it computes in fp16" in unasked.placement.segments[0].remark
    # A server that takes the wish and says nothing of what it does is not believed.
    use(server.url)
    with pytest.raises(IncompatibleProgram, match="does not say what it computes in"):
        accelrt.load(unasked, fallback="error")
    asked = accelrt.compile(MODEL, "eia/remote", precision="fp16", fallback="error", cache=False)
    assert "does not say" in asked.placement.segments[0].remark
    # Nor one that would not even understand it, as Triton does not: it is not sent the program.
    monkeypatch.setattr("accelrt_eia.remote.PRECISION_EXTENSION", "of_another_server")
    before = len(endpoint_of(server).ask("RepositoryIndex", 5).models)
    with pytest.raises(IncompatibleProgram, match="cannot be told"):
        accelrt.load(accelrt.compile(mlp_of_its_own(), "eia/remote", precision="bf16", cache=False), fallback="error")
    assert len(endpoint_of(server).ask("RepositoryIndex", 5).models) == before


def mlp_of_its_own() -> onnx.ModelProto:
    """Return a model that no other test loads."""
    return mlp(features=11)


def test_servers_that_take_no_models_say_so(use: Any) -> None:
    import asyncio

    from accelrt.serve.grpc import GrpcSettings

    sys.path.insert(0, str(SERVER.parent))
    from small_service import standard

    from .test_grpc_server import served

    class Closed(type(standard())):  # type: ignore[misc]
        async def load(self, name: str, parameters: Any) -> None:
            await asyncio.sleep(0)
            raise NotAllowed("The control mode is 'none'.")

    with served(Closed()) as handle:
        use(f"grpc://127.0.0.1:{handle.port}")
        with pytest.raises(IncompatibleProgram, match="explicit model control"):
            accelrt.load(compiled(), fallback="error")
    with served(standard(), GrpcSettings(max_message_bytes=2048)) as handle:
        use(f"grpc://127.0.0.1:{handle.port}")
        with pytest.raises(OutOfDeviceMemory, match="longest message"):
            accelrt.load(compiled(), fallback="error")


def test_the_servers_errors_keep_their_classes(server: Server) -> None:
    from accelrt.protocol.wire import write_request

    endpoint = endpoint_of(server)
    x = {"x": np.float32([1])}
    for model, kind in (("nobody", ModelNotFound), ("full", Overloaded), ("failing", AccelrtError)):
        with pytest.raises(kind) as caught:
            endpoint.call(INFER, write_request(model, "", x), 10)
        assert not isinstance(caught.value, DeviceError)
        assert endpoint.failing_s() == 0
    with pytest.raises(Overloaded) as full:
        endpoint.call(INFER, write_request("full", "", x), 10)
    assert full.value.retry_after_s == 0.25
    endpoint.close()
    with pytest.raises(DeviceError, match="closed"):
        endpoint.call(INFER, b"", 1)


# Failures of the network


def test_nothing_listens(use: Any, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    use(f"grpc://127.0.0.1:{port}")
    artifact = compiled()
    start = time.perf_counter()
    with pytest.raises(CoresUnavailable, match="cannot take the program"):
        accelrt.load(artifact, fallback="error")
    assert time.perf_counter() - start < 10
    with accelrt.load(artifact) as session:
        assert "the CPU runs it" in caplog.text
        assert session.predict(draw(1))["scores"].shape == (1, 10)
        assert session.stats().fallbacks == 1


def test_a_server_that_accepts_and_says_nothing_costs_its_time_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = Endpoint(Address("127.0.0.1", mute.getsockname()[1]), ClientSettings(connect_timeout_s=0.5))
        start = time.perf_counter()
        with pytest.raises((DeviceError, RequestTimeout)):
            endpoint.ask("ServerLive", 3.0)
        assert time.perf_counter() - start < 4.5
        start = time.perf_counter()
        with pytest.raises(DeviceError, match="has not been reached"):
            endpoint.ask("ServerLive", 3.0)
        assert time.perf_counter() - start < 0.2, "others fail at once"


def test_a_connection_that_is_cut_in_a_reply_is_made_again_and_the_call_answered(server: Server, use: Any) -> None:
    proxy = Proxy(server.port)
    use(f"grpc://127.0.0.1:{proxy.port}")
    try:
        with accelrt.load(
            _identity(("x", "float32")),
            backend="eia/remote",
            options={"shared_memory": False, "local_socket": False},
            fallback="error",
        ) as session:
            for number in range(6):
                x = np.full((200, 300), number, np.float32)
                proxy.cut_after = 100_000
                assert (session.predict(x)["x_out"] == number).all()
            assert proxy.cuts == 6
            assert session.stats().errors == 0
            assert session.stats().fallbacks == 0
    finally:
        proxy.close()


def test_a_server_killed_and_started_again_under_load(server: Server, use: Any, oracle: Any) -> None:
    use(server.url)
    artifact = compiled()
    calls = [draw(1 + number % 3, number) for number in range(8)]
    expected = [oracle.predict(call)["scores"] for call in calls]
    answered = []
    stop = threading.Event()
    with accelrt.load(artifact) as session:
        session.predict(calls[0])

        def work(worker: int) -> None:
            number = worker
            while not stop.is_set():
                index = number % len(calls)
                start = time.perf_counter()
                found = session.predict(calls[index])["scores"]
                answered.append((index, found, time.perf_counter() - start))
                number += 1

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work, one) for one in range(4)]
            time.sleep(0.5)
            server.kill()
            time.sleep(0.7)
            server.start()
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:  # until it answers again, of itself
                before = session.stats()
                time.sleep(0.3)
                after = session.stats()
                if after.calls > before.calls + 10 and after.fallbacks == before.fallbacks:
                    break
            else:
                pytest.fail("the session did not go back to the server")
            stop.set()
            for worker in workers:
                worker.result(30)
        stats = session.stats()
    assert stats.fallbacks > 0, "the CPU answered meanwhile"
    assert stats.calls == len(answered) + 1, "each call was answered once"
    for index, found, _ in answered:
        np.testing.assert_allclose(found, expected[index], rtol=1e-5, atol=1e-6)
    assert stats.engines == ("eia/remote",)
    assert max(took for _, _, took in answered) < 15


def test_what_the_user_hears_when_the_server_goes(server: Server, use: Any, caplog: pytest.LogCaptureFixture) -> None:
    use(server.url)
    with accelrt.load(compiled(timeout_s=5.0)) as session:
        session.predict(draw(1))
        server.kill()
        for number in range(5):
            session.predict(draw(1, number))
        assert caplog.text.count("eia/remote failed and the CPU answered instead") == 1
        assert session.stats().fallbacks == 5
    with accelrt.load(compiled(), fallback="allow") as late:
        assert late.predict(draw(1))["scores"].shape == (1, 10)


def test_an_error_policy_raises(server: Server, use: Any) -> None:
    use(server.url)
    with accelrt.load(compiled(), fallback="error") as session:
        session.predict(draw(1))
        server.kill()
        with pytest.raises(ExecutionError, match="cannot be reached"):
            session.predict(draw(1))


def test_a_lost_endpoint_leaves_its_calls_to_the_other_replica(use: Any, oracle: Any) -> None:
    first, second = Server(), Server()
    try:
        use(first.url, second.url)
        with accelrt.load(compiled(lost_after_s=0.0), devices="0-1", replicas=2) as session:
            first.kill()
            for number in range(20):
                np.testing.assert_allclose(
                    session.predict(draw(2, number))["scores"],
                    oracle.predict(draw(2, number))["scores"],
                    rtol=1e-5,
                    atol=1e-6,
                )
            stats = session.stats()
            assert {one.devices: one.lost for one in stats.replicas} == {("eia:0",): True, ("eia:1",): False}
            assert stats.fallbacks == 0
            assert stats.moved == 1
    finally:
        first.kill()
        second.kill()


def test_lost_only_after_the_time_that_was_given(server: Server, use: Any) -> None:
    use(server.url)
    with accelrt.load(compiled(lost_after_s=0.4), fallback="allow") as session:
        executable = _executable(session)
        server.kill()
        with pytest.raises(DeviceError) as early:
            executable.run(draw(1))
        assert not isinstance(early.value, DeviceLost)
        time.sleep(0.6)
        with pytest.raises(DeviceLost, match="has not been reached"):
            executable.run(draw(1))


def test_a_hung_server_costs_a_call_its_timeout_and_the_next_ones_nothing(server: Server, use: Any) -> None:
    use(server.url)
    assert server.process is not None
    with accelrt.load(compiled(timeout_s=1.0), fallback="allow") as session:
        session.predict(draw(1))
        server.process.send_signal(signal.SIGSTOP)
        try:
            start = time.perf_counter()
            session.predict(draw(1))
            assert 0.9 < time.perf_counter() - start < 4
            executable, took = _executable(session), []
            for _ in range(20):
                start = time.perf_counter()
                with pytest.raises((DeviceError, RequestTimeout)):
                    executable.run(draw(1))
                took.append(time.perf_counter() - start)
            # Now and then one of them tries the server again, and waits for it; the others do not.
            assert max(took) < 4
            assert sorted(took)[9] < 0.1
        finally:
            server.process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + 20
        before = -1
        while before != session.stats().fallbacks and time.monotonic() < deadline:
            before = session.stats().fallbacks
            time.sleep(0.5)
            session.predict(draw(1))
        assert session.stats().fallbacks == before, "it is used again"


def test_a_model_that_was_unloaded_is_uploaded_again(server: Server, use: Any, oracle: Any) -> None:
    use(server.url)
    endpoint = endpoint_of(server)
    with accelrt.load(compiled(), fallback="error") as session:
        session.predict(draw(1))
        (name,) = [one.name for one in endpoint.ask("RepositoryIndex", 5).models if one.name.startswith("accelrt-")]
        endpoint.ask("RepositoryModelUnload", 5, model_name=name)
        np.testing.assert_allclose(
            session.predict(draw(1))["scores"], oracle.predict(draw(1))["scores"], rtol=1e-5, atol=1e-6
        )
        assert session.stats().fallbacks == 0


# Models that a server holds


def test_a_model_that_a_server_holds_is_a_source(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/double-first"
    with accelrt.load(url) as session:
        assert str(session.signature) == "(a: float32[?], b: int64[?]) -> (twice: float32[?], same: int64[?])"
        for size in (3, 40_000):
            a, b = np.arange(size, dtype=np.float32), np.arange(4)
            for _ in range(2):
                outputs = session.predict({"a": a, "b": b})
                np.testing.assert_array_equal(outputs["twice"], a * 2)
                np.testing.assert_array_equal(outputs["same"], b)
        assert session.stats().engines == ("eia/served",)
    artifact = accelrt.compile(f"{url}/1")
    assert url in artifact.explain()
    path = artifact.save(tmp_path / "there.accel")
    with pytest.raises(accelrt.errors.UntrustedProgram):
        accelrt.load(path)  # it would send what it is given to wherever the file says
    with accelrt.load(path, trust=True) as session:
        np.testing.assert_array_equal(session.predict({"a": np.float32([4]), "b": b})["twice"], [8])
        server.kill()
        with pytest.raises(ExecutionError, match="cannot be reached"):
            session.predict({"a": np.float32([4]), "b": b})
        server.start()
        time.sleep(0.5)
        np.testing.assert_array_equal(session.predict({"a": np.float32([4]), "b": b})["twice"], [8])


def test_what_is_no_served_model(server: Server) -> None:
    for url, said in (
        (f"{server.url}/nobody", "no model 'nobody'"),
        (server.url, "names no model"),
        (f"{server.url}/slow/9", "version 9"),
        ("grpc://127.0.0.1:1/model", "cannot be reached"),
    ):
        with pytest.raises(accelrt.errors.SourceError, match=said):
            accelrt.load(url)
    with pytest.raises(accelrt.errors.SourceError, match="no graph of it"):
        accelrt.compile(f"{server.url}/slow", "cpu")
    with pytest.raises(accelrt.errors.SourceError, match="names of its own"):
        accelrt.compile(f"{server.url}/slow", input_names=["z"])
    with pytest.raises(OptionError, match="no address"):
        accelrt.load("grpc://a b/c")
    with pytest.raises(accelrt.errors.SourceError, match="takes sources whole"):
        accelrt.compile(MODEL, "eia/served")


# Servers that are not what they say, and what they ask for


@contextlib.contextmanager
def impostor(answer: Any) -> Iterator[str]:
    """Serve every method with a function of (method, bytes, context)."""
    from concurrent import futures

    import grpc

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            method = details.method.rpartition("/")[2]
            return grpc.unary_unary_rpc_method_handler(lambda data, context: answer(method, data, context))

    pool = futures.ThreadPoolExecutor(4)
    found = grpc.server(pool)
    found.add_generic_rpc_handlers((Handler(),))
    port = found.add_insecure_port("127.0.0.1:0")
    found.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        found.stop(0).wait()
        pool.shutdown()


def test_unavailable_from_a_server_that_lives_is_about_the_model() -> None:
    import grpc

    def answer(method: str, data: bytes, context: Any) -> bytes:
        if method == "ServerLive":
            return b"\x08\x01"
        context.abort(grpc.StatusCode.UNAVAILABLE, "the model is not ready")
        return b""

    with impostor(answer) as url:
        endpoint = Endpoint(parse_address(url))
        with pytest.raises(accelrt.errors.ModelUnavailable, match="not ready"):
            endpoint.call(INFER, b"", 10)
        assert endpoint.failing_s() == 0


def _lies() -> dict[str, bytes]:
    from accelrt.protocol.messages import message
    from accelrt.protocol.wire import REGION, write_response

    right = np.zeros((1, 10), np.float32)
    short = message("ModelInferResponse")(model_name="m")
    short.outputs.add(name="scores", datatype="FP32", shape=[1, 10])
    short.raw_output_contents.append(bytes(39))
    return {
        "rubbish": b"\xff" * 50,
        "nothing": b"",
        "other names": b"".join(write_response("m", "1", {"other": right})),
        "another type": b"".join(write_response("m", "1", {"scores": right.astype(np.float64)})),
        "memory elsewhere": b"".join(
            write_response(
                "m", "1", {"scores": right}, placed={"scores": {REGION: "mine", "shared_memory_byte_size": 40}}
            )
        ),
        "too short": short.SerializeToString(),
    }


@pytest.mark.parametrize("lie", _lies())
def test_answers_that_are_none_are_errors(lie: str) -> None:
    from accelrt_eia.calls import Caller, Model

    signature = accelrt.compile(MODEL, "cpu").signature
    with impostor(lambda method, data, context: _lies()[lie]) as url:
        caller = Caller(Endpoint(parse_address(url)), Model("m", "", signature), share=True)
        with pytest.raises(ExecutionError, match="something else than the outputs"):
            caller.call(draw(1), 10)


def test_a_server_that_refuses_shared_memory_gets_messages(use: Any) -> None:
    from accelrt.serve.shared_memory import SharedMemoryRegistry

    sys.path.insert(0, str(SERVER.parent))
    from small_service import standard

    from .test_grpc_server import served

    with served(standard(), regions=SharedMemoryRegistry(enabled=False)) as handle:
        use(f"grpc://127.0.0.1:{handle.port}")
        with accelrt.load(_identity(("x", "float32")), backend="eia/remote", fallback="error") as session:
            x = np.ones((200, 300), np.float32)
            for _ in range(2):
                np.testing.assert_array_equal(session.predict(x)["x_out"], x.T)
            assert _executable(session)._caller._slots is None  # its metadata does not offer it


def test_regions_of_clients_that_died_are_forgotten(server: Server, use: Any) -> None:
    use(server.url)
    code = (
        "import os, numpy as np, accelrt; from accelrt_eia import EiaBackend; from accelrt.registry import REGISTRY;"
        "'eia' in REGISTRY.names() or accelrt.register(EiaBackend);"
        "s = accelrt.load(os.environ['URL'] + '/echo-float32', fallback='error');"
        "s.predict(np.zeros((300, 300), np.float32)); os._exit(0)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "URL": server.url}
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=120)
    with accelrt.load(f"{server.url}/echo-float32", fallback="error") as session:
        session.predict(np.zeros((300, 300), np.float32))
        regions = endpoint_of(server).ask("SystemSharedMemoryStatus", 5).regions
        assert [name.split("-")[1] for name in regions] == [str(os.getpid())]
    assert not list(Path("/dev/shm").glob("accelrt-*-*"))


def test_mutual_tls_and_a_key(use: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelrt.serve.grpc import GrpcSettings

    sys.path.insert(0, str(SERVER.parent))
    from small_service import standard

    from .test_grpc_server import make_certificates, served

    make_certificates(tmp_path)
    settings = GrpcSettings(
        certificate=tmp_path / "server.pem",
        private_key=tmp_path / "server.key",
        client_ca=tmp_path / "ca.pem",
        api_keys=("a-key-of-sufficient-length",),
    )
    x = np.ones((2, 3), np.float32)
    with served(standard(), settings) as handle:
        url = f"grpcs://localhost:{handle.port}/echo-float32"
        for name, file, message in (
            ("CA", "ca.pem", "cannot be reached"),
            ("CERTIFICATE", "client.pem", "cannot be reached"),
            ("KEY", "client.key", "go together"),
        ):
            with pytest.raises(AccelrtError, match=message):
                accelrt.load(url)
            monkeypatch.setenv(f"ACCELRT_EIA_{name}", str(tmp_path / file))
        with pytest.raises(accelrt.errors.SourceError, match="no API key"):
            accelrt.load(url)
        monkeypatch.setenv("ACCELRT_EIA_API_KEY", "a-key-of-sufficient-length")
        assert "sufficient" not in repr(ClientSettings.of_environment(os.environ))
        with accelrt.load(url) as session:
            np.testing.assert_array_equal(session.predict(x)["y"], x)
