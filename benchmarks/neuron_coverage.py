"""How much of a network lands on emulated NeuronCores, by the time that its nodes take on the CPU.

Claim: more than 95 % of the time. What stays on the CPU is timed there by itself, on the values that reach it, and held
against the whole network on the CPU. Nothing is said about the speed of a Neuron device.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from measure import report

import accelrt
from accelrt.graph.load import load_graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.types import numpy_dtype
from accelrt.graph.weights import WeightFile
from accelrt.testing.models import bert_base, densenet121, resnet50

WANTED = 0.95
CALLS = 15
NETWORKS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "ResNet-50": lambda: resnet50(batch=1),
    "DenseNet-121": lambda: densenet121(batch=1),
    "BERT-base, 128 tokens": lambda: bert_base(batch=1, sequence=128),
}


def main() -> None:
    """Measure and report."""
    claims: dict[str, bool] = {}
    for name, build in NETWORKS.items():
        model = build()
        graph = load_graph(model)
        feeds = _draw(graph.signature)
        with accelrt.load(accelrt.compile(model, "cpu/onnxruntime")) as session:
            whole = _seconds(partial(session.predict, feeds))
        for instance in ("inf1.xlarge", "inf2.xlarge"):
            options = {"emulator.instance": instance}
            artifact = accelrt.compile(model, "neuron/emulator", options=options, fallback="allow")
            left = 0.0
            with accelrt.load(artifact) as session:
                for place, (given, _) in zip(artifact.placement.segments, session.trace(feeds), strict=True):
                    if place.engine.startswith("cpu/"):
                        left += _alone(artifact, {node.name for node in place.nodes}, given)
            share = 1 - left / whole
            nodes = artifact.placement.nodes_by_engine
            claims[
                f"{name} on {instance} (emulated): {100 * share:.2f} % of the time on the CPU, "
                f"{nodes.get('neuron/emulator', 0)} of {sum(nodes.values())} nodes (wanted {100 * WANTED:g} %)"
            ] = share > WANTED
    report("Coverage of emulated NeuronCores", [], claims)


def _alone(artifact: accelrt.Artifact, names: set[str], given: Mapping[str, Any]) -> float:
    """Return the seconds that some nodes take on the CPU by themselves, on the values that reached them."""
    graph = artifact.source_graph()
    part = graph.extract([number for number, node in enumerate(graph.nodes) if node.name in names])
    with tempfile.TemporaryDirectory(prefix="accelrt-") as folder:
        with contextlib.closing(WeightFile(Path(folder) / WEIGHTS_FILE)) as weights:
            part.write(Path(folder) / "part.onnx", weights)
        with accelrt.load(accelrt.compile(Path(folder) / "part.onnx", "cpu/onnxruntime")) as session:
            return _seconds(partial(session.predict, {name: given[name] for name in session.signature.input_names}))


def _seconds(run: Callable[[], object]) -> float:
    run()
    samples = []
    for _ in range(CALLS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return median(samples)


def _draw(signature: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        port.name: rng.integers(0, 2, port.type.shape).astype(numpy_dtype(port.type.dtype))
        if port.type.dtype.startswith("int")
        else rng.standard_normal(port.type.shape).astype(numpy_dtype(port.type.dtype))
        for port in signature.inputs
    }


if __name__ == "__main__":
    main()
