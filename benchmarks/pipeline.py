"""What a pipeline buys: ResNet-50 on one thread, and as two stages of one thread each.

Claim: the pipeline's throughput is at least 1.6 times that of one thread. Both run the same image through
``cpu/onnxruntime``; a sample is the mean time an image of a stream of several takes. The outputs are compared too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import interleave, report, rows

import accelrt
from accelrt.testing.models import resnet50

WANTED = 1.6
STREAM = 24
ONE_THREAD = {"onnxruntime.threads": 1}


def main() -> None:
    """Measure and report."""
    model = resnet50(batch=1)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    artifact = accelrt.compile(model, "cpu/onnxruntime", cores=2, options=ONE_THREAD)
    print(artifact.explain())
    with (
        accelrt.load(accelrt.compile(model, "cpu/onnxruntime", options=ONE_THREAD)) as whole,
        accelrt.load(artifact) as pipeline,
    ):
        one, two = (session.predict(image)["scores"] for session in (whole, pipeline))
        error = float(np.linalg.norm(two - one) / np.linalg.norm(one))
        samples = interleave(
            {"one thread": _stream(whole.predict, image), "two stages": _mapped(pipeline, image)}, rounds=12
        )
    samples = {name: [value / STREAM for value in values] for name, values in samples.items()}
    table = rows(samples, "one thread")
    gain = 1 / table[1].ratio
    claims = {
        f"two stages have {gain:.2f} times the throughput of one thread (wanted {WANTED:g})": gain >= WANTED,
        f"the outputs agree: relative L2 error {error:.1e} (limit 1e-5)": error <= 1e-5,
    }
    report("ResNet-50, batch 1, as a pipeline", table, claims)


def _stream(predict: Callable[[Any], Any], image: np.ndarray) -> Callable[[], object]:
    def run() -> None:
        for _ in range(STREAM):
            predict(image)

    return run


def _mapped(session: Any, image: np.ndarray) -> Callable[[], object]:
    return lambda: deque(session.map([image] * STREAM), maxlen=0)


if __name__ == "__main__":
    main()
