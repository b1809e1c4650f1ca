"""The child's side of a trial: compile one candidate and hold it against the reference, or load it and time calls.

Everything here runs in a process that may crash, hang or be stopped; arguments and results are plain JSON.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Entry
from accelrt.artifact.manifest import MANIFEST, Manifest
from accelrt.errors import CompileError
from accelrt.registry import REGISTRY
from accelrt.runtime.load import open_session
from accelrt.target import parse
from accelrt.tune.values import read_values

if TYPE_CHECKING:
    from accelrt.backend import Precision
    from accelrt.graph.model import Graph
    from accelrt.graph.types import Value
    from accelrt.registry import Candidate
    from accelrt.runtime.session import Session


def compile_candidate(
    folder: str,
    source: str,
    whole: str | None,
    target: str,
    precision: Precision,
    options: Mapping[str, Any],
    fallback: str,
    source_format: str,
    calls: str,
    wanted: str,
    verification: Mapping[str, Any],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compile a candidate into a folder and verify it.

    Args:
        folder: Where to, empty.
        source: The graph as an ONNX file, in Q/DQ form for int8.
        whole: The folder that holds the source in its framework's own form, for engines that take it so.
        target, precision, options, fallback, source_format: What is asked of the build.
        calls, wanted: Files of the calls to verify with, and of what the reference gave for them.
        verification: The fields of a `Verification` as JSON.
        classes: Backends that the parent registered, as ``module:class``.

    Raises:
        CompileError: It cannot be compiled, or its engine would run nothing of the model.
        AccelrtError: It fails at load or run.
    """
    from accelrt.graph.load import load_graph
    from accelrt.partition.report import apply_policy
    from accelrt.policy import check
    from accelrt.verification import Verification, Verifier

    _register(classes)
    graph = load_graph(Path(source))
    start = time.perf_counter()
    if whole is not None:
        artifact = _build_whole(Path(folder), Path(whole), target, precision, options, source_format)
    else:
        artifact = _build(Path(folder), graph, target, precision, options, source_format)
    compiled = time.perf_counter() - start
    if check(fallback) == "error":
        apply_policy(artifact.placement, "error")
    labels = verification["labels"] and {n: _array(v) for n, v in verification["labels"].items()}
    question = Verification(
        read_values(Path(calls)),
        labels,
        {name: _tolerance(bounds) for name, bounds in verification["tolerance"].items()} or None,
        verification["reference"],
    )
    report = Verifier(graph, question, known=read_values(Path(wanted))).verify(artifact)
    return {
        "compile_s": compiled,
        "elsewhere": artifact.placement.fallen_back,
        "size_bytes": sum(record.size for record in artifact.manifest.files.values()),
        "report": report.to_json(),
    }


def _build(
    folder: Path, graph: Graph, target: str, precision: Precision, options: Mapping[str, Any], source_format: str
) -> Artifact:
    from accelrt import options as option_module
    from accelrt.artifact.build import BuildRequest, build_into
    from accelrt.precision.plan import plan

    candidates, precisions = plan(REGISTRY.candidates(parse(target)), precision)
    _refuse_idle(graph, candidates[0], precision)
    resolved = option_module.resolve(options, candidates)
    request = BuildRequest(target, candidates, resolved, source_format, precision, precisions)
    return build_into(folder, graph, request)


def _build_whole(
    folder: Path, whole: Path, target: str, precision: Precision, options: Mapping[str, Any], source_format: str
) -> Artifact:
    from accelrt import options as option_module
    from accelrt.artifact.whole import WholeRequest, build_whole_into
    from accelrt.sources import open_whole

    candidate = REGISTRY.candidates(parse(target))[0]
    resolved = option_module.resolve(options, (candidate,)).engines[0]
    reason = "it was the best as measured."
    request = WholeRequest(target, candidate, resolved, source_format, reason, precision, precision)
    return build_whole_into(folder, open_whole(whole), request)


def _register(classes: Sequence[str]) -> None:
    for dotted in classes:
        module, _, name = dotted.partition(":")
        REGISTRY.register(getattr(import_module(module), name))


def _refuse_idle(graph: Graph, candidate: Candidate, precision: Precision) -> None:
    """Refuse a candidate whose own engine takes no node: what it compiled to would be another candidate."""
    verdicts = candidate.engine.supports_all(graph.nodes, precision)
    if graph.nodes and not any(verdict.supported for verdict in verdicts):
        (reason, count), *_ = Counter(verdict.reason for verdict in verdicts).most_common(1)
        raise CompileError(
            f"{candidate.name} runs no node of the model in {precision}; "
            f"of {count} of its {len(graph.nodes)} nodes it says: {reason}"
        )


def _array(values: Sequence[int]) -> Any:
    import numpy as np

    return np.asarray(values, np.int64)


def _tolerance(bounds: Mapping[str, Any]) -> Any:
    from accelrt.precision.compare import Tolerance

    return Tolerance(**bounds)


class _Resident:
    """The session that a measuring child keeps between calls, and what it is fed."""

    session: Session
    call: Mapping[str, Value]


def open_candidate(folder: str, calls: str, classes: Sequence[str]) -> None:
    """Load a compiled candidate and keep it, with the first of the calls, for `time_calls`.

    Raises:
        AccelrtError: It cannot be loaded, or fails on the call.
    """
    _register(classes)
    manifest = Manifest.parse((Path(folder) / MANIFEST).read_bytes())
    _Resident.session = open_session(Artifact(Entry(Path(folder), manifest, unfinished=True)), fallback="error")
    _Resident.call = read_values(Path(calls))[0]
    _Resident.session.predict(_Resident.call)


def time_calls(seconds: float, least: int, workers: int) -> dict[str, Any]:
    """Call the resident session for some seconds, and at least so many times, from one thread or several.

    Returns:
        The latency of every call and the time that all took, in nanoseconds, and the peak resident bytes so far.
    """
    session, call = _Resident.session, _Resident.call
    session.predict(call)  # others had the caches meanwhile
    per_worker = -(-least // workers)
    latencies: list[list[int]] = [[] for _ in range(workers)]
    failures: list[BaseException] = []

    def work(samples: list[int]) -> None:
        predict, clock = session.predict, time.perf_counter_ns
        try:
            now = clock()
            end = now + int(seconds * 1e9)
            while now < end or len(samples) < per_worker:
                predict(call)
                before, now = now, clock()
                samples.append(now - before)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asked
            failures.append(error)

    gc.collect()
    start = time.perf_counter_ns()
    if workers == 1:
        work(latencies[0])
    else:
        threads = [threading.Thread(target=work, args=(samples,)) for samples in latencies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elapsed = time.perf_counter_ns() - start
    if failures:
        raise failures[0]
    return {
        "nanoseconds": [sample for samples in latencies for sample in samples],
        "elapsed": elapsed,
        "memory_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """Return the most memory that this process has held, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
