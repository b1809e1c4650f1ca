"""What two replicas gain over one on ResNet-50, and what `Session.submit` costs.

Claims: with one thread each on a machine of two cores or more, two replicas answer at least 1.9 times as many calls as
one; bare onnxruntime, two sessions and two threads against one of each, says what the machine allows. And `submit`
costs at most 30 microseconds more than `ThreadPoolExecutor.submit`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from measure import Row, interleave, report, rows
from onnx import TensorProto, helper

import accelrt
from accelrt.artifact.store import program_files
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import resnet50

GAIN = 1.9
LIMIT_S = 30e-6
CALLS = 60
"""Even, and many: at the end of a batch one replica waits for the other, by half a call on average."""
ROUNDS = 9
SUBMITS = 500
"""Fewer than may wait, so that no submit waits for a thread."""


def main() -> None:
    """Measure and report."""
    table, claims = throughput()
    submits, more = submit_cost()
    table += submits
    claims |= more
    report("Scheduler: seconds a call", table, claims, extra={"calls": CALLS, "submits": SUBMITS})


def throughput() -> tuple[list[Row], dict[str, bool]]:
    """Time CALLS calls on one and on two replicas, accelrt's and bare onnxruntime's, in turns."""
    model = resnet50(batch=1)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    artifact = accelrt.compile(model, "cpu/onnxruntime", options={"threads": 1})
    feeds = {artifact.signature.input_names[0]: x}
    with (
        accelrt.load(artifact, replicas=1, workers=1) as one,
        accelrt.load(artifact, replicas=2, workers=2) as two,
    ):
        bare = [_bare(artifact) for _ in range(2)]

        def by_map(session: accelrt.Session) -> Callable[[], object]:
            return lambda: sum(1 for _ in session.map(feeds for _ in range(CALLS)))

        def by_threads(count: int) -> Callable[[], object]:
            def run() -> None:
                threads = [threading.Thread(target=_repeat, args=(s, feeds, CALLS // count)) for s in bare[:count]]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            return run

        seconds = interleave(
            {
                "onnxruntime, 1 session": by_threads(1),
                "onnxruntime, 2 sessions": by_threads(2),
                "accelrt, 1 replica": by_map(one),
                "accelrt, 2 replicas": by_map(two),
            },
            rounds=ROUNDS,
            warmup=1,
        )
    samples = {name: [value / CALLS for value in values] for name, values in seconds.items()}
    base = rows(samples, "onnxruntime, 1 session")[:2]
    ours = rows(samples, "accelrt, 1 replica")[2:]
    gain, machine = 1 / ours[1].ratio, 1 / base[1].ratio
    claim = f"two replicas answer {gain:.2f} times as many calls as one (at least {GAIN}; onnxruntime {machine:.2f})"
    return base + ours, {claim: gain >= GAIN}


def submit_cost() -> tuple[list[Row], dict[str, bool]]:
    """Time a submit while the threads wait at a gate, so that nothing is computed meanwhile."""
    gate = threading.Event()

    def held(*_: object) -> float:
        gate.wait()
        return 0.0

    accelrt.register(FakeBackend.configured("gate", latency_s=held))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    feeds = {"x": np.ones(4, np.float32)}
    samples: dict[str, list[float]] = {"ThreadPoolExecutor.submit": [], "Session.submit": []}
    with accelrt.load(model, backend="gate", workers=2) as session, ThreadPoolExecutor(2) as pool:
        submits: dict[str, Callable[[], Future[Any]]] = {
            "ThreadPoolExecutor.submit": lambda: pool.submit(held, feeds),
            "Session.submit": lambda: session.submit(feeds),
        }
        for turn in range(2 * ROUNDS + 2):
            name = list(submits)[turn % 2]
            submit = submits[name]
            gate.clear()
            submit(), submit()
            start = time.perf_counter()
            futures = [submit() for _ in range(SUBMITS)]
            seconds = (time.perf_counter() - start) / SUBMITS
            gate.set()
            for future in futures:
                future.result()
            if turn >= 2:  # the first of each makes the threads
                samples[name].append(seconds)
    table = rows(samples, "ThreadPoolExecutor.submit")
    cost = table[1].median_s - table[0].median_s
    return table, {f"submit costs {cost * 1e6:.1f} us more (limit {LIMIT_S * 1e6:.0f})": cost <= LIMIT_S}


def _bare(artifact: accelrt.Artifact) -> onnxruntime.InferenceSession:
    """Open the very program that accelrt runs, with the same options, without accelrt."""
    (program,) = program_files(artifact.folder, artifact.manifest.segments[0]).values()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(program), options, providers=["CPUExecutionProvider"])


def _repeat(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray], count: int) -> None:
    for _ in range(count):
        session.run(None, feeds)


if __name__ == "__main__":
    main()
