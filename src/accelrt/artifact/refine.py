"""What may change a cut before its artifact is written: measuring it, which the layers above know how to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from accelrt.backend import Precision, Program
from accelrt.graph.model import Graph
from accelrt.partition.cost import Partition
from accelrt.partition.cut import Piece
from accelrt.partition.report import Tuning
from accelrt.registry import Candidate


@dataclass(frozen=True, slots=True)
class Workbench:
    """A graph that was cut and compiled, and the means to compile other cuts of it.

    Attributes:
        graph: The graph.
        target: What was asked for.
        candidates: Best first.
        precisions: What each computes in.
        first: The cut, every piece of which is compiled.
        refused: Pairs of candidate and node that failed to compile, with the reason.
        program: Returns the program of a piece, compiling it unless that was done before; raises `CompileError`.
        is_compiled: Tells whether it was done before.
        progress: Called with what is being done, how much of it is done, and how much there is.
    """

    graph: Graph
    target: str
    candidates: tuple[Candidate, ...]
    precisions: tuple[Precision, ...]
    first: Partition
    refused: Mapping[tuple[int, int], str]
    program: Callable[[Piece], Program]
    is_compiled: Callable[[Piece], bool]
    progress: Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Refined:
    """The cut that is kept, the seconds a call that each of its pieces takes, and how it was found."""

    partition: Partition
    seconds: tuple[float, ...]
    tuning: Tuning


@dataclass(frozen=True, slots=True)
class Refine:
    """A way to improve a cut.

    ``key`` names it, its inputs and the machine it measures for the cache; ``run`` returns a cut whose pieces the
    workbench has compiled.
    """

    key: str
    run: Callable[[Workbench], Refined]
