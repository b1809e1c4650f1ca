"""One program, several backends, not a line changed: ACCELRT_BACKEND says where it runs.

python examples/swap_backends.py                                       # runs itself once for every engine here
ACCELRT_BACKEND=cpu/openvino python examples/swap_backends.py --once   # what it runs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

import accelrt
from accelrt.data import digits_model, held_out_digits

IMAGES = 50


def once() -> None:
    """The program: it names no backend. Prints where it ran and what it found, as JSON."""
    images, _ = held_out_digits()
    with accelrt.load(digits_model()) as session:
        scores = session.predict(images[:IMAGES])["scores"]
        print(json.dumps({"engines": session.stats().engines, "scores": scores.tolist()}))


def usable_engines() -> list[str]:
    """Return every engine that works on this machine, the one that is chosen by default first."""
    return [
        f"{backend.name}/{engine.name}"
        for backend in accelrt.backends()
        for engine in backend.engines
        if engine.status.usable and engine.takes_onnx and backend.devices
    ]


def everywhere() -> None:
    """Run the program once for each engine and compare."""
    expected = None
    for target in ["cpu", *usable_engines()]:
        done = subprocess.run(
            [sys.executable, __file__, "--once"],
            env={**os.environ, "ACCELRT_BACKEND": target},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        answer = json.loads(done.stdout)
        scores = np.array(answer["scores"])
        expected = scores if expected is None else expected
        difference = np.abs(scores - expected).max()
        print(
            f"ACCELRT_BACKEND={target:16} ran on {', '.join(answer['engines']):16} largest difference {difference:.1e}"
        )
        if difference > 1e-3 or (scores.argmax(axis=1) != expected.argmax(axis=1)).any():
            sys.exit(f"{target} disagrees")
    print("outputs agree")


if __name__ == "__main__":
    once() if "--once" in sys.argv[1:] else everywhere()
