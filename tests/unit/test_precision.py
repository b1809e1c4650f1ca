"""Precision: what is asked for is computed, or refused with a reason and recorded."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import accelrt
from accelrt import Verification
from accelrt.backend import Precision
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import OptionError, UnsupportedNodes
from accelrt.graph.cast import cast_floats
from accelrt.graph.load import load_graph
from accelrt.precision.plan import plan
from accelrt.registry import REGISTRY, find_engine
from accelrt.target import parse
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import small_cnn

IMAGES, LABELS = held_out_digits()
CPU = REGISTRY.backend("cpu")
HAS_BF16 = find_engine(CPU, "openvino").supports(load_graph(small_cnn()).nodes[0], "bf16").supported


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    names = itertools.count()
    used: list[str] = []

    def make(**behaviour: Any) -> str:
        used.append(f"precise-fake{next(names)}")
        accelrt.register(FakeBackend.configured(used[-1], **behaviour))
        return used[-1]

    yield make
    for name in used:
        REGISTRY.unregister(name)


def names(target: str, precision: Precision | None) -> list[str]:
    candidates, precisions = plan(REGISTRY.candidates(parse(target)), precision)
    return [f"{c.engine.name}@{p}" for c, p in zip(candidates, precisions, strict=True)]


def test_the_plan(fake: Callable[..., str]) -> None:
    assert names("cpu", None) == ["onnxruntime@fp32", "reference@fp32"]
    assert names("cpu", "fp32") == ["onnxruntime@fp32", "reference@fp32"]
    assert names("cpu", "bf16") == ["onnxruntime@bf16", "onnxruntime@fp32", "reference@fp32"]
    npu = fake()
    assert names(npu, "fp16") == ["fake@fp16", "onnxruntime@fp32", "reference@fp32"]
    assert names(npu, "int8")[:2] == ["fake@int8", "onnxruntime@int8"]


def test_a_precision_that_an_engine_lacks_goes_to_the_cpu_and_is_told(
    fake: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    target = fake(precisions=("fp32", "int8"))
    with caplog.at_level(logging.WARNING, "accelrt"):
        artifact = accelrt.compile(digits_model(), target, precision="bf16")
    assert f"10 of 10 nodes do not run on {target}/fake in bf16: 10 on cpu/onnxruntime in fp32" in caplog.text
    assert {(s.engine, s.precision) for s in artifact.placement.segments} == {("cpu/onnxruntime", "fp32")}
    assert {r.reason for r in artifact.placement.refusals} == {"precision bf16 is not offered by this stand-in"}
    with pytest.raises(UnsupportedNodes, match="bf16"):
        accelrt.compile(digits_model(), target, precision="bf16", fallback="error")


def test_the_same_engine_in_another_precision_is_a_fallback_too() -> None:
    artifact = accelrt.compile(digits_model(), "cpu", precision="fp16", fallback="allow")
    assert artifact.placement.nodes_elsewhere == {"cpu/onnxruntime in fp32": 10}
    assert artifact.placement.fallen_back == 10
    assert "no CPU kernel for Conv-11 with float16" in artifact.explain()
    with pytest.raises(UnsupportedNodes, match="do not run on cpu/onnxruntime in fp16"):
        accelrt.compile(digits_model(), "cpu", precision="fp16", fallback="error")
    assert accelrt.compile(digits_model(), "cpu", precision="fp32", fallback="error").placement.fallen_back == 0


def test_onnxruntime_has_no_products_in_16_bits() -> None:
    """The reason it gives; a release that adds such kernels fails here."""
    import onnxruntime

    kernels = onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def()
    products = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    types = {
        name
        for kernel in kernels
        if kernel.provider == "CPUExecutionProvider" and kernel.domain == "" and kernel.op_name in products
        for constraint in kernel.type_constraints.values()
        for name in constraint
    }
    assert "tensor(float)" in types
    assert not types & {"tensor(float16)", "tensor(bfloat16)"}


@pytest.mark.openvino
@pytest.mark.skipif(not HAS_BF16, reason="this CPU does not compute bfloat16")
def test_openvino_computes_in_bf16_and_keeps_the_borders(tmp_path: Path) -> None:
    request = Verification([IMAGES], labels=LABELS)
    artifact = accelrt.compile(digits_model(), "cpu/openvino", precision="bf16", verify=request, fallback="error")
    report = artifact.verification
    assert report is not None
    error, accuracy = report.outputs[0].relative_l2, report.outputs[0].accuracy
    assert error is not None and accuracy is not None
    # Three digits at most: if it were float32 in secret, the error would be a thousandth of this.
    assert 5e-4 < error < 2e-2
    assert accuracy[0] > accuracy[1] - 0.005
    assert [segment.precision for segment in artifact.manifest.segments] == ["bf16"]
    with accelrt.load(artifact.save(tmp_path / "m.accel")) as session:
        scores = session.predict(IMAGES)["scores"]
    with accelrt.load(accelrt.compile(digits_model(), "cpu/openvino", precision="fp32")) as session:
        exact = session.predict(IMAGES)["scores"]
    assert scores.dtype == np.float32
    assert np.linalg.norm(scores - exact) / np.linalg.norm(exact) == pytest.approx(error, rel=0.1)


@pytest.mark.openvino
def test_openvino_refuses_what_it_would_compute_in_something_else() -> None:
    artifact = accelrt.compile(digits_model(), "cpu/openvino", precision="fp16", fallback="allow")
    for segment in artifact.placement.segments:
        assert (segment.engine, segment.precision) in {("cpu/onnxruntime", "fp32"), ("cpu/openvino", "fp16")}
    if artifact.placement.fallen_back:
        assert "asked for f16, OpenVINO computes in" in artifact.explain()


def test_precisions_are_part_of_the_key_and_of_the_record() -> None:
    plain = accelrt.compile(digits_model())
    assert "precision" not in plain.manifest.options
    asked = accelrt.compile(digits_model(), precision="fp32")
    assert asked.manifest.options["precision"] == "fp32"
    assert asked.folder != plain.folder
    assert accelrt.compile(digits_model(), precision="fp32").folder == asked.folder


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(OptionError, match="one of fp32, bf16, fp16, int8, not 'fp8'"):
        accelrt.compile(digits_model(), precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="needs typical inputs"):
        accelrt.compile(digits_model(), precision="int8")
    with pytest.raises(OptionError, match="precision='int8' is not"):
        accelrt.compile(digits_model(), calibration=[IMAGES[:1]])


def test_a_recorded_precision_is_kept_when_compiled_again(fake: Callable[..., str], tmp_path: Path) -> None:
    target = fake(precisions=("bf16",), version="1")
    path = accelrt.compile(digits_model(), target, precision="bf16").save(tmp_path / "m.accel")
    accelrt.register(FakeBackend.configured(target, precisions=("bf16",), version="2"))
    with accelrt.load(path, fallback="allow") as session:
        assert session.stats().engines == (f"{target}/fake",)  # in fp32 it would have refused all


# Casts


def mixed() -> onnx.ModelProto:
    """Floats of which some must stay: a Resize's scales, a body that captures, a Cast, a weight."""
    then = helper.make_graph(
        [helper.make_node("Mul", ["a", "a"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("If", ["c"], ["b"], then_branch=then, else_branch=other),
        helper.make_node("Resize", ["b", "", "scales"], ["r"], mode="nearest"),
        helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["r", "f"], ["y"]),
        helper.make_node("Identity", ["a"], ["z"]),
    ]
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("n", TensorProto.INT64, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4]),
    ]
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [3, 4], np.arange(12) / 7),
        helper.make_tensor("scales", TensorProto.FLOAT, [2], [1.0, 2.0]),
    ]
    graph = helper.make_graph(nodes, "mixed", ports, outputs, weights)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("build", [mixed, small_cnn])
def test_casts_keep_the_borders_and_the_meaning(dtype: str, build: Callable[[], onnx.ModelProto]) -> None:
    graph = load_graph(build())
    cast = cast_floats(graph, dtype)
    assert cast.signature == graph.signature
    onnx.checker.check_model(cast.proto) if not cast.weights else None
    computed = {node.op_type: node.input_dtype(0) for node in load_graph(cast.proto).nodes} if not cast.weights else {}
    if build is mixed:
        assert computed["MatMul"] == dtype
        assert computed["Add"] == dtype
        generator = np.random.default_rng(0)
        feeds = {"x": generator.normal(size=(2, 3)).astype(np.float32), "c": np.array(True), "n": np.array([3])}
        wanted = ReferenceEvaluator(graph.proto).run(None, feeds)
        found = ReferenceEvaluator(cast.proto).run(None, feeds)
        for have, want in zip(found, wanted, strict=True):
            assert have.dtype == np.float32
            np.testing.assert_allclose(have, want, rtol=1e-6 if dtype == "float64" else 5e-3)


def test_nodes_that_are_kept_stay_in_float32() -> None:
    cast = cast_floats(load_graph(mixed()), "float64", keep=lambda node: node.op_type == "MatMul")
    computed = {node.op_type: node.input_dtype(0) for node in load_graph(cast.proto).nodes}
    assert computed["MatMul"] == "float32"
    assert computed["Add"] == "float64"
