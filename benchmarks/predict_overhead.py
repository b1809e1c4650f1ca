"""What `Session.predict` costs over `onnxruntime.InferenceSession.run` on a graph of one node.

Claim: at most 2.5 microseconds more, although predict checks dtype, shape and layout and keeps a latency histogram.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
from measure import interleave, report, rows
from onnx import TensorProto, helper

import accelrt

LIMIT_S = 2.5e-6


def main() -> None:
    """Measure and report."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    peer = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.ones(4, np.float32)
    feeds = {"x": x}
    with accelrt.load(model, backend="cpu/onnxruntime") as session:
        samples = interleave(
            {
                "InferenceSession.run": lambda: peer.run(None, feeds),
                "predict(mapping)": lambda: session.predict(feeds),
                "predict(array)": lambda: session.predict(x),
            },
            rounds=25,
            inner=20_000,
        )
    table = rows(samples, "InferenceSession.run")
    cost = {row.name: row.median_s - table[0].median_s for row in table[1:]}
    claims = {f"{name} costs {c * 1e6:.2f} us more (limit 2.5)": c <= LIMIT_S for name, c in cost.items()}
    report("predict on a one-node graph", table, claims, unit="us")


if __name__ == "__main__":
    main()
