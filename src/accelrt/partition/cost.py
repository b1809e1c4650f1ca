"""Merge islands that lose: a few nodes on an accelerator are rarely worth two transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from accelrt.backend import Precision, Verdict
from accelrt.graph.node import Node
from accelrt.partition.assign import Assignment
from accelrt.partition.cut import Piece, cut
from accelrt.registry import Candidate


@dataclass(frozen=True, slots=True)
class Partition:
    """A finished cut: pieces in the order in which they run, and the verdicts behind them.

    ``stages`` holds for each piece the stage of the pipeline that it belongs to; empty if the model is no pipeline.
    """

    pieces: tuple[Piece, ...]
    verdicts: tuple[tuple[Verdict | None, ...], ...]
    stages: tuple[int, ...] = ()


def partition(
    nodes: Sequence[Node],
    assignment: Assignment,
    candidates: Sequence[Candidate],
    precisions: Sequence[Precision],
    min_segment_nodes: int = 1,
    refused: Mapping[tuple[int, int], str] = MappingProxyType({}),
) -> Partition:
    """Cut, then return islands of fewer than ``min_segment_nodes`` nodes to a later candidate, until none is left.

    An island moves as a whole, to the first later candidate that supports all of it and is no last resort; if
    there is none it stays. Each move raises a node's candidate number, so this ends. ``refused`` is as for `assign`:
    nothing moves to where it failed to compile.
    """
    owners = list(assignment.owners)
    verdicts = [list(row) for row in assignment.verdicts]
    settled: set[tuple[int, ...]] = set()
    while True:
        pieces = cut(nodes, owners)
        islands = [p for p in pieces if len(p.nodes) < min_segment_nodes and p.nodes not in settled]
        if not islands or len(pieces) == 1:
            return Partition(tuple(pieces), tuple(map(tuple, verdicts)))
        # One engine's islands at a time, since what they leave for may thereby cease to be islands.
        lowest = min(island.owner for island in islands)
        for island in islands:
            if island.owner != lowest:
                continue
            heir = _heir(nodes, island, candidates, precisions, verdicts, refused)
            if heir is None:
                settled.add(island.nodes)
                continue
            for index in island.nodes:
                owners[index] = heir
                verdicts[island.owner][index] = Verdict.refuse(
                    f"supported, but in an island of {len(island.nodes)} nodes where {min_segment_nodes} are wanted"
                )


def _heir(
    nodes: Sequence[Node],
    island: Piece,
    candidates: Sequence[Candidate],
    precisions: Sequence[Precision],
    verdicts: list[list[Verdict | None]],
    refused: Mapping[tuple[int, int], str],
) -> int | None:
    for number in range(island.owner + 1, len(candidates)):
        engine = candidates[number].engine
        if engine.caps.last_resort or any((number, index) in refused for index in island.nodes):
            continue
        answers = engine.supports_all([nodes[index] for index in island.nodes], precisions[number])
        for index, verdict in zip(island.nodes, answers, strict=True):
            verdicts[number][index] = verdict
        if all(verdict.supported for verdict in answers):
            return number
    return None
