"""What precision buys on ResNet-50, batch 1: onnxruntime and OpenVINO in fp32, bf16 and int8, each with its error.

Claim: int8 is at least 3 times as fast as onnxruntime in fp32. int8 is calibrated with eight random images, since the
weights are random too; errors are relative L2 against fp32 on onnxruntime, on images that calibration did not see.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from measure import interleave, report, rows

import accelrt
from accelrt.testing.models import resnet50

CONTESTANTS = (
    ("cpu/onnxruntime", "fp32"),
    ("cpu/onnxruntime", "int8"),
    ("cpu/openvino", "fp32"),
    ("cpu/openvino", "bf16"),
    ("cpu/openvino", "int8"),
)
WANTED = 3.0


def main() -> None:
    """Measure and report."""
    model = resnet50(batch=1)
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, 3, 224, 224), dtype=np.float32) for _ in range(9)]
    sessions: dict[str, Any] = {}
    errors: dict[str, float] = {}
    truth: np.ndarray | None = None
    for target, precision in CONTESTANTS:
        calibration = {"calibration": images[:8]} if precision == "int8" else {}
        artifact = accelrt.compile(model, target, precision=precision, fallback="error", **calibration)  # type: ignore[arg-type]
        name = f"{target} {precision}"
        sessions[name] = accelrt.load(artifact)
        scores = sessions[name].predict(images[8])["scores"]
        truth = scores if truth is None else truth
        errors[name] = float(np.linalg.norm(scores - truth) / np.linalg.norm(truth))
    samples = interleave(
        {name: (lambda session=session: session.predict(images[8])) for name, session in sessions.items()}, rounds=60
    )
    base = "cpu/onnxruntime fp32"
    table = rows(samples, base)
    best = min((row for row in table if row.name.endswith("int8")), key=lambda row: row.median_s)
    for name, error in errors.items():
        print(f"{name}: relative L2 error {error:.1e}")
    claims = {
        f"{best.name} is {1 / best.ratio:.2f} times as fast as {base} (wanted {WANTED:g})": 1 / best.ratio >= WANTED
    }
    report("ResNet-50 by precision", table, claims, extra={"relative_l2": errors})


if __name__ == "__main__":
    main()
