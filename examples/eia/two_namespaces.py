"""A client without an accelerator, a server with one, and a network between them: two network namespaces of Linux.

The server runs `accelrt serve`, and takes the models that clients send; the client runs a script for Elastic Inference
on the target `eia/remote`. The network is a pair of virtual interfaces, so that every byte really goes through sockets
of two hosts. Needs root, and `ip`; without them it says why it does nothing.

    sudo python examples/eia/two_namespaces.py                                  # the digits model
    sudo python examples/eia/two_namespaces.py -- python my_elastic_inference_script.py
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

SERVER, CLIENT = (f"accelrt-{side}-{os.getpid()}" for side in ("server", "client"))
LINK = f"acc{os.getpid() % 100000}"
SERVER_IP, CLIENT_IP, PORT = "10.211.55.1", "10.211.55.2", 8001

DIGITS = """
import time, numpy as np, accelrt
from accelrt.data import digits_model, held_out_digits
images, labels = held_out_digits()
with accelrt.load(digits_model()) as session:
    name, result = session.signature.input_names[0], session.signature.output_names[0]
    start = time.perf_counter()
    found = [int(session.predict({name: image[None]})[result].argmax()) for image in images[:100]]
    took = time.perf_counter() - start
    print(session.stats().replicas[0].devices, f"{took / 100 * 1e3:.2f} ms an image")
print("right:", int((np.array(found) == labels[:100]).sum()), "of 100")
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def refusal() -> str | None:
    """Return why namespaces cannot be made here, None if they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (package iproute2)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    try:
        ip("netns", "add", f"{SERVER}-try")
        ip("netns", "del", f"{SERVER}-try")
    except subprocess.CalledProcessError as error:
        return f"the kernel refuses network namespaces: {error.stderr.strip()}"
    return None


@contextlib.contextmanager
def hosts() -> Iterator[None]:
    """Make two namespaces with a link between them, and remove them."""
    made: list[str] = []
    try:
        for name in (SERVER, CLIENT):
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", f"{LINK}s", "netns", SERVER, "type", "veth", "peer", "name", f"{LINK}c", "netns", CLIENT)
        for name, end, address in ((SERVER, "s", SERVER_IP), (CLIENT, "c", CLIENT_IP)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"{LINK}{end}")
            ip("-n", name, "link", "set", f"{LINK}{end}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in made:  # the link goes with them
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@contextlib.contextmanager
def server(repository: str, backend: str) -> Iterator[None]:
    """Run a server in its namespace until it says where it listens; end it afterwards."""
    command = [
        "ip", "netns", "exec", SERVER, sys.executable, "-m", "accelrt", "serve", repository, "--host", SERVER_IP,
        "--http-port", "-1", "--grpc-port", str(PORT), "--metrics-port", "-1", "--model-control-mode", "explicit",
        "--insecure", "--backend", backend,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("grpc:"):
                    print(f"server in its namespace: {line.strip()}", flush=True)
                    yield
                    break
            else:
                raise SystemExit(f"the server ended with code {process.wait()}")
        finally:
            process.terminate()


def main(script: list[str]) -> int:
    if (reason := refusal()) is not None:
        print(f"skipped: {reason}")
        return 0
    backend = os.environ.pop("ACCELRT_SERVER_BACKEND", "cpu")
    with tempfile.TemporaryDirectory() as repository, hosts(), server(repository, backend):
        environment = {
            **os.environ,
            "ACCELRT_BACKEND": "eia/remote",
            "ACCELRT_EIA_ACCELERATORS": f"grpc://{SERVER_IP}:{PORT}",
        }
        start = time.perf_counter()
        command = ["ip", "netns", "exec", CLIENT, *(script or [sys.executable, "-c", DIGITS])]
        code = subprocess.run(command, env=environment, check=False).returncode
        print(f"client in its namespace: ended with code {code} after {time.perf_counter() - start:.1f} s")
        return code


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(arguments[1:] if arguments[:1] == ["--"] else arguments))
