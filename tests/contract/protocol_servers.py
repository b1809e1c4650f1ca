"""The servers that the protocol suite is run against: accelrt's, and a real Triton where one is at hand.

``ACCELRT_TRITON`` names the folder of a Triton installation that has ``bin/tritonserver`` and the Python backend, as the
package ``nvidia-pytriton`` carries it (``.../site-packages/pytriton/tritonserver``). Both serve models of the same names,
inputs and outputs: accelrt ONNX graphs, Triton the same functions in its Python backend.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

ONNX_TYPES: Mapping[str, int] = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}
"""The protocol's datatypes that carry tensors, and ONNX's names of them."""

MAX_BATCH = 8


@dataclass(frozen=True)
class Server:
    kind: str
    http: str
    grpc: str
    upload_name: str
    """The path of a model's file in an upload."""
    upload: bytes
    """A model's file: ``double``, FP32 x of any shape of rank 2 to y."""


@dataclass(frozen=True)
class Model:
    """One model of the suite: graph for accelrt, body of ``execute`` for Triton."""

    name: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    nodes: tuple[onnx.NodeProto, ...]
    python: str
    max_batch: int = 0
    versions: tuple[str, ...] = ("1",)
    batching: str = "max_queue_delay_microseconds: 1000"
    helpers: str = ""
    """Lines of Python before the class, for Triton."""
    settings: str = ""
    """An ``accelrt.json``, for accelrt."""

    def onnx(self) -> onnx.ModelProto:
        def ports(of: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(
                    name,
                    ONNX_TYPES[datatype],
                    [
                        *(["batch"] if self.max_batch else []),
                        *(f"{name}_{i}" if d < 0 else d for i, d in enumerate(dims)),
                    ],
                )
                for name, (datatype, dims) in of.items()
            ]

        graph = helper.make_graph(list(self.nodes), self.name, ports(self.inputs), ports(self.outputs))
        return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])

    def config(self, platform: str) -> str:
        def ports(of: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
            return ", ".join(
                f'{{name: "{name}" data_type: TYPE_{"STRING" if datatype == "BYTES" else datatype} '
                f"dims: [{', '.join(map(str, dims))}]}}"
                for name, (datatype, dims) in of.items()
            )

        batching = f"dynamic_batching {{ {self.batching} }}\n" if self.max_batch else ""
        if self.versions != ("1",):
            batching += "version_policy: { all {} }\n"
        return (
            f'name: "{self.name}"\n{platform}\nmax_batch_size: {self.max_batch}\n'
            f"input [{ports(self.inputs)}]\noutput [{ports(self.outputs)}]\n{batching}"
        )

    def triton(self) -> str:
        return (
            f"import time\nimport numpy as np\nimport triton_python_backend_utils as pb\n{self.helpers}"
            "class TritonPythonModel:\n"
            "    def execute(self, requests):\n"
            "        return [self.one(r) for r in requests]\n"
            "    def one(self, request):\n"
            "        get = lambda name: pb.get_input_tensor_by_name(request, name)\n"
            f"        return pb.InferenceResponse([{self.python}])\n"
        )


def _tensor(name: str, value: str) -> str:
    return f"pb.Tensor({name!r}, {value})"


def models() -> list[Model]:
    made = []
    for datatype in ONNX_TYPES:
        ports = {"x": (datatype, (-1, -1))}, {"y": (datatype, (-1, -1))}
        # numpy has no bfloat16, so Triton's Python backend hands such tensors on as DLPack.
        value = "pb.Tensor.from_dlpack('y', get('x').to_dlpack())"
        made.append(
            Model(
                f"id_{datatype}",
                *ports,
                (helper.make_node("Identity", ["x"], ["y"]),),
                value if datatype == "BF16" else _tensor("y", "get('x').as_numpy()"),
            )
        )
    made.append(
        Model(
            "sum_diff",
            {"a": ("FP32", (-1, 4)), "b": ("FP32", (-1, 4))},
            {"sum": ("FP32", (-1, 4)), "diff": ("FP32", (-1, 4))},
            (helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["diff"])),
            ", ".join(
                (
                    _tensor("sum", "get('a').as_numpy() + get('b').as_numpy()"),
                    _tensor("diff", "get('a').as_numpy() - get('b').as_numpy()"),
                )
            ),
        )
    )
    made.append(
        Model(
            "batched",
            {"x": ("FP32", (3,))},
            {"y": ("FP32", (3,))},
            (helper.make_node("Add", ["x", "x"], ["y"]),),
            _tensor("y", "2 * get('x').as_numpy()"),
            MAX_BATCH,
        )
    )
    made.append(
        Model(
            "twofold",
            {"x": ("FP32", (-1,))},
            {"y": ("FP32", (-1,))},
            (helper.make_node("Neg", ["x"], ["y"]),),
            _tensor("y", "-get('x').as_numpy()"),
            versions=("1", "3"),
        )
    )
    # A level for urgent requests, one for the others; nobody else's run is shared.
    queue = (
        "default_queue_policy { timeout_action: REJECT allow_timeout_override: true "
        "default_timeout_microseconds: 60000000 }"
    )
    made.append(
        Model(
            "slow",
            {"x": ("FP32", (1,))},
            {"y": ("FP32", (1,))},
            _slow_nodes(),
            _tensor("y", "slept(get('x').as_numpy())"),
            max_batch=1,
            batching=f"priority_levels: 2 default_priority_level: 2 {queue}",
            helpers=f"def slept(x):\n    time.sleep({SLOW_S})\n    return x\n",
            settings='{"workers": 1, "replicas": 1}',
        )
    )
    # As many as may wait is one: a second one is turned away.
    made.append(
        Model(
            "narrow",
            {"x": ("FP32", (1,))},
            {"y": ("FP32", (1,))},
            _slow_nodes(),
            _tensor("y", "slept(get('x').as_numpy())"),
            max_batch=1,
            batching="default_queue_policy { max_queue_size: 1 allow_timeout_override: true }",
            helpers=f"def slept(x):\n    time.sleep({SLOW_S})\n    return x\n",
            settings='{"workers": 1, "replicas": 1}',
        )
    )
    return made


SLOW_S = 0.6
"""What Triton's slow models sleep. Those of accelrt multiply matrices for about as long."""
_SLOW_SIZE = 256


@cache
def _slow_times() -> int:
    """Return how many products this machine makes in the time that the others sleep."""
    model = Model("trial", {"x": ("FP32", (1,))}, {"y": ("FP32", (1,))}, _looping(200), "").onnx()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    took = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        session.run(None, {"x": np.ones(1, np.float32)})
        took.append(time.perf_counter() - start)
    return max(200, int(200 * SLOW_S / min(took)))


def _slow_nodes() -> tuple[onnx.NodeProto, ...]:
    return _looping(_slow_times())


def _looping(count: int) -> tuple[onnx.NodeProto, ...]:
    """y = x, after a loop of matrix products whose result is added as zero so that nothing can leave them out."""
    matrix = helper.make_tensor("m", TensorProto.FLOAT, [_SLOW_SIZE] * 2, np.eye(_SLOW_SIZE, dtype=np.float32).ravel())
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["carried", "matrix"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [_SLOW_SIZE] * 2),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [_SLOW_SIZE] * 2),
        ],
    )
    times = helper.make_tensor("n", TensorProto.INT64, [], [count])
    zero = helper.make_tensor("z", TensorProto.FLOAT, [], [0.0])
    return (
        helper.make_node("Constant", [], ["matrix"], value=matrix),
        helper.make_node("Constant", [], ["times"], value=times),
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "zero"], ["nothing"]),
        helper.make_node("Add", ["matrix", "nothing"], ["first"]),
        helper.make_node("Loop", ["times", "", "first"], ["last"], body=body),
        helper.make_node("ReduceSum", ["last"], ["trace"], keepdims=0),
        helper.make_node("Mul", ["trace", "zero"], ["still_nothing"]),
        helper.make_node("Add", ["x", "still_nothing"], ["y"]),
    )


DOUBLE = Model(
    "double",
    {"x": ("FP32", (-1, -1))},
    {"y": ("FP32", (-1, -1))},
    (helper.make_node("Add", ["x", "x"], ["y"]),),
    _tensor("y", "2 * get('x').as_numpy()"),
)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def start_accelrt(folder: Path) -> tuple[subprocess.Popen[bytes], Server]:
    for model in [*models(), DOUBLE]:
        home = folder / model.name
        for version in model.versions:
            (home / version).mkdir(parents=True)
            onnx.save(model.onnx(), home / version / "model.onnx")
        if model.settings:
            (home / "accelrt.json").write_text(model.settings)
        (home / "config.pbtxt").write_text(model.config('platform: "onnxruntime_onnx"'))
    http, grpc = free_ports(2)
    command = [sys.executable, "-m", "accelrt", "serve", str(folder), "--model-control-mode", "explicit"]
    command += ["--load-model", "*", "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", "-1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    return process, _wait(
        process,
        Server("accelrt", f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", "model.onnx", DOUBLE.onnx().SerializeToString()),
    )


def start_triton(folder: Path, home: Path) -> tuple[subprocess.Popen[bytes], Server]:
    for model in [*models(), DOUBLE]:
        place = folder / model.name
        for version in model.versions:
            (place / version).mkdir(parents=True)
            (place / version / "model.py").write_text(model.triton())
        (place / "config.pbtxt").write_text(model.config('backend: "python"'))
    environment_home = home.parents[4]  # the virtual environment, whose Python has numpy
    version = home.parents[2].name.removeprefix("python")
    backends = folder.parent / "backends"
    (backends / "python").mkdir(parents=True)
    for file in (home / "backends" / "python").iterdir():
        if file.is_file():
            (backends / "python" / file.name).symlink_to(file)
    stub = backends / "python" / "triton_python_backend_stub"
    stub.unlink(missing_ok=True)
    stub.symlink_to(home / "python_backend_stubs" / version / stub.name)
    http, grpc = free_ports(2)
    command = [str(home / "bin" / "tritonserver"), f"--model-repository={folder}", f"--backend-directory={backends}"]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", "--allow-metrics=false", "--model-control-mode=explicit"]
    command += ["--load-model=*", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    libraries = home.parents[1] / "nvidia_pytriton.libs"
    environment = {
        **{name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
        "LD_LIBRARY_PATH": str(libraries),
        "PATH": f"{environment_home / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder.parent / "triton.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return process, _wait(
        process,
        Server("triton", f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", "model.py", DOUBLE.triton().encode()),
        folder.parent / "triton.log",
    )


def stop(process: subprocess.Popen[bytes], server: Server) -> None:
    """End a server; Triton's Python backend hangs at times, and then it is killed with its processes."""
    process.terminate()
    if server.kind == "accelrt":
        assert process.wait(60) == 0
        return
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def _wait(process: subprocess.Popen[bytes], server: Server, log: Path | None = None) -> Server:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"{server.kind} did not start. {log.read_text()[-3000:] if log else ''}")
