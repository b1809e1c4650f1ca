"""The operators: what each demands of a node, and its arithmetic on numpy arrays.

Everything here is float32. A compiled node is a `Step`: plain data that JSON can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelrt.graph.node import Node

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Step:
    """One node, ready to run: the names of its values and its settings."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    settings: Mapping[str, Any]


def add(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return values[0] + values[1]


def sub(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return values[0] - values[1]


def mul(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return values[0] * values[1]


def div(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return values[0] / values[1]


def relu(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return np.maximum(values[0], np.float32(0))


def tanh(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return np.tanh(values[0])


def softmax(values: list[Array], settings: Mapping[str, Any]) -> Array:
    axis = settings.get("axis", -1)
    raised = np.exp(values[0] - values[0].max(axis=axis, keepdims=True))
    return raised / raised.sum(axis=axis, keepdims=True)


def matmul(values: list[Array], settings: Mapping[str, Any]) -> Array:
    return values[0] @ values[1]


def gemm(values: list[Array], settings: Mapping[str, Any]) -> Array:
    a = values[0].T if settings.get("transA", 0) else values[0]
    b = values[1].T if settings.get("transB", 0) else values[1]
    product = np.float32(settings.get("alpha", 1.0)) * (a @ b)
    return product + np.float32(settings.get("beta", 1.0)) * values[2] if len(values) > 2 else product


def reshape(values: list[Array], settings: Mapping[str, Any]) -> Array:
    # In ONNX a 0 stands for the size that the input has at this place.
    old = values[0].shape
    return values[0].reshape([old[axis] if size == 0 else size for axis, size in enumerate(settings["shape"])])


def flatten(values: list[Array], settings: Mapping[str, Any]) -> Array:
    shape, axis = values[0].shape, settings.get("axis", 1)
    rows = int(np.prod(shape[:axis])) if axis else 1
    return values[0].reshape(rows, int(np.prod(shape[axis:])))


@dataclass(frozen=True)
class Operator:
    """One operator: the oldest version with the meaning implemented here, and the function that computes it."""

    version: int
    compute: Callable[[list[Array], Mapping[str, Any]], Array]


# Before version 7, Add and its like broadcast by attributes; before 13, Softmax flattened its input; before 5, Reshape
# had its shape as an attribute.
OPERATORS = {
    "Add": Operator(7, add),
    "Div": Operator(7, div),
    "Flatten": Operator(9, flatten),
    "Gemm": Operator(7, gemm),
    "MatMul": Operator(1, matmul),
    "Mul": Operator(7, mul),
    "Relu": Operator(6, relu),
    "Reshape": Operator(5, reshape),
    "Softmax": Operator(13, softmax),
    "Sub": Operator(7, sub),
    "Tanh": Operator(6, tanh),
}


def refusal(node: Node) -> str | None:
    """Return why a node cannot be run, None if it can."""
    operator = None if node.domain else OPERATORS.get(node.op_type)
    if operator is None:
        return f"{node.op_type} is not among the operators of this engine"
    if node.version < operator.version:
        return f"version {node.version} of {node.op_type} means something else; {operator.version} is the oldest known"
    computed = range(1) if node.op_type == "Reshape" else range(len(node.inputs))
    for index in computed:
        if node.inputs[index] and node.input_dtype(index) != "float32":
            return f"input {index} is {node.input_dtype(index) or 'of unknown type'}; only float32 is computed"
    if node.op_type == "Reshape":
        return _reshape_refusal(node)
    return None


def _reshape_refusal(node: Node) -> str | None:
    shape = node.constants.get(1)
    if shape is None:
        return "the shape is computed at run time; only a constant one is taken"
    if node.attributes.get("allowzero", 0) and 0 in shape:
        return "a size of 0 that means 0 is not implemented"
    return None


def to_step(node: Node) -> Step:
    """Turn a node that is supported into data."""
    settings = {name: value for name, value in node.attributes.items() if isinstance(value, int | float)}
    inputs = tuple(name for name in node.inputs if name)
    if node.op_type == "Reshape":
        inputs, settings["shape"] = inputs[:1], [int(size) for size in node.constants[1]]
    return Step(node.op_type, inputs, node.outputs[0], settings)


def compute(step: Step, values: Mapping[str, Array]) -> Array:
    """Run one step on values by name."""
    return OPERATORS[step.operator].compute([values[name] for name in step.inputs], step.settings)
