"""The partitioner on random graphs: what every cut must hold, and how it compares with the rule of PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import accelrt
from accelrt.backend import SUPPORTED, Backend, Caps, Device, Engine, Precision, Verdict
from accelrt.errors import CompileError
from accelrt.graph.node import Node
from accelrt.partition.assign import assign
from accelrt.partition.cost import partition
from accelrt.partition.cut import Piece, cut
from accelrt.registry import REGISTRY, Candidate
from accelrt.target import Target
from accelrt.testing.fake import FakeBackend

RANDOM_GRAPHS = 2000
COMPILED_GRAPHS = 2000
FUSED_GRAPHS = 150

_PURE = settings(
    max_examples=RANDOM_GRAPHS,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# ---------------------------------------------------------------- graphs without meaning, for the pure part


def node(index: int, reads: Sequence[str], outputs: int = 1, captures: Sequence[str] = ()) -> Node:
    """A node that only has a place in the graph; every third value it reads, it reads as a capture if told so."""
    names = tuple(f"v{index}.{k}" for k in range(outputs))
    return Node(
        name=f"n{index}",
        domain="",
        op_type=f"Op{index}",
        version=1,
        opset=1,
        inputs=(*reads, ""),
        outputs=(*names, ""),
        input_types=(None,) * (len(reads) + 1),
        output_types=(None,) * (outputs + 1),
        captures=tuple(captures),
        bodies=((),) if captures else (),
    )


@dataclass(frozen=True)
class Drawn:
    """A random graph; ``able[n]`` holds the engines that can run node n, always the last one among them."""

    nodes: tuple[Node, ...]
    able: tuple[frozenset[int], ...]
    engines: int

    @property
    def first_able(self) -> list[int]:
        return [min(able) for able in self.able]


def random_graph(seed: int, size: int, engines: int) -> Drawn:
    """Draw a graph of many shapes: deep, wide, dense, disconnected; several inputs, outputs and shared weights."""
    rng = random.Random(seed)
    values = [f"x{k}" for k in range(rng.randint(1, 4))] + [f"w{k}" for k in range(rng.randint(0, 3))]
    near = rng.choice([2, 5, 100])
    density = rng.choice([0.15, 0.5, 0.85])
    nodes, able = [], []
    for index in range(size):
        reads = [rng.choice(values[-near:] if rng.random() < 0.8 else values) for _ in range(rng.randint(0, 3))]
        captures = [rng.choice(values) for _ in range(rng.randint(1, 3))] if rng.random() < 0.1 else []
        made = node(index, reads, rng.choice([1, 1, 1, 2, 3]), captures)
        nodes.append(made)
        values.extend(made.writes)
        able.append(frozenset({engines - 1} | {e for e in range(engines - 1) if rng.random() < density}))
    return Drawn(tuple(nodes), tuple(able), engines)


@st.composite
def small_graph(draw: st.DrawFn, engines: int) -> Drawn:
    """The same, drawn choice by choice, so that a failure shrinks to the graph that shows it."""
    nodes: list[Node] = []
    able = []
    values = ["x0", "x1", "w0"]
    for index in range(draw(st.integers(0, 9))):
        picks = draw(st.lists(st.integers(0, len(values) - 1), max_size=3))
        captured = draw(st.booleans())
        names = [values[pick] for pick in picks]
        nodes.append(node(index, [] if captured else names, draw(st.integers(1, 2)), names if captured else ()))
        values.extend(nodes[-1].writes)
        able.append(frozenset(draw(st.sets(st.integers(0, engines - 2)))) | {engines - 1})
    return Drawn(tuple(nodes), tuple(able), engines)


def any_graph(engines: int) -> st.SearchStrategy[Drawn]:
    return st.one_of(
        small_graph(engines),
        st.builds(random_graph, st.integers(0, 2**32), st.integers(1, 60), st.just(engines)),
        st.builds(random_graph, st.integers(0, 2**32), st.integers(30, 60), st.just(engines)),
    )


def check_cut(nodes: Sequence[Node], owners: Sequence[int], pieces: Sequence[Piece]) -> None:
    """What every cut must hold, whatever its quality."""
    assert sorted(index for piece in pieces for index in piece.nodes) == list(range(len(nodes)))
    assert all(owners[index] == piece.owner for piece in pieces for index in piece.nodes)
    assert all(left.owner != right.owner for left, right in pairwise(pieces))
    inside = {name for n in nodes for name in n.writes}
    known: set[str] = set()
    for piece in pieces:
        for index in piece.nodes:  # also within a piece: engines get nodes in an order in which they can run
            reads = {name for name in nodes[index].reads if name in inside}
            assert reads <= known, f"{nodes[index].name} runs before what it reads"
            known.update(nodes[index].writes)
    check_convex(nodes, pieces)


def check_convex(nodes: Sequence[Node], pieces: Sequence[Piece]) -> None:
    """No path leaves a piece and comes back, by reachability alone, without a look at the order of the pieces."""
    producer = {name: index for index, n in enumerate(nodes) for name in n.writes}
    ancestors: list[int] = []  # for each node, the set of all nodes before it, as bits
    for n in nodes:
        bits = 0
        for name in n.reads:
            if name in producer:
                bits |= ancestors[producer[name]] | 1 << producer[name]
        ancestors.append(bits)
    for piece in pieces:
        members = sum(1 << index for index in piece.nodes)
        above = 0
        for index in piece.nodes:
            above |= ancestors[index]
        between = above & ~members
        while between:
            low = between & -between
            assert not ancestors[low.bit_length() - 1] & members, "a path leaves a segment and comes back"
            between ^= low


@given(any_graph(2))
@_PURE
def test_cuts_for_two_engines_hold(drawn: Drawn) -> None:
    owners = drawn.first_able
    pieces = cut(drawn.nodes, owners)
    check_cut(drawn.nodes, owners, pieces)
    assert pieces == cut(drawn.nodes, owners)


@given(any_graph(3))
@_PURE
def test_cuts_for_three_engines_hold(drawn: Drawn) -> None:
    owners = drawn.first_able
    pieces = cut(drawn.nodes, owners)
    check_cut(drawn.nodes, owners, pieces)
    assert pieces == cut(drawn.nodes, owners)


def fewest_segments(nodes: Sequence[Node], owners: Sequence[int]) -> int:
    """The optimum, by breadth-first search over all sets of nodes that can have run after k segments."""
    producer = {name: index for index, n in enumerate(nodes) for name in n.writes}
    needs = [{producer[name] for name in n.reads if name in producer} for n in nodes]

    def closures(done: frozenset[int], owner: int) -> frozenset[int]:
        grown = set(done)
        while True:
            more = [i for i in range(len(nodes)) if i not in grown and owners[i] == owner and needs[i] <= grown]
            if not more:
                return frozenset(grown)
            grown.update(more)

    layer, count = {frozenset[int]()}, 0
    while not any(len(done) == len(nodes) for done in layer):
        layer = {closures(done, owner) for done in layer for owner in set(owners)}
        count += 1
    return count


@given(small_graph(2))
@settings(_PURE, max_examples=400)
def test_two_engines_get_the_fewest_segments_there_can_be(drawn: Drawn) -> None:
    assert len(cut(drawn.nodes, drawn.first_able)) == fewest_segments(drawn.nodes, drawn.first_able)


@given(small_graph(3))
@settings(_PURE, max_examples=400)
def test_three_engines_get_close_to_the_fewest_segments(drawn: Drawn) -> None:
    """The choice among three is a heuristic: on ten nodes or fewer it has never been more than two segments off."""
    assert len(cut(drawn.nodes, drawn.first_able)) <= fewest_segments(drawn.nodes, drawn.first_able) + 2


# ---------------------------------------------------------------- the rule of torch.fx


@cache
def _fx() -> Any:
    pytest.importorskip("torch", reason="compares with torch.fx.passes.infra.partitioner, and torch is not installed")
    from torch import fx
    from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
    from torch.fx.passes.operator_support import OperatorSupportBase

    class Support(OperatorSupportBase):  # type: ignore[misc]
        def is_node_supported(self, submodules: Mapping[str, Any], candidate: Any) -> bool:
            return candidate.op == "call_function" and bool(candidate.meta["supported"])

    return fx, CapabilityBasedPartitioner, Support


def _anything(*arguments: Any) -> Any:
    return arguments


def fx_partitioner(drawn: Drawn) -> Any:
    """The same graph, with the same support, as torch.fx sees it. A node stands for all of its outputs."""
    fx, partitioner, support = _fx()
    graph = fx.Graph()
    made: dict[str, Any] = {}
    produced = {name for n in drawn.nodes for name in n.writes}
    for name in dict.fromkeys(name for n in drawn.nodes for name in n.reads if name not in produced):
        made[name] = graph.placeholder(name.replace(".", "_"))
    used = {name for n in drawn.nodes for name in n.reads}
    results = []
    for n, owner in zip(drawn.nodes, drawn.first_able, strict=True):
        call = graph.call_function(_anything, tuple(made[name] for name in n.reads))
        call.meta["supported"] = owner == 0
        made.update(dict.fromkeys(n.writes, call))
        if not used.intersection(n.writes):
            results.append(call)
    graph.output(tuple(results))
    module = fx.GraphModule({}, graph)
    return partitioner(module, support(), allows_single_node_partition=True)


@given(any_graph(2))
@_PURE
def test_never_more_accelerator_segments_than_torch_fx_proposes(drawn: Drawn) -> None:
    pieces = cut(drawn.nodes, drawn.first_able)
    proposed = fx_partitioner(drawn).propose_partitions()
    assert sum(piece.owner == 0 for piece in pieces) <= len(proposed)


@given(any_graph(2))
@settings(_PURE, max_examples=FUSED_GRAPHS)
def test_never_more_segments_than_torch_fx_leaves_runs(drawn: Drawn) -> None:
    """`fuse_partitions` leaves a list of fused modules and single nodes; each change between them is a switch."""
    partitioner = fx_partitioner(drawn)
    fused = partitioner.fuse_partitions(partitioner.propose_partitions())
    kinds = [n.op == "call_module" for n in fused.graph.nodes if n.op in ("call_module", "call_function")]
    runs = sum(1 for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1])
    assert len(cut(drawn.nodes, drawn.first_able)) <= runs


# ---------------------------------------------------------------- assigning and merging


class _Stub(Engine):
    """An engine that can run the nodes it is told, by name."""

    name: ClassVar[str] = "stub"

    def __init__(self, able: frozenset[str], *, last_resort: bool = False) -> None:
        self.able = able
        self.asked: list[str] = []
        self.caps = Caps(last_resort=last_resort)  # type: ignore[misc]

    def supports(self, asked: Node, precision: Precision) -> Verdict:
        self.asked.append(asked.name)
        return SUPPORTED if asked.name in self.able else Verdict.refuse(f"{asked.name} is too much for me")

    def status(self) -> Any: ...
    def fingerprint(self) -> Any: ...
    def compile(self, job: Any, out: Any) -> Any: ...
    def load(self, program: Any, devices: Any) -> Any: ...


class _StubBackend(Backend):
    name: ClassVar[str] = "stub"

    def devices(self) -> Sequence[Device]:
        return ()


def chain_of(drawn: Drawn, *, last_resort: bool = False) -> tuple[Candidate, ...]:
    """One candidate an engine of the drawn graph; the last one may be a last resort."""
    engines = [
        _Stub(
            frozenset(n.name for n, able in zip(drawn.nodes, drawn.able, strict=True) if number in able),
            last_resort=last_resort and number == drawn.engines - 1,
        )
        for number in range(drawn.engines)
    ]
    return tuple(Candidate(_StubBackend(), engine) for engine in engines)


def precisions(drawn: Drawn) -> list[Precision]:
    return ["fp32"] * drawn.engines


@given(any_graph(3))
@settings(_PURE, max_examples=500)
def test_every_node_goes_to_the_first_engine_that_takes_it(drawn: Drawn) -> None:
    candidates = chain_of(drawn)
    result = assign(drawn.nodes, candidates, precisions(drawn))
    assert list(result.owners) == drawn.first_able
    for index, owner in enumerate(result.owners):
        row = [verdicts[index] for verdicts in result.verdicts]
        assert all(verdict is not None and not verdict.supported and verdict.reason for verdict in row[:owner])
        assert row[owner] == SUPPORTED
        assert row[owner + 1 :] == [None] * (drawn.engines - owner - 1), "asked without need"


def test_a_node_that_nobody_takes_is_an_error_with_every_reason() -> None:
    nodes = (node(0, ["x0"]), node(1, ["v0.0"]))
    candidates = tuple(Candidate(_StubBackend(), _Stub(frozenset({"n0"}))) for _ in range(2))
    with pytest.raises(CompileError, match=r"'n1' \(Op1-1\).*too much for me.*too much for me"):
        assign(nodes, candidates, ["fp32", "fp32"])


def test_what_was_refused_before_is_not_asked_again() -> None:
    engine = _Stub(frozenset({"n0"}))
    rest = _Stub(frozenset({"n0"}))
    candidates = (Candidate(_StubBackend(), engine), Candidate(_StubBackend(), rest))
    result = assign([node(0, [])], candidates, ["fp32", "fp32"], {(0, 0): "failed to compile: boom"})
    assert result.owners == (1,)
    assert result.verdicts[0][0] == Verdict.refuse("failed to compile: boom")
    assert engine.asked == []


@given(any_graph(3), st.integers(1, 6), st.booleans())
@settings(_PURE, max_examples=700)
def test_small_islands_go_where_a_later_engine_takes_them(drawn: Drawn, least: int, last_resort: bool) -> None:
    candidates = chain_of(drawn, last_resort=last_resort)
    before = assign(drawn.nodes, candidates, precisions(drawn))
    result = partition(drawn.nodes, before, candidates, precisions(drawn), least)
    owners = [0] * len(drawn.nodes)
    for piece in result.pieces:
        for index in piece.nodes:
            owners[index] = piece.owner
    check_cut(drawn.nodes, owners, result.pieces)

    for index, (old, new) in enumerate(zip(before.owners, owners, strict=True)):
        assert new in drawn.able[index], "a node went to an engine that refuses it"
        assert new >= old, "a node went back to an earlier engine"
        if last_resort and new == drawn.engines - 1:
            assert old == new, "a last resort gained a node"
        if new > old:
            verdict = result.verdicts[old][index]
            assert verdict is not None and not verdict.supported, "a move without a reason in the report"
    for piece in result.pieces if len(result.pieces) > 1 else ():
        heirs = [
            later
            for later in range(piece.owner + 1, drawn.engines)
            if all(later in drawn.able[index] for index in piece.nodes)
            and not (last_resort and later == drawn.engines - 1)
        ]
        assert len(piece.nodes) >= least or not heirs, "an island stayed although a later engine takes it"
    again = partition(drawn.nodes, before, candidates, precisions(drawn), least)
    assert again.pieces == result.pieces
    if least == 1:
        assert owners == list(before.owners)


def test_nothing_moves_to_where_it_failed_to_compile() -> None:
    nodes = [node(0, ["x0"]), node(1, ["v0.0"]), node(2, ["v1.0"])]
    engines = [_Stub(frozenset({"n1"})), _Stub(frozenset({"n0", "n1", "n2"}))]
    candidates = tuple(Candidate(_StubBackend(), engine) for engine in engines)
    refused = {(1, 1): "failed to compile: boom"}
    before = assign(nodes, candidates, ["fp32", "fp32"], refused)
    result = partition(nodes, before, candidates, ["fp32", "fp32"], 3, refused)
    assert [piece.owner for piece in result.pieces] == [1, 0, 1]


def test_merging_ends_on_a_long_alternating_chain() -> None:
    size = 2000
    nodes = [node(i, [f"v{i - 1}.0"] if i else ["x0"]) for i in range(size)]
    able = tuple(frozenset({0, 1}) if i % 2 else frozenset({1}) for i in range(size))
    drawn = Drawn(tuple(nodes), able, 2)
    candidates = chain_of(drawn)
    result = partition(nodes, assign(nodes, candidates, precisions(drawn)), candidates, precisions(drawn), 2)
    assert [piece.owner for piece in result.pieces] == [1]


# ---------------------------------------------------------------- graphs that compute, against onnxruntime on the whole


def numeric_model(seed: int) -> onnx.ModelProto:
    """A random model over float32 [2, 4] and [2, 2]: arithmetic, several outputs, shared weights, captures."""
    rng = random.Random(seed)
    data = np.random.default_rng(seed)
    wide = [f"x{k}" for k in range(rng.randint(1, 3))]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in wide]
    inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    weights = [f"w{k}" for k in range(2)]
    initializers = [numpy_helper.from_array(data.uniform(-1, 1, (2, 4)).astype(np.float32), name) for name in weights]
    narrow: list[str] = []
    nodes: list[onnx.NodeProto] = []
    used: set[str] = set()

    def take(pool: list[str]) -> str:
        name = rng.choice(pool[-6:] if rng.random() < 0.7 else pool)
        used.add(name)
        return name

    def add(op_type: str, reads: list[str], writes: list[str], **attributes: Any) -> None:
        nodes.append(helper.make_node(op_type, reads, writes, name=f"n{len(nodes)}", **attributes))

    for index in range(rng.choice([1, 4, 12, 30, 55])):
        kind = rng.choice(["unary", "binary", "binary", "weight", "split", "concat", "if", "max"])
        out = f"v{index}"
        if kind == "unary":
            add(rng.choice(["Relu", "Neg", "Tanh", "Abs"]), [take(wide)], [out])
        elif kind == "binary":
            add(rng.choice(["Add", "Sub"]), [take(wide), take(wide)], [out])
        elif kind == "weight":
            add(rng.choice(["Mul", "Add"]), [take(wide), rng.choice(weights)], [out])
        elif kind == "max":
            add("Max", [take(wide) for _ in range(rng.randint(1, 3))], [out])
        elif kind == "split":
            halves = [f"{out}.left", f"{out}.right"]
            add("Split", [take(wide)], halves, axis=1, num_outputs=2)
            narrow.extend(halves)
            continue
        elif kind == "concat" and narrow:
            add("Concat", [take(narrow), take(narrow)], [out], axis=1)
        elif kind == "if":
            branches = {}
            for branch, op_type in (("then_branch", "Add"), ("else_branch", "Max")):
                inner = f"{out}.{branch}"
                body = helper.make_graph(
                    [helper.make_node(op_type, [take(wide), rng.choice(weights)], [inner], name=f"{inner}.node")],
                    branch,
                    [],
                    [helper.make_tensor_value_info(inner, TensorProto.FLOAT, [2, 4])],
                )
                branches[branch] = body
            add("If", ["flag"], [out], **branches)
        else:
            continue
        wide.append(out)
    produced = [name for n in nodes for name in n.output]
    outputs = [name for name in produced if name not in used or rng.random() < 0.1] or ["x0"]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "random",
            inputs,
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2 if name in narrow else 4])
                for name in outputs
            ],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def feeds_of(model: onnx.ModelProto, seed: int) -> dict[str, Any]:
    data = np.random.default_rng(seed)
    feeds: dict[str, Any] = {
        value.name: data.uniform(-1, 1, (2, 4)).astype(np.float32)
        for value in model.graph.input
        if value.name != "flag"
    }
    feeds["flag"] = np.array(bool(seed % 2))
    return feeds


def whole(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """What onnxruntime says about the uncut model, without any optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in model.graph.output]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture
def fake() -> Iterator[Callable[[Callable[[Node], bool]], None]]:
    def use(supports: Callable[[Node], bool]) -> None:
        accelrt.register(FakeBackend.configured("fake", operators=supports))

    yield use
    REGISTRY.unregister("fake")


def supported_by(seed: int) -> Callable[[Node], bool]:
    """A random set of nodes, by their names; what is inside a body follows its owner."""
    density = random.Random(seed).choice([0.2, 0.5, 0.8, 1.0])
    return lambda n: "." in n.name or random.Random(f"{seed} {n.name}").random() < density


@pytest.mark.parametrize("start", range(0, COMPILED_GRAPHS, 20))
def test_cut_models_compute_what_the_whole_computes(start: int, fake: Callable[..., None]) -> None:
    cuts = 0
    for seed in range(start, start + 20):
        model = numeric_model(seed)
        supports = supported_by(seed)
        fake(supports)
        artifact = accelrt.compile(model, "fake", fallback="allow", cache=False)
        for segment in artifact.placement.segments:
            for place in segment.nodes:
                assert (segment.engine == "fake/fake") == supports(_named(place.name))
        cuts += len(artifact.placement.segments) - 1
        feeds = feeds_of(model, seed)
        expected = whole(model, feeds)
        with accelrt.load(artifact, fallback="error") as session:
            outputs = session.predict(feeds)
        assert list(outputs) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}, {name}")
    assert cuts > 10, "these graphs were hardly cut; the test tests nothing"


def _named(name: str) -> Node:
    return Node(name, "", "", 1, 1, (), (), (), ())


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_three_engines_compute_what_the_whole_computes(
    seed: int, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime is made to refuse some nodes as well; they go to the reference evaluator."""
    model = numeric_model(seed)
    fake(supported_by(seed))
    engine = type(next(c.engine for c in REGISTRY.candidates(Target("cpu"))))
    real, taken = engine.supports, supported_by(seed + 1)

    def supports(self: Engine, n: Node, precision: Precision) -> Verdict:
        return real(self, n, precision) if taken(n) else Verdict.refuse("told to refuse")

    monkeypatch.setattr(engine, "supports", supports)
    computes = accelrt.compile(model, "fake", fallback="allow", cache=False)
    feeds = feeds_of(model, seed)
    with accelrt.load(computes, fallback="error") as session:
        outputs = session.predict(feeds)
    for name, value in whole(model, feeds).items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("least", [2, 4])
@pytest.mark.parametrize("seed", range(2000, 2015))
def test_merged_models_compute_what_the_whole_computes(seed: int, least: int, fake: Callable[..., None]) -> None:
    model = numeric_model(seed)
    fake(supported_by(seed))
    options = {"min_segment_nodes": least}
    artifact = accelrt.compile(model, "fake", fallback="allow", cache=False, options=options)
    places = artifact.placement.segments
    small = [p for p in places if p.engine == "fake/fake" and len(p.nodes) < least]
    assert not small or len(places) == 1, "the CPU takes all of these nodes, so no island is left"
    feeds = feeds_of(model, seed)
    with accelrt.load(artifact) as session:
        outputs = session.predict(feeds)
    for name, value in whole(model, feeds).items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [3, 7, 11])
def test_the_same_model_is_cut_the_same_way(seed: int, fake: Callable[..., None]) -> None:
    fake(supported_by(seed))
    placements = [
        accelrt.compile(numeric_model(seed), "fake", fallback="allow", cache=False).placement for _ in range(3)
    ]
    assert placements[0] == placements[1] == placements[2]


def test_a_segment_that_fails_to_compile_goes_to_the_next_engine(caplog: pytest.LogCaptureFixture) -> None:
    accelrt.register(FakeBackend.configured("fake", fails_to_compile=lambda kinds: "Tanh" in kinds))
    try:
        for seed in range(3000, 3010):
            model = numeric_model(seed)
            artifact = accelrt.compile(model, "fake", fallback="allow", cache=False)
            feeds = feeds_of(model, seed)
            with accelrt.load(artifact) as session:
                outputs = session.predict(feeds)
            for name, value in whole(model, feeds).items():
                np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5)
    finally:
        REGISTRY.unregister("fake")


def test_an_island_whose_new_engine_fails_to_compile_it_stays() -> None:
    """The island would move to onnxruntime for its size, fail there, come back, and move again without end."""
    from accelrt_cpu.onnxruntime import OnnxRuntimeEngine

    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Relu", ["x0"], ["a"], name="n0"),
                helper.make_node("Neg", ["a"], ["y"], name="n1"),
            ],
            "two",
            [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [2, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    real, calls = OnnxRuntimeEngine.compile, []

    def compile_(self: Engine, job: Any, out: Any) -> Any:
        kinds = [n.op_type for n in onnx.load(job.model, load_external_data=False).graph.node]
        calls.append(kinds)
        if len(calls) > 20:
            raise AssertionError("it goes on and on")
        if out.parent.name.startswith("programs-") and len(kinds) == 2:
            raise CompileError("told to fail on both together")
        return real(self, job, out)

    accelrt.register(FakeBackend.configured("fake", operators={"Neg"}))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnnxRuntimeEngine, "compile", compile_)
            options = {"min_segment_nodes": 2}
            artifact = accelrt.compile(model, "fake", fallback="allow", cache=False, options=options)
    finally:
        REGISTRY.unregister("fake")
    assert {name for p in artifact.placement.segments for name in [p.engine]} == {"fake/fake", "cpu/reference"}


def test_explain_shows_names_with_brackets_as_they_are(fake: Callable[..., None]) -> None:
    """Names and reasons are text, not markup: `[batch, 3]` and `[/x]` must come out."""
    model = numeric_model(5)
    for position, n in enumerate(model.graph.node):
        n.name = f"layer[/{position}]"
    accelrt.register(FakeBackend.configured("fake", operators=lambda n: False))
    text = accelrt.compile(model, "fake", fallback="allow", cache=False).explain()
    assert "layer[/0]" in text


@given(st.integers(0, 2**32))
@example(0)
@settings(_PURE, max_examples=50)
def test_an_empty_graph_and_single_owners_are_one_segment_at_most(seed: int) -> None:
    assert cut([], []) == []
    drawn = random_graph(seed, 20, 2)
    assert len(cut(drawn.nodes, [0] * 20)) == 1
