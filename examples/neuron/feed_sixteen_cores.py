"""Sixteen emulated cores of an inf1.6xlarge, fed by session.map and by a thread pool of one's own.

The emulator computes on the CPU: what is shown is that every core gets its share and every answer is right, not how
fast an Inferentia is.

python examples/neuron/feed_sixteen_cores.py
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import accelrt
from accelrt.testing.models import small_cnn

CORES = 16
CALLS = 480
CALLERS = 2 * CORES
"""Twice as many as cores: while one call is computed, the next one is on its way."""


def show(title: str, before: list[int], session: accelrt.Session) -> list[int]:
    """Print how many calls each core has answered since last time; return the counts."""
    counts = [replica.calls for replica in session.stats().replicas]
    print(f"{title}: {' '.join(str(now - then) for now, then in zip(counts, before, strict=True))}")
    return counts


def main() -> None:
    """Compile once, load sixteen copies, feed them in both ways, and compare with the CPU."""
    model = small_cnn(batch=1)
    artifact = accelrt.compile(model, "neuron/emulator", options={"instance": "inf1.6xlarge", "threads": 1})
    print("Placement:", artifact.placement.nodes_by_engine, "(emulated)")
    (port,) = artifact.signature.inputs
    rows = np.random.default_rng(0).standard_normal((CALLS, *port.type.shape[1:]), np.float32)
    items = [row[None] for row in rows]
    with accelrt.load(model, backend="cpu") as session:
        expected = [next(iter(outputs.values())) for outputs in session.map(items)]
    with accelrt.load(artifact, devices=f"0-{CORES - 1}") as session:
        print("Loaded:", ", ".join(replica.devices[0] for replica in session.stats().replicas))
        # The session's own threads: reads ahead a little, yields in order.
        mapped = [next(iter(outputs.values())) for outputs in session.map(items)]
        counts = show("Calls by core, session.map", [0] * CORES, session)
        # Threads of one's own, as a server has them: predict takes a core that is idle, or waits for one.
        with ThreadPoolExecutor(CALLERS) as pool:
            called = [next(iter(outputs.values())) for outputs in pool.map(session.predict, items)]
        show("Calls by core, ThreadPoolExecutor", counts, session)
    if not np.array_equal(mapped, called):
        sys.exit("The two ways gave different answers.")
    error = float(np.linalg.norm(np.subtract(called, expected)) / np.linalg.norm(expected))
    if error > 0.05:
        sys.exit(f"The answers are not those of the CPU: relative error {error:.1e}.")
    print(f"{CALLS} answers, in order, the same both ways; relative error of bf16 against float32 below 5e-2.")
    print("Emulated on the CPU: this says nothing about the speed of an Inferentia.")


if __name__ == "__main__":
    main()
