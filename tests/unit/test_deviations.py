"""Every known deviation, shown on the installed onnxruntime: a release that mends one fails its test here."""

from __future__ import annotations

import locale
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from accelrt.backend import CompileJob, NoOptions
from accelrt.graph.load import load_graph
from accelrt.graph.weights import WeightFile
from accelrt_cpu.deviations import _TABLE, deviation
from accelrt_cpu.reference import ReferenceEngine

Array = np.ndarray[Any, Any]


@dataclass
class Case:
    """One node, by the arrays it is fed; an input of None is absent."""

    op_type: str
    feeds: list[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 22
    outputs: tuple[str, ...] = ("y",)

    @property
    def named(self) -> dict[str, Array]:
        return {f"x{i}": value for i, value in enumerate(self.feeds) if value is not None}

    @property
    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if value is not None else "" for i, value in enumerate(self.feeds)]
        node = helper.make_node(self.op_type, names, self.outputs, **self.attributes)
        graph = helper.make_graph(
            [node],
            "graph",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                for name, value in self.named.items()
            ],
            [helper.make_value_info(name, onnx.TypeProto()) for name in self.outputs if name],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model)
        for output in inferred.graph.output:  # what MaxUnpool's shape depends on is not known
            if output.type.tensor_type.elem_type == TensorProto.UNDEFINED:
                output.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(self.feeds[0].dtype)
        return inferred

    def reason(self) -> str | None:
        (node,) = load_graph(self.model).nodes
        return deviation(node)

    def onnxruntime(self) -> list[Array]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)
        return list(session.run(None, self.named))

    def reference(self, folder: Path) -> list[Array]:
        graph = load_graph(self.model)
        weights = WeightFile(folder / "weights.bin")
        graph.write(folder / "model.onnx", weights)
        weights.close()
        out = folder / "program"
        out.mkdir()
        engine = ReferenceEngine()
        job = CompileJob(folder / "model.onnx", graph.signature, "fp32", NoOptions())
        with engine.load(engine.compile(job, out), []) as executable:
            return list(executable.run(self.named).values())


def floats(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).uniform(-1, 1, shape).astype(np.float32)


def attention(*more: Any, opset: int = 24, outputs: tuple[str, ...] = ("y",), **attributes: Any) -> Case:
    return Case(
        "Attention",
        [floats(1, 2, 4, 8), floats(1, 2, 6, 8), floats(1, 2, 6, 8), *more],
        attributes,
        opset,
        outputs,
    )


def recurrent(op_type: str, gates: int, **attributes: Any) -> Case:
    return Case(
        op_type,
        [floats(2, 5, 3), floats(1, gates * 4, 3), floats(1, gates * 4, 4)],
        attributes | {"hidden_size": 4},
        outputs=("y", "h"),
    )


def conv_integer(zero_points: Array) -> Case:
    x, w = np.arange(9, dtype=np.uint8).reshape(1, 1, 3, 3), np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
    return Case("ConvInteger", [x, w, np.array(1, np.uint8), zero_points], opset=10)


def words(**attributes: Any) -> Case:
    return Case("StringNormalizer", [np.array(["Monday", "Tuesday"], object)], attributes, 10)


UNPOOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
POOLED = [np.array([[[[5, 6], [7, 8]]]], np.float32), np.array([[[[5, 7], [13, 15]]]])]
SCORES = ("y", "", "", "qk")
BOOLEANS = np.arange(24).reshape(4, 6) % 5 != 0
TRAINING = [floats(8, 8), np.array(0.5, np.float32), np.array(True)]

DEVIATING: dict[str, Case] = {
    "Attention with a window": attention(opset=25, left_window_size=1),
    "Attention scores, causal": attention(outputs=SCORES, is_causal=1, qk_matmul_output_mode=2),
    "Attention scores, boolean mask": attention(BOOLEANS, outputs=SCORES, qk_matmul_output_mode=2),
    "Attention with a short mask": attention(floats(4, 4)),
    "ConvInteger with a zero point a channel": conv_integer(np.array([0, 1], np.uint8)),
    "DFT": Case("DFT", [floats(1, 1000, 1)], opset=19),
    "STFT": Case("STFT", [floats(1, 2000, 1), np.array(1000), None, np.array(1000)]),
    "Dropout with a seed": Case("Dropout", TRAINING, {"seed": 0}),
    "GRU, batch first": recurrent("GRU", 3, layout=1),
    "LSTM, batch first": recurrent("LSTM", 4, layout=1),
    "RNN, batch first": recurrent("RNN", 1, layout=1),
    "MaxUnpool to a shape": Case("MaxUnpool", [*POOLED, np.array([1, 1, 5, 5])], UNPOOL),
    "ReduceMax of no booleans": Case("ReduceMax", [np.ones((2, 0, 4), bool), np.array([1])], opset=20),
    "StringNormalizer to lower case": words(case_change_action="LOWER", is_case_sensitive=1),
    "StringNormalizer with stop words in any case": words(stopwords=["monday"]),
}

# What onnxruntime says where it refuses rather than errs: so that no case passes for another reason.
REFUSALS = {
    "Attention with a window": "Unrecognized attribute: left_window_size",
    "Attention with a short mask": "inconsistent total_sequence_length",
    "ConvInteger with a zero point a channel": "Non per-tensor quantization is not supported",
    "GRU, batch first": "Batchwise recurrent operations",
    "LSTM, batch first": "Batchwise recurrent operations",
    "RNN, batch first": "Batchwise recurrent operations",
    "ReduceMax of no booleans": "not defined for empty set with bool type",
    "StringNormalizer to lower case": "Failed to construct locale",
    "StringNormalizer with stop words in any case": "Failed to construct locale",
}

SOUND: dict[str, Case] = {
    "Attention": attention(floats(4, 6), is_causal=1),
    "Attention scores before masking": attention(outputs=SCORES, is_causal=1, qk_matmul_output_mode=1),
    "Attention scores with a float mask": attention(floats(4, 6), outputs=SCORES, qk_matmul_output_mode=2),
    "ConvInteger": conv_integer(np.array(1, np.uint8)),
    "ConvInteger with one zero point": conv_integer(np.array([1], np.uint8)),
    "DFT in float64": Case("DFT", [floats(1, 1000, 1).astype(np.float64)], opset=19),
    "Dropout in inference": Case("Dropout", [*TRAINING[:2], np.array(False)]),
    "LSTM": recurrent("LSTM", 4),
    "MaxUnpool": Case("MaxUnpool", POOLED, UNPOOL),
    "ReduceMax of booleans": Case("ReduceMax", [np.ones((2, 3), bool), np.array([1])], opset=20),
    "StringNormalizer": words(is_case_sensitive=1, stopwords=["Monday"]),
}


def has_locale() -> bool:
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "en_US.UTF-8")
    except locale.Error:
        return False
    locale.setlocale(locale.LC_CTYPE, before)
    return True


def agree(ours: list[Array], theirs: list[Array]) -> bool:
    def close(a: Array, b: Array) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype.kind != "f":
            return bool(np.array_equal(a, b))
        return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(b[np.isfinite(b)]).max()))))

    return all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", DEVIATING)
def test_onnxruntime_fails_or_differs_and_the_reference_does_not(name: str, tmp_path: Path) -> None:
    case = DEVIATING[name]
    reason = case.reason()
    assert reason is not None
    assert reason.startswith("onnxruntime 1.31 ")
    right = case.reference(tmp_path)
    if "StringNormalizer" in name and has_locale():
        pytest.skip("the locale is installed, so onnxruntime finds it")
    if name in REFUSALS:
        with pytest.raises(Exception, match=REFUSALS[name]):
            case.onnxruntime()
    else:
        assert not agree(case.onnxruntime(), right), f"onnxruntime {onnxruntime.__version__} agrees; drop the entry"


@pytest.mark.parametrize("name", SOUND)
def test_the_condition_is_no_wider_than_needed(name: str, tmp_path: Path) -> None:
    case = SOUND[name]
    assert case.reason() is None
    assert agree(case.onnxruntime(), case.reference(tmp_path))


def test_every_deviation_is_shown() -> None:
    shown = {case.reason() for case in DEVIATING.values()}
    assert shown == {entry.reason for entries in _TABLE.values() for entry in entries}


def test_unknown_types_are_given_the_benefit_of_the_doubt() -> None:
    case = attention(floats(4, 4))
    model = case.model
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    (node,) = load_graph(model).nodes
    assert deviation(node) is None


def test_the_fourier_transform_that_replaces_it_is_more_exact(tmp_path: Path) -> None:
    case = DEVIATING["DFT"]
    wanted = np.fft.fft(case.feeds[0][..., 0].astype(np.float64))

    def error(y: Array) -> float:
        return float(np.abs(y[..., 0] + 1j * y[..., 1] - wanted).max() / np.abs(wanted).max())

    assert error(case.reference(tmp_path)[0]) < 2e-7
    assert error(case.onnxruntime()[0]) > 2e-5


def test_resize_with_aligned_corners_is_right_where_the_suite_is_not() -> None:
    x, scales = np.array([[[[1, 2, 3, 4]]]], np.float32), np.array([1, 1, 1, 0.6], np.float32)
    case = Case("Resize", [x, None, scales], {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 19)
    assert case.reason() is None
    np.testing.assert_allclose(case.onnxruntime()[0], [[[[1, 4]]]])  # (4 - 1) / (2 - 1): the corners are aligned
