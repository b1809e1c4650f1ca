"""The driver of `cuda/tensorrt`, held by stand-ins with the bindings' signatures: judge, build, load, run, fail."""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import accelrt
from accelrt import isolation
from accelrt.backend import CompileJob, Device, Program
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import (
    AccelrtError,
    CompileError,
    CoresUnavailable,
    DeviceLost,
    ExecutionError,
    IncompatibleProgram,
    OptionError,
    OutOfDeviceMemory,
)
from accelrt.graph import dlpack
from accelrt.graph.load import load_graph
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.graph.weights import WeightFile
from accelrt.options import from_json
from accelrt.testing.models import Builder
from accelrt_cuda import tensorrt_dlpack, tensorrt_errors
from accelrt_cuda.tensorrt import PLAN, TensorRtEngine
from accelrt_cuda.tensorrt_errors import CudaFailure
from accelrt_cuda.tensorrt_options import TensorRtOptions, ranges

STAND_INS = Path(__file__).parents[1] / "stand_ins" / "nvidia"
sys.path.append(str(STAND_INS / "tensorrt_shared"))
alone: Any = importlib.import_module("tensorrt_alone")
RELEASES = ("10", "11")
DEVICE = Device("tensorrt-alone", 0, "stand-in", 8 << 30)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCELRT_BACKEND", raising=False)


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> Iterator[str]:
    with alone.in_place(*alone.folders(request.param)):
        yield request.param


@pytest.fixture
def engine(release: str) -> Iterator[TensorRtEngine]:
    """The engine, with a device that has nothing in its memory."""
    state = cuda_state()
    with state.lock:
        state.blocks.clear()
    state.lost, state.total = False, 8 << 30
    yield TensorRtEngine()
    state.lost, state.total = False, 8 << 30


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that tells the stand-ins how to behave, in this process and in a child of the test's own."""

    def tell(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        isolation.restart()

    yield tell
    isolation.restart()


@pytest.fixture
def registered(engine: TensorRtEngine) -> Iterator[str]:
    accelrt.register(alone.TensorRtAlone)
    yield "tensorrt-alone/tensorrt"
    accelrt.registry.REGISTRY.unregister("tensorrt-alone")


def cuda_state() -> Any:
    return importlib.import_module("cuda.bindings.runtime").STATE


def job(proto: onnx.ModelProto, folder: Path, precision: Any = "fp32", **options: Any) -> CompileJob:
    graph = load_graph(proto)
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    weights = WeightFile(source / "weights.bin")
    graph.write(source / "model.onnx", weights)
    weights.close()
    return CompileJob(source / "model.onnx", graph.signature, precision, TensorRtOptions(**options))


def build(engine: Any, proto: onnx.ModelProto, folder: Path, precision: Any = "fp32", **options: Any) -> Program:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    program: Program = engine.compile(job(proto, folder, precision, **options), out)
    return program


def header(program: Program) -> tuple[dict[str, Any], onnx.ModelProto]:
    """Return what the stand-in was told when it built a plan, and the model that it was given."""
    told, model = importlib.import_module("tensorrt_stand_in").read_plan(program.files[PLAN].read_bytes())
    return told, onnx.ModelProto.FromString(model)


def matmul(rows: Any = "batch", width: int = 32, name: str = "x") -> onnx.ModelProto:
    net = Builder("matmul", seed=3)
    x = net.input(name, (rows, width))
    y = net.node("Relu", net.node("MatMul", x, net.normal(width, width, std=0.3)))
    net.output(net.node("Add", y, net.normal(width, std=0.1), name="y"), (rows, width))
    return net.model()


def drawn(signature: Signature, rows: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    found = {}
    for port in signature.inputs:
        assert isinstance(port.type, TensorType)
        sizes = [dim if isinstance(dim, int) else rows for dim in port.type.shape or ()]
        found[port.name] = generator.standard_normal(sizes).astype(np.float32)
    return found


def oracle(proto: onnx.ModelProto, inputs: Mapping[str, Any]) -> dict[str, Any]:
    with accelrt.load(accelrt.compile(proto, "cpu/onnxruntime")) as session:
        return dict(session.predict(inputs))


# The stand-ins are what the bindings are


def recorded(release: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STAND_INS / "tensorrt_signatures" / f"{release}.json").read_text())
    return found


def differences(module: Any, table: Mapping[str, Any]) -> list[str]:
    """Return where a stand-in has what the bindings have not, or has it otherwise."""
    found = []
    for name, members in table["classes"].items():
        cls = getattr(module, name, None)
        for attribute in sorted(set(dir(cls)) - set(dir(object))) if cls is not None else ():
            if attribute.startswith("_") or (value := getattr(cls, attribute)) is None or inspect.isclass(value):
                continue
            found += _difference(f"{name}.{attribute}", value, members.get(attribute))
        if cls is not None and isinstance(members.get("__init__"), list) and "__init__" in vars(cls):
            found += _difference(f"{name}.__init__", cls.__init__, members["__init__"])
    for name, values in table["enums"].items():
        enum = module.ILogger.Severity if name == "ILogger.Severity" else getattr(module, name)
        given = {key: int(value) for key, value in enum.__members__.items()}
        found += [f"{name}.{key}" for key, value in given.items() if values.get(key) != value]
    return found


def _difference(name: str, value: Any, recorded: Any) -> list[str]:
    if recorded is None:
        return [f"{name} is not in the bindings"]
    if isinstance(recorded, str):  # a property, or a slot that is set as one
        writable = inspect.ismemberdescriptor(value) or (isinstance(value, property) and value.fset is not None)
        is_property = isinstance(value, property) or inspect.ismemberdescriptor(value)
        return [] if is_property and (not writable or recorded == "property") else [f"{name} is {recorded}"]
    parameters = inspect.signature(value).parameters.values()
    text = ", ".join(p.name + ("" if p.default is inspect.Parameter.empty else "=") for p in parameters)
    return [] if text in recorded else [f"{name}({text}) is {recorded}"]


def test_stand_ins_have_the_signatures_of_the_bindings(release: str) -> None:
    assert differences(importlib.import_module("tensorrt"), recorded(release)) == []


def test_the_stand_in_for_cuda_has_the_signatures_of_cuda_bindings(release: str) -> None:
    module = importlib.import_module("cuda.bindings.runtime")
    table = json.loads((STAND_INS / "tensorrt_signatures" / "cuda.json").read_text())
    own = {name: value for name, value in vars(module).items() if name.startswith("cuda") and inspect.isfunction(value)}
    assert {name: ", ".join(inspect.signature(value).parameters) for name, value in own.items()} == table["functions"]
    for name, values in table["enums"].items():
        for key, value in getattr(module, name).__members__.items():
            assert values[key] == int(value), key


def test_what_the_engine_calls_of_cuda_is_recorded() -> None:
    folder = Path(tensorrt_errors.__file__).parent
    called = {
        name for path in folder.glob("tensorrt*.py") for name in re.findall(r"\"(cuda[A-Z]\w+)\"", path.read_text())
    }
    table = json.loads((STAND_INS / "tensorrt_signatures" / "cuda.json").read_text())
    assert called <= {*table["functions"], *table["enums"]["cudaMemcpyKind"]}
    assert len(called) > 10


def test_what_11_dropped_is_not_in_its_stand_in(release: str) -> None:
    trt = importlib.import_module("tensorrt")
    assert hasattr(trt.BuilderFlag, "FP16") == hasattr(trt.OnnxParser, "supports_model") == (release == "10")


def test_a_stand_in_refuses_what_it_does_not_know(engine: TensorRtEngine) -> None:
    trt = importlib.import_module("tensorrt")

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

    builder = trt.Builder(Logger())
    config = builder.create_builder_config()
    with pytest.raises(AttributeError):
        config.int8_calibrator = None
    with pytest.raises(TypeError):
        builder.create_network(flag=0)
    with pytest.raises(TypeError, match="__init__"):

        class Forgetful(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                pass

        trt.Builder(Forgetful())


MUTATIONS = {
    "supports_model_v2 loses path": ("supports_model_v2(self, model: Any, path: str | None = None)", "supports_model_v2(self, model: Any)"),
    "parse renames and requires": ("def parse(self, model: Any, path: str | None = None)", "def parse(self, model: Any, *, directory: str)"),
    "get_error is gone": ("def get_error(", "def error_at("),
    "create_network takes no flags": ("def create_network(self, flags: int = 0)", "def create_network(self)"),
    "set_shape takes two": ("def set_shape(self, input: str, min: Any, opt: Any, max: Any)", "def set_shape(self, input: str, min: Any, max: Any)"),
    "set_timing_cache takes one": ("def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool)", "def set_timing_cache(self, cache: ITimingCache)"),
    "build_serialized_network is gone": ("def build_serialized_network(", "def build_network("),
    "set_input_shape is gone": ("def set_input_shape(", "def set_shape("),
    "execute_async_v3 takes none": ("def execute_async_v3(self, stream_handle: int)", "def execute_async_v3(self)"),
    "set_tensor_address takes a size": ("def set_tensor_address(self, name: str, memory: int)", "def set_tensor_address(self, name: str, memory: int, size: int)"),
    "create_execution_context wants a strategy": ("def create_execution_context(self, strategy: Any = None)", "def create_execution_context(self, strategy: Any, profile: int)"),
    "deserialize takes a size": ("def deserialize_cuda_engine(self, serialized_engine: Any)", "def deserialize_cuda_engine(self, serialized_engine: Any, size: int)"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_signature_is_noticed(tmp_path: Path, mutation: str) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(STAND_INS / "tensorrt_shared", shared, ignore=shutil.ignore_patterns("__pycache__"))
    path, (old, new) = shared / "tensorrt_stand_in.py", MUTATIONS[mutation]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with alone.in_place(STAND_INS / "cuda_bindings", shared, STAND_INS / "tensorrt_11"):
        assert differences(importlib.import_module("tensorrt"), recorded("11"))
        engine, noticed = TensorRtEngine(), []
        proto = matmul()
        node = load_graph(refused()).nodes[0]
        try:
            status = engine.status()
            assert status.usable, status.reason
            verdict = engine.supports(node, "fp32")
            noticed += [] if verdict.supported or "Plugin not found" in verdict.reason else [verdict.reason]
            with engine.load(build(engine, proto, tmp_path), [DEVICE]) as resident:
                resident.run(drawn(load_graph(proto).signature))
        except (AccelrtError, TypeError, AttributeError, AssertionError) as error:
            noticed.append(str(error))
        assert noticed


def refused() -> onnx.ModelProto:
    """A model of one node that no release of TensorRT takes."""
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)
        for name, sizes in (("x", (2, 2, 2)), ("y", (2,)))
    ]
    node = onnx.helper.make_node("Det", ["x"], ["y"])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:]))


# Status


@pytest.mark.parametrize(
    ("variables", "reason", "remedy"),
    [
        ({"CUDA_STAND_IN_DEVICES": "0"}, "there is no CUDA device", "nvidia-smi -L"),
        ({"CUDA_STAND_IN_DRIVER": "12040"}, "for CUDA 12.4, the runtime is CUDA 13.5", "update NVIDIA's driver"),
        ({"CUDA_STAND_IN_DRIVER": "0"}, "there is no NVIDIA driver", "install NVIDIA's driver"),
    ],
)
def test_status_says_what_is_missing_of_a_device(
    release: str, behave: Callable[..., None], variables: dict[str, str], reason: str, remedy: str
) -> None:
    behave(**variables)
    status = TensorRtEngine().status()
    assert not status.usable
    assert reason in str(status.reason)
    assert remedy in str(status.remedy)


def test_status_of_bindings_without_libraries() -> None:
    with alone.in_place(STAND_INS / "tensorrt_without_libraries", STAND_INS / "cuda_bindings"):
        status = TensorRtEngine().status()
    assert not status.usable
    assert "its libraries are not" in str(status.reason)
    assert "libnvonnxparser.so.11" in str(status.reason)
    assert "--extra-index-url" in str(status.remedy)


def test_status_where_nothing_is_installed() -> None:
    with alone.in_place():
        status = TensorRtEngine().status()
    assert not status.usable
    assert "TensorRT is not installed" in str(status.reason)


def test_status_without_cuda_bindings(tmp_path: Path) -> None:
    shutil.copytree(STAND_INS / "tensorrt_11", tmp_path / "sdk")
    (tmp_path / "sdk" / "tensorrt_stand_in.py").write_text(
        (STAND_INS / "tensorrt_shared" / "tensorrt_stand_in.py")
        .read_text()
        .replace("from cuda.bindings.runtime import STATE\n", "")
    )
    with alone.in_place(tmp_path / "sdk"):
        status = TensorRtEngine().status()
    assert not status.usable
    assert "cuda-bindings" in str(status.reason)
    assert status.remedy == "pip install cuda-bindings"


@pytest.mark.parametrize("content", ["import os; os.abort()", "raise RuntimeError('no')", "x = 1"])
def test_a_broken_package_is_a_status(tmp_path: Path, content: str) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text(content)
    with alone.in_place(tmp_path):
        status = TensorRtEngine().status()
    assert not status.usable
    assert status.reason
    assert status.remedy


def test_a_release_before_10_1_is_too_old(tmp_path: Path) -> None:
    shutil.copytree(STAND_INS / "tensorrt_shared", tmp_path / "sdk")
    shutil.copytree(STAND_INS / "tensorrt_10" / "tensorrt", tmp_path / "sdk" / "tensorrt")
    path = tmp_path / "sdk" / "tensorrt_stand_in.py"
    path.write_text(path.read_text().replace("def supports_model_v2", "def supports_model"))
    with alone.in_place(STAND_INS / "cuda_bindings", tmp_path / "sdk"):
        status = TensorRtEngine().status()
    assert "older than 10.1" in str(status.reason)
    assert "OnnxParser.supports_model_v2" in str(status.reason)
    assert "tensorrt>=10.1" in str(status.remedy)


def test_status_imports_nothing_here(engine: TensorRtEngine) -> None:
    alone.forget()
    assert engine.status().usable
    assert "tensorrt" not in sys.modules


def test_the_report_is_json_and_shows_what_was_found(engine: TensorRtEngine, release: str) -> None:
    found = json.loads(json.dumps(engine.report()))
    assert found["version"] == recorded(release)["version"]
    assert found["devices"] == [{"name": "Stand-in GPU", "compute_capability": "9.0"}]
    assert ("FP16" in found["builder_flags"]) == (release == "10")
    from accelrt_cuda.tensorrt_api import REPORTED

    assert set(found["signatures"]) == {f"{owner}.{name}" for owner, names in REPORTED.items() for name in names}
    for owner, names in REPORTED.items():
        assert set(names) <= set(recorded(release)["classes"][owner]), owner


# Support


def chain(*operators: str) -> onnx.ModelProto:
    net = Builder("chain")
    x = net.input("x", ("batch", 4))
    for index, operator in enumerate(operators):
        x = net.node(operator, x, name="y" if index == len(operators) - 1 else f"v{index}")
    net.output(x, ("batch", 4))
    return net.model()


def test_a_refused_node_says_what_the_parser_said(engine: TensorRtEngine) -> None:
    verdict = engine.supports(load_graph(refused()).nodes[0], "fp32")
    assert not verdict.supported
    assert verdict.reason == (
        "the parser refuses Det: Plugin not found, are the plugin name, version, and namespace correct? "
        "(UNSUPPORTED_NODE in checkFallbackPluginImporter)"
    )


def test_nodes_at_which_the_parser_stops_do_not_hide_the_others(
    engine: TensorRtEngine, behave: Callable[..., None]
) -> None:
    behave(TENSORRT_STAND_IN_STUMBLES="Tanh,Erf", TENSORRT_STAND_IN_REFUSES="Sinh")
    nodes = load_graph(chain("Relu", "Tanh", "Exp", "Sinh", "Erf", "Abs")).nodes
    verdicts = engine.supports_all(nodes, "fp32")
    assert [verdict.supported for verdict in verdicts] == [True, False, True, False, False, True]
    assert "Tanh cannot be imported" in verdicts[1].reason
    assert "Plugin not found" in verdicts[3].reason


def test_one_model_is_asked_about_and_verdicts_are_remembered(
    engine: TensorRtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = isolation.call

    def counted(function: str, **arguments: Any) -> Any:
        asked.append((function.rpartition(":")[2], len(arguments.get("trials", ()))))
        return real(function, **arguments)

    monkeypatch.setattr(isolation, "call", counted)
    nodes = load_graph(chain("Relu", "Tanh", "Relu", "Relu", "Abs")).nodes
    engine.supports_all(nodes, "fp32")
    engine.supports_all(nodes, "fp32")
    engine.with_options(TensorRtOptions(tf32=True)).supports_all(nodes, "fp32")
    assert asked == [("judge", 3)]
    engine.supports_all(nodes, "fp16")
    assert asked[1:] == [("judge", 3)]


def test_a_node_that_takes_the_parser_down_is_found(engine: TensorRtEngine, behave: Callable[..., None]) -> None:
    behave(TENSORRT_STAND_IN_STUMBLES="Erf", TENSORRT_STAND_IN_PARSE="crash")
    verdicts = engine.supports_all(load_graph(chain("Relu", "Erf", "Tanh", "Abs")).nodes, "fp32")
    assert [verdict.supported for verdict in verdicts] == [True, False, True, True]
    assert "did not survive" in verdicts[1].reason
    assert "SIGABRT" in verdicts[1].reason


def test_nodes_are_found_where_errors_do_not_name_them(engine: TensorRtEngine, behave: Callable[..., None]) -> None:
    behave(TENSORRT_STAND_IN_STUMBLES="Erf", TENSORRT_STAND_IN_REFUSES="Sinh", TENSORRT_STAND_IN_NAMELESS="1")
    operators = ("Relu", "Erf", "Tanh", "Sinh", "Abs", "Neg", "Exp")
    verdicts = engine.supports_all(load_graph(chain(*operators)).nodes, "fp32")
    assert [verdict.supported for verdict in verdicts] == [operator not in ("Erf", "Sinh") for operator in operators]
    assert "Erf cannot be imported" in verdicts[1].reason
    assert "Plugin not found" in verdicts[3].reason


def test_a_node_that_the_parser_leaves_out_without_an_error_is_taken_in_any_company(
    engine: TensorRtEngine, behave: Callable[..., None]
) -> None:
    behave(TENSORRT_STAND_IN_REFUSES="Relu")
    relu, nonzero = load_graph(sized_by_values()).nodes
    assert [verdict.supported for verdict in engine.supports_all([relu, nonzero], "fp32")] == [False, True]
    assert TensorRtEngine().supports(nonzero, "fp32").supported
    assert [verdict.supported for verdict in TensorRtEngine().supports_all([nonzero, relu], "fp32")] == [True, False]


def test_explain_has_the_reason_and_the_rest_runs_elsewhere(registered: str, behave: Callable[..., None]) -> None:
    behave(TENSORRT_STAND_IN_REFUSES="Tanh")
    proto = chain("Relu", "Tanh", "Abs")
    artifact = accelrt.compile(proto, registered, fallback="allow")
    text = " ".join(str(artifact.explain()).split())
    assert "Plugin not found" in " ".join(text.replace("│", " ").split())
    assert [segment.engine for segment in artifact.placement.segments] == [registered, "cpu/onnxruntime", registered]
    inputs = drawn(artifact.signature)
    with accelrt.load(artifact) as session:
        np.testing.assert_allclose(session.predict(inputs)["y"], oracle(proto, inputs)["y"], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "int16", "uint64"])
def test_types_that_would_be_narrowed_are_refused_without_asking(engine: TensorRtEngine, dtype: str) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, kind, (2,)) for name in ("x", "y")]
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:]))
    verdict = engine.supports(load_graph(proto).nodes[0], "fp32")
    assert not verdict.supported
    assert dtype in verdict.reason


def test_large_weights_are_not_sent(engine: TensorRtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = isolation.call

    def measured(function: str, **arguments: Any) -> Any:
        sizes.append(sum(len(trial["model"]) for trial in arguments.get("trials", ())))
        return real(function, **arguments)

    net = Builder("wide")
    x = net.input("x", (1, 64, 8, 8))
    net.output(net.node("Conv", x, net.normal(256, 64, 5, 5, std=0.1), name="y", pads=[2, 2, 2, 2]), (1, 256, 8, 8))
    monkeypatch.setattr(isolation, "call", measured)
    for precision in ("fp32", "fp16", "bf16"):
        assert engine.supports_all(load_graph(net.model()).nodes, precision)[0].supported  # type: ignore[arg-type]
    assert sizes
    assert max(sizes) < 4096


def test_control_flow_is_judged_by_what_is_in_it(engine: TensorRtEngine, behave: Callable[..., None]) -> None:
    behave(TENSORRT_STAND_IN_REFUSES="Sinh")
    bodies = []
    for operator in ("Abs", "Sinh"):
        out = onnx.helper.make_tensor_value_info(f"{operator}_y", onnx.TensorProto.FLOAT, (2,))
        bodies.append(onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], [out.name])], operator, [], [out]))
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    ports = [
        onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, ()),
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2,)),
    ]
    first = onnx.helper.make_node("Neg", ["x"], ["n"])
    outs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2,)) for name in ("y", "n")]
    proto = onnx.helper.make_model(onnx.helper.make_graph([first, node], "g", ports, outs))
    nodes = load_graph(proto).nodes
    verdicts = dict(zip([n.op_type for n in nodes], engine.supports_all(nodes, "fp32"), strict=True))
    assert verdicts["Neg"].supported
    assert "Sinh" in verdicts["If"].reason


# Options and profiles


@pytest.mark.parametrize(
    "wrong",
    [
        {"profiles": {"x": ((1, 2), (2, 2))}},
        {"profiles": {"x": ((4,), (2,), (8,))}},
        {"profiles": {"x": ((1,), (2, 2), (8,))}},
        {"profiles": {"x": ((-1,), (2,), (8,))}},
        {"profiles": {"x": ((1.5,), (2,), (8,))}},
        {"profiles": {"x": {"min_shape": (1,), "opt_shape": (2,)}}},
        {"profiles": {3: ((1,), (2,), (8,))}},
        {"profiles": "x"},
        {"batch": (4, 2, 8)},
        {"batch": 8},
        {"optimization_level": 6},
        {"hardware_compatibility": "all"},
        {"workspace_bytes": 0},
        {"timeout_s": 0.0},
        {"memory_bytes": -1},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        TensorRtOptions(**wrong)


SIZES = st.lists(st.integers(0, 64), min_size=1, max_size=4)


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(SIZES, SIZES)), st.booleans())
def test_options_survive_an_artifact_and_can_be_keys(parts: dict[str, Any], as_mappings: bool) -> None:
    profiles = {}
    for name, (least, more) in parts.items():
        more = (more * 4)[: len(least)]
        triple = (
            least,
            [a + b for a, b in zip(least, more, strict=True)],
            [a + 2 * b for a, b in zip(least, more, strict=True)],
        )
        keys = ("min_shape", "opt_shape", "max_shape")
        profiles[name] = dict(zip(keys, triple, strict=True)) if as_mappings else triple
    options = TensorRtOptions(profiles=profiles)
    assert from_json(TensorRtOptions, json.loads(json.dumps(asdict(options)))) == options
    assert hash(options) == hash(replace(options))


def ports(**shapes: Any) -> Signature:
    return Signature(tuple(Port(name, TensorType("float32", shape)) for name, shape in shapes.items()), ())


def test_static_sizes_need_no_range_and_an_open_batch_has_one() -> None:
    found = ranges(ports(a=(2, 3), b=("batch", 3), c=(None, 4)), TensorRtOptions(batch=(1, 4, 9)))
    assert found == {"b": ((1, 3), (4, 3), (9, 3)), "c": ((1, 4), (4, 4), (9, 4))}


def test_a_named_size_holds_for_every_input_that_has_it() -> None:
    options = TensorRtOptions(profiles={"a": ((1, 5), (2, 6), (3, 7))})
    found = ranges(ports(a=("n", "length"), b=("n", "length", 4), c=("length",)), options)
    assert found["b"] == ((1, 5, 4), (2, 6, 4), (3, 7, 4))
    assert found["c"] == ((5,), (6,), (7,))


def test_a_size_can_be_given_to_a_dimension_by_name() -> None:
    options = TensorRtOptions(profiles={"length": (1, 16, 64), "n": ((2,), (3,), (4,))})
    found = ranges(ports(inner=("n", "length", 8), length=("length",)), options)
    assert found["inner"] == ((2, 1, 8), (3, 16, 8), (4, 64, 8))
    assert found["length"] == ((1,), (16,), (64,))


def test_a_named_size_holds_in_segments_whose_inputs_are_inner_values(
    registered: str, behave: Callable[..., None]
) -> None:
    behave(TENSORRT_STAND_IN_REFUSES="Tanh")
    net = Builder("cut")
    x = net.input("x", ("n", "length"))
    net.output(net.node("Abs", net.node("Tanh", net.node("Relu", x)), name="y"), ("n", "length"))
    artifact = accelrt.compile(net.model(), registered, fallback="allow", options={"profiles": {"length": (1, 4, 16)}})
    assert [segment.engine for segment in artifact.placement.segments] == [registered, "cpu/onnxruntime", registered]
    value = np.random.default_rng(0).standard_normal((3, 11)).astype(np.float32)
    with accelrt.load(artifact) as session:
        np.testing.assert_allclose(session.predict({"x": value})["y"], np.abs(np.tanh(np.maximum(value, 0))), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "profile", "text"),
    [
        (("n", "length"), {}, "open past the first dimension"),
        (("n", 4), {"x": ((1,), (2,), (3,))}, "has 1 sizes, the input 2 dimensions"),
        (("n", 4), {"x": ((1, 2), (1, 4), (1, 8))}, "always 4"),
    ],
)
def test_sizes_that_nobody_told_are_asked_for(shape: Any, profile: Any, text: str) -> None:
    with pytest.raises(CompileError, match=text) as caught:
        ranges(ports(x=shape), TensorRtOptions(profiles=profile))
    assert caught.value.hint


def test_a_profile_reaches_the_plan_and_bounds_what_runs(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path, profiles={"x": ((1, 32), (2, 32), (4, 32))})
    assert header(program)[0]["profile"] == {"x": [[1, 32], [2, 32], [4, 32]]}
    with engine.load(program, [DEVICE]) as resident:
        for rows in (1, 4, 3):
            inputs = drawn(program.signature, rows)
            np.testing.assert_allclose(resident.run(inputs)["y"], oracle(matmul(), inputs)["y"], rtol=1e-5, atol=1e-6)
        with pytest.raises(ExecutionError, match=r"shape \[5, 32\] is outside .* \[1, 32\] to \[4, 32\]"):
            resident.run(drawn(program.signature, 5))
        resident.run(drawn(program.signature, 2))  # a call that does not fit spoils nothing


def test_static_sizes_make_no_profile(engine: TensorRtEngine, tmp_path: Path) -> None:
    assert header(build(engine, matmul(2), tmp_path))[0]["profile"] is None


def test_the_builder_is_told_what_the_options_say(engine: TensorRtEngine, release: str, tmp_path: Path) -> None:
    told, _ = header(build(engine, matmul(), tmp_path))
    assert "TF32" not in told["flags"], "float32 products would be in TF32, and nobody asked for it"
    assert not {"FP16", "INT8", "BF16"} & set(told["flags"])
    strongly = recorded(release)["enums"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    assert told["network_flags"] == 1 << strongly, "the network is not strongly typed"
    assert told["optimization_level"] == 3
    assert told["pools"] == {}
    told, _ = header(
        build(
            engine,
            matmul(),
            tmp_path,
            tf32=True,
            optimization_level=5,
            workspace_bytes=1 << 20,
            hardware_compatibility="ampere_plus",
            version_compatible=True,
        )
    )
    assert {"TF32", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"} <= set(told["flags"])
    assert (told["optimization_level"], told["pools"], told["level"]) == (5, {"WORKSPACE": 1 << 20}, "AMPERE_PLUS")


# Precision


def sixteen(precision: str) -> int:
    return {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_are_cast_once_and_sums_stay_in_float32(engine: TensorRtEngine, tmp_path: Path, precision: Any) -> None:
    net = Builder("cast", seed=5)
    x = net.input("x", ("batch", 32))
    x = net.node("Softmax", net.node("MatMul", x, net.normal(32, 32, std=0.2)), axis=1)
    net.output(net.node("Add", x, net.normal(32, std=0.1), name="y"), ("batch", 32))
    proto = net.model()
    before = job(proto, tmp_path, precision)
    listed = sorted(path.name for path in before.model.parent.iterdir())
    program = build(engine, proto, tmp_path, precision)
    _, model = header(program)
    kinds = {node.op_type: [node.input[-1]] for node in model.graph.node}
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    assert by_name[kinds["MatMul"][0]].data_type == sixteen(precision)
    assert not [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in by_name]
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert not softmax.input[0].endswith(("__float16", "__bfloat16"))
    assert sorted(path.name for path in before.model.parent.iterdir()) == listed, "the source's folder was littered"
    with engine.load(program, [DEVICE]) as resident:
        inputs = drawn(program.signature, 3)
        found = resident.run(inputs)["y"]
    assert found.dtype == np.float32
    error = np.abs(found - oracle(proto, inputs)["y"]).max()
    assert 0 < error < (3e-3 if precision == "fp16" else 3e-2), "it did not compute in 16 bits"


def test_the_values_of_cast_weights_are_those_of_the_model(engine: TensorRtEngine, tmp_path: Path) -> None:
    proto = matmul()
    weights = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.dims == [32, 32]]
    _, model = header(build(engine, proto, tmp_path, "fp16"))
    cast = [numpy_helper.to_array(t) for t in model.graph.initializer if list(t.dims) == [32, 32]]
    assert len(cast) == len(weights) == 1
    np.testing.assert_array_equal(cast[0], weights[0].astype(np.float16))


def quantised(zero: int = 0, dtype: Any = np.int8) -> onnx.ModelProto:
    net = Builder("quantised", seed=2)

    def constant(value: Any, kind: Any) -> str:
        return net.node("Constant", value=numpy_helper.from_array(np.asarray(value, kind)))

    x = net.input("x", ("batch", 16))
    scale, point = constant(0.05, np.float32), constant(zero, dtype)
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, scale, point), scale, point)
    weight = constant(np.random.default_rng(0).integers(-127, 127, (16, 64)), np.int8)
    scales = constant(np.linspace(0.01, 0.02, 64), np.float32)
    held = net.node("DequantizeLinear", weight, scales, constant(np.zeros(64), np.int8), axis=1)
    net.output(net.node("MatMul", x, held, name="y"), ("batch", 64))
    return net.model()


def test_int8_is_what_the_model_says(registered: str, engine: TensorRtEngine, tmp_path: Path) -> None:
    proto = quantised()
    nodes = load_graph(proto).nodes
    assert all(verdict.supported for verdict in engine.supports_all(nodes, "int8"))
    artifact = accelrt.compile(proto, registered, precision="int8", fallback="error")
    inputs = {"x": np.random.default_rng(3).standard_normal((4, 16)).astype(np.float32)}
    with accelrt.load(artifact) as session:
        np.testing.assert_allclose(session.predict(inputs)["y"], oracle(proto, inputs)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("zero", "dtype"), [(3, np.int8), (128, np.uint8)])
def test_zero_points_that_are_not_zero_are_refused(engine: TensorRtEngine, zero: int, dtype: Any) -> None:
    nodes = load_graph(quantised(zero, dtype)).nodes
    verdicts = dict(zip([node.name for node in nodes], engine.supports_all(nodes, "int8"), strict=True))
    refusals = [verdict.reason for verdict in verdicts.values() if not verdict.supported]
    assert len(refusals) == 2
    assert all("symmetric" in reason for reason in refusals)


def test_a_model_calibrated_symmetrically_runs_in_int8(registered: str) -> None:
    images, _ = held_out_digits()
    calibration = accelrt.Calibration([images[i : i + 1] for i in range(20)], activations="int8", symmetric=True)
    artifact = accelrt.compile(digits_model(), registered, precision="int8", calibration=calibration, fallback="error")
    assert [(s.engine, s.precision) for s in artifact.placement.segments] == [(registered, "int8")]
    names = [node.name for node in artifact.placement.segments[0].nodes]
    assert sum("Quantize" in name for name in names) >= 8
    with accelrt.load(artifact) as session:
        found = next(iter(session.predict(images[:32]).values()))
    expected = next(iter(oracle(onnx.load(digits_model()), {artifact.signature.input_names[0]: images[:32]}).values()))
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95


def test_a_model_calibrated_otherwise_says_why_it_does_not(registered: str) -> None:
    images, _ = held_out_digits()
    calibration = accelrt.Calibration([images[i : i + 1] for i in range(5)])
    artifact = accelrt.compile(digits_model(), registered, precision="int8", calibration=calibration, fallback="allow")
    reasons = {refusal.reason for refusal in artifact.placement.refusals if refusal.engine == registered}
    assert any("symmetric" in reason for reason in reasons)


# Building goes wrong


def test_a_failed_build_says_what_the_log_said(engine: TensorRtEngine, tmp_path: Path, behave: Any) -> None:
    behave(TENSORRT_STAND_IN_BUILD="fail")
    with pytest.raises(CompileError, match="Could not find any implementation for node"):
        build(engine, matmul(), tmp_path)


def test_a_build_without_memory_says_how_much(engine: TensorRtEngine, tmp_path: Path, behave: Any) -> None:
    behave(TENSORRT_STAND_IN_BUILD="oom")
    with pytest.raises(CompileError, match=r"15485030400 bytes were asked for, .* bytes of the device are free"):
        build(engine, matmul(), tmp_path)


def test_a_build_that_crashes_leaves_this_process_alone(engine: TensorRtEngine, tmp_path: Path, behave: Any) -> None:
    behave(TENSORRT_STAND_IN_BUILD="crash")
    with pytest.raises(CompileError, match="SIGABRT"):
        build(engine, matmul(), tmp_path)


def test_a_build_that_takes_too_long_says_where_it_was(engine: TensorRtEngine, tmp_path: Path, behave: Any) -> None:
    behave(TENSORRT_STAND_IN_BUILD="slow")
    with pytest.raises(CompileError, match=r"not finished after 0.3 s, in .*Timing graph nodes \(step \d+ of 200\)"):
        build(engine, matmul(), tmp_path, timeout_s=0.3)


def test_the_segment_of_a_failed_build_runs_elsewhere(registered: str, behave: Any) -> None:
    behave(TENSORRT_STAND_IN_BUILD="fail")
    artifact = accelrt.compile(matmul(), registered, fallback="allow")
    assert [segment.engine for segment in artifact.placement.segments] == ["cpu/onnxruntime"]
    assert "Could not find any implementation" in " ".join(str(artifact.explain()).replace("│", " ").split())


# Timings of kernels


def timings(tmp_path: Path) -> dict[str, Any]:
    files = sorted((tmp_path / "cache" / "tensorrt").glob("*.cache"))
    assert len(files) == 1
    found: dict[str, Any] = json.loads(files[0].read_text())[1]
    return found


def test_timings_are_kept_and_grow(engine: TensorRtEngine, release: str, tmp_path: Path) -> None:
    build(engine, chain("Relu", "Abs"), tmp_path)
    name = next((tmp_path / "cache" / "tensorrt").glob("*.cache")).name
    assert name == f"timing-{recorded(release)['version']}-Stand-in-GPU-9.0.cache"
    assert set(timings(tmp_path)) == {"Relu", "Abs"}
    build(engine, chain("Tanh", "Abs"), tmp_path)
    assert set(timings(tmp_path)) == {"Relu", "Abs", "Tanh"}
    assert not list((tmp_path / "cache" / "tensorrt").glob("tmp*")), "a temporary file was left"


@pytest.mark.parametrize("content", [b"", b"not a cache", b'["another device", {"Erf": 1.0}]'])
def test_timings_that_cannot_be_used_are_replaced(engine: TensorRtEngine, tmp_path: Path, content: bytes) -> None:
    build(engine, chain("Relu", "Abs"), tmp_path)
    path = next((tmp_path / "cache" / "tensorrt").glob("*.cache"))
    path.write_bytes(content)
    build(engine, chain("Relu", "Abs"), tmp_path)
    assert set(timings(tmp_path)) == {"Relu", "Abs"}


def test_builds_side_by_side_lose_no_timings(engine: TensorRtEngine, tmp_path: Path) -> None:
    from accelrt_cuda import tensorrt_timing_cache

    trt = importlib.import_module("tensorrt")

    class Silent(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None: ...

    config = trt.Builder(Silent()).create_builder_config()
    path = tmp_path / "timings.cache"
    barrier = threading.Barrier(8)

    def one(number: int) -> None:
        cache = tensorrt_timing_cache.attach(config, path)
        barrier.wait()
        cache._timings[f"kernel{number}"] = 1.0
        tensorrt_timing_cache.keep(config, cache, path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert set(json.loads(path.read_text())[1]) == {f"kernel{number}" for number in range(8)}


def test_a_cache_that_cannot_be_written_is_no_error(engine: TensorRtEngine, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tensorrt").write_text("a file where a folder should be")
    assert build(engine, matmul(), tmp_path).files
    assert build(engine, matmul(), tmp_path, timing_cache=False).files


# Running


def sized_by_values() -> onnx.ModelProto:
    net = Builder("nonzero")
    x = net.input("x", ("batch", 4))
    net.output(net.node("NonZero", net.node("Relu", x), name="y"), (2, None), dtype="int64")
    return net.model()


def test_an_output_sized_by_values_is_as_long_as_it_turns_out(engine: TensorRtEngine, tmp_path: Path) -> None:
    nodes = load_graph(sized_by_values()).nodes
    assert all(verdict.supported for verdict in engine.supports_all(nodes, "fp32"))
    program = build(engine, sized_by_values(), tmp_path)
    with engine.load(program, [DEVICE]) as resident:
        for x in ([[-1, -1, -1, -1]], [[1, -1, 1, 1]], [[1.0] * 4] * 20, [[-1, -1, -1, 2]]):
            value = np.array(x, np.float32)
            found = resident.run({"x": value})["y"]
            np.testing.assert_array_equal(found, np.array(np.nonzero(value > 0)))
            assert found.dtype == np.int64


def test_the_older_allocator_function_is_used_where_there_is_no_other(
    engine: TensorRtEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = importlib.import_module("tensorrt_stand_in")
    monkeypatch.setattr(shared.IExecutionContext, "_asynchronous", lambda self: False)
    program = build(engine, sized_by_values(), tmp_path)
    with engine.load(program, [DEVICE]) as resident:
        assert resident.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 8)


def test_an_empty_tensor_has_an_address(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path, batch=(0, 1, 4))
    with engine.load(program, [DEVICE]) as resident:
        assert resident.run({"x": np.empty((0, 32), np.float32)})["y"].shape == (0, 32)


def test_an_input_read_as_a_shape_lies_on_the_host(engine: TensorRtEngine, tmp_path: Path) -> None:
    net = Builder("reshape")
    x, shape = net.input("x", (4, 6)), net.input("shape", (2,), dtype="int64")
    net.output(net.node("Reshape", x, shape, name="y"), (None, None))
    proto = net.model()
    with pytest.raises(CompileError, match="reads the input 'shape' as a shape") as caught:
        build(engine, proto, tmp_path)
    assert "profiles" in str(caught.value.hint)
    program = build(engine, proto, tmp_path, profiles={"shape": ((1, 1), (4, 6), (24, 24))})
    assert header(program)[0]["values"] == {"shape": [[1, 1], [4, 6], [24, 24]]}
    x_value = np.arange(24, dtype=np.float32).reshape(4, 6)
    with engine.load(program, [DEVICE]) as resident:
        for sizes in ([8, 3], [2, 12]):
            found = resident.run({"x": x_value, "shape": np.array(sizes)})["y"]
            np.testing.assert_array_equal(found, x_value.reshape(sizes))


@pytest.mark.parametrize("dtype", ["float16", "int32", "int64", "bool", "int8", "uint8"])
def test_every_type_comes_through(engine: TensorRtEngine, tmp_path: Path, dtype: str) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = onnx.helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info("x", kind, (3, 5))],
        [onnx.helper.make_tensor_value_info("y", kind, (6, 5))],
    )  # fmt: skip
    program = build(engine, onnx.helper.make_model(graph), tmp_path)
    x = (np.arange(15).reshape(3, 5) % 2 if dtype == "bool" else np.arange(15).reshape(3, 5)).astype(dtype)
    with engine.load(program, [DEVICE]) as resident:
        found = resident.run({"x": x})["y"]
    np.testing.assert_array_equal(found, np.concatenate([x, x]))
    assert found.dtype == x.dtype


@given(st.lists(st.integers(-8, 7), max_size=33))
def test_elements_of_four_bits_are_packed_and_unpacked(values: list[int]) -> None:
    import ml_dtypes

    from accelrt_cuda import tensorrt_runtime as runtime

    array = np.array(values, np.int8).astype(ml_dtypes.int4)
    packed = runtime._packed(array, "int4")
    assert packed.size == runtime.bytes_of("int4", array.shape)
    output = runtime._Output(runtime.Tensor("y", "int4", False, False))
    output.pinned = type("Block", (), {"view": lambda self, size: packed[:size]})()  # type: ignore[assignment]
    np.testing.assert_array_equal(
        runtime._array(output, array.shape, packed.size).astype(np.int8), array.astype(np.int8)
    )


def test_the_scheduler_is_told_of_as_many_lanes_as_there_are() -> None:
    from accelrt_cuda.tensorrt_runtime import LANES

    assert TensorRtEngine.caps.parallelism == LANES


def test_sixteen_threads_get_their_own_answers(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    calls = [drawn(program.signature, 1 + number % 7, number) for number in range(160)]
    with engine.load(program, [DEVICE]) as resident:
        expected = [resident.run(inputs)["y"] for inputs in calls]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda inputs: resident.run(inputs)["y"], calls))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_closing_gives_all_memory_back(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    state = cuda_state()
    resident = engine.load(program, [DEVICE])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(resident.run, [drawn(program.signature, rows) for rows in (1, 8, 2, 16)]))
    kept: Any = resident.run_resident(drawn(program.signature), {"y"})
    assert state.used() > 0
    resident.close()
    with pytest.raises(ExecutionError, match="no longer on the device"):
        resident.run(drawn(program.signature))
    assert kept["y"].numpy().shape == (2, 32), "what stays on the device outlives the plan"
    del resident, kept
    gc.collect()
    assert state.blocks == {}
    assert state.streams == set()


# Staying on the device


class Handed:
    """What hands over a capsule that it was given, once."""

    def __init__(self, capsule: Any) -> None:
        self._capsules = [capsule]

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **request: Any) -> Any:
        return self._capsules.pop()


class Theirs:
    """A tensor of another library's, made of one of ours."""

    def __init__(self, ours: Any, **changes: Any) -> None:
        self._ours, self._changes = ours, changes

    def __dlpack_device__(self) -> tuple[int, int]:
        found: tuple[int, int] = self._changes.get("device", self._ours.__dlpack_device__())
        return found

    def __dlpack__(self, **request: Any) -> Any:
        return self._ours.__dlpack__(**request)


def test_outputs_stay_and_are_taken_as_inputs_without_a_copy(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    inputs = drawn(program.signature, 3)
    with engine.load(program, [DEVICE]) as first, engine.load(program, [DEVICE]) as second:
        expected = second.run({"x": first.run(inputs)["y"]})["y"]
        held: Any = first.run_resident(inputs, {"y"})["y"]
        assert held.__dlpack_device__() == (2, 0)
        before = cuda_state().used()
        found = second.run_resident({"x": Theirs(held)}, ())["y"]
        np.testing.assert_array_equal(found, expected)
        first.run(drawn(program.signature, 3, seed=9))
        np.testing.assert_array_equal(second.run_resident({"x": held}, ())["y"], expected)
        assert cuda_state().used() >= before
        np.testing.assert_array_equal(held.numpy(), first.run(inputs)["y"])


def test_a_kept_output_comes_to_the_host_when_asked(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    inputs = drawn(program.signature, 3)
    with engine.load(program, [DEVICE]) as resident:
        held: Any = resident.run_resident(inputs, {"y"})["y"]

        class OnHost:
            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

            def __dlpack__(self, **request: Any) -> Any:
                return held.__dlpack__(**{**request, "dl_device": (1, 0), "copy": True})

        np.testing.assert_array_equal(np.from_dlpack(OnHost()), resident.run(inputs)["y"])
        with pytest.raises(BufferError):
            held.__dlpack__(dl_device=(2, 1))
        with pytest.raises(BufferError):
            held.__dlpack__(copy=True)


def test_an_output_sized_by_values_can_stay(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, sized_by_values(), tmp_path)
    with engine.load(program, [DEVICE]) as resident:
        held: Any = [resident.run_resident({"x": np.full((rows, 4), 1, np.float32)}, {"y"})["y"] for rows in (1, 5, 2)]
        assert [tensor.shape for tensor in held] == [(2, 4), (2, 20), (2, 8)]
        np.testing.assert_array_equal(held[0].numpy(), np.array(np.nonzero(np.ones((1, 4)))))


@pytest.mark.parametrize("versioned", [None, (1, 0)])
def test_capsules_let_go_of_what_they_hold(engine: TensorRtEngine, tmp_path: Path, versioned: Any) -> None:
    program = build(engine, matmul(), tmp_path)
    with engine.load(program, [DEVICE]) as resident:
        held: Any = resident.run_resident(drawn(program.signature), {"y"})["y"]
        capsule = held.__dlpack__(max_version=versioned)
        assert len(tensorrt_dlpack._exported) == 1
        found = tensorrt_dlpack.read(Handed(capsule))
        assert (found.shape, found.dtype, found.address, found.device) == ((2, 32), "float32", held.address, (2, 0))
        del found, capsule
        gc.collect()
        assert tensorrt_dlpack._exported == {}
        # A reader that consumes it renames it, and calls the deleter when it is done.
        capsule = held.__dlpack__(max_version=versioned)
        name = b"dltensor" if versioned is None else b"dltensor_versioned"
        address = dlpack.pointer_of(capsule, name)
        rename = ctypes.pythonapi.PyCapsule_SetName
        rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
        used = b"used_" + name
        rename(capsule, used)
        del capsule
        gc.collect()
        assert len(tensorrt_dlpack._exported) == 1
        dlpack.FORMS[name].from_address(address).deleter(address)
        assert tensorrt_dlpack._exported == {}


def test_a_tensor_of_another_device_or_type_is_refused(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    with engine.load(program, [DEVICE]) as resident:
        held: Any = resident.run_resident(drawn(program.signature), {"y"})["y"]
        held.ordinal = 1
        with pytest.raises(ExecutionError, match=r"on device \(2, 1\)"):
            resident.run_resident({"x": held}, ())
        held.ordinal, held.dtype = 0, "int32"
        with pytest.raises(ExecutionError, match="int32"):
            resident.run_resident({"x": held}, ())
        with pytest.raises(ExecutionError, match="capsule"):
            resident.run_resident({"x": Handed(3)}, ())


def test_a_view_that_is_not_aligned_is_copied_on_the_device(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    inputs = drawn(program.signature, 4)
    with engine.load(program, [DEVICE]) as resident:
        held: Any = resident.run_resident(inputs, {"y"})["y"]
        values = held.numpy()
        tail = tensorrt_dlpack.DeviceArray(held.address + 32 * 4, (3, 32), "float32", 0, held, held._to_host)
        np.testing.assert_allclose(resident.run_resident({"x": tail}, ())["y"], resident.run({"x": values[1:]})["y"])


# Devices go wrong


def test_a_plan_that_does_not_fit_says_what_it_wanted(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(width=256), tmp_path)
    cuda_state().total = 1 << 16
    with pytest.raises(
        OutOfDeviceMemory, match=r"\d+ bytes were asked for, 65536 of 65536 bytes of the device are free"
    ):
        engine.load(program, [DEVICE])


def test_a_call_that_does_not_fit_fails_alone(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path, batch=(1, 8, 1 << 16))
    with engine.load(program, [DEVICE]) as resident:
        resident.run(drawn(program.signature))
        cuda_state().total = cuda_state().used() + 4096
        with pytest.raises(OutOfDeviceMemory, match="bytes were asked for"):
            resident.run(drawn(program.signature, 10000))
        assert resident.run(drawn(program.signature))["y"].shape == (2, 32)


def test_an_output_without_room_fails_alone(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, sized_by_values(), tmp_path, batch=(1, 8, 1 << 16))
    with engine.load(program, [DEVICE]) as resident:
        cuda_state().total = cuda_state().used() + 2048 * 4 * 5
        with pytest.raises(OutOfDeviceMemory):
            resident.run({"x": np.ones((2048, 4), np.float32)})
        assert resident.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 8)


def test_a_lost_device_is_lost_for_good(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    resident = engine.load(program, [DEVICE])
    inputs = drawn(program.signature)
    resident.run(inputs)
    cuda_state().lost = True
    with pytest.raises(DeviceLost, match=r"illegal|IllegalAddress"):
        resident.run(inputs)
    cuda_state().lost = False
    with pytest.raises(DeviceLost):
        resident.run(inputs)
    resident.close()


def test_a_device_lost_in_the_middle_is_told_by_the_log(
    engine: TensorRtEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = build(engine, matmul(), tmp_path)
    monkeypatch.setattr(importlib.import_module("tensorrt_stand_in"), "_executions", 0)
    monkeypatch.setenv("TENSORRT_STAND_IN_LOST_AFTER", "2")
    with engine.load(program, [DEVICE]) as resident:
        resident.run(drawn(program.signature))
        resident.run(drawn(program.signature))
        with pytest.raises(DeviceLost, match="illegal memory access"):
            resident.run(drawn(program.signature))


def test_waiting_threads_are_told_that_the_device_is_lost(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    with engine.load(program, [DEVICE]) as resident:
        cuda_state().lost = True
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(resident.run, drawn(program.signature)) for _ in range(32)]
        assert all(isinstance(future.exception(timeout=30), DeviceLost) for future in futures)


def test_a_session_whose_device_is_lost_goes_on_elsewhere(
    registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = matmul()
    artifact = accelrt.compile(proto, registered, fallback="error")
    inputs = drawn(artifact.signature)
    with accelrt.load(artifact, fallback="allow") as session:
        expected = session.predict(inputs)["y"]
        cuda_state().lost = True
        np.testing.assert_allclose(session.predict(inputs)["y"], expected, rtol=1e-5, atol=1e-6)
        assert session.stats().fallbacks == 1


@pytest.mark.parametrize("content", [b"", b"not a plan", b"ptrt"])
def test_a_file_that_is_no_plan_is_refused(engine: TensorRtEngine, tmp_path: Path, content: bytes) -> None:
    program = build(engine, matmul(), tmp_path)
    program.files[PLAN].write_bytes(content)
    with pytest.raises(IncompatibleProgram, match="magicTagRead"):
        engine.load(program, [DEVICE])


def test_a_plan_of_other_types_is_refused(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    other = Signature((Port("x", TensorType("float16", ("batch", 32))),), program.signature.outputs)
    with pytest.raises(IncompatibleProgram, match="'x' of float32"):
        engine.load(replace(program, signature=other), [DEVICE])
    more = Signature(program.signature.inputs, (*program.signature.outputs, Port("z", TensorType("float32", (1,)))))
    with pytest.raises(IncompatibleProgram, match="lacks the output 'z'"):
        engine.load(replace(program, signature=more), [DEVICE])


def test_code_for_the_host_is_never_allowed(engine: TensorRtEngine, tmp_path: Path) -> None:
    from accelrt_cuda import tensorrt_runtime

    program = build(engine, matmul(), tmp_path, version_compatible=True)
    with engine.load(program, [DEVICE]) as resident:
        resident.run(drawn(program.signature))
    assert tensorrt_runtime._runtime().engine_host_code_allowed is False
    data = program.files[PLAN].read_bytes()
    assert b'"EXCLUDE_LEAN_RUNTIME", ' in data
    told, model = importlib.import_module("tensorrt_stand_in").read_plan(data)
    told["flags"].remove("EXCLUDE_LEAN_RUNTIME")
    text = json.dumps(told).encode()
    program.files[PLAN].write_bytes(b"ptrt-stand-in" + len(text).to_bytes(8, "little") + text + model)
    with pytest.raises(IncompatibleProgram, match="host code"):
        engine.load(program, [DEVICE])


# What a plan depends on


def test_the_fingerprint_is_as_narrow_as_the_options_say(engine: TensorRtEngine, release: str) -> None:
    version = recorded(release)["version"]

    def of(**options: Any) -> Mapping[str, str]:
        return engine.with_options(TensorRtOptions(**options)).fingerprint()

    assert of() == {"tensorrt": version, "compute_capability": "9.0", "device": "Stand-in GPU"}
    assert of(hardware_compatibility="same_compute_capability") == {"tensorrt": version, "compute_capability": "9.0"}
    assert of(hardware_compatibility="ampere_plus") == {"tensorrt": version, "compute_capability": "8.0+"}
    assert of(version_compatible=True)["tensorrt"] == f"{release}.x"


def test_a_plan_for_another_device_is_built_anew(registered: str, tmp_path: Path, behave: Any) -> None:
    path = accelrt.compile(matmul(), registered).save(tmp_path / "m.accel")
    wide = accelrt.compile(matmul(), registered, options={"hardware_compatibility": "ampere_plus"}).save(
        tmp_path / "wide.accel"
    )
    behave(CUDA_STAND_IN_NAME="Other GPU", CUDA_STAND_IN_CAPABILITY="10.0")
    accelrt.registry.REGISTRY.unregister("tensorrt-alone")
    accelrt.register(alone.TensorRtAlone)
    with pytest.raises(IncompatibleProgram):
        accelrt.load(path, fallback="error")
    with accelrt.load(path, fallback="allow") as session:
        assert session.predict(drawn(session.signature))["y"].shape == (2, 32)
        assert session.stats().fallbacks == 0
    with accelrt.load(wide, fallback="error") as session:
        assert session.predict(drawn(session.signature))["y"].shape == (2, 32)


def test_a_device_that_cuda_does_not_see_is_an_error(engine: TensorRtEngine, tmp_path: Path) -> None:
    program = build(engine, matmul(), tmp_path)
    with pytest.raises(CoresUnavailable, match="no device 3"):
        engine.load(program, [replace(DEVICE, index=3)])


# Errors of CUDA and of the log


@pytest.mark.parametrize("code", sorted(tensorrt_errors.STICKY))
def test_errors_that_stay_mean_a_lost_device(code: int) -> None:
    assert isinstance(tensorrt_errors.typed(CudaFailure("f", code, "n"), "Running", None), DeviceLost)


@pytest.mark.parametrize(
    ("text", "cls", "needed"),
    [
        ("Requested amount of GPU memory (1180463648 bytes) could not be allocated.", OutOfDeviceMemory, 1180463648),
        ("Error Code 2: OutOfMemory (Requested size was 15485030400 bytes.)", OutOfDeviceMemory, 15485030400),
        ("autotuning: User allocator error allocating 15485030400-byte buffer", OutOfDeviceMemory, 15485030400),
        ("Error Code 2: OutOfMemory (no further information)", OutOfDeviceMemory, None),
        ("Error Code 1: Cuda Runtime (unspecified launch failure)", DeviceLost, None),
        ("Error Code 1: Cuda Runtime (an illegal memory access was encountered)", DeviceLost, None),
        ("Error Code 3: API Usage Error (Parameter check failed)", ExecutionError, None),
    ],
)
def test_the_log_is_understood(text: str, cls: type[AccelrtError], needed: int | None) -> None:
    error = tensorrt_errors.from_log([text], "Running", (10, 20), ExecutionError)
    assert type(error) is cls
    assert tensorrt_errors.bytes_in(text) == needed
    if cls is OutOfDeviceMemory:
        assert "10 of 20 bytes of the device are free" in error.message
