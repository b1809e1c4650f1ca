"""Lowered operators against onnxruntime, on inputs and attributes that hypothesis draws, family by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from accelrt.graph.load import load_graph  # noqa: E402 - after the checks for what it needs
from accelrt.graph.lowering import lower, lowerable  # noqa: E402

pytestmark = pytest.mark.torch

FAST = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FLOATS = ("float32", "float64", "float16")
INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SIZES = st.integers(1, 5)


def model_of(nodes: list[onnx.NodeProto], feeds: dict[str, Any], opset: int, constants: dict[str, Any]) -> Any:
    """Build a model whose inputs are of the types of `feeds`; outputs are those of the last node."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in nodes[-1].output if name],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def check(
    op: str,
    inputs: list[Any],
    *,
    opset: int = 21,
    constant: tuple[int, ...] = (),
    outputs: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **attributes: Any,
) -> None:
    """Hold one node, lowered, against onnxruntime; inputs at `constant` become initialisers."""
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)]
    while names and not names[-1]:
        names.pop()
    attributes = {key: value for key, value in attributes.items() if value is not None}
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attributes)
    values = {name: value for name, value in zip(names, inputs, strict=False) if name}
    constants = {f"x{i}": values.pop(f"x{i}") for i in constant if f"x{i}" in values}
    model = model_of([node], values, opset, constants)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        expected = ort.InferenceSession(model.SerializeToString(), options).run(None, values)
    except Exception:
        assume(False)
    if any(array.dtype == np.float16 for array in [*inputs, *expected] if array is not None):
        rtol, atol = max(rtol, 4e-3), max(atol, 4e-3)
    graph = load_graph(model)
    if (reason := lowerable(graph.nodes[0])) is not None:
        assert reason
        return
    results = lower(graph).run(values)
    for name, array in zip(node.output, expected, strict=True):
        got = results[name]
        assert got.dtype == array.dtype, (name, got.dtype, array.dtype)
        assert got.shape == array.shape, (name, got.shape, array.shape)
        if array.dtype.kind == "f":
            np.testing.assert_allclose(got, array, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(got, array)


@st.composite
def arrays(draw: Any, dtype: str, shape: Any = None, low: float = -4, high: float = 4) -> Any:
    """An array of moderate values, drawn through a seed so that shrinking stays quick."""
    shape = draw(st.lists(SIZES, min_size=0, max_size=4)) if shape is None else shape
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    kind = np.dtype(dtype).kind
    if kind == "b":
        return random.random(shape) < 0.5
    if kind in "iu":
        return random.integers(0 if kind == "u" else int(low) * 5, int(high) * 5, shape).astype(dtype)
    return random.uniform(low, high, shape).astype(dtype)


@st.composite
def broadcasting(draw: Any) -> tuple[list[int], list[int]]:
    whole = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    shapes = []
    for _ in range(2):
        shape = [1 if draw(st.booleans()) else size for size in whole]
        shapes.append(shape[draw(st.integers(0, len(shape))) :] if draw(st.booleans()) else shape)
    return shapes[0], shapes[1]


@FAST
@given(st.data())
def test_binary(data: Any) -> None:
    op = data.draw(st.sampled_from(
        ["Add", "Sub", "Mul", "Div", "Mod", "Pow", "Equal", "Less", "Greater", "GreaterOrEqual", "LessOrEqual", "Max",
         "Min", "And", "Or", "Xor", "BitwiseAnd", "BitwiseXor", "BitwiseOr", "BitShift"]
    ))  # fmt: skip
    dtype = "bool" if op in ("And", "Or", "Xor") else data.draw(st.sampled_from(FLOATS + INTS))
    first, second = data.draw(broadcasting())
    a, b = data.draw(arrays(dtype, first)), data.draw(arrays(dtype, second))
    attributes: dict[str, Any] = {}
    if op in ("Div", "Mod") and dtype in INTS:
        b = np.where(b == 0, np.array(3, dtype), b).astype(dtype)
        if op == "Div" and not dtype.startswith("u"):
            a = abs(a)  # onnxruntime rounds as C does, and so do we; numpy's shape rules are what is tested here
    if op == "Pow":
        a, b = abs(a) + np.array(1, dtype), abs(b) % np.array(4, dtype)
    if op == "Mod":
        attributes["fmod"] = 1 if dtype in FLOATS else data.draw(st.integers(0, 1))
    if op == "BitShift":
        assume(dtype.startswith("u"))
        attributes["direction"] = data.draw(st.sampled_from(["LEFT", "RIGHT"]))
        b = b % 8
    check(op, [a, b], rtol=1e-4, **attributes)


@FAST
@given(st.data())
def test_unary(data: Any) -> None:
    op, attributes = data.draw(st.sampled_from([
        *((name, {}) for name in (
            "Abs", "Neg", "Ceil", "Floor", "Round", "Exp", "Sqrt", "Log", "Erf", "Sin", "Cos", "Tan", "Tanh", "Sigmoid",
            "Reciprocal", "Sign", "Relu", "Softplus", "Softsign", "Elu", "Selu", "LeakyRelu", "HardSigmoid",
            "HardSwish", "Mish", "ThresholdedRelu", "Celu", "Atan", "Asinh", "IsNaN", "IsInf", "Gelu", "Identity",
            "Not", "Sinh", "Cosh", "Acosh", "Asin", "Acos", "Atanh", "Shrink", "BitwiseNot"
        )),
        ("Elu", {"alpha": 0.5}), ("Selu", {"alpha": 2.0, "gamma": 3.0}), ("LeakyRelu", {"alpha": 0.3}),
        ("Celu", {"alpha": 2.0}), ("Gelu", {"approximate": "tanh"}), ("HardSigmoid", {"alpha": 0.4, "beta": 0.3}),
        ("IsInf", {"detect_negative": 0}), ("Shrink", {"bias": 1.5, "lambd": 1.0}), ("ThresholdedRelu", {"alpha": 2.0}),
    ]))  # fmt: skip
    dtype = data.draw(st.sampled_from(FLOATS + INTS + ("bool",)))
    x = data.draw(arrays(dtype))
    if dtype in FLOATS and x.size > 3 and data.draw(st.booleans()):
        x.reshape(-1)[:4] = [np.nan, np.inf, -np.inf, 2.5]
    check(op, [x], rtol=1e-4, **attributes)


@FAST
@given(st.data())
def test_reductions(data: Any) -> None:
    op = data.draw(st.sampled_from(
        ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare"]
    ))  # fmt: skip
    dtype = data.draw(st.sampled_from(("float32", "float64", "int32", "int64", "int8", "uint8")))
    x = data.draw(arrays(dtype, low=0.5 if op == "ReduceLogSum" else -2, high=3))
    axes = (
        data.draw(st.none() | st.lists(st.integers(-x.ndim, x.ndim - 1), unique_by=lambda a: a % max(x.ndim, 1)))
        if x.ndim
        else None
    )
    keepdims = data.draw(st.integers(0, 1))
    opset = data.draw(st.sampled_from((11, 13, 18, 20)))
    if opset >= (13 if op == "ReduceSum" else 18):
        given_axes = None if axes is None else np.array(axes, np.int64)
        noop = data.draw(st.sampled_from([None, 0, 1]))
        check(op, [x, given_axes], opset=opset, constant=(1,) if data.draw(st.booleans()) else (), keepdims=keepdims,
              noop_with_empty_axes=noop, rtol=1e-4)  # fmt: skip
    else:
        check(op, [x], opset=opset, axes=axes or None, keepdims=keepdims, rtol=1e-4)


@FAST
@given(st.data())
def test_along_an_axis(data: Any) -> None:
    op = data.draw(st.sampled_from(
        ["Softmax", "LogSoftmax", "Hardmax", "ArgMax", "ArgMin", "TopK", "CumSum", "LpNormalization"]
    ))  # fmt: skip
    dtype = data.draw(st.sampled_from(("float32", "float64", "int32", "int64", "uint8", "float16")))
    x = data.draw(arrays(dtype, data.draw(st.lists(SIZES, min_size=1, max_size=4)), low=-2, high=2))
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    opset = data.draw(st.sampled_from((11, 13, 21)))
    if op.startswith("Arg"):
        last = data.draw(st.integers(0, 1)) if opset >= 13 else None
        check(op, [x], opset=opset, axis=axis, keepdims=data.draw(st.integers(0, 1)), select_last_index=last)
    elif op == "TopK":
        k = np.array([data.draw(st.integers(1, x.shape[axis]))], np.int64)
        check(op, [x, k], opset=opset, outputs=2, axis=axis, largest=data.draw(st.integers(0, 1)), constant=(1,))
    elif op == "CumSum":
        check(op, [x, np.array(axis, np.int64)], opset=opset, constant=(1,), exclusive=data.draw(st.integers(0, 1)),
              reverse=data.draw(st.integers(0, 1)), rtol=1e-4, atol=1e-5)  # fmt: skip
    elif op == "LpNormalization":
        check(op, [x], opset=opset, axis=axis, p=data.draw(st.sampled_from((1, 2))), rtol=1e-4)
    else:
        check(op, [x], opset=opset, axis=data.draw(st.sampled_from([axis, None])), rtol=1e-4)


@FAST
@given(st.data())
def test_slices(data: Any) -> None:
    x = data.draw(arrays(data.draw(st.sampled_from(("float32", "int64", "uint8", "bool")))))
    assume(x.ndim)
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    bounds = st.integers(-7, 7) | st.sampled_from([np.iinfo(np.int64).max, np.iinfo(np.int64).min + 1, -(1 << 31)])
    starts, ends = ([data.draw(bounds) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in axes]
    # onnxruntime takes a huge end of a backward slice for "all"; the text clamps it, which leaves nothing.
    assume(all(step > 0 or end < 1 << 31 for end, step in zip(ends, steps, strict=True)))
    axes = [a - x.ndim if data.draw(st.booleans()) else a for a in axes]
    fixed = (1, 2, 3, 4) if data.draw(st.booleans()) else ()
    check("Slice", [x, *(np.array(v, np.int64) for v in (starts, ends, axes, steps))], constant=fixed)


@FAST
@given(st.data())
def test_pads(data: Any) -> None:
    x = data.draw(arrays(data.draw(st.sampled_from(("float32", "int64", "int32", "bool", "float64"))),
                         data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))))  # fmt: skip
    mode = data.draw(st.sampled_from(["constant", "edge", "reflect", "wrap"]))
    low = -1 if mode in ("constant", "edge") else 0
    pads = [data.draw(st.integers(low, 1)) for _ in range(2 * x.ndim)]
    value = data.draw(st.none() | arrays(x.dtype.name, ())) if mode == "constant" else None
    check("Pad", [x, np.array(pads, np.int64), value], opset=19, mode=mode, constant=(1, 2))


@FAST
@given(st.data())
def test_shapes(data: Any) -> None:
    dtype = data.draw(st.sampled_from(("float32", "int64", "uint16", "bool", "float16", "uint64")))
    x = data.draw(arrays(dtype))
    op = data.draw(st.sampled_from(["Transpose", "Expand", "Tile", "Flatten", "Reshape", "Split", "Unsqueeze",
                                    "Squeeze", "Concat", "Trilu", "Shape", "Size"]))  # fmt: skip
    fixed = (1,) if data.draw(st.booleans()) else ()
    if op == "Transpose":
        check(op, [x], perm=data.draw(st.permutations(range(x.ndim))) if x.ndim else None)
    elif op == "Expand":
        shape = [s if data.draw(st.booleans()) else 1 for s in x.shape]
        shape = [data.draw(SIZES) for _ in range(data.draw(st.integers(0, 2)))] + shape
        check(op, [x, np.array(shape, np.int64)], constant=fixed)
    elif op == "Tile":
        check(op, [x, np.array([data.draw(st.integers(0, 3)) for _ in x.shape], np.int64)], constant=fixed)
    elif op == "Flatten":
        check(op, [x], axis=data.draw(st.integers(-x.ndim, x.ndim)))
    elif op == "Reshape":
        shape = list(data.draw(st.permutations(x.shape)))
        if shape:
            shape[data.draw(st.integers(0, len(shape) - 1))] = -1
        check(op, [x, np.array(shape, np.int64)], constant=fixed)
    elif op == "Split":
        assume(x.ndim)
        axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
        if data.draw(st.booleans()):
            count = data.draw(st.integers(1, x.shape[axis]))
            assume(-(-x.shape[axis] // count) * (count - 1) < x.shape[axis])
            check(op, [x], axis=axis, num_outputs=count, outputs=count)
        else:
            first = data.draw(st.integers(0, x.shape[axis]))
            check(op, [x, np.array([first, x.shape[axis] - first], np.int64)], axis=axis, outputs=2, constant=fixed)
    elif op == "Unsqueeze":
        axes = data.draw(st.lists(st.integers(0, x.ndim + 1), min_size=2, max_size=2, unique=True))
        check(op, [x, np.array(axes, np.int64)], constant=fixed)
    elif op == "Squeeze":
        axes = [i for i, s in enumerate(x.shape) if s == 1]
        check(op, [x, np.array(axes, np.int64) if axes and data.draw(st.booleans()) else None], constant=fixed)
    elif op == "Concat":
        assume(x.ndim)
        check(op, [x, x, x], axis=data.draw(st.integers(-x.ndim, x.ndim - 1)))
    elif op == "Trilu":
        assume(x.ndim >= 2)
        k = data.draw(st.none() | st.integers(-5, 5))
        check(op, [x, None if k is None else np.array(k, np.int64)], upper=data.draw(st.integers(0, 1)), constant=fixed)
    elif op == "Shape":
        check(op, [x], start=data.draw(st.integers(-5, 5)), end=data.draw(st.none() | st.integers(-5, 5)))
    else:
        check(op, [x])


@FAST
@given(st.data())
def test_gathers_and_scatters(data: Any) -> None:
    shape = data.draw(st.lists(SIZES, min_size=1, max_size=4))
    x = data.draw(arrays(data.draw(st.sampled_from(("float32", "int64", "uint8", "bool", "float16"))), shape))
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    op = data.draw(st.sampled_from(["Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"]))
    if op == "Gather":
        where = data.draw(st.lists(SIZES, max_size=3))
        index = random.integers(-x.shape[axis], x.shape[axis], where).astype(
            data.draw(st.sampled_from(("int64", "int32")))
        )
        check(op, [x, index], axis=axis, constant=(1,) if data.draw(st.booleans()) else ())
    elif op in ("GatherElements", "ScatterElements"):
        part = [data.draw(st.integers(1, s)) for s in shape]
        part[axis] = x.shape[axis]
        reduction = data.draw(st.sampled_from(["none", "add", "mul", "max", "min"])) if op[0] == "S" else None
        index = random.integers(-x.shape[axis], x.shape[axis], part)
        if reduction == "none":  # the same place twice has no defined result
            index = np.argsort(random.random(part), axis)
        updates = data.draw(arrays(x.dtype.name, part)) if reduction else None
        check(op, [x, index, updates], axis=axis, reduction=reduction, opset=18, rtol=1e-4)
    else:
        depth = data.draw(st.integers(1, x.ndim))
        batch = data.draw(st.integers(0, min(depth, x.ndim) - 1)) if op == "GatherND" else 0
        lead = list(x.shape[:batch])
        count = data.draw(SIZES)
        rows = [random.integers(-s, s, [*lead, count]) for s in x.shape[batch : batch + depth - batch]] or [
            np.zeros([*lead, count], np.int64)
        ]
        index = np.stack(rows, -1)
        if op == "GatherND":
            check(op, [x, index], batch_dims=batch)
        else:
            reduction = data.draw(st.sampled_from(["none", "add", "mul", "max", "min"]))
            if reduction == "none":
                index = index[:1]
            updates = data.draw(arrays(x.dtype.name, [*index.shape[:-1], *x.shape[index.shape[-1] :]]))
            check(op, [x, index, updates], reduction=reduction, opset=18, rtol=1e-4)


@st.composite
def windows(draw: Any, rank: int) -> dict[str, Any]:
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    attributes: dict[str, Any] = {"kernel_shape": kernel}
    attributes["strides"] = draw(st.none() | st.just([draw(st.integers(1, 3)) for _ in range(rank)]))
    attributes["dilations"] = draw(st.none() | st.just([draw(st.integers(1, 2)) for _ in range(rank)]))
    if draw(st.booleans()):
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"]))
    return attributes


@FAST
@given(st.data())
def test_convolutions(data: Any) -> None:
    rank = data.draw(st.integers(1, 3))
    attributes = data.draw(windows(rank))
    group = data.draw(st.sampled_from([1, 1, 2]))
    inputs, outputs = group * data.draw(st.integers(1, 2)), group * data.draw(st.integers(1, 2))
    image = [data.draw(st.integers(5, 7)) for _ in range(rank)]
    x = data.draw(arrays("float32", [2, inputs, *image]))
    if data.draw(st.booleans()):
        w = data.draw(arrays("float32", [outputs, inputs // group, *attributes["kernel_shape"]]))
        b = data.draw(st.none() | arrays("float32", [outputs]))
        check("Conv", [x, w, b], group=group, rtol=1e-4, atol=1e-4, **attributes)
        return
    w = data.draw(arrays("float32", [inputs, outputs // group, *attributes["kernel_shape"]]))
    b = data.draw(st.none() | arrays("float32", [outputs]))
    strides = attributes["strides"] or [1] * rank
    added = [data.draw(st.integers(0, s - 1)) for s in strides]
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        added = None
    check("ConvTranspose", [x, w, b], group=group, output_padding=added, rtol=1e-4, atol=1e-4, **attributes)


@FAST
@given(st.data())
def test_pools(data: Any) -> None:
    rank = data.draw(st.integers(1, 3))
    attributes = data.draw(windows(rank))
    op = data.draw(st.sampled_from(["MaxPool", "AveragePool", "LpPool"]))
    opset = data.draw(st.sampled_from((12, 22)))
    x = data.draw(arrays("float32", [2, 2, *(data.draw(st.integers(5, 7)) for _ in range(rank))]))
    if op != "MaxPool" and opset < 19:
        attributes["dilations"] = None
    if op != "LpPool" or opset >= 18:
        attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    if op == "AveragePool":
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    if op == "LpPool":
        attributes["p"] = data.draw(st.sampled_from((1, 2, 3)))
    outputs = data.draw(st.integers(1, 2)) if op == "MaxPool" else 1
    check(op, [x], opset=opset, outputs=outputs, rtol=1e-4, atol=1e-5, **attributes)


@FAST
@given(st.data())
def test_resizes(data: Any) -> None:
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    x = data.draw(arrays("float32", [1, 2, data.draw(st.integers(3, 6)), data.draw(st.integers(3, 6))]))
    attributes: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": data.draw(st.sampled_from(
            ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
        )),
    }  # fmt: skip
    if mode == "nearest":
        attributes["nearest_mode"] = data.draw(
            st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
        )
    if mode == "cubic":
        attributes["cubic_coeff_a"] = data.draw(st.sampled_from([-0.5, -0.75]))
        attributes["exclude_outside"] = data.draw(st.integers(0, 1))
    if data.draw(st.booleans()):
        sizes = np.array([1, 2, data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))], np.int64)
        check("Resize", [x, None, None, sizes], opset=19, constant=(3,), rtol=1e-4, atol=1e-5, **attributes)
    else:
        # Powers of two alone: their places are exact in every type, so that rounding has one answer.
        scales = np.array(
            [1, 1, data.draw(st.sampled_from([0.5, 2, 4])), data.draw(st.sampled_from([0.5, 1, 2]))], np.float32
        )
        if attributes["coordinate_transformation_mode"] == "align_corners":
            assume(all(float(n * s).is_integer() for n, s in zip(x.shape, scales, strict=True)))
        check("Resize", [x, None, scales], opset=19, constant=(2,), rtol=1e-4, atol=1e-5, **attributes)


@FAST
@given(st.data())
def test_recurrent(data: Any) -> None:
    op, gates = data.draw(st.sampled_from([("RNN", 1), ("GRU", 3), ("LSTM", 4)]))
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    d = 2 if direction == "bidirectional" else 1
    time, batch, width, hidden = (data.draw(st.integers(1, 4)) for _ in range(4))
    shapes = {
        "x": [time, batch, width], "w": [d, gates * hidden, width], "r": [d, gates * hidden, hidden],
        "b": [d, 2 * gates * hidden], "h": [d, batch, hidden], "c": [d, batch, hidden], "p": [d, 3 * hidden],
    }  # fmt: skip
    value = {name: data.draw(arrays("float32", shape, -1, 1)) for name, shape in shapes.items()}
    lengths = None
    if data.draw(st.booleans()):
        lengths = np.array([data.draw(st.integers(1, time)) for _ in range(batch)], np.int32)
        lengths[0] = time
    inputs = [value["x"], value["w"], value["r"], data.draw(st.sampled_from([value["b"], None])), lengths]
    inputs.append(data.draw(st.sampled_from([value["h"], None])))
    attributes: dict[str, Any] = {"direction": direction, "hidden_size": hidden}
    if op == "LSTM":
        inputs += [data.draw(st.sampled_from([value["c"], None])), data.draw(st.sampled_from([value["p"], None]))]
        attributes["input_forget"] = data.draw(st.integers(0, 1))
    if op == "GRU":
        attributes["linear_before_reset"] = data.draw(st.integers(0, 1))
    if data.draw(st.booleans()):
        attributes["clip"] = 0.5
    check(op, inputs, opset=14, outputs=3 if op == "LSTM" else 2, rtol=1e-4, atol=1e-5, **attributes)


@FAST
@given(st.data())
def test_quantisation(data: Any) -> None:
    dtype = data.draw(st.sampled_from(["int8", "uint8", "int16", "uint16"]))
    shape = data.draw(st.lists(SIZES, min_size=1, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    count = [] if data.draw(st.booleans()) else [shape[axis]]
    scale = data.draw(arrays("float32", count, 0.01, 0.2))
    zero = data.draw(arrays(dtype, count))
    if data.draw(st.booleans()):
        check("QuantizeLinear", [data.draw(arrays("float32", shape)), scale, zero], axis=axis)
    else:
        check("DequantizeLinear", [data.draw(arrays(dtype, shape)), scale, zero], axis=axis)


@FAST
@given(st.data())
def test_integer_products(data: Any) -> None:
    a = data.draw(arrays(data.draw(st.sampled_from(["uint8", "int8"])), [2, 3, 4]))
    b = data.draw(arrays(data.draw(st.sampled_from(["uint8", "int8"])), [4, 5]))
    check("MatMulInteger", [a, b, data.draw(arrays(a.dtype.name, ())), data.draw(arrays(b.dtype.name, ()))])


@FAST
@given(st.data())
def test_casts(data: Any) -> None:
    names = FLOATS + INTS + ("bool",)
    source, target = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    # A float beyond an integer's range has no defined value.
    low = 0 if source in FLOATS and target.startswith("u") else -4
    x = data.draw(arrays(source, low=low))
    check("Cast", [x], to=helper.np_dtype_to_tensor_dtype(np.dtype(target)))


@FAST
@given(st.data())
def test_products(data: Any) -> None:
    m, k, n = (data.draw(SIZES) for _ in range(3))
    if data.draw(st.booleans()):
        ta, tb = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
        a = data.draw(arrays("float32", [k, m] if ta else [m, k]))
        b = data.draw(arrays("float32", [n, k] if tb else [k, n]))
        c = data.draw(
            st.none() | st.sampled_from([[], [1], [n], [1, n], [m, 1], [m, n]]).flatmap(lambda s: arrays("float32", s))
        )
        alpha, beta = data.draw(st.sampled_from([1.0, 0.5])), data.draw(st.sampled_from([1.0, 2.0]))
        check("Gemm", [a, b, c], transA=ta, transB=tb, alpha=alpha, beta=beta, rtol=1e-4, atol=1e-4)
        return
    dtype = data.draw(st.sampled_from(["float32", "float64", "int32", "int64", "uint32"]))
    lead = data.draw(st.sampled_from([[], [2], [3, 1]]))
    other = data.draw(st.sampled_from([[], [2], [2, 1, 2]]))
    a = data.draw(arrays(dtype, [*lead, m, k] if data.draw(st.booleans()) else [k]))
    b = data.draw(arrays(dtype, [*other, k, n] if data.draw(st.booleans()) else [k]))
    check("MatMul", [a, b], rtol=1e-4, atol=1e-4)


@FAST
@given(st.data())
def test_normalisations(data: Any) -> None:
    shape = [2, 4, *data.draw(st.lists(SIZES, min_size=1, max_size=2))]
    x = data.draw(arrays(data.draw(st.sampled_from(["float32", "float64"])), shape))
    scale, bias, mean = (data.draw(arrays(x.dtype.name, [4])) for _ in range(3))
    op = data.draw(st.sampled_from(["BatchNormalization", "InstanceNormalization", "LayerNormalization", "LRN"]))
    if op == "BatchNormalization":
        check(op, [x, scale, bias, mean, data.draw(arrays(x.dtype.name, [4], 0.5, 2))], opset=15, rtol=1e-4, atol=1e-5)
    elif op == "InstanceNormalization":
        check(op, [x, scale, bias], opset=21, rtol=1e-3, atol=1e-4)
    elif op == "LRN":
        check(op, [x], size=data.draw(st.integers(1, 5)), alpha=0.5, beta=0.6, bias=2.0, rtol=1e-4)
    else:
        axis = data.draw(st.integers(-len(shape), len(shape) - 1))
        wide = data.draw(arrays(x.dtype.name, shape[axis:]))
        offset = data.draw(st.none() | arrays(x.dtype.name, shape[axis:]))
        check(
            op, [x, wide, offset], axis=axis, opset=17, outputs=data.draw(st.sampled_from([1, 3])), rtol=1e-3, atol=1e-4
        )
