"""Prove that a model computes each row of a batch by itself, so that rows of several calls may share one.

A *row* is an index of the first dimension of every input. The proof walks the graph and keeps for each value how it
depends on the rows: not at all, by its sizes alone, or row by row along one axis. Each operator has a rule that says
along which axis its outputs are row-wise, or why they are not; one without a rule is a refusal. So the answer errs
to the safe side. And it holds for all inputs, which no trial on some inputs can say: an operator that scales by the
largest value of the whole tensor couples rows by less than any tolerance.

Sizes along an axis are not derived but read: the graph is bound to two batch sizes or more, onnx infers the types of
each, and a value is row-wise along an axis only if its size there is the same multiple of the batch every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelrt.errors import AccelrtError
from accelrt.graph.bind import bind_first_dimension, first_dimension
from accelrt.graph.model import Graph
from accelrt.graph.node import Node
from accelrt.partition.row_facts import FIXED, Coupled, Extents, Fact, Fixed, Rows, Sizes, describe
from accelrt.partition.row_rules import RULES
from accelrt.partition.row_sizes import follow_sizes

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


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
            fact = walk.facts.get(port.name, FIXED)
            if fact != Rows(0):
                raise Coupled(f"output {port.name!r} {describe(fact)}")
    except Coupled as coupled:
        return BatchAxis(False, name, str(coupled))
    except AccelrtError as error:
        return BatchAxis(False, name, f"it cannot be specialised: {error.message.rstrip('.')}")
    return BatchAxis(True, name, f"each of {len(walk.nodes)} nodes keeps rows apart")


class _Walk:
    """What is known so far of the values of a graph, bound to several batch sizes."""

    def __init__(self, sizes: Sequence[int], graphs: Sequence[Graph]) -> None:
        self.nodes = graphs[0].nodes
        self._extents = Extents(sizes, graphs)
        self.facts: dict[str, Fact] = {}
        for port in graphs[0].signature.inputs:
            self.facts[port.name] = self._extents.rows(port.name, 0)

    def visit(self, node: Node) -> None:
        """Conclude what a node's outputs are.

        Raises:
            Coupled: Rows meet in it, or no rule says that they do not.
        """
        facts = [self.fact(name) for name in node.inputs]
        try:
            if node.op_type in _RANDOM:
                raise Coupled("its values are random")
            if all(fact == FIXED for fact in (*facts, *map(self.fact, node.captures))):
                self.facts.update(dict.fromkeys(node.writes, FIXED))
            elif node.is_control_flow:
                raise Coupled("what its bodies do with rows is not followed")
            elif not any(isinstance(fact, Rows) for fact in facts) and (
                entries := follow_sizes(self._extents, node, facts)
            ):
                self.facts[node.outputs[0]] = FIXED if not any(entries.depends) else entries
            else:
                rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
                if rule is None:
                    raise Coupled("no rule says that it keeps rows apart")
                answer = rule(self._extents, node, facts)
                if isinstance(answer, Fixed | Sizes | Rows):
                    self.facts[node.outputs[0]] = answer
                else:
                    self._conclude(node, facts, [answer] * len(node.outputs) if isinstance(answer, int) else answer)
        except (IndexError, KeyError, ValueError) as error:
            raise Coupled(
                f"node {node.name!r} ({node.kind}) is not as its operator is defined: {type(error).__name__}: {error}"
            ) from error
        except Coupled as coupled:
            raise Coupled(f"at node {node.name!r} ({node.kind}): {coupled}") from None

    def _conclude(self, node: Node, facts: Sequence[Fact], axes: Sequence[int]) -> None:
        """Check the axes that a rule gave against the sizes that onnx inferred."""
        layouts = {(fact.block, fact.outer) for fact in facts if isinstance(fact, Rows)}
        if len(layouts) > 1:
            raise Coupled("its inputs hold different numbers of indices a row")
        if len(axes) < len(node.outputs):
            raise Coupled("no rule tells how its further outputs hold rows")
        for name, axis in zip(node.outputs, axes, strict=False):
            if name:
                rows = self._extents.rows(name, axis, next(iter(layouts))[1] if layouts else 1)
                if layouts and (rows.block, rows.outer) not in layouts:
                    raise Coupled(f"it changes how many indices along axis {axis} a row has")
                self.facts[name] = rows

    def fact(self, name: str) -> Fact:
        """Return what is known of a value; weights and absent inputs are fixed."""
        return self.facts.get(name, FIXED)
