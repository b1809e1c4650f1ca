"""The proof that rows are independent: what it says of each operator, and that it never says so where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from accelrt.graph.bind import bind_first_dimension, first_dimension
from accelrt.graph.load import load_graph
from accelrt.graph.types import TensorType
from accelrt.partition.rows import prove_batch_axis
from accelrt.testing import models

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Op = tuple[Any, ...]


def model(
    ops: Sequence[Op],
    output: Sequence[Any],
    inputs: Sequence[tuple[str, Sequence[Any]]] = (("x", ["n", 4, 6]),),
    dtype: int = FLOAT,
    opset: int = 21,
) -> onnx.ModelProto:
    """A model of nodes (operator, inputs, output, attributes); arrays among the inputs become initialisers."""
    nodes, constants = [], []
    for kind, given_, out, *rest in ops:
        names = []
        for value in given_:
            if not isinstance(value, str):
                constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(constants)}"))
                value = constants[-1].name
            names.append(value)
        nodes.append(helper.make_node(kind, names, [out] if isinstance(out, str) else out, **(rest[0] if rest else {})))
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info("y", dtype, output)],
        constants,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def row_wise(proto: onnx.ModelProto, rows: int = 3) -> bool:
    """The oracle: run rows together and one by one."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    feeds = {
        port.name: rng.standard_normal([rows, *(d if isinstance(d, int) else 5 for d in port.shape[1:])], np.float32)
        for port in session.get_inputs()
    }
    together = session.run(None, feeds)
    alone = [session.run(None, {name: value[r : r + 1] for name, value in feeds.items()}) for r in range(rows)]
    for number, whole in enumerate(together):
        parts = [one[number] for one in alone]
        if any(part.shape[:1] != (1,) for part in parts) or whole.shape[:1] != (rows,):
            return False
        if not np.allclose(whole, np.concatenate(parts), atol=1e-5):
            return False
    return True


I64 = np.int64
KEEPS: dict[str, onnx.ModelProto] = {
    "elementwise": model([("Mul", ["x", floats(6)], "a"), ("Relu", ["a"], "y")], ["n", 4, 6]),
    "own row twice": model([("Add", ["x", "x"], "y")], ["n", 4, 6]),
    "two inputs": model([("Sub", ["x", "z"], "y")], ["n", 4, 6], [("x", ["n", 4, 6]), ("z", ["n", 1, 6])]),
    "matmul": model([("MatMul", ["x", floats(6, 3)], "y")], ["n", 4, 3]),
    "matmul by a vector": model([("MatMul", ["x", floats(6)], "y")], ["n", 4]),
    "matmul from the left": model([("MatMul", [floats(5, 4), "x"], "y")], ["n", 5, 6]),
    "rows by their own": model(
        [("Transpose", ["x"], "t", {"perm": [0, 2, 1]}), ("MatMul", ["x", "t"], "y")], ["n", 4, 4]
    ),
    "flatten, gemm": model([("Flatten", ["x"], "f"), ("Gemm", ["f", floats(24, 2), floats(2)], "y")], ["n", 2]),
    "reshape": model([("Reshape", ["x", np.array([-1, 24], I64)], "y")], ["n", 24]),
    "reshape by zero": model([("Reshape", ["x", np.array([0, 2, 12], I64)], "y")], ["n", 2, 12]),
    "fold and unfold": model(
        [
            ("Reshape", ["x", np.array([-1, 6], I64)], "f"),
            ("MatMul", ["f", floats(6, 2)], "m"),
            ("Softmax", ["m"], "s"),
            ("Reshape", ["s", np.array([-1, 4, 2], I64)], "y"),
        ],
        ["n", 4, 2],
    ),
    "fold after others, as attention does": model(
        [
            ("Transpose", ["x"], "t", {"perm": [1, 0, 2]}),
            ("Reshape", ["t", np.array([-1, 6], I64)], "f"),
            ("Gemm", ["f", floats(6, 8)], "g"),
            ("Reshape", ["g", np.array([4, -1, 2, 4], I64)], "h"),
            ("Reshape", ["h", np.array([2, -1, 4], I64)], "k"),
            ("Softmax", ["k"], "s"),
            ("Reshape", ["s", np.array([4, -1, 8], I64)], "u"),
            ("Transpose", ["u"], "y", {"perm": [1, 0, 2]}),
        ],
        ["n", 4, 8],
    ),
    "reshape by a computed shape": model(
        [
            ("Shape", ["x"], "s"),
            ("Gather", ["s", np.array(0, I64)], "b"),
            ("Unsqueeze", ["b", np.array([0], I64)], "u"),
            ("Concat", ["u", np.array([24], I64)], "t", {"axis": 0}),
            ("Reshape", ["x", "t"], "y"),
        ],
        ["n", 24],
    ),
    "there and back": model(
        [
            ("Transpose", ["x"], "t", {"perm": [1, 0, 2]}),
            ("Softmax", ["t"], "s", {"axis": 2}),
            ("Transpose", ["s"], "y", {"perm": [1, 0, 2]}),
        ],
        ["n", 4, 6],
    ),
    "reduce others": model([("ReduceMean", ["x", np.array([1, 2], I64)], "y", {"keepdims": 0})], ["n"]),
    "arg of others": model([("ArgMax", ["x"], "y", {"axis": 2, "keepdims": 0})], ["n", 4], dtype=INT64),
    "top": model([("TopK", ["x", np.array([2], I64)], ["y", "i"], {"axis": -1})], ["n", 4, 2]),
    "layer norm": model([("LayerNormalization", ["x", floats(6)], "y", {"axis": -1})], ["n", 4, 6]),
    "a class token": model(
        [
            ("Shape", ["x"], "s", {"start": 0, "end": 1}),
            ("Concat", ["s", np.array([1, 6], I64)], "t", {"axis": 0}),
            ("Expand", [floats(1, 1, 6), "t"], "e"),
            ("Concat", ["e", "x"], "y", {"axis": 1}),
        ],
        ["n", 5, 6],
    ),
    "a slice of each": model(
        [("Slice", ["x", np.array([0, 1], I64), np.array([2**63 - 1, 3], I64), np.array([0, 1], I64)], "y")],
        ["n", 2, 6],
    ),
    "pad others": model([("Pad", ["x", np.array([0, 1, 0, 0, 0, 2], I64)], "y")], ["n", 5, 8]),
    "pick from others": model([("Gather", ["x", np.array([2, 0], I64)], "y", {"axis": 1})], ["n", 2, 6]),
    "einsum": model([("Einsum", ["x", floats(6, 5)], "y", {"equation": "bij,jk->bki"})], ["n", 5, 4]),
    "a sum along others": model([("CumSum", ["x", np.array(1, I64)], "y")], ["n", 4, 6]),
    "lstm": model(
        [
            ("Transpose", ["x"], "t", {"perm": [1, 0, 2]}),
            ("LSTM", ["t", floats(1, 12, 6), floats(1, 12, 3)], ["", "h"], {"hidden_size": 3}),
            ("Squeeze", ["h", np.array([0], I64)], "y"),
        ],
        ["n", 3],
    ),
    "zeros of the batch": model(
        [
            ("Shape", ["x"], "s"),
            ("Slice", ["s", np.array([0], I64), np.array([1], I64)], "b"),
            ("Concat", ["b", np.array([1, 1], I64)], "t", {"axis": 0}),
            ("ConstantOfShape", ["t"], "z"),
            ("Add", ["x", "z"], "y"),
        ],
        ["n", 4, 6],
    ),
    "quantised": model(
        [
            ("QuantizeLinear", ["x", np.float32(0.1), np.int8(0)], "q"),
            ("DequantizeLinear", ["q", np.float32(0.1), np.int8(0)], "y"),
        ],
        ["n", 4, 6],
    ),
}
IMAGE = [("x", ["n", 3, 8, 8])]
KEEPS["resize"] = model([("Resize", ["x", "", np.array([1, 1, 2, 2], np.float32)], "y")], ["n", 3, 16, 16], IMAGE)
KEEPS["group norm"] = model([("InstanceNormalization", ["x", floats(3), floats(3)], "y")], ["n", 3, 8, 8], IMAGE)

COUPLES: dict[str, tuple[onnx.ModelProto, str]] = {
    "mean of rows": (model([("ReduceMean", ["x", np.array([0], I64)], "m"), ("Sub", ["x", "m"], "y")], ["n", 4, 6]), "computes over axis 0"),
    "mean of all": (model([("ReduceMax", ["x"], "m"), ("Div", ["x", "m"], "y")], ["n", 4, 6]), "computes over axis 0"),
    "softmax of rows": (model([("Softmax", ["x"], "y", {"axis": 0})], ["n", 4, 6]), "computes over axis 0"),
    "softmax of old": (model([("Softmax", ["x"], "y", {"axis": 0})], ["n", 4, 6], opset=11), "computes over axis 0"),
    "sum along rows": (model([("CumSum", ["x", np.array(0, I64)], "y")], ["n", 4, 6]), "computes over axis 0"),
    "training": (
        model(
            [("BatchNormalization", ["x", *(np.abs(floats(3)) for _ in range(4))], ["y", "m", "v"], {"training_mode": 1})],
            ["n", 3, 8, 8],
            IMAGE,
        ),
        "normalises over the batch",
    ),
    "reversed rows": (
        model([("Slice", ["x", np.array([-1], I64), np.array([-(2**63)], I64), np.array([0], I64), np.array([-1], I64)], "y")], ["n", 4, 6]),
        "cuts some rows away",
    ),
    "first row": (
        model([("Gather", ["x", np.array([0], I64)], "f", {"axis": 0}), ("Add", ["x", "f"], "y")], ["n", 4, 6]),
        "computes over axis 0",
    ),
    "rows with each other": (
        model([("Flatten", ["x"], "f"), ("Transpose", ["f"], "t"), ("MatMul", ["f", "t"], "g"), ("ReduceSum", ["g", np.array([1], I64)], "y")], ["n", 1]),
        "multiplies rows with each other",
    ),
    "rows mixed by a reshape": (
        model([("Reshape", ["x", np.array([4, -1, 6], I64)], "r"), ("Transpose", ["r"], "y", {"perm": [1, 0, 2]})], ["n", 4, 6]),
        "rearranges the axes before the rows",
    ),
    "transposed, then folded": (
        model([("Transpose", ["x"], "t", {"perm": [1, 0, 2]}), ("Reshape", ["t", np.array([-1, 4, 6], I64)], "y")], ["n", 4, 6]),
        "no known multiple of the batch",
    ),
    "the number of rows": (
        model([("Size", ["x"], "s"), ("Cast", ["s"], "c", {"to": FLOAT}), ("Mul", ["x", "c"], "y")], ["n", 4, 6]),
        "computes with the number of rows",
    ),
    "positions of rows": (
        model(
            [
                ("Shape", ["x"], "s", {"start": 0, "end": 1}),
                ("Squeeze", ["s", np.array([0], I64)], "b"),
                ("Range", [np.array(0, I64), "b", np.array(1, I64)], "r"),
                ("Cast", ["r"], "c", {"to": FLOAT}),
                ("Unsqueeze", ["c", np.array([1, 2], I64)], "u"),
                ("Add", ["x", "u"], "y"),
            ],
            ["n", 4, 6],
        ),
        "no rule says",
    ),
    "scaled by the largest": (
        model([("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), ("DequantizeLinear", ["q", "s", "z"], "y")], ["n", 4, 6]),
        "no rule says",
    ),
    "a pad of rows": (model([("Pad", ["x", np.array([1, 0, 0, -1, 0, 0], I64)], "y")], ["n", 4, 6]), "adds rows"),
    "random": (model([("RandomNormalLike", ["x"], "r"), ("Add", ["x", "r"], "y")], ["n", 4, 6]), "random"),
    "squeezed": (model([("Reshape", ["x", np.array([0, 24], I64)], "f"), ("ReduceSum", ["f", np.array([1], I64)], "s"), ("Squeeze", ["s"], "y")], ["n"]), "drops every axis"),
    "not of the inputs": (model([("Identity", ["x"], "a"), ("Identity", [floats(2, 2)], "y")], ["m", 2]), "is 2 whatever"),
    "rows last": (model([("Transpose", ["x"], "y", {"perm": [1, 0, 2]})], [4, "n", 6]), "is 4 whatever"),
    "rows folded": (model([("Reshape", ["x", np.array([-1, 6], I64)], "y")], ["m", 6]), "4 indices each"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_rows_apart_is_proved_and_true(name: str) -> None:
    answer = prove_batch_axis(load_graph(KEEPS[name]), (1, 3))
    assert answer.proved, answer.reason
    assert answer.dimension == "n"
    assert row_wise(KEEPS[name])


@pytest.mark.parametrize("name", COUPLES)
def test_what_couples_rows_is_refused_with_its_reason(name: str) -> None:
    proto, reason = COUPLES[name]
    answer = prove_batch_axis(load_graph(proto), (1, 3))
    assert not answer.proved
    assert reason in answer.reason


def test_the_oracle_can_fail() -> None:
    """Most refused models are row-wise for nobody: the oracle that holds the proofs sees it."""
    seen = [name for name, (proto, _) in COUPLES.items() if not row_wise(proto)]
    assert len(seen) >= 13, sorted(set(COUPLES) - set(seen))


@pytest.mark.parametrize(
    ("proto", "nodes"),
    [
        (models.mlp(), 5),
        (models.small_cnn(), 11),
        (models.bert_base(layers=2, hidden=48, heads=4, vocabulary=100), 83),
        (models.bert_base(layers=1, hidden=48, heads=4, vocabulary=100, sequence=8), 49),
    ],
    ids=["mlp", "cnn", "bert", "bert of fixed length"],
)
def test_models_of_production_are_proved(proto: onnx.ModelProto, nodes: int) -> None:
    answer = prove_batch_axis(load_graph(proto), (1, 8))
    assert (answer.proved, answer.dimension) == (True, "batch"), answer.reason
    assert answer.reason == f"each of {nodes} nodes keeps rows apart"


@pytest.mark.parametrize(
    ("inputs", "output", "reason"),
    [
        ([("x", [2, 4])], [2, 4], "'x' is fixed to 2"),
        ([("x", [])], [], "'x' is a scalar"),
        ([("x", ["n", 4]), ("z", ["m", 4])], ["n", 4], "different dimensions, 'n' and 'm'"),
        ([("x", ["n", "n"])], ["n", "n"], "a second time"),
    ],
)
def test_models_without_a_batch_dimension_say_why(inputs: Any, output: Any, reason: str) -> None:
    names = [name for name, _ in inputs]
    proto = model([("Sum", names, "y")], output, inputs)
    assert reason in prove_batch_axis(load_graph(proto)).reason


def test_sequences_have_no_batch_dimension() -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    x = helper.make_tensor_value_info("x", FLOAT, ["n", 2])
    y = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    proto = helper.make_model(helper.make_graph([node], "s", [x], [y]), opset_imports=[helper.make_opsetid("", 21)])
    assert "no tensor" in prove_batch_axis(load_graph(proto)).reason


def test_unnamed_dimensions_are_shared() -> None:
    graph = load_graph(model([("Sub", ["x", "z"], "y")], [None, 4], [("x", [None, 4]), ("z", [None, 4])]))
    assert first_dimension(graph.signature) == (None, "")
    assert prove_batch_axis(graph).proved
    bound = bind_first_dimension(graph, 5)
    assert [port.type for port in bound.signature.inputs] == [TensorType("float32", (5, 4))] * 2
    assert [port.type for port in bound.signature.outputs] == [TensorType("float32", (5, 4))]


def test_binding_keeps_nodes_and_weights() -> None:
    graph = load_graph(models.small_cnn())
    bound = bind_first_dimension(graph, 8)
    assert [node.name for node in bound.nodes] == [node.name for node in graph.nodes]
    assert set(bound.weights) == set(graph.weights)
    assert bound.signature.outputs[0].type == TensorType("float32", (8, 10))
    assert graph.signature.outputs[0].type == TensorType("float32", ("batch", 10))


STEPS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Relu", [], {}),
    ("Softmax", [], {"axis": 0}),
    ("Softmax", [], {"axis": 1}),
    ("Softmax", [], {"axis": -1}),
    ("CumSum", [np.array(0, I64)], {}),
    ("CumSum", [np.array(1, I64)], {}),
    ("Transpose", [], {"perm": [1, 0, 2]}),
    ("Transpose", [], {"perm": [0, 2, 1]}),
    ("Transpose", [], {"perm": [2, 1, 0]}),
    ("Transpose", [], {"perm": [1, 2, 0]}),
    ("Reshape", [np.array([-1, 2, 4], I64)], {}),
    ("Reshape", [np.array([2, -1, 4], I64)], {}),
    ("Reshape", [np.array([4, 2, -1], I64)], {}),
    ("Reshape", [np.array([0, 4, 2], I64)], {}),
    ("Reshape", [np.array([-1, 1, 2], I64)], {}),
    ("Reshape", [np.array([0, -1, 1], I64)], {}),
    ("ReduceSum", [np.array([0], I64)], {"keepdims": 1}),
    ("ReduceSum", [np.array([1], I64)], {"keepdims": 1}),
    ("ReduceMax", [np.array([2], I64)], {"keepdims": 1}),
    ("Mul", [np.array(1.5, np.float32)], {}),
    ("Mul", [np.arange(1, 3, dtype=np.float32).reshape(2, 1, 1)], {}),
    ("Gather", [np.array([0, 1, 0, 1], I64)], {"axis": 1}),
    ("Gather", [np.array([1, 0], I64)], {"axis": 0}),
    ("Concat", ["self"], {"axis": 0}),
    ("Concat", ["self"], {"axis": 1}),
    ("Tile", [np.array([2, 1, 1], I64)], {}),
    ("Tile", [np.array([1, 2, 1], I64)], {}),
    ("Slice", [np.array([1], I64), np.array([2**63 - 1], I64), np.array([1], I64)], {}),
    ("Slice", [np.array([1], I64), np.array([2**63 - 1], I64), np.array([0], I64)], {}),
    ("Pad", [np.array([0, 1, 0, 0, -1, 0], I64)], {}),
    ("Pad", [np.array([1, 0, 0, -1, 0, 0], I64)], {}),
    ("Add", ["x"], {}),
    ("MatMul", ["x"], {}),
    ("Unsqueeze", [np.array([1], I64)], {}),
    ("Squeeze", [np.array([1], I64)], {}),
    ("Flatten", [], {"axis": 2}),
    ("Trilu", [], {}),
]


@pytest.fixture(scope="module")
def proved() -> list[int]:
    """Lengths of the random chains that were proved: a test that proves none would show nothing."""
    return []


@given(st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=6))
@settings(max_examples=700, deadline=None)
def test_whatever_is_proved_of_a_random_chain_is_true(proved: list[int], chosen: list[int]) -> None:
    ops: list[Op] = []
    value = "x"
    for number, index in enumerate(chosen):
        kind, rest, attributes = STEPS[index]
        out = "y" if number == len(chosen) - 1 else f"v{number}"
        inputs = [value, *(value if isinstance(one, str) and one == "self" else one for one in rest)]
        ops.append((kind, inputs, out, attributes))
        value = out
    proto = model(ops, ["m", None, None], [("x", ["n", 2, 4])])
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    try:
        graph = load_graph(proto)
        shape = graph.types["y"].shape  # type: ignore[union-attr]
    except Exception:
        return  # no model at all
    if not shape or isinstance(shape[0], int):
        return
    if prove_batch_axis(graph, (1, 2, 4)).proved:
        try:
            answers = [row_wise(proto, rows) for rows in (2, 4)]
        except (Fail, InvalidArgument):
            return  # no call of it is valid: there are no rows to be coupled
        proved.append(len(chosen))
        assert answers == [True, True]


def test_random_chains_were_proved(proved: list[int]) -> None:
    assert len(proved) > 10
    assert max(proved) >= 2
