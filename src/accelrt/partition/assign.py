"""Assign every node to the first candidate that supports it, and keep every refusal with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from accelrt.backend import Precision, Verdict
from accelrt.errors import CompileError
from accelrt.graph.node import Node
from accelrt.registry import Candidate


@dataclass(frozen=True, slots=True)
class Assignment:
    """For each node the number of the candidate that runs it, and the verdicts that led there.

    ``verdicts[c][n]`` is candidate c's answer about node n, None where it was not asked: no candidate after the
    first is asked about what an earlier one takes, unless islands are merged later.
    """

    owners: tuple[int, ...]
    verdicts: tuple[tuple[Verdict | None, ...], ...]


def assign(
    nodes: Sequence[Node],
    candidates: Sequence[Candidate],
    precisions: Sequence[Precision],
    refused: Mapping[tuple[int, int], str] = MappingProxyType({}),
) -> Assignment:
    """Ask the candidates in order.

    Args:
        nodes: The graph's nodes.
        candidates: Best first.
        precisions: For each candidate, the precision it would compute in.
        refused: Pairs of candidate and node that are not asked, with the reason: what failed to compile earlier.

    Raises:
        CompileError: A node that no candidate supports, with every candidate's reason.
    """
    verdicts: list[list[Verdict | None]] = [[None] * len(nodes) for _ in candidates]
    owners = [-1] * len(nodes)
    open_nodes = list(range(len(nodes)))
    for number, (candidate, precision) in enumerate(zip(candidates, precisions, strict=True)):
        if not open_nodes:
            break
        for index in open_nodes:
            if (reason := refused.get((number, index))) is not None:
                verdicts[number][index] = Verdict.refuse(reason)
        asked = [index for index in open_nodes if verdicts[number][index] is None]
        answers = candidate.engine.supports_all([nodes[index] for index in asked], precision)
        for index, verdict in zip(asked, answers, strict=True):
            verdicts[number][index] = verdict
            if verdict.supported:
                owners[index] = number
        open_nodes = [index for index in open_nodes if owners[index] < 0]
    if open_nodes:
        _refuse(nodes[open_nodes[0]], len(open_nodes), candidates, [row[open_nodes[0]] for row in verdicts])
    return Assignment(tuple(owners), tuple(map(tuple, verdicts)))


def _refuse(node: Node, count: int, candidates: Sequence[Candidate], verdicts: Sequence[Verdict | None]) -> None:
    reasons = "; ".join(
        f"{candidate.name}: {verdict.reason}"
        for candidate, verdict in zip(candidates, verdicts, strict=True)
        if verdict
    )
    others = f" and {count - 1} more nodes" if count > 1 else ""
    raise CompileError(f"No engine can run node {node.name!r} ({node.kind}){others}. {reasons}.")
