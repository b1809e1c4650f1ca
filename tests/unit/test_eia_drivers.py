"""The drivers of Amazon's Elastic Inference, held by stand-ins: find, load, run, crash; nothing ran on an accelerator."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import accelrt
from accelrt.backend import Backend, Device, Engine
from accelrt.errors import (
    AccelrtError,
    BackendUnavailable,
    CoresUnavailable,
    DeviceLost,
    ExecutionError,
    IncompatibleProgram,
    OptionError,
    OutOfDeviceMemory,
)
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.registry import REGISTRY
from accelrt_eia import discovery, vendor_side
from accelrt_eia.discovery import GIB, from_banner, from_text, visible
from accelrt_eia.failures import typed
from accelrt_eia.predictor import PredictorEngine, PredictorOptions
from accelrt_eia.torcheia import TorchEiaEngine, TorchEiaOptions
from accelrt_eia.vendor_process import VendorDied, VendorError, VendorProcess

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "stand_ins" / "eia"
TOOL = STAND_INS / "tool"


class VendorBackend(Backend):
    """The vendor's engines alone, by a name of its own."""

    name: ClassVar[str] = "eiavendor"
    root: ClassVar[Path] = TOOL

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (PredictorEngine(root=self.root), TorchEiaEngine(root=self.root))

    def devices(self) -> list[Device]:
        return []


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EI_VISIBLE_DEVICES", "STAND_IN_ACCELERATORS", "STAND_IN_EIA_FAILS", "ACCELRT_EIA_PREDICTOR_PYTHON",
                 "ACCELRT_EIA_TORCHEIA_PYTHON"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def backend() -> Iterator[str]:
    REGISTRY.register(VendorBackend)
    yield "eiavendor"
    REGISTRY.unregister("eiavendor")


# What lists accelerators

LISTED = (
    '{"ei_client_version": "1.5.0", "time": "Fri Nov 1 03:09:38 2019", "attached_accelerators": 2, "devices": ['
    '{"ordinal": 0, "type": "eia1.xlarge", "id": "eia-679e4c62", "status": "healthy"},'
    '{"ordinal": 1, "type": "eia2.medium", "id": "eia-6c414c62", "status": "unhealthy"}]}'
)
SET = (
    '{"acceleratorSet": [{"acceleratorHealth": {"status": "Ok"}, "acceleratorType": "eia2.large", '
    '"acceleratorId": "eia-0a", "availabilityZone": "us-east-1a", "attachedResource": "arn"}]}'
)
BANNER = """Using Amazon Elastic Inference Client Library Version: 1.2.12
Number of Elastic Inference Accelerators Available: 1
Elastic Inference Accelerator ID: eia-813736
Elastic Inference Accelerator Type: eia1.medium
"""


def test_what_the_tool_prints_is_read() -> None:
    first, second = from_text(LISTED).accelerators
    assert (first.ordinal, first.id, first.type, first.health) == (0, "eia-679e4c62", "eia1.xlarge", "healthy")
    assert (first.memory_bytes, second.memory_bytes, second.health) == (4 * GIB, 2 * GIB, "unhealthy")
    assert from_text(LISTED).client_version == "1.5.0"
    (one,) = from_text("Accelerator:  " + SET).accelerators
    assert (one.id, one.type, one.health, one.memory_bytes) == ("eia-0a", "eia2.large", "Ok", 4 * GIB)
    assert one.device().properties["accelerator_type"] == "eia2.large"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"devices": 3}', '{"devices": [4]}', "null", "{}", '{"devices": {}}'])
def test_what_cannot_be_read_lists_none_and_says_so(text: str) -> None:
    found = from_text(text)
    assert not found.accelerators and found.problem


def test_the_clients_banner_is_read() -> None:
    found = from_banner("noise\n" + BANNER)
    assert found.client_version == "1.2.12"
    assert [(a.id, a.type, a.memory_bytes, a.health) for a in found.accelerators] == [
        ("eia-813736", "eia1.medium", GIB, "unknown")
    ]
    assert from_text(BANNER).accelerators[0].origin == "tool"
    assert "Failed to detect" in from_banner("Failed to detect any accelerator").problem
    assert len(from_banner("Number of Elastic Inference Accelerators Available: 99999999999").accelerators) <= 64


def test_visible_devices_are_counted_anew() -> None:
    found = from_text(LISTED)
    assert visible(found, {}) == found
    chosen = visible(found, {"EI_VISIBLE_DEVICES": "eia-6c414c62,0"}).accelerators
    assert [(a.ordinal, a.id) for a in chosen] == [(0, "eia-6c414c62"), (1, "eia-679e4c62")]
    assert visible(found, {"EI_VISIBLE_DEVICES": ""}).accelerators == ()
    assert "'7'" in visible(found, {"EI_VISIBLE_DEVICES": "7"}).problem


def test_the_tool_is_asked_and_may_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = TOOL / discovery.TOOL
    monkeypatch.setenv("STAND_IN_ACCELERATORS", "eia1.large,eia2.xlarge")
    assert [a.type for a in discovery.from_tool(tool).accelerators] == ["eia1.large", "eia2.xlarge"]
    monkeypatch.setenv("STAND_IN_ACCELERATORS", "")
    found = discovery.from_tool(tool)
    assert not found.accelerators
    assert "signal 11" in found.problem and "Failed to detect any accelerator" in found.problem


# Errors

OOM = (
    "EI Error Code: [12, 5, 13]\nEI Error Description: Internal error\nEI Request ID: 5\nEI Accelerator ID: eia-1\n"
    "EI Client Version: 1.2.12"
)


@pytest.mark.parametrize(
    ("error", "loading", "kind"),
    [
        (VendorError("RuntimeError", OOM), True, OutOfDeviceMemory),
        (VendorError("InternalError", OOM), False, OutOfDeviceMemory),
        (VendorError("RuntimeError", "EI Error Code: [1, 2, 3]"), False, ExecutionError),
        (VendorDied("It was killed by SIGSEGV", "Failed to detect any accelerator"), True, CoresUnavailable),
        (VendorDied("It was killed by SIGSEGV", "Preconditions not met for reaching Accelerator"), False, DeviceLost),
        (VendorDied("It was killed by SIGSEGV", ""), False, DeviceLost),
        (VendorDied("It was killed by SIGABRT", ""), True, IncompatibleProgram),
        (VendorError("OSError", "SavedModel file does not exist"), True, IncompatibleProgram),
        (VendorError("RuntimeError", "class '__torch__.A' already defined."), True, IncompatibleProgram),
        (VendorError("ValueError", "Incorrect input name: z."), False, ExecutionError),
    ],
)
def test_the_clients_errors_become_accelrts(error: Any, loading: bool, kind: type[AccelrtError]) -> None:
    found = typed(error, "Doing it", "predictor", loading=loading)
    assert type(found) is kind
    assert found.backend == "predictor" and "Doing it" in found.message


# The process and its script


def test_the_script_is_one_that_python_3_6_runs() -> None:
    source = Path(vendor_side.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "__future__" not in imported, "annotations of the future are of 3.7"
    assert imported <= {"importlib", "inspect", "json", "numpy", "os", "pathlib", "sys", "tempfile", "typing", "tensorflow",
                        "torch"}  # fmt: skip


def test_a_python_that_is_not_there_is_said_so() -> None:
    with pytest.raises(VendorDied, match=r"no/such/python cannot be started"):
        VendorProcess("/no/such/python")
    with pytest.raises(VendorDied, match="ended with code"):
        VendorProcess("/bin/false").call("facts", 20, kind="predictor")


def test_arrays_cross_as_they_are(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.array(3, np.int64),
        "none": np.zeros((0, 4), np.float32),
        "turned": np.arange(12, dtype=np.float16).reshape(3, 4).T,
        "bool": np.array([True, False]),
    }
    path = tmp_path / "wire"
    with path.open("wb") as stream:
        vendor_side.write(stream, {"a": 1}, arrays)
    with path.open("rb") as stream:
        found = vendor_side.read(stream)
        assert found is not None and vendor_side.read(stream) is None
    header, values = found
    assert header["a"] == 1
    for (name, value), (listed, *_), got in zip(arrays.items(), header["arrays"], values, strict=True):
        assert name == listed and got.dtype == value.dtype and got.shape == value.shape
        np.testing.assert_array_equal(got, value)


def test_options_are_checked() -> None:
    for options in (PredictorOptions, TorchEiaOptions):
        with pytest.raises(OptionError, match="timeout_s"):
            options(timeout_s=0)


def test_without_the_vendors_packages_the_status_says_that_the_service_is_closed() -> None:
    for engine in (PredictorEngine(root=TOOL), TorchEiaEngine(root=TOOL)):
        status = engine.status()
        assert not status.usable and engine.devices() == ()
        assert "not installed" in str(status.reason) and "closed the service" in str(status.reason)
        assert "ACCELRT_BACKEND=cpu" in str(status.remedy)


def test_only_whole_models_of_numpys_types() -> None:
    half = Signature((Port("x", TensorType("bfloat16", (2,))),), (Port("y", TensorType("float32", (2,))),))
    full = Signature((Port("x", TensorType("float32", (2,))),), (Port("y", TensorType("float32", (2,))),))
    engine = PredictorEngine()
    assert engine.supports_source("saved_model", full, "fp32").supported
    assert "bfloat16" in engine.supports_source("saved_model", half, "fp32").reason
    assert "torchscript" in engine.supports_source("torchscript", full, "fp32").reason
    assert "not in fp16" in engine.supports_source("saved_model", full, "fp16").reason


# TensorFlow's predictor

DOCUMENTED = (
    "(self, model_dir, signature_def_key=None, signature_def=None, input_names=None, output_names=None, tags=None, "
    "graph=None, config=None, use_ei=True, accelerator_id=0)"
)


def saved(folder: Path) -> tuple[Path, Any]:
    """Write a SavedModel with two signatures; return it and its weights."""
    tf = pytest.importorskip("tensorflow")
    weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)

    class Two(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(weights)

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def product(self, x: Any) -> Any:
            return {"scores": x @ self.w, "best": tf.argmax(x @ self.w, axis=1)}

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def total(self, x: Any) -> Any:
            return {"total": tf.reduce_sum(x, axis=1)}

    module = Two()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.product, "total": module.total})
    return folder, weights


@pytest.mark.tensorflow
def test_a_saved_model_runs_through_the_predictor(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STAND_INS / "tensorflow2"))
    monkeypatch.setenv("STAND_IN_ACCELERATORS", "eia2.medium,eia2.xlarge")
    path, weights = saved(tmp_path / "model")
    artifact = accelrt.compile(path, f"{backend}/predictor")
    assert "at the first call" in " ".join(artifact.explain().split())
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    with accelrt.load(artifact, devices=[1]) as session:
        assert session.stats().replicas[0].devices == ("eia:1",)
        found = session.predict({"x": x})
        assert found["best"].dtype == np.int64
        np.testing.assert_allclose(found["scores"], x @ weights, rtol=1e-5)
        np.testing.assert_allclose(session.predict({"x": x[:2]})["scores"], x[:2] @ weights, rtol=1e-5)


@pytest.mark.tensorflow
def test_a_crash_of_the_client_is_a_status_and_use_ei_false_needs_no_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STAND_INS / "tensorflow2"))
    monkeypatch.setenv("STAND_IN_ACCELERATORS", "")
    pytest.importorskip("tensorflow")
    engine = PredictorEngine(root=tmp_path)  # no tool: the client itself is tried, and dies
    status = engine.status()
    assert not status.usable and engine.devices() == ()
    assert "Failed to detect any accelerator" in str(status.reason) and "closed the service" in str(status.reason)
    host = engine.with_options(PredictorOptions(use_ei=False))
    assert host.status().usable and len(host.devices() or ()) == 1
    assert (engine.facts() or {})["parameters"] == [
        name for name in inspect.signature(eval_signature(DOCUMENTED)).parameters if name != "self"
    ]


def eval_signature(text: str) -> Any:
    """Return a function with these parameters."""
    scope: dict[str, Any] = {}
    exec(f"def function{text}: pass", scope)
    return scope["function"]


# PyTorch


@pytest.mark.torch
@pytest.mark.parametrize(
    ("generation", "fails"),
    [
        ("pytorch151", ("crash", DeviceLost, "killed by SIGSEGV")),
        ("pytorch131", ("memory", OutOfDeviceMemory, "does not fit")),
    ],
)
def test_torchscript_runs_through_both_generations(
    generation: str,
    fails: tuple[str, type[AccelrtError], str],
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(STAND_INS / generation))
    monkeypatch.setenv("STAND_IN_ACCELERATORS", "eia2.medium,eia2.xlarge")
    torch.manual_seed(0)

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, x: Any, shift: Any) -> Any:
            y = self.inner(x) + shift
            return y, y.argmax(dim=1)

    module = Net().eval()
    x, shift = torch.randn(5, 4), torch.ones(3)
    path = tmp_path / "net.pt"
    torch.jit.trace(module, (x, shift)).save(str(path))
    artifact = accelrt.compile(path, f"{backend}/torcheia", example_inputs=(x, shift), input_names=["x", "shift"])
    facts = REGISTRY.backend(backend).engines[1].facts()  # type: ignore[attr-defined]
    assert facts["api"] == {"pytorch151": "torcheia", "pytorch131": "optimized_execution"}[generation]
    with torch.no_grad():
        expected = module(x, shift)
    with accelrt.load(artifact, devices=[1]) as session:
        found = session.predict({"x": x.numpy(), "shift": shift.numpy()})
        for value, wanted in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(value, wanted.numpy(), rtol=1e-5)
    failure, kind, words = fails
    monkeypatch.setenv("STAND_IN_EIA_FAILS", failure)
    with accelrt.load(artifact, fallback="error") as session, pytest.raises(ExecutionError) as raised:
        session.predict({"x": x.numpy(), "shift": shift.numpy()})
    assert type(raised.value.__cause__) is kind and words in str(raised.value.__cause__)


@pytest.mark.torch
def test_stock_pytorch_is_not_taken_for_the_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("ACCELRT_EIA_TORCHEIA_PYTHON", sys.executable)
    status = TorchEiaEngine(root=TOOL).status()
    assert not status.usable and "without Elastic Inference" in str(status.reason)


def test_asked_for_by_name_and_not_there(backend: str) -> None:
    from accelrt.data import digits_model

    with pytest.raises(BackendUnavailable, match="closed the service"):
        accelrt.compile(digits_model(), f"{backend}/predictor")


# What the script makes of the vendor's signatures, without the vendor


class Recorded:
    """Notes what it was constructed with; its parameters are the test's."""

    calls: ClassVar[list[dict[str, Any]]] = []


def predictor_like(parameters: str) -> type:
    scope: dict[str, Any] = {"Recorded": Recorded}
    exec(f"def __init__{parameters}: Recorded.calls.append(dict(locals()))", scope)
    return type("EIPredictor", (), {"__init__": scope["__init__"]})


def test_the_ordinal_goes_where_the_build_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorded.calls.clear()
    monkeypatch.setattr(vendor_side, "predictor_class", lambda: predictor_like(DOCUMENTED))
    vendor_side.make_predictor(2, True, model_dir="m", signature_def_key="k")
    assert (Recorded.calls[-1]["accelerator_id"], Recorded.calls[-1]["use_ei"]) == (2, True)
    assert "EI_VISIBLE_DEVICES" not in vendor_side.os.environ

    old = DOCUMENTED.replace(", accelerator_id=0", "")
    monkeypatch.setattr(vendor_side, "predictor_class", lambda: predictor_like(old))
    monkeypatch.setenv("EI_VISIBLE_DEVICES", "eia-a,eia-b,eia-c")
    vendor_side.make_predictor(2, True, model_dir="m")
    assert vendor_side.os.environ["EI_VISIBLE_DEVICES"] == "eia-c"

    changed = DOCUMENTED.replace("model_dir", "export_dir")
    monkeypatch.setattr(vendor_side, "predictor_class", lambda: predictor_like(changed))
    with pytest.raises(TypeError, match="model_dir"):
        vendor_side.make_predictor(0, True, model_dir="m")


def test_the_stand_ins_have_the_documented_signatures() -> None:
    path = STAND_INS / "common" / "ei_predictor_stand_in.py"
    classes = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef) and n.name == "EIPredictor"
    ]
    late, early = (ast.unparse(one.body[0].args) for one in classes)  # type: ignore[attr-defined]
    assert f"({late})".replace("=", "=") == DOCUMENTED
    assert f"({early})" == DOCUMENTED.replace(", accelerator_id=0", "")
    attach = ast.parse((STAND_INS / "pytorch151" / "torcheia" / "jit.py").read_text())
    (function,) = [n for n in attach.body if isinstance(n, ast.FunctionDef)]
    assert (function.name, ast.unparse(function.args)) == ("attach_eia", "obj, device")


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\necho 'waiting for the accelerator'\nexec sleep 60\n")
    sleeper.chmod(0o755)
    process = VendorProcess(str(sleeper))
    with pytest.raises(VendorDied, match=r"did not answer within 0\.5 s.*waiting for the accelerator"):
        process.call("facts", 0.5, kind="predictor")
    with pytest.raises(VendorDied, match="closed"):
        process.call("facts", 0.5, kind="predictor")
    process.close()


def test_what_the_script_raises_comes_back_as_it_was() -> None:
    process = VendorProcess()
    try:
        with pytest.raises(VendorError, match="nothing") as raised:
            process.call("facts", 30, kind="nothing")
        assert raised.value.kind == "KeyError"
        with pytest.raises(VendorError):
            process.call("run", 30, {"x": np.ones(3)})  # nothing was opened
    finally:
        process.close()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"../evil": b"", "accelrt.json": b"{}"}, "outside"),
        ({"/evil": b"", "accelrt.json": b"{}"}, "outside"),
        ({"a\\..\\evil": b"", "accelrt.json": b"{}"}, "outside"),
        ({"saved_model.pb": b""}, "cannot be read"),
        ({"accelrt.json": b"[]"}, "lacks"),
        ({"accelrt.json": b"{"}, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_packed_model_that_is_none_is_refused(entries: Any, words: str, tmp_path: Path) -> None:
    import zipfile

    from accelrt.backend import Program

    path = tmp_path / "saved_model.zip"
    if entries is None:
        path.write_bytes(b"no zip at all")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    program = Program({"saved_model.zip": path}, {}, Signature((), ()), PredictorOptions())
    with pytest.raises(IncompatibleProgram, match=words):
        PredictorEngine().plan(program, 0)
    assert not (tmp_path.parent / "evil").exists()
