"""INT8: calibration sets are checked before any work, and what comes out is right on both engines of the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

import accelrt
from accelrt import Calibration, Verification
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import CalibrationError, OptionError, SourceError
from accelrt.precision.calibrate import is_quantised

IMAGES, LABELS = held_out_digits()
SET = [IMAGES[index : index + 1] for index in range(50)]
REST = Verification([IMAGES[50:]], labels=LABELS[50:])
"""What was calibrated with is not what accuracy is counted on."""


def with_nan() -> list[np.ndarray]:
    bad = SET[3].copy()
    bad[0, 0, 2, 2] = np.nan
    return [*SET[:3], bad]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "is empty"),
        (iter(()), "is empty"),
        (with_nan(), "Item 3 .* NaN or infinities in 'image'"),
        ([SET[0], IMAGES[0]], r"Item 1: Input 'image' takes .* shape \[1, 8, 8\]"),
        ([SET[0].astype(np.float64)], "float64"),
        ([{"picture": SET[0]}], "unknown: 'picture'"),
        (IMAGES, r"Item 0: .* shape \[1, 8, 8\]"),
        ([np.zeros((0, 1, 8, 8), np.float32)], "Item 0 .* is empty"),
        (7, "must be an iterable"),
    ],
)
def test_a_set_that_cannot_be_used_is_an_error_before_any_work(inputs: Any, words: str) -> None:
    steps: list[str] = []
    for calibration in (inputs, Calibration(inputs)):
        with pytest.raises(CalibrationError, match=words):
            accelrt.compile(
                digits_model(),
                precision="int8",
                calibration=calibration,
                progress=lambda step, *_: steps.append(step),
            )
    assert set(steps) == {"reading the model"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "guess"},
        {"percentile": 20.0},
        {"activations": "int4"},
        {"symmetric": True},
        {"exclude": "Conv"},
        {"operators": "Conv"},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Calibration(SET, **wrong)


@pytest.mark.parametrize("wrong", [{"exclude": ["nobody"]}, {"operators": ["LSTM"]}])
def test_names_that_the_model_has_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"nobody|LSTM"):
        accelrt.compile(digits_model(), precision="int8", calibration=Calibration(SET, **wrong))


@pytest.mark.parametrize("target", ["cpu/onnxruntime", pytest.param("cpu/openvino", marks=pytest.mark.openvino)])
@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_accuracy_is_within_half_a_point(target: str, method: Any, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = accelrt.compile(
        digits_model(),
        target,
        precision="int8",
        calibration=Calibration(SET, method=method),
        verify=REST,
        fallback="error",
    )
    assert capsys.readouterr().out == ""
    assert [(s.engine, s.precision) for s in artifact.placement.segments] == [(target, "int8")]
    report = artifact.verification
    assert report is not None
    output = report.outputs[0]
    assert output.accuracy is not None and output.relative_l2 is not None
    assert output.accuracy[0] >= output.accuracy[1] - 0.005
    # Rounding to 256 steps shows: float32 in disguise would be ten thousand times as close.
    assert 1e-3 < output.relative_l2 < 5e-2
    assert artifact.signature == accelrt.compile(digits_model()).signature


def test_weights_are_integers_and_a_quarter_of_the_size() -> None:
    artifact = accelrt.compile(digits_model(), precision="int8", calibration=SET)
    graph = artifact.source_graph()
    assert is_quantised(graph)
    plain = sum(s.weight_bytes for s in accelrt.compile(digits_model()).placement.segments)
    assert sum(s.weight_bytes for s in artifact.placement.segments) < 0.3 * plain
    scales = [
        t for t in graph.initializers.values() if max(t.dims, default=0) > 1 and t.data_type == onnx.TensorProto.FLOAT
    ]
    assert scales, "per channel there is a vector of scales"
    one = accelrt.compile(digits_model(), precision="int8", calibration=Calibration(SET, per_channel=False))
    tensors = one.source_graph().initializers.values()
    assert all(max(t.dims, default=0) <= 1 for t in tensors if t.data_type == onnx.TensorProto.FLOAT)


def test_nodes_can_be_left_alone() -> None:
    def quantised(how: Calibration) -> dict[str, int]:
        graph = accelrt.compile(digits_model(), precision="int8", calibration=how).source_graph()
        fed = {name for node in graph.nodes if node.op_type == "DequantizeLinear" for name in node.outputs}
        kinds: dict[str, int] = {}
        for node in graph.nodes:
            if node.op_type in ("Conv", "Gemm") and set(node.inputs[:2]) <= fed:
                kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
        return kinds

    assert quantised(Calibration(SET)) == {"Conv": 3, "Gemm": 1}
    assert quantised(Calibration(SET, exclude=["Gemm"])) == {"Conv": 3}
    assert quantised(Calibration(SET, exclude=["node_conv2d_1"])) == {"Conv": 2, "Gemm": 1}
    assert quantised(Calibration(SET, operators=["Gemm"])) == {"Gemm": 1}


def test_any_iterable_will_do_and_progress_is_told() -> None:
    def generate() -> Iterator[Any]:
        for image in SET[:5]:
            yield {"image": image}

    steps: list[tuple[str, int, int]] = []
    accelrt.compile(digits_model(), precision="int8", calibration=generate(), progress=lambda *step: steps.append(step))
    calibrating = [step for step in steps if step[0] == "calibrating"]
    assert calibrating[0] == ("calibrating", 0, 5)
    assert calibrating[-1] == ("calibrating", 5, 5)


def test_the_root_logger_is_left_as_it_was() -> None:
    before = logging.getLogger().level
    accelrt.compile(digits_model(), precision="int8", calibration=SET, cache=False)
    assert logging.getLogger().level == before


def test_a_quantised_model_needs_no_calibration() -> None:
    artifact = accelrt.compile(digits_model(), precision="int8", calibration=SET)
    model = artifact.source_graph()
    weights = model.weights
    assert not weights or all(tensor.nbytes for tensor in weights.values())
    again = accelrt.compile(artifact.folder / "source.onnx", precision="int8", verify=REST)
    assert [s.precision for s in again.placement.segments] == ["int8"]
    with pytest.raises(OptionError, match="quantised already"):
        accelrt.compile(artifact.folder / "source.onnx", precision="int8", calibration=SET)


def test_what_has_nothing_to_quantise_is_told() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (int64[n] x) => (int64[n] y) { y = Neg(x) }'
    with pytest.raises(SourceError, match="Nothing in the model can be quantised"):
        accelrt.compile(onnx.parser.parse_model(text), precision="int8", calibration=[np.arange(3)])


def test_normalisations_are_folded_before() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 2, 4, 4] x) => (float[n, 3, 4, 4] y)
        <float[3] s = {1.5, 0.5, 2.0}, float[3] b = {0.1, 0.2, 0.3}, float[3] m = {0.0, 1.0, 2.0},
         float[3] v = {1.0, 2.0, 3.0}, float[3, 2, 1, 1] w = {1.0, -0.5, 0.3, 2.0, -1.0, 0.7}>
        { c = Conv(x, w) y = BatchNormalization(c, s, b, m, v) }"""
    model = onnx.parser.parse_model(text)
    x = np.random.default_rng(0).normal(size=(8, 2, 4, 4)).astype(np.float32)
    artifact = accelrt.compile(model, precision="int8", calibration=[x], verify=Verification([x], tolerance=3e-2))
    kinds = [node.op_type for node in artifact.source_graph().nodes]
    assert "BatchNormalization" not in kinds
    assert kinds.count("QuantizeLinear") == 2  # what enters the convolution and what leaves it
