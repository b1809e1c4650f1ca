"""A client of a model server: an image goes out through Triton's own client, the five likeliest classes come back.

Without an address it starts `accelrt serve` on the digits model for itself. Needs `pip install 'tritonclient[http]'`.

    python examples/serving/classify_images.py
    python examples/serving/classify_images.py --url 127.0.0.1:8000 --model digits
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import tritonclient.http as triton

from accelrt.data import digits_model, held_out_digits

WAIT_S = 60.0
TOP = 5


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Start a server of the digits model; yields host and port."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = shutil.copy(digits_model(), folder)
        command = [sys.executable, "-m", "accelrt", "serve", model, "--http-port", "0", "--grpc-port", "-1",
                   "--metrics-port", "-1"]  # fmt: skip
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        try:
            assert process.stdout is not None
            for line in process.stdout:  # it says where it listens when the model is ready
                if line.startswith("http:"):
                    yield line.split("//", 1)[1].strip()
                    break
            else:
                raise SystemExit(f"the server ended with code {process.wait()}")
        finally:
            process.terminate()


def likeliest(scores: np.ndarray) -> list[tuple[int, float]]:
    """Return classes and their probabilities, the likeliest first; scores are logits [classes]."""
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    return [(int(index), float(shares[index])) for index in np.argsort(-shares)[:TOP]]


def ready(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready())
    except OSError:  # nobody listens there yet
        return False


def classify(url: str, name: str | None, count: int) -> None:
    client = triton.InferenceServerClient(url)
    deadline = time.monotonic() + WAIT_S
    while not ready(client):
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} was not ready within {WAIT_S:g} s")
        time.sleep(0.1)
    name = name or client.get_model_repository_index()[0]["name"]
    metadata = client.get_model_metadata(name)
    (port,), (result,) = metadata["inputs"], metadata["outputs"]
    print(f"{name} takes {port['name']} {port['datatype']} {port['shape']}, returns {result['name']}")
    images, labels = held_out_digits()
    right = 0
    for image, label in zip(images[:count], labels[:count], strict=True):
        tensor = triton.InferInput(port["name"], [1, *image.shape], port["datatype"])
        tensor.set_data_from_numpy(np.ascontiguousarray(image[None]))
        start = time.perf_counter()
        answer = client.infer(name, [tensor], outputs=[triton.InferRequestedOutput(result["name"])])
        took = time.perf_counter() - start
        best = likeliest(answer.as_numpy(result["name"])[0])
        right += best[0][0] == label
        print(f"a {label}: " + ", ".join(f"{kind} {share:.3f}" for kind, share in best) + f"  ({took * 1e3:.1f} ms)")
    print(f"the likeliest class is right for {right} of {count} images")


arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("--url", help="host:port of a server; else one is started")
arguments.add_argument("--model", help="name of the model; else the first that the server lists")
arguments.add_argument("--images", type=int, default=8, help="how many images to send")
given = arguments.parse_args()
with contextlib.nullcontext(given.url) if given.url else server() as address:
    classify(address, given.model, given.images)
