"""Cutting into stages: as even as any cut, then with as little crossing as any; and what nodes cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import OptionError
from accelrt.graph.load import load_graph
from accelrt.partition.cut import Piece
from accelrt.partition.stages import (
    SLACK,
    StagePlan,
    between_kernels,
    crossing_bytes,
    node_costs,
    operations,
    split,
    stage_pieces,
)
from accelrt.testing import models

weights = st.integers(0, 12).map(float)


def every_split(n: int, count: int) -> list[list[int]]:
    return [[0, *inner, n] for inner in itertools.combinations(range(1, n), count - 1)]


def largest(costs: Sequence[float], bounds: Sequence[int]) -> float:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


def crossed(crossing: Sequence[float], bounds: Sequence[int]) -> float:
    return sum(crossing[place] for place in bounds[1:-1])


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[float], list[float], list[bool], int]:
    n = draw(st.integers(1, 9))
    costs = draw(st.lists(weights, min_size=n, max_size=n))
    crossing = draw(st.lists(weights, min_size=n + 1, max_size=n + 1))
    allowed = draw(st.lists(st.booleans(), min_size=n + 1, max_size=n + 1))
    return costs, crossing, allowed, draw(st.integers(1, n))


@given(chains(), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=800, deadline=None)
def test_no_split_is_better(chain: tuple[list[float], list[float], list[bool], int], slack: float) -> None:
    costs, crossing, allowed, count = chain
    bounds = split(costs, crossing, count, allowed=allowed, slack=slack)
    n = len(costs)
    assert bounds[0] == 0 and bounds[-1] == n and len(bounds) == count + 1
    assert all(a < b for a, b in itertools.pairwise(bounds))
    within = [one for one in every_split(n, count) if all(allowed[place] for place in one[1:-1])]
    within = within or every_split(n, count)  # what forbids too much forbids nothing
    least = min(largest(costs, one) for one in within)
    fair = [one for one in within if largest(costs, one) <= least * (1 + slack) + 1e-6]
    assert bounds in fair
    assert crossed(crossing, bounds) == min(crossed(crossing, one) for one in fair)


@pytest.mark.parametrize("count", [0, 4])
def test_what_cannot_be_split_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        split([1.0, 1.0, 1.0], [0.0] * 4, count)


def test_thousands_of_nodes_are_split_in_seconds() -> None:
    rng = np.random.default_rng(0)
    costs = list(rng.random(3000))
    bounds = split(costs, list(rng.random(3001)), 8)
    assert largest(costs, bounds) == pytest.approx(sum(costs) / 8, rel=0.01)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_stages_of_resnet_are_even_and_convex(count: int) -> None:
    graph = load_graph(models.resnet50(batch=1))
    staged = stage_pieces(graph, [Piece(0, tuple(range(len(graph.nodes))))], StagePlan(count))
    assert [one.stage for one in staged] == list(range(count))
    assert [index for one in staged for index in one.piece.nodes] == list(range(len(graph.nodes)))
    costs = [sum(node_costs(graph, [graph.nodes[i] for i in one.piece.nodes])) for one in staged]
    assert max(costs) < 1.15 * sum(costs) / count
    # No kernel is torn: each stage begins with what begins one.
    assert {graph.nodes[one.piece.nodes[0]].op_type for one in staged} <= {"Conv", "Add", "MaxPool"}


def test_stages_keep_the_engines_of_pieces() -> None:
    graph = load_graph(models.mlp(hidden=(16, 16, 16)))
    pieces = [Piece(0, (0, 1)), Piece(1, (2,)), Piece(0, (3, 4, 5, 6))]
    staged = stage_pieces(graph, pieces, StagePlan(3, {node.name: 1.0 for node in graph.nodes}))
    assert [index for one in staged for index in one.piece.nodes] == list(range(7))
    owners = {index: one.piece.owner for one in staged for index in one.piece.nodes}
    assert owners == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0, 6: 0}
    assert [one.stage for one in staged] == sorted(one.stage for one in staged)
    assert {one.stage for one in staged} == {0, 1, 2}


def test_measured_costs_decide() -> None:
    graph = load_graph(models.mlp(hidden=(16, 16, 16)))
    whole = [Piece(0, tuple(range(7)))]
    costs = {node.name: 0.001 for node in graph.nodes} | {graph.nodes[0].name: 5.0}
    first, _ = stage_pieces(graph, whole, StagePlan(2, costs))
    assert first.piece.nodes == (0, 1)  # the Relu goes with its Gemm
    # Costs of some nodes alone are no measure for the others.
    partial = stage_pieces(graph, whole, StagePlan(2, {graph.nodes[0].name: 5.0}))
    assert partial == stage_pieces(graph, whole, StagePlan(2))


def test_more_stages_than_nodes_is_an_error() -> None:
    graph = load_graph(models.mlp(hidden=()))
    with pytest.raises(OptionError, match="2 stages, and has 1 nodes"):
        stage_pieces(graph, [Piece(0, (0,))], StagePlan(2))


def test_operations_are_those_of_the_papers() -> None:
    """ResNet-50 takes 4.1 G multiply-adds, two operations each; what else it computes is little."""
    graph = load_graph(models.resnet50(batch=1))
    assert sum(map(operations, graph.nodes)) == pytest.approx(2 * 4.1e9, rel=0.03)
    bert = load_graph(models.bert_base(batch=1, sequence=128))
    # 12 layers of 12 h^2 + 2 s h multiply-adds a token: Kaplan et al., arXiv:2001.08361, table 1, and the pooler's h^2.
    h, s = 768, 128
    assert sum(map(operations, bert.nodes)) == pytest.approx(2 * (12 * s * (12 * h * h + 2 * s * h) + h * h), rel=0.05)


@pytest.mark.parametrize("name", ["mlp", "small_cnn"])
def test_what_crosses_is_counted_right(name: str) -> None:
    graph = load_graph(getattr(models, name)(batch=2))
    nodes = graph.nodes
    sizes = {n: 4 * int(np.prod(t.shape)) for n, t in graph.types.items()}  # type: ignore[union-attr,arg-type]
    for place, counted in enumerate(crossing_bytes(graph, nodes)):
        before = {port.name for port in graph.signature.inputs} | {n for node in nodes[:place] for n in node.writes}
        after = {n for node in nodes[place:] for n in node.reads} | {port.name for port in graph.signature.outputs}
        assert counted == sum(sizes[n] for n in before & after)


def test_a_kernel_is_not_torn() -> None:
    graph = load_graph(models.small_cnn(batch=1))
    free = between_kernels(graph.nodes)
    kinds = [node.op_type for node in graph.nodes]
    torn = {kinds[place] for place, ok in enumerate(free[:-1]) if not ok}
    assert torn == {"BatchNormalization", "Relu"}
    assert all(free[place] for place, kind in enumerate(kinds) if kind in ("Conv", "MaxPool", "Gemm"))


def test_the_slack_is_small() -> None:
    assert SLACK <= 0.05
