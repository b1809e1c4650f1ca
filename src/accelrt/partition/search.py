"""Search for the fastest cut, given a way to time one: which islands of the requested engine return to the CPU.

The gain of moving an island is not its own alone: its neighbours on the CPU grow together with it, and what the CPU
fuses then is known only once it was measured. So times of single islands say what to try first, and whole models
timed say what is kept. The search itself knows no clock: the same times lead to the same cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from accelrt.backend import SUPPORTED, Precision, Verdict
from accelrt.graph.node import Node
from accelrt.partition.cost import Partition
from accelrt.partition.cut import Piece
from accelrt.partition.report import MEASURED, human_seconds
from accelrt.registry import CPU, Candidate

Owners = tuple[int, ...]

MAX_UNITS = 8
"""Islands move in at most so many units; a deeper model moves more of them at a time."""
MAX_CUTS = 12
"""Whole cuts that are timed at most, the two anchors included."""
WORTH = 0.02
"""A cut must be faster by this share before the search goes on from it: below that, timings of a shared machine
do not agree with themselves."""


@dataclass(frozen=True, slots=True)
class Island:
    """A piece on the requested engine that could as well run on the CPU.

    Attributes:
        piece: The nodes, as first cut.
        heir: The number of the candidate that would take them.
        there: Seconds a call on the requested engine, transfer included.
        here: Seconds a call on the heir, alone; None where that was not measured.
    """

    piece: Piece
    heir: int
    there: float
    here: float | None


@dataclass(frozen=True, slots=True)
class Unit:
    """Islands that move together."""

    islands: tuple[Island, ...]

    @property
    def there(self) -> float:
        """Seconds a call on the requested engine, all islands together."""
        return sum(island.there for island in self.islands)

    @property
    def here(self) -> float | None:
        """Seconds a call on the CPU, each island alone; None unless all were measured."""
        times = [island.here for island in self.islands]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def gain(self) -> float:
        """Seconds a call that moving promises, negative if it loses; unmeasured islands promise nothing."""
        return sum(island.there - island.here for island in self.islands if island.here is not None)

    def move(self, owners: Owners) -> Owners:
        """Return owners with these islands on the CPU."""
        moved = list(owners)
        for island in self.islands:
            for index in island.piece.nodes:
                moved[index] = island.heir
        return tuple(moved)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    ``times`` holds every cut that was timed, in order, in seconds a call, None where it could not be; ``best`` is the
    fastest among them. The first entry is the untouched cut.
    """

    best: Owners
    times: Mapping[Owners, float | None]


def owners_of(pieces: Sequence[Piece]) -> Owners:
    """Return for each node the number of the candidate that runs it."""
    owners = {index: piece.owner for piece in pieces for index in piece.nodes}
    return tuple(owners[index] for index in range(len(owners)))


def homes(candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Return the numbers of the candidates that may take an island: the CPU's, unless they are what was asked for.

    A plan of precisions may hold one engine twice; the requested one is no heir of itself in any precision.
    """
    return tuple(
        number
        for number, candidate in enumerate(candidates)
        if candidate.backend.name == CPU and candidate.engine is not candidates[0].engine
    )


def heir_of(
    nodes: Sequence[Node],
    piece: Piece,
    candidates: Sequence[Candidate],
    precisions: Sequence[Precision],
    refused: Mapping[tuple[int, int], str],
) -> int | None:
    """Return the first candidate of the CPU that takes all nodes of a piece and is no last resort, None if none is.

    None as well for a piece that is not on the requested engine.
    """
    if candidates[piece.owner].engine is not candidates[0].engine:
        return None
    for number in homes(candidates):
        engine = candidates[number].engine
        if engine.caps.last_resort or any((number, index) in refused for index in piece.nodes):
            continue
        answers = engine.supports_all([nodes[index] for index in piece.nodes], precisions[number])
        if all(verdict.supported for verdict in answers):
            return number
    return None


def cpu_alone(
    nodes: Sequence[Node],
    owners: Owners,
    candidates: Sequence[Candidate],
    precisions: Sequence[Precision],
    refused: Mapping[tuple[int, int], str],
) -> Owners:
    """Return owners with every node on the CPU that it supports, each on the first of its engines that takes it.

    Where the CPU cannot run the whole, what it cannot run stays, and where nothing else can, so does everything.
    """
    at_home = homes(candidates)
    if all(candidates[number].engine.caps.last_resort for number in at_home):
        return owners
    moved = list(owners)
    left = [index for index, owner in enumerate(owners) if candidates[owner].engine is candidates[0].engine]
    for number in at_home:
        asked = [index for index in left if (number, index) not in refused]
        answers = candidates[number].engine.supports_all([nodes[index] for index in asked], precisions[number])
        for index, verdict in zip(asked, answers, strict=True):
            if verdict.supported:
                moved[index] = number
                left.remove(index)
    return tuple(moved)


def look_of(nodes: Sequence[Node], piece: Piece) -> tuple[object, ...]:
    """Return what tells a piece from others that cost the same: its operators, attributes and sizes, not its names."""
    return tuple((n.signature, n.input_types, n.output_types) for n in (nodes[index] for index in piece.nodes))


def unite(nodes: Sequence[Node], islands: Sequence[Island], limit: int = MAX_UNITS) -> tuple[Unit, ...]:
    """Return at most ``limit`` units: single islands if there are few, else those that look alike together.

    A network repeats its layers, so islands that look alike gain or lose alike. If that leaves too many still, those
    with a similar share of gain go together, never one that gains by moving with one that loses.
    """
    if len(islands) <= limit:
        return tuple(Unit((island,)) for island in islands)
    alike: dict[object, list[Island]] = {}
    for island in islands:
        alike.setdefault((look_of(nodes, island.piece), island.heir), []).append(island)
    units = [Unit(tuple(group)) for group in alike.values()]
    if len(units) <= limit:
        return tuple(units)
    units.sort(key=lambda unit: -unit.gain / unit.there if unit.there > 0 else 0.0)
    losing = [unit for unit in units if unit.gain > 0]
    others = [unit for unit in units if unit.gain <= 0]
    share = round(limit * len(losing) / len(units))
    room = min(max(share, 1), limit - 1) if losing and others else limit if losing else 0
    return (*_merged(losing, room), *_merged(others, limit - room))


def _merged(units: Sequence[Unit], count: int) -> list[Unit]:
    """Merge neighbours in a list into ``count`` units of about as many each."""
    bounds = [len(units) * number // count for number in range(count + 1)] if count else []
    groups = [units[low:high] for low, high in pairwise(bounds) if low < high]
    return [Unit(tuple(island for unit in group for island in unit.islands)) for group in groups]


def search(
    first: Owners,
    alone: Owners,
    units: Sequence[Unit],
    measure: Callable[[Owners], float | None],
    cuts: int = MAX_CUTS,
) -> Found:
    """Find a fast cut.

    Both anchors are timed, then the cut without the units that lose by themselves. From the fastest of them that
    consists of whole units, one unit at a time changes sides, the most promising first, as long as that pays.

    Args:
        first: The untouched cut.
        alone: What the CPU can run on the CPU.
        units: What may move.
        measure: Times a whole cut, in seconds a call; None if it cannot be had. Asked once a cut.
        cuts: How many are timed at most, 2 or more.

    Returns:
        The fastest cut that was timed, and all times.
    """
    times: dict[Owners, float | None] = {}

    def timed(owners: Owners) -> float:
        if owners not in times:
            if len(times) >= cuts:
                return float("inf")
            times[owners] = measure(owners)
        seconds = times[owners]
        return float("inf") if seconds is None else seconds

    def moved(chosen: frozenset[int]) -> Owners:
        owners = first
        for number in sorted(chosen):
            owners = units[number].move(owners)
        return owners

    timed(first)
    timed(alone)
    everything = frozenset(range(len(units)))
    starts = [frozenset[int](), frozenset(number for number, unit in enumerate(units) if unit.gain > 0)]
    if moved(everything) == alone:
        starts.append(everything)
    current = min(starts, key=lambda chosen: timed(moved(chosen)))
    while (better := _step(current, units, lambda chosen: timed(moved(chosen)))) is not None:
        current = better
    known = [(seconds, owners) for owners, seconds in times.items() if seconds is not None]
    return Found(min(known, key=lambda item: item[0], default=(0.0, first))[1], times)


def _step(
    current: frozenset[int], units: Sequence[Unit], timed: Callable[[frozenset[int]], float]
) -> frozenset[int] | None:
    """Return the first change of one unit that pays, None if none does.

    A unit that loses by itself is not returned: among neighbours on the CPU it costs less than alone, not more.
    """
    to_beat = timed(current) * (1 - WORTH)

    def promise(number: int) -> float:
        return -units[number].gain if number in current else units[number].gain

    open_units = [number for number in range(len(units)) if number not in current or units[number].gain <= 0]
    for number in sorted(open_units, key=lambda number: (-promise(number), number)):
        if timed(changed := current ^ {number}) < to_beat:
            return changed
    return None


def explained(
    first: Partition,
    best: Sequence[Piece],
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    before: float,
    after: float,
) -> Partition:
    """Return the best cut with a verdict for each node that moved, in the figures that moved it.

    Args:
        first: The untouched cut, with the verdicts that led to it.
        best: The pieces of the cut that was kept.
        units: What might have moved.
        candidates: Best first.
        before: Seconds a call of the untouched cut.
        after: Seconds a call of the cut that was kept.
    """
    unit_of = {index: unit for unit in units for island in unit.islands for index in island.piece.nodes}
    verdicts = [list(row) for row in first.verdicts]
    for index, (old, new) in enumerate(zip(owners_of(first.pieces), owners_of(best), strict=True)):
        if old == new:
            continue
        unit = unit_of.get(index)
        if unit is not None and unit.gain > 0 and (here := unit.here) is not None:
            where = candidates[unit.islands[0].heir].name
            many = f", in {len(unit.islands)} islands" if len(unit.islands) > 1 else ""
            reason = (
                f"{human_seconds(unit.there)} there with its transfer against {human_seconds(here)} on {where}{many}"
            )
        else:
            reason = f"{human_seconds(before)} for the model as first cut against {human_seconds(after)} as it is"
        verdicts[old][index] = Verdict.refuse(MEASURED + reason)
        verdicts[new][index] = SUPPORTED
    return Partition(tuple(best), tuple(map(tuple, verdicts)))
