"""Rounding at the borders of operators: what comes out can be held by the type, and is the nearest that can."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from accelrt.errors import GraphError
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.rounding import Borders, FloatKind, round_array, round_floats
from accelrt.graph.weights import is_external

KINDS: tuple[FloatKind, ...] = ("bfloat16", "float16", "tf32", "float8_e4m3fn")
NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}

FLOATS = hnp.arrays(
    np.float32,
    st.integers(1, 20),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False),
)


def model(opset: int = 21, weight: Any = None) -> onnx.ModelProto:
    """Return y = Neg(x), or Neg(x * w)."""
    nodes = [helper.make_node("Neg", ["m" if weight is not None else "x"], ["y"], "neg")]
    tensors = []
    if weight is not None:
        nodes.insert(0, helper.make_node("Mul", ["x", "w"], ["m"], "mul"))
        tensors.append(numpy_helper.from_array(weight, "w"))
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(graph: Graph, x: Any) -> Any:
    """Run a graph, its weights put back in."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for tensor in proto.graph.initializer:
        if is_external(tensor):
            tensor.CopyFrom(numpy_helper.from_array(graph.weights[tensor.name].numpy(), tensor.name))
    onnx.checker.check_model(proto)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]


def both(_: object) -> Borders:
    return "both"


@settings(deadline=None, max_examples=60)
@given(x=FLOATS, kind=st.sampled_from(KINDS))
def test_the_graph_rounds_as_the_array_does(x: Any, kind: FloatKind) -> None:
    found = run(_GRAPHS[kind], x)
    np.testing.assert_array_equal(found, -round_array(x, kind))


_GRAPHS = {kind: round_floats(load_graph(model()), kind, both) for kind in KINDS}


@settings(deadline=None)
@given(x=FLOATS, kind=st.sampled_from(KINDS))
def test_rounding_is_idempotent_and_close(x: Any, kind: FloatKind) -> None:
    once = round_array(x, kind)
    np.testing.assert_array_equal(round_array(once, kind), once)
    bits, least, most = {
        "bfloat16": (8, 1e-37, 3.3e38), "float16": (11, 6.2e-5, 65504), "tf32": (11, 1e-37, 3.3e38),
        "float8_e4m3fn": (4, 0.016, 448),
    }[kind]  # fmt: skip
    normal = np.isfinite(x) & (np.abs(x) >= least) & (np.abs(x) <= most)
    error = np.abs(once[normal] - x[normal]) / np.abs(x[normal])
    assert (error <= 2.0**-bits).all()


@settings(deadline=None)
@given(x=FLOATS)
def test_arithmetic_and_casts_round_alike(x: Any) -> None:
    """Before opset 13 Cast knows no bfloat16, and the rounding is done by arithmetic."""
    np.testing.assert_array_equal(run(_OLD, x), run(_GRAPHS["bfloat16"], x))


_OLD = round_floats(load_graph(model(opset=12)), "bfloat16", both)


def test_old_opsets_are_refused_where_nothing_can_round() -> None:
    for kind, opset in (("bfloat16", 9), ("float8_e4m3fn", 18), ("tf32", 9)):
        with pytest.raises(GraphError, match=f"the model is of opset {opset}"):
            round_floats(load_graph(model(opset=opset)), kind, both)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [3, 1000])
def test_weights_are_rounded_once_small_and_large(size: int) -> None:
    weight = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    source = load_graph(model(weight=weight))
    before = source.digest
    graph = round_floats(source, "bfloat16", both)
    assert source.digest == before, "the source was changed"
    name = next(t.name for t in graph.proto.graph.initializer)
    held = graph.weights[name].numpy() if size == 1000 else numpy_helper.to_array(graph.initializers[name])
    np.testing.assert_array_equal(held, weight.astype(ml_dtypes.bfloat16).astype(np.float32))
    x = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    product = round_array(round_array(x, "bfloat16") * held, "bfloat16")
    np.testing.assert_array_equal(run(graph, x), -product)


def test_inputs_alone_leave_the_result_exact() -> None:
    weight = np.float32([1 / 3, 1 / 7, 1e-3])
    where: dict[str, Borders] = {"Mul": "inputs", "Neg": "none"}
    graph = round_floats(load_graph(model(weight=weight)), "bfloat16", lambda node: where[node.op_type])
    x = np.float32([1.2345, -2.3456, 3.4567])
    np.testing.assert_array_equal(run(graph, x), -(round_array(x, "bfloat16") * round_array(weight, "bfloat16")))


def test_ports_keep_their_names_and_types() -> None:
    graph = _GRAPHS["bfloat16"]
    assert str(graph.signature) == str(load_graph(model()).signature)
    assert NARROW  # the types that the table of tests speaks of
