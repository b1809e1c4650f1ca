"""Verification at compile: wrong engines are caught, the guilty node is named, the figures are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import accelrt
from accelrt import Tolerance, Verification
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import CorruptArtifact, ExecutionError, InputError, OptionError, VerificationError
from accelrt.registry import REGISTRY
from accelrt.testing.fake import FakeBackend
from accelrt.verification import verify_artifact

IMAGES, LABELS = held_out_digits()
Distortion = Callable[[tuple[str, ...], dict[str, Any]], dict[str, Any]]


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    names = itertools.count()
    used: list[str] = []

    def make(**behaviour: Any) -> str:
        used.append(f"verified-fake{next(names)}")
        accelrt.register(FakeBackend.configured(used[-1], **behaviour))
        return used[-1]

    yield make
    for name in used:
        REGISTRY.unregister(name)


def scaled(kind: str, by: float) -> Distortion:
    """An engine whose ``kind`` is off by a factor, whatever it is compiled together with."""

    def distort(kinds: tuple[str, ...], outputs: dict[str, Any]) -> dict[str, Any]:
        return {n: v * np.float32(1 + by) if kind in kinds else v for n, v in outputs.items()}

    return distort


def holed(kind: str) -> Distortion:
    """An engine that gives NaN in one row."""

    def distort(kinds: tuple[str, ...], outputs: dict[str, Any]) -> dict[str, Any]:
        outputs = {name: value.copy() for name, value in outputs.items()}
        for value in outputs.values():
            if kind in kinds:
                value[-1] = np.nan
        return outputs

    return distort


def chain(kinds: tuple[str, ...] = ("Abs", "Softplus", "Tanh", "Neg", "Relu", "Exp", "Sigmoid")) -> onnx.ModelProto:
    names = ["x", *(f"v{index}" for index in range(1, len(kinds))), "y"]
    nodes = [
        helper.make_node(kind, [names[index]], [names[index + 1]], name=f"n{index}_{kind}")
        for index, kind in enumerate(kinds)
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def test_the_figures_are_kept_in_the_artifact(tmp_path: Path) -> None:
    artifact = accelrt.compile(digits_model(), verify=True)
    report = artifact.verification
    assert report is not None
    assert report.passed
    assert (report.reference, report.inputs, report.calls) == ("fp32 on cpu/onnxruntime", "random, seed 0", 2)
    assert report.outputs[0].rows == 3
    assert "Verified against fp32 on cpu/onnxruntime" in artifact.explain()
    path = artifact.save(tmp_path / "m.accel")
    again = accelrt.load(path)
    again.close()
    from accelrt.artifact.artifact import open_artifact

    assert open_artifact(path).verification == report
    assert accelrt.compile(digits_model()).verification is None


def test_a_malformed_record_is_corrupt() -> None:
    artifact = accelrt.compile(digits_model(), verify=True, cache=False)
    (artifact.folder / "verification.json").write_text('{"reference": 3}')
    with pytest.raises(CorruptArtifact, match="verification"):
        _ = artifact.verification


@pytest.mark.parametrize("cache", [True, False])
def test_an_engine_off_by_three_percent_is_caught(fake: Callable[..., str], cache: bool) -> None:
    target = fake(distorts=scaled("Gemm", 3e-2))
    with pytest.raises(VerificationError, match=r"relative L2 error 0\.03") as caught:
        accelrt.compile(digits_model(), target, verify=Verification(tolerance=2e-2), cache=cache)
    report = caught.value.report
    assert not report.passed
    assert report.outputs[0].relative_l2 == pytest.approx(3e-2, rel=1e-3)
    assert "┃ output" in caught.value.message
    # What failed is not in the cache: the next compile fails as well, and a wider tolerance passes.
    with pytest.raises(VerificationError):
        accelrt.compile(digits_model(), target, verify=Verification(tolerance=2e-2), cache=cache)
    accelrt.compile(digits_model(), target, verify=Verification(tolerance=4e-2), cache=cache)
    accelrt.compile(digits_model(), target, cache=cache)


@pytest.mark.parametrize("kind", ["Abs", "Softplus", "Tanh", "Sigmoid"])
@pytest.mark.parametrize("how", [lambda kind: scaled(kind, 3e-2), holed], ids=["scaled", "NaN"])
def test_the_guilty_node_of_one_segment_is_named(
    fake: Callable[..., str], kind: str, how: Callable[[str], Distortion]
) -> None:
    target = fake(distorts=how(kind))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    with pytest.raises(VerificationError) as caught:
        accelrt.compile(chain(), target, verify=Verification({"x": x}, tolerance=2e-2, localise=True))
    culprit = caught.value.report.culprit
    assert culprit.kind.startswith(f"{kind}-")
    assert culprit.node.endswith(kind)
    assert culprit.segment == 0
    assert f"node {culprit.node!r}" in str(caught.value)


def test_the_guilty_segment_is_named(fake: Callable[..., str]) -> None:
    target = fake(operators={"Tanh", "Exp", "Neg"}, distorts=scaled("Exp", 0.3))
    with pytest.raises(VerificationError) as caught:
        accelrt.compile(chain(), target, fallback="allow", verify=Verification(tolerance=2e-2, localise=True, seed=3))
    culprit = caught.value.report.culprit
    assert (culprit.segment, culprit.node, culprit.engine) == (3, "n5_Exp", f"{target}/fake")


def test_one_bad_call_among_many_is_found(fake: Callable[..., str]) -> None:
    def distort(kinds: tuple[str, ...], outputs: dict[str, Any]) -> dict[str, Any]:
        return {n: v * np.float32(1.1) if len(v) == 7 and "Tanh" in kinds else v for n, v in outputs.items()}

    calls = [np.ones((size, 4), np.float32) for size in (1, 7, 2)]
    with pytest.raises(VerificationError) as caught:
        accelrt.compile(chain(), fake(distorts=distort), verify=Verification(calls, tolerance=2e-2, localise=True))
    assert caught.value.report.culprit.node == "n2_Tanh"


def test_labels_give_accuracy() -> None:
    artifact = accelrt.compile(digits_model(), verify=Verification([IMAGES[:200], IMAGES[200:]], labels=LABELS))
    assert artifact.verification is not None
    assert artifact.verification.outputs[0].accuracy == pytest.approx((448 / 450, 448 / 450))
    with pytest.raises(InputError, match="3 labels"):
        accelrt.compile(digits_model(), verify=Verification([IMAGES], labels=LABELS[:3]))
    with pytest.raises(InputError, match="no output"):
        accelrt.compile(digits_model(), verify=Verification([IMAGES], labels={"z": LABELS}))
    with pytest.raises(InputError, match="whole numbers"):
        accelrt.compile(digits_model(), verify=Verification([IMAGES], labels=LABELS / 2))
    with pytest.raises(OptionError, match="Labels need the inputs"):
        Verification(labels=LABELS)


def test_float64_is_a_reference_of_its_own() -> None:
    artifact = accelrt.compile(digits_model(), verify=Verification(reference="float64", tolerance=1e-5))
    assert artifact.verification is not None
    error = artifact.verification.outputs[0].relative_l2
    # Not the same numbers again: float32 rounds, but not by much.
    assert error is not None
    assert 1e-9 < error < 1e-5
    with pytest.raises(OptionError, match="reference"):
        Verification(reference="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verify", "words"),
    [
        ({"image": np.zeros((1, 1, 8, 8), np.float32), "y": 1}, "unknown"),
        ([], "no inputs to verify"),
        ([np.zeros((1, 1, 8, 8), np.float32), np.zeros((8, 8), np.float32)], "Item 1"),
        (np.zeros((1, 1, 8, 8), np.float32), "one call or many"),
        ("yes", "verify takes"),
        (3, "verify takes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_any_work(verify: Any, words: str) -> None:
    steps: list[str] = []
    with pytest.raises(InputError, match=words):
        accelrt.compile(digits_model(), verify=verify, progress=lambda step, *_: steps.append(step))
    assert steps == ["reading the model"]


def test_tolerances_of_outputs_that_are_not_there() -> None:
    with pytest.raises(OptionError, match="'q', which is no output"):
        accelrt.compile(digits_model(), verify=Verification(tolerance={"q": 1.0}))
    artifact = accelrt.compile(digits_model(), verify=Verification(tolerance={"scores": Tolerance(0.1, top1=1.0)}))
    assert artifact.verification is not None
    assert artifact.verification.outputs[0].tolerance == Tolerance(0.1, top1=1.0)


def test_the_cpu_does_not_answer_for_an_engine_that_fails(fake: Callable[..., str]) -> None:
    with pytest.raises(ExecutionError, match="told to fail"):
        accelrt.compile(digits_model(), fake(fails_to_run=lambda kinds, call: True), verify=True)


def test_an_artifact_can_be_verified_later(fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(digits_model(), fake(distorts=scaled("Gemm", 3e-2)))
    report = verify_artifact(artifact, Verification([IMAGES], labels=LABELS, tolerance=2e-2))
    assert not report.passed
    assert [output.name for output in report.failures] == ["scores"]
