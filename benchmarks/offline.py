"""Offline throughput of ResNet-50, batch 1, fp32: accelrt on OpenVINO, OpenVINO's own queue, and onnxruntime.

Claim: accelrt on cpu/openvino with a stream a core is within 3 % of OpenVINO's own asynchronous queue at its
throughput hint, with the same model in the same precision, and above the best of several set-ups of onnxruntime.
Everyone gets images that lie in memory and hands back results that stay valid.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from measure import interleave, report, rows

import accelrt
from accelrt.testing.models import resnet50

IMAGES = 32
"""A sample of the benchmark is a window of so many images."""
ROUNDS = 12
NEAR = 1.03
OURS, QUEUE = "accelrt cpu/openvino, a stream a core", "openvino.AsyncInferQueue, throughput hint"


def accelrt_map(model: Any, images: list[Any], cores: int) -> Callable[[], object]:
    """accelrt: `Session.map` over the images."""
    artifact = accelrt.compile(model, "cpu/openvino", options={"streams": cores}, precision="fp32", fallback="error")
    session = accelrt.load(artifact)
    return lambda: [out["scores"] for out in session.map(images)]


def async_queue(path: Path, images: list[Any]) -> Callable[[], object]:
    """OpenVINO by its own means: inputs shared, results copied, since a request writes over them the next time."""
    import openvino

    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    queue = openvino.AsyncInferQueue(openvino.Core().compile_model(path, "CPU", hints))
    results: list[Any] = []

    def collect(request: Any, number: int) -> None:
        results[number] = request.get_output_tensor(0).data.copy()

    queue.set_callback(collect)

    def run() -> list[Any]:
        results[:] = [None] * len(images)
        for number, image in enumerate(images):
            queue.start_async({0: image}, userdata=number, share_inputs=True)
        queue.wait_all()
        return list(results)

    return run


def onnxruntime_callers(
    path: Path, images: list[Any], *, threads: int, callers: int, sessions: int
) -> Callable[[], object]:
    """onnxruntime: so many sessions of so many threads, shared by so many callers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As in accelrt: threads that spin between calls take the cores from those that compute.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    name = onnx.load(path).graph.input[0].name
    pool = [onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]) for _ in range(sessions)]
    executor = ThreadPoolExecutor(callers)

    def one(number: int, image: Any) -> Any:
        return pool[number % sessions].run(None, {name: image})[0]

    if callers == 1:
        return lambda: [one(0, image) for image in images]
    return lambda: list(executor.map(one, range(len(images)), images))


def main() -> None:
    """Measure and report."""
    cores = len(os.sched_getaffinity(0))
    model = resnet50(batch=1)
    (name,) = (port.name for port in model.graph.input)
    rng = np.random.default_rng(0)
    different = [rng.standard_normal((1, 3, 224, 224), dtype=np.float32) for _ in range(8)]
    images = [different[number % len(different)] for number in range(IMAGES)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        onnx.save(model, path)
        contestants = {
            OURS: accelrt_map(model, [{name: image} for image in images], cores),
            QUEUE: async_queue(path, images),
        }
        for threads, callers, sessions in ((1, cores, 1), (cores, 1, 1), (1, cores, cores), (cores, cores, 1)):
            label = f"onnxruntime, {sessions} x {threads} threads, {callers} callers"
            contestants[label] = onnxruntime_callers(path, images, threads=threads, callers=callers, sessions=sessions)
        answers = {label: np.concatenate(run()) for label, run in contestants.items()}  # type: ignore[arg-type]
        samples = interleave(contestants, rounds=ROUNDS)
    table = rows({label: [time / IMAGES for time in times] for label, times in samples.items()}, QUEUE)
    ours = next(row for row in table if row.name == OURS)
    best = min((row for row in table if row.name.startswith("onnxruntime")), key=lambda row: row.median_s)
    apart = max(float(np.linalg.norm(other - answers[QUEUE]) / np.linalg.norm(other)) for other in answers.values())
    claims = {
        f"accelrt takes {ours.ratio:.3f} times as long as OpenVINO's own queue (limit {NEAR:g})": ours.ratio <= NEAR,
        f"accelrt does {best.median_s / ours.median_s:.2f} times as many as {best.name}": ours.median_s < best.median_s,
        f"all agree: relative L2 {apart:.1e} (limit 1e-4)": apart <= 1e-4,
    }
    per_second = {row.name: 1 / row.median_s for row in table}
    for label, rate in per_second.items():
        print(f"{label}: {rate:.1f} images a second")
    report("ResNet-50 offline, time an image", table, claims, extra={"images_per_s": per_second, "window": IMAGES})


if __name__ == "__main__":
    main()
