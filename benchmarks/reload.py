"""Loading a saved model with a warm cache, against the fastest that onnxruntime itself can do.

onnxruntime's rivals are its optimised model with weights inside, and with weights in a file beside it, its fastest.
Both are measured up to the session and up to the first answer, since weights that are mapped are paid for when they are
first touched. Peak memory is that of a fresh process that loads and answers once.
Claims, for ResNet-50 and BERT-base: at most 1.3 times the time and 1.3 times the peak memory of the fastest.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from measure import Row, in_fresh_process, interleave, report, rows

import accelrt
from accelrt.testing.models import bert_base, resnet50

LIMIT = 1.3
PROVIDERS = ["CPUExecutionProvider"]

PEAK = """
import sys
import numpy as np
kind, path, feeds = sys.argv[1], sys.argv[2], dict(np.load(sys.argv[3]))
if kind == "accelrt":
    import accelrt
    accelrt.load(path).predict(feeds)
else:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
# Not ru_maxrss: that one begins with what the parent had when it forked.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def optimised(model: bytes, folder: Path, *, external: bool) -> Path:
    """Let onnxruntime write its optimised model, with weights inside or beside it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = folder / ("beside.onnx" if external else "inside.onnx")
    options.optimized_model_filepath = str(path)
    if external:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "beside.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    onnxruntime.InferenceSession(model, options, providers=PROVIDERS)
    return path


def reload(path: Path) -> onnxruntime.InferenceSession:
    """Load an optimised model without optimising it again."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)


def measure(name: str, model: bytes, feeds: dict[str, np.ndarray], folder: Path) -> tuple[list[Row], dict[str, bool]]:
    """Measure one model."""
    folder.mkdir()
    accel = accelrt.compile(model, "cpu/onnxruntime").save(folder / "model.accel")
    inside, beside = optimised(model, folder, external=False), optimised(model, folder, external=True)
    (folder / "model.onnx").write_bytes(model)
    np.savez(folder / "feeds.npz", **feeds)
    samples = interleave(
        {
            f"{name}: plain ONNX": lambda: onnxruntime.InferenceSession(
                str(folder / "model.onnx"), providers=PROVIDERS
            ),
            f"{name}: optimised, weights inside": lambda: reload(inside),
            f"{name}: optimised, weights beside": lambda: reload(beside),
            f"{name}: accelrt.load": lambda: accelrt.load(accel),
            f"{name}: weights beside, first answer": lambda: reload(beside).run(None, feeds),
            f"{name}: accelrt, first answer": lambda: accelrt.load(accel).predict(feeds),
        },
        rounds=25,
    )
    fastest = f"{name}: optimised, weights beside"
    table = rows(samples, fastest)
    by_name = {row.name: row for row in table}
    load = by_name[f"{name}: accelrt.load"].ratio
    answer = (
        by_name[f"{name}: accelrt, first answer"].median_s / by_name[f"{name}: weights beside, first answer"].median_s
    )
    peaks = {}
    for kind, path in (("accelrt", accel), ("onnxruntime", beside)):
        runs = [int(in_fresh_process(PEAK, kind, str(path), str(folder / "feeds.npz"))) for _ in range(3)]
        peaks[kind] = min(runs)
    memory = peaks["accelrt"] / peaks["onnxruntime"]
    return table, {
        f"{name}: load {load:.2f} times the fastest of onnxruntime (limit {LIMIT})": load <= LIMIT,
        f"{name}: load and first answer {answer:.2f} times (limit {LIMIT})": answer <= LIMIT,
        f"{name}: peak memory {peaks['accelrt'] >> 10} against {peaks['onnxruntime'] >> 10} MiB, "
        f"{memory:.2f} times (limit {LIMIT})": memory <= LIMIT,
    }


def main() -> None:
    """Measure and report."""
    rng = np.random.default_rng(0)
    image = {"image": rng.standard_normal((1, 3, 224, 224), dtype=np.float32)}
    tokens = {
        "input_ids": rng.integers(0, 30522, (1, 128)),
        "attention_mask": np.ones((1, 128), np.int64),
        "token_type_ids": np.zeros((1, 128), np.int64),
    }
    table: list[Row] = []
    claims: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model, feeds in (("ResNet-50", resnet50(), image), ("BERT-base", bert_base(), tokens)):
            part, held = measure(name, model.SerializeToString(), feeds, Path(scratch) / name)
            table += part
            claims |= held
    report("loading a saved model, warm", table, claims)


if __name__ == "__main__":
    sys.exit(main())
