"""Which operators a Neuron compiler takes: the vendor's lists, and how ONNX's operators are said in their words.

The lists are copies of the vendor's, one file each under ``data``; ``onnx_operators.tsv`` says for each ONNX operator
which of PyTorch's, TensorFlow's or XLA's it becomes. A node is taken if one list holds all that one way of saying it
needs. Every refusal names the list, or the page, that it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from accelrt.backend import SUPPORTED, Verdict
from accelrt.graph.node import Node
from accelrt.graph.types import Signature, TensorType
from accelrt_neuron.catalogue import Generation

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class VendorList:
    """One of the vendor's lists: which column of the table speaks its language, and where it was published."""

    file: str
    column: int
    title: str
    source: str

    @property
    def operators(self) -> frozenset[str]:
        """The names in it."""
        return _names(self.file)


_TORCH, _TENSORFLOW, _XLA = range(3)
_RELEASE_NOTES = "release-notes/archive/neuron-cc/neuron-cc-ops"

TORCH_NEURON = VendorList(
    "torch_neuron_inf1.txt", _TORCH, "torch-neuron (Inf1)", f"{_RELEASE_NOTES}/neuron-cc-ops-pytorch.rst"
)
TF1_NEURON = VendorList(
    "tf1_neuron_inf1.txt", _TENSORFLOW, "tensorflow-neuron 1 (Inf1)", f"{_RELEASE_NOTES}/neuron-cc-ops-tensorflow.rst"
)
TF2_NEURON = VendorList(
    "tf2_neuron.txt", _TENSORFLOW, "tensorflow-neuron 2", "aws-neuron-tensorflow python/neuron_cc_hlo.py"
)
TORCH_NEURONX = VendorList(
    "torch_neuronx_aten.txt",
    _TORCH,
    "torch-neuronx",
    "frameworks/torch/torch-neuronx/pytorch-neuron-supported-operators.rst",
)
XLA = VendorList("xla_neuron_cc.txt", _XLA, "XLA", f"{_RELEASE_NOTES}/neuron-cc-ops-xla.rst")

LISTS: Mapping[Generation, tuple[VendorList, ...]] = MappingProxyType(
    {
        "v1": (TORCH_NEURON, TF1_NEURON),
        "v2": (TORCH_NEURONX, TF2_NEURON, XLA),
        "v3": (TORCH_NEURONX, TF2_NEURON, XLA),
    }
)
"""What each generation of cores is held against. That of torch-neuronx is far from complete, as its page says itself;
its compiler takes XLA, so XLA's list and the one of TensorFlow on the same compiler count as well."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN"})
"""What runs on the tensor engine: the vendor's ``matmult``."""

NO_FLOAT32_PRODUCT = (
    "Inf1 has no float32 matrix product: neuron-cc casts the operands whatever it is told "
    "(compiler/neuron-cc/command-line-reference.rst); precision='bf16' says so"
)

_DTYPES = frozenset({"float32", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool"})
_DATA_TYPES_PAGE = "about-neuron/arch/neuron-features/data-types.rst"

_STATIC_INPUTS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Tile": (1,), "ConstantOfShape": (0,),
        "Range": (0, 1, 2), "Pad": (1, 3), "Resize": (1, 2, 3), "Upsample": (1,), "TopK": (1,), "OneHot": (1,),
        "Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,), "CumSum": (1,), "Trilu": (1,), "ReduceSum": (1,),
        "ReduceMean": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceProd": (1,), "ReduceL1": (1,),
        "ReduceL2": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,), "ReduceSumSquare": (1,),
    }
)  # fmt: skip
"""Inputs that decide the shape of what comes out: a trace holds their values, so they must be constants."""


def verdict(node: Node, generation: Generation, lists: Sequence[VendorList] | None = None) -> Verdict:
    """Say whether the compilers for a generation of cores take a node; depends on nothing but its arguments."""
    reason = unusual(node) or _unlisted(node, LISTS[generation] if lists is None else lists)
    return SUPPORTED if reason is None else Verdict.refuse(reason)


def unusual(node: Node) -> str | None:
    """Return what keeps a node from any Neuron compiler whatever its operator: types, open sizes, bodies."""
    if node.domain:
        return f"{node.domain}.{node.op_type} is not of ONNX's own domain; no list of the vendor's knows it"
    if node.is_control_flow:
        return f"{node.op_type} carries graphs; a trace holds one path, and the vendor's lists have no control flow"
    for role, names, types in (("input", node.inputs, node.input_types), ("output", node.outputs, node.output_types)):
        for name, type_ in zip(names, types, strict=True):
            if name and (reason := _odd_value(role, name, type_)) is not None:
                return reason
    for index in _STATIC_INPUTS.get(node.op_type, ()):
        if node.has_input(index) and index not in node.constants:
            return (
                f"its input {index} ({node.inputs[index]!r}) decides a shape and is no constant; Neuron compiles for "
                f"static shapes (NCC_EMOD025)"
            )
    return None


def unusual_signature(signature: Signature) -> str | None:
    """Return what keeps a whole model from any Neuron compiler: inputs of other types, or of open sizes.

    Sizes of outputs follow from a trace, and need not be known before it.
    """
    for port in signature.inputs:
        if (reason := _odd_value("input", port.name, port.type)) is not None:
            return reason
    return None


def _odd_value(role: str, name: str, type_: object) -> str | None:
    if type_ is None:
        return f"the type of its {role} {name!r} is not known"
    if not isinstance(type_, TensorType):
        return f"its {role} {name!r} is a {type_}, and Neuron knows tensors only"
    if type_.dtype.startswith("complex"):
        return (
            f"its {role} {name!r} is {type_.dtype}: complex types are not supported on the Neuron device (NCC_EVRF004)"
        )
    if type_.dtype not in _DTYPES:
        return f"its {role} {name!r} is {type_.dtype}, not a data type of a NeuronCore ({_DATA_TYPES_PAGE})"
    if type_.shape is None or not all(isinstance(dim, int) for dim in type_.shape):
        return (
            f"its {role} {name!r} is {type_}: Neuron compiles for static shapes, every size and the batch included "
            f"(torch_neuronx.trace: fixed shapes and dtypes; NCC_EMOD025: dynamic shape is not supported)"
        )
    return None


def _unlisted(node: Node, lists: Sequence[VendorList]) -> str | None:
    """Return why none of the lists holds the node, None if one does."""
    variant, reason = _variant(node)
    if reason is not None:
        return reason
    row = _table().get(f"{node.op_type}:{variant}" if variant else node.op_type)
    if row is None:
        where = "; ".join(f"{one.title}: {one.source}" for one in lists)
        return f"ONNX's {node.op_type} has no counterpart in the vendor's lists ({where})"
    axes = max(0, len(node.input_shape(0) or ()) - 2)
    missing = []
    for one in lists:
        ways = _ways(row[one.column], axes)
        if any(way <= one.operators for way in ways):
            return None
        lacking = [min((sorted(way - one.operators) for way in ways), key=len)] if ways else []
        named = f"{' and '.join(lacking[0])} not in the list of" if lacking else "nothing for it in the list of"
        missing.append(f"{named} {one.title} ({one.source})")
    text = "; ".join(missing)
    if node.op_type == "Gather" and variant == "embedding" and TORCH_NEURON in lists:
        text += "; embeddings stay on the CPU of an Inf1 by the vendor's design: they were removed for performance"
    return text


def _variant(node: Node) -> tuple[str | None, str | None]:
    """Return under which variant of its operator a node stands in the table, or why it stands nowhere."""
    attributes = node.attributes
    match node.op_type:
        case "Gather":
            # A row of a matrix for each index: what PyTorch calls an embedding. Vectors of indices select.
            indices = node.input_shape(1)
            table = len(node.input_shape(0) or ()) == 2 and node.input_dtype(0) in ("float32", "float16", "bfloat16")
            embedding = table and int(attributes.get("axis", 0)) == 0 and indices is not None and len(indices) >= 2
            return ("embedding" if embedding else None), None
        case "Conv" | "ConvTranspose":
            group = int(attributes.get("group", 1))
            if group == 1:
                return None, None
            depthwise = node.op_type == "Conv" and group == node.input_size(0, 1)
            return ("depthwise" if depthwise else "grouped"), None
        case "MaxPool":
            return ("indices" if node.has_output(1) else None), None
        case "Pad":
            mode = _text(attributes.get("mode", "constant"))
            return (None if mode == "constant" else mode), None
        case "Pow":
            return ("constant" if 1 in node.constants else None), None
        case "Gelu":
            return ("tanh" if _text(attributes.get("approximate", "none")) == "tanh" else None), None
        case "Mod":
            return ("fmod" if attributes.get("fmod", 0) else None), None
        case "Div":
            return (None if (node.input_dtype(0) or "").startswith(("float", "bfloat")) else "integer"), None
        case "Resize" | "Upsample":
            return _resize(node)
        case "Dropout":
            trains = node.has_input(2) and (2 not in node.constants or bool(node.constants[2]))
            return (
                None,
                "Dropout that drops is training; the Neuron compilers for inference take eval()" if trains else None,
            )
        case "BatchNormalization":
            trains = bool(attributes.get("training_mode", 0)) or len(node.writes) > 1
            return None, "BatchNormalization in training mode; the lists are those of inference" if trains else None
        case _:
            return None, None


def _resize(node: Node) -> tuple[str | None, str | None]:
    mode = _text(node.attributes.get("mode", "nearest"))
    about = _text(node.attributes.get("coordinate_transformation_mode", "half_pixel"))
    if node.op_type == "Upsample":
        about = "asymmetric"
    rounding = _text(node.attributes.get("nearest_mode", "round_prefer_floor"))
    before, after = node.input_shape(0) or (), _output_shape(node)
    if len(before) < 3 or before[:2] != after[:2]:
        return None, "it resizes more than the spatial axes, which PyTorch's and TensorFlow's resizing does not"
    if mode == "nearest" and node.op_type == "Resize" and (about, rounding) != ("asymmetric", "floor"):
        return None, (
            f"nearest with {about} and {rounding}: aten::upsample_nearest2d and ResizeNearestNeighbor are asymmetric "
            f"with floor"
        )
    if mode in ("linear", "bilinear") and about not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return (
            None,
            f"linear with {about}: aten::upsample_bilinear2d and ResizeBilinear have half_pixel or align_corners",
        )
    if node.attributes.get("antialias", 0):
        return None, "antialias has no counterpart in the vendor's lists"
    return ("linear" if mode == "bilinear" else mode), None


def _output_shape(node: Node) -> tuple[object, ...]:
    type_ = node.output_types[0]
    return (type_.shape or ()) if isinstance(type_, TensorType) else ()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _ways(cell: str, axes: int) -> list[frozenset[str]]:
    """Return the sets of operators of which one is needed, for so many spatial axes."""
    ways = []
    for alternative in cell.split("|"):
        rank, colon, names = alternative.partition(":")
        if colon and rank.isdigit():
            if int(rank) != axes:
                continue
        else:
            names = alternative
        if names != "-":
            ways.append(frozenset(names.replace("{n}", str(axes)).split("+")))
    return ways


@cache
def _names(file: str) -> frozenset[str]:
    lines = (_DATA / file).read_text().splitlines()
    return frozenset(name for line in lines if (name := line.partition("#")[0].strip()))


@cache
def _table() -> Mapping[str, tuple[str, str, str]]:
    rows = {}
    for line in (_DATA / "onnx_operators.tsv").read_text().splitlines():
        if line and not line.startswith("#"):
            operator, torch, tensorflow, xla = line.split("\t")
            rows[operator] = (torch, tensorflow, xla)
    return MappingProxyType(rows)


def shape_inputs(node: Node) -> tuple[int, ...]:
    """Return which inputs of a node decide shapes: constants of the trace, not values that the chip computes with."""
    return _STATIC_INPUTS.get(node.op_type, ())


def mapped_operators() -> frozenset[str]:
    """Return the ONNX operators that the table speaks of."""
    return frozenset(row.partition(":")[0] for row in _table())
