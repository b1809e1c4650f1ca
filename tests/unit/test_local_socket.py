"""Inference over a Unix socket of a server on this machine: the same answers, and what happens when it is lost."""

from __future__ import annotations

import contextlib
import json
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
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("grpc")

from accelrt.errors import DeviceError, ModelNotFound, NotAllowed, Overloaded, RequestError, RequestTimeout
from accelrt.protocol import client as client_module
from accelrt.protocol import local_socket as local_socket_module
from accelrt.protocol.address import parse_address
from accelrt.protocol.client import INFER, ClientSettings, Endpoint
from accelrt.protocol.datatypes import from_raw
from accelrt.protocol.local_socket import HEAD, LocalSocket, abstract, advertised, socket_named
from accelrt.protocol.wire import read_response, write_request
from accelrt.serve.grpc import GrpcSettings

from .test_eia_remote import Server
from .test_grpc_server import make_certificates, served

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins" / "serving"))
from small_service import SmallService, standard

KEY = "a-key-of-sufficient-length"
GREETING = b"[]"


@pytest.fixture(scope="module")
def service() -> SmallService:
    return standard()


@pytest.fixture(scope="module")
def server(service: SmallService) -> Iterator[Any]:
    with served(service) as handle:
        yield handle


@pytest.fixture
def endpoint(server: Any) -> Iterator[Endpoint]:
    with contextlib.closing(endpoint_of(server.port)) as found:
        yield found


def endpoint_of(port: int, **how: Any) -> Endpoint:
    return Endpoint(parse_address(f"grpc://127.0.0.1:{port}"), **how)


def request_for(x: np.ndarray[Any, Any], model: str = "echo-float32") -> bytes:
    return write_request(model, "", {"x": x})


def output(reply: bytes | bytearray) -> np.ndarray[Any, Any]:
    wire = read_response(reply)
    return from_raw("y", wire.tensors[0].datatype, wire.tensors[0].shape, wire.raw[0])


def socket_of(endpoint: Endpoint) -> str:
    name = socket_named(endpoint.ask("ServerMetadata", 5).extensions)
    assert name is not None
    return name


def raw_connection(name: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(10)
    made.connect(abstract(name))
    return made


def frame(data: bytes, number: int = 0) -> bytes:
    return HEAD.pack(len(data), number) + data


def received(connection: socket.socket) -> tuple[int, bytes]:
    head = connection.recv(HEAD.size, socket.MSG_WAITALL)
    if not head:
        raise EOFError
    size, failed = HEAD.unpack(head)
    return failed, connection.recv(size, socket.MSG_WAITALL) if size else b""


def greeted(name: str) -> socket.socket:
    connection = raw_connection(name)
    connection.sendall(frame(GREETING))
    assert received(connection) == (0, b"")
    return connection


# The same answers


@pytest.mark.parametrize("rows", [0, 1, 7, 5000, 700_000])
def test_an_answer_is_the_one_that_grpc_gives(endpoint: Endpoint, rows: int) -> None:
    x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    data = request_for(x)
    reply = endpoint.infer(data, 20)
    assert endpoint._local is not None
    assert bytes(reply) == endpoint.call(INFER, data, 20) == endpoint.infer(data, 20, local_socket=False)
    np.testing.assert_array_equal(output(reply), x)


def test_calls_side_by_side_get_their_own_answers(endpoint: Endpoint) -> None:
    def ask(number: int) -> bool:
        x = np.full((1 + number % 50 * 100, 3), number, np.float32)
        return bool((output(endpoint.infer(request_for(x), 20)) == number).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))
    assert endpoint._local is not None
    assert 1 <= len(endpoint._local._idle) <= 8


def test_what_the_server_says_is_raised_as_grpc_raises_it(endpoint: Endpoint, service: SmallService) -> None:
    x = np.zeros((1, 1), np.float32)
    for data in (request_for(x, "none-such"), b"\xff" * 40, write_request("echo-float32", "", {"y": x})):
        errors = []
        for local_socket in (True, False):
            with pytest.raises((ModelNotFound, RequestError)) as told:
                endpoint.infer(data, 20, local_socket=local_socket)
            errors.append((type(told.value), told.value.message))
        assert errors[0] == errors[1]
    assert endpoint._local is not None  # an error of the server's is an answer, and the connection is used again
    np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 20)), x)


def test_when_to_ask_again_is_told(monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, service: SmallService) -> None:
    def full(name: str, version: str = "") -> Any:
        error = Overloaded("Its queue is full.")
        error.retry_after_s = 2.5
        raise error

    monkeypatch.setattr(service, "find", full)
    with pytest.raises(Overloaded) as told:
        endpoint.infer(request_for(np.zeros((1, 1), np.float32)), 20)
    assert told.value.retry_after_s == 2.5


# Servers that go


def test_a_server_that_was_started_anew_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LOOK_AGAIN_S", 0.05)
    x = np.ones((2, 2), np.float32)
    server = Server()
    try:
        with contextlib.closing(endpoint_of(server.port)) as endpoint:
            endpoint.infer(request_for(x), 20)
            first = endpoint._local
            assert first is not None
            server.kill()
            with pytest.raises(DeviceError):
                endpoint.infer(request_for(x), 5)
            assert endpoint._local is None
            server.start()
            until = time.monotonic() + 20
            while endpoint._local is None and time.monotonic() < until:
                with contextlib.suppress(DeviceError):
                    np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 5)), x)
                time.sleep(0.02)
            assert endpoint._local not in (None, first)
    finally:
        server.kill()


def test_calls_that_a_server_dies_under_fail() -> None:
    server = Server()
    x = np.ones((2,), np.float32)
    try:
        with contextlib.closing(endpoint_of(server.port)) as endpoint, ThreadPoolExecutor(6) as pool:
            endpoint.infer(request_for(x, "slow"), 20)
            calls = [pool.submit(endpoint.infer, request_for(x, "slow"), 5) for _ in range(6)]
            time.sleep(0.2)
            server.kill()
            for call in calls:
                with pytest.raises(DeviceError):
                    call.result(20)
    finally:
        server.kill()


def test_a_server_that_hangs_is_not_waited_for_longer_than_allowed() -> None:
    server = Server()
    x = np.ones((2, 2), np.float32)
    assert server.process is not None
    try:
        with contextlib.closing(endpoint_of(server.port)) as endpoint:
            endpoint.infer(request_for(x), 20)
            os.kill(server.process.pid, signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(RequestTimeout):
                endpoint.infer(request_for(x), 0.3)
            assert time.monotonic() - start < 5
            assert endpoint.failing_s() > 0  # others fail at once, and need not wait as long
            os.kill(server.process.pid, signal.SIGCONT)
    finally:
        server.kill()


def test_a_call_that_needs_a_connection_nobody_greets_goes_another_way(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.ones((2, 2), np.float32)
    endpoint.infer(request_for(x), 20)
    assert endpoint._local is not None
    endpoint._local.close()
    name = "accelrt-" + os.urandom(16).hex()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(abstract(name))
        silent.listen()
        endpoint._local._address = abstract(name)
        monkeypatch.setattr(local_socket_module, "_GREETING_S", 0.1)
        np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 20)), x)
    assert endpoint._local is None


def test_a_server_that_stops_answers_what_is_under_way_first() -> None:
    server = Server()
    x = np.ones((2,), np.float32)
    assert server.process is not None
    try:
        with contextlib.closing(endpoint_of(server.port)) as endpoint, ThreadPoolExecutor(2) as pool:
            endpoint.infer(request_for(x, "slow"), 20)
            idle = greeted(socket_of(endpoint))
            call = pool.submit(endpoint.infer, request_for(x, "slow"), 20)
            time.sleep(0.2)
            server.process.terminate()
            np.testing.assert_array_equal(output(call.result(20)), x + 1)
            assert idle.recv(1) == b""
            server.process.wait(20)
    finally:
        server.kill()


# Who may


def test_without_a_key_nobody_gets_in() -> None:
    with served(standard(), GrpcSettings(api_keys=(KEY,))) as handle:
        with contextlib.closing(endpoint_of(handle.port, settings=ClientSettings(api_key=KEY))) as endpoint:
            x = np.ones((2, 2), np.float32)
            np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 20)), x)
            assert endpoint._local is not None
            name = socket_of(endpoint)
        for metadata in ([], [["authorization", f"Bearer {KEY}x"]], [["x-api-key", ""]]):
            connection = raw_connection(name)
            connection.sendall(frame(json.dumps(metadata).encode()))
            failed, told = received(connection)
            assert failed == 1 and json.loads(told)["kind"] == "NotAllowed"
            with pytest.raises((EOFError, ConnectionResetError)):
                received(connection)
        with pytest.raises(NotAllowed):
            LocalSocket(name, ()).connect()


def test_there_is_none_with_tls_and_none_where_it_is_switched_off(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    tls = GrpcSettings(certificate=tmp_path / "server.pem", private_key=tmp_path / "server.key")
    with served(standard(), tls) as handle:
        address = parse_address(f"grpcs://localhost:{handle.port}")
        endpoint = Endpoint(address, ClientSettings(ca=tmp_path / "ca.pem"))
        assert socket_named(endpoint.ask("ServerMetadata", 5).extensions) is None
    with served(standard(), GrpcSettings(local_socket=False)) as handle:
        endpoint = endpoint_of(handle.port)
        x = np.ones((2, 2), np.float32)
        for _ in range(3):
            np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 20)), x)
        assert endpoint._local is None


@pytest.mark.parametrize(
    "name", ["", "accelrt-", "../etc/x", "accelrt-" + "g" * 32, "accelrt-" + "0" * 33, "accelrt-" + "0" * 31 + "\n"]
)
def test_only_names_of_our_own_form_are_connected_to(name: str) -> None:
    assert socket_named(["binary_tensor_data", advertised(name)]) is None
    good = "accelrt-" + "0f" * 16
    assert socket_named([advertised(name), advertised(good)]) == good


def test_a_name_that_nobody_listens_on_costs_nothing_but_a_look(
    monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint
) -> None:
    monkeypatch.setattr(client_module, "socket_named", lambda extensions: "accelrt-" + "0" * 32)
    asked: list[str] = []
    ask = endpoint.ask
    monkeypatch.setattr(endpoint, "ask", lambda method, *rest, **more: (asked.append(method), ask(method, *rest))[1])
    x = np.ones((2, 2), np.float32)
    for _ in range(5):
        np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 20)), x)
    assert asked == ["ServerMetadata"]


def test_a_child_process_has_connections_of_its_own(server: Any, endpoint: Endpoint) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from accelrt.protocol.local_socket import LocalSocket\n"
        "from accelrt.protocol.wire import write_request, read_response\n"
        "local = LocalSocket(sys.argv[1], ())\n"
        "def ask(number):\n"
        "    data = write_request('echo-float32', '', {'x': np.full((50, 2), number, np.float32)})\n"
        "    reply = read_response(local.call(data, 20))\n"
        "    assert (np.frombuffer(reply.raw[0], np.float32) == number).all()\n"
        "ask(0)\n"
        "children = []\n"
        "for number in range(1, 4):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        for _ in range(50): ask(number)\n"
        "        os._exit(0)\n"
        "    children.append(pid)\n"
        "for _ in range(50): ask(9)\n"
        "assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code, socket_of(endpoint)], check=True, env=environ, timeout=60)


# Hostile clients, and servers


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    greeting=st.sampled_from([GREETING, b"", b"{", b"[1]", b"[[1,2,3]]", b'{"a": 1}', b"\xff\xfe", b"[[]]", b"null"]),
    data=st.one_of(st.binary(max_size=300), st.just(b"\x0a\x0cecho-float32"), st.just(bytes(70_000))),
    cut=st.floats(0, 1),
    announced=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_whatever_comes_the_server_says_why_or_waits_and_goes_on(
    endpoint: Endpoint, greeting: bytes, data: bytes, cut: float, announced: int | None
) -> None:
    connection = raw_connection(socket_of(endpoint))
    connection.settimeout(2)
    with contextlib.closing(connection), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(frame(greeting))
        failed, told = received(connection)
        assert failed == (greeting != GREETING)
        if not failed:
            sent = HEAD.pack(len(data) if announced is None else announced, 0) + data
            sent = sent[: int(len(sent) * cut)] if cut < 0.9 else sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(EOFError):
                failed, told = received(connection)
        if failed:
            assert json.loads(told)["kind"] in ("RequestError", "RequestTooLarge", "ModelNotFound", "InputError")
    x = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 20)), x)


def test_calls_that_do_not_wait_for_each_other_are_refused_or_answered_in_order(endpoint: Endpoint) -> None:
    with contextlib.closing(greeted(socket_of(endpoint))) as connection:
        connection.sendall(2 * frame(request_for(np.ones((2, 2), np.float32))))
        failed, told = received(connection)
        assert failed == 1 and "wait for each other" in json.loads(told)["details"]
        with pytest.raises((EOFError, ConnectionResetError)):
            received(connection)


@pytest.mark.parametrize("model", ["echo-float32", "slow"])
def test_a_client_that_does_not_read_is_not_heard_and_others_are(endpoint: Endpoint, model: str) -> None:
    x = np.ones((300_000,), np.float32)
    data = frame(request_for(x if model == "echo-float32" else x[:100_000], model))
    with contextlib.closing(greeted(socket_of(endpoint))) as connection:
        connection.settimeout(1)
        sent = 0
        with pytest.raises((TimeoutError, BlockingIOError)):
            for _ in range(400):  # half a gigabyte, which nobody would keep
                connection.sendall(data)
                sent += 1
        assert sent < 20
        small = np.ones((2, 2), np.float32)
        np.testing.assert_array_equal(output(endpoint.infer(request_for(small), 20)), small)


def test_a_large_message_that_is_only_announced_costs_no_memory(server: Any, endpoint: Endpoint) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    name, before = socket_of(endpoint), resident()
    held = [greeted(name) for _ in range(8)]
    for connection in held:
        connection.sendall(HEAD.pack(250 << 20, 0) + b"abc")
    np.testing.assert_array_equal(output(endpoint.infer(request_for(np.ones((2, 2), np.float32)), 20)), 1)
    assert resident() - before < 100 << 20
    for connection in held:
        connection.close()


def test_more_connections_than_calls_that_may_be_are_refused() -> None:
    with served(standard(), GrpcSettings(max_calls=3)) as handle:
        with contextlib.closing(endpoint_of(handle.port)) as endpoint:
            name = socket_of(endpoint)
        held = [greeted(name) for _ in range(3)]
        with contextlib.closing(raw_connection(name)) as one:
            assert json.loads(received(one)[1])["kind"] == "Overloaded"
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\0" * 7,
        HEAD.pack(10, 0) + b"abc",
        HEAD.pack(2**60, 0),
        HEAD.pack(1, 0) + b"abc",
        HEAD.pack(3, 1) + b"abc",
    ],
)
def test_a_server_that_answers_anything_loses_no_call(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    name = "accelrt-" + os.urandom(16).hex()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(abstract(name))
    listener.listen()

    def lie() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.recv(1 << 16)
                connection.sendall(HEAD.pack(0, 0))
                connection.recv(1 << 16)
                connection.sendall(reply)
                connection.close()

    threading.Thread(target=lie, daemon=True).start()
    monkeypatch.setattr(client_module, "socket_named", lambda extensions: name)
    x = np.ones((2, 2), np.float32)
    try:
        if reply == HEAD.pack(3, 1) + b"abc":  # well formed, and says that it failed
            with pytest.raises(Exception, match="answered"):
                endpoint.infer(request_for(x), 5)
        else:
            np.testing.assert_array_equal(output(endpoint.infer(request_for(x), 5)), x)
            assert endpoint._local is None
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
