"""Clients that count what becomes of each request, servers that can be killed, a proxy that cuts, and bad networks.

As a script it is a client in a process of its own (``faults.py KIND ADDRESS SECONDS THREADS``), which a network namespace
needs; it prints its counts as JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tests.serve.serve_client import Raw, post

from accelrt.errors import AccelrtError, AccelrtWarning
from accelrt.testing.models import Builder

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("serve_process.py")
FACTOR = 3.0
WIDTH = 16
ANSWER_S = 30.0
"""Who has no answer and no error after so long counts as lost."""


def times_three(width: int = WIDTH) -> onnx.ModelProto:
    """y = 3 x: exact for whole numbers, wherever it is computed."""
    net = Builder("three", 0)
    x = net.input("x", ("batch", width))
    net.output(net.node("Mul", x, net.weight(np.full(width, FACTOR, np.float32)), name="y"), ("batch", width))
    return net.model()


def put(root: Path, name: str, model: onnx.ModelProto | None = None, **settings: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    onnx.save(model or times_three(), root / f"{name}.onnx")
    if settings:
        (root / f"{name}.accelrt.json").write_text(json.dumps(settings))


# Counting


@dataclass
class Tally:
    """What became of requests. Thread-safe.

    Attributes:
        typed: Errors that say what happened, by their class or status.
        told: Connections that ended before any byte of the answer: the client knows, and may ask again.
        cut: Answers that ended in the middle.
        lost: No answer and no error.
        doubled: A second answer to one request.
        wrong: An answer that belongs to another request, or is wrong.
        slowest_s: The longest that a request took.
        stopped_s: How long this process did not run at all, as happens on machines that are shared.
    """

    name: str
    sent: int = 0
    right: int = 0
    typed: Counter[str] = field(default_factory=Counter)
    told: int = 0
    cut: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    slowest_s: float = 0.0
    stopped_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def begin(self) -> int:
        """Return a number of its own for the next request, small enough to be exact in float32 after the model."""
        with self._lock:
            self.sent += 1
            return next(self._numbers) % 4_000_000

    def count(self, what: str, note: str = "", *, since: float | None = None) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)
            if since is not None:
                self.slowest_s = max(self.slowest_s, time.monotonic() - since)
            if note and len(self.notes) < 8:
                self.notes.append(note)

    def error(self, kind: str, since: float | None = None) -> None:
        with self._lock:
            self.typed[kind] += 1
            if since is not None:
                self.slowest_s = max(self.slowest_s, time.monotonic() - since)

    def judge(self, found: Any, number: int, since: float) -> None:
        right = np.asarray(found).size == WIDTH and bool((np.asarray(found) == FACTOR * number).all())
        self.count("right" if right else "wrong", "" if right else f"{number}: {found}", since=since)

    def holds(self) -> bool:
        """Every request was answered once: right, or with an error that says so."""
        answered = self.right + self.typed.total() + self.told + self.cut
        return not (self.lost or self.doubled or self.wrong or self.cut) and answered == self.sent and self.right > 0

    def row(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.typed.most_common()) or "0"
        return (
            f"{self.name:44} sent {self.sent:6}  right {self.right:6}  typed errors {kinds}  told by the transport "
            f"{self.told}  cut {self.cut}  lost {self.lost}  doubled {self.doubled}  wrong {self.wrong}  "
            f"slowest {self.slowest_s:.1f} s"
        )

    def to_json(self) -> str:
        return json.dumps(self.__dict__, default=lambda _: None)

    @classmethod
    def from_json(cls, name: str, text: str) -> Tally:
        told = {key: value for key, value in json.loads(text).items() if not key.startswith("_")}
        return cls(**{**told, "name": name, "typed": Counter(told["typed"])})


Client = Callable[[Tally, threading.Event], None]


@contextmanager
def under_load(tally: Tally, client: Client, threads: int) -> Iterator[threading.Event]:
    """Run clients beside the block; wait for their last answers at its end."""
    stop = threading.Event()
    crashed: list[BaseException] = []

    def run() -> None:
        try:
            client(tally, stop)
        except BaseException as error:
            crashed.append(error)

    def watch() -> None:
        while not stop.is_set():
            before = time.monotonic()
            time.sleep(0.05)
            gap = time.monotonic() - before
            tally.stopped_s += gap if gap > 0.5 else 0.0

    threading.Thread(target=watch, daemon=True).start()
    started = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in started:
            thread.join(ANSWER_S + 10)
        for _ in [thread for thread in started if thread.is_alive()]:
            tally.count("lost", "a client never came back")
    if crashed:
        raise crashed[0]


# Clients


def over_http(port: int, model: str = "three", *, host: str = "127.0.0.1", pause_s: float = 0.002) -> Client:
    """Clients that keep their connection, one request at a time."""

    def client(tally: Tally, stop: threading.Event) -> None:
        raw: Raw | None = None
        while not stop.is_set():
            number, since = tally.begin(), time.monotonic()
            body = _body(number)
            try:
                if raw is None:
                    raw = _connect(host, port)
                raw.send(post(f"/v2/models/{model}/infer", body))
                answer = raw.answer()
            except TimeoutError:
                tally.count("lost", f"HTTP: no answer to {number} in {ANSWER_S:g} s")
                raw = _close(raw)
                continue
            except (OSError, EOFError) as error:
                begun = isinstance(error, EOFError) and bool(error.args and error.args[0])
                tally.count("cut" if begun else "told", since=since)
                raw = _close(raw)
                stop.wait(0.02)
                continue
            if raw._rest:
                tally.count("doubled", f"{number}: {raw._rest[:200]!r}")
            if answer.status == 200:
                document = answer.json
                tally.judge(document["outputs"][0]["data"] if document["id"] == str(number) else [], number, since)
            else:
                said = bool(answer.body) and "error" in answer.json
                tally.error(f"{answer.status}" if said else f"{answer.status} without a reason", since)
                stop.wait(0.02)
            if answer.headers.get("connection") == "close":
                raw = _close(raw)
            stop.wait(pause_s)
        if raw is not None:
            raw.socket.settimeout(0.1)
            with contextlib.suppress(OSError):
                if raw.socket.recv(1):
                    tally.count("doubled", "bytes came after the last answer")
            _close(raw)

    return client


def _body(number: int) -> bytes:
    tensor = {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": [number] * WIDTH}
    return json.dumps({"id": str(number), "inputs": [tensor]}).encode()


def _connect(host: str, port: int) -> Raw:
    raw = Raw.__new__(Raw)
    raw.socket, raw._rest = socket.create_connection((host, port), 5), b""
    raw.socket.settimeout(ANSWER_S)
    raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def _close(raw: Raw | None) -> None:
    if raw is not None:
        raw.close()


def over_grpc(port: int, model: str = "three", *, host: str = "127.0.0.1", pause_s: float = 0.002) -> Client:
    """NVIDIA's own client."""
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    def client(tally: Tally, stop: threading.Event) -> None:
        # A pool of its own: clients in one process would share one connection.
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
        with triton.InferenceServerClient(f"{host}:{port}", channel_args=own) as server:
            while not stop.is_set():
                number, since = tally.begin(), time.monotonic()
                x = triton.InferInput("x", [1, WIDTH], "FP32")
                x.set_data_from_numpy(np.full((1, WIDTH), number, np.float32))
                try:
                    answer = server.infer(model, [x], request_id=str(number), client_timeout=ANSWER_S)
                except InferenceServerException as error:
                    if "DEADLINE" in str(error.status()) and time.monotonic() - since >= ANSWER_S - 1:
                        tally.count("lost", str(error))
                    else:
                        tally.error(str(error.status()).removeprefix("StatusCode."), since)
                    stop.wait(0.02)
                    continue
                mine = answer.get_response().id == str(number)
                tally.judge(answer.as_numpy("y") if mine else [], number, since)
                stop.wait(pause_s)

    return client


def over_eia(session: Any, pause_s: float = 0.001) -> Client:
    """A session on a remote accelerator; what it cannot answer must be an `AccelrtError`."""

    def client(tally: Tally, stop: threading.Event) -> None:
        while not stop.is_set():
            number, since = tally.begin(), time.monotonic()
            try:
                found = session.predict({"x": np.full((1, WIDTH), number, np.float32)})["y"]
            except AccelrtError as error:
                tally.error(type(error.__cause__ or error).__name__, since)
            else:
                tally.judge(found, number, since)
            stop.wait(pause_s)

    return client


# Servers


class Server:
    """A server over a repository, in a process of its own and if need be in a network namespace of its own."""

    def __init__(
        self, root: Path, *, namespace: str = "", environment: dict[str, str] | None = None, **settings: Any
    ) -> None:
        self._settings = {
            "repository": str(root), "http_port": 0, "grpc_port": 0, "metrics_port": None, "drain_s": 10.0, **settings
        }  # fmt: skip
        self._namespace, self._environment = namespace, environment or {}
        self.http = self.grpc = 0
        self.starts = 0
        folder = Path(os.environ.get("ACCELRT_CACHE_DIR", "/tmp"))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"server-{uuid.uuid4().hex[:8]}.log"
        self.start()

    def start(self) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "backends"), str(ROOT)])
        command = [sys.executable, str(SERVER), json.dumps(self._settings)]
        if self._namespace:
            command = ["ip", "netns", "exec", self._namespace, *command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self._environment, "PYTHONPATH": paths},
            )
        assert self.process.stdout is not None
        announced = self.process.stdout.readline()
        if not announced:
            raise AssertionError(f"the server did not start: {self.log.read_text()[-2000:]}")
        ports = json.loads(announced)
        self.http, self.grpc = ports.get("http", 0), ports.get("grpc", 0)
        # The same ones when it is started again.
        self._settings |= {"http_port": self.http, "grpc_port": self.grpc or self._settings["grpc_port"]}
        self.starts += 1

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    @property
    def errors(self) -> list[str]:
        """Lines of its log at the level of errors."""
        return [
            line for line in self.log.read_text().splitlines() if '"level":"error"' in line.replace(": ", ":").lower()
        ]

    @property
    def rss(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class CuttingProxy:
    """Passes TCP on, and cuts connections where it is told to: after so many bytes of either direction, at random."""

    def __init__(self, port: int, seed: int, *, least: int = 200, most: int = 60_000) -> None:
        self._to, self._random, self._between = port, random.Random(seed), (least, most)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cutting = True
        self.cuts = Counter[str]()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    where, after = self._random.choice(("request", "reply")), self._random.randint(*self._between)
                for source, sink, name in ((client, server, "request"), (server, client, "reply")):
                    left = after if name == where else None
                    threading.Thread(target=self._pump, args=(source, sink, name, left), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, name: str, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if left is not None and self.cutting:
                    if len(data) >= left:
                        sink.sendall(data[: left // 2 or 1])  # in the middle of whatever it is
                        with self._lock:
                            self.cuts[name] += 1
                        break
                    left -= len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


# Networks


def why_no_namespaces() -> str:
    """Return why network namespaces cannot be had here, empty if they can."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened"
    made = subprocess.run(["ip", "netns", "add", "accelrt-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "accelrt-try"], capture_output=True)
    return "" if made.returncode == 0 else f"network namespaces cannot be made: {made.stderr.strip()}"


@dataclass(frozen=True)
class Weather:
    """What befalls packets, as ``tc netem`` has it: shares from 0 to 1, times in seconds."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    doubled: float = 0.0
    turned_round: float = 0.0
    """Sent at once, before those that wait out their delay."""


class Network:
    """Two network namespaces and a wire between them, on which every packet can be delayed, doubled and lost.

    The wire does in user space what ``tc netem`` does in kernels that have its module: each end is a TUN device, and a
    thread carries packets from one to the other.
    """

    server_address, client_address = "10.213.7.1", "10.213.7.2"

    def __init__(self, seed: int = 0) -> None:
        tag = uuid.uuid4().hex[:6]
        self.server, self.client = f"accelrt-s{tag}", f"accelrt-c{tag}"
        self.weather = Weather()
        self.carried, self.lost, self.doubled = 0, 0, 0
        self._random, self._due, self._stopped = random.Random(seed), [], False  # type: ignore[var-annotated]
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._ends: list[int] = []
        for name, mine, other in (
            (self.server, self.server_address, self.client_address),
            (self.client, self.client_address, self.server_address),
        ):
            device = f"wire{tag}"
            self._do("ip", "netns", "add", name)
            # Made where this process is, so that it can be opened here, and moved with its end in hand.
            end = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
            self._do("ip", "link", "set", device, "netns", name)
            self._do("ip", "-n", name, "addr", "add", mine, "peer", other, "dev", device)
            for each in ("lo", device):
                self._do("ip", "-n", name, "link", "set", each, "up")
            self._ends.append(end)
        for source, sink in (self._ends, self._ends[::-1]):
            threading.Thread(target=self._take, args=(source, sink), daemon=True).start()
        threading.Thread(target=self._deliver, daemon=True).start()

    def unplug(self) -> None:
        """Lose every packet, so that neither side hears of the end of the other."""
        self.weather = Weather(loss=1.0)

    def _take(self, source: int, sink: int) -> None:
        while not self._stopped:
            ready, _, _ = select.select([source], [], [], 0.2)
            if not ready:
                continue
            try:
                packet = os.read(source, 65536)
            except OSError:
                return
            weather, draw = self.weather, self._random.random
            if draw() < weather.loss:
                self.lost += 1
                continue
            copies = 1 + (draw() < weather.doubled)
            self.doubled += copies - 1
            with self._changed:
                for _ in range(copies):
                    waits = 0.0 if draw() < weather.turned_round else weather.delay_s + draw() * weather.jitter_s
                    heapq.heappush(self._due, (time.monotonic() + waits, next(self._order), sink, packet))
                self._changed.notify()

    def _deliver(self) -> None:
        while not self._stopped:
            with self._changed:
                left = self._due[0][0] - time.monotonic() if self._due else 0.2
                if left > 0:
                    self._changed.wait(left)
                    continue
                _, _, sink, packet = heapq.heappop(self._due)
            with contextlib.suppress(OSError):
                os.write(sink, packet)
                self.carried += 1

    def close(self) -> None:
        self._stopped = True
        time.sleep(0.3)
        for end in self._ends:
            os.close(end)
        for name in (self.server, self.client):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _do(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
"""Of ``linux/if_tun.h``."""


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "accelrt-small", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount(tmp: Path) -> bool:
    """Tell whether file systems can be mounted here."""
    try:
        with small_disk(tmp / "try-to-mount", 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# A client in a process of its own


def in_process(
    namespace: str, kind: str, address: str, seconds: float, threads: int, *, name: str, **environment: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.hostile.faults", kind, address, str(seconds), str(threads)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "backends"), str(ROOT)])
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *command] if namespace else command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def main() -> None:
    kind, address, seconds, threads = sys.argv[1:]
    host, _, port = address.rpartition(":")
    tally = Tally(kind)
    warnings.simplefilter("ignore", AccelrtWarning)
    if kind == "eia":
        import accelrt
        from accelrt.registry import REGISTRY
        from accelrt_eia import EiaBackend

        if "eia" not in REGISTRY.names():
            accelrt.register(EiaBackend)
        os.environ["ACCELRT_EIA_ACCELERATORS"] = f"grpc://{address}"
        options = {"timeout_s": float(os.environ.get("FAULTS_TIMEOUT_S", "5")), "load_timeout_s": 30.0}
        artifact = accelrt.compile(times_three(), "eia/remote", options=options)
        with accelrt.load(artifact, fallback=os.environ.get("FAULTS_FALLBACK", "warn")) as session:  # type: ignore[arg-type]
            print("ready", flush=True)
            with under_load(tally, over_eia(session), int(threads)):
                time.sleep(float(seconds))
    else:
        client = (over_http if kind == "http" else over_grpc)(int(port), host=host)
        print("ready", flush=True)
        with under_load(tally, client, int(threads)):
            time.sleep(float(seconds))
    print(tally.to_json(), flush=True)


if __name__ == "__main__":
    main()
