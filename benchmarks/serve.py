"""What a server adds to a model: accelrt's beside Triton, MLServer, LitServe, BentoML and bare FastAPI.

All serve the same model and take the same request of the Open Inference Protocol as JSON, from wrk over 16 connections,
in turns. Servers whose turn it is not are stopped (SIGSTOP), so that they take no time from the one that is measured;
but for Triton, which would not go on, and is idle then. Triton runs its Python backend, whose model computes the same
in numpy; the others call the same ONNX file by onnxruntime with one thread. All have one worker process.

Where the others are: ``ACCELRT_TRITON`` is the folder of Triton as for the protocol suite
(``.../pytriton/tritonserver``); ``ACCELRT_PEER_FASTAPI``, ``_LITSERVE``, ``_BENTOML`` and ``_MLSERVER`` are
interpreters that have them and onnxruntime. What is not there is left out, and so is a claim about it. Without wrk
(``ACCELRT_WRK``, or on the path) `serve_load` takes its place. ``ACCELRT_SERVE_PARTS`` chooses among ``json,images``.

Then ResNet-50 with binary tensors over HTTP, from a client on the same cores, against the same session without a
server; and the latency of both at 70 % of the rate that was measured. Requests are due at their times whatever the
server does, and latency counts from then. Where they are due at random times, no server can keep the 99th percentile
near the median: requests have to queue. That run is held against a queue that costs nothing and serves at that rate.
Client and server of a small model have a processor each then. Beside both goes a floor, in turns: for a small model a
server that only sends the reply, for ResNet-50 the session alone. How much of its time a process that does nothing but
look at the clock is kept from running is measured too.

Claims: 1.5 times as many requests a second as Triton; ResNet-50 at 0.93 of the session's own rate; at 70 % load the
99th percentile at most twice the median, and for random arrivals at most 1.2 times what an ideal queue has.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measure import Row, interleave, report, rows
from onnx import TensorProto, helper, numpy_helper
from serve_load import arrivals, ask, connect, ideal, percentiles, request, stolen

import accelrt
from accelrt.testing.models import resnet50

OVER_TRITON, OF_OFFLINE, TAIL, OVER_IDEAL = 1.5, 0.93, 2.0, 1.2
LOAD = 0.7
CONNECTIONS = 16
ROUNDS, TURN_S = 5, 2
IMAGES, IMAGE_ROUNDS, UNDER_WAY = 40, 5, 3
START_S = 120
WINDOWS = 5
HERE = Path(__file__).parent
WRK = os.environ.get("ACCELRT_WRK") or shutil.which("wrk")
PEERS = ("fastapi", "litserve", "bentoml", "mlserver")


@dataclass
class Served:
    """A server that was started, and is stopped but for its turns."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    target: str

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes; Triton is not stopped."""
        if self.name == "Triton" and number == signal.SIGSTOP:
            return  # its Python backend takes a process that stands still for a dead one; while idle it takes no time
        for process in _family(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def run_on(self, processors: set[int]) -> None:
        """Keep all of its threads, and those that they start, on some processors."""
        for process in _family(self.process.pid):
            for thread in Path(f"/proc/{process}/task").iterdir():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread.name), processors)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run for a while."""
        self.signal(signal.SIGCONT)
        time.sleep(0.05)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)


def _family(process: int) -> list[int]:
    """Return a process and all that it has started, by Linux's table: some make groups of their own."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return found


@dataclass
class Place:
    """Where servers keep their files, and which port is next."""

    folder: Path
    port: int
    started: list[Served] = field(default_factory=list)

    def start(self, name: str, command: list[str], target: str, body: bytes, **environment: str) -> Served | None:
        """Start a server, wait until it answers, and stop it; None, with a line that says why, if it does not."""
        variables = {key: text for key, text in os.environ.items() if key != "PYTHONPATH" or name == "accelrt"}
        log = self.folder / f"{name}-{self.port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**variables, **environment}, start_new_session=True
            )
        served = Served(name, process, self.port, target)
        self.started.append(served)
        self.port += 3
        deadline, problem = time.monotonic() + START_S, "it did not listen"
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with contextlib.closing(connect(served.port)) as one:
                    ask(one, request(target, body, {"content-type": "application/json"}))
                served.signal(signal.SIGSTOP)
                return served
            except (OSError, RuntimeError) as error:
                problem = str(error)
                time.sleep(0.2)
        served.signal(signal.SIGKILL)
        print(f"left out: {name} did not start ({problem}): {log.read_text(errors='replace')[-500:]}", flush=True)
        return None

    def file(self, small: Small) -> Path:
        """Return where the body of a request for a small model is."""
        return self.folder / f"{small.name.replace(' ', '_')}.json"

    def end(self) -> None:
        """End all servers."""
        for served in self.started:
            served.signal(signal.SIGKILL)
            served.process.wait()


@dataclass(frozen=True)
class Small:
    """A model that takes less time than its request does.

    Attributes:
        onnx: FP32 x to y.
        numpy: The same as an expression, where ``w`` is a list of the weights.
        size: Numbers in a row of x.
    """

    name: str
    onnx: onnx.ModelProto
    numpy: str
    size: int

    @property
    def weights(self) -> list[np.ndarray[Any, Any]]:
        """Its constants, in the order in which they are read."""
        return [numpy_helper.to_array(each) for each in self.onnx.graph.initializer]

    def x(self) -> np.ndarray[Any, Any]:
        """An input."""
        return np.random.default_rng(0).standard_normal((1, self.size)).astype(np.float32).round(3)

    def body(self) -> bytes:
        """The request with it."""
        x = self.x()
        data = [round(float(value), 3) for value in x.ravel()]
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": data}
        return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()

    def expected(self) -> np.ndarray[Any, Any]:
        """The answer."""
        return np.asarray(eval(self.numpy, {"x": self.x(), "w": self.weights, "np": np}))  # noqa: S307 its own text


def one_node() -> Small:
    """y = x + x, four numbers."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "one", ports[:1], ports[1:])
    return Small("one node", _model(graph), "x + x", 4)


def mlp() -> Small:
    """64 numbers to 128 to 10, with a Relu between."""
    draw = np.random.default_rng(1)
    shapes = {"w0": (64, 128), "w1": (128,), "w2": (128, 10), "w3": (10,)}
    weights = [
        numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32) / 8, name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2", "w3"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 64), ("y", 10))]
    graph = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], weights)
    return Small("MLP", _model(graph), "np.maximum(x @ w[0] + w[1], 0) @ w[2] + w[3]", 64)


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


# The contestants


def accelrt_server(place: Place, name: str, model: onnx.ModelProto, body: bytes) -> Served:
    """Start ``accelrt serve`` as it is, without options that are about speed."""
    file = place.folder / f"{name.replace(' ', '_')}.onnx"
    onnx.save(model, file)
    command = [sys.executable, "-m", "accelrt", "serve", str(file), "--http-port", str(place.port)]
    command += ["--grpc-port", "-1", "--metrics-port", "-1"]
    served = place.start("accelrt", command, f"/v2/models/{file.stem}/infer", body)
    if served is None:
        raise SystemExit("accelrt's own server did not start.")
    return served


def triton_server(place: Place, small: Small) -> Served | None:
    """Start Triton with a Python model, if it is there."""
    if not (where := os.environ.get("ACCELRT_TRITON")):
        print("left out: Triton (ACCELRT_TRITON is not set)", flush=True)
        return None
    home, root = Path(where), place.folder / f"triton_{place.port}"
    version = root / "models" / "model" / "1"
    version.mkdir(parents=True)
    np.savez(version / "weights.npz", *small.weights)
    (version / "model.py").write_text(
        "import os\nimport numpy as np\nimport triton_python_backend_utils as pb\n"
        "class TritonPythonModel:\n"
        "    def initialize(self, args):\n"
        "        files = np.load(os.path.join(os.path.dirname(__file__), 'weights.npz'))\n"
        "        self.w = [files[name] for name in files.files]\n"
        "    def execute(self, requests):\n"
        "        return [self.one(each) for each in requests]\n"
        "    def one(self, request):\n"
        "        x, w = pb.get_input_tensor_by_name(request, 'x').as_numpy(), self.w\n"
        f"        return pb.InferenceResponse([pb.Tensor('y', {small.numpy})])\n"
    )
    ports = [
        f'{side} [{{name: "{name}" data_type: TYPE_FP32 dims: [1, {size}]}}]'
        for side, name, size in (("input", "x", small.size), ("output", "y", small.expected().size))
    ]
    config = ['name: "model"', 'backend: "python"', "max_batch_size: 0", *ports]
    (version.parent / "config.pbtxt").write_text("\n".join(config))
    backends = root / "backends" / "python"
    backends.mkdir(parents=True)
    for file in (home / "backends" / "python").iterdir():
        if file.is_file() and file.name != "triton_python_backend_stub":
            (backends / file.name).symlink_to(file)
    python = home.parents[2].name.removeprefix("python")
    (backends / "triton_python_backend_stub").symlink_to(
        home / "python_backend_stubs" / python / "triton_python_backend_stub"
    )
    command = [str(home / "bin" / "tritonserver"), f"--model-repository={root / 'models'}"]
    command += [f"--backend-directory={root / 'backends'}", f"--http-port={place.port}", "--http-address=127.0.0.1"]
    command += ["--allow-grpc=false", "--allow-metrics=false"]
    path = f"{home.parents[4] / 'bin'}{os.pathsep}{os.environ['PATH']}"
    libraries = str(home.parents[1] / "nvidia_pytriton.libs")
    return place.start("Triton", command, "/v2/models/model/infer", small.body(), LD_LIBRARY_PATH=libraries, PATH=path)


def peer_server(place: Place, kind: str, small: Small) -> Served | None:
    """Start one of `serve_peers`, if its interpreter is there."""
    variable = f"ACCELRT_PEER_{kind.upper()}"
    if not (python := os.environ.get(variable)):
        print(f"left out: {kind} ({variable} is not set)", flush=True)
        return None
    file = place.folder / f"{kind}_{place.port}.onnx"
    onnx.save(small.onnx, file)
    command = [python, str(HERE / "serve_peers.py"), kind, str(place.port), str(file)]
    command.append(str(place.folder / f"{kind}_{place.port}"))
    target = "/v2/models/model/infer" if kind == "mlserver" else "/infer"
    return place.start(kind, command, target, small.body(), PYTHONPATH=str(HERE))


# JSON, against the others


def small_servers(place: Place, small: Small) -> list[Served]:
    """Start every server that is there with a small model, accelrt's first, and check what they answer."""
    body = small.body()
    ours = accelrt_server(place, small.name, small.onnx, body)
    others = [triton_server(place, small), *(peer_server(place, kind, small) for kind in PEERS)]
    servers = [ours, *(each for each in others if each is not None)]
    for served in servers:
        with served.turn(), contextlib.closing(connect(served.port)) as one:
            reply = ask(one, request(served.target, body, {"content-type": "application/json"}))
            output = json.loads(reply.partition(b"\r\n\r\n")[2])["outputs"][0]
            np.testing.assert_allclose(output["data"], small.expected().ravel(), rtol=1e-4, atol=1e-5)
    place.file(small).write_bytes(body)
    return servers


def requests_a_second(
    place: Place, small: Small, servers: list[Served]
) -> tuple[list[Row], dict[str, bool], dict[str, Any]]:
    """Measure a small model on every server, in turns."""
    file = place.file(small)
    rates: dict[str, list[float]] = {each.name: [] for each in servers}
    tails: dict[str, list[float]] = {each.name: [] for each in servers}
    for number in range(-1, ROUNDS):  # the first round warms up
        turn = number % len(servers)
        for served in servers[turn:] + servers[:turn]:
            with served.turn():
                rate, p99 = _wrk(served, file) if WRK else _own_client(served, file)
            if number >= 0:
                rates[served.name].append(rate)
                tails[served.name].append(p99)
    samples = {f"{small.name}: {name}": [1 / rate for rate in each] for name, each in rates.items()}
    table = rows(samples, f"{small.name}: accelrt")
    medians = {name: statistics.median(each) for name, each in rates.items()}
    told = {name: {"requests_a_second": rates[name], "p99_s": tails[name]} for name in rates}
    claims = {}
    if "Triton" in medians:
        gain = medians["accelrt"] / medians["Triton"]
        text = f"{small.name}: {medians['accelrt']:.0f} requests a second, {gain:.2f} times Triton's"
        if small.name == "one node":
            claims[f"{text} (at least {OVER_TRITON})"] = gain >= OVER_TRITON
    for name, rate in medians.items():
        print(f"{small.name:10} {name:10} {rate:9.0f} requests a second", flush=True)
    return table, claims, told


def _wrk(served: Served, body: Path) -> tuple[float, float]:
    script = body.with_suffix(".lua")
    script.write_text(
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nwrk.body = [[{body.read_text()}]]\n'
        "done = function(summary, latency)\n"
        "  local bad = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write\n"
        '  print(string.format("FOUND %d %d %d %f", summary.requests, summary.duration, bad, latency:percentile(99)))\n'
        "end\n"
    )
    url = f"http://127.0.0.1:{served.port}{served.target}"
    command = [str(WRK), "-t1", f"-c{CONNECTIONS}", f"-d{TURN_S}s", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"FOUND (\d+) (\d+) (\d+) ([\d.]+)", text)
    if found is None or int(found[3]):
        raise SystemExit(f"{served.name} did not answer every request: {text}")
    return int(found[1]) / int(found[2]) * 1e6, float(found[4]) / 1e6


def _own_client(served: Served, body: Path) -> tuple[float, float]:
    found = _client(served, body, {"content-type": "application/json"}, kind="closed", count=8000)
    return 8000 / found["seconds"], found["p99_s"]


def _client(
    served: Served, body: Path, headers: Mapping[str, str], *, connections: int = CONNECTIONS, **task: object
) -> dict[str, Any]:
    """Run `serve_load` in a process of its own."""
    document = {"port": served.port, "target": served.target, "body": str(body), "headers": dict(headers)}
    document |= {"connections": connections, **task}
    command = [sys.executable, str(HERE / "serve_load.py")]
    done = subprocess.run(command, input=json.dumps(document), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The client of {served.name} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


# ResNet-50, against the session alone


@dataclass(frozen=True)
class Images:
    """ResNet-50 behind a server, and a request for it.

    Attributes:
        x: The image.
        body: The file of the request's body: JSON, then the image.
    """

    model: onnx.ModelProto
    served: Served
    x: np.ndarray[Any, Any]
    body: Path
    headers: Mapping[str, str]

    @property
    def name(self) -> str:
        """The input's."""
        return str(self.model.graph.input[0].name)


def image_server(place: Place) -> Images:
    """Start a server with ResNet-50."""
    model = resnet50(batch=1)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    output = {"name": model.graph.output[0].name, "parameters": {"binary_data": True}}
    tensor = {"name": model.graph.input[0].name, "shape": list(x.shape), "datatype": "FP32"}
    text = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}], "outputs": [output]})
    body = place.folder / "image"
    body.write_bytes(text.encode() + x.tobytes())
    headers = {"inference-header-content-length": str(len(text))}
    zeros = json.dumps({"inputs": [{**tensor, "data": [0.0] * x.size}]}).encode()
    served = accelrt_server(place, "ResNet-50", model, zeros)
    return Images(model, served, x, body, headers)


def images(made: Images) -> tuple[list[Row], dict[str, bool], float]:
    """Measure ResNet-50 over HTTP with binary tensors against the session's own rate, in turns."""
    model, served, x, body, headers, name = made.model, made.served, made.x, made.body, made.headers, made.name
    with accelrt.load(model) as session:
        expected = session.predict({name: x})
        with served.turn(), contextlib.closing(connect(served.port)) as one:
            reply = ask(one, request(served.target, body.read_bytes(), headers))
            got = np.frombuffer(reply[-4000:], np.float32)
            np.testing.assert_allclose(got, next(iter(expected.values())).ravel(), rtol=1e-3, atol=1e-4)

        def alone() -> None:
            for _ in session.map({name: x} for _ in range(IMAGES)):
                pass

        def behind() -> None:
            with served.turn():
                found = _client(served, body, headers, connections=UNDER_WAY, kind="closed", count=IMAGES)
            took.append(found["seconds"])

        took: list[float] = []
        samples = interleave({"alone": alone, "served": behind}, rounds=IMAGE_ROUNDS, warmup=1)
        capacity = session.capacity
    # What starting the client takes is not the server's.
    per_image = {
        "ResNet-50: the session alone": [seconds / IMAGES for seconds in samples["alone"]],
        "ResNet-50: HTTP, binary tensors": [seconds / IMAGES for seconds in took[1:]],
    }
    table = rows(per_image, "ResNet-50: the session alone")
    share, rate = 1 / table[1].ratio, 1 / table[1].median_s
    print(f"ResNet-50: {rate:.1f} images a second, {UNDER_WAY} requests under way; session of {capacity}", flush=True)
    claims = {f"ResNet-50: {share:.3f} of the session's own rate (at least {OF_OFFLINE})": share >= OF_OFFLINE}
    return table, claims, rate


# Latency below the limit

Window = Callable[[str, int], dict[str, float]]
"""Measures one window with arrivals of a kind and a seed, and returns percentiles."""


def window_of(
    served: Served, body: Path, headers: Mapping[str, str], rate: float, seconds: float, *, apart: bool
) -> Window:
    """Return what measures a server.

    A client that has a request to send every 0.1 ms looks at the clock all the time; a server that the system wakes up
    on its processor has to wait for the next tick, 4 ms with 250 of them a second. So they can be kept ``apart``.
    """

    def measure(kind: str, seed: int) -> dict[str, float]:
        with served.turn():
            task: dict[str, Any] = {"kind": kind, "rate": rate, "seconds": seconds, "seed": seed}
            if apart:
                *others, own = sorted(os.sched_getaffinity(0))
                served.run_on(set(others) or {own})
                task["processor"] = own
            return _client(served, body, headers, connections=64, **task)

    return measure


def window_alone(session: accelrt.Session, feeds: Mapping[str, Any], rate: float, seconds: float) -> Window:
    """Return what measures a session that is called in the same rhythm by this process."""

    def measure(kind: str, seed: int) -> dict[str, float]:
        start, took = time.perf_counter() + 0.01, []
        for due in arrivals(rate, seconds, kind, seed):
            time.sleep(max(0.0, start + due - time.perf_counter()))
            session.predict(feeds)
            took.append(time.perf_counter() - start - due)
        return percentiles(took)

    return measure


def floor_server(place: Place, served: Served, body: Path) -> Served | None:
    """Start a server that does nothing but answer what another one has answered."""
    payload = request(served.target, body.read_bytes(), {"content-type": "application/json"})
    with served.turn(), contextlib.closing(connect(served.port)) as one:
        reply = place.folder / f"reply-{place.port}"
        reply.write_bytes(ask(one, payload))
    command = [sys.executable, str(HERE / "serve_load.py"), "floor", str(place.port), str(reply)]
    return place.start("floor", command, served.target, body.read_bytes())


def at_load(
    name: str, rate: float, seconds: float, ours: Window, floor: Window
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Measure latency at `LOAD` of a rate, with requests at equal distances and at random ones.

    Percentiles are the medians of those of `WINDOWS` windows of so many seconds, so that a disturbance of the machine
    in one of them does not decide. A floor takes the same windows in turns with the server: what no server can be below
    on this machine now.
    """
    claims: dict[str, bool] = {}
    told: dict[str, Any] = {"rate": LOAD * rate}
    for kind in ("paced", "poisson"):
        windows = [(ours(kind, seed), floor(kind, seed)) for seed in range(WINDOWS)]
        best = [percentiles(ideal(arrivals(LOAD * rate, seconds, kind, seed), 1 / rate, 1)) for seed in range(WINDOWS)]
        found, least, queue = (
            {of: statistics.median(each[of] for each in side) for of in ("p50_s", "p99_s")}
            for side in ([one for one, _ in windows], [other for _, other in windows], best)
        )
        told[kind] = {"ours": found, "floor": least, "ideal": queue, "windows": windows}
        ratio, best_ratio = found["p99_s"] / found["p50_s"], queue["p99_s"] / queue["p50_s"]
        figures = f"p50 {found['p50_s'] * 1e3:.3f} ms, p99 {found['p99_s'] * 1e3:.3f} ms, {ratio:.2f} times"
        beside = (
            f"the floor {least['p50_s'] * 1e3:.3f}, {least['p99_s'] * 1e3:.3f}, {least['p99_s'] / least['p50_s']:.2f}"
        )
        where = f"{name} at {LOAD:.0%} load, {kind}"
        if kind == "paced":
            claims[f"{where}: {figures} (at most {TAIL}); {beside}"] = ratio <= TAIL
        else:
            limit = max(TAIL, OVER_IDEAL * best_ratio)
            text = f"{where}: {figures}; an ideal queue has {best_ratio:.2f} (at most {limit:.2f}); {beside}"
            claims[text] = ratio <= limit
    return claims, told


def _free_port() -> int:
    """Return the first of some ports that nobody is likely to have taken."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return 10000 + int(one.getsockname()[1]) % 20000  # below those that the system hands out


def main() -> None:
    """Measure and report."""
    parts = os.environ.get("ACCELRT_SERVE_PARTS", "json,images").split(",")
    table: list[Row] = []
    claims: dict[str, bool] = {}
    extra: dict[str, Any] = {"client": Path(WRK).name if WRK else "serve_load"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the servers are ended too
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), _free_port())
        try:
            smalls = [(small, small_servers(place, small)) for small in (one_node(), mlp())] if "json" in parts else []
            made = image_server(place) if "images" in parts else None
            print("all servers have started", flush=True)
            extra["stolen"] = stolen(3.0)
            share, longest = extra["stolen"]["share"], extra["stolen"]["longest_s"]
            print(f"the machine itself: {share:.1%} of the time in pauses of up to {longest * 1e3:.1f} ms", flush=True)
            rates = {}
            for small, servers in smalls:
                more, held, extra[small.name] = requests_a_second(place, small, servers)
                table, claims = table + more, claims | held
                rates[small.name] = statistics.median(extra[small.name]["accelrt"]["requests_a_second"])
            for small, servers in smalls:
                kind = {"content-type": "application/json"}
                rate, file = rates[small.name], place.file(small)
                floor = floor_server(place, servers[0], file)
                if floor is None:
                    raise SystemExit("The floor did not start.")
                windows = [window_of(each, file, kind, LOAD * rate, 2, apart=True) for each in (servers[0], floor)]
                held, told = at_load(small.name, rate, 2, *windows)
                claims, extra[f"{small.name} at load"] = claims | held, told
            if made is not None:
                more, held, rate = images(made)
                table, claims = table + more, claims | held
                with accelrt.load(made.model) as session:
                    alone = window_alone(session, {made.name: made.x}, LOAD * rate, 9)
                    ours = window_of(made.served, made.body, made.headers, LOAD * rate, 9, apart=False)
                    held, told = at_load("ResNet-50", rate, 9, ours, alone)
                claims, extra["ResNet-50 at load"] = claims | held, told
        finally:
            place.end()
    report("Serving: seconds a request", table, claims, extra=extra)


if __name__ == "__main__":
    main()
