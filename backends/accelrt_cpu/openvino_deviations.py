"""Where OpenVINO's CPU plug-in must not be used although it would take the node: data that it does not tell.

How it was determined: OpenVINO 2026.4.1, by way of exported and imported programs, as the engine runs them; every
operator that takes integers with values at the ends of their ranges against onnx's reference evaluator; every case of
ONNX's backend suite (onnx 1.23.2) with its sizes static and again with all of them open; and 450 more cases, many of
older versions of operators, against onnxruntime. `tests/unit/test_openvino_engine.py` shows on the installed OpenVINO
why the main rules are there.

What the plug-in does with numbers:

- float64 is computed as float32.
- int64 is computed as int32: values wrap without a word. So integers of 64 bits may only be carried from place to
  place or say where: nothing may make them grow. That what enters fits 32 bits is checked at each run.
- 32-bit integers are exact while they are carried, but are compared and reduced in float32: 16777216 equals 16777217.
- 16-bit integers travel as 32-bit ones, so a cast that should wrap does not; 8-bit arithmetic saturates where ONNX's
  wraps. Both compare well: each value is exact in float32.
- float16 and bfloat16 are computed in float32 and rounded where they leave a program: more precision, never less.
- Empty tensors of open sizes may come out with the shape of the run before, and a later run has crashed: the executable
  refuses such inputs, and NonZero and Compress, whose results may be empty, are refused here.

What it does not do is left to who chooses it by name: Relu, Max, Clip and their like may turn NaN into a number, on
which ONNX is silent, and numbers below 1.2e-38 may count as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelrt.graph.node import Node
from accelrt.graph.types import TensorType, ValueType

_INT32 = np.iinfo(np.int32)
_EXACT_IN_FLOAT32 = 2**24


def deviation(node: Node, precision: str = "fp32") -> str | None:
    """Return why OpenVINO must not be used for a node or what its bodies hold, None if nothing is known against it.

    Who asks for ``int8`` has chosen rounding: being off by one step of a quantised value is no deviation then.
    """
    if node.domain:
        return f"operators of domain {node.domain} are not checked on OpenVINO"
    if (reason := _type_problem(node) or _integer_problem(node)) is not None:
        return reason
    for entry in _TABLE.get(node.op_type, ()):
        if not (precision == "int8" and entry.rounds_otherwise) and entry.applies(node):
            return entry.reason
    for inner in (inner for body in node.bodies for inner in body):
        if (reason := deviation(inner, precision)) is not None:
            return f"its body holds {inner.name!r} ({inner.kind}): {reason}"
    return None


# --- types ---

_TYPES = frozenset(
    {
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "float16", "bfloat16",
        "float32",
    }
)  # fmt: skip
_WHY_NOT = {
    "float64": "OpenVINO computes float64 as float32",
    "uint32": "OpenVINO computes uint32 as int32",
    "uint64": "OpenVINO computes uint64 as int32",
    "string": "OpenVINO's CPU plug-in does not compute with text",
}


def _type_problem(node: Node) -> str | None:
    for name, type_ in _values(node):
        if type_ is None:
            return f"the type of {name!r} is not known"
        if not isinstance(type_, TensorType):
            return f"{name!r} is a {type_}; OpenVINO's CPU plug-in takes tensors only"
        if type_.dtype not in _TYPES:
            return _WHY_NOT.get(type_.dtype, f"{type_.dtype} is not checked on OpenVINO") + f" ({name!r})"
        if type_.shape is None:
            return f"the rank of {name!r} is not known, without which OpenVINO's CPU plug-in cannot compile"
    return None


def _values(node: Node) -> Iterator[tuple[str, ValueType | None]]:
    for names, types in (
        (node.inputs, node.input_types),
        (node.captures, node.capture_types),
        (node.outputs, node.output_types),
    ):
        yield from ((name, type_) for name, type_ in zip(names, types, strict=True) if name)


# --- integers ---

_CARRIES = frozenset(
    {
        "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split",
        "Slice", "Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements", "ScatterND",
        "Expand", "Tile", "Pad", "Where", "Compress", "DepthToSpace", "SpaceToDepth", "If", "Loop",
        "Scan",
    }
)  # fmt: skip
"""Operators that bring integers of any width from place to place, unchanged: shown with the ends of their ranges."""

_COMPARES = frozenset(
    {
        "Max", "Min", "Clip", "Relu", "Sign", "Equal", "Less", "LessOrEqual", "Greater",
        "GreaterOrEqual", "ArgMax", "ArgMin", "TopK", "ReduceMax", "ReduceMin", "MaxPool", "Trilu",
        "ReverseSequence", "NonZero", "Unique", "And", "Or", "Not", "Xor",
    }
)  # fmt: skip
"""Operators that look at integers and never leave their range: right for 8 and 16 bits, which float32 holds."""

_REALS = frozenset(
    {
        "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv",
        "QLinearMatMul", "QuantizeLinear",
    }
)  # fmt: skip
"""Operators whose integers stand for real numbers: those that go wrong are in the table of operators."""

_SAYS_WHERE: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,), "Attention": (6,), "CenterCropPad": (1,), "ConstantOfShape": (0,), "CumSum": (1,),
    "Expand": (1,), "EyeLike": (0,), "Gather": (1,), "GatherElements": (1,), "GatherND": (1,),
    "Loop": (0,), "MaxUnpool": (1, 2), "NegativeLogLikelihoodLoss": (1,), "NonMaxSuppression": (2,),
    "OneHot": (0, 1), "Pad": (1, 3), "Range": (0, 1, 2), "ReduceL1": (1,), "ReduceL2": (1,),
    "ReduceLogSum": (1,), "ReduceLogSumExp": (1,), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,),
    "ReduceProd": (1,), "ReduceSum": (1,), "ReduceSumSquare": (1,), "Reshape": (1,), "Resize": (3,),
    "ReverseSequence": (1,), "Scatter": (1,), "ScatterElements": (1,), "ScatterND": (1,), "Shape": (0,),
    "Size": (0,), "Slice": (1, 2, 3, 4), "SoftmaxCrossEntropyLoss": (1,), "Split": (1,), "Squeeze": (1,),
    "TensorScatter": (2,), "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,),
}  # fmt: skip
"""Inputs that index, count or name axes, bounded by the sizes of tensors, or of which only the shape counts."""

_UNBOUNDED = {("Slice", 1), ("Slice", 2), ("Loop", 0)}
"""Where exporters write 2**63-1 for "to the end": OpenVINO clamps constants, which does not change these."""

_FINDS_PLACES = frozenset({"ArgMax", "ArgMin", "ConstantOfShape", "EyeLike", "NonZero", "Range", "Shape", "TopK"})
"""Operators whose integer outputs are positions or sizes, or as exact as what they are given."""

_WIDE = frozenset({"int32", "int64"})
_NARROW = frozenset({"int8", "int16", "uint8", "uint16"})


def _integer_problem(node: Node) -> str | None:
    if node.op_type in ("Cast", "CastLike"):
        return _cast_problem(node)
    if node.op_type in _REALS:
        return None
    for index, type_ in enumerate(node.input_types):
        dtype = type_.dtype if isinstance(type_, TensorType) else None
        says_where = index in _SAYS_WHERE.get(node.op_type, ())
        if dtype in _WIDE | _NARROW and not says_where and not _handles(node, str(dtype)):
            return _degrades(node, str(dtype))
        if dtype == "int64" and (node.op_type, index) not in _UNBOUNDED and not _fits(node.constants.get(index)):
            return f"OpenVINO computes int64 as int32, and the constant {node.inputs[index]!r} exceeds it"
    for type_ in node.output_types:
        dtype = type_.dtype if isinstance(type_, TensorType) else None
        if dtype in _WIDE | _NARROW and node.op_type not in _FINDS_PLACES and not _handles(node, str(dtype)):
            return _degrades(node, str(dtype))
    return None


def _handles(node: Node, dtype: str) -> bool:
    return node.op_type in _CARRIES or (node.op_type in _COMPARES and dtype in _NARROW)


def _degrades(node: Node, dtype: str) -> str:
    how = {"int64": "as int32 or float32", "int32": "partly as float32"}.get(dtype, "without wrapping around")
    return f"OpenVINO computes {node.op_type} of {dtype} {how}, so that large values come out wrong"


def _fits(constant: Any) -> bool:
    return constant is None or not constant.size or (constant.min() >= _INT32.min and constant.max() <= _INT32.max)


def _cast_problem(node: Node) -> str | None:
    source, target = node.input_dtype(0), node.output_dtype(0)
    if target == source:
        return None
    if target == "int64" and source in ("float32", "bfloat16"):
        return f"OpenVINO casts {source} to int32 where int64 is asked for, so that large values come out wrong"
    if target == "bool" and source != "bool":
        return f"OpenVINO casts {source} to bool by way of float32, where NaN and large integers come out False"
    if target in ("int16", "uint16") and source in _WIDE | _NARROW:
        return f"OpenVINO keeps {target} in 32 bits, so that a cast from {source} does not wrap around"
    if source == "int64" and not _fits(node.constants.get(0)):
        return f"OpenVINO computes int64 as int32, and the constant {node.inputs[0]!r} exceeds it"
    return None


# --- operators ---


@dataclass(frozen=True, slots=True)
class _Deviation:
    applies: Callable[[Node], bool]
    reason: str
    rounds_otherwise: bool = False


def _always(node: Node) -> bool:
    return True


def _reduces(node: Node) -> bool:
    return node.attributes.get("reduction", "none") != "none" and node.input_dtype(0) in _WIDE | _NARROW


def _pads_with_wide_value(node: Node) -> bool:
    if node.input_dtype(0) not in _WIDE or node.input_dtype(2) is None:
        return False
    value = node.constants.get(2)
    return value is None or bool(np.any(np.abs(value.astype(np.float64)) > _EXACT_IN_FLOAT32))


def _wide_fill(node: Node) -> bool:
    return not _fits(node.attributes.get("value")) and node.output_dtype(0) == "int64"


def _attention_beyond_plain(node: Node) -> bool:
    windowed = "left_window_size" in node.attributes or "right_window_size" in node.attributes
    continued = bool(node.attributes.get("is_causal", 0)) and node.has_input(4)
    return windowed or continued or node.has_input(6) or node.input_dtype(0) == "bfloat16"


def _attention_groups(node: Node) -> bool:
    heads = node.attributes.get("q_num_heads"), node.attributes.get("kv_num_heads")
    if None in heads:
        heads = node.input_size(0, 1), node.input_size(1, 1)
    return heads[0] is None or heads[0] != heads[1]


def _splits_unevenly(node: Node) -> bool:
    parts = node.attributes.get("num_outputs")
    size = node.input_size(0, node.attributes.get("axis", 0))
    return parts is not None and (size is None or size % int(parts) != 0)


def _flattens(node: Node) -> bool:
    """Whether a softmax runs over several axes at once, as between opset 11 and 12."""
    rank = len(node.input_shape(0) or ())
    return node.version == 11 and node.attributes.get("axis", 1) % max(rank, 1) != rank - 1


def _normalises_otherwise(node: Node) -> bool:
    open_sizes = not all(isinstance(dim, int) for dim in node.input_shape(0) or (None,))
    return open_sizes or node.attributes.get("bias", 1.0) != 1.0


def _pads_unknown_sizes(node: Node) -> bool:
    """Whether the padding of a transposed convolution depends on sizes that are open."""
    derived = node.attributes.get("auto_pad", "NOTSET").startswith("SAME") or "output_shape" in node.attributes
    return derived and not all(isinstance(dim, int) for dim in (node.input_shape(0) or (None,) * 3)[2:])


def _indexes_fewer(node: Node) -> bool:
    data, indices, axis = node.input_shape(0) or (), node.input_shape(1) or (), node.attributes.get("axis", 0)
    pairs = list(zip(data, indices, strict=False))
    pairs.pop(axis)
    return any(size is None or size != count for size, count in pairs)


def _slope_by_channel(node: Node) -> bool:
    """Whether OpenVINO may take a slope of one dimension as one a channel, where ONNX aligns it with the last."""
    data, slope = node.input_shape(0) or (), node.input_shape(1) or ()
    return len(slope) == 1 and slope != (1,) and len(data) > 2


def _ceil_meets_padding(node: Node) -> bool:
    """Whether the last window of a pooling that rounds up may reach beyond the padding, or start in it."""
    if not node.attributes.get("ceil_mode", 0):
        return False
    if node.attributes.get("count_include_pad", 0):
        return True
    kernel = node.attributes["kernel_shape"]
    strides = node.attributes.get("strides", (1,) * len(kernel))
    pads = node.attributes.get("pads", (0,) * 2 * len(kernel))[len(kernel) :]
    dilations = node.attributes.get("dilations", (1,) * len(kernel))
    sizes = zip(kernel, strides, pads, dilations, strict=True)
    return any(pad + stride > (k - 1) * dilation + 1 for k, stride, pad, dilation in sizes)


def _half(node: Node) -> bool:
    return node.input_dtype(0) in ("bfloat16", "float16")


def _may_be_empty(node: Node) -> bool:
    """Whether a set that is reduced may have no elements: only what sizes are static is known to have some."""
    shape = node.input_shape(0) or ()
    axes = node.attributes.get("axes")
    if axes is None and node.has_input(1):
        axes = tuple(node.constants[1].ravel()) if 1 in node.constants else None
    reduced = [shape[axis] for axis in axes] if axes else shape
    return not all(isinstance(dim, int) and dim > 0 for dim in reduced)


def _resizes_otherwise(node: Node) -> bool:
    mode = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    return (
        bool(node.attributes.get("antialias", 0) or node.attributes.get("exclude_outside", 0))
        or node.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch"
        or node.attributes.get("nearest_mode", "") == "round_prefer_ceil"
        or (mode == "align_corners" and node.has_input(2) and not node.has_input(3))
    )


def _column_first(node: Node) -> bool:
    return bool(node.attributes.get("mode", "DCR") != "DCR")


def _repeats_unknown(node: Node) -> bool:
    return 1 not in node.constants


def _trains(node: Node) -> bool:
    return node.has_input(2) and (2 not in node.constants or bool(np.any(node.constants[2])))


_ACCUMULATE = (_Deviation(_always, "OpenVINO sums products of integers in float32, which is not exact"),)
_COUNTED = (
    _Deviation(
        _always,
        "its result may turn out empty at run, which other operators of OpenVINO get wrong or crash on",
    ),
)
_EXTREME = (
    _Deviation(
        _may_be_empty,
        "OpenVINO gives the lowest float, not an infinity, for an empty set, which this may be",
    ),
)
_FOURIER = (_Deviation(_always, "OpenVINO's Fourier transforms are off by 6e-5 of the largest value"),)
_POOL = (_Deviation(_ceil_meets_padding, "OpenVINO counts padding otherwise when the number of windows is rounded up"),)
_QUANTISE = (
    _Deviation(
        _always,
        "OpenVINO multiplies by the inverse of the scale and rounds after adding the zero point, which is off "
        "by one for ties and their neighbours",
        rounds_otherwise=True,
    ),
)
_RANDOM = (_Deviation(_always, "OpenVINO draws from a generator of its own, which does not heed the seed"),)
_RECURRENT = (_Deviation(_always, "OpenVINO computes recurrent layers wrongly in a program exported and imported"),)
_SCATTER = (_Deviation(_reduces, "OpenVINO computes reductions of integers without wrapping around"),)

_TABLE: dict[str, tuple[_Deviation, ...]] = {
    "Attention": (
        _Deviation(
            _attention_beyond_plain,
            "OpenVINO computes Attention wrongly with windows, padded or continued keys, and in bfloat16",
        ),
        _Deviation(
            _attention_groups,
            "OpenVINO fails at run where heads share keys and sizes are open; each head is not known to have its own",
        ),
    ),
    "AveragePool": _POOL,
    "Bernoulli": _RANDOM,
    "ConstantOfShape": (_Deviation(_wide_fill, "OpenVINO computes int64 as int32, and the value exceeds it"),),
    "ConvInteger": _ACCUMULATE,
    "ConvTranspose": (_Deviation(_pads_unknown_sizes, "OpenVINO pads a transposed convolution of open sizes wrongly"),),
    "DFT": _FOURIER,
    "Dropout": (_Deviation(_trains, "OpenVINO has no Dropout for training"),),
    "DynamicQuantizeLinear": _QUANTISE,
    "GRU": _RECURRENT,
    "GatherElements": (_Deviation(_indexes_fewer, "OpenVINO demands as many indices as elements on all other axes"),),
    "LRN": (_Deviation(_normalises_otherwise, "OpenVINO ignores the bias of LRN and fails at run if sizes are open"),),
    "LSTM": _RECURRENT,
    "LpPool": _POOL,
    "MatMulInteger": _ACCUMULATE,
    "MaxPool": _POOL,
    "Multinomial": _RANDOM,
    "NonMaxSuppression": (
        _Deviation(_always, "OpenVINO keeps boxes otherwise where the overlap equals the threshold"),
    ),
    "NonZero": _COUNTED,
    "PRelu": (
        _Deviation(_slope_by_channel, "OpenVINO aligns a slope of one dimension with the channels, ONNX with the end"),
    ),
    "Pad": (_Deviation(_pads_with_wide_value, "OpenVINO passes the value that Pad fills with through float32"),),
    "QLinearConv": _QUANTISE,
    "QLinearMatMul": _QUANTISE,
    "QuantizeLinear": _QUANTISE,
    "RNN": _RECURRENT,
    "RandomNormal": _RANDOM,
    "RandomNormalLike": _RANDOM,
    "RandomUniform": _RANDOM,
    "RandomUniformLike": _RANDOM,
    "Range": (_Deviation(_half, "OpenVINO counts the steps of a half-precision Range wrongly"),),
    "ReduceMax": _EXTREME,
    "ReduceMin": _EXTREME,
    "Resize": (
        _Deviation(
            _resizes_otherwise,
            "OpenVINO resizes otherwise with antialias, exclude_outside, round_prefer_ceil, a kept aspect ratio, "
            "and with scales that align corners",
        ),
    ),
    "RotaryEmbedding": (_Deviation(_always, "OpenVINO computes RotaryEmbedding wrongly"),),
    "STFT": _FOURIER,
    "ScatterElements": _SCATTER,
    "ScatterND": _SCATTER,
    "Softmax": (
        _Deviation(_flattens, "OpenVINO takes the softmax of opset 11 and 12 over one axis, ONNX over the rest"),
    ),
    "SpaceToDepth": (_Deviation(_column_first, "OpenVINO knows SpaceToDepth without its mode CRD"),),
    "Split": (_Deviation(_splits_unevenly, "OpenVINO fails at run where a number of parts does not divide the size"),),
    "Tile": (
        _Deviation(
            _repeats_unknown,
            "OpenVINO reads beyond the end of what Tile repeats if the repeats are computed at run time",
        ),
    ),
}
