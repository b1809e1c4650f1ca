"""`Gradient` lowered to ordinary operators: every rule against central differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from accelrt.graph.gradient import DOMAIN, lower_gradients

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str] | None


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Shape],
    xs: Sequence[str],
    *,
    opset: int = 18,
    initializers: dict[str, Array] | None = None,
    feeds: Sequence[str] | None = None,
    zs: Sequence[str] = (),
) -> onnx.ModelProto:
    """Return a model of ``y`` and of its gradients ``d_x`` with respect to ``xs``."""
    names = {"xs": list(xs), "y": "y"} | ({"zs": list(zs)} if zs else {})
    outputs = [f"d_{x}" for x in xs]
    gradient = helper.make_node("Gradient", feeds or [*xs, *zs], outputs, domain=DOMAIN, name="g", **names)
    graph = helper.make_graph(
        [*nodes, gradient],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in ("y", *outputs)],
        [numpy_helper.from_array(value, name) for name, value in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    evaluator = ReferenceEvaluator(model)
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def central_difference(function: Callable[[Array], Array], x: Array, step: float = 1e-5) -> Array:
    """Return the gradient of the sum of a function's result."""
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        delta = np.zeros_like(x)
        delta[index] = step
        result[index] = (function(x + delta).sum() - function(x - delta).sum()) / (2 * step)
    return result


def check(model: onnx.ModelProto, feeds: dict[str, Array], xs: Sequence[str]) -> None:
    lowered = lower_gradients(model)
    assert not any(node.domain == DOMAIN for node in lowered.graph.node)
    assert all(entry.domain != DOMAIN for entry in lowered.opset_import)
    onnx.shape_inference.infer_shapes(lowered, check_type=True, strict_mode=True)
    results = run(lowered, feeds)
    for x in xs:
        expected = central_difference(lambda value, x=x: run(lowered, feeds | {x: value})["y"], feeds[x])
        assert results[f"d_{x}"].shape == feeds[x].shape
        np.testing.assert_allclose(results[f"d_{x}"], expected, rtol=1e-6, atol=1e-7)


def positive(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).uniform(0.5, 1.5, shape)


UNARY = [
    "Abs",
    "Cos",
    "Exp",
    "Identity",
    "Log",
    "Neg",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Sin",
    "Sqrt",
    "Tanh",
]
UNARY.append("Softplus")


@pytest.mark.parametrize("op_type", UNARY)
@pytest.mark.parametrize("opset", [9, 18])
def test_unary_rules(op_type: str, opset: int) -> None:
    x = positive(2, 3)
    if op_type in {"Abs", "Relu", "Tanh", "Sigmoid"}:
        x[0] *= -1
    # Squared, so that what flows back is not all ones.
    nodes = [helper.make_node(op_type, ["x"], ["h"]), helper.make_node("Mul", ["h", "h"], ["y"])]
    check(build(nodes, {"x": [2, 3]}, ["x"], opset=opset), {"x": x}, ["x"])


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Sum"])
@pytest.mark.parametrize(
    ("a", "b"), [((2, 3), (2, 3)), ((2, 3), (3,)), ((1, 3), (2, 1)), ((), (2, 3)), ((2, 1, 3), (4, 1))]
)
@pytest.mark.parametrize("kind", ["static", "symbolic", "static, axes as attributes"])
def test_binary_rules_undo_broadcasting(op_type: str, a: tuple[int, ...], b: tuple[int, ...], kind: str) -> None:
    nodes = [helper.make_node(op_type, ["a", "b"], ["h"]), helper.make_node("Mul", ["h", "h"], ["y"])]
    shapes: dict[str, Shape] = {"a": a, "b": b}
    if kind == "symbolic":
        shapes = {name: [f"{name}{i}" for i in range(len(shape or ()))] for name, shape in shapes.items()}
    model = build(nodes, shapes, ["a", "b"], opset=12 if "attributes" in kind else 18)
    check(model, {"a": positive(*a), "b": positive(*b) + 0.3}, ["a", "b"])


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((1, 2, 3), (5, 3, 4)), ((3,), (3,))])
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    nodes = [helper.make_node("MatMul", ["a", "b"], ["h"]), helper.make_node("Mul", ["h", "h"], ["y"])]
    check(build(nodes, {"a": a, "b": b}, ["a", "b"]), {"a": positive(*a), "b": positive(*b)}, ["a", "b"])


@pytest.mark.parametrize("flip_a", [0, 1])
@pytest.mark.parametrize("flip_b", [0, 1])
def test_gemm(flip_a: int, flip_b: int) -> None:
    a, b = (3, 2) if flip_a else (2, 3), (4, 3) if flip_b else (3, 4)
    nodes = [
        helper.make_node("Gemm", ["a", "b", "c"], ["h"], alpha=0.5, beta=2.0, transA=flip_a, transB=flip_b),
        helper.make_node("Mul", ["h", "h"], ["y"]),
    ]
    feeds = {"a": positive(*a), "b": positive(*b), "c": positive(4)}
    check(build(nodes, {"a": a, "b": b, "c": [4]}, list("abc")), feeds, list("abc"))


@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("axes", [None, [1], [0, 2], [-1]])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [11, 18])
def test_reductions(op_type: str, axes: list[int] | None, keepdims: int, opset: int) -> None:
    constants = {}
    if axes is None:
        reduction = helper.make_node(op_type, ["x"], ["h"], keepdims=keepdims)
    elif opset < 13:
        reduction = helper.make_node(op_type, ["x"], ["h"], axes=axes, keepdims=keepdims)
    else:
        constants = {"axes": np.array(axes)}
        reduction = helper.make_node(op_type, ["x", "axes"], ["h"], keepdims=keepdims)
    nodes = [reduction, helper.make_node("Mul", ["h", "h"], ["y"])]
    model = build(nodes, {"x": ["n", 3, "m"]}, ["x"], opset=opset, initializers=constants)
    check(model, {"x": positive(2, 3, 4)}, ["x"])


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Reshape", ["x", "shape"], ["h"])],
        [helper.make_node("Flatten", ["x"], ["h"], axis=2)],
        [helper.make_node("Transpose", ["x"], ["h"], perm=[1, 2, 0])],
        [helper.make_node("Transpose", ["x"], ["h"])],
        [helper.make_node("Unsqueeze", ["x", "zero"], ["h"])],
        [helper.make_node("Expand", ["x", "large"], ["h"])],
        [helper.make_node("Pow", ["x", "three"], ["h"])],
        [helper.make_node("Softmax", ["x"], ["h"], axis=1)],
        [
            helper.make_node("Greater", ["x", "one"], ["c"]),
            helper.make_node("Where", ["c", "x", "one"], ["h"]),
        ],
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.DOUBLE),
            helper.make_node("Exp", ["f"], ["h"]),
        ],
    ],
    ids=lambda nodes: nodes[-1].op_type,
)
def test_other_rules(nodes: list[onnx.NodeProto]) -> None:
    constants = {
        "shape": np.array([4, -1]),
        "zero": np.array([0]),
        "large": np.array([5, 2, 3, 4]),
        "three": np.array(3.0),
        "one": np.array(1.0),
    }
    square = [*nodes, helper.make_node("Mul", ["h", "h"], ["y"])]
    used = {name for node in nodes for name in node.input}
    kept = {name: value for name, value in constants.items() if name in used}
    check(build(square, {"x": [2, 3, 4]}, ["x"], initializers=kept), {"x": positive(2, 3, 4)}, ["x"])


def test_a_value_that_is_read_twice_gets_the_sum() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Mul", ["e", "x"], ["p"]),
        helper.make_node("Add", ["p", "e"], ["y"]),
    ]
    check(build(nodes, {"x": [3]}, ["x"]), {"x": positive(3)}, ["x"])


def test_an_intermediate_value_may_be_independent() -> None:
    nodes = [helper.make_node("Exp", ["x"], ["h"]), helper.make_node("Mul", ["h", "z"], ["y"])]
    model = build(nodes, {"x": [3], "z": [3]}, ["h"], zs=["z"])
    feeds = {"x": positive(3), "z": positive(3) * 2}
    np.testing.assert_allclose(run(lower_gradients(model), feeds)["d_h"], feeds["z"])


def test_values_other_than_those_named_are_where_the_gradient_is_taken() -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["y"])]
    model = build(nodes, {"x": [3], "other": [3]}, ["x"], feeds=["other"])
    feeds = {"x": positive(3), "other": np.array([1.0, 2.0, 3.0])}
    results = run(lower_gradients(model), feeds)
    np.testing.assert_allclose(results["d_x"], 2 * feeds["other"])
    np.testing.assert_allclose(results["y"], feeds["x"] ** 2)


def test_what_y_does_not_depend_on_has_gradient_zero() -> None:
    model = build([helper.make_node("Exp", ["x"], ["y"])], {"x": [3], "z": [2, 2]}, ["x", "z"])
    results = run(lower_gradients(model), {"x": positive(3), "z": positive(2, 2)})
    np.testing.assert_array_equal(results["d_z"], np.zeros((2, 2)))


def test_gradient_may_stand_before_what_it_differentiates() -> None:
    model = build([helper.make_node("Exp", ["x"], ["y"])], {"x": [3]}, ["x"])
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    x = positive(3)
    np.testing.assert_allclose(run(lower_gradients(model), {"x": x})["d_x"], np.exp(x))


def test_second_order() -> None:
    model = build(
        [helper.make_node("Tanh", ["x"], ["h"]), helper.make_node("Mul", ["h", "x"], ["y"])],
        {"x": [3]},
        ["x"],
    )
    again = helper.make_node("Gradient", ["x"], ["dd_x"], domain=DOMAIN, name="gg", xs=["x"], y="d_x")
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("dd_x", TensorProto.DOUBLE, None))
    lowered, x = lower_gradients(model), positive(3)
    expected = central_difference(lambda value: run(lowered, {"x": value})["d_x"], x)
    np.testing.assert_allclose(run(lowered, {"x": x})["dd_x"], expected, rtol=1e-6)


def test_an_operator_without_a_rule_leaves_the_node() -> None:
    model = build([helper.make_node("Erf", ["x"], ["y"])], {"x": [3]}, ["x"])
    before = model.SerializeToString()
    lowered = lower_gradients(model)
    assert [node.op_type for node in lowered.graph.node] == ["Erf", "Gradient"]
    assert any(entry.domain == DOMAIN for entry in lowered.opset_import)
    assert model.SerializeToString() == before


def test_a_model_without_gradients_is_returned_as_it_is() -> None:
    model = helper.make_model(helper.make_graph([], "empty", [], []))
    assert lower_gradients(model) is model
