"""Amazon's interfaces to Elastic Inference on accelrt, held against TensorFlow, Keras and PyTorch themselves."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

import accelrt
from accelrt.backend import Backend, Device, Engine
from accelrt.cli import app
from accelrt.compat.eia import compiled, target
from accelrt.errors import CoresUnavailable
from accelrt.registry import REGISTRY
from accelrt.testing.fake import FakeBackend
from accelrt_eia.predictor import PredictorEngine
from accelrt_eia.torcheia import TorchEiaEngine

TOOL = Path(__file__).parents[1] / "stand_ins" / "eia" / "tool"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_NOTED", set())
    compiled._SLOTS.clear()


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for the backend `eia` with two devices."""
    kind = FakeBackend.configured("eia", devices=2)
    monkeypatch.setitem(REGISTRY._backends, "eia", kind())
    monkeypatch.setenv("ACCELRT_BACKEND", "eia")
    return "eia"


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import accelrt.compat.eia, sys; assert 'EIPredictor' in dir(accelrt.compat.eia);"
        "from accelrt.compat.eia import EIPredictor, EIKerasModel;"
        "print([m for m in ('torch', 'tensorflow', 'keras', 'onnx') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_signatures_are_the_vendors() -> None:
    from accelrt.compat.eia import EIKerasModel, EIPredictor

    def names(function: Any) -> dict[str, Any]:
        return {name: one.default for name, one in inspect.signature(function).parameters.items()}

    empty = inspect.Parameter.empty
    assert names(EIPredictor) == {
        "model_dir": empty, "signature_def_key": None, "signature_def": None, "input_names": None,
        "output_names": None, "tags": None, "graph": None, "config": None, "use_ei": True, "accelerator_id": 0,
    }  # fmt: skip
    assert names(EIKerasModel) == {"model": empty, "custom_objects": None}
    with pytest.raises(AttributeError):
        importlib.import_module("accelrt.compat.eia").EIKerasPredictor  # noqa: B018


# TensorFlow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SavedModel with two signatures, and the module it was made of."""
    tf = pytest.importorskip("tensorflow")
    weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)

    class Two(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(weights)

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def product(self, x: Any) -> Any:
            return {"scores": x @ self.w, "best": tf.argmax(x @ self.w, axis=1), "x": x + 1}

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def total(self, x: Any) -> Any:
            return {"total": tf.reduce_sum(x, axis=1)}

    module, folder = Two(), tmp_path_factory.mktemp("two")
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.product, "total": module.total})
    return SimpleNamespace(path=folder, module=module, tf=tf)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A frozen graph as TensorFlow 1 has them, and a function that runs it in a session of TensorFlow's."""
    tf = pytest.importorskip("tensorflow")
    v1 = tf.compat.v1
    with v1.Graph().as_default() as graph:
        image = v1.placeholder(tf.uint8, [None, 4, 4, 1], name="image_tensor")
        flat = tf.reshape(tf.cast(image, tf.float32), [-1, 16])
        tf.identity(flat @ tf.constant(np.eye(16, 2, dtype=np.float32)), name="detection_boxes")
        tf.identity(tf.reduce_max(flat, axis=1), name="detection_scores")
    path = tmp_path_factory.mktemp("frozen") / "frozen.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())

    def run(value: Any) -> Any:
        with v1.Session(graph=graph) as session:
            return session.run(["detection_boxes:0", "detection_scores:0"], {"image_tensor:0": value})

    return SimpleNamespace(path=path, run=run)


def rows(count: int) -> Any:
    return np.random.default_rng(count).standard_normal((count, 4)).astype(np.float32)


@pytest.mark.tensorflow
def test_signatures_of_a_saved_model_as_tensorflow_computes_them(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt.compat.eia import EIPredictor

    compiles = []
    own = accelrt.compile
    monkeypatch.setattr(accelrt, "compile", lambda *a, **k: (compiles.append(a), own(*a, **k))[1])
    predictor = EIPredictor(str(two.path))
    assert not compiles, "the first call compiles"
    assert set(predictor.feed_tensors) == {"x"} and set(predictor.fetch_tensors) == {"scores", "best", "x"}
    assert predictor.feed_tensors["x"].shape == (None, 4) and "serving_default_x:0" in repr(predictor)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda count: predictor({"x": rows(count)}), [1, 2, 3, 5, 8, 13, 1, 2]))
    for count, answer in zip([1, 2, 3, 5, 8, 13, 1, 2], answers, strict=True):
        expected = two.module.product(two.tf.constant(rows(count)))
        assert set(answer) == set(expected)
        for name, value in expected.items():
            assert answer[name].dtype == value.numpy().dtype
            np.testing.assert_allclose(answer[name], value.numpy(), rtol=1e-5, atol=1e-6)
    again = EIPredictor(two.path, tags="serve")
    np.testing.assert_array_equal(again({"x": rows(3)})["best"], answers[2]["best"])
    assert len(compiles) == 1, "threads and a second predictor wait for the first compile, and take it"
    # Python's numbers and other types become what the tensor is, as TensorFlow feeds do.
    doubles = again({"x": rows(3).astype(np.float64).tolist()})
    np.testing.assert_allclose(doubles["scores"], answers[2]["scores"], rtol=1e-6)

    total = EIPredictor(two.path, signature_def_key="total")
    np.testing.assert_allclose(total({"x": rows(4)})["total"], rows(4).sum(axis=1), rtol=1e-5)


@pytest.mark.tensorflow
def test_a_signature_def_and_names_of_tensors_choose_what_is_computed(two: Any) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    from accelrt.compat.eia import EIPredictor

    meta = saved_model_pb2.SavedModel.FromString((two.path / "saved_model.pb").read_bytes()).meta_graphs[0]
    definition = meta.signature_def["total"]
    predictor = EIPredictor(two.path, signature_def=definition)
    np.testing.assert_allclose(predictor({"x": rows(4)})["total"], rows(4).sum(axis=1), rtol=1e-5)

    plain = EIPredictor(two.path)
    tensors = {name: tensor.name for name, tensor in plain.fetch_tensors.items()}
    named = EIPredictor(two.path, input_names={"in": "serving_default_x"}, output_names={"a b": tensors["scores"]})
    found = named({"in": rows(5)})
    assert list(found) == ["a b"]
    np.testing.assert_allclose(found["a b"], plain({"x": rows(5)})["scores"], rtol=1e-5)

    mixed = type(definition)()  # no signature of the model's: its input by another alias
    mixed.CopyFrom(definition)
    mixed.inputs["other"].CopyFrom(definition.inputs["x"])
    del mixed.inputs["x"]
    np.testing.assert_allclose(
        EIPredictor(two.path, signature_def=mixed)({"other": rows(2)})["total"], rows(2).sum(axis=1), rtol=1e-5
    )


@pytest.mark.tensorflow
def test_a_frozen_graph_by_aliases(frozen: Any) -> None:
    from accelrt.compat.eia import EIPredictor

    aliases = {"inputs": "image_tensor:0"}, {"detection_boxes": "detection_boxes:0", "scores": "detection_scores"}
    predictor = EIPredictor(str(frozen.path), input_names=aliases[0], output_names=aliases[1])
    assert predictor.feed_tensors["inputs"].dtype == np.uint8
    for count in (1, 3):
        image = np.random.default_rng(count).integers(0, 256, (count, 4, 4, 1), np.uint8)
        boxes, scores = frozen.run(image)
        found = predictor({"inputs": image})
        np.testing.assert_allclose(found["detection_boxes"], boxes, rtol=1e-6)
        np.testing.assert_allclose(found["scores"], scores, rtol=1e-6)
    with pytest.raises(ValueError, match="input_names must be provided for running inference on frozen graph"):
        EIPredictor(frozen.path)
    with pytest.raises(KeyError, match="'nothing:0' refers to a Tensor which does not exist"):
        EIPredictor(frozen.path, input_names=aliases[0], output_names={"y": "nothing"})


@pytest.mark.tensorflow
def test_what_does_not_fit_is_refused_in_the_vendors_words(two: Any, tmp_path: Path) -> None:
    from accelrt.compat.eia import EIPredictor

    predictor = EIPredictor(two.path)
    with pytest.raises(ValueError, match=r"Incorrect input name: z\. Does not match the input names"):
        predictor({"z": rows(1)})
    with pytest.raises(ValueError, match="You must feed a value for the input 'x'"):
        predictor({})
    with pytest.raises(ValueError, match=r"Cannot feed value of shape \(1, 5\) for Tensor serving_default_x:0"):
        predictor({"x": np.zeros((1, 5), np.float32)})
    with pytest.raises(ValueError, match=r'Got signature_def_key "no"\. Available signatures are'):
        EIPredictor(two.path, signature_def_key="no")
    with pytest.raises(ValueError, match="at most one"):
        EIPredictor(two.path, signature_def_key="a", signature_def=object())
    with pytest.raises(ValueError, match="at most one"):
        EIPredictor(two.path, signature_def_key="a", input_names={}, output_names={})
    with pytest.raises(ValueError, match="both be specified"):
        EIPredictor(two.path, input_names={"x": "x:0"})
    with pytest.raises(TypeError, match="SignatureDef"):
        EIPredictor(two.path, signature_def=3)
    with pytest.raises(FileNotFoundError, match="Must supply a valid saved model or frozen graph"):
        EIPredictor(tmp_path / "nothing")
    with pytest.raises(RuntimeError, match="has no graph with the tags gpu"):
        EIPredictor(two.path, tags=["gpu"])
    with pytest.raises(RuntimeError, match="no SavedModel"):
        EIPredictor(tmp_path)
    with pytest.raises(TypeError, match="ordinal"):
        EIPredictor(two.path, accelerator_id="eia-1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword"):
        EIPredictor(two.path, accelerator=1)  # type: ignore[call-arg]


@pytest.mark.tensorflow
def test_use_ei_and_the_accelerator_say_where(two: Any, two_accelerators: str) -> None:
    from accelrt.compat.eia import EIPredictor

    second = EIPredictor(two.path, accelerator_id=1)
    second({"x": rows(1)})
    session = second._session
    assert session is not None and session.stats().replicas[0].devices == ("eia:1",)
    host = EIPredictor(two.path, use_ei=False, accelerator_id=1)
    host({"x": rows(1)})
    assert host._session is not None and host._session.stats().replicas[0].devices == ("cpu:0",)
    with pytest.raises(CoresUnavailable):
        EIPredictor(two.path, accelerator_id=7)({"x": rows(1)})


@pytest.mark.tensorflow
def test_keras_predicts_as_keras_does(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    import keras

    from accelrt.compat.eia import EIKerasModel

    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(8, activation="relu")(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(3, name="a")(hidden), keras.layers.Dense(2, name="b")(hidden)])
    found, expected = EIKerasModel(model).predict(rows(7), batch_size=3), model.predict(rows(7), verbose=0)
    assert isinstance(found, list) and len(found) == 2
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)

    single = keras.Sequential([inputs, keras.layers.Dense(3)])
    single.save(tmp_path / "single.keras")
    wrapped = EIKerasModel(str(tmp_path / "single.keras"))
    for given in (rows(40), rows(40).tolist(), [rows(40)]):
        np.testing.assert_allclose(wrapped.predict(given), single.predict(rows(40), verbose=0), rtol=1e-4, atol=1e-5)
    assert wrapped.predict(rows(40), batch_size=4, steps=2).shape == (8, 3)
    for bad in (
        lambda: wrapped.predict(rows(4), batch_size=0),
        lambda: wrapped.predict(np.zeros((4, 5), np.float32)),
        lambda: wrapped.predict(np.zeros((0, 4), np.float32)),
        lambda: wrapped.predict({"nothing": rows(4)}),
        lambda: wrapped.predict(np.float32(3)),
    ):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(TypeError, match="Keras model"):
        EIKerasModel(3)


# PyTorch

torch = pytest.importorskip("torch")


class Nest(torch.nn.Module):  # type: ignore[misc]
    """Returns a nest, and has control flow that a trace would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        y = self.inner(x)
        if bool((y.sum() > 0).item()):
            y = y + 100
        return y, [y.softmax(1), y.argmax(1)]


def script_of(module: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module.eval())


def plain() -> Any:
    torch.manual_seed(0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(torch.nn.Linear(4, 3).eval(), torch.ones(1, 4))


@pytest.mark.torch
def test_optimized_execution_takes_a_target_and_leaves_pytorch_as_it_was() -> None:
    from accelrt.compat.eia import optimized_execution
    from accelrt.compat.eia import torch as eia_torch

    assert eia_torch.jit.optimized_execution is optimized_execution
    assert eia_torch.nn is torch.nn and eia_torch.jit.load is torch.jit.load
    script, x = plain(), torch.randn(5, 4)
    before = {cls: cls.__dict__["forward"] for cls in (torch.jit.ScriptModule, torch.jit.TopLevelTracedModule)}
    with torch.no_grad():
        expected = script(x)
        with optimized_execution(True):
            torch.testing.assert_close(script(x), expected)
        with optimized_execution(True, {"target_device": "eia:0"}):
            for count in (5, 2, 5):
                torch.testing.assert_close(script(x[:count]), expected[:count])
            torch.testing.assert_close(script.forward(x), expected)
            with optimized_execution(True, {"target_device": "eia:1"}):
                torch.testing.assert_close(script(x), expected)
    assert all(cls.__dict__["forward"] is own for cls, own in before.items())


@pytest.mark.torch
def test_the_context_is_one_threads_and_its_modules_really_run_elsewhere(two_accelerators: str) -> None:
    from accelrt.compat.eia import optimized_execution, scripts

    script, x = plain(), torch.randn(5, 4)
    entered, done = threading.Event(), threading.Event()
    calls: list[Any] = []

    def inside() -> None:
        with torch.no_grad(), optimized_execution(True, {"target_device": "eia:1"}):
            calls.append(script(x))
            entered.set()
            done.wait(300)

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(300)
    (bound,) = scripts._BOUND[script].values()
    (program,) = bound._programs.values()
    ran = program.session.stats().replicas[0]
    assert (ran.devices, ran.calls) == (("eia:1",), 1)
    with torch.no_grad():
        torch.testing.assert_close(script(x), calls[0])  # this thread's call is PyTorch's own
    assert program.session.stats().replicas[0].calls == 1
    done.set()
    thread.join()
    with pytest.raises(RuntimeError, match="has no device 7"), optimized_execution(True, {"target_device": "eia:7"}):
        script(x)


@pytest.mark.torch
def test_attach_eia_gives_a_module_that_computes_on_the_device(two_accelerators: str) -> None:
    from accelrt.compat.eia import torcheia

    script, x = script_of(Nest()), torch.randn(5, 4)
    torch._C._jit_set_profiling_executor(False)
    attached = torcheia.jit.attach_eia(script, 1)
    assert isinstance(attached, torch.jit.ScriptModule)
    with torch.no_grad(), torch.jit.optimized_execution(True):
        for given in (x, x + 100, x - 100):
            value, (soft, best) = attached(given)
            wanted, (wanted_soft, wanted_best) = script(given)
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(soft, wanted_soft)
            assert best.dtype == torch.int64 and torch.equal(best, wanted_best)
        attached.forward(x)
    (program,) = attached.__dict__["forward"]._programs.values()
    ran = program.session.stats().replicas[0]
    assert ran.devices == ("eia:1",) and ran.calls == 4
    torch.testing.assert_close(script(x)[0], Nest.forward(script, x)[0])


@pytest.mark.torch
def test_what_pytorchs_interfaces_refuse() -> None:
    from accelrt.compat.eia import attach_eia, optimized_execution

    for wrong in ({"target_device": "eia"}, {"target_device": "eia:01"}, {"target_device": "cuda:0"}, {"device": "eia:0"},
                  {"target_device": "eia:0", "more": 1}, "eia:0"):  # fmt: skip
        with pytest.raises(ValueError, match="eia:"), optimized_execution(True, wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(TypeError, match="ScriptModule"):
        attach_eia(torch.nn.Linear(1, 1), 0)
    with pytest.raises(TypeError, match="ordinal"):
        attach_eia(plain(), "eia:0")
    with pytest.raises(ValueError, match="ordinal"):
        attach_eia(plain(), -1)
    with pytest.raises(TypeError, match="takes tensors"):
        attach_eia(plain(), 0)(3)


# The command


class Listed(Backend):
    """The vendor's engines with its tool, and one endpoint."""

    name: ClassVar[str] = "eia"

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (PredictorEngine(root=TOOL), TorchEiaEngine(root=TOOL))

    def devices(self) -> list[Device]:
        return [
            Device(
                "eia", 0, "grpc://far:8001, accelrt 0.1.0", 3 << 30, {"health": "ready", "address": "grpc://far:8001"}
            )
        ]


def test_describe_lists_endpoints_and_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt import inventory

    backend = Listed()
    monkeypatch.setitem(REGISTRY._backends, "eia", backend)
    monkeypatch.setattr(inventory, "backend", lambda name: inventory._describe(name, "test", None))
    monkeypatch.setenv("STAND_IN_ACCELERATORS", "eia2.medium,eia2.xlarge")
    for engine in backend.engines:  # as if the vendor's packages were here: what they see is what the tool lists
        found = __import__("accelrt_eia.discovery", fromlist=["from_tool"]).from_tool(
            TOOL / "opt/amazon/ei/ei_tools/bin/ei"
        )
        engine._known.update(facts={"versions": {"x": "1"}}, found=found)  # type: ignore[attr-defined]
        monkeypatch.setattr(engine, "installed", lambda: True)
    result = CliRunner().invoke(app, ["eia", "describe", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["attached_accelerators"] == 3
    assert data["devices"][0]["id"] == "grpc://far:8001"
    assert [(one["of"], one["type"], one["status"], one["memory_bytes"]) for one in data["devices"]] == [
        ("eia", "accelrt 0.1.0", "ready", 3 << 30),
        ("eia/predictor", "eia2.medium", "healthy", 2 << 30),
        ("eia/predictor", "eia2.xlarge", "healthy", 8 << 30),
    ]
    text = CliRunner().invoke(app, ["eia", "describe"]).stdout
    assert "Attached accelerators: 3" in text and "    Type: eia2.xlarge\n" in text and "    Memory: 8.6 GB" in text


def test_an_inventory_of_one_backend() -> None:
    from accelrt import inventory

    found = inventory.backend("neuron")
    assert found is not None and found.name == "neuron" and found.engines
    assert inventory.backend("nothing") is None


def test_describe_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt import inventory

    backend = Listed()
    monkeypatch.setattr(backend, "devices", list)
    monkeypatch.setitem(REGISTRY._backends, "eia", backend)
    monkeypatch.setattr(inventory, "backend", lambda name: inventory._describe(name, "test", None))
    result = CliRunner().invoke(app, ["eia", "describe"])
    assert result.exit_code == 1
    assert "ACCELRT_EIA_ACCELERATORS names no endpoint" in result.stdout and "closed the service" in result.stdout
