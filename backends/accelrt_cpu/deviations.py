"""Where onnxruntime has a kernel that must not be used: data that kernel definitions do not hold.

How it was determined: every case of ONNX's backend suite (onnx 1.23.2) was run on onnxruntime 1.31.1's
CPU kernels, stamped with the newest opset that onnxruntime knows where no operator changed since, and
each failure was held against the operator's text in the ONNX specification. What is here either refuses a
valid node, at session creation or at run, or gives an answer that the specification does not allow or
that is far less exact than numpy's. Where onnxruntime is right and the case is not, the case is listed in
``tests/contract/onnx_suite_exceptions.py`` instead. Operators and types without a kernel are not listed:
kernel definitions and trials tell.

`tests/unit/test_deviations.py` shows each deviation on the installed onnxruntime, so a release that mends
one fails that test; deviations that a later release adds are found by running the suite again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from accelrt.graph.node import Node


def deviation(node: Node) -> str | None:
    """Return why onnxruntime's kernel must not be used for a node, None if nothing is known against it.

    The answer depends on sizes and constants too, not on the node's signature alone.
    """
    for entry in _TABLE.get((node.op_type, node.domain), ()):
        if entry.applies(node):
            return entry.reason
    return None


@dataclass(frozen=True, slots=True)
class _Deviation:
    applies: Callable[[Node], bool]
    reason: str


def _attention_window(node: Node) -> bool:
    return "left_window_size" in node.attributes or "right_window_size" in node.attributes


def _attention_scores(node: Node) -> bool:
    masked = bool(node.attributes.get("is_causal", 0)) or node.input_dtype(3) == "bool"
    return masked and node.has_output(3) and node.attributes.get("qk_matmul_output_mode", 0) == 2


def _attention_short_mask(node: Node) -> bool:
    if not node.has_input(3):
        return False
    rank = len(node.input_shape(1) or ())
    mask, total = node.input_size(3, -1), node.input_size(1, {4: 2, 3: 1}.get(rank, rank))
    if node.has_input(4):
        past = node.input_size(4, 2)
        total = None if total is None or past is None else total + past
    return mask is not None and total is not None and mask != total


def _conv_integer_channel_zero_points(node: Node) -> bool:
    # A zero point of unknown shape is refused too: the kernel fails at run, too late to choose another.
    return node.has_input(3) and node.input_shape(3) not in {(), (1,)}


def _float32(node: Node) -> bool:
    return node.input_dtype(0) == "float32"


def _seeded_training(node: Node) -> bool:
    if "seed" not in node.attributes or not node.has_input(2):
        return False
    mode = node.constants.get(2)
    return mode is None or bool(np.all(mode))


def _batchwise(node: Node) -> bool:
    return bool(node.attributes.get("layout", 0) == 1)


def _unpool_output_shape(node: Node) -> bool:
    return node.has_input(2)


def _empty_bool(node: Node) -> bool:
    return node.input_dtype(0) == "bool" and 0 in (node.input_shape(0) or ())


def _needs_locale(node: Node) -> bool:
    if node.attributes.get("case_change_action", "NONE") != "NONE":
        return True
    return not node.attributes.get("is_case_sensitive", 0) and bool(node.attributes.get("stopwords"))


_RECURRENT = (_Deviation(_batchwise, "onnxruntime 1.31 has no batch-first recurrent layers (layout=1)"),)
_FOURIER = (
    _Deviation(
        _float32,
        "onnxruntime 1.31 computes float32 Fourier transforms with an error that grows with the length, to "
        "3e-4 of the largest value at 1,000 samples; in numpy it stays below 1e-7",
    ),
)

_TABLE: dict[tuple[str, str], tuple[_Deviation, ...]] = {
    ("Attention", ""): (
        _Deviation(
            _attention_window,
            "onnxruntime 1.31 knows Attention without left_window_size and right_window_size",
        ),
        _Deviation(
            _attention_scores,
            "onnxruntime 1.31 writes the lowest float instead of -inf for masked scores into Attention's "
            "qk_matmul_output",
        ),
        _Deviation(
            _attention_short_mask,
            "onnxruntime 1.31 refuses an attention mask shorter than the keys, which ONNX pads with -inf",
        ),
    ),
    ("ConvInteger", ""): (
        _Deviation(
            _conv_integer_channel_zero_points,
            "onnxruntime 1.31 takes one zero point for all weights of ConvInteger, not one a channel",
        ),
    ),
    ("DFT", ""): _FOURIER,
    ("STFT", ""): _FOURIER,
    ("Dropout", ""): (
        _Deviation(
            _seeded_training,
            "onnxruntime 1.31 draws Dropout's mask from a generator of its own, so the given seed would not "
            "reproduce what ONNX's reference computes",
        ),
    ),
    ("GRU", ""): _RECURRENT,
    ("LSTM", ""): _RECURRENT,
    ("RNN", ""): _RECURRENT,
    ("MaxUnpool", ""): (
        _Deviation(
            _unpool_output_shape,
            "onnxruntime 1.31 reads the indices of MaxUnpool as offsets into output_shape, not into the "
            "tensor that was pooled",
        ),
    ),
    ("ReduceMax", ""): (_Deviation(_empty_bool, "onnxruntime 1.31 refuses ReduceMax over an empty set of booleans"),),
    ("StringNormalizer", ""): (
        _Deviation(
            _needs_locale,
            "onnxruntime 1.31 needs the C library's locale en_US.UTF-8 to change case, which need not be "
            "installed where the program runs",
        ),
    ),
}
