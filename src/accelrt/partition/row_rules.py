"""How each operator keeps rows apart: the rules behind `accelrt.partition.rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeAlias

from accelrt.graph.node import Node
from accelrt.graph.types import Dim
from accelrt.partition.row_facts import (
    FIXED,
    Coupled,
    Extents,
    Fact,
    Fixed,
    Rows,
    Sizes,
    constants_of,
    describe,
    slices_of,
)

_TO_THE_END = 1 << 31
"""What a slice up to the end is written with; no dimension is larger."""

Rule: TypeAlias = Callable[[Extents, Node, Sequence[Fact]], int | Sequence[int] | Fact]
"""Given a node of which an input is row-wise or made of sizes: the axis of rows of all outputs or of each, or a fact
about the only one."""


def _only(node: Node, facts: Sequence[Fact], index: int = 0) -> Rows:
    """Return the fact of the one input that may be row-wise.

    Raises:
        Coupled: Another one depends on the rows too, or this one does not.
    """
    for number, fact in enumerate(facts):
        if number != index and fact != FIXED:
            raise Coupled(f"its input {number} depends on the rows")
    if not isinstance(fact := facts[index], Rows):
        raise Coupled(f"its input {index} {describe(fact)}, and others do")
    return fact


def _apart(axis: int, touched: Sequence[int], rank: int) -> int:
    """Return the axis if none of those that an operator computes over is it."""
    if axis in {one % rank for one in touched}:
        raise Coupled(f"it computes over axis {axis}, along which the rows are")
    return axis


def _broadcast(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    """Elementwise: rows along one axis counted from the last, of which fixed inputs have one index or none."""
    rank = extents.rank(node.outputs[0])
    axes = {
        fact.axis + rank - extents.rank(name)
        for name, fact in zip(node.inputs, facts, strict=True)
        if isinstance(fact, Rows)
    }
    if len(axes) != 1:
        raise Coupled("its inputs have their rows along different axes")
    axis = axes.pop()
    for name, fact in zip(node.inputs, facts, strict=True):
        if isinstance(fact, Sizes):
            raise Coupled("it computes with the number of rows")
        if name and fact == FIXED and not extents.size_one(name, axis - rank + extents.rank(name)):
            raise Coupled(f"its fixed input {name!r} differs from row to row")
    return axis


def _like_first(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    """Operators on the values of the first input alone, with fixed parameters that hold for all rows."""
    return _only(node, facts).axis


def _leading(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    """Operators that treat each index of axis 0 alike and by itself: convolutions, pools, image operators."""
    rows = _only(node, facts)
    if rows.axis != 0:
        raise Coupled(f"the rows are along axis {rows.axis}, not 0, which it treats as the batch")
    if len(node.writes) > 1:
        raise Coupled("its second output counts across rows")
    return 0


def _batch_normalization(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    if node.version < 7 or node.attributes.get("training_mode", 0) or len(node.writes) > 1:
        raise Coupled("in training mode it normalises over the batch")
    return _leading(extents, node, facts)


def _dropout(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    training = node.constants.get(2, None if node.has_input(2) else False)
    if node.version < 7 or training is None or bool(training):
        raise Coupled("in training mode it is random")
    return _only(node, facts).axis


def _quantise(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    if node.attributes.get("block_size", 0):
        raise Coupled("it quantises by blocks")
    return rows.axis if extents.rank(node.inputs[1]) == 0 else _apart(rows.axis, [node.attributes.get("axis", 1)], rank)


def _quantised_product(scalars: Sequence[int]) -> Rule:
    """Convolutions and products of integers: as in floats, if the parameters of the first input are scalars."""

    def rule(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
        _only(node, facts)
        for index in scalars:
            if node.has_input(index) and any(dim != 1 for dim in extents.shape(node.inputs[index])):
                raise Coupled("its activations are quantised by rows")
        if "Conv" in node.op_type:
            return _leading(extents, node, facts)
        return _product_axis(extents, node.inputs[0], facts[0], node.inputs[3 if scalars[0] == 1 else 1], FIXED)

    return rule


def _over_axis(default: int, *, flattens_before: int = 0) -> Rule:
    """Operators over one axis, the attribute ``axis``; before a version of theirs, over it and all that follow."""

    def rule(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
        rows, rank = _only(node, facts), extents.rank(node.inputs[0])
        old = node.version < flattens_before
        axis = node.attributes.get("axis", 1 if old else default) % rank
        return _apart(rows.axis, range(axis, rank) if old else [axis], rank)

    return rule


def _from_axis(extents: Extents, node: Node, facts: Sequence[Fact]) -> list[int]:
    """Normalisation over an axis and all that follow; mean and deviation keep the axes."""
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    axis = node.attributes.get("axis", -1) % rank
    return [_apart(rows.axis, range(axis, rank), rank)] * len(node.outputs)


def _mean_variance(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows = _only(node, facts)
    return _apart(rows.axis, node.attributes.get("axes", (0, 2, 3)), extents.rank(node.inputs[0]))


def _cumulative(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    return _apart(_only(node, facts).axis, constants_of(node, 1), extents.rank(node.inputs[0]))


def _last_two(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rank = extents.rank(node.inputs[0])
    return _apart(_only(node, facts).axis, [-1, -2], rank)


def _reduce(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    axes = node.attributes.get("axes")
    if axes is None and node.has_input(1):
        axes = constants_of(node, 1)
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return rows.axis
        axes = range(rank)
    return _dropped(rows.axis, axes, rank, keep=bool(node.attributes.get("keepdims", 1)))


def _arg(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    return _dropped(rows.axis, [node.attributes.get("axis", 0)], rank, keep=bool(node.attributes.get("keepdims", 1)))


def _dropped(axis: int, axes: Sequence[int], rank: int, *, keep: bool) -> int:
    _apart(axis, axes, rank)
    return axis if keep else axis - sum(1 for one in {one % rank for one in axes} if one < axis)


def _product(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    (left, right), (one, other) = node.inputs[:2], facts[:2]
    if isinstance(one, Rows) and isinstance(other, Rows):
        ranks = extents.rank(left), extents.rank(right)
        if one.axis - ranks[0] != other.axis - ranks[1] or one.axis >= ranks[0] - 2 or other.axis >= ranks[1] - 2:
            raise Coupled("it multiplies rows with each other")
        return one.axis + max(ranks) - ranks[0]
    if isinstance(one, Sizes) or isinstance(other, Sizes):
        raise Coupled("it computes with the number of rows")
    return _product_axis(extents, left, one, right, other)


def _product_axis(extents: Extents, left: str, one: Fact, right: str, other: Fact) -> int:
    """One factor is fixed: the rows may be along the other's batch axes, or the axis that is not summed over."""
    name, rows, fixed, summed = (left, one, right, -1) if isinstance(one, Rows) else (right, other, left, -2)
    assert isinstance(rows, Rows)
    rank, other_rank = extents.rank(name), extents.rank(fixed)
    if rank == 1 or rows.axis == rank + summed:
        raise Coupled("it sums over the rows")
    if other_rank == 1:
        # The summed axis is dropped from the product.
        return rows.axis - (1 if rows.axis > rank + summed else 0)
    if rows.axis < rank - 2 and not extents.size_one(fixed, rows.axis - rank + other_rank):
        raise Coupled(f"its fixed factor {fixed!r} differs from row to row")
    return rows.axis + max(rank, other_rank) - rank


def _gemm(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    left, right = facts[:2]
    if right != FIXED or not isinstance(left, Rows):
        raise Coupled("its second factor depends on the rows")
    if left.axis != (1 if node.attributes.get("transA", 0) else 0):
        raise Coupled("it sums over the rows")
    if node.has_input(2):
        rank = extents.rank(node.inputs[2])
        if facts[2] == FIXED and not extents.size_one(node.inputs[2], rank - 2):
            raise Coupled("its third input differs from row to row")
        if facts[2] != FIXED and facts[2] != Rows(0, left.block, left.outer):
            raise Coupled("its third input has its rows along another axis")
    return 0


def _einsum(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    equation = str(node.attributes["equation"]).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        raise Coupled("its equation is not spelt out")
    letters = {term[fact.axis] for term, fact in zip(terms.split(","), facts, strict=True) if isinstance(fact, Rows)}
    if len(letters) != 1 or not letters <= set(result):
        raise Coupled("it sums over the rows, or multiplies them with each other")
    (letter,) = letters
    for term, name, fact in zip(terms.split(","), node.inputs, facts, strict=True):
        if isinstance(fact, Sizes) or term.count(letter) > 1:
            raise Coupled("it multiplies rows with each other")
        if fact == FIXED and letter in term and not extents.size_one(name, term.index(letter)):
            raise Coupled(f"its fixed factor {name!r} differs from row to row")
    return result.index(letter)


def _concat(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    if len(set(facts)) != 1 or not isinstance(rows := facts[0], Rows):
        raise Coupled("its inputs do not all have their rows along the same axis")
    return _apart(rows.axis, [node.attributes["axis"]], extents.rank(node.inputs[0]))


def _split(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    return _apart(_only(node, facts).axis, [node.attributes.get("axis", 0)], extents.rank(node.inputs[0]))


def _slice(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    if node.version >= 10 and node.has_input(3) and 3 not in node.constants:
        raise Coupled("the axes that it cuts are not constant")
    starts, ends, axes, steps = slices_of(node, rank)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % rank == rows.axis and (start != 0 or end < _TO_THE_END or step != 1):
            raise Coupled("it cuts some rows away")
    return rows.axis


def _pad(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    pads = node.attributes["pads"] if node.version < 11 else constants_of(node, 1)
    axes = constants_of(node, 3) if node.has_input(3) else range(rank)
    for number, axis in enumerate(axes):
        if axis % rank == rows.axis and (pads[number] or pads[number + len(axes)]):
            raise Coupled("it adds rows")
    return rows.axis


def _resize(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows = facts[0]
    if not isinstance(rows, Rows) or node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Coupled("it may resize across rows")
    for fact in facts[1:]:
        # Sizes say for each axis how large it becomes; that of the rows is checked to stay.
        if fact != FIXED and not (isinstance(fact, Sizes) and _flagged(fact) == [rows.axis]):
            raise Coupled("how far it resizes depends on the rows")
    if "axes" in node.attributes:
        return _apart(rows.axis, node.attributes["axes"], extents.rank(node.inputs[0]))
    return rows.axis


def _transpose(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rank = extents.rank(node.inputs[0])
    perm = [int(one) for one in node.attributes.get("perm", range(rank)[::-1])]
    return perm.index(_only(node, facts).axis)


def _reshape(extents: Extents, node: Node, facts: Sequence[Fact]) -> Rows:
    """Folding and unfolding axes: in memory there are, as before, so many times all rows, each of so many values.

    The axis of the rows is the one whose size grows with the batch. What lies before it in memory must be as much as
    before; that it holds whole rows is checked by its size, for each batch. The sizes after it must not depend on the
    batch, since a row's values would then be arranged otherwise.
    """
    rows = facts[0]
    if not isinstance(rows, Rows):
        raise Coupled("its shape depends on the number of rows, and its values do not")
    heads = {shape[: rows.axis] for shape in extents.shapes(node.inputs[0])}
    after = extents.shapes(node.outputs[0])
    axis = next((a for a, sizes in enumerate(zip(*after, strict=True)) if len(set(sizes)) > 1), rows.axis)
    if len(heads) != 1 or len({shape[axis + 1 :] for shape in after}) != 1 or after[0][axis + 1 :].count(None) > 1:
        raise Coupled("what shape it gives to a row is not known to be the same for every batch")
    (head,), front, outer = heads, after[0][:axis], rows.outer
    if head != front or not all(isinstance(dim, int | str) for dim in head):
        times, divisor = _total(head) * outer, _total(front)
        if not divisor or times % divisor:
            raise Coupled("it rearranges the axes before the rows")
        outer = times // divisor
    return extents.rows(node.outputs[0], axis, outer)


def _total(sizes: Sequence[Dim]) -> int:
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise Coupled("the sizes of the axes before the rows are not known")
    return prod(known)


def _unsqueeze(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    axis, rank = _only(node, facts).axis, extents.rank(node.outputs[0])
    for one in sorted(one % rank for one in _axes(node)):
        axis += one <= axis
    return axis


def _squeeze(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.inputs[0])
    return _dropped(rows.axis, _axes(node), rank, keep=False)


def _axes(node: Node) -> Sequence[int]:
    if "axes" in node.attributes:
        return tuple(node.attributes["axes"])
    if not node.has_input(1):
        raise Coupled("it drops every axis of size 1, and that of a single row is one")
    return constants_of(node, 1)


def _expand(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rank, own = extents.rank(node.outputs[0]), extents.rank(node.inputs[0])
    target = facts[1]
    axes = set(_flagged(target, rank)) if isinstance(target, Sizes) else set()
    if isinstance(facts[0], Rows):
        axes.add(facts[0].axis + rank - own)
    if len(axes) != 1:
        raise Coupled("it repeats rows along another axis")
    (axis,) = axes
    if facts[0] == FIXED and not extents.size_one(node.inputs[0], axis - rank + own):
        raise Coupled("what it expands differs from row to row")
    return axis


def _constant_of_shape(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    axes = _flagged(facts[0])
    if len(axes) != 1:
        raise Coupled("the number of rows is more than one of its sizes")
    return axes[0]


def _flagged(fact: Fact, rank: int | None = None) -> list[int]:
    """Return the axes of a shape that depend on the number of rows, counted in ``rank`` axes."""
    if not isinstance(fact, Sizes):
        raise Coupled("its shape is no vector of sizes")
    shift = 0 if rank is None else rank - len(fact.depends)
    return [axis + shift for axis, flag in enumerate(fact.depends) if flag]


def _gather(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    data, indices = facts
    axis = int(node.attributes.get("axis", 0)) % extents.rank(node.inputs[0])
    if data == FIXED and isinstance(indices, Rows):
        return axis + indices.axis
    if isinstance(data, Rows) and indices == FIXED:
        _apart(data.axis, [axis], extents.rank(node.inputs[0]))
        return data.axis if data.axis < axis else data.axis - 1 + extents.rank(node.inputs[1])
    raise Coupled("it picks values by index across rows")


def _gather_elements(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    if facts[0] != facts[1] or not isinstance(rows := facts[0], Rows):
        raise Coupled("it picks values by index across rows")
    return _apart(rows.axis, [node.attributes.get("axis", 0)], extents.rank(node.inputs[0]))


def _gather_nd(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    data, indices = facts
    batch = node.attributes.get("batch_dims", 0)
    if data == indices and isinstance(data, Rows) and data.axis < batch:
        return data.axis
    if data == FIXED and batch == 0 and isinstance(indices, Rows) and indices.axis < extents.rank(node.inputs[1]) - 1:
        return indices.axis
    raise Coupled("it picks values by index across rows")


def _one_hot(extents: Extents, node: Node, facts: Sequence[Fact]) -> int:
    rows, rank = _only(node, facts), extents.rank(node.outputs[0])
    return rows.axis + (int(node.attributes.get("axis", -1)) % rank <= rows.axis)


def _recurrent(extents: Extents, node: Node, facts: Sequence[Fact]) -> list[int]:
    """Sequences have axes [step, row, feature]; lengths begin with the row, states with the direction."""
    if node.attributes.get("layout", 0):
        raise Coupled("no rule for this layout")
    wanted = {0: 1, 4: 0, 5: 1, 6: 1}
    for number, fact in enumerate(facts):
        if number in wanted and node.has_input(number):
            if fact != Rows(wanted[number]):
                raise Coupled(f"its input {number} does not have one row an index along axis {wanted[number]}")
        elif fact != FIXED:
            raise Coupled(f"its input {number} depends on the rows")
    return [2, 1, 1]


def _shape(extents: Extents, node: Node, facts: Sequence[Fact]) -> Fixed | Sizes:
    rows = _only(node, facts)
    flags = [axis == rows.axis for axis in range(extents.rank(node.inputs[0]))]
    chosen = tuple(flags[slice(node.attributes.get("start", 0), node.attributes.get("end"))])
    return Sizes(chosen) if any(chosen) else FIXED


def _size(extents: Extents, node: Node, facts: Sequence[Fact]) -> Sizes:
    return Sizes((True,))


_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike "
    "Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity "
    "IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round "
    "Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
)
_PER_INDEX_OF_AXIS_0 = (
    "Conv ConvTranspose MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool LRN "
    "InstanceNormalization GroupNormalization DepthToSpace SpaceToDepth"
)
_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)

RULES: Mapping[str, Rule] = {
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
