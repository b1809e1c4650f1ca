"""What it costs to cut ResNet-50 into three segments, all run by onnxruntime, against the uncut model.

The middle third goes to a stand-in that computes with onnxruntime too, so that nothing differs but the cuts.
Claim: at most 1.05 times the latency.
"""

from __future__ import annotations

import numpy as np
from measure import interleave, report, rows

import accelrt
from accelrt.graph.load import load_graph
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import resnet50

LIMIT = 1.05


def main() -> None:
    """Measure and report."""
    model = resnet50(batch=1)
    names = [node.name for node in load_graph(model).nodes]
    middle = set(names[len(names) // 3 : 2 * len(names) // 3])
    accelrt.register(FakeBackend.configured("middle", operators=lambda node: node.name in middle))
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    cut = accelrt.compile(model, "middle", fallback="allow")
    engines = [segment.engine for segment in cut.placement.segments]
    with accelrt.load(cut) as three, accelrt.load(model, backend="cpu/onnxruntime") as one:
        np.testing.assert_allclose(three.predict(x)["scores"], one.predict(x)["scores"], rtol=1e-3, atol=1e-4)
        samples = interleave({"uncut": lambda: one.predict(x), "three segments": lambda: three.predict(x)}, rounds=150)
    table = rows(samples, "uncut")
    claims = {
        f"segments: {', '.join(engines)}": len(engines) == 3,
        f"{table[1].ratio:.3f} times the latency (limit {LIMIT})": table[1].ratio <= LIMIT,
    }
    report("ResNet-50, batch 1, cut into three", table, claims)


if __name__ == "__main__":
    main()
