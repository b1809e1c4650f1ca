"""Follow the integers that a graph computes from shapes: which of them depend on the number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accelrt.graph.node import Node
from accelrt.partition.row_facts import Coupled, Extents, Fact, Sizes, constants_of, slices_of

_ARITHMETIC = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}
    | {"And", "Or", "Not", "Where", "Neg", "Abs", "Floor", "Ceil", "Clip"}
)


def follow_sizes(extents: Extents, node: Node, facts: Sequence[Fact]) -> Sizes | None:
    """Follow integers computed from shapes, entry by entry.

    Returns:
        Which entries of the one output depend on the number of rows; None if the node does something else with them.

    Raises:
        Coupled: The output is no scalar or vector, or not of as many entries as were followed.
    """
    if (followed := _follow(extents, node, facts)) is None:
        return None
    shape = extents.shape(node.outputs[0])
    if shape not in ((), (len(followed.depends),)) or (shape == () and len(followed.depends) != 1):
        raise Coupled(f"what it makes of sizes has the shape {list(shape)}, which is not followed")
    return followed


def _follow(extents: Extents, node: Node, facts: Sequence[Fact]) -> Sizes | None:
    operation = node.op_type
    if operation in _ARITHMETIC:
        lists = [_depends(extents, name, fact) for name, fact in zip(node.inputs, facts, strict=True) if name]
        length = max(map(len, lists))
        return Sizes(tuple(any(one[i if len(one) > 1 else 0] for one in lists) for i in range(length)))
    first = facts[0]
    if operation in ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape") and isinstance(first, Sizes):
        return first
    if operation == "Concat":
        return Sizes(sum((_depends(extents, n, f) for n, f in zip(node.inputs, facts, strict=True)), ()))
    if operation == "Gather" and isinstance(first, Sizes) and 1 in node.constants:
        picked = np.asarray(first.depends)[np.asarray(node.constants[1], np.int64)]
        return Sizes(tuple(bool(one) for one in np.ravel(picked)))
    if operation == "Slice" and isinstance(first, Sizes):
        if node.version >= 10:
            constants_of(node, 1), constants_of(node, 2)  # must be known
        starts, ends, _, steps = slices_of(node)
        return Sizes(first.depends[slice(starts[0], ends[0], steps[0])])
    if operation in ("ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax") and isinstance(first, Sizes):
        return Sizes((any(first.depends),))
    return None


def _depends(extents: Extents, name: str, fact: Fact) -> tuple[bool, ...]:
    if isinstance(fact, Sizes):
        return fact.depends
    shape = extents.shape(name)
    length = shape[0] if shape else 1
    if len(shape) > 1 or not isinstance(length, int):
        raise Coupled(f"{name!r} is no vector of known length, and meets one made of sizes")
    return (False,) * length
