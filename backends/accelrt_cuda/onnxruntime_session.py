"""How sessions of onnxruntime on CUDA are made, and what onnxruntime gave to which provider."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from accelrt_cuda.onnxruntime_options import CPU, CUDA, TENSORRT, CudaOnnxRuntimeOptions, providers_of

ERRORS_ONLY, FATAL_ONLY = 3, 4


@cache
def runtime(module: str) -> Any:
    """Return onnxruntime with NVIDIA's libraries loaded, from their Python packages where those are installed."""
    ort = importlib.import_module(module)
    ort.disable_telemetry_events()  # the wheel otherwise keeps a database of events in the user's cache
    if (preload := getattr(ort, "preload_dlls", None)) is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, which `status` tells better
            preload()
    return ort


@dataclass(frozen=True, slots=True)
class Assigned:
    """One node as onnxruntime placed it; ``provider`` is onnxruntime's name of it."""

    provider: str
    name: str
    op_type: str
    domain: str


def session(
    ort: Any,
    model: str | bytes,
    options: CudaOnnxRuntimeOptions,
    device_id: int,
    *,
    optimise: bool = True,
    quiet: bool = False,
) -> Any:
    """Return a session whose node assignments can be read back.

    Raises:
        Whatever onnxruntime raises. With ``cpu_nodes="none"`` also if a node would be on the CPU.
    """
    chosen = ort.SessionOptions()
    chosen.log_severity_level = FATAL_ONLY if quiet else ERRORS_ONLY
    chosen.intra_op_num_threads = 1  # the CPU launches kernels; a pool of threads would only spin
    chosen.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if options.cpu_nodes == "none" or options.enable_cuda_graph:
        chosen.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if not optimise:
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Without enable_fallback=0, onnxruntime's Python would print an error and make the session on the CPU.
    return ort.InferenceSession(model, chosen, providers=providers_of(options, device_id), enable_fallback=0)


def absent_provider(made: Any, options: CudaOnnxRuntimeOptions) -> str | None:
    """Return which provider a session was asked for and has not, None if it has all.

    onnxruntime drops a provider whose libraries it cannot load, with no more than a line in its log.
    """
    wanted = [name for name, _ in providers_of(options, 0)]
    return next((name for name in wanted if name not in made.get_providers()), None)


def assignments(made: Any) -> list[Assigned]:
    """Return where every node of a session is, as onnxruntime tells."""
    return [
        Assigned(str(part.ep_name), str(node.name), str(node.op_type), str(node.domain))
        for part in made.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def strays(placed: Sequence[Assigned], shape_nodes: frozenset[str], options: CudaOnnxRuntimeOptions) -> list[Assigned]:
    """Return nodes that are on the CPU and may not be.

    Args:
        placed: What `assignments` told.
        shape_nodes: Names of the nodes that compute shapes.
        options: Say what may be there.
    """
    on_cpu = [node for node in placed if node.provider not in (CUDA, TENSORRT)]
    if options.cpu_nodes == "any":
        return []
    if options.cpu_nodes == "none":
        return on_cpu
    return [node for node in on_cpu if node.name not in shape_nodes]


def remark(placed: Sequence[Assigned], options: CudaOnnxRuntimeOptions) -> str:
    """Return a sentence about what onnxruntime placed elsewhere than on CUDA, empty if there is nothing to say."""
    parts = []
    on_cpu = [node for node in placed if node.provider == CPU]
    if on_cpu:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(n.op_type for n in on_cpu).most_common(6))
        what = "that compute shapes " if options.cpu_nodes == "shapes" else ""
        parts.append(f"onnxruntime keeps {len(on_cpu)} nodes {what}on the CPU: {kinds}")
    if options.execution_provider == "tensorrt":
        count = sum(node.provider == TENSORRT for node in placed)
        parts.append(f"{count} nodes by TensorRT, {len(placed) - count - len(on_cpu)} by CUDA")
    return "; ".join(parts)


def shape_nodes(proto: Any) -> frozenset[str]:
    """Return the names of a model's nodes that compute nothing but shapes.

    They read outputs of Shape and Size, constants, and each other. What reads a value of the model, even a whole
    number, is not among them: it computes with data.
    """
    known = {tensor.name for tensor in proto.graph.initializer}
    found: set[str] = set()
    derived: set[str] = set()
    for node in proto.graph.node:
        reads = [name for name in node.input if name]
        if node.domain in ("", "ai.onnx") and node.op_type in ("Shape", "Size"):
            derived.update(node.output)
            found.add(node.name)
        elif node.domain in ("", "ai.onnx") and node.op_type == "Constant":
            known.update(node.output)
            found.add(node.name)
        elif _has_body(node):
            continue
        elif any(name in derived for name in reads) and all(name in derived or name in known for name in reads):
            derived.update(node.output)
            found.add(node.name)
    return frozenset(found - {""})


def _has_body(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def to_json(placed: Sequence[Assigned]) -> list[Mapping[str, str]]:
    """Return assignments as plain data, for a child process's reply."""
    return [
        {"provider": node.provider, "name": node.name, "op_type": node.op_type, "domain": node.domain}
        for node in placed
    ]
