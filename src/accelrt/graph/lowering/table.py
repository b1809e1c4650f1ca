"""Which operators are lowered, in which versions and data types, by which kernel: data, and no torch.

An entry says how to treat each data type: ``""`` as it is, ``cast:T`` computed in the wider T and brought back (which
wraps, as ONNX's unsigned integers do), ``view:T`` as the same bits of T, for what only moves values or computes in
the ring of two's complement, ``order:uint64`` as the int64 of the same order. Types that are not listed are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from accelrt.graph.lowering import checks
from accelrt.graph.node import Node
from accelrt.graph.types import OptionalType, SequenceType, TensorType, ValueType

Types: TypeAlias = Mapping[str, str]
Check: TypeAlias = Callable[[Node], str | None]


def _as_they_are(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "")


FLOATS = _as_they_are("float16 bfloat16 float32 float64")
LARGE = {"float32": "", "float64": "", "float16": "cast:float32", "bfloat16": "cast:float32"}
"""Floats for kernels that torch lacks in half precision, or that lose too much in it."""
INTS = _as_they_are("int8 int16 int32 int64 uint8")
WIDE = {"uint16": "cast:int32", "uint32": "cast:int64"}
BOOL = {"bool": ""}
NUMBERS: Types = {**FLOATS, **INTS, **WIDE}
RING: Types = {**NUMBERS, "uint64": "view:int64"}
ORDER: Types = {**NUMBERS, "uint64": "order:int64"}
BITS: Types = {**INTS, "uint16": "view:int16", "uint32": "view:int32", "uint64": "view:int64"}
HELD = _as_they_are("int4 uint4 int2 uint2 float4_e2m1fn")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
ANY: Types = {
    **FLOATS, **BITS, **BOOL, **HELD, **_as_they_are("complex64 complex128"),
    **dict.fromkeys(FLOAT8, "view:uint8"),
}  # fmt: skip
CASTS: Types = {**_as_they_are(" ".join(ANY)), **dict.fromkeys(FLOAT8[:4], "")}


@dataclass(frozen=True, slots=True)
class Entry:
    """How one operator is lowered.

    Attributes:
        kernel: ``module.function`` under `kernels`, or a function of torch's own as ``torch.relu``.
        types: What is done with each data type that a tensor may have.
        since: First version (*since version*) of the operator that the entry covers.
        until: Last version.
        others: What is done with data types that only inputs after the first may have.
        numbers: Inputs that the kernel takes as Python numbers.
        several: The kernel returns a tuple, one item for each output.
        check: Refuses what data types do not tell.
        depends: Why the module cannot be traced: what it does depends on data.
        extra: Further keyword arguments of the kernel.
        expands: Nodes that the entry refuses are lowered by ONNX's definition of the operator, if it has one.
    """

    kernel: str
    types: Types
    since: int = 1
    until: int = 1 << 30
    others: Types = field(default_factory=dict)
    numbers: tuple[int, ...] = ()
    several: bool = False
    check: Check | None = None
    depends: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    expands: bool = False


TABLE: dict[tuple[str, str], tuple[Entry, ...]] = {}


def _add(names: str, kernel: str, types: Types, domain: str = "", **options: Any) -> None:
    """Enter operators; ``{}`` in the kernel stands for the name in lower case."""
    for name in names.split():
        entry = Entry(kernel.format(_snake(name)), types, **options)
        TABLE[domain, name] = (*TABLE.get((domain, name), ()), entry)


def _snake(name: str) -> str:
    if name.isupper():
        return name.lower()
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name)).replace(
        "_n_d", "_nd"
    )


def _elementwise() -> None:
    _add("Abs", "torch.abs", {**FLOATS, **INTS})
    _add("Abs", "elementwise.identity", _as_they_are("uint16 uint32 uint64"))
    _add("Neg", "torch.neg", {**FLOATS, **_as_they_are("int8 int16 int32 int64")})
    _add("Acos Acosh Asin Asinh Atan Atanh Cos Cosh Sin Sinh Tan Exp Log Sqrt Erf", "torch.{}", FLOATS)
    _add("Tanh Sigmoid Reciprocal Ceil Floor Round", "torch.{}", FLOATS)
    _add("Sign", "elementwise.sign", {**FLOATS, **INTS, **WIDE})
    _add("Not", "torch.logical_not", BOOL)
    _add("IsNaN", "torch.isnan", {**FLOATS})
    _add("IsInf", "elementwise.is_inf", {**FLOATS})
    _add("Relu", "torch.relu", {**FLOATS, **INTS})
    _add("Softplus Softsign Elu Celu Selu LeakyRelu HardSigmoid HardSwish Mish Swish Gelu ThresholdedRelu",
         "elementwise.{}", FLOATS)  # fmt: skip
    _add("Shrink", "elementwise.shrink", {**FLOATS, **INTS}, check=checks.whole_attributes("bias", "lambd"))
    _add("PRelu", "elementwise.prelu", {**FLOATS, **INTS, **WIDE}, since=7)
    _add("PRelu", "elementwise.prelu_per_channel", FLOATS, until=6)
    _add("Clip", "elementwise.clip", ORDER)
    for op in ("Add", "Sub", "Mul"):
        _add(op, "torch.{}", RING, since=7)
        _add(op, "elementwise.aligned", RING, until=6, extra={"op": op})
    _add("Div", "elementwise.divide", NUMBERS, since=7)
    _add("Div", "elementwise.aligned", NUMBERS, until=6, extra={"op": "Div"})
    _add("Mod", "elementwise.modulo", NUMBERS, check=checks.mod)
    _add("Pow", "elementwise.power", NUMBERS, since=7)
    _add("Pow", "elementwise.aligned", FLOATS, until=6, extra={"op": "Pow"})
    for op, function, types in (
        ("And", "logical_and", BOOL), ("Or", "logical_or", BOOL), ("Xor", "logical_xor", BOOL),
        ("Equal", "eq", {**BITS, **FLOATS, **BOOL}), ("Greater", "gt", ORDER), ("Less", "lt", ORDER),
    ):  # fmt: skip
        _add(op, f"torch.{function}", types, since=7)
        _add(op, "elementwise.aligned", types, until=6, extra={"op": op})
    _add("GreaterOrEqual", "torch.ge", ORDER)
    _add("LessOrEqual", "torch.le", ORDER)
    _add("Max Min", "elementwise.{}imum", ORDER)
    _add("Sum Mean", "elementwise.{}", FLOATS)
    _add("Where", "torch.where", ANY)
    _add("BitwiseAnd BitwiseOr BitwiseXor BitwiseNot", "torch.{}", BITS)
    _add("BitShift", "elementwise.bit_shift", {**INTS, **WIDE, "uint64": "view:int64"})
    _add("Identity", "elementwise.identity", ANY)
    _add("Dropout", "elementwise.dropout", FLOATS, numbers=(1, 2), several=True, check=checks.dropout)
    _add("Cast", "cast.cast", CASTS, since=6, check=checks.cast)
    _add("CastLike", "cast.cast_like", CASTS, check=checks.cast)
    _add("BitCast", "cast.bit_cast", {**{t: "" for t in ANY if t not in HELD}}, check=checks.bit_cast)


def _reductions() -> None:
    _add("ReduceSum", "reduce.total", RING, numbers=(1,))
    _add("ReduceProd", "reduce.product", RING, numbers=(1,))
    _add("ReduceMean", "reduce.mean", {**FLOATS, **INTS}, numbers=(1,))
    _add("ReduceMax", "reduce.largest", {**ORDER, **BOOL}, numbers=(1,))
    _add("ReduceMin", "reduce.smallest", {**ORDER, **BOOL}, numbers=(1,))
    _add("ReduceL1 ReduceSumSquare", "reduce.{}", {**FLOATS, **INTS}, numbers=(1,), check=checks.no_noop)
    _add("ReduceL2 ReduceLogSum ReduceLogSumExp", "reduce.{}", FLOATS, numbers=(1,), check=checks.no_noop)
    _add("ArgMax ArgMin", "reduce.{}", ORDER)
    _add("CumSum", "reduce.cum_sum", RING, numbers=(1,))
    _add("CumProd", "reduce.cum_prod", RING, numbers=(1,))
    _add("Softmax LogSoftmax Hardmax", "reduce.{}", FLOATS)
    _add("TopK", "reduce.top_k", ORDER, numbers=(1,), several=True)
    _add("LpNormalization", "reduce.lp_normalization", FLOATS, check=checks.lp_normalization)


def _shapes() -> None:
    _add("Reshape", "shape.reshape", ANY, numbers=(1,))
    _add("Flatten Transpose DepthToSpace SpaceToDepth", "shape.{}", ANY)
    _add("Squeeze Unsqueeze", "shape.{}", ANY, numbers=(1,))
    _add("Expand Tile", "shape.{}", ANY, numbers=(1,), since=6)
    _add("Concat", "shape.concat", ANY, since=4)
    _add("Concat", "shape.concat_by_default", ANY, until=3)
    _add("Split", "shape.split", ANY, numbers=(1,), several=True)
    _add("Slice", "shape.slice_", ANY, numbers=(1, 2, 3, 4))
    _add("Pad", "shape.pad", {**FLOATS, **INTS, **BOOL, **WIDE}, numbers=(1, 2, 3))
    _add("Trilu", "shape.trilu", ANY, numbers=(1,))
    _add("ConstantOfShape", "shape.constant_of_shape", BITS, numbers=(0,), check=checks.fills)
    _add("EyeLike", "shape.eye_like", {**FLOATS, **BITS, **BOOL}, check=checks.fills)
    _add("Range", "shape.range_", {**FLOATS, **INTS}, numbers=(0, 1, 2))
    _add("Shape", "shape.shape_tensor", CASTS)
    _add("Size", "shape.size_tensor", CASTS)
    _add("ReverseSequence", "index.reverse_sequence", ANY)


def _indexing() -> None:
    _add("Gather GatherElements GatherND", "index.{}", ANY)
    _add("Scatter ScatterElements", "index.scatter_elements", ANY, check=checks.no_reduction)
    _add("ScatterElements", "index.scatter_elements", {**FLOATS, **INTS})
    _add("ScatterND", "index.scatter_nd", ANY, check=checks.no_reduction)
    _add("ScatterND", "index.scatter_nd", {**FLOATS, **INTS})
    _add("NonZero", "index.non_zero", {**ANY}, depends="the size of NonZero's output depends on values")
    _add("Compress", "index.compress", ANY, depends="the size of Compress's output depends on values")
    _add("Unique", "index.unique", {**FLOATS, **INTS, **BOOL}, several=True,
         depends="the size of Unique's outputs depends on values")  # fmt: skip
    _add("OneHot", "index.one_hot", ANY, numbers=(1,), check=checks.one_hot)
    _add("TensorScatter", "index.tensor_scatter", ANY)


def _networks() -> None:
    _add("MatMul", "matmul.matmul", RING)
    _add("Gemm", "matmul.gemm", {**FLOATS, **INTS}, check=checks.gemm)
    _add("Einsum", "matmul.einsum", FLOATS)
    _add("Det", "torch.linalg.det", LARGE)
    _add("Conv", "conv.convolution", FLOATS, check=checks.spatial)
    _add("ConvTranspose", "conv.transposed", FLOATS, check=checks.transposed)
    _add("Col2Im", "conv.col2im", ANY, numbers=(1, 2))
    _add("DeformConv", "sample.deformable", LARGE, check=checks.deformable)
    _add("MaxPool", "pool.max_pool", {**FLOATS, "int8": "cast:float32", "uint8": "cast:float32"}, several=True,
         check=checks.pool)  # fmt: skip
    _add("AveragePool", "pool.average_pool", FLOATS, check=checks.pool)
    _add("LpPool", "pool.lp_pool", FLOATS, since=2, check=checks.pool)
    _add("GlobalAveragePool GlobalMaxPool", "pool.{}", FLOATS)
    _add("GlobalLpPool", "pool.global_lp_pool", FLOATS, since=2)
    _add("MaxUnpool", "pool.max_unpool", FLOATS, others=INTS, numbers=(2,))
    _add("BatchNormalization", "norm.batch_normalization", FLOATS, several=True, check=checks.batch_normalization)
    _add("InstanceNormalization", "norm.instance_normalization", FLOATS)
    _add("LayerNormalization", "norm.layer_normalization", FLOATS, several=True, check=checks.stash)
    _add("RMSNormalization", "norm.rms_normalization", FLOATS, check=checks.stash)
    _add("GroupNormalization", "norm.group_normalization", FLOATS, check=checks.stash)
    _add("LRN", "norm.lrn", FLOATS)
    _add("Attention", "attention.attention", FLOATS, others=_as_they_are("bool int64"), several=True,
         check=checks.attention, expands=True)  # fmt: skip
    _add("RNN GRU LSTM", "recurrent.{}", LARGE, others=INTS, several=True, check=checks.recurrent)
    _add("Resize", "resize.resize", {**FLOATS, **_as_they_are("int8 uint8 int32 int64")}, numbers=(1, 2, 3), since=11,
         check=checks.resize)  # fmt: skip
    _add("Resize", "resize.upsample", {**FLOATS, **_as_they_are("int8 uint8 int32 int64")}, numbers=(1,), until=10,
         check=checks.upsample)  # fmt: skip
    _add("Upsample", "resize.upsample", {**FLOATS, **_as_they_are("int8 uint8 int32 int64")}, numbers=(1,), since=7,
         check=checks.upsample)  # fmt: skip
    _add("GridSample", "sample.grid_sample", LARGE, check=checks.grid_sample)
    _add(
        "RoiAlign",
        "sample.roi_align",
        LARGE,
        others=INTS,
        check=checks.roi_align,
        depends="RoiAlign reads its regions as numbers",
    )
    _add("NonMaxSuppression", "sample.non_max_suppression", FLOATS | INTS, numbers=(2, 3, 4),
         depends="the size of NonMaxSuppression's output depends on values")  # fmt: skip
    _add("DFT", "signal.dft", LARGE, numbers=(1, 2))
    _add("STFT", "signal.stft", LARGE, numbers=(1, 3))
    _add("MelWeightMatrix", "signal.mel_weight_matrix", {**FLOATS, **INTS}, numbers=(0, 1, 2, 3, 4))
    _add("Adagrad Adam Momentum", "training.{}", FLOATS, others=INTS, domain="ai.onnx.preview.training",
         several=True)  # fmt: skip


def _quantisation() -> None:
    codes = _as_they_are("int8 uint8 int16 uint16 int32 int4 uint4 int2 uint2 float4_e2m1fn " + " ".join(FLOAT8[:4]))
    _add("QuantizeLinear", "quantise.quantize", {**FLOATS, **codes}, check=checks.quantize)
    _add("DequantizeLinear", "quantise.dequantize", {**FLOATS, **codes}, check=checks.dequantize)
    small = {**FLOATS, **_as_they_are("int8 uint8 int32")}
    _add("MatMulInteger ConvInteger QLinearConv QLinearMatMul", "quantise.{}", small, check=checks.integer_product)


def _sequences() -> None:
    _add("SequenceConstruct SequenceInsert SequenceErase SequenceAt", "sequence.{}", ANY, numbers=())
    _add("SequenceEmpty", "sequence.sequence_empty", ANY)
    _add("SequenceLength", "sequence.sequence_length", ANY)
    _add("SplitToSequence", "sequence.split_to_sequence", ANY, numbers=(1,))
    _add("ConcatFromSequence", "sequence.concat_from_sequence", ANY)
    _add("Optional OptionalGetElement OptionalHasElement", "sequence.{}", ANY)


for _fill in (_elementwise, _reductions, _shapes, _indexing, _networks, _quantisation, _sequences):
    _fill()

CONTROL = frozenset({"If", "Loop", "Scan"})
_HOLDS = frozenset(
    {"Identity", "SequenceMap", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength"}
    | {"SequenceEmpty", "SplitToSequence", "ConcatFromSequence"}
    | {"Optional", "OptionalGetElement", "OptionalHasElement", "If", "Loop", "Scan"}
)
"""Operators of sequences and optionals, which are lists and None here."""

_REASONS = {
    **dict.fromkeys(
        ("StringConcat", "StringSplit", "StringNormalizer", "RegexFullMatch", "TfIdfVectorizer"),
        "torch has no text",
    ),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        "random numbers are drawn where they are checked, on the CPU",
    ),
    "ImageDecoder": "torch decodes no images",
    "MaxRoiPool": "torch has no pooling of regions",
}


def entry_for(node: Node) -> Entry | None:
    """Return the entry that lowers a node, None if there is none for its version, types and attributes."""
    return next((e for e in _entries(node) if _problem(node, e) is None), None)


def lowerable(node: Node) -> str | None:
    """Tell why a node cannot be lowered to torch, None if it can; needs no torch and computes nothing.

    The answer depends on the node alone: operator, version, types, attributes, small constants, bodies.
    """
    if (problem := _kind_problem(node)) is not None:
        return problem
    if node.op_type in CONTROL and not node.domain:
        return _control_problem(node)
    if node.op_type == "Constant" and not node.domain:
        return checks.constant(node)
    if node.op_type in _REASONS and not node.domain:
        return f"{_REASONS[node.op_type]}: {node.op_type} is not lowered"
    entries = _entries(node)
    problems = [_problem(node, entry) for entry in entries]
    if None in problems:
        return None
    if problems and not any(entry.expands for entry in entries):
        return problems[-1]
    return _expanded(_Key(node))


def _entries(node: Node) -> list[Entry]:
    return [e for e in TABLE.get((node.domain, node.op_type), ()) if e.since <= node.version <= e.until]


def _problem(node: Node, entry: Entry) -> str | None:
    return _type_problem(node, entry) or (entry.check(node) if entry.check else None)


def _kind_problem(node: Node) -> str | None:
    """Refuse text wherever it is, and sequences and optionals where they are not understood."""
    for type_ in (*node.input_types, *node.output_types, *node.capture_types):
        inner = _tensor_of(type_)
        if inner is not None and inner.dtype == "string":
            return f"{node.op_type} of text is not lowered: torch has no text"
        if isinstance(type_, (SequenceType, OptionalType)) and (node.op_type not in _HOLDS or node.domain):
            return f"{node.op_type} of {type_} is not lowered: only tensors are taken"
    return None


def _tensor_of(type_: ValueType | None) -> TensorType | None:
    while isinstance(type_, (SequenceType, OptionalType)):
        type_ = type_.element
    return type_


def _type_problem(node: Node, entry: Entry) -> str | None:
    for index, name in enumerate(node.inputs):
        if not name or index in entry.numbers:
            continue
        type_ = _tensor_of(node.input_types[index])
        if type_ is None:
            return f"the type of input {name!r} of {node.op_type} is not known"
        if type_.dtype not in entry.types and not (index and type_.dtype in entry.others):
            return f"{node.op_type}-{node.version} of {type_.dtype} is not lowered to torch"
    for name, declared in zip(node.outputs, node.output_types, strict=True):
        if name and (type_ := _tensor_of(declared)) is None:
            return f"the type of output {name!r} of {node.op_type} is not known"
    return None


def _control_problem(node: Node) -> str | None:
    if node.op_type == "Scan" and node.version == 8:
        return "Scan-8 is not lowered to torch: it scans each element of a batch to a length of its own"
    for body in node.bodies:
        for inner in body:
            if (problem := lowerable(inner)) is not None:
                return f"in the body of {node.op_type}: {problem}"
    return None


class _Key:
    """A node in a cache: two of the same signature and kinds of shapes are expanded alike."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.key = (node.signature, node.opset)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=1024)
def _expanded(key: _Key) -> str | None:
    from accelrt.graph.lowering.functions import expansion  # brings in onnx

    node = key.node
    graph = expansion(node)
    if isinstance(graph, str):
        return graph
    for inner in graph.nodes:
        if (problem := lowerable(inner)) is not None:
            return f"{node.op_type} is a function, and {problem}"
    return None
