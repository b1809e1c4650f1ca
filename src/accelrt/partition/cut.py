"""Cut a graph into convex segments, each run by one engine, acyclic by construction.

Nodes are emitted by Kahn's algorithm with one ready queue per engine: the queue of the current engine is drained until
it is empty, which is one segment, then another engine takes over. A node is emitted after all its producers, so
segments depend on earlier segments only. Two segments in a row never belong to the same engine.

With two engines, draining yields the fewest segments of any order that begins with the same engine: whatever order one
takes, what it has emitted after k switches is a subset of what draining has emitted after k switches. Both beginnings
are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from accelrt.graph.node import Node


@dataclass(frozen=True, slots=True)
class Piece:
    """Nodes, by index in topological order, that one candidate runs together."""

    owner: int
    nodes: tuple[int, ...]


def cut(nodes: Sequence[Node], owners: Sequence[int]) -> list[Piece]:
    """Cut a graph into the pieces its owners run, in an order in which they can run.

    Args:
        nodes: In topological order.
        owners: For each node, the number of the candidate that runs it.

    Returns:
        The cut with the fewest pieces found, and among those the one with the fewest pieces off candidate 0's
        fallbacks: equal counts are decided for fewer visits to lower-numbered (accelerator) candidates.
    """
    links = _Links.of(nodes)
    attempts = (_drain(links, owners, start) for start in sorted(set(owners)))
    return min(attempts, key=_badness, default=[])


def _badness(pieces: list[Piece]) -> tuple[int, int, list[int]]:
    owners = [piece.owner for piece in pieces]
    return len(pieces), sum(1 for owner in owners if owner != max(owners)), owners


@dataclass(frozen=True, slots=True)
class _Links:
    """How many producers each node waits for, and who waits for it."""

    waiting: tuple[int, ...]
    consumers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> _Links:
        producer = {name: index for index, node in enumerate(nodes) for name in node.writes}
        waiting: list[int] = []
        consumers: list[list[int]] = [[] for _ in nodes]
        for index, node in enumerate(nodes):
            producers = {producer[name] for name in node.reads if name in producer}
            waiting.append(len(producers))
            for source in producers:
                consumers[source].append(index)
        return cls(tuple(waiting), tuple(map(tuple, consumers)))


class _Frontier:
    """The state of one drain: what is ready, by owner, and what still waits."""

    def __init__(self, links: _Links, owners: Sequence[int]) -> None:
        self._links, self._owners = links, owners
        self._waiting = list(links.waiting)
        self.ready: dict[int, list[int]] = {owner: [] for owner in set(owners)}
        for index, count in enumerate(links.waiting):
            if count == 0:
                heappush(self.ready[owners[index]], index)

    def drain(self, owner: int) -> tuple[int, ...]:
        """Emit all that ``owner`` can run now, and what becomes ready for it meanwhile."""
        queue, emitted = self.ready[owner], []
        while queue:
            index = heappop(queue)
            emitted.append(index)
            for consumer in self._links.consumers[index]:
                self._waiting[consumer] -= 1
                if self._waiting[consumer] == 0:
                    heappush(self.ready[self._owners[consumer]], consumer)
        return tuple(emitted)

    def reach(self, owner: int) -> int:
        """Count what `drain` would emit."""
        waiting: dict[int, int] = {}
        stack, count = list(self.ready[owner]), 0
        while stack:
            index = stack.pop()
            count += 1
            for consumer in self._links.consumers[index]:
                waiting[consumer] = waiting.get(consumer, self._waiting[consumer]) - 1
                if waiting[consumer] == 0 and self._owners[consumer] == owner:
                    stack.append(consumer)
        return count


def largest_drain(frontier: _Frontier, ready: Sequence[int]) -> int:
    """Choose who is next among several engines with work: the one that gets furthest, the lower-numbered on a tie.

    With two engines there is nothing to choose; with more, the fewest segments is a hard problem and this a heuristic.
    """
    return max(ready, key=lambda owner: (frontier.reach(owner), -owner))


def _drain(
    links: _Links,
    owners: Sequence[int],
    start: int,
    choose: Callable[[_Frontier, Sequence[int]], int] = largest_drain,
) -> list[Piece]:
    frontier = _Frontier(links, owners)
    pieces: list[Piece] = []
    current: int | None = start if frontier.ready.get(start) else None
    while True:
        if current is None:
            ready = sorted(owner for owner, queue in frontier.ready.items() if queue)
            if not ready:
                return pieces
            current = ready[0] if len(ready) == 1 else choose(frontier, ready)
        pieces.append(Piece(current, frontier.drain(current)))
        current = None
