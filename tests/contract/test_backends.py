"""Every engine at hand keeps the contract: the CPU's, the stand-in, and the plug-in of the examples."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from accelrt.backend import Device, Executable, Precision, Program, Verdict
from accelrt.graph.node import Node
from accelrt.testing.contract import BackendContract, WholeCase
from accelrt.testing.fake import FakeBackend
from accelrt_cpu import CpuBackend
from accelrt_neuron import NeuronBackend

_PLUGIN = Path(__file__).parents[2] / "examples" / "plugin" / "src"
# Installing it is CI's work; here it is imported from where it lies.
sys.path.insert(0, str(_PLUGIN))
_plugin = importlib.import_module("accelrt_example_plugin")
NumpyBackend, NumpyEngine = _plugin.NumpyBackend, _plugin.NumpyEngine

_SDKS = ("onnxruntime", "openvino", "torch", "tensorflow")
_NEURON_SDKS = (*_SDKS, "onnx", "torch_neuronx", "torch_neuron")


class TestOnnxRuntime(BackendContract):
    backend_class = CpuBackend
    engine_name: ClassVar[str | None] = "onnxruntime"
    sdk_modules = _SDKS


@pytest.mark.openvino
class TestOpenVino(BackendContract):
    backend_class = CpuBackend
    engine_name: ClassVar[str | None] = "openvino"
    sdk_modules = _SDKS


def _torch_mlp() -> WholeCase:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return WholeCase(layers, (torch.randn(2, 8),), {"dynamic_shapes": ({0: "batch"},)})


def _torch_views() -> WholeCase:
    torch = pytest.importorskip("torch")

    class Views(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return {"y": x.reshape(2, 12)}

    return WholeCase(Views(), (torch.randn(4, 6),))


def _script(case: Callable[[], WholeCase]) -> WholeCase:
    torch = pytest.importorskip("torch")
    built = case()
    return WholeCase(torch.jit.trace(built.model, built.example_inputs), built.example_inputs, built.options)


@pytest.mark.torch
class TestTorch(BackendContract):
    backend_class = CpuBackend
    engine_name: ClassVar[str | None] = "torch"
    sdk_modules = _SDKS
    whole_models: ClassVar[Mapping[str, Callable[[], WholeCase]]] = {"mlp": _torch_mlp, "views": _torch_views}
    engine_options: ClassVar[Mapping[str, Any]] = {"inductor": False}  # compiling takes long; tests of it are apart


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class TestTorchScript(BackendContract):
    backend_class = CpuBackend
    engine_name: ClassVar[str | None] = "torch"
    sdk_modules = _SDKS
    whole_models: ClassVar[Mapping[str, Callable[[], WholeCase]]] = {"mlp": lambda: _script(_torch_mlp)}


def _keras_mlp() -> WholeCase:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    x = keras.Input((8,), name="x")
    hidden = keras.layers.Dense(16, activation="relu")(x)
    return WholeCase(keras.Model(x, {"y": keras.layers.Dense(4)(hidden)}))


def _tensorflow_views() -> WholeCase:
    tf = pytest.importorskip("tensorflow")
    spec = tf.TensorSpec([4, 6], tf.float32, name="x")
    return WholeCase(tf.function(lambda x: {"y": tf.reshape(x, (2, 12))}, input_signature=[spec]))


@pytest.mark.tensorflow
class TestTensorFlow(BackendContract):
    backend_class = CpuBackend
    engine_name: ClassVar[str | None] = "tensorflow"
    sdk_modules = _SDKS
    whole_models: ClassVar[Mapping[str, Callable[[], WholeCase]]] = {"mlp": _keras_mlp, "views": _tensorflow_views}


class TestReference(BackendContract):
    backend_class = CpuBackend
    engine_name: ClassVar[str | None] = "reference"
    sdk_modules = _SDKS


class TestNeuronEmulator(BackendContract):
    """bf16 at every border: two or three operators deep, with outputs near 1."""

    backend_class = NeuronBackend
    engine_name: ClassVar[str | None] = "emulator"
    sdk_modules = _NEURON_SDKS
    batch: ClassVar[int | None] = 2
    rtol: ClassVar[float] = 3e-2
    atol: ClassVar[float] = 3e-2


class TestTorchNeuronx(BackendContract):
    """Without the vendor's package: names, options and a status."""

    backend_class = NeuronBackend
    engine_name: ClassVar[str | None] = "torch-neuronx"
    sdk_modules = _NEURON_SDKS


class TestTorchNeuron(TestTorchNeuronx):
    engine_name: ClassVar[str | None] = "torch-neuron"


class TestTensorFlowNeuron(TestTorchNeuronx):
    engine_name: ClassVar[str | None] = "tensorflow-neuron"


class TestStandIn(BackendContract):
    backend_class = FakeBackend.configured(operators={"Gemm", "Relu", "Conv", "MaxPool", "Reshape"})


class TestResidentStandIn(BackendContract):
    """One whose tensors stay on the device."""

    backend_class = FakeBackend.configured("holds", operators={"Gemm", "Relu", "Softmax"}, device_tensors=True)


class TestSerialStandIn(BackendContract):
    """One that takes a single call at a time, so that sessions must take turns."""

    backend_class = FakeBackend.configured("serial", operators={"Gemm", "Relu"}, concurrent=False, devices=2)


class TestUnusable(BackendContract):
    """One whose SDK is missing still has names, devices and a status."""

    backend_class = FakeBackend.configured("unusable", unusable="the SDK is not installed")


class TestPlugin(BackendContract):
    backend_class = NumpyBackend


# The suite itself: what breaks a promise does not pass


class _Sloppy(Executable):
    """Computes rightly, and breaks one promise."""

    def __init__(self, inner: Executable, fault: str) -> None:
        self._inner, self._fault = inner, fault
        self._kept: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self._inner.run(inputs)
        if self._fault == "reuses its output buffers":
            for name, value in outputs.items():
                self._kept.setdefault(name, np.empty_like(value))[...] = value
            return dict(self._kept)
        if self._fault == "writes to its inputs":
            for value in inputs.values():
                value += 1
        return outputs

    def close(self) -> None:
        if self._fault != "runs after close":
            self._inner.close()


class _SloppyEngine(NumpyEngine):  # type: ignore[misc, valid-type]
    fault = ""

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        return _Sloppy(super().load(program, devices), self.fault)

    def supports(self, node: Node, precision: Precision) -> Verdict:
        if self.fault == "refuses without a reason" and node.op_type == "Relu":
            return Verdict(False)
        if self.fault == "takes what it does not know":
            return Verdict(True)
        return super().supports(node, precision)

    def supports_all(self, nodes: Sequence[Node], precision: Precision) -> list[Verdict]:
        if self.fault == "changes its mind":
            return [Verdict.refuse("not today")] * len(nodes)
        return super().supports_all(nodes, precision)


CAUGHT_BY = {
    "reuses its output buffers": BackendContract.test_outputs_stay_valid_when_run_is_called_again,
    "writes to its inputs": BackendContract.test_inputs_are_read_only_to_the_engine,
    "runs after close": BackendContract.test_close_is_final,
    "refuses without a reason": BackendContract.test_verdicts_are_the_same_each_time_and_all_at_once,
    "changes its mind": BackendContract.test_verdicts_are_the_same_each_time_and_all_at_once,
    "takes what it does not know": BackendContract.test_an_operator_nobody_knows_is_refused,
}


def _keep_promise(engine: Any, test: Callable[..., None], folder: Path) -> None:
    """Run one test of the suite on an engine."""
    suite = BackendContract()
    known = {"usable": engine, "devices": NumpyBackend().devices(), "model": "mlp"}
    wanted = inspect.signature(test).parameters
    if "program" in wanted:
        job = suite.job(NumpyEngine(), folder)
        (folder / "out").mkdir()
        known["program"] = engine.compile(job, folder / "out")
    test(suite, **{name: value for name, value in known.items() if name in wanted})


@pytest.mark.parametrize("fault", CAUGHT_BY)
def test_the_suite_catches_a_broken_promise(fault: str, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    _keep_promise(NumpyEngine(), CAUGHT_BY[fault], tmp_path / "good")
    engine = _SloppyEngine()
    engine.fault = fault
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        _keep_promise(engine, CAUGHT_BY[fault], tmp_path / "bad")
