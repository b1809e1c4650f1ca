"""What the network costs: a model behind a server on the same machine, against the same model in this process.

One image of 1x3x224x224 float32 (602 kB) goes in and 1000 numbers come back; the model does next to nothing, so that
what is left is the way there and back. The server is ``accelrt serve``. Beside it goes a bare gRPC call with as many
bytes each way, which does nothing with them: the floor for anything that is built on it.

By message the calls go over the server's Unix socket, as they do on one machine if nothing else is said, and by gRPC.

Claims: by message at most 0.8 ms more than the local run, in shared memory at most 0.3 ms more; the first load of a
model uploads it, a second one, in another process, uploads nothing.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
from measure import in_fresh_process, interleave, report, rows

import accelrt
from accelrt.registry import REGISTRY
from accelrt.testing.models import Builder

MESSAGE_LIMIT_S, SHARED_LIMIT_S = 0.8e-3, 0.3e-3
GRPC = {"shared_memory": False, "local_socket": False}
_ANSWER = bytes(4000)
_COUNT = """
import sys, accelrt
from accelrt.protocol.client import Endpoint
asked, uploaded = Endpoint.ask, []

def count(self, method, *arguments, **fields):
    if method == "RepositoryModelLoad":
        uploaded.append(sum(len(value.get("bytes_param", b"")) for value in fields["parameters"].values()))
    return asked(self, method, *arguments, **fields)

Endpoint.ask = count
with accelrt.load(sys.argv[1], backend="eia/remote", fallback="error"):
    pass
print(sum(uploaded))
"""
"""Loads a model, and prints how many bytes of files the requests to load it had."""


async def echo() -> None:
    """Serve one method that throws a request away and answers 4000 bytes, with nothing around it."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: object) -> object:
            return grpc.unary_unary_rpc_method_handler(self.answer)

        async def answer(self, data: bytes, context: object) -> bytes:
            return _ANSWER

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


def _start_echo() -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, __file__, "--echo"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _start_server(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Start ``accelrt serve`` over an empty repository, as one that lends its processor is."""
    (folder / "models").mkdir()
    command = [sys.executable, "-m", "accelrt", "serve", str(folder / "models"), "--model-control-mode", "explicit"]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "-1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        name, _, address = line.partition(": ")
        if name == "grpc":
            return process, int(address.rpartition(":")[2])
    raise SystemExit("accelrt's server did not start.")


def main() -> None:
    """Measure and report."""
    net = Builder("image")
    x = net.input("x", (1, 3, 224, 224))
    pooled = net.node("Flatten", net.node("GlobalAveragePool", x))
    net.output(net.node("MatMul", pooled, net.normal(3, 1000, std=1.0), name="y"), (1, 1000))
    model = net.model()
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        measure(model, image, Path(folder))


def measure(model: onnx.ModelProto, image: np.ndarray[Any, Any], folder: Path) -> None:
    """Measure a model of one image, and report."""
    server, port = _start_server(folder)
    bare, bare_port = _start_echo()
    file = folder / "model.onnx"
    onnx.save(model, file)
    os.environ["ACCELRT_EIA_ACCELERATORS"] = f"grpc://127.0.0.1:{port}"
    try:
        if "eia" not in REGISTRY.names():
            from accelrt_eia import EiaBackend

            accelrt.register(EiaBackend)
        uploads = [int(in_fresh_process(_COUNT, str(file))) for _ in range(2)]
        payload = image.tobytes()
        with (
            grpc.insecure_channel(f"127.0.0.1:{bare_port}", [("grpc.max_receive_message_length", -1)]) as channel,
            accelrt.load(model, backend="cpu/onnxruntime", options={"threads": 1}) as local,
            accelrt.load(model, backend="eia/remote", options=GRPC, fallback="error") as by_grpc,
            accelrt.load(model, backend="eia/remote", options={"shared_memory": False}, fallback="error") as message,
            accelrt.load(model, backend="eia/remote", fallback="error") as shared,
        ):
            call = channel.unary_unary("/bare/Echo")
            expected = local.predict(image)["y"]
            for session in (by_grpc, message, shared):
                np.testing.assert_allclose(session.predict(image)["y"], expected, rtol=1e-5, atol=1e-6)
            samples = interleave(
                {
                    "local": lambda: local.predict(image),
                    "bare gRPC": lambda: call(payload),
                    "bare gRPC, 100 bytes": lambda: call(payload[:100]),
                    "eia/remote, gRPC": lambda: by_grpc.predict(image),
                    "eia/remote, message": lambda: message.predict(image),
                    "eia/remote, shared memory": lambda: shared.predict(image),
                },
                rounds=40,
                inner=25,
                warmup=50,
            )
    finally:
        for process in (server, bare):
            process.kill()
            process.wait()
    table = rows(samples, "local")
    medians = {row.name: row.median_s for row in table}
    cost = {name: medians[name] - medians["local"] for name in medians}
    by_message, by_memory = cost["eia/remote, message"], cost["eia/remote, shared memory"]
    claims = {
        f"a message costs {by_message * 1e3:.3f} ms more than the run here (limit 0.8)": by_message <= MESSAGE_LIMIT_S,
        f"shared memory costs {by_memory * 1e3:.3f} ms more (limit 0.3)": by_memory <= SHARED_LIMIT_S,
        f"the first load uploads {uploads[0]} bytes, the second {uploads[1]}": uploads[0] > 0 == uploads[1],
    }
    report("a model behind a server on the same machine", table, claims, extra={"bare_s": medians["bare gRPC"]})


if __name__ == "__main__":
    if "--echo" in sys.argv:
        asyncio.run(echo())
    else:
        main()
