"""The drivers of the vendor's SDKs, held by stand-ins with the vendor's signatures: compile, place, load, run, fail."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelrt import isolation
from accelrt.backend import Device, Program
from accelrt.errors import (
    AccelrtError,
    CompileError,
    CoresUnavailable,
    DeviceLost,
    ExecutionError,
    IncompatibleProgram,
    IsolatedError,
    OptionError,
    OutOfDeviceMemory,
    UntrustedProgram,
)
from accelrt.graph.types import Port, Signature, TensorType
from accelrt_neuron.tensorflow_neuron import TensorFlowNeuronEngine, TensorFlowNeuronOptions
from accelrt_neuron.torch_engines import coverage_of
from accelrt_neuron.torch_neuron import TorchNeuronEngine, TorchNeuronOptions
from accelrt_neuron.torch_neuronx import TorchNeuronxEngine, TorchNeuronxOptions

torch = pytest.importorskip("torch")

STAND_INS = Path(__file__).parents[1] / "stand_ins" / "neuron"
PACKAGES = ("torch_neuronx", "torch_neuron")

X4 = Signature((Port("x", TensorType("float32", (4, 8))),), (Port("y", TensorType("float32", (4, 3))),))
pytestmark = pytest.mark.torch


def _forget_packages() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in PACKAGES]:
        del sys.modules[name]


_child_sees: list[Path] = []
"""The stand-ins of the child at hand; it is kept from test to test, because it takes seconds to import PyTorch."""


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Return a function that puts stand-ins on the import path, of this process and of the child."""

    def put(folder: Path) -> None:
        _forget_packages()
        monkeypatch.syspath_prepend(str(folder))
        if _child_sees != [folder]:
            isolation.restart()
            _child_sees[:] = [folder]

    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    yield put
    _forget_packages()


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that tells the stand-ins how to behave, in this process and in a child of the test's own."""

    def tell(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        isolation.restart()

    yield tell
    isolation.restart()


@pytest.fixture(scope="module", autouse=True)
def _child_of_its_own() -> Iterator[None]:
    yield
    isolation.restart()


@pytest.fixture
def sdk(use: Callable[[Path], None]) -> Any:
    """The stand-ins for PyTorch, and the runtime under them with a clean record."""
    use(STAND_INS / "pytorch")
    runtime = importlib.import_module("neuron_stand_in")
    runtime.CALLS.clear()
    return runtime


def cores(*indices: int) -> list[Device]:
    return [Device("neuron", i, f"core {i}", 1 << 34, {"nature": "real", "visible_index": str(i)}) for i in indices]


def mlp() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()


def sorting() -> Any:
    """A sequence whose middle no Neuron compiler takes."""

    class Sort(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.sort(x, dim=1)[0]

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), Sort(), torch.nn.Linear(16, 3)).eval()


def exported(module: Any, folder: Path) -> Path:
    path = folder / "source.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(4, 8),)), path)
    return path


def scripted(module: Any, folder: Path) -> Path:
    path = folder / "source.pt"
    torch.jit.save(torch.jit.trace(module, torch.zeros(4, 8)), path)
    return path


def build(engine: Any, source: Path, folder: Path, format: str = "torchscript", precision: Any = "bf16") -> Program:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    program: Program = engine.compile_source(source, format, X4, precision, engine._options, out)
    return program


def x_of(rows: int = 4) -> Any:
    return np.random.default_rng(1).standard_normal((rows, 8)).astype(np.float32)


def expected(module: Any, x: Any) -> Any:
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


def header(program: Program) -> dict[str, Any]:
    """Return what the stand-in was told when it compiled a program."""
    runtime = importlib.import_module("neuron_stand_in")
    script = runtime._LOAD(str(program.files["neuron.pt"]))
    found: dict[str, Any] = runtime.header_of(next(b for n, b in script.named_buffers() if n.endswith("neff")))
    return found


ENGINES = {
    "torch-neuronx": (TorchNeuronxEngine, TorchNeuronxOptions),
    "torch-neuron": (TorchNeuronEngine, TorchNeuronOptions),
}


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> Any:
    """Both engines for PyTorch: the class and its options."""
    return ENGINES[request.param]


# The stand-ins are what the reference says

SIGNATURES = {
    "torch_neuronx:trace": "(func, example_inputs, *_, input_output_aliases={}, compiler_workdir=None, "
    "compiler_args=None, partitioner_config=None, inline_weights_to_neff=True, cpu_backend=False)",
    "torch_neuronx:PartitionerConfig": "(*, trace_kwargs=None, model_support_percentage_threshold=0.5, "
    "min_subgraph_size=-1, max_subgraph_count=-1, ops_to_partition=None, analyze_parameters=None)",
    "torch_neuronx:dynamic_batch": "(neuron_script)",
    "torch_neuronx:lazy_load": "(trace, enable_lazy_load=True)",
    "torch_neuronx:async_load": "(trace, enable_async_load=True)",
    "torch_neuronx:DataParallel": "(model, device_ids=None, dim=0, set_dynamic_batching=True)",
    "torch_neuronx:set_neuron_cores": "(trace, start_nc=-1, nc_count=-1)",
    "torch_neuronx:neuron_cores_context": "(start_nc=-1, nc_count=-1)",
    "torch_neuronx:replace_weights": "(neuron_model, weights)",
    "torch_neuronx.experimental:set_neuron_cores": "(trace, start_nc=-1, nc_count=-1)",
    "torch_neuron:DataParallel": "(model, device_ids=None, dim=0)",
    "torch_neuron.experimental:set_neuron_cores": "(trace, start_nc=-1, nc_count=-1)",
    "torch_neuron.experimental:set_multicore": "(trace)",
    "torch_neuron.experimental:neuron_cores_context": "(start_nc=-1, nc_count=-1)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_stand_ins_have_the_documented_signatures(sdk: Any, name: str) -> None:
    module, _, attribute = name.partition(":")
    assert str(inspect.signature(getattr(importlib.import_module(module), attribute))) == SIGNATURES[name]


def test_torch_neuron_trace_has_every_documented_argument(sdk: Any) -> None:
    parameters = inspect.signature(importlib.import_module("torch_neuron").trace).parameters
    defaults = {"minimum_segment_size": 2, "single_fusion_ratio_threshold": 0.6, "fallback": True,
                "dynamic_batch_size": False, "separate_weights": False, "compiler_args": None,
                "compiler_timeout": None, "compiler_workdir": None, "subgraph_builder_function": None,
                "optimizations": None}  # fmt: skip
    assert {name: parameters[name].default for name in defaults} == defaults


# Status


def test_an_engine_without_its_package_says_what_installs_it(kind: Any) -> None:
    status = kind[0]().status()
    assert not status.usable
    assert "is not installed" in status.reason
    assert "pip.repos.neuron.amazonaws.com" in status.remedy


def test_an_engine_with_its_package_can_compile_without_a_device(sdk: Any, kind: Any) -> None:
    engine = kind[0]()
    status = engine.status()
    assert status.usable, status
    assert status.version == engine.fingerprint()[engine.name]
    assert "torch" in engine.fingerprint()
    assert "torch_neuronx" not in sys.modules, "the package was imported to be looked at"


@pytest.mark.parametrize("content", ["empty", "raises"])
def test_the_placeholder_of_the_public_index_is_recognised(
    use: Callable[[Path], None], tmp_path: Path, content: str
) -> None:
    shutil.copytree(STAND_INS / "placeholder", tmp_path / "index")
    if content == "raises":
        (tmp_path / "index" / "torch_neuronx" / "__init__.py").write_text('raise RuntimeError("wrong package")\n')
    use(tmp_path / "index")
    status = TorchNeuronxEngine().status()
    assert not status.usable
    assert "placeholder" in status.reason
    assert status.remedy.startswith(
        "pip uninstall -y torch-neuronx && pip install neuronx-cc torch-neuronx --extra-index"
    )


def test_doctor_prints_the_vendors_command_for_the_placeholder() -> None:
    done = _accelrt(["doctor", "neuron/torch-neuronx"], STAND_INS / "placeholder")
    text = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "placeholder of the public package index" in text
    assert "--extra-index-url https://pip.repos.neuron.amazonaws.com" in text


def test_the_report_shows_the_signatures_that_were_found(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = _accelrt(["doctor", "--report", str(path)], STAND_INS / "pytorch")
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    details = json.loads(path.read_text())["details"]["neuron"]
    assert details["packages"]["torch-neuronx"]["signatures"]["trace"] == SIGNATURES["torch_neuronx:trace"]
    assert details["packages"]["torch-neuronx"]["versions"]["neuronx-cc"] == "2.21.18209.0"
    assert details["packages"]["tensorflow-neuron"] is None


def test_a_package_that_takes_the_process_down_is_a_status(use: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "torch_neuronx").mkdir()
    (tmp_path / "torch_neuronx" / "__init__.py").write_text("import os; os.abort()\n")
    use(tmp_path)
    status = TorchNeuronxEngine().status()
    assert not status.usable
    assert "SIGABRT" in status.reason


def test_whole_models_are_taken_by_form_size_and_precision(kind: Any) -> None:
    engine = kind[0]()
    assert engine.supports_source("torch.export", X4, "bf16").supported
    assert engine.supports_source("torchscript", X4, "fp16").supported
    opened = Signature((Port("x", TensorType("float32", ("n", 8))),), X4.outputs)
    for verdict, text in (
        (engine.supports_source("saved_model", X4, "bf16"), "the source is saved_model"),
        (engine.supports_source("onnx", X4, "bf16"), "the source is onnx"),
        (engine.supports_source("torch.export", opened, "bf16"), "static shapes"),
        (engine.supports_source("torch.export", X4, "int8"), "quantised"),
        (TensorFlowNeuronEngine().supports_source("saved_model", X4, "fp32"), "no float32 matrix product"),
        (TensorFlowNeuronEngine().supports_source("saved_model", opened, "bf16"), "static shapes"),
        (TensorFlowNeuronEngine().supports_source("torchscript", X4, "bf16"), "the source is torchscript"),
    ):
        assert not verdict.supported
        assert text in verdict.reason


# Compiling


@pytest.mark.parametrize("format", ["torchscript", "torch.export"])
def test_a_whole_model_is_compiled_placed_and_run(sdk: Any, kind: Any, tmp_path: Path, format: str) -> None:
    engine = kind[0]()
    source = (scripted if format == "torchscript" else exported)(mlp(), tmp_path)
    program = build(engine, source, tmp_path, format)
    assert program.fingerprint == engine.fingerprint()
    found = coverage_of(program)
    assert found["programs"] == 1
    assert found["on_device"] == found["total"] > 0
    assert found["on_cpu"] == {}
    with engine.load(program, cores(1, 2)) as executable:
        x = x_of()
        x.flags.writeable = False
        np.testing.assert_allclose(executable.run({"x": x})["y"], expected(mlp(), x), rtol=1e-5, atol=1e-6)
    placed = [call for call in sdk.CALLS if "cores" in call[0]]
    assert placed == [(placed[0][0], {"start_nc": 1, "nc_count": 2})]


def test_a_closed_program_does_not_run(sdk: Any, kind: Any, tmp_path: Path) -> None:
    engine = kind[0]()
    executable = engine.load(build(engine, scripted(mlp(), tmp_path), tmp_path), cores(0))
    executable.close()
    with pytest.raises(RuntimeError, match="closed"):
        executable.run({"x": x_of()})


def test_neuronx_always_passes_its_casts(sdk: Any, tmp_path: Path) -> None:
    source = scripted(mlp(), tmp_path)
    for precision, options, wanted in (
        ("bf16", {}, "--auto-cast all --auto-cast-type bf16"),
        ("bf16", {"auto_cast": "matmult"}, "--auto-cast matmult --auto-cast-type bf16"),
        ("bf16", {"auto_cast_type": "fp8_e4m3"}, "--auto-cast all --auto-cast-type fp8_e4m3"),
        ("fp16", {}, "--auto-cast all --auto-cast-type fp16"),
        ("fp32", {}, "--auto-cast none"),
    ):
        engine = TorchNeuronxEngine(TorchNeuronxOptions(target="trn1", **options))
        told = header(build(engine, source, tmp_path, precision=precision))
        assert " ".join(told["args"]) == f"--target trn1 {wanted} --optlevel 2 --model-type generic"
        assert told["cpu_backend"]
        assert told["lazy"], "it would be loaded twice: by torch.jit.load, and where it is placed"


def test_neuron_cc_always_gets_its_casts(sdk: Any, tmp_path: Path) -> None:
    source = scripted(mlp(), tmp_path)
    for precision, options, wanted in (
        ("bf16", {}, ["--fast-math", "all"]),
        ("bf16", {"auto_cast": "matmult"}, ["--fast-math", "none"]),
        ("fp16", {}, ["--fast-math", "fp32-cast-all-fp16"]),
        ("bf16", {"pipeline_cores": 4}, ["--fast-math", "all", "--neuroncore-pipeline-cores", "4"]),
    ):
        engine = TorchNeuronEngine(TorchNeuronOptions(timeout_s=99, **options))
        told = header(build(engine, source, tmp_path, precision=precision))
        assert told["args"] == wanted
        assert told["timeout"] == 99


def test_a_pipeline_needs_its_cores(sdk: Any, tmp_path: Path) -> None:
    engine = TorchNeuronEngine(TorchNeuronOptions(pipeline_cores=4))
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    with pytest.raises(CoresUnavailable, match="pipeline over 4 cores; it was given 2"):
        engine.load(program, cores(0, 1))
    engine.load(program, cores(0, 1, 2, 3)).close()
    with pytest.raises(OptionError, match="DataParallel takes no programs that are pipelines"):
        TorchNeuronOptions(pipeline_cores=2, data_parallel_cores=2, dynamic_batch=True)


def test_precisions_the_chip_has_not_got_are_refused(sdk: Any, tmp_path: Path) -> None:
    source = scripted(mlp(), tmp_path)
    for engine, precision, text in (
        (TorchNeuronxEngine(), "int8", "quantised"),
        (TorchNeuronEngine(), "int8", "quantised"),
        (TorchNeuronxEngine(TorchNeuronxOptions(auto_cast="all")), "fp32", "casts nothing"),
        (TorchNeuronxEngine(TorchNeuronxOptions(auto_cast="none")), "bf16", "contradicts"),
        (TorchNeuronxEngine(TorchNeuronxOptions(auto_cast_type="fp16")), "bf16", "contradicts"),
    ):
        with pytest.raises(CompileError, match=text):
            build(engine, source, tmp_path, precision=precision)


@pytest.mark.parametrize(
    "change", [{"auto_cast": "matmult"}, {"target": "trn2"}, {"optlevel": 3}, {"model_type": "transformer"}, {"lnc": 1}]
)
def test_what_is_compiled_for_is_in_the_fingerprint(sdk: Any, change: dict[str, Any]) -> None:
    engine = TorchNeuronxEngine()
    assert engine.with_options(TorchNeuronxOptions(**change)).fingerprint() != engine.fingerprint()


def test_a_release_before_cpu_backend_is_not_given_it(use: Callable[[Path], None], tmp_path: Path) -> None:
    _mutate(tmp_path, "torch_neuronx/__init__.py", ("    cpu_backend=False,\n", ""), ("if cpu_backend:", "if False:"),
            ('"cpu_backend": cpu_backend', '"cpu_backend": False'))  # fmt: skip
    use(tmp_path / "pytorch")
    program = build(TorchNeuronxEngine(), scripted(mlp(), tmp_path), tmp_path)
    assert coverage_of(program)["programs"] == 1


def test_a_release_with_placement_in_experimental_is_placed_there(use: Callable[[Path], None], tmp_path: Path) -> None:
    _mutate(tmp_path, "torch_neuronx/__init__.py", ("def set_neuron_cores(", "def _set_neuron_cores("))
    use(tmp_path / "pytorch")
    runtime = importlib.import_module("neuron_stand_in")
    runtime.CALLS.clear()
    engine = TorchNeuronxEngine()
    engine.load(build(engine, scripted(mlp(), tmp_path), tmp_path), cores(3)).close()
    assert runtime.CALLS == [("experimental.set_neuron_cores", {"start_nc": 3, "nc_count": 1})]


# Segments of ONNX


@pytest.fixture
def on_inf(sdk: Any) -> Iterator[None]:
    """The neuron backend on an instance with four cores."""
    import accelrt
    from accelrt.registry import REGISTRY
    from accelrt_neuron import NeuronBackend

    class OnInf(NeuronBackend):
        def devices(self) -> list[Device]:
            return cores(0, 1, 2, 3)

    held = REGISTRY._found().pop("neuron", None)  # where the backend is installed, its name is taken
    REGISTRY._backends.pop("neuron", None)
    accelrt.register(OnInf)
    yield
    REGISTRY.unregister("neuron")
    if held is not None:
        REGISTRY._found()["neuron"] = held


def test_segments_reach_the_engines_for_pytorch(on_inf: None, sdk: Any, kind: Any, tmp_path: Path) -> None:
    """The whole way: accelrt's partitioner, the lowering, the vendor's compiler and back."""
    import accelrt
    from accelrt.testing.models import mlp as onnx_mlp

    model = onnx_mlp(batch=4)
    artifact = accelrt.compile(model, f"neuron/{kind[0].name}", fallback="error")
    (segment,) = artifact.manifest.segments
    facts = json.loads((artifact.folder / segment.files["neuron.json"]).read_text())
    assert facts["coverage"]["on_cpu"] == {}
    path = artifact.save(tmp_path / "m.accel")
    with accelrt.load(path, devices="1-2", fallback="error", trust=True) as session, accelrt.load(model) as exact:
        (port,) = session.signature.inputs
        x = np.random.default_rng(0).standard_normal(port.type.shape).astype(np.float32)  # type: ignore[union-attr]
        for name, value in exact.predict({port.name: x}).items():
            np.testing.assert_allclose(session.predict({port.name: x})[name], value, rtol=1e-4, atol=1e-5)
    # A program takes one core, so two cores are two replicas.
    placed = [facts for name, facts in sdk.CALLS if "cores" in name]
    assert placed == [{"start_nc": 1, "nc_count": 1}, {"start_nc": 2, "nc_count": 1}]


def test_a_pipeline_is_given_its_cores(on_inf: None, sdk: Any) -> None:
    import accelrt
    from accelrt.testing.models import mlp as onnx_mlp

    model, options = onnx_mlp(batch=4), {"pipeline_cores": 2}
    artifact = accelrt.compile(model, "neuron/torch-neuron", fallback="error", options=options)
    with accelrt.load(artifact, devices="0-3", fallback="error") as session, accelrt.load(model) as exact:
        (port,) = session.signature.inputs
        x = np.random.default_rng(0).standard_normal(port.type.shape).astype(np.float32)  # type: ignore[union-attr]
        for name, value in exact.predict({port.name: x}).items():
            np.testing.assert_allclose(session.predict({port.name: x})[name], value, rtol=1e-4, atol=1e-5)
    placed = [facts for name, facts in sdk.CALLS if "cores" in name]
    assert placed == [{"start_nc": 0, "nc_count": 2}, {"start_nc": 2, "nc_count": 2}]
    with pytest.raises(CoresUnavailable):
        accelrt.load(artifact, devices="3", fallback="error")


@pytest.mark.parametrize("form", ["module", "exported", "script"])
def test_a_model_of_pytorchs_own_goes_whole_to_an_engine_named(
    on_inf: None, sdk: Any, kind: Any, tmp_path: Path, form: str, behave: Callable[..., None]
) -> None:
    import accelrt

    behave(STAND_IN_UNSUPPORTED="aten::sort")
    # What torch exported is no sequence of modules any more, and the stand-in's partitioner cuts nothing else.
    module = sorting() if form == "script" else mlp()
    model = {
        "module": module,
        "exported": torch.export.export(module, (torch.zeros(4, 8),)),
        "script": torch.jit.trace(module, torch.zeros(4, 8)),
    }[form]
    given = None if form == "exported" else (torch.zeros(4, 8),)
    artifact = accelrt.compile(model, f"neuron/{kind[0].name}", example_inputs=given, fallback="error")
    whole = artifact.placement.whole
    assert whole is not None
    assert whole.format == ("torchscript" if form == "script" else "torch.export")
    if form == "script":
        assert whole.remark == "2 of 3 operators on the device, in 2 programs; on the CPU: aten::sort (1)"
    text = " ".join(artifact.explain().split())
    assert f"runs whole on neuron/{kind[0].name} ({whole.remark}), because its engine was asked for by name" in text
    path = artifact.save(tmp_path / "m.accel")
    with pytest.raises(UntrustedProgram, match=r"trust=True"):
        accelrt.load(path)
    with accelrt.load(path, devices="1-2", fallback="error", trust=True) as session:
        (port,), (out,) = session.signature.inputs, session.signature.outputs
        found = session.predict({port.name: x_of()})[out.name]
    np.testing.assert_allclose(found, expected(module, x_of()), rtol=1e-5, atol=1e-6)
    assert {"start_nc": 1, "nc_count": 1} in [facts for _, facts in sdk.CALLS]


def test_options_of_a_whole_model_reach_the_compiler(on_inf: None, sdk: Any, tmp_path: Path) -> None:
    import accelrt

    options = {"target": "trn1", "optlevel": 3}
    artifact = accelrt.compile(
        mlp(), "neuron/torch-neuronx", example_inputs=(torch.zeros(4, 8),), options=options, precision="fp16"
    )
    (segment,) = artifact.manifest.segments
    told = json.loads((artifact.folder / segment.files["neuron.json"]).read_text())["compiler_args"]
    assert " ".join(told) == ("--target trn1 --auto-cast all --auto-cast-type fp16 --optlevel 3 --model-type generic")
    assert segment.fingerprint["target"] == "trn1"


def test_a_whole_program_of_another_release_is_compiled_again(
    on_inf: None, sdk: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelrt

    artifact = accelrt.compile(mlp(), f"neuron/{kind[0].name}", example_inputs=(torch.zeros(4, 8),))
    fingerprint = kind[0].fingerprint
    monkeypatch.setattr(kind[0], "fingerprint", lambda self: {**fingerprint(self), "torch": "other"})
    with accelrt.load(artifact, fallback="allow") as session:
        (port,), (out,) = session.signature.inputs, session.signature.outputs
        found = session.predict({port.name: x_of()})[out.name]
    np.testing.assert_allclose(found, expected(mlp(), x_of()), rtol=1e-5, atol=1e-6)


def test_what_is_asked_of_onnx_is_compiled_in_segments(on_inf: None, sdk: Any, kind: Any) -> None:
    import accelrt
    from accelrt.testing.models import mlp as onnx_mlp

    target = f"neuron/{kind[0].name}"
    by_opset = accelrt.compile(mlp(), target, example_inputs=(torch.zeros(4, 8),), options={"opset": 18})
    assert by_opset.placement.whole is None
    assert accelrt.compile(onnx_mlp(batch=4), target).placement.whole is None
    assert accelrt.compile(mlp(), "neuron", example_inputs=(torch.zeros(4, 8),)).placement.whole is None


def test_what_the_partitioner_refuses_goes_in_segments_by_the_policy(
    on_inf: None, sdk: Any, kind: Any, behave: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    import accelrt

    behave(STAND_IN_UNSUPPORTED="aten::sort")
    given = {"example_inputs": (torch.zeros(4, 8),), "options": {"partition": False}}
    with pytest.raises(CompileError, match="aten::sort"):
        accelrt.compile(sorting(), f"neuron/{kind[0].name}", fallback="error", **given)
    artifact = accelrt.compile(sorting(), f"neuron/{kind[0].name}", **given)
    assert artifact.placement.whole is None
    assert "gets segments of the model, not the whole" in caplog.text
    assert artifact.placement.nodes_by_engine["cpu/onnxruntime"] >= 1


def test_without_the_lowering_segments_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt.graph.load import load_graph
    from accelrt.testing.models import mlp as onnx_mlp
    from accelrt_neuron import lowered

    monkeypatch.setattr(lowered, "_lowering", lambda: None)
    for node in load_graph(onnx_mlp(batch=4)).nodes:
        verdict = TorchNeuronxEngine().supports(node, "bf16")
        assert not verdict.supported
        assert "no lowering of ONNX to PyTorch" in verdict.reason
    for node in load_graph(onnx_mlp()).nodes:
        assert "static shapes" in TorchNeuronxEngine().supports(node, "bf16").reason


# The vendor's partitioner


def test_what_the_partitioner_leaves_on_the_cpu_is_read_back(
    sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None]
) -> None:
    behave(STAND_IN_UNSUPPORTED="aten::sort")
    engine = kind[0]()
    program = build(engine, scripted(sorting(), tmp_path), tmp_path)
    found = coverage_of(program)
    assert found == {"total": 3, "programs": 2, "on_device": 2, "on_cpu": {"aten::sort": 1}}
    with engine.load(program, cores(0)) as executable:
        np.testing.assert_allclose(
            executable.run({"x": x_of()})["y"], expected(sorting(), x_of()), rtol=1e-5, atol=1e-6
        )


def test_too_little_on_the_device_is_an_error(sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None]) -> None:
    behave(STAND_IN_UNSUPPORTED="aten::sort")
    cls, options = kind
    with pytest.raises(
        CompileError, match=r"66% where at least 90%|67% where at least 90%|67% of the model is supported"
    ):
        build(cls(options(min_coverage=0.9)), scripted(sorting(), tmp_path), tmp_path)


def test_without_the_partitioner_an_operator_too_many_is_an_error_with_the_log(
    sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None]
) -> None:
    behave(STAND_IN_UNSUPPORTED="aten::sort")
    cls, options = kind
    with pytest.raises(CompileError, match=r"aten::sort") as caught:
        build(cls(options(partition=False)), scripted(sorting(), tmp_path), tmp_path)
    assert "log-neuron-cc.txt" in str(caught.value)


def test_nothing_on_the_device_is_an_error(sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None]) -> None:
    behave(STAND_IN_UNSUPPORTED="aten::linear,aten::relu")
    cls, options = kind
    with pytest.raises(CompileError, match=r"No operations were successfully|0 of 3 operators landed"):
        build(cls(options(min_coverage=0.0)), scripted(mlp(), tmp_path), tmp_path)


# Compilers that fail


def test_a_compiler_that_hangs_is_stopped(
    sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(STAND_IN_COMPILER="hang")
    module = sys.modules[kind[0].__mro__[1].__module__]
    monkeypatch.setattr(module, "SPARE_S", 0.0)
    cls, options = kind
    with pytest.raises(IsolatedError, match="was stopped after 8 s"):
        build(cls(options(timeout_s=8.0)), scripted(mlp(), tmp_path), tmp_path)


def test_a_compiler_that_crashes_takes_nobody_with_it(
    sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None]
) -> None:
    behave(STAND_IN_COMPILER="abort")
    with pytest.raises(IsolatedError, match="SIGABRT"):
        build(kind[0](), scripted(mlp(), tmp_path), tmp_path)


def test_the_compilers_own_timeout_is_told_with_the_log(
    sdk: Any, kind: Any, tmp_path: Path, behave: Callable[..., None]
) -> None:
    behave(STAND_IN_COMPILER="timeout")
    with pytest.raises(CompileError, match=r"passed its limit of 7 s.*log-neuron-cc.txt: still compiling"):
        build(kind[0](), scripted(mlp(), tmp_path), tmp_path)


def test_processes_of_a_compiler_that_is_stopped_end_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(IsolatedError, match="stopped after"):
        isolation.call("subprocess:check_call", timeout_s=2.0, args=["sh", "-c", f"echo $$ > {pid}; exec sleep 60"])
    state = Path(f"/proc/{int(pid.read_text())}/stat")
    deadline = time.monotonic() + 10
    while _runs(state) and time.monotonic() < deadline:
        time.sleep(0.05)  # the signal has been sent; the system takes its time
    assert not _runs(state)


def _runs(state: Path) -> bool:
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Placement and the runtime's errors


LOAD_ERRORS: dict[str, type[AccelrtError]] = {
    "2": IncompatibleProgram,
    "4": OutOfDeviceMemory,
    "9": CoresUnavailable,
    "10": IncompatibleProgram,
    "11": OutOfDeviceMemory,
}
RUN_ERRORS: dict[str, type[AccelrtError]] = {
    "5": ExecutionError,
    "6": DeviceLost,
    "101": DeviceLost,
    "1005": ExecutionError,
    "1202": DeviceLost,
}


def test_statuses_of_the_runtime_become_typed_errors(
    sdk: Any, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = kind[0]()
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    for status, error in LOAD_ERRORS.items():
        monkeypatch.setenv("STAND_IN_LOAD_STATUS", status)
        with pytest.raises(error, match=rf"NRT_[A-Z_]+\).*status={status}"):
            engine.load(program, cores(0))
    monkeypatch.delenv("STAND_IN_LOAD_STATUS")
    for status, error in RUN_ERRORS.items():
        with engine.load(program, cores(0)) as executable:
            monkeypatch.setenv("STAND_IN_RUN_STATUS", status)
            with pytest.raises(error, match=rf"NRT_[A-Z_]+\).*status={status}") as caught:
                executable.run({"x": x_of()})
            assert type(caught.value) is error
            monkeypatch.delenv("STAND_IN_RUN_STATUS")


def test_cores_that_another_process_holds_are_a_typed_error(
    sdk: Any, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = kind[0]()
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    with pytest.raises(CoresUnavailable, match="Requested:nc4-nc4 Available:0"):
        engine.load(program, cores(4))
    monkeypatch.setenv("STAND_IN_CORES", "0")
    with pytest.raises(CoresUnavailable, match="Runtime could not be initialized"):
        engine.load(program, cores(0))


def test_devices_must_be_there_real_and_in_a_row(sdk: Any, kind: Any, tmp_path: Path) -> None:
    engine = kind[0]()
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    with pytest.raises(CoresUnavailable, match="no NeuronCore here"):
        engine.load(program, [])
    with pytest.raises(CoresUnavailable, match="not in a row"):
        engine.load(program, cores(0, 2))
    with pytest.raises(CoresUnavailable, match="Emulated cores"):
        engine.load(program, [replace(cores(0)[0], properties={"nature": "emulated"})])


def test_cores_are_counted_from_the_first_that_the_process_sees(sdk: Any, kind: Any, tmp_path: Path) -> None:
    engine = kind[0]()
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    device = replace(cores(6)[0], properties={"nature": "real", "visible_index": "2"})
    engine.load(program, [device]).close()
    assert {"start_nc": 2, "nc_count": 1} in [facts for _, facts in sdk.CALLS]


def test_placement_is_done_under_one_lock(sdk: Any, kind: Any, tmp_path: Path) -> None:
    from accelrt_neuron.cores import PLACEMENT

    engine = kind[0]()
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    held: list[bool] = []
    place = sdk.place
    try:
        sdk.place = lambda *a: (held.append(PLACEMENT.locked()), place(*a))[1]
        engine.load(program, cores(0)).close()
    finally:
        sdk.place = place
    assert held == [True]
    assert not PLACEMENT.locked()


def test_data_parallel_splits_a_batch_among_cores(sdk: Any, kind: Any, tmp_path: Path) -> None:
    cls, options = kind
    with pytest.raises(OptionError, match="Set dynamic_batch=True too"):
        options(data_parallel_cores=2)
    engine = cls(chosen := options(data_parallel_cores=2, dynamic_batch=True))
    assert engine.devices_needed(chosen) == 2
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    with engine.load(program, cores(1, 2)) as executable:
        for rows in (8, 13):
            x = x_of(rows)
            np.testing.assert_allclose(executable.run({"x": x})["y"], expected(mlp(), x), rtol=1e-5, atol=1e-6)
    made = [facts for name, facts in sdk.CALLS if name == "DataParallel" and "device_ids" in facts]
    assert made[0]["device_ids"] == [1, 2]


def test_dynamic_batching_is_the_vendors(sdk: Any, kind: Any, tmp_path: Path) -> None:
    cls, options = kind
    engine = cls(options(dynamic_batch=True))
    with engine.load(build(engine, scripted(mlp(), tmp_path), tmp_path), cores(0)) as executable:
        np.testing.assert_allclose(executable.run({"x": x_of(7)})["y"], expected(mlp(), x_of(7)), rtol=1e-5, atol=1e-6)
    engine = cls(options())
    executable = engine.load(build(engine, scripted(mlp(), tmp_path), tmp_path), cores(0))
    with pytest.raises(ExecutionError, match="Incorrect tensor shape"):
        executable.run({"x": x_of(7)})


def test_weights_outside_of_the_program_are_moved_once(sdk: Any, tmp_path: Path) -> None:
    engine = TorchNeuronxEngine(TorchNeuronxOptions(inline_weights=False))
    program = build(engine, scripted(mlp(), tmp_path), tmp_path)
    assert header(program)["inline"] is False
    engine.load(program, cores(2)).close()
    assert ("move_trace_to_device", {"device_id": 2}) in sdk.CALLS


def test_a_program_needs_its_package_to_be_imported_first(sdk: Any, tmp_path: Path) -> None:
    """The stand-in's programs are like the vendor's: PyTorch alone cannot read them, the driver can."""
    program = build(TorchNeuronEngine(), scripted(mlp(), tmp_path), tmp_path)
    code = "import sys, torch; torch.jit.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(program.files["neuron.pt"])], capture_output=True, text=True)
    assert "neuron::forward_v2_1" in done.stderr


# A vendor that changes a signature is noticed

MUTATIONS = {
    "neuronx trace compiler_args": ("torch_neuronx", "torch_neuronx/__init__.py", "compiler_args=None", "cc_args=None"),
    "neuronx trace compiler_workdir": (
        "torch_neuronx", "torch_neuronx/__init__.py", "compiler_workdir=None,\n    compiler_args", "workdir=None,\n    compiler_args"),
    "neuronx trace partitioner_config": (
        "torch_neuronx", "torch_neuronx/__init__.py", "partitioner_config=None", "partitioner=None"),
    "neuronx PartitionerConfig trace_kwargs": (
        "torch_neuronx", "torch_neuronx/__init__.py", "trace_kwargs=None", "kwargs=None"),
    "neuronx PartitionerConfig threshold": (
        "torch_neuronx", "torch_neuronx/__init__.py", "model_support_percentage_threshold=0.5", "threshold=0.5"),
    "neuronx lazy_load gone": ("torch_neuronx", "torch_neuronx/__init__.py", "def lazy_load", "def lazily_load"),
    "neuronx dynamic_batch argument": (
        "torch_neuronx", "torch_neuronx/__init__.py", "def dynamic_batch(neuron_script)", "def dynamic_batch()"),
    "neuronx set_neuron_cores": (
        "torch_neuronx", "torch_neuronx/__init__.py", "def set_neuron_cores(trace, start_nc=-1", "def set_neuron_cores(trace, first=-1"),
    "neuronx DataParallel": (
        "torch_neuronx:parallel", "torch_neuronx/__init__.py", "set_dynamic_batching=True", "dynamic=True"),
    "neuron trace compiler_timeout": (
        "torch_neuron", "torch_neuron/__init__.py", "compiler_timeout=None", "timeout=None"),
    "neuron trace compiler_args": ("torch_neuron", "torch_neuron/__init__.py", "compiler_args=None", "cc_args=None"),
    "neuron trace fallback": ("torch_neuron", "torch_neuron/__init__.py", "fallback=True", "fall_back=True"),
    "neuron context": (
        "torch_neuron", "torch_neuron/experimental.py", "def neuron_cores_context(start_nc=-1", "def neuron_cores_context(start=-1"),
    "neuron DataParallel": (
        "torch_neuron:parallel", "torch_neuron/__init__.py", "model, device_ids=None, dim=0", "model, ids=None, dim=0"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_signature_makes_the_driver_fail(use: Callable[[Path], None], tmp_path: Path, mutation: str) -> None:
    package, file, old, new = MUTATIONS[mutation]
    _mutate(tmp_path, file, (old, new))
    use(tmp_path / "pytorch")
    cls, options = ENGINES[package.partition(":")[0].replace("_", "-")]
    engine = cls(options(dynamic_batch=True, data_parallel_cores=1 + ("parallel" in package)))
    with pytest.raises((CompileError, TypeError, AttributeError, NameError)):
        engine.load(build(engine, scripted(mlp(), tmp_path), tmp_path), cores(0, 1))


def _mutate(folder: Path, file: str, *changes: tuple[str, str]) -> None:
    shutil.copytree(STAND_INS / "pytorch", folder / "pytorch", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "pytorch" / file
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


# TensorFlow


TF_SCRIPT = """
import json, os, sys
from pathlib import Path
import numpy as np
from accelrt.backend import Device
from accelrt.graph.types import Port, Signature, TensorType
from accelrt_neuron.tensorflow_neuron import TensorFlowNeuronEngine, TensorFlowNeuronOptions

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
rows, load_cores = options.pop("rows", 4), options.pop("cores", [[0]])
engine = TensorFlowNeuronEngine(TensorFlowNeuronOptions(**options))
status = engine.status()
assert status.usable, status
assert "tensorflow" not in sys.modules, "TensorFlow was imported to be looked at"
names = json.loads(os.environ.get("PORTS", '["x", "y"]'))
x_name, y_name = names
signature = Signature((Port(x_name, TensorType("float32", (4, 8))),), (Port(y_name, TensorType("float32", (4, 3))),))
assert engine.supports_source("saved_model", signature, "bf16").supported
out = folder / "out"
out.mkdir()
source = folder / "model.zip" if (folder / "model.zip").exists() else folder / "model"
if "JOB" in os.environ:
    from accelrt.backend import CompileJob
    from accelrt_neuron.archive import pack
    pack(folder / "model", folder / "saved_model.zip")
    job = CompileJob(folder / "saved_model.zip", signature, "bf16", engine._options, "saved_model")
    program = engine.compile(job, out)
else:
    program = engine.compile_source(source, "saved_model", signature, "bf16", engine._options, out)
facts = json.loads(program.files["neuron.json"].read_text())
x = np.random.default_rng(1).standard_normal((rows, 8)).astype(np.float32)
for indices in load_cores:
    devices = [Device("neuron", i, "core", 1, {"nature": "real", "visible_index": str(i)}) for i in indices]
    with engine.load(program, devices) as executable:
        y = executable.run({x_name: x})[y_name]
print(json.dumps({"facts": facts, "y": y.tolist(), "cores": os.environ.get("NEURON_RT_VISIBLE_CORES"),
                  "flags": os.environ.get("NEURON_CC_FLAGS"), "fingerprint": dict(program.fingerprint),
                  "remark": program.remark, "files": sorted(program.files)}))
"""


def _tensorflow(
    tmp_path: Path, version: str, options: dict[str, Any] | None = None, stand_in: Path | None = None, **variables: str
) -> tuple[dict[str, Any] | None, str]:
    model = tmp_path / "model"
    model.mkdir()
    random = np.random.default_rng(0)
    facts = {"w": random.standard_normal((8, 3)).tolist(), "b": [1.0, 2.0, 3.0], "input": "x", "output": "y"}
    (model / "model.json").write_text(json.dumps(facts))
    paths = [str(stand_in or STAND_INS / version), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    environment.pop("NEURON_RT_VISIBLE_CORES", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TF_SCRIPT), str(tmp_path), json.dumps(options or {})],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return (json.loads(done.stdout) if done.returncode == 0 else None), done.stderr


@pytest.mark.parametrize("version", ["tf1", "tf2"])
def test_a_saved_model_is_compiled_and_run(tmp_path: Path, version: str) -> None:
    found, errors = _tensorflow(tmp_path, version, {"cores": [[1, 2]]})
    assert found is not None, errors
    facts = json.loads((tmp_path / "model" / "model.json").read_text())
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    np.testing.assert_allclose(found["y"], x @ np.float32(facts["w"]) + np.float32(facts["b"]), rtol=1e-5)
    assert found["facts"]["coverage"] == {"on_neuron_ratio": 1.0}
    assert found["facts"]["tensorflow"] == int(version[2])
    wanted = ["--fast-math", "all"] if version == "tf1" else ["--fp32-cast=all"]
    assert found["facts"]["compiler_args"] == wanted
    assert found["cores"] == "1-2"
    assert found["flags"] is None, "NEURON_CC_FLAGS was left behind"
    assert found["fingerprint"]["tensorflow-neuron"].startswith("1.15" if version == "tf1" else "2.10")


@pytest.mark.parametrize("version", ["tf1", "tf2"])
def test_a_packed_saved_model_says_what_its_ports_are_called(tmp_path: Path, version: str) -> None:
    from accelrt_neuron.archive import pack

    folder = tmp_path / "packed"
    folder.mkdir()
    weights = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    facts = {"w": weights.tolist(), "b": [0, 0, 0], "input": "x", "output": "y"}
    (folder / "model.json").write_text(json.dumps(facts))
    (folder / "accelrt.json").write_text('{"signature": "serving_default", "inputs": ["x"], "outputs": ["y"]}')
    pack(folder, tmp_path / "model.zip")
    found, errors = _tensorflow(tmp_path, version, PORTS='["image", "scores"]')
    assert found is not None, errors
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    np.testing.assert_allclose(found["y"], x @ weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["tf1", "tf2"])
def test_a_job_of_a_saved_model_keeps_its_source_and_says_how_much_landed(tmp_path: Path, version: str) -> None:
    found, errors = _tensorflow(tmp_path, version, STAND_IN_RATIO="0.75", JOB="1")
    assert found is not None, errors
    assert found["remark"] == "75% of the operators on the device"
    assert found["files"] == ["model.zip", "neuron.json", "saved_model.zip"]


def test_flags_of_the_compiler_reach_tensorflow_2_by_the_environment(tmp_path: Path) -> None:
    options = {"auto_cast": "matmult", "pipeline_cores": 2, "dynamic_batch": True}
    found, errors = _tensorflow(tmp_path, "tf2", options, NEURON_CC_FLAGS="--verbose=info")
    assert found is not None, errors
    assert found["flags"] == "--verbose=info", "NEURON_CC_FLAGS was not set back"
    import zipfile

    with zipfile.ZipFile(tmp_path / "out" / "model.zip") as archive:
        told = json.loads(archive.read("model.json"))["neuron"]
    assert told["fp32_cast"] == "matmult-bf16"
    assert told["neuroncore_pipeline_cores"] == 2
    assert told["dynamic_batch_size"] is True
    assert told["workdir"]


def test_dynamic_batching_of_tensorflow_1(tmp_path: Path) -> None:
    found, errors = _tensorflow(tmp_path, "tf1", {"dynamic_batch": True, "rows": 9})
    assert found is not None, errors
    assert len(found["y"]) == 9


@pytest.mark.parametrize("version", ["tf1", "tf2"])
def test_too_little_of_a_saved_model_is_an_error(tmp_path: Path, version: str) -> None:
    found, errors = _tensorflow(tmp_path, version, STAND_IN_RATIO="0.2")
    assert found is None
    assert "CompileError: 20% of the operators landed on the device" in errors


@pytest.mark.parametrize("version", ["tf1", "tf2"])
def test_statuses_are_typed_for_tensorflow_too(tmp_path: Path, version: str) -> None:
    found, errors = _tensorflow(tmp_path, version, STAND_IN_LOAD_STATUS="4")
    assert found is None
    assert "OutOfDeviceMemory: Loading the program failed (NRT_RESOURCE)" in errors


def test_a_process_of_tensorflow_stays_on_its_cores(tmp_path: Path) -> None:
    found, errors = _tensorflow(tmp_path, "tf2", {"cores": [[0], [1]]})
    assert found is None
    assert "CoresUnavailable: This process runs tensorflow-neuron on the cores [0]" in errors


def test_the_log_of_tensorflows_compiler_is_told(tmp_path: Path) -> None:
    found, errors = _tensorflow(tmp_path, "tf2", STAND_IN_COMPILER="fail")
    assert found is None
    assert "graph_def.neuron-cc.log: ERROR: out of registers" in errors


TF_MUTATIONS = {
    "tf1 compile workdir": ("tf1", "tensorflow/neuron/saved_model.py", "compiler_workdir=None", "workdir=None"),
    "tf1 compile shapes": ("tf1", "tensorflow/neuron/saved_model.py", "model_shape_feed_dict=None", "shapes=None"),
    "tf1 compile kwargs": ("tf1", "tensorflow/neuron/saved_model.py", '"compiler_timeout", ', ""),
    "tf1 result": ("tf1", "tensorflow/neuron/saved_model.py", '"OnNeuronRatio"', '"Ratio"'),
    "tf2 trace": ("tf2", "tensorflow/neuron/__init__.py", "def trace(func, example_inputs", "def trace(func"),
    "tf2 flag": ("tf2", "tensorflow/neuron/__init__.py", '"--fp32-cast"', '"--cast-fp32"'),
    "tf2 result": ("tf2", "tensorflow/neuron/__init__.py", "self.on_neuron_ratio", "self.ratio"),
}


@pytest.mark.parametrize("mutation", TF_MUTATIONS)
def test_a_changed_signature_of_tensorflow_neuron_is_noticed(tmp_path: Path, mutation: str) -> None:
    version, file, old, new = TF_MUTATIONS[mutation]
    shutil.copytree(STAND_INS / version, tmp_path / "sdk", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "sdk" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    found, errors = _tensorflow(tmp_path, version, stand_in=tmp_path / "sdk")
    assert found is None, mutation
    assert "CompileError" in errors


def test_tensorflow_takes_no_segments_and_says_so() -> None:
    engine = TensorFlowNeuronEngine()
    with pytest.raises(CompileError, match="SavedModels"):
        engine.compile_source(Path("x"), "onnx", X4, "bf16", TensorFlowNeuronOptions(), Path("y"))
    assert not engine.status().usable


def test_an_archive_that_leads_outside_is_refused(tmp_path: Path) -> None:
    import zipfile

    from accelrt_neuron.archive import pack, unpack

    for name in ("../outside", "/etc/outside", "a/../../outside"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr(name, b"x")
        with pytest.raises(IncompatibleProgram, match="holds the name"):
            unpack(tmp_path / "bad.zip", tmp_path / "inside")
    (tmp_path / "not.zip").write_bytes(b"no zip")
    with pytest.raises(IncompatibleProgram, match="cannot be read"):
        unpack(tmp_path / "not.zip", tmp_path / "inside")
    folder = tmp_path / "good" / "variables"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"1234")
    pack(tmp_path / "good", tmp_path / "good.zip")
    unpack(tmp_path / "good.zip", tmp_path / "again")
    assert (tmp_path / "again" / "variables" / "data").read_bytes() == b"1234"


def _accelrt(arguments: list[str], stand_in: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line where a stand-in is on the import path."""
    path = os.pathsep.join([str(stand_in), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "accelrt", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
