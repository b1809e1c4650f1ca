"""Cut a graph into the stages of a pipeline: as even as can be, and with little to hand over between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import numpy as np

from accelrt.errors import OptionError
from accelrt.graph.model import Graph
from accelrt.graph.node import Node
from accelrt.graph.types import Dim, TensorType, ValueType, bits_of
from accelrt.partition.cut import Piece

FLOPS_PER_BYTE = 4.0
"""How many operations take the time of moving one byte: a core of a present server computes some 50 GFLOP/s in float32
and moves some 12 GB/s to and from memory when all cores do."""

SLACK = 0.02
"""How much larger than the least possible the largest stage may be if less crosses between stages for it: no estimate,
and few measurements, are nearer than that."""

_ENDS_A_KERNEL = frozenset(
    {"BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Gelu"}
)
_PICKS = frozenset({"Gather", "GatherElements", "GatherND"})
_BEGINS_A_KERNEL = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "Add"})


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How a model becomes a pipeline.

    Attributes:
        count: Stages, one for each core.
        costs: What each node costs, by name, in any unit: seconds that were measured. Nodes that are not named are
            estimated, and then all of them are. `accelrt.runtime.stage_times.measured_plan` measures.

    Raises:
        OptionError: ``count`` is less than 1, or a cost is negative or no number.
    """

    count: int
    costs: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise OptionError(f"cores takes a number of 1 or more, not {self.count!r}.")
        wrong = [name for name, cost in (self.costs or {}).items() if not 0 <= cost < inf]
        if wrong:
            raise OptionError(
                f"The cost of node {wrong[0]!r} is {(self.costs or {})[wrong[0]]!r}; it must be 0 or more."
            )


@dataclass(frozen=True, slots=True)
class StagedPiece:
    """A piece of a cut that lies within one stage."""

    piece: Piece
    stage: int


def stage_pieces(graph: Graph, pieces: Sequence[Piece], plan: StagePlan) -> list[StagedPiece]:
    """Cut the pieces of a partition, in the order in which they run, into stages.

    A stage is a run of nodes in that order, so it is convex; a piece that two stages share becomes two pieces.

    Raises:
        OptionError: There are fewer nodes than stages.
    """
    order = [index for piece in pieces for index in piece.nodes]
    if plan.count > len(order):
        raise OptionError(
            f"The model is to be cut into {plan.count} stages, and has {len(order)} nodes.", hint="Ask for fewer cores."
        )
    nodes = [graph.nodes[index] for index in order]
    costs = node_costs(graph, nodes, plan.costs)
    crossing = crossing_bytes(graph, nodes)
    bounds = split(costs, crossing, plan.count, allowed=between_kernels(nodes), slack=SLACK)
    staged: list[StagedPiece] = []
    start = 0
    for piece in pieces:
        end = start + len(piece.nodes)
        for stage in range(plan.count):
            low, high = max(start, bounds[stage]), min(end, bounds[stage + 1])
            if low < high:
                part = Piece(piece.owner, tuple(piece.nodes[low - start : high - start]))
                staged.append(StagedPiece(part, stage))
        start = end
    return staged


def split(
    costs: Sequence[float],
    crossing: Sequence[float],
    count: int,
    *,
    allowed: Sequence[bool] | None = None,
    slack: float = 0.0,
) -> list[int]:
    """Split a chain into runs so that the most expensive run costs least, and among such splits the least crosses.

    Args:
        costs: Of each element, 0 or more.
        crossing: What crosses the cut before element i, for i from 0 to n; the first and the last are not used.
        count: Runs wanted, from 1 to n; none is empty.
        allowed: Whether a cut may be before element i, likewise; ignored if too few remain.
        slack: By which share of the least possible the largest run may be larger, for the sake of what crosses.

    Returns:
        The bounds of the runs, count + 1 of them, from 0 to n.

    Two passes of dynamic programming over the cut points, n² · count steps each in numpy: the first finds how small the
    largest run can be, the second the least crossing among splits whose runs are no larger than that. One pass that
    compared both at once would be wrong: of a prefix, a worse largest run can be the better choice if a later run is
    larger still.
    """
    n = len(costs)
    if not 1 <= count <= n:
        raise ValueError(f"{n} elements cannot be split into {count} runs")
    cuts = np.ones(n + 1, bool) if allowed is None else np.array(allowed, bool)
    cuts[[0, n]] = True
    if cuts.sum() < count + 1:
        cuts[:] = True
    points = np.flatnonzero(cuts)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])[points]
    price = np.asarray(crossing, float)[points]
    m = len(points) - 1

    # largest[i]: the least that the largest of the runs so far can be, if they end at cut point i.
    largest = sums - sums[0]
    largest[0] = np.inf
    for _ in range(count - 1):
        following = np.full(m + 1, np.inf)
        for end in range(1, m + 1):
            following[end] = np.maximum(largest[:end], sums[end] - sums[:end]).min()
        largest = following
    # Sums are of floats: a run must not be refused for the last bit of a difference.
    bound = largest[m] * (1 + slack) + 1e-9 * sums[m]

    total = np.where((sums - sums[0] <= bound) & (np.arange(m + 1) > 0), 0.0, np.inf)
    previous: list[Any] = []
    for _ in range(count - 1):
        following, origin = np.full(m + 1, np.inf), np.zeros(m + 1, int)
        for end in range(1, m + 1):
            fits = np.where(sums[end] - sums[:end] <= bound, total[:end] + price[:end], np.inf)
            origin[end] = int(fits.argmin())
            following[end] = fits[origin[end]]
        previous.append(origin)
        total = following
    chosen = [m]
    for origin in reversed(previous):
        chosen.append(int(origin[chosen[-1]]))
    return [0, *(int(points[one]) for one in reversed(chosen))]


def node_costs(graph: Graph, nodes: Sequence[Node], measured: Mapping[str, float] | None = None) -> list[float]:
    """Return what each node costs: as measured if every one was, else estimated in floating-point operations.

    The estimate adds to the operations of a node the bytes that it moves, weights among them, at `FLOPS_PER_BYTE`.
    Dimensions that are not known count as 1.
    """
    if measured is not None and all(node.name in measured for node in nodes):
        return [float(measured[node.name]) for node in nodes]
    return [operations(node) + FLOPS_PER_BYTE * _moved(graph, node) for node in nodes]


def operations(node: Node) -> float:
    """Estimate the floating-point operations of a node: two for each multiply-add of products and convolutions."""
    made = sum(_elements(type_) for type_ in node.output_types)
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        weight = node.input_types[3 if node.op_type == "QLinearConv" else 1]
        return 2.0 * made * prod(_sizes(weight)[1:])
    if node.op_type == "ConvTranspose":
        return 2.0 * _elements(node.input_types[0]) * prod(_sizes(node.input_types[1])[1:])
    if node.op_type == "Gemm":
        return 2.0 * made * _sizes(node.input_types[0])[0 if node.attributes.get("transA", 0) else -1]
    if node.op_type in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return 2.0 * made * _sizes(node.input_types[0])[-1]
    if node.op_type in ("LSTM", "GRU", "RNN"):
        steps, rows = (*_sizes(node.input_types[0]), 1, 1)[:2]
        return 2.0 * steps * rows * sum(_elements(type_) for type_ in node.input_types[1:3])
    inner = sum(operations(one) for body in node.bodies for one in body)
    return float(made) + inner


def _moved(graph: Graph, node: Node) -> float:
    values = sum(
        _bytes(graph.types.get(name)) for name in (*node.reads, *node.writes) if name not in graph.initializers
    )
    # Of a table that it picks from, it reads no more than it writes.
    weights = 0 if node.op_type in _PICKS else sum(graph.weight_bytes(node).values())
    return float(values + weights)


def crossing_bytes(graph: Graph, nodes: Sequence[Node]) -> list[float]:
    """Return for each place between nodes, and before the first and after the last, the bytes alive across it.

    Those are inputs of the model and values computed before that are read after, or are outputs of the model.
    """
    count = len(nodes)
    born = {port.name: 0 for port in graph.signature.inputs}
    born.update((name, place + 1) for place, node in enumerate(nodes) for name in node.writes)
    read = {name: place for place, node in enumerate(nodes) for name in node.reads}
    read.update((port.name, count) for port in graph.signature.outputs)
    change = np.zeros(count + 2)
    for name, start in born.items():
        # It crosses the cut before node p for start <= p <= the last node that reads it.
        end = read.get(name, -1)
        if end >= start:
            size = _bytes(graph.types.get(name))
            change[start] += size
            change[end + 1] -= size
    return [float(size) for size in np.cumsum(change)[: count + 1]]


def between_kernels(nodes: Sequence[Node]) -> list[bool]:
    """Tell for each place between nodes whether no kernel would be torn there that compilers make of several nodes.

    A normalisation or an activation that alone reads what a product or a convolution gives runs within its kernel.
    """
    place = {name: number for number, node in enumerate(nodes) for name in node.writes}
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.reads:
            readers[name] = readers.get(name, 0) + 1
    free = [True] * (len(nodes) + 1)
    for number, node in enumerate(nodes):
        first = node.inputs[0] if node.inputs else ""
        if node.op_type in _ENDS_A_KERNEL and first in place and readers[first] == 1:
            start = place[first]
            if nodes[start].op_type in _BEGINS_A_KERNEL:
                for cut in range(start + 1, number + 1):
                    free[cut] = False
    return free


def _sizes(type_: ValueType | None) -> tuple[int, ...]:
    """Return a shape with 1 for what is not known; at least one size."""
    shape: Sequence[Dim] = (type_.shape if isinstance(type_, TensorType) else None) or (1,)
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)


def _elements(type_: ValueType | None) -> int:
    return prod(_sizes(type_))


def _bytes(type_: ValueType | None) -> int:
    return _elements(type_) * bits_of(type_.dtype) // 8 if isinstance(type_, TensorType) else 0
