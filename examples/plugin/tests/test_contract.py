"""The plug-in keeps the contract, and refuses what it cannot do for reasons that a user can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelrt_example_plugin import NumpyBackend, NumpyEngine
from onnx import TensorProto, helper, parser

import accelrt
from accelrt.backend import CompileJob, NoOptions, Program
from accelrt.errors import CompileError, IncompatibleProgram
from accelrt.graph.load import load_graph
from accelrt.graph.weights import WeightFile
from accelrt.registry import REGISTRY
from accelrt.testing.contract import BackendContract


class TestNumpy(BackendContract):
    backend_class = NumpyBackend


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let accelrt know the backend, installed or not, and keep out of the user's cache."""
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path))
    installed = "numpy" in REGISTRY.names()
    if not installed:
        REGISTRY.register(NumpyBackend)
    yield
    if not installed:
        REGISTRY.unregister("numpy")


def reasons(text: str) -> list[str]:
    """Return what the engine says about each node of a model in ONNX's text form."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    return [NumpyEngine().supports(node, "fp32").reason for node in load_graph(model).nodes]


def test_refuses_other_operators() -> None:
    (reason,) = reasons("g (float[N] x) => (float[N] y) { y = Erf(x) }")
    assert reason == "Erf is not among the operators of this engine"


def test_refuses_other_types() -> None:
    (reason,) = reasons("g (double[N] x) => (double[N] y) { y = Add(x, x) }")
    assert reason == "input 0 is float64; only float32 is computed"


def test_refuses_a_shape_that_is_computed() -> None:
    (reason,) = reasons("g (float[N] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }")
    assert reason == "the shape is computed at run time; only a constant one is taken"


def test_refuses_other_precisions() -> None:
    (node,) = load_graph(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Relu", ["x"], ["y"])],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
            )
        )
    ).nodes
    assert "fp16" in NumpyEngine().supports(node, "fp16").reason


def test_compile_refuses_what_supports_refuses(tmp_path: Path) -> None:
    graph = load_graph(
        parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Erf(x) }')
    )
    graph.write(tmp_path / "m.onnx", WeightFile(tmp_path / "weights.bin"))
    with pytest.raises(CompileError, match="Erf"):
        NumpyEngine().compile(CompileJob(tmp_path / "m.onnx", graph.signature, "fp32", NoOptions()), tmp_path)


def test_a_damaged_program_is_incompatible(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"steps": [{"operator": "System"}]}')
    files = {"plan.json": tmp_path / "plan.json", "weights.npz": tmp_path / "none.npz"}
    graph = load_graph(
        parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }')
    )
    with pytest.raises(IncompatibleProgram):
        NumpyEngine().load(Program(files, {}, graph.signature, NoOptions()), NumpyBackend().devices())


@pytest.mark.parametrize("shape", ["2, 3, 4", "0, -1", "-1"])
@pytest.mark.usefixtures("registered")
def test_reshape_means_what_onnx_means(shape: str) -> None:
    count = shape.count(",") + 1
    dims = ", ".join("ABC"[:count])
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3, 4] x) => (float[{dims}] y) '
        f"<int64[{count}] s = {{{shape}}}> {{ y = Reshape(x, s) }}"
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    with accelrt.load(model, backend="numpy", fallback="error") as ours, accelrt.load(model, backend="cpu") as oracle:
        np.testing.assert_array_equal(ours.predict(x)["y"], oracle.predict(x)["y"])
