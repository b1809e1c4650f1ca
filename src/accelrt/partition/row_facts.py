"""What is known of a value in the proof of `accelrt.partition.rows`, and how large values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from accelrt.graph.model import Graph
from accelrt.graph.node import Node
from accelrt.graph.types import Dim, TensorType


@dataclass(frozen=True, slots=True)
class Fixed:
    """Depends neither on the rows nor on how many there are."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A scalar or vector of integers computed from shapes; the entries that are true depend on the number of rows."""

    depends: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Row-wise along ``axis``: of that axis, row r has ``block`` indices in a row, ``outer`` times over.

    If axes are folded into one, those before the rows become ``outer``, those after ``block``.
    """

    axis: int
    block: int = 1
    outer: int = 1


Fact: TypeAlias = Fixed | Sizes | Rows
FIXED = Fixed()


class Coupled(Exception):
    """Rows are, or may be, coupled; holds the reason."""


def describe(fact: Fact) -> str:
    """Say in words how a value depends on the rows."""
    match fact:
        case Rows(axis, block, outer):
            return f"has its rows along axis {axis}, {block * outer} indices each, not along axis 0"
        case Sizes():
            return "is computed from sizes alone"
        case _:
            return "does not depend on the inputs' rows"


class Extents:
    """How large the values of a graph are for several batch sizes.

    Args:
        sizes: The batch sizes, two or more, ascending.
        graphs: The graph bound to each.
    """

    def __init__(self, sizes: Sequence[int], graphs: Sequence[Graph]) -> None:
        self._sizes = sizes
        self._types = [graph.types for graph in graphs]

    def rows(self, name: str, axis: int, outer: int = 1) -> Rows:
        """Return row-wise along an axis, with the block that the inferred sizes give.

        Raises:
            Coupled: The size there is not the same multiple of the batch for every batch.
        """
        blocks = set()
        for size, shape in zip(self._sizes, self.shapes(name), strict=True):
            dim = shape[axis] if 0 <= axis < len(shape) else None
            if not isinstance(dim, int) or dim % (size * outer):
                raise Coupled(f"the size of {name!r} along axis {axis} is no known multiple of the batch")
            blocks.add(dim // (size * outer))
        if len(blocks) != 1 or not (block := blocks.pop()):
            raise Coupled(f"the size of {name!r} along axis {axis} does not grow with the batch")
        return Rows(axis, block, outer)

    def shapes(self, name: str) -> list[tuple[Dim, ...]]:
        """Return the shape of a value at each batch size."""
        found = []
        for types in self._types:
            type_ = types.get(name)
            if not isinstance(type_, TensorType) or type_.shape is None:
                raise Coupled(f"the rank of {name!r} is not known")
            found.append(type_.shape)
        return found

    def shape(self, name: str) -> tuple[Dim, ...]:
        """Return the shape of a value at the smallest batch size."""
        return self.shapes(name)[0]

    def rank(self, name: str) -> int:
        """Return the rank of a value."""
        return len(self.shape(name))

    def size_one(self, name: str, axis: int) -> bool:
        """Whether a fixed value has size 1 along an axis, or not that axis at all."""
        shape = self.shape(name)
        return axis < 0 or shape[axis] == 1


def constants_of(node: Node, index: int) -> list[int]:
    """Return the integers of a constant input."""
    if index not in node.constants:
        raise Coupled(f"its input {index} is not constant")
    return [int(one) for one in np.ravel(node.constants[index])]


def slices_of(node: Node, rank: int = 1) -> tuple[Sequence[Any], Sequence[Any], Sequence[int], Sequence[int]]:
    """Return starts, ends, axes and steps of a Slice; bounds that are no constants are -1, which is no whole axis."""
    if node.version < 10:
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        return starts, ends, node.attributes.get("axes", range(len(starts))), [1] * len(starts)
    axes: Sequence[int] = constants_of(node, 3) if node.has_input(3) else range(rank)
    steps: Sequence[int] = [1] * len(axes)
    if node.has_input(4):
        steps = constants_of(node, 4)
    starts, ends = (constants_of(node, index) if index in node.constants else [-1] * len(axes) for index in (1, 2))
    known = min(len(starts), len(ends), len(steps))
    return starts[:known], ends[:known], axes[:known], steps[:known]
