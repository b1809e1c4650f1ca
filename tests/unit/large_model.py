"""Compile, save, load and run a model of more than 2 GiB; print its peak memory and that of onnxruntime alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

LAYERS, WIDTH = 9, 8192  # 9 x 8192 x 8192 x 4 bytes = 2.4 GB

PEAK = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
ONNXRUNTIME = (
    "import sys, numpy as np, onnxruntime; s = onnxruntime.InferenceSession(sys.argv[1]);"
    "print(s.run(None, {'x': np.ones((1, WIDTH), np.float32)})[0].sum());".replace("WIDTH", str(WIDTH))
    + PEAK
)
COMPILE = "import sys, accelrt; accelrt.compile(sys.argv[1]).save(sys.argv[2]);" + PEAK
PREDICT = (
    "import sys, numpy as np, accelrt; s = accelrt.load(sys.argv[1]);"
    "print(s.predict(np.ones((1, WIDTH), np.float32))['y'].sum());".replace("WIDTH", str(WIDTH))
    + PEAK
)


def write(path: Path) -> int:
    """Write the model with its weights beside it, a layer at a time; return their bytes."""
    nodes, initializers, name = [], [], "x"
    rng = np.random.default_rng(0)
    with path.with_name("large.bin").open("wb") as file:
        for layer in range(LAYERS):
            weight = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "large.bin"), ("offset", file.tell()), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(weight.tobytes())
            initializers.append(tensor)
            output = "y" if layer == LAYERS - 1 else f"h{layer}"
            nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [output]))
            name = output
        total = file.tell()
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "large", ports[:1], ports[1:], initializers)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), path)
    return total


def run(code: str, *arguments: str) -> list[float]:
    """Run code in a process of its own and return the numbers it printed."""
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return [float(line) for line in out.stdout.split()]


folder = Path(sys.argv[1])
weights = write(folder / "large.onnx")
(compile_peak,) = run(COMPILE, str(folder / "large.onnx"), str(folder / "large.accel"))
total, predict_peak = run(PREDICT, str(folder / "large.accel"))
peer_total, peer_peak = run(ONNXRUNTIME, str(folder / "large.onnx"))
print(
    json.dumps(
        {
            "weights": weights,
            "artifact": (folder / "large.accel").stat().st_size,
            "compile_peak": int(compile_peak) << 10,
            "accelrt_peak": int(predict_peak) << 10,
            "onnxruntime_peak": int(peer_peak) << 10,
            "right": bool(np.isclose(total, peer_total, rtol=1e-3)),
        }
    )
)
