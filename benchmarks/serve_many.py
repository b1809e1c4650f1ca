"""More models than fit: requests for many models, of which the server keeps a few in memory.

Each model multiplies by a number of its own, so that an answer tells which model gave it; each request asks with a
number of its own, so that it tells whose answer it is. Demand follows a power law, as where each tenant has a
model. Claims: no answer is wrong, no request is lost, never more models in memory than allowed, and memory does not
grow in the second half of the run.

    python benchmarks/serve_many.py --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

from accelrt.errors import ModelUnavailable
from accelrt.serve.interface import InferRequest
from accelrt.serve.models import ModelService, ServiceSettings
from accelrt.serve.models.loading import resident_bytes
from accelrt.testing.models import Builder

WIDTH = 256
GROWTH = 1.10


def line(slope: float) -> onnx.ModelProto:
    """y = slope * x."""
    net = Builder("line", 0)
    x = net.input("x", ("batch", WIDTH))
    net.output(net.node("Mul", x, net.weight(np.full(WIDTH, slope, np.float32)), name="y"), ("batch", WIDTH))
    return net.model()


class Run:
    """Counts of one run."""

    def __init__(self) -> None:
        self.right = self.wrong = self.refused = self.most = 0
        self.waits: list[float] = []


async def client(service: ModelService, models: int, until: float, seed: int, run: Run) -> None:
    """Ask one model after another until the time is over."""
    generator = np.random.default_rng(seed)
    while time.monotonic() < until:
        number = min(int(generator.pareto(1.0) * models / 20), models - 1)
        value = float(generator.integers(1, 1000))
        asked = InferRequest({"x": np.full((1, WIDTH), value, np.float32)})
        start = time.perf_counter()
        try:
            model = service.find(f"m{number}") or await service.model(f"m{number}")
            answer = model.infer_now(asked) or await model.infer(asked)
        except ModelUnavailable:
            run.refused += 1
            continue
        run.waits.append(time.perf_counter() - start)
        run.most = max(run.most, service.residency.count)
        right = answer.model_name == f"m{number}" and (answer.outputs["y"] == value * (number + 1)).all()
        run.right, run.wrong = run.right + bool(right), run.wrong + (not right)
        await asyncio.sleep(0)


async def measure(root: Path, models: int, resident: int, seconds: float, clients: int) -> bool:
    """Run, report, and tell whether the claims hold."""
    settings = ServiceSettings((root,), max_resident_models=resident)
    async with ModelService(settings) as service:
        run, middle = Run(), 0
        until = time.monotonic() + seconds
        tasks = [asyncio.create_task(client(service, models, until, seed, run)) for seed in range(clients)]
        await asyncio.sleep(seconds / 2)
        middle = resident_bytes()
        await asyncio.gather(*tasks)
        end = resident_bytes()
        evictions = service.residency.evictions
    waits = np.array(run.waits) * 1e3
    print(f"{models} models, room for {resident}, {clients} clients, {seconds:g} s")
    print(f"{run.right} right, {run.wrong} wrong, {run.refused} refused, {evictions} unloaded to make room")
    print(f"p50 {np.percentile(waits, 50):.3g} ms, p99 {np.percentile(waits, 99):.3g} ms, most {waits.max():.3g} ms")
    print(f"in memory at most {run.most}; resident {middle >> 20} MiB half-way, {end >> 20} MiB at the end")
    return run.wrong == 0 and run.refused == 0 and run.most <= resident and end <= middle * GROWTH


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--resident", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("ACCELRT_CACHE_DIR", str(Path(scratch) / "cache"))
        root = Path(scratch) / "repository"
        root.mkdir()
        for number in range(asked.models):
            onnx.save(line(number + 1), root / f"m{number}.onnx")
        holds = asyncio.run(measure(root, asked.models, asked.resident, asked.minutes * 60, asked.clients))
    print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
