"""The contestants of `auto.py`, each in a process of its own: made once, then called when it is their turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_WARM = 2
"""Calls of a turn that are not counted: the others had the caches, and their threads may still spin."""


class _Kept:
    run: Callable[[], Sequence[Any]]


def accelrt(inputs: str, outputs: str, model: str) -> None:
    """Load an artifact that auto made."""
    import accelrt

    session, feeds = accelrt.load(model, trust=True), _feeds(inputs)
    _keep(lambda: list(session.predict(feeds).values()), outputs)


def onnxruntime(inputs: str, outputs: str, model: str, threads: int) -> None:
    """Make onnxruntime's default session, or one of so many threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session, feeds = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), _feeds(inputs)
    _keep(lambda: session.run(None, feeds), outputs)


def openvino(inputs: str, outputs: str, model: str, hint: str) -> None:
    """Compile with OpenVINO for latency, in the precision of the hint."""
    import openvino

    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    compiled = openvino.Core().compile_model(model, "CPU", properties)
    request, feeds = compiled.create_infer_request(), _feeds(inputs)
    names = [output.get_any_name() for output in compiled.outputs]

    def run() -> list[Any]:
        found = request.infer(feeds, share_inputs=True)
        return [found[name] for name in names]

    _keep(run, outputs)


def torch(inputs: str, outputs: str, model: str, way: str, precision: str) -> None:
    """Lower the graph to a module; run it eagerly, or compiled by torch.compile, in bf16 under autocast."""
    from pathlib import Path

    import torch
    import torch._inductor.config

    from accelrt.graph.load import load_graph
    from accelrt.graph.lowering import lower

    graph, feeds = load_graph(Path(model)), _feeds(inputs)
    arguments = [torch.from_numpy(feeds[name]) for name in graph.signature.input_names]
    module: Any = lower(graph).module.eval()
    if way == "compiled":
        # One of its patterns takes the scale of BERT's attention for a number, and fails on the tensor that it is.
        torch._inductor.config.pattern_matcher = not any(node.op_type == "Softmax" for node in graph.nodes)
        module = torch.compile(module)

    def run() -> list[Any]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return [output.float().numpy() for output in module(*arguments)]

    _keep(run, outputs)


def time_calls(calls: int) -> list[float]:
    """Return the seconds of so many calls."""
    for _ in range(_WARM):
        _Kept.run()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        _Kept.run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _feeds(path: str) -> Mapping[str, Any]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _keep(run: Callable[[], Sequence[Any]], outputs: str) -> None:
    _Kept.run = staticmethod(run)
    np.savez(outputs, *run())
