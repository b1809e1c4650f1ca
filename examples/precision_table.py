"""Accuracy, error, latency and size of the digits model in every precision that the engines here compute.

The last 100 held-out digits calibrate int8; accuracy is counted on the other 350.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import accelrt
from accelrt.data import digits_model, held_out_digits

images, labels = held_out_digits()
calibration = [image[np.newaxis] for image in images[-100:]]
request = accelrt.Verification([images[:-100]], labels=labels[:-100])
engines = [
    f"{backend.name}/{engine.name}"
    for backend in accelrt.backends()
    for engine in backend.engines
    if engine.status.usable and engine.takes_onnx and engine.name != "reference"
    if backend.devices or engine.nature == "emulated"
]


def milliseconds(sessions: dict[tuple[str, str], accelrt.Session], rounds: int = 200) -> dict[tuple[str, str], float]:
    """Median time of one image; the sessions take turns, so that whatever disturbs one disturbs all."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, session in sessions.items():
            session.predict(images[:1])
            start = time.perf_counter()
            session.predict(images[:1])
            times[key].append(time.perf_counter() - start)
    return {key: 1e3 * statistics.median(taken) for key, taken in times.items()}


rows: dict[tuple[str, str], accelrt.Artifact] = {}
refused: list[str] = []
for engine in engines:
    for precision in ("fp32", "bf16", "fp16", "int8"):
        try:
            rows[engine, precision] = accelrt.compile(
                digits_model(),
                engine,
                precision=precision,
                calibration=calibration if precision == "int8" else None,
                verify=request,
                fallback="error",
            )
        except accelrt.errors.UnsupportedNodes as error:
            refused.append(f"{engine} in {precision}: {error.message}")

sessions = {key: accelrt.load(artifact) for key, artifact in rows.items()}
latency = milliseconds(sessions)
print(f"{'engine':<18}{'precision':<11}{'accuracy':>9}{'rel. L2':>10}{'ms':>8}{'bytes':>10}")
for key, artifact in rows.items():
    output = artifact.verification.outputs[0]
    with tempfile.TemporaryDirectory() as folder:
        size = artifact.save(Path(folder) / "m.accel", sources=False).stat().st_size
    print(
        f"{key[0]:<18}{key[1]:<11}{100 * output.accuracy[0]:>7.2f} %{output.relative_l2:>10.1e}"
        f"{latency[key]:>8.3f}{size:>10,}"
    )
    sessions[key].close()
for line in refused:
    print(f"Refused: {line}")
