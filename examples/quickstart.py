"""Compile a model, see where it runs, save it, load it, predict.

python examples/quickstart.py            # for the target in ACCELRT_BACKEND, else the CPU
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import accelrt
from accelrt.data import digits_model, held_out_digits


def main() -> None:
    artifact = accelrt.compile(digits_model())
    print(artifact.signature)
    print(artifact.explain())

    images, labels = held_out_digits()
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "digits.accel")
        print(f"saved {path.name}, {path.stat().st_size / 1000:.0f} kB")

        with accelrt.load(path) as session:
            # One call: a dict of arrays in, a dict of arrays out. A bare array will do where there is one input.
            scores = session.predict({"image": images})["scores"]
            right = int((scores.argmax(axis=1) == labels).sum())
            print(f"{right} of {len(labels)} digits right")

            # Many calls: `map` keeps the device busy and yields answers in order.
            singles = (images[i : i + 1] for i in range(100))
            guesses = [int(outputs["scores"].argmax()) for outputs in session.map(singles)]
            print("first ten:", guesses[:10], "are", labels[:10].tolist())

            latency = session.stats().latency
            print(f"{latency.n} calls, p50 {latency.p50_ms:.3f} ms, p99 {latency.p99_ms:.3f} ms")


if __name__ == "__main__":
    main()
