"""Lowers ``ai.onnx.preview.training.Gradient`` to ordinary operators, so that any engine can run it.

Reverse-mode differentiation of the part of the graph that leads from ``xs`` to ``y``. Where ``y`` is no
scalar, the result is the gradient of the sum of its elements. A `Gradient` whose path meets an operator
without a rule, or a type that shape inference cannot tell, stays as it is; engines then refuse it with
their reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from accelrt.graph.model import captures_of

DOMAIN = "ai.onnx.preview.training"


def lower_gradients(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every `Gradient` node replaced for which all rules are known.

    The same object is returned when there is nothing to do; the argument is never changed.
    """
    if not any(_is_gradient(node) for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept: set[int] = set()
    while True:
        # In order, so that the gradient of a gradient meets nodes that have rules.
        index = next((i for i, n in enumerate(result.graph.node) if _is_gradient(n) and i not in kept), None)
        if index is None:
            break
        try:
            replacement = _lower(result, index)
        except _NoRule:
            kept.add(index)
            continue
        nodes = list(result.graph.node)
        nodes[index : index + 1] = replacement
        del result.graph.node[:]
        result.graph.node.extend(nodes)
    if not any(node.domain == DOMAIN for node in result.graph.node):
        imports = [entry for entry in result.opset_import if entry.domain != DOMAIN]
        del result.opset_import[:]
        result.opset_import.extend(imports)
    return result


def _is_gradient(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == "Gradient"


class _NoRule(Exception):
    pass


def _lower(model: onnx.ModelProto, index: int) -> list[onnx.NodeProto]:
    node = model.graph.node[index]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    xs = [x.decode() for x in attributes["xs"]]
    zs = [z.decode() for z in attributes.get("zs", [])]
    y = attributes["y"].decode()
    before, path = _path(model.graph, index, {*xs, *zs}, y)
    tape = _Tape(model, f"{node.name or next(filter(None, node.output))}/gradient")
    if list(node.input) != xs + zs or not before:
        # Evaluated at other values, or before y itself is: the path is computed anew from the node's inputs.
        path, y = tape.replay(path, dict(zip(xs + zs, node.input, strict=True)), y)
        xs = list(node.input[: len(xs)])
    gradients = _differentiate(tape, path, xs, y)
    for x, output, gradient in zip(xs, node.output, gradients, strict=False):
        if output:
            tape.nodes.append(helper.make_node("Identity", [gradient or tape.fill_like(x, 0)], [output]))
    return tape.nodes


def _path(graph: onnx.GraphProto, index: int, independent: set[str], y: str) -> tuple[bool, list[onnx.NodeProto]]:
    """Return the nodes that lead from independent values to y, and whether all stand before a node."""
    needed, picked = {y} - independent, []
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        if needed.intersection(node.output):
            needed.update(set(node.input) - independent)
            needed.update(captures_of(node).keys() - independent)
            picked.append(position)
    return all(p < index for p in picked), [graph.node[p] for p in reversed(picked)]


class _Tape:
    """Writes nodes in the opset of a model, with what is known of the types of its values."""

    def __init__(self, model: onnx.ModelProto, prefix: str) -> None:
        self.opset = next(e.version for e in model.opset_import if e.domain in {"", "ai.onnx"})
        self.nodes: list[onnx.NodeProto] = []
        taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        while any(name.startswith(prefix + "/") for name in taken):
            prefix += "_"
        self._prefix = prefix
        self._types: dict[str, onnx.TypeProto.Tensor] = {}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        for value in (*inferred.input, *inferred.output, *inferred.value_info):
            if value.type.HasField("tensor_type"):
                self._types[value.name] = value.type.tensor_type
        self.constants: dict[str, onnx.TensorProto] = {}
        for tensor in inferred.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
            self.constants[tensor.name] = tensor
        for node in inferred.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def emit(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self._prefix}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant(self, value: np.ndarray[Any, Any]) -> str:
        return self.emit("Constant", value=numpy_helper.from_array(value))

    def number(self, value: float, like: str) -> str:
        """Write a scalar of the type of another value."""
        return self.constant(np.asarray(value, helper.tensor_dtype_to_np_dtype(self.dtype(like))))

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(np.asarray(values, np.int64))

    def fill_like(self, name: str, value: float) -> str:
        return self.emit("Expand", self.number(value, name), self.emit("Shape", name))

    def dtype(self, name: str) -> int:
        if name not in self._types or not self._types[name].elem_type:
            raise _NoRule
        return int(self._types[name].elem_type)

    def is_real(self, name: str) -> bool:
        return np.issubdtype(helper.tensor_dtype_to_np_dtype(self.dtype(name)), np.floating) or self.dtype(name) == (
            onnx.TensorProto.BFLOAT16
        )

    def shape(self, name: str) -> list[int | str | None] | None:
        type_ = self._types.get(name)
        if type_ is None or not type_.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in type_.shape.dim]

    def rank(self, name: str) -> int:
        shape = self.shape(name)
        if shape is None:
            raise _NoRule
        return len(shape)

    def replay(self, path: Sequence[onnx.NodeProto], names: dict[str, str], y: str) -> tuple[list[onnx.NodeProto], str]:
        """Write a path again over other values; their types are taken to be those of the first."""
        again = []
        for node in path:
            if captures_of(node).keys() & names.keys():
                raise _NoRule
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for i, name in enumerate(node.output):
                if name:
                    names[name] = f"{self._prefix}/{len(self.nodes)}.{i}"
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            self.nodes.append(copy)
            again.append(copy)
        for old, new in names.items():
            if old in self._types:
                self._types.setdefault(new, self._types[old])
            if old in self.constants:
                self.constants.setdefault(new, self.constants[old])
        return again, names.get(y, y)

    def sum_to(self, gradient: str, x: str, y: str) -> str:
        """Undo a broadcast: sum a gradient of y's shape over the axes along which x was repeated."""
        small, large = self.shape(x), self.shape(y)
        if small is not None and small == large and None not in small:
            return gradient
        shape = self.emit("Shape", x)
        if small is not None and large is not None:
            lead = len(large) - len(small)
            pairs = list(zip(small, large[lead:], strict=True))
            if all(n == 1 or (n == m and n is not None) for n, m in pairs):
                axes = [*range(lead), *(lead + i for i, (n, m) in enumerate(pairs) if n == 1 != m)]
                return self.emit("Reshape", self.reduce("ReduceSum", gradient, axes) if axes else gradient, shape)
        if self.opset < 13:
            raise _NoRule  # axes were attributes: they cannot be computed while the model runs
        whole = self.emit("Shape", y)
        lead_of = self.emit("Sub", self.emit("Shape", whole), self.emit("Shape", shape))
        one = numpy_helper.from_array(np.ones(1, np.int64))
        padded = self.emit("Concat", self.emit("ConstantOfShape", lead_of, value=one), shape, axis=0)
        differs = self.emit("NonZero", self.emit("Not", self.emit("Equal", padded, whole)))
        axes_of = self.emit("Reshape", differs, self.ints([-1]))
        summed = self.emit("ReduceSum", gradient, axes_of, keepdims=1, noop_with_empty_axes=1)
        return self.emit("Reshape", summed, shape)

    def reduce(self, op_type: str, x: str, axes: Sequence[int]) -> str:
        if self.opset >= (13 if op_type == "ReduceSum" else 18):
            return self.emit(op_type, x, self.ints(axes), keepdims=1)
        return self.emit(op_type, x, axes=list(axes), keepdims=1)


def _differentiate(tape: _Tape, path: Sequence[onnx.NodeProto], xs: Sequence[str], y: str) -> list[str | None]:
    active = set(xs)
    for node in path:
        if node.op_type not in _CONSTANT and active.intersection((*node.input, *captures_of(node))):
            active.update(name for name in node.output if name)
    gradients: dict[str, str] = {}
    if y in active:
        gradients[y] = tape.fill_like(y, 1)
    for node in reversed(path):
        wanted = [i for i, name in enumerate(node.input) if name in active]
        flowing = [name for name in node.output if name in gradients]
        if not flowing or not (wanted or captures_of(node).keys() & active):
            continue
        rule = _RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
        if rule is None or flowing != [node.output[0]] or not tape.is_real(node.output[0]):
            raise _NoRule
        partials = rule(tape, node, gradients[node.output[0]])
        for i in wanted:
            name, write = node.input[i], partials[i] if i < len(partials) else None
            if write is not None:
                term = write()
                gradients[name] = tape.emit("Add", gradients[name], term) if name in gradients else term
    return [gradients.get(x) for x in xs]


# A rule returns, for each input, how to write its gradient; None where an input is not differentiable.
_Partial: TypeAlias = "Callable[[], str] | None"
_Rule: TypeAlias = Callable[[_Tape, onnx.NodeProto, str], Sequence[_Partial]]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _broadcasts(partials: Callable[[_Tape, str, str, str, str], Iterable[Callable[[], str]]]) -> _Rule:
    def rule(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
        if _attribute(n, "broadcast", 0):
            raise _NoRule  # opset 6 and before aligned axes as told
        a, b = n.input
        made = partials(t, a, b, n.output[0], g)

        def fit(x: str, write: Callable[[], str]) -> _Partial:
            return lambda: t.sum_to(write(), x, n.output[0])

        return [fit(x, write) for x, write in zip((a, b), made, strict=True)]

    return rule


def _unary(write: Callable[[_Tape, str, str, str], str]) -> _Rule:
    return lambda t, n, g: [lambda: write(t, n.input[0], n.output[0], g)]


def _reshaped(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    return [lambda: t.emit("Reshape", g, t.emit("Shape", n.input[0]))]


def _sum(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    return [partial(t.sum_to, g, x, n.output[0]) for x in n.input]


def _expand(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    return [lambda: t.sum_to(g, n.input[0], n.output[0])]


def _relu(t: _Tape, x: str, y: str, g: str) -> str:
    return t.emit("Mul", g, t.emit("Cast", t.emit("Greater", x, t.number(0, x)), to=t.dtype(x)))


def _sigmoid(t: _Tape, x: str, y: str, g: str) -> str:
    return t.emit("Mul", g, t.emit("Mul", y, t.emit("Sub", t.number(1, x), y)))


def _tanh(t: _Tape, x: str, y: str, g: str) -> str:
    return t.emit("Mul", g, t.emit("Sub", t.number(1, x), t.emit("Mul", y, y)))


def _sqrt(t: _Tape, x: str, y: str, g: str) -> str:
    return t.emit("Div", g, t.emit("Mul", t.number(2, x), y))


def _reciprocal(t: _Tape, x: str, y: str, g: str) -> str:
    return t.emit("Neg", t.emit("Mul", g, t.emit("Mul", y, y)))


def _power(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    x, exponent = n.input
    if exponent not in t.constants or _attribute(n, "broadcast", 0):
        raise _NoRule
    power = numpy_helper.to_array(t.constants[exponent])

    def base() -> str:
        dtype = helper.tensor_dtype_to_np_dtype(t.dtype(x))
        factor, less = t.constant(power.astype(dtype)), t.constant((power - 1).astype(dtype))
        slope = t.emit("Mul", factor, t.emit("Pow", x, less))
        return t.sum_to(t.emit("Mul", g, slope), x, n.output[0])

    return [base]


def _transpose(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    order = _attribute(n, "perm", None)
    if order is None:
        return [lambda: t.emit("Transpose", g)]
    return [lambda: t.emit("Transpose", g, perm=[int(i) for i in np.argsort(order)])]


def _cast(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    return [(lambda: t.emit("Cast", g, to=t.dtype(n.input[0]))) if t.is_real(n.input[0]) else None]


def _matmul(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    a, b = n.input
    ranks = t.rank(a), t.rank(b)
    if min(ranks) < 2:
        if ranks == (1, 1):
            return [lambda: t.emit("Mul", g, b), lambda: t.emit("Mul", g, a)]
        raise _NoRule

    def swap(name: str, rank: int) -> str:
        order = [*range(rank)]
        order[-2:] = rank - 1, rank - 2
        return t.emit("Transpose", name, perm=order)

    def fit(product: str, x: str, rank: int) -> str:
        # Only the axes before the last two broadcast, and their sizes may not be known.
        if rank == max(ranks) == 2:
            return product
        lead = max(ranks) - rank
        if t.opset < 13:
            if lead:
                axes = [*range(lead)]
                product = t.emit("ReduceSum", product, axes=axes, keepdims=0)
            small, other = t.shape(x), t.shape(b if x == a else a)
            if small is None or other is None or small[:-2] != other[-len(small) : -2] or None in small[:-2]:
                raise _NoRule
            return product
        return t.sum_to(product, x, product)

    return [
        lambda: fit(t.emit("MatMul", g, swap(b, ranks[1])), a, ranks[0]),
        lambda: fit(t.emit("MatMul", swap(a, ranks[0]), g), b, ranks[1]),
    ]


def _gemm(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    a, b = n.input[:2]
    alpha, beta = _attribute(n, "alpha", 1.0), _attribute(n, "beta", 1.0)
    flip_a, flip_b = _attribute(n, "transA", 0), _attribute(n, "transB", 0)
    if t.opset < 7:
        raise _NoRule

    def product(p: str, q: str, flip_p: int, flip_q: int) -> str:
        p, q = (t.emit("Transpose", x, perm=[1, 0]) if flip else x for x, flip in ((p, flip_p), (q, flip_q)))
        return t.emit("Mul", t.emit("MatMul", p, q), t.number(alpha, a))

    def left() -> str:
        return product(b, g, flip_b, 1) if flip_a else product(g, b, 0, 1 - flip_b)

    def right() -> str:
        return product(g, a, 1, flip_a) if flip_b else product(a, g, 1 - flip_a, 0)

    def bias() -> str:
        return t.sum_to(t.emit("Mul", g, t.number(beta, a)), n.input[2], n.output[0])

    return [left, right, bias]


def _reduction(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    def write() -> str:
        x = n.input[0]
        again = onnx.NodeProto()
        again.CopyFrom(n)
        kept = [a for a in n.attribute if a.name != "keepdims"]
        del again.attribute[:]
        again.attribute.extend([*kept, helper.make_attribute("keepdims", 1)])
        again.output[:] = [f"{t.emit('Shape', x)}.kept"]
        t.nodes.append(again)
        spread = t.emit("Reshape", g, t.emit("Shape", again.output[0]))
        if n.op_type == "ReduceMean":
            sizes = (t.emit("Cast", t.emit("Size", name), to=t.dtype(x)) for name in (n.output[0], x))
            spread = t.emit("Mul", spread, t.emit("Div", *sizes))
        return t.emit("Expand", spread, t.emit("Shape", x))

    return [write]


def _softmax(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    if t.opset < 13:
        raise _NoRule  # it flattened its input

    def write() -> str:
        y, axis = n.output[0], _attribute(n, "axis", -1)
        mean = t.reduce("ReduceSum", t.emit("Mul", g, y), [axis])
        return t.emit("Mul", y, t.emit("Sub", g, mean))

    return [write]


def _where(t: _Tape, n: onnx.NodeProto, g: str) -> Sequence[_Partial]:
    condition, a, b = n.input
    return [
        None,
        lambda: t.sum_to(t.emit("Where", condition, g, t.number(0, a)), a, n.output[0]),
        lambda: t.sum_to(t.emit("Where", condition, t.number(0, b), g), b, n.output[0]),
    ]


# Nothing flows back through these: their outputs are integers, truth values, or constant almost everywhere.
_CONSTANT = frozenset(
    {
        "And", "ArgMax", "ArgMin", "Ceil", "Constant", "ConstantOfShape", "Equal", "Floor", "Greater",
        "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "NonZero", "Not", "Or", "Range", "Round",
        "Shape", "Sign", "Size", "Xor",
    }
)  # fmt: skip

_RULES: dict[str, _Rule] = {
    "Abs": _unary(lambda t, x, y, g: t.emit("Mul", g, t.emit("Sign", x))),
    "Add": _broadcasts(lambda t, a, b, y, g: (lambda: g, lambda: g)),
    "Cast": _cast,
    "Cos": _unary(lambda t, x, y, g: t.emit("Neg", t.emit("Mul", g, t.emit("Sin", x)))),
    "Div": _broadcasts(
        lambda t, a, b, y, g: (
            lambda: t.emit("Div", g, b),
            lambda: t.emit("Neg", t.emit("Div", t.emit("Mul", g, y), b)),
        )
    ),
    "Exp": _unary(lambda t, x, y, g: t.emit("Mul", g, y)),
    "Expand": _expand,
    "Flatten": _reshaped,
    "Gemm": _gemm,
    "Identity": _unary(lambda t, x, y, g: g),
    "Log": _unary(lambda t, x, y, g: t.emit("Div", g, x)),
    "MatMul": _matmul,
    "Mul": _broadcasts(lambda t, a, b, y, g: (lambda: t.emit("Mul", g, b), lambda: t.emit("Mul", g, a))),
    "Neg": _unary(lambda t, x, y, g: t.emit("Neg", g)),
    "Pow": _power,
    "Reciprocal": _unary(_reciprocal),
    "ReduceMean": _reduction,
    "ReduceSum": _reduction,
    "Relu": _unary(_relu),
    "Reshape": _reshaped,
    "Sigmoid": _unary(_sigmoid),
    "Sin": _unary(lambda t, x, y, g: t.emit("Mul", g, t.emit("Cos", x))),
    "Softmax": _softmax,
    "Softplus": _unary(lambda t, x, y, g: t.emit("Mul", g, t.emit("Sigmoid", x))),
    "Sqrt": _unary(_sqrt),
    "Squeeze": _reshaped,
    "Sub": _broadcasts(lambda t, a, b, y, g: (lambda: g, lambda: t.emit("Neg", g))),
    "Sum": _sum,
    "Tanh": _unary(_tanh),
    "Transpose": _transpose,
    "Unsqueeze": _reshaped,
    "Where": _where,
}
