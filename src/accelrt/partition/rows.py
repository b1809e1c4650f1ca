"""Prove that a model computes each row of a batch by itself, so that rows of several calls may share one.

A *row* is an index of the first dimension of every input. The proof walks the graph and keeps for each value how it
depends on the rows: not at all, by its sizes alone, or row by row along one axis. Each operator has a rule that says
along which axis its outputs are row-wise, or why they are not; one without a rule is a refusal. So the answer errs to the
safe side, and holds for all inputs, which no trial on some inputs can say: an operator that scales by the largest value of
the whole tensor couples rows by less than any tolerance.

Sizes along an axis are not derived but read: the graph is bound to two batch sizes or more, onnx infers the types of
each, and a value is row-wise along an axis only if its size there is the same multiple of the batch every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from accelrt.errors import AccelrtError
from accelrt.graph.bind import bind_first_dimension, first_dimension
from accelrt.graph.model import Graph
from accelrt.graph.node import Node
from accelrt.graph.types import Dim, TensorType

_TO_THE_END = 1 << 31
"""What a slice up to the end is written with; no dimension is larger."""


@dataclass(frozen=True, slots=True)
class BatchAxis:
    """Whether a model's rows are independent.

    Attributes:
        proved: Each row of each output depends on that row of the inputs alone.
        dimension: The name that the model gives the dimension, None if none.
        reason: Why it is so, or why not: a sentence without a full stop.
    """

    proved: bool
    dimension: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Depends neither on the rows nor on how many there are."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A scalar or vector of integers computed from shapes; the entries that are true depend on the number of rows."""

    depends: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Row-wise along ``axis``, where each row has ``block`` indices."""

    axis: int
    block: int


_Fact: TypeAlias = _Fixed | _Sizes | _Rows
_FIXED = _Fixed()


class _Coupled(Exception):
    """Rows are, or may be, coupled; holds the reason."""


def prove_batch_axis(graph: Graph, sizes: Sequence[int] = (1,)) -> BatchAxis:
    """Tell whether the rows of a model are independent for calls of these many rows.

    Args:
        graph: With an open first dimension.
        sizes: Batch sizes that the model is to be specialised to.
    """
    name, reason = first_dimension(graph.signature)
    if reason:
        return BatchAxis(False, name, reason)
    sizes = sorted(set(sizes))
    if len(sizes) < 2:
        sizes = [*sizes, sizes[-1] + 1]
    try:
        walk = _Walk(sizes, [bind_first_dimension(graph, size) for size in sizes])
        for node in walk.nodes:
            walk.visit(node)
        for port in graph.signature.outputs:
            fact = walk.facts.get(port.name, _FIXED)
            if fact != _Rows(0, 1):
                raise _Coupled(f"output {port.name!r} {_describe(fact)}")
    except _Coupled as coupled:
        return BatchAxis(False, name, str(coupled))
    except AccelrtError as error:
        return BatchAxis(False, name, f"it cannot be specialised: {error.message.rstrip('.')}")
    return BatchAxis(True, name, f"each of {len(walk.nodes)} nodes keeps rows apart")


def _describe(fact: _Fact) -> str:
    match fact:
        case _Rows(axis, block):
            return f"has its rows along axis {axis}, {block} indices each, not along axis 0"
        case _Sizes():
            return "is computed from sizes alone"
        case _:
            return "does not depend on the inputs' rows"


class _Walk:
    """What is known so far, and how to ask for sizes."""

    def __init__(self, sizes: Sequence[int], graphs: Sequence[Graph]) -> None:
        self.sizes = sizes
        self.nodes = graphs[0].nodes
        self._types = [graph.types for graph in graphs]
        self.facts: dict[str, _Fact] = {}
        for port in graphs[0].signature.inputs:
            self.facts[port.name] = self.rows(port.name, 0)

    def visit(self, node: Node) -> None:
        """Conclude what a node's outputs are.

        Raises:
            _Coupled: Rows meet in it, or no rule says that they do not.
        """
        facts = [self.fact(name) for name in node.inputs]
        try:
            if node.op_type in _RANDOM:
                raise _Coupled("its values are random")
            if all(fact == _FIXED for fact in (*facts, *map(self.fact, node.captures))):
                self.facts.update(dict.fromkeys(node.writes, _FIXED))
            elif node.is_control_flow:
                raise _Coupled("what its bodies do with rows is not followed")
            elif not any(isinstance(fact, _Rows) for fact in facts) and (entries := _entries(self, node, facts)):
                self.facts[node.outputs[0]] = _FIXED if not any(entries.depends) else entries
            else:
                rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
                if rule is None:
                    raise _Coupled("no rule says that it keeps rows apart")
                self._conclude(node, facts, rule(self, node, facts))
        except _Known as known:
            self.facts[node.outputs[0]] = known.fact
        except (IndexError, KeyError, ValueError) as error:
            raise _Coupled(
                f"node {node.name!r} ({node.kind}) is not as its operator is defined: {type(error).__name__}: {error}"
            ) from error
        except _Coupled as coupled:
            raise _Coupled(f"at node {node.name!r} ({node.kind}): {coupled}") from None

    def _conclude(self, node: Node, facts: Sequence[_Fact], axes: int | Sequence[int]) -> None:
        """Check the axes that a rule gave against the sizes that onnx inferred."""
        axes = [axes] * len(node.outputs) if isinstance(axes, int) else list(axes)
        blocks = {fact.block for fact in facts if isinstance(fact, _Rows)}
        if len(blocks) > 1:
            raise _Coupled("its inputs hold different numbers of indices a row")
        if len(axes) < len(node.outputs):
            raise _Coupled("no rule tells how its further outputs hold rows")
        for name, axis in zip(node.outputs, axes, strict=False):
            if name:
                rows = self.rows(name, axis)
                if blocks and rows.block not in blocks and node.op_type not in _REGROUPING:
                    raise _Coupled(f"it changes how many indices along axis {axis} a row has")
                self.facts[name] = rows

    def fact(self, name: str) -> _Fact:
        """Return what is known of a value; weights and absent inputs are fixed."""
        return self.facts.get(name, _FIXED)

    def rows(self, name: str, axis: int) -> _Rows:
        """Return row-wise along an axis, with the block that the inferred sizes give."""
        blocks = set()
        for size, shape in zip(self.sizes, self.shapes(name), strict=True):
            dim = shape[axis] if 0 <= axis < len(shape) else None
            if not isinstance(dim, int) or dim % size:
                raise _Coupled(f"the size of {name!r} along axis {axis} is no known multiple of the batch")
            blocks.add(dim // size)
        if len(blocks) != 1 or not (block := blocks.pop()):
            raise _Coupled(f"the size of {name!r} along axis {axis} does not grow with the batch")
        return _Rows(axis, block)

    def shapes(self, name: str) -> list[tuple[Dim, ...]]:
        """Return the shape of a value at each batch size."""
        found = []
        for types in self._types:
            type_ = types.get(name)
            if not isinstance(type_, TensorType) or type_.shape is None:
                raise _Coupled(f"the rank of {name!r} is not known")
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


_Rule: TypeAlias = Callable[[_Walk, Node, Sequence[_Fact]], "int | Sequence[int]"]
"""Given a node of which an input is row-wise or made of sizes, the axis of rows of all outputs or of each."""


# What is computed from shapes


def _entries(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> _Sizes | None:
    """Follow integers computed from shapes, entry by entry; None if the node does something else with them."""
    operation = node.op_type
    if operation in _ARITHMETIC:
        lists = [_depends(walk, name, fact) for name, fact in zip(node.inputs, facts, strict=True) if name]
        length = max(map(len, lists))
        return _Sizes(tuple(any(one[i if len(one) > 1 else 0] for one in lists) for i in range(length)))
    first = facts[0]
    if operation in ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape") and isinstance(first, _Sizes):
        return first
    if operation == "Concat":
        return _Sizes(sum((_depends(walk, n, f) for n, f in zip(node.inputs, facts, strict=True)), ()))
    if operation == "Gather" and isinstance(first, _Sizes) and 1 in node.constants:
        picked = np.asarray(first.depends)[np.asarray(node.constants[1], np.int64)]
        return _Sizes(tuple(bool(one) for one in np.ravel(picked)))
    if operation == "Slice" and isinstance(first, _Sizes):
        starts, ends, _, steps = _slices(node)
        return _Sizes(first.depends[slice(starts[0], ends[0], steps[0])])
    if operation in ("ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax") and isinstance(first, _Sizes):
        return _Sizes((any(first.depends),))
    return None


def _depends(walk: _Walk, name: str, fact: _Fact) -> tuple[bool, ...]:
    if isinstance(fact, _Sizes):
        return fact.depends
    shape = walk.shape(name)
    length = shape[0] if shape else 1
    if len(shape) > 1 or not isinstance(length, int):
        raise _Coupled(f"{name!r} is no vector of known length, and meets one made of sizes")
    return (False,) * length


def _shape(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows = _only(node, facts)
    flags = [axis == rows.axis for axis in range(walk.rank(node.inputs[0]))]
    chosen = tuple(flags[slice(node.attributes.get("start", 0), node.attributes.get("end"))])
    raise _Known(_Sizes(chosen) if any(chosen) else _FIXED)


def _size(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    raise _Known(_Sizes((True,)))


class _Known(Exception):
    """The fact about a node's one output, where it is not row-wise."""

    def __init__(self, fact: _Fact) -> None:
        self.fact = fact


# Rules. Each returns the axis of rows of the outputs.


def _only(node: Node, facts: Sequence[_Fact], index: int = 0) -> _Rows:
    """Return the fact of the one input that may be row-wise.

    Raises:
        _Coupled: Another one depends on the rows too, or this one does not.
    """
    for number, fact in enumerate(facts):
        if number != index and fact != _FIXED:
            raise _Coupled(f"its input {number} depends on the rows")
    if not isinstance(fact := facts[index], _Rows):
        raise _Coupled(f"its input {index} {_describe(fact)}, and others do")
    return fact


def _apart(axis: int, touched: Sequence[int], rank: int) -> int:
    """Return the axis if none of those that an operator computes over is it."""
    if axis in {one % rank for one in touched}:
        raise _Coupled(f"it computes over axis {axis}, along which the rows are")
    return axis


def _broadcast(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    """Elementwise: rows along one axis counted from the last, of which fixed inputs have one index or none."""
    rank = walk.rank(node.outputs[0])
    axes = {
        fact.axis + rank - walk.rank(name)
        for name, fact in zip(node.inputs, facts, strict=True)
        if isinstance(fact, _Rows)
    }
    if len(axes) != 1:
        raise _Coupled("its inputs have their rows along different axes")
    axis = axes.pop()
    for name, fact in zip(node.inputs, facts, strict=True):
        if isinstance(fact, _Sizes):
            raise _Coupled("it computes with the number of rows")
        if name and fact == _FIXED and not walk.size_one(name, axis - rank + walk.rank(name)):
            raise _Coupled(f"its fixed input {name!r} differs from row to row")
    return axis


def _like_first(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    """Operators on the values of the first input alone, with fixed parameters that hold for all rows."""
    return _only(node, facts).axis


def _leading(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    """Operators that treat each index of axis 0 alike and by itself: convolutions, pools, image operators."""
    rows = _only(node, facts)
    if rows.axis != 0:
        raise _Coupled(f"the rows are along axis {rows.axis}, not 0, which it treats as the batch")
    if len(node.writes) > 1:
        raise _Coupled("its second output counts across rows")
    return 0


def _batch_normalization(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    if node.version < 7 or node.attributes.get("training_mode", 0) or len(node.writes) > 1:
        raise _Coupled("in training mode it normalises over the batch")
    return _leading(walk, node, facts)


def _dropout(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    training = node.constants.get(2, None if node.has_input(2) else False)
    if node.version < 7 or training is None or bool(training):
        raise _Coupled("in training mode it is random")
    return _only(node, facts).axis


def _quantise(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    if node.attributes.get("block_size", 0):
        raise _Coupled("it quantises by blocks")
    return rows.axis if walk.rank(node.inputs[1]) == 0 else _apart(rows.axis, [node.attributes.get("axis", 1)], rank)


def _quantised_product(scalars: Sequence[int]) -> _Rule:
    """Convolutions and products of integers: as in floats, if the parameters of the first input are scalars."""

    def rule(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
        _only(node, facts)
        for index in scalars:
            if node.has_input(index) and any(dim != 1 for dim in walk.shape(node.inputs[index])):
                raise _Coupled("its activations are quantised by rows")
        if "Conv" in node.op_type:
            return _leading(walk, node, facts)
        return _product_axis(walk, node.inputs[0], facts[0], node.inputs[3 if scalars[0] == 1 else 1], _FIXED)

    return rule


def _over_axis(default: int, *, flattens_before: int = 0) -> _Rule:
    """Operators over one axis, the attribute ``axis``; before a version of theirs, over it and all that follow."""

    def rule(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
        rows, rank = _only(node, facts), walk.rank(node.inputs[0])
        old = node.version < flattens_before
        axis = node.attributes.get("axis", 1 if old else default) % rank
        return _apart(rows.axis, range(axis, rank) if old else [axis], rank)

    return rule


def _from_axis(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> list[int]:
    """Normalisation over an axis and all that follow; mean and deviation keep the axes."""
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    axis = node.attributes.get("axis", -1) % rank
    return [_apart(rows.axis, range(axis, rank), rank)] * len(node.outputs)


def _mean_variance(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows = _only(node, facts)
    return _apart(rows.axis, node.attributes.get("axes", (0, 2, 3)), walk.rank(node.inputs[0]))


def _cumulative(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    return _apart(_only(node, facts).axis, _constants(node, 1), walk.rank(node.inputs[0]))


def _last_two(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rank = walk.rank(node.inputs[0])
    return _apart(_only(node, facts).axis, [-1, -2], rank)


def _reduce(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    axes = node.attributes.get("axes")
    if axes is None and node.has_input(1):
        axes = _constants(node, 1)
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return rows.axis
        axes = range(rank)
    return _dropped(rows.axis, axes, rank, keep=bool(node.attributes.get("keepdims", 1)))


def _arg(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    return _dropped(rows.axis, [node.attributes.get("axis", 0)], rank, keep=bool(node.attributes.get("keepdims", 1)))


def _dropped(axis: int, axes: Sequence[int], rank: int, *, keep: bool) -> int:
    _apart(axis, axes, rank)
    return axis if keep else axis - sum(1 for one in {one % rank for one in axes} if one < axis)


def _product(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    (left, right), (one, other) = node.inputs[:2], facts[:2]
    if isinstance(one, _Rows) and isinstance(other, _Rows):
        ranks = walk.rank(left), walk.rank(right)
        if one.axis - ranks[0] != other.axis - ranks[1] or one.axis >= ranks[0] - 2 or other.axis >= ranks[1] - 2:
            raise _Coupled("it multiplies rows with each other")
        return one.axis + max(ranks) - ranks[0]
    if isinstance(one, _Sizes) or isinstance(other, _Sizes):
        raise _Coupled("it computes with the number of rows")
    return _product_axis(walk, left, one, right, other)


def _product_axis(walk: _Walk, left: str, one: _Fact, right: str, other: _Fact) -> int:
    """One factor is fixed: the rows may be along the other's batch axes, or the axis that is not summed over."""
    name, rows, fixed, summed = (left, one, right, -1) if isinstance(one, _Rows) else (right, other, left, -2)
    assert isinstance(rows, _Rows)
    rank, other_rank = walk.rank(name), walk.rank(fixed)
    if rank == 1 or rows.axis == rank + summed:
        raise _Coupled("it sums over the rows")
    if other_rank == 1:
        # The summed axis is dropped from the product.
        return rows.axis - (1 if rows.axis > rank + summed else 0)
    if rows.axis < rank - 2 and not walk.size_one(fixed, rows.axis - rank + other_rank):
        raise _Coupled(f"its fixed factor {fixed!r} differs from row to row")
    return rows.axis + max(rank, other_rank) - rank


def _gemm(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    left, right = facts[:2]
    if right != _FIXED or not isinstance(left, _Rows):
        raise _Coupled("its second factor depends on the rows")
    if left.axis != (1 if node.attributes.get("transA", 0) else 0):
        raise _Coupled("it sums over the rows")
    if node.has_input(2):
        rank = walk.rank(node.inputs[2])
        if facts[2] == _FIXED and not walk.size_one(node.inputs[2], rank - 2):
            raise _Coupled("its third input differs from row to row")
        if facts[2] != _FIXED and facts[2] != _Rows(0, left.block):
            raise _Coupled("its third input has its rows along another axis")
    return 0


def _einsum(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    equation = str(node.attributes["equation"]).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        raise _Coupled("its equation is not spelt out")
    letters = {
        term[fact.axis] for term, fact in zip(terms.split(","), facts, strict=True) if isinstance(fact, _Rows)
    }
    if len(letters) != 1 or not letters <= set(result):
        raise _Coupled("it sums over the rows, or multiplies them with each other")
    (letter,) = letters
    for term, name, fact in zip(terms.split(","), node.inputs, facts, strict=True):
        if isinstance(fact, _Sizes) or term.count(letter) > 1:
            raise _Coupled("it multiplies rows with each other")
        if fact == _FIXED and letter in term and not walk.size_one(name, term.index(letter)):
            raise _Coupled(f"its fixed factor {name!r} differs from row to row")
    return result.index(letter)


def _concat(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    if len(set(facts)) != 1 or not isinstance(rows := facts[0], _Rows):
        raise _Coupled("its inputs do not all have their rows along the same axis")
    return _apart(rows.axis, [node.attributes["axis"]], walk.rank(node.inputs[0]))


def _split(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    return _apart(_only(node, facts).axis, [node.attributes.get("axis", 0)], walk.rank(node.inputs[0]))


def _slice(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    if node.version >= 10 and node.has_input(3) and 3 not in node.constants:
        raise _Coupled("the axes that it cuts are not constant")
    starts, ends, axes, steps = _slices(node, rank)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % rank == rows.axis and (start != 0 or end < _TO_THE_END or step != 1):
            raise _Coupled("it cuts some rows away")
    return rows.axis


def _slices(node: Node, rank: int = 1) -> tuple[Sequence[Any], Sequence[Any], Sequence[int], Sequence[int]]:
    """Return starts, ends, axes and steps; bounds that are no constants are -1, which is no whole axis."""
    if node.version < 10:
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        return starts, ends, node.attributes.get("axes", range(len(starts))), [1] * len(starts)
    axes: Sequence[int] = _constants(node, 3) if node.has_input(3) else range(rank)
    steps: Sequence[int] = [1] * len(axes)
    if node.has_input(4):
        steps = _constants(node, 4)
    starts, ends = (_constants(node, index) if index in node.constants else [-1] * len(axes) for index in (1, 2))
    known = min(len(starts), len(ends), len(steps))
    return starts[:known], ends[:known], axes[:known], steps[:known]


def _pad(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    pads = node.attributes["pads"] if node.version < 11 else _constants(node, 1)
    axes = _constants(node, 3) if node.has_input(3) else range(rank)
    for number, axis in enumerate(axes):
        if axis % rank == rows.axis and (pads[number] or pads[number + len(axes)]):
            raise _Coupled("it adds rows")
    return rows.axis


def _resize(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows = facts[0]
    if not isinstance(rows, _Rows) or node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise _Coupled("it may resize across rows")
    for fact in facts[1:]:
        # Sizes say for each axis how large it becomes; that of the rows is checked to stay.
        if fact != _FIXED and not (isinstance(fact, _Sizes) and _flagged(fact) == [rows.axis]):
            raise _Coupled("how far it resizes depends on the rows")
    if "axes" in node.attributes:
        return _apart(rows.axis, node.attributes["axes"], walk.rank(node.inputs[0]))
    return rows.axis


def _transpose(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rank = walk.rank(node.inputs[0])
    return list(node.attributes.get("perm", range(rank)[::-1])).index(_only(node, facts).axis)


def _reshape(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    """Rows are contiguous within the axes before theirs; so they stay if those stay and the size after is a multiple.

    That the new axis holds whole rows is checked by its size, for each batch: see `_Walk.rows`. The sizes after it must
    not depend on the batch, since a row's values would then be arranged otherwise.
    """
    rows = facts[0]
    if not isinstance(rows, _Rows):
        raise _Coupled("its shape depends on the number of rows, and its values do not")
    before = walk.shapes(node.inputs[0])
    after = walk.shapes(node.outputs[0])
    axis = rows.axis
    for old, new in zip(before, after, strict=True):
        if old[:axis] != new[:axis] or not all(isinstance(dim, int) for dim in new[:axis]):
            raise _Coupled("it rearranges the axes before the rows")
    tails = {shape[axis + 1 :] for shape in after}
    if len(tails) != 1 or sum(1 for dim in tails.pop() if dim is None) > 1:
        raise _Coupled("what shape it gives to a row is not known to be the same for every batch")
    return axis


def _unsqueeze(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    axis, rank = _only(node, facts).axis, walk.rank(node.outputs[0])
    for one in sorted(one % rank for one in _axes(node)):
        axis += one <= axis
    return axis


def _squeeze(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.inputs[0])
    return _dropped(rows.axis, _axes(node), rank, keep=False)


def _axes(node: Node) -> Sequence[int]:
    if "axes" in node.attributes:
        return tuple(node.attributes["axes"])
    if not node.has_input(1):
        raise _Coupled("it drops every axis of size 1, and that of a single row is one")
    return _constants(node, 1)


def _expand(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rank, own = walk.rank(node.outputs[0]), walk.rank(node.inputs[0])
    target = facts[1]
    axes = set(_flagged(target, rank)) if isinstance(target, _Sizes) else set()
    if isinstance(facts[0], _Rows):
        axes.add(facts[0].axis + rank - own)
    if len(axes) != 1:
        raise _Coupled("it repeats rows along another axis")
    (axis,) = axes
    if facts[0] == _FIXED and not walk.size_one(node.inputs[0], axis - rank + own):
        raise _Coupled("what it expands differs from row to row")
    return axis


def _constant_of_shape(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    axes = _flagged(facts[0])
    if len(axes) != 1:
        raise _Coupled("the number of rows is more than one of its sizes")
    return axes[0]


def _flagged(fact: _Fact, rank: int | None = None) -> list[int]:
    """Return the axes of a shape that depend on the number of rows, counted in ``rank`` axes."""
    if not isinstance(fact, _Sizes):
        raise _Coupled("its shape is no vector of sizes")
    shift = 0 if rank is None else rank - len(fact.depends)
    return [axis + shift for axis, flag in enumerate(fact.depends) if flag]


def _gather(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    data, indices = facts
    axis = node.attributes.get("axis", 0) % walk.rank(node.inputs[0])
    if data == _FIXED and isinstance(indices, _Rows):
        return axis + indices.axis
    if isinstance(data, _Rows) and indices == _FIXED:
        _apart(data.axis, [axis], walk.rank(node.inputs[0]))
        return data.axis if data.axis < axis else data.axis - 1 + walk.rank(node.inputs[1])
    raise _Coupled("it picks values by index across rows")


def _gather_elements(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    if facts[0] != facts[1] or not isinstance(rows := facts[0], _Rows):
        raise _Coupled("it picks values by index across rows")
    return _apart(rows.axis, [node.attributes.get("axis", 0)], walk.rank(node.inputs[0]))


def _gather_nd(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    data, indices = facts
    batch = node.attributes.get("batch_dims", 0)
    if data == indices and isinstance(data, _Rows) and data.axis < batch:
        return data.axis
    if data == _FIXED and batch == 0 and isinstance(indices, _Rows) and indices.axis < walk.rank(node.inputs[1]) - 1:
        return indices.axis
    raise _Coupled("it picks values by index across rows")


def _one_hot(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> int:
    rows, rank = _only(node, facts), walk.rank(node.outputs[0])
    return rows.axis + (node.attributes.get("axis", -1) % rank <= rows.axis)


def _recurrent(walk: _Walk, node: Node, facts: Sequence[_Fact]) -> list[int]:
    """Sequences have axes [step, row, feature]; lengths begin with the row, states with the direction."""
    if node.attributes.get("layout", 0):
        raise _Coupled("no rule for this layout")
    wanted = {0: 1, 4: 0, 5: 1, 6: 1}
    for number, fact in enumerate(facts):
        if number in wanted and node.has_input(number):
            if fact != _Rows(wanted[number], 1):
                raise _Coupled(f"its input {number} does not have one row an index along axis {wanted[number]}")
        elif fact != _FIXED:
            raise _Coupled(f"its input {number} depends on the rows")
    return [2, 1, 1]


def _constants(node: Node, index: int) -> list[int]:
    """Return the integers of a constant input."""
    if index not in node.constants:
        raise _Coupled(f"its input {index} is not constant")
    return [int(one) for one in np.ravel(node.constants[index])]


_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
_REGROUPING = frozenset({"Reshape", "Flatten"})
"""Operators that may change how many indices of an axis a row has."""

_ARITHMETIC = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}
    | {"And", "Or", "Not", "Where", "Neg", "Abs", "Floor", "Ceil", "Clip"}
)
_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil "
    "Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf "
    "IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu "
    "Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
)
_PER_INDEX_OF_AXIS_0 = (
    "Conv ConvTranspose MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool LRN "
    "InstanceNormalization GroupNormalization DepthToSpace SpaceToDepth"
)
_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)

_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _broadcast),
    **dict.fromkeys(_PER_INDEX_OF_AXIS_0.split(), _leading),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "ConvInteger": _quantised_product((2,)),
    "CumSum": _cumulative,
    "DequantizeLinear": _quantise,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _reshape,
    "GRU": _recurrent,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Hardmax": _over_axis(-1, flattens_before=13),
    "LSTM": _recurrent,
    "LayerNormalization": _from_axis,
    "LogSoftmax": _over_axis(-1, flattens_before=13),
    "LpNormalization": _over_axis(-1),
    "MatMul": _product,
    "MatMulInteger": _quantised_product((2,)),
    "MeanVarianceNormalization": _mean_variance,
    "OneHot": _one_hot,
    "Pad": _pad,
    "QLinearConv": _quantised_product((1, 2, 6, 7)),
    "QLinearMatMul": _quantised_product((1, 2, 6, 7)),
    "QuantizeLinear": _quantise,
    "RMSNormalization": _from_axis,
    "RNN": _recurrent,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Softmax": _over_axis(-1, flattens_before=13),
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _like_first,
    "TopK": _over_axis(-1),
    "Transpose": _transpose,
    "Trilu": _last_two,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}
