"""Measure the stages of a pipeline, so that the next compile can cut them more evenly."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.parts import variant
from accelrt.errors import OptionError
from accelrt.runtime.load import open_session

if TYPE_CHECKING:
    from accelrt.partition.stages import StagePlan


def segment_seconds(artifact: Artifact, calls: Iterable[Any], *, repeat: int = 5) -> list[float]:
    """Time each segment of an artifact on its own: the least of all runs, in seconds, after one to warm up.

    Args:
        artifact: Not for several batch sizes; see `accelrt.artifact.parts.variant`.
        calls: Inputs, each a mapping by name, a tuple in order or the value of a single input.
        repeat: Runs of each call.

    Raises:
        OptionError: There are no calls.
        AccelrtError: It cannot be loaded, or a call fails.
    """
    best = [float("inf")] * len(artifact.manifest.segments)
    with open_session(artifact, fallback="error") as session:
        for call in calls:
            given = call if isinstance(call, tuple) else (call,)
            for number in range(repeat + 1):
                start = time.perf_counter()
                for segment, _ in enumerate(session.trace(*given)):
                    if number:
                        best[segment] = min(best[segment], time.perf_counter() - start)
                    start = time.perf_counter()
    if float("inf") in best:
        raise OptionError("There are no calls to time the segments with.", hint="Pass typical inputs, one at least.")
    return best


def measured_plan(artifact: Artifact, calls: Iterable[Any], *, repeat: int = 5) -> StagePlan:
    """Return a plan for as many stages as a pipeline has, whose nodes cost what the stages were measured to take.

    A segment's time is shared among its nodes as their estimates are, so the plan is right on the whole and as good as
    the estimate within a stage. Compile with it, and measure again if the stages are still uneven.

    Args:
        artifact: A pipeline; of one for several batch sizes the largest is measured.
        calls: As for `segment_seconds`; for several batch sizes, of as many rows as the largest.
        repeat: Runs of each call.

    Raises:
        OptionError: The artifact is no pipeline, or there are no calls.
        ArtifactError: It was saved without its source.
        AccelrtError: It cannot be loaded, or a call fails.
    """
    from accelrt.partition.stages import StagePlan, node_costs

    if not artifact.manifest.stages:
        raise OptionError("The artifact is no pipeline.", hint="Compile it with cores=.")
    if sizes := artifact.manifest.batch_sizes:
        artifact = variant(artifact, sizes[-1])
    graph = artifact.source_graph()
    by_name = {node.name: node for node in graph.nodes}
    costs: dict[str, float] = {}
    seconds = segment_seconds(artifact, calls, repeat=repeat)
    for segment, took in zip(artifact.placement.segments, seconds, strict=True):
        nodes = [by_name[place.name] for place in segment.nodes]
        estimates = node_costs(graph, nodes)
        whole = sum(estimates) or 1.0
        costs.update((node.name, took * cost / whole) for node, cost in zip(nodes, estimates, strict=True))
    return StagePlan(artifact.manifest.stages, costs)
