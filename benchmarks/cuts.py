"""What tuning the cut of ResNet-50 gives where the accelerator loses: a stand-in for convolutions, on a slow link.

The stand-in computes with onnxruntime, as the CPU does, and hands every input and output over a link of 1 GB a second,
so each of its islands loses. Claim: compiled with ``tune=True`` the model takes at most 1.05 times as long as on the
CPU alone. The untuned cut is shown beside it.
"""

from __future__ import annotations

import time

import numpy as np
from measure import interleave, report, rows

import accelrt
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import resnet50

LIMIT = 1.05
BYTES_PER_S = 1e9


def main() -> None:
    """Measure and report."""
    model = resnet50(batch=1)
    accelrt.register(FakeBackend.configured("slowlink", operators={"Conv"}, bytes_per_s=BYTES_PER_S))
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    start = time.perf_counter()
    tuned = accelrt.compile(model, "slowlink", tune=True, example_inputs=[x], fallback="allow", cache=False)
    seconds = time.perf_counter() - start
    untuned = accelrt.compile(model, "slowlink", fallback="allow")
    alone = accelrt.compile(model, "cpu/onnxruntime")
    sessions = {
        "CPU alone": accelrt.load(alone),
        "tune=True": accelrt.load(tuned),
        "tune=False": accelrt.load(untuned),
    }
    wanted = sessions["CPU alone"].predict(x)["scores"]
    for session in sessions.values():
        np.testing.assert_allclose(session.predict(x)["scores"], wanted, rtol=1e-3, atol=1e-4)
    samples = interleave(
        {name: (lambda session=session: session.predict(x)) for name, session in sessions.items()}, rounds=60
    )
    print(tuned.placement.tuning)
    print(f"compiling with tune=True took {seconds:.1f} s")
    table = rows(samples, "CPU alone")
    segments = {name: len(artifact.placement.segments) for name, artifact in (("tuned", tuned), ("untuned", untuned))}
    claims = {
        f"{segments['untuned']} segments become {segments['tuned']}": segments["tuned"] < segments["untuned"],
        f"tuned: {table[1].ratio:.3f} times the CPU alone (limit {LIMIT})": table[1].ratio <= LIMIT,
    }
    report(
        "ResNet-50, batch 1, convolutions on a slow link",
        table,
        claims,
        extra={"segments": segments, "tune_s": seconds},
    )


if __name__ == "__main__":
    main()
