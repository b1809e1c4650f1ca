"""Faults under load, counted: every request is answered once, right or with an error that says what happened.

The short forms run always; those marked `suite` are the same for longer. Each prints a row of counts.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")

from tests.hostile.faults import (
    CuttingProxy,
    Network,
    Server,
    Tally,
    Weather,
    in_process,
    may_mount,
    over_eia,
    over_grpc,
    over_http,
    put,
    small_disk,
    times_three,
    under_load,
    why_no_namespaces,
)
from tests.serve.serve_client import Raw, ask, post

import accelrt
from accelrt.registry import REGISTRY
from accelrt_eia import EiaBackend

pytestmark = pytest.mark.filterwarnings("ignore::accelrt.errors.AccelrtWarning")

LONG = pytest.param(30.0, marks=pytest.mark.suite, id="long")
SHORT = pytest.param(3.0, id="short")
INFER = "/v2/models/three/infer"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "root", "three")
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> EiaBackend:
    """A backend of the test's own, so that no connection and no health is remembered."""
    fresh = EiaBackend()
    original = type(REGISTRY).backend
    monkeypatch.setattr(type(REGISTRY), "backend", lambda self, name: fresh if name == "eia" else original(self, name))
    return fresh


@pytest.fixture
def report(record_property: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Print counts, and fail if they do not add up."""

    def check(*tallies: Tally) -> None:
        for tally in tallies:
            record_property("summary", tally.row())
            print(tally.row(), *tally.notes, sep="\n    ")
        for tally in tallies:
            assert tally.holds(), (tally.row(), tally.notes)

    return check


def session_on(port: int, monkeypatch: pytest.MonkeyPatch, fallback: Any, **options: Any) -> Any:
    monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", f"grpc://127.0.0.1:{port}")
    artifact = accelrt.compile(times_three(), "eia/remote", options={"timeout_s": 5.0, **options})
    return accelrt.load(artifact, fallback=fallback)


# The server dies


@pytest.mark.parametrize("fallback", ["warn", "error"])
@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_a_server_is_killed_and_started_again(
    root: Path, seconds: float, fallback: str, monkeypatch: pytest.MonkeyPatch, report: Any
) -> None:
    with Server(root, control_mode="explicit", load=["three"]) as server:
        tally = Tally(f"server killed, eia client, fallback={fallback}")
        plain, rpc = Tally("server killed, HTTP clients"), Tally("server killed, gRPC clients")
        with (
            session_on(server.grpc, monkeypatch, fallback) as session,
            under_load(tally, over_eia(session), 8),
            under_load(plain, over_http(server.http), 2),
            under_load(rpc, over_grpc(server.grpc), 2),
        ):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(random.Random(server.starts).uniform(0.5, 1.0))
                server.kill()
                time.sleep(0.3)
                server.start()
            before = tally.right
            _settle(lambda: tally.right > before)
            # It is found again, after a pause of at most 5 s; meanwhile the CPU may answer.
            _settle(lambda: any(one.name.startswith("accelrt-") for one in _index(server.http)))
        found = {one.name for one in _index(server.http) if one.name.startswith("accelrt-")}
    assert found, "after the last start the client has put its model there again"
    report(tally, plain, rpc)
    if fallback == "warn":
        assert not tally.typed, "what the server cannot do the CPU does"
    assert set(tally.typed) <= {"DeviceError", "DeviceLost", "CoresUnavailable", "RequestTimeout", "ModelUnavailable"}


def _index(port: int) -> list[Any]:
    from types import SimpleNamespace

    rows = ask(port, post("/v2/repository/index", b"{}")).json
    return [SimpleNamespace(**row) for row in rows]


# Connections are cut


@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_connections_are_cut_in_requests_and_in_replies(
    root: Path, seconds: float, monkeypatch: pytest.MonkeyPatch, report: Any
) -> None:
    with Server(root, control_mode="explicit", load=["three"]) as server:
        http, grpc, eia = (
            CuttingProxy(port, seed) for seed, port in enumerate((server.http, server.grpc, server.grpc))
        )
        eia.cutting = False
        plain = Tally("connections cut, HTTP clients")
        rpc, remote = Tally("connections cut, gRPC clients"), Tally("connections cut, eia client")
        with session_on(eia.port, monkeypatch, "warn", local_socket=False) as session:  # which the proxy cannot cut
            eia.cutting = True
            with (
                under_load(plain, over_http(http.port), 4),
                under_load(rpc, over_grpc(grpc.port), 2),
                under_load(remote, over_eia(session), 8),
            ):
                time.sleep(seconds)
        straight = Tally("the same server beside them, afterwards")
        with under_load(straight, over_http(server.http), 2):
            time.sleep(0.5)
        for proxy in (http, grpc, eia):
            proxy.close()
        assert http.cuts["request"] and http.cuts["reply"] and grpc.cuts and eia.cuts
        assert not server.errors
    plain.name += f" ({http.cuts['request']} in requests, {http.cuts['reply']} in replies)"
    plain.told, plain.cut = plain.told + plain.cut, 0  # cut by the proxy: the client was told in the middle of a reply
    report(plain, rpc, remote, straight)
    assert not remote.typed and not straight.typed and not straight.told


# The network is bad


NO_NAMESPACES = why_no_namespaces()
namespaces = pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES or "-")


def _finish(client: subprocess.Popen[str], name: str) -> Tally:
    out, _ = client.communicate(timeout=120)
    return Tally.from_json(name, out.splitlines()[-1])


@namespaces
@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_packets_are_delayed_dropped_doubled_and_turned_round(root: Path, seconds: float, report: Any) -> None:
    with Network() as net:
        own = {"host": net.server_address, "insecure": True, "control_mode": "explicit", "load": ["three"]}
        with Server(root, namespace=net.server, **own) as server:
            net.weather = Weather(delay_s=0.01, jitter_s=0.005, loss=0.03, doubled=0.03, turned_round=0.2)
            clients = {
                kind: in_process(net.client, kind, f"{net.server_address}:{port}", seconds, threads, name=kind)
                for kind, port, threads in (("http", server.http, 4), ("grpc", server.grpc, 2), ("eia", server.grpc, 8))
            }
            tallies = [_finish(made, f"packets delayed and dropped, {kind}") for kind, made in clients.items()]
            assert not server.errors
        tallies[0].name += f" ({net.carried} packets carried, {net.lost} lost, {net.doubled} doubled)"
        assert net.lost > 10 and net.doubled > 10
    report(*tallies)
    assert not any(tally.told for tally in tallies)
    assert not tallies[2].typed


@namespaces
@pytest.mark.parametrize("fallback", ["warn", "error"])
def test_the_server_vanishes_without_a_word_and_comes_back(root: Path, fallback: str, report: Any) -> None:
    with Network() as net:
        own = {"host": net.server_address, "insecure": True, "control_mode": "explicit"}
        with Server(root, namespace=net.server, **own) as server:
            environment = {"FAULTS_TIMEOUT_S": "1.5", "FAULTS_FALLBACK": fallback}
            address = f"{net.server_address}:{server.grpc}"
            client = in_process(net.client, "eia", address, 8.0, 8, name="eia", **environment)
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            time.sleep(1.0)
            net.unplug()
            time.sleep(3.0)
            net.weather = Weather()
            tally = _finish(client, f"server unplugged for 3 s, eia client, fallback={fallback}")
    report(tally)
    assert tally.slowest_s < 4.0 + tally.stopped_s, "a call takes no longer than its time"
    if fallback == "warn":
        assert not tally.typed


@namespaces
def test_clients_that_vanish_are_forgotten(root: Path, report: Any) -> None:
    """Half-open connections: before a request, in its headers, in its body, and before its answer was read."""
    put(root, "wide", times_three(65536))
    limits = {"header_s": 1.0, "body_s": 1.0, "idle_s": 2.0, "write_s": 1.0}
    wide = json.dumps({"inputs": [{"name": "x", "shape": [8, 65536], "datatype": "FP32", "data": [1.5] * 8 * 65536}]})
    (root.parent / "wide.json").write_text(wide)
    code = f"""
import socket, sys, time
address = (sys.argv[1], int(sys.argv[2]))
body = open({str(root.parent / "wide.json")!r}, "rb").read()
infer = b"POST /v2/models/wide/infer HTTP/1.1\\r\\nHost: a\\r\\n"
whole = infer + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body
parts = [b"", infer, infer + b"Content-Length: 1000\\r\\n\\r\\n{{", whole]
ends = []
for part in parts * 4:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(address)
    one.sendall(part)
    ends.append(one)
print("connected", flush=True)
time.sleep(60)
"""
    with (
        Network() as net,
        Server(
            root, namespace=net.server, host=net.server_address, insecure=True, limits=limits, grpc_port=None
        ) as server,
    ):
        here = psutil.Process(server.process.pid)
        idle = _connections(here)
        client = subprocess.Popen(
            ["ip", "netns", "exec", net.client, sys.executable, "-c", code, net.server_address, str(server.http)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdout is not None and client.stdout.readline() == "connected\n"
        time.sleep(0.3)
        held = _connections(here)
        net.unplug()
        client.kill()
        client.wait()
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and _connections(here) > idle:
            time.sleep(0.2)
        left = _connections(here)
        net.weather = Weather()
        beside = in_process(net.client, "http", f"{net.server_address}:{server.http}", 1.0, 2, name="http")
        tally = _finish(beside, f"{held - idle} half-open connections, others afterwards")
        assert not server.errors
    assert held - idle == 16 and left == idle, (idle, held, left)
    report(tally)
    assert not tally.typed and not tally.told


def _connections(process: psutil.Process) -> int:
    """Sockets that a process holds, half-open ones too; not by the network's table, which is that of a namespace."""
    folder = Path(f"/proc/{process.pid}/fd")
    count = 0
    for one in folder.iterdir():
        try:
            count += one.readlink().name.startswith("socket:")
        except OSError:
            continue
    return count


# Slow ones


@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_slow_readers_and_writers_hold_up_nobody(root: Path, seconds: float, report: Any) -> None:
    put(root, "wide", times_three(65536))
    limits = {"header_s": 1.0, "body_s": 1.0, "write_s": 1.0}
    with Server(root, limits=limits) as server:
        stop = threading.Event()
        ended: list[str] = []
        threads = [
            threading.Thread(target=slow, args=(server, stop, ended), daemon=True)
            for slow in (_slow_headers, _slow_body, _slow_reader, _slow_stream)
            for _ in range(4)
        ]
        before = server.rss
        for thread in threads:
            thread.start()
        http, grpc = Tally("beside slow readers and writers, HTTP"), Tally("beside slow readers and writers, gRPC")
        with under_load(http, over_http(server.http), 2), under_load(grpc, over_grpc(server.grpc), 2):
            time.sleep(seconds)
        grown = server.rss - before
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not server.errors
    report(http, grpc)
    assert not http.typed and not http.told and not grpc.typed
    assert {"408 headers", "408 body", "cut reader"} <= set(ended), ended
    assert grown < 200 << 20, f"{grown >> 20} MiB"


def _slow_headers(server: Server, stop: threading.Event, ended: list[str]) -> None:
    with Raw(server.http) as raw:
        raw.socket.settimeout(0.05)
        for byte in b"POST /v2/models/three/infer HTTP/1.1\r\n" + b"X-A: 1\r\n" * 100:
            try:
                raw.send(bytes([byte]))
                if (answer := _peek(raw)) is not None:
                    ended.append(f"{answer} headers")
                    return
            except OSError:
                return


def _slow_body(server: Server, stop: threading.Event, ended: list[str]) -> None:
    with Raw(server.http) as raw:
        raw.send(post(INFER, b"", length=100_000))
        raw.socket.settimeout(0.05)
        while not stop.is_set():
            try:
                raw.send(b" ")
                if (answer := _peek(raw)) is not None:
                    ended.append(f"{answer} body")
                    return
            except OSError:
                return


def _peek(raw: Raw) -> int | None:
    try:
        got = raw.socket.recv(4096)
    except TimeoutError:
        return None
    return int(got[9:12]) if got else 0


def _slow_reader(server: Server, stop: threading.Event, ended: list[str]) -> None:
    """Ask for 2 MiB again and again, and read ten bytes a second."""
    head = json.dumps({
        "inputs": [{"name": "x", "shape": [8, 65536], "datatype": "FP32", "parameters": {"binary_data_size": 8 << 18}}],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    request = post("/v2/models/wide/infer", head + bytes(8 << 18), f"Inference-Header-Content-Length: {len(head)}")
    raw = Raw(server.http)
    raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        for _ in range(8):
            raw.send(request)
        while not stop.is_set():
            stop.wait(0.5)
            raw.send(b"")
            if not raw.socket.recv(5):
                break
            if psutil.Process(server.process.pid).status() == "zombie":
                return
    except OSError:
        ended.append("cut reader")
    finally:
        # What lies in the system's buffers is still delivered; how the connection ended shows behind it.
        try:
            raw.socket.settimeout(0.5)
            while raw.socket.recv(1 << 20):
                pass
        except TimeoutError:
            pass
        except OSError:
            ended.append("cut reader")
        raw.close()


def _slow_stream(server: Server, stop: threading.Event, ended: list[str]) -> None:
    """Send requests of a stream as fast as can be, and read no answer."""
    import grpc as grpcio

    from accelrt.protocol.wire import write_request

    request = write_request("wide", "", {"x": np.zeros((4, 65536), np.float32)})
    channel = grpcio.insecure_channel(
        f"127.0.0.1:{server.grpc}",
        [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)],
    )

    def requests() -> Iterator[bytes]:
        while not stop.is_set():
            yield request
            time.sleep(0.01)

    call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(requests())
    stop.wait()
    call.cancel()
    channel.close()


# The disk is full


@pytest.fixture
def mounts(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("file systems cannot be mounted here")


def _upload(port: int, name: str, data: bytes) -> Any:
    import base64

    parameters = {
        "config": json.dumps({"name": name, "backend": "onnxruntime", "max_batch_size": 0}),
        "file:1/model.onnx": base64.b64encode(data).decode(),
    }
    with Raw(port, 60.0) as raw:
        raw.send(post(f"/v2/repository/models/{name}/load", json.dumps({"parameters": parameters}).encode()))
        return raw.answer()


def _heavy() -> bytes:
    """A model of 8 MiB that computes 3 x."""
    from accelrt.testing.models import Builder

    net = Builder("heavy", 0)
    x = net.input("x", ("batch", 16))
    big = net.weight(np.random.default_rng(0).standard_normal((16, 1 << 17)).astype(np.float32))
    nothing = net.node("Mul", net.node("ReduceMax", big, keepdims=0), net.weight(np.zeros(1, np.float32)))
    three = net.node("Mul", x, net.weight(np.full(16, 3, np.float32)))
    net.output(net.node("Add", three, nothing, name="y"), ("batch", 16))
    return net.model().SerializeToString()


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("full", ["uploads", "cache", "both"])
def test_the_disk_is_full(root: Path, tmp_path: Path, full: str, report: Any) -> None:
    roomy = tmp_path / "roomy"
    roomy.mkdir()
    with small_disk(tmp_path / "small", 4096) as small:
        places = {
            "TMPDIR": small if full in ("uploads", "both") else roomy,
            "ACCELRT_CACHE_DIR": small if full in ("cache", "both") else roomy,
        }
        environment = {name: str(path) for name, path in places.items()}
        with Server(root, environment=environment, control_mode="explicit", load=["three"]) as server:
            tally = Tally(f"disk full ({full}), others meanwhile")
            with under_load(tally, over_http(server.http), 2):
                answers = [_upload(server.http, f"heavy{number}", _heavy()) for number in range(3)]
            left = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
            fits = _upload(server.http, "light", times_three().SerializeToString())
            light = Tally(f"disk full ({full}), a small model afterwards")
            with under_load(light, over_http(server.http, "light"), 1):
                time.sleep(0.3)
            if full == "cache":  # compiled beside it, and said so
                assert [answer.status for answer in answers] == [200] * 3
                heavy = Tally(f"disk full ({full}), the uploaded model")
                with under_load(heavy, over_http(server.http, "heavy0"), 1):
                    time.sleep(0.3)
                report(heavy)
            else:
                for answer in answers:
                    assert answer.status == 503, answer.body
                    assert "No space left" in answer.json["error"], answer.body
                    assert str(tmp_path) not in answer.json["error"]
                assert ask(server.http, post("/v2/models/heavy0/infer", b"{}")).status in (400, 404)
            assert fits.status == 200, fits.body
            assert not server.errors
    assert left < 1 << 20, f"{left} bytes of what failed are still there"
    report(tally, light)
    assert not tally.typed and not tally.told


# Workers die


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("seconds", [SHORT, LONG])
def test_a_worker_dies_or_hangs_with_requests_in_it(root: Path, seconds: float, how: str, report: Any) -> None:
    put(root, "apart", isolation="process", hang_timeout_s=3.0, max_batch_size=1)
    with Server(root) as server:
        here = psutil.Process(server.process.pid)
        apart, others = Tally(f"worker gets {how}"), Tally(f"worker gets {how}, another model")
        with (
            under_load(apart, over_http(server.http, "apart"), 4),
            under_load(apart, over_grpc(server.grpc, "apart"), 4),
            under_load(others, over_http(server.http), 2),
        ):
            until, hits = time.monotonic() + seconds, 0
            while time.monotonic() < until:
                before = apart.right
                _settle(lambda before=before: apart.right > before + 20)
                for worker in here.children():
                    worker.send_signal(getattr(signal, how))
                    hits += 1
            _settle(lambda: apart.right > before + 40)
        assert hits >= 1 and not server.errors
    apart.name += f" {hits} times"
    report(apart, others)
    assert set(apart.typed) <= {"503", "UNAVAILABLE"} and apart.typed
    assert not others.typed and not others.told


def _settle(condition: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not so after {seconds:g} s")


# The server is asked to end


@pytest.mark.parametrize("rounds", [pytest.param(2, id="short"), pytest.param(15, marks=pytest.mark.suite, id="long")])
def test_sigterm_under_load(root: Path, rounds: int, report: Any) -> None:
    put(root, "queued", max_batch_size=8, max_queue_delay_us=20_000)
    http, grpc = Tally(f"SIGTERM {rounds} times, HTTP"), Tally(f"SIGTERM {rounds} times, gRPC")
    with Server(root) as server:
        for number in range(rounds):
            if number:
                server.start()
            with (
                under_load(http, over_http(server.http, pause_s=0.0), 2),
                under_load(http, over_http(server.http, "queued", pause_s=0.0), 4),
                under_load(grpc, over_grpc(server.grpc, pause_s=0.0), 2),
                under_load(grpc, over_grpc(server.grpc, "queued", pause_s=0.0), 4),
            ):
                time.sleep(0.7)
                assert server.end() == 0
        assert not server.errors
    report(http, grpc)
    assert set(grpc.typed) <= {"UNAVAILABLE", "CANCELLED"} and set(http.typed) <= {"503"}


def test_sigterm_answers_what_was_pipelined(root: Path) -> None:
    put(root, "queued", max_queue_delay_us=300_000, max_batch_size=64, isolation="process")
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [2] * 16}]}).encode()
    with Server(root) as server, Raw(server.http) as raw:
        raw.send(post("/v2/models/queued/infer", body) * 3)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        first = raw.answer()
        assert first.status == 200 and first.json["outputs"][0]["data"] == [6.0] * 16
        # The connection ends with an answer that says so; what came behind it was not begun.
        rest = []
        while first.headers.get("connection") != "close":
            first = raw.answer()
            rest.append(first.status)
        assert all(status == 200 for status in rest) and raw.ends()
        assert server.process.wait(30) == 0
