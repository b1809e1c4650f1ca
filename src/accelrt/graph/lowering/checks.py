"""Why a node is refused, beyond its data types: what torch computes otherwise than ONNX says, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from accelrt.graph.node import Node

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def _refuse(node: Node, what: str) -> str:
    return f"{node.op_type}-{node.version} {what} is not lowered to torch"


def whole_attributes(*names: str) -> Callable[[Node], str | None]:
    """Refuse integers with attributes that are no whole numbers."""

    def check(node: Node) -> str | None:
        if node.input_dtype(0) in _FLOATS:
            return None
        if any(float(node.attributes.get(name, 0.0)) % 1 for name in names) or "lambd" not in node.attributes:
            return _refuse(node, "of integers with fractions")
        return None

    return check


def mod(node: Node) -> str | None:
    if node.version < 28 and node.input_dtype(0) in _FLOATS and not node.attributes.get("fmod", 0):
        return _refuse(node, "of floats without fmod=1")
    return None


def dropout(node: Node) -> str | None:
    """Dropout draws random numbers only in training."""
    if node.version < 7:
        return None if node.attributes.get("is_test", 0) else _refuse(node, "in training (is_test=0)")
    if node.version < 12 or not node.has_input(2):
        return None
    training, ratio = node.constants.get(2), node.constants.get(1)
    if training is not None and not np.any(training):
        return None
    if ratio is not None and not np.any(ratio):
        return None
    return _refuse(node, "in training, or perhaps in training, which draws random numbers,")


_CAST_TO = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz",
    19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4_e2m1fn", 25: "uint2", 26: "int2",
}  # fmt: skip
"""ONNX's element types (TensorProto.DataType) that casts reach."""


def cast(node: Node) -> str | None:
    source, target = node.input_dtype(0), node.output_dtype(0)
    if target is None:
        target = _CAST_TO.get(int(node.attributes.get("to", 0)))
    if target not in _CAST_TO.values():
        return _refuse(node, f"to {target}")
    if source is not None and source.startswith(("complex", "float8_e8m0")):
        return _refuse(node, f"from {source}")
    if str(target).startswith("float8") and source not in ("float16", "bfloat16", "float32"):
        return _refuse(node, f"from {source} to {target}")
    return None


def bit_cast(node: Node) -> str | None:
    from accelrt.graph.types import bits_of

    source, target = node.input_dtype(0), node.output_dtype(0)
    if source is None or target is None or bits_of(source) < 8 or bits_of(source) != bits_of(target):
        return _refuse(node, f"from {source} to {target}")
    return None


def no_noop(node: Node) -> str | None:
    """With no axes and noop_with_empty_axes, ONNX's text and its function bodies differ about what is applied."""
    axes = node.constants.get(1)
    if node.attributes.get("noop_with_empty_axes", 0) and (axes is None or np.size(axes) == 0):
        return _refuse(node, "with noop_with_empty_axes and, perhaps, no axes")
    return None


def lp_normalization(node: Node) -> str | None:
    return None if node.attributes.get("p", 2) in (1, 2) else _refuse(node, "of another p than 1 and 2")


def fills(node: Node) -> str | None:
    target = node.output_dtype(0)
    if target in (*_FLOATS, "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"):
        return None
    return _refuse(node, f"of {target}")


def no_reduction(node: Node) -> str | None:
    if node.attributes.get("reduction", "none") != "none":
        return _refuse(node, f"of {node.input_dtype(0)} with a reduction")
    return None


def one_hot(node: Node) -> str | None:
    if node.input_dtype(0) in (*_FLOATS, "int8", "int16", "int32", "int64", "uint8"):
        return None
    return _refuse(node, f"with indices of {node.input_dtype(0)}")


def gemm(node: Node) -> str | None:
    scaled = any(float(node.attributes.get(name, 1.0)) != 1.0 for name in ("alpha", "beta"))
    if node.input_dtype(0) not in _FLOATS and scaled:
        return _refuse(node, "of integers with alpha or beta")
    return None


def spatial(node: Node) -> str | None:
    """torch has convolutions and pools of one, two and three dimensions."""
    shape = node.input_shape(0)
    rank = len(shape) - 2 if shape is not None else len(node.attributes.get("kernel_shape", ()))
    if not 1 <= rank <= 3:
        return _refuse(node, f"of {rank} spatial dimensions" if rank > 0 else "of unknown rank")
    return None


def pool(node: Node) -> str | None:
    """Runtimes differ from the text, and from each other, in what SAME means beside dilations and large strides."""
    if node.attributes.get("auto_pad", "NOTSET").startswith("SAME"):
        if any(step != 1 for step in node.attributes.get("dilations", ())):
            return _refuse(node, "with auto_pad and dilations")
        kernel = node.attributes["kernel_shape"]
        strides = node.attributes.get("strides", [1] * len(kernel))
        if any(step > size for size, step in zip(kernel, strides, strict=True)):
            return _refuse(node, "with auto_pad and strides beyond the kernel")
    return spatial(node)


def transposed(node: Node) -> str | None:
    """Where padding comes from the output's size, refuse what would need less than none: the text leaves it open."""
    attributes, rank = node.attributes, len(node.input_shape(0) or ()) - 2
    wanted = attributes.get("output_shape")
    same = attributes.get("auto_pad", "NOTSET").startswith("SAME")
    if wanted is None and not same:
        return spatial(node)
    if node.version < 11:
        return _refuse(node, "with output_shape or auto_pad")  # its text has the sides the other way round
    kernel = attributes.get("kernel_shape") or [node.input_size(1, i + 2) for i in range(rank)]
    for i in range(rank):
        size, step = node.input_size(0, i + 2), attributes.get("strides", [1] * rank)[i]
        if kernel[i] is None or (wanted is not None and size is None):
            return _refuse(node, "with output_shape and open sizes")
        span = (kernel[i] - 1) * attributes.get("dilations", [1] * rank)[i] + 1
        added = attributes.get("output_padding", [0] * rank)[i]
        # All there is, less what is wanted; for SAME, which wants size * step, sizes cancel out.
        total = span - step + added
        if wanted is not None and size is not None:
            total = (size - 1) * step + span + added - wanted[-rank:][i]
        if total < 0:
            return _refuse(node, "to an output larger than the input gives")
    return spatial(node)


def batch_normalization(node: Node) -> str | None:
    if node.version < 7 and not node.attributes.get("is_test", 0):
        return _refuse(node, "in training (is_test=0)")
    if node.version < 9 and node.attributes.get("spatial", 1) != 1:
        return _refuse(node, "with spatial=0")
    if node.version < 14 and len([name for name in node.outputs if name]) > 1:
        return _refuse(node, "in training")
    return None


def stash(node: Node) -> str | None:
    return None if node.attributes.get("stash_type", 1) == 1 else _refuse(node, "with a stash_type other than float")


def deformable(node: Node) -> str | None:
    shape = node.input_shape(0)
    return None if shape is not None and len(shape) == 4 else _refuse(node, "of other than two spatial dimensions")


def recurrent(node: Node) -> str | None:
    directions = 2 if node.attributes.get("direction", "forward") == "bidirectional" else 1
    activations = node.attributes.get("activations", ())
    if activations and len(activations) != directions * {"RNN": 1, "GRU": 2, "LSTM": 3}[node.op_type]:
        return _refuse(node, "with fewer activations than gates")
    known = {"tanh", "sigmoid", "relu"}
    if any(name.lower() not in known for name in activations):
        return _refuse(node, f"with activations {', '.join(activations)}")
    return None


def resize(node: Node) -> str | None:
    mode = node.attributes.get("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        return _refuse(node, f"with mode {mode!r}")
    if mode != "nearest" and node.input_dtype(0) not in _FLOATS:
        return _refuse(node, f"with mode {mode!r} of {node.input_dtype(0)}")
    return None


def upsample(node: Node) -> str | None:
    """Before version 11 the text does not say which element is nearest; all agree where none is lost."""
    scales = node.attributes.get("scales", node.constants.get(1))
    if scales is None or any(scale < 1 for scale in scales):
        return _refuse(node, "to something smaller, or perhaps smaller,")
    return resize(node) if node.attributes.get("mode", "nearest") != "bilinear" else None


def grid_sample(node: Node) -> str | None:
    shape, mode = node.input_shape(0), node.attributes.get("mode", "linear")
    if shape is None or len(shape) not in (4, 5):
        return _refuse(node, "of other than two or three spatial dimensions")
    if len(shape) == 5 and mode in ("bicubic", "cubic"):
        return _refuse(node, "of mode cubic in three dimensions")
    return None


def roi_align(node: Node) -> str | None:
    """Runtimes take the largest of weighted corners, not of samples; the text tells neither."""
    return None if node.attributes.get("mode", "avg") == "avg" else _refuse(node, "with mode 'max'")


def attention(node: Node) -> str | None:
    attributes = node.attributes
    types = {node.input_dtype(i) for i in range(3)}
    mask = node.input_dtype(3)
    keys = node.input_shape(1)
    if len(types) > 1 or keys is None or (mask is not None and mask != "bool" and mask not in types):
        return _refuse(node, "of mixed types")
    if mask is not None and (node.input_shape(3) or (None,))[-1] not in {keys[-2 if len(keys) == 4 else 1]} - {None}:
        return _refuse(node, "with a mask that is not as long as the keys")
    plain = not any(attributes.get(name, default) != default for name, default in _ATTENTION_DEFAULTS.items())
    if not plain or any(node.has_output(i) for i in (1, 2, 3)) or any(node.has_input(i) for i in (4, 5, 6)):
        return _refuse(node, "with caches, windows, soft caps or scores as an output")
    return None


_ATTENTION_DEFAULTS: dict[str, Any] = {"softcap": 0.0, "left_window_size": -1, "right_window_size": -1}


def quantize(node: Node) -> str | None:
    source, target = node.input_dtype(0), node.output_dtype(0)
    if node.attributes.get("precision", 0) not in (0, 1):
        return _refuse(node, "in another precision than float32")
    if source not in (*_FLOATS, "int32"):
        return _refuse(node, f"of {source}")
    if source == "float64" and (target or "").startswith("float"):
        return _refuse(node, f"of {source} to {target}")
    if target not in _CAST_TO.values():
        return _refuse(node, f"to {target}")
    return None


def dequantize(node: Node) -> str | None:
    target = node.output_dtype(0)
    return None if target in _FLOATS else _refuse(node, f"to {target}")


def integer_product(node: Node) -> str | None:
    if any(node.input_dtype(i) not in ("int8", "uint8") for i in ((0, 1) if "Integer" in node.op_type else (0, 3))):
        return _refuse(node, "of other than 8 bits")
    return spatial(node) if "Conv" in node.op_type else None


def constant(node: Node) -> str | None:
    if "sparse_value" in node.attributes:
        return _refuse(node, "with a sparse value")
    if any(name.startswith("value_string") for name in node.attributes):
        return "a constant of text is not lowered: torch has no text"
    value = node.attributes.get("value")
    if value is not None and value.dtype.kind in "OUS":
        return "a constant of text is not lowered: torch has no text"
    return None
