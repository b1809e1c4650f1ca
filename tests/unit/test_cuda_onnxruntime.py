"""The engine cuda/onnxruntime over a stand-in: what it takes, where nodes may be, values on the device, failures."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import accelrt
from accelrt import isolation
from accelrt.backend import CompileJob, Device, Program
from accelrt.errors import CompileError, DeviceLost, ExecutionError, IncompatibleProgram, OptionError, OutOfDeviceMemory
from accelrt.graph.load import load_graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.weights import WeightFile
from accelrt.partition.report import Placement
from accelrt.registry import REGISTRY
from accelrt.testing.models import Builder, mlp, small_cnn
from accelrt_cuda import failures, nvml
from accelrt_cuda.onnxruntime_options import CudaOnnxRuntimeOptions, providers_of
from accelrt_cuda.onnxruntime_session import shape_nodes

STAND_INS = Path(__file__).parents[1] / "stand_ins" / "nvidia"
sys.path.insert(0, str(STAND_INS))
site = importlib.import_module("stand_in_site")
sys.path.remove(str(STAND_INS))


@pytest.fixture(scope="module", autouse=True)
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with site.installed(site.build(tmp_path_factory.mktemp("gpu") / "site")):
        yield


@pytest.fixture(scope="module")
def engine(_machine: None) -> Any:
    made = importlib.import_module("cuda_stand_in").StandInEngine()
    assert made.status().usable, made.status().reason
    return made


@pytest.fixture(scope="module")
def target(_machine: None) -> Iterator[str]:
    backend = importlib.import_module("cuda_stand_in").StandInCudaBackend
    accelrt.register(backend)
    yield "cuda-stand-in/onnxruntime"
    REGISTRY.unregister(backend.name)


def devices() -> Sequence[Device]:
    return nvml.devices()


@pytest.fixture
def with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give TensorRT's provider its libraries; child processes that were started under it serve no other test."""
    monkeypatch.setenv("STAND_IN_TENSORRT", "1")
    isolation.restart()
    yield
    isolation.restart()


def compiled(engine: Any, model: onnx.ModelProto, folder: Path, precision: Any = "fp32", **options: Any) -> Program:
    graph = load_graph(model)
    weights = WeightFile(folder / WEIGHTS_FILE)
    graph.write(folder / "segment.onnx", weights)
    weights.close()
    (out := folder / "out").mkdir()
    job = CompileJob(folder / "segment.onnx", graph.signature, precision, CudaOnnxRuntimeOptions(**options))
    return engine.compile(job, out)


def sized(net: onnx.ModelProto, batch: int = 2) -> onnx.ModelProto:
    for value in (*net.graph.input, *net.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    return net


def growing() -> onnx.ModelProto:
    """Build a model that computes a shape: onnxruntime keeps that on the CPU, and CUDA has kernels for all of it."""
    net = Builder("growing")
    x = net.input("x", ("batch", 3))
    rows = net.node("Gather", net.node("Shape", x), net.constant([0]), axis=0, name="rows")
    shape = net.node("Concat", rows, net.constant([2]), axis=0, name="joined")
    beside = net.node("Expand", net.weight(np.array([[7.0, 8.0]], np.float32)), shape, name="beside")
    net.output(net.node("Concat", x, beside, axis=1, name="y"), ("batch", 5))
    return net.model()


def tempted() -> onnx.ModelProto:
    """Build a model in which onnxruntime moves a computation with data to the CPU, since sizes take part in it."""
    net = Builder("tempted")
    x = net.input("x", ("batch", 4))
    rows = net.node("Cast", net.node("Gather", net.node("Shape", x), net.constant(0)), to=TensorProto.FLOAT)
    net.output(net.node("Relu", net.node("Mul", x, rows, name="scaled"), name="y"), ("batch", 4))
    return net.model()


# What it takes


def verdicts(engine: Any, model: onnx.ModelProto, precision: Any = "fp32") -> dict[str, Any]:
    nodes = load_graph(model).nodes
    return {n.op_type: v for n, v in zip(nodes, engine.supports_all(nodes, precision), strict=True)}


def strange() -> onnx.ModelProto:
    net = Builder("strange")
    x = net.input("x", (2, 3))
    net.output(net.node("Acos", net.node("Tan", net.node("Relu", x)), name="y"), (2, 3))
    return net.model()


def test_what_has_no_kernel_is_refused_with_the_reason(engine: Any) -> None:
    found = verdicts(engine, strange())
    assert found["Relu"].supported
    assert not found["Acos"].supported
    assert found["Acos"].reason == "onnxruntime places Acos on the CPU: no CUDA kernel takes it as it is"


@pytest.mark.usefixtures("with_tensorrt")
def test_the_table_tells_before_a_trial_where_it_can_be_read() -> None:
    engine = importlib.import_module("cuda_stand_in").StandInEngine()
    found = verdicts(engine, strange())
    assert found["Relu"].supported
    assert found["Acos"].reason == "no CUDA kernel for Acos-22" or found["Acos"].reason.startswith("no CUDA kernel for")


def test_a_table_that_kills_the_process_leaves_all_to_trials(engine: Any) -> None:
    from accelrt.graph.kernel_table import KernelTable

    assert verdicts(engine, strange())["Relu"].supported
    assert not isinstance(engine._kernels(), KernelTable)


def test_values_that_are_no_tensors_stay_off_the_gpu(engine: Any) -> None:
    ports = [helper.make_tensor_value_info("x", TensorProto.STRING, [2])]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"], "i")], "g", ports, [
        helper.make_tensor_value_info("y", TensorProto.STRING, [2])
    ])  # fmt: skip
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    assert verdicts(engine, model)["Identity"].reason == "it has a value of type string, which is not kept on the GPU"


def test_bf16_wants_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = importlib.import_module("cuda_stand_in").StandInEngine()
    monkeypatch.setattr(nvml, "devices", lambda: (Device("cuda", 0, "T4", None, {"compute_capability": "7.5"}),))
    assert "takes compute capability 8.0 or more, and T4 has less" in verdicts(engine, mlp(), "bf16")["Gemm"].reason


# Options


@pytest.mark.parametrize(
    "wrong",
    [
        {"execution_provider": "rocm"},
        {"arena": "big"},
        {"cudnn_conv_algo_search": "EXHAUSTIVE"},
        {"cpu_nodes": "all"},
        {"gpu_mem_limit": -1},
        {"execution_provider": "tensorrt"},
        {"execution_provider": "tensorrt", "use_tf32": True, "enable_cuda_graph": True},
    ],
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        CudaOnnxRuntimeOptions(**wrong)


def test_every_option_that_changes_numbers_is_said() -> None:
    ((name, said),) = providers_of(CudaOnnxRuntimeOptions(), 3)
    assert name == "CUDAExecutionProvider"
    assert said == {
        "device_id": "3",
        "use_tf32": "0",
        "arena_extend_strategy": "kNextPowerOfTwo",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "0",
    }
    chosen = CudaOnnxRuntimeOptions(
        use_tf32=True,
        gpu_mem_limit=1 << 30,
        arena="same_as_requested",
        cudnn_conv_algo_search="default",
        prefer_nhwc=True,
    )
    ((_, said),) = providers_of(chosen, 0)
    assert (said["use_tf32"], said["gpu_mem_limit"], said["prefer_nhwc"]) == ("1", str(1 << 30), "1")
    both = providers_of(CudaOnnxRuntimeOptions(execution_provider="tensorrt", use_tf32=True), 1)
    assert [name for name, _ in both] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


# Nothing runs elsewhere unsaid


def test_shape_nodes_are_those_that_read_sizes_alone() -> None:
    assert {"rows", "joined"} <= shape_nodes(load_graph(growing()).proto)
    assert "scaled" not in shape_nodes(load_graph(tempted()).proto)


def test_nodes_that_compute_shapes_may_be_on_the_cpu_and_the_placement_says_so(target: str, engine: Any) -> None:
    artifact = accelrt.compile(growing(), target, fallback="error")
    (segment,) = artifact.placement.segments
    assert segment.remark.startswith("onnxruntime keeps ")
    assert "nodes that compute shapes on the CPU: " in segment.remark
    assert "Gather" in segment.remark
    assert segment.remark in str(artifact.explain())
    x = np.ones((4, 3), np.float32)
    with accelrt.load(artifact) as session:
        np.testing.assert_array_equal(session.predict({"x": x})["y"], [[1, 1, 1, 7, 8]] * 4)


def test_a_placement_with_a_remark_survives_being_saved(target: str) -> None:
    placement = accelrt.compile(growing(), target).placement
    assert any(segment.remark for segment in placement.segments)
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement


def test_nodes_with_data_on_the_cpu_fail_the_compilation_by_name(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"would run \d of \d nodes on the CPU: .*scaled \(Mul\)"):
        compiled(engine, tempted(), tmp_path)


def test_such_nodes_go_to_the_cpu_openly(target: str) -> None:
    placement = accelrt.compile(tempted(), target, fallback="allow").placement
    reasons = [refusal.reason for refusal in placement.refusals if refusal.engine == target]
    assert any("scaled (Mul)" in reason for reason in reasons)
    assert placement.fallen_back


def test_they_may_stay_if_the_user_says_so(engine: Any, tmp_path: Path) -> None:
    program = compiled(engine, tempted(), tmp_path, cpu_nodes="any")
    assert "Mul" in program.remark
    with engine.load(program, devices()) as executable:
        x = np.ones((3, 4), np.float32)
        np.testing.assert_array_equal(executable.run({"x": x})["y"], 3 * x)


def test_not_even_shapes_if_the_user_says_so(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="fallback to CPU EP has been explicitly disabled"):
        compiled(engine, growing(), tmp_path, cpu_nodes="none")


def test_a_provider_that_is_dropped_in_silence_is_an_error(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompileError, match="onnxruntime dropped TensorrtExecutionProvider"):
        compiled(engine, mlp(), tmp_path, execution_provider="tensorrt", use_tf32=True)
    (again := tmp_path / "again").mkdir()
    program = compiled(engine, mlp(), again)
    monkeypatch.setenv("STAND_IN_DROPS_CUDA", "1")
    with pytest.raises(IncompatibleProgram, match="onnxruntime dropped CUDAExecutionProvider in this process"):
        engine.load(program, devices())


def test_tensorrts_libraries_are_looked_for_before_onnxruntime_dies_of_them(engine: Any, tmp_path: Path) -> None:
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    program = compiled(engine, mlp(), one)
    capi = Path(importlib.import_module("onnxruntime_cuda_stand_in").__file__ or "").parent / "capi"
    provider = capi / "libonnxruntime_providers_tensorrt.so"
    provider.write_bytes(site.shared_library(["libnvinfer.so.10", "libc.so.6"]))
    try:
        with pytest.raises(CompileError, match=r"TensorRT provider needs libnvinfer.so.10, which.*'tensorrt==10\.\*'"):
            compiled(engine, mlp(), two, execution_provider="tensorrt", use_tf32=True)
        wanted = replace(program, options=CudaOnnxRuntimeOptions(execution_provider="tensorrt", use_tf32=True))
        with pytest.raises(IncompatibleProgram, match=r"needs libnvinfer\.so\.10"):
            engine.load(wanted, devices())
    finally:
        provider.unlink()


@pytest.mark.usefixtures("with_tensorrt")
def test_tensorrt_under_onnxruntime_says_who_computes_what(engine: Any, tmp_path: Path) -> None:
    program = compiled(engine, mlp(), tmp_path, execution_provider="tensorrt", use_tf32=True)
    assert program.remark == "3 nodes by TensorRT, 2 by CUDA"


@pytest.mark.parametrize(("level", "lines"), [(2, 1), (3, 0)], ids=["warnings", "errors"])
def test_nothing_is_printed_but_what_the_level_of_the_callers_log_lets_through(
    engine: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    level: int,
    lines: int,
) -> None:
    stand_in = importlib.import_module("onnxruntime_cuda_stand_in")
    monkeypatch.setattr(stand_in, "_severity", level)
    program = compiled(engine, mlp(), tmp_path)  # in a child process, whose log is ours
    assert capfd.readouterr() == ("", "")
    with engine.load(program, devices()) as executable:
        executable.run({"x": np.zeros((1, 16), np.float32)})
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), err.count("No registered plugin EP device")) == ("", lines, lines)
    assert stand_in._severity == level


# Precision


def test_fp16_computes_in_fp16_and_names_what_does_not(target: str) -> None:
    artifact = accelrt.compile(small_cnn(), target, precision="fp16", fallback="allow", verify=False)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    with accelrt.load(artifact) as low, accelrt.load(accelrt.compile(small_cnn(), "cpu/onnxruntime")) as full:
        found, expected = low.predict({"image": x})["scores"], full.predict({"image": x})["scores"]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.05
    assert artifact.placement.precision == "fp16"


def test_nodes_without_a_kernel_in_fp16_are_kept_in_float32(engine: Any, tmp_path: Path) -> None:
    net = Builder("kept")
    x = net.input("x", (2, 3))
    total = net.node("CumSum", net.node("Relu", x), net.constant(1))
    net.output(net.node("Erf", total, name="y"), (2, 3))
    model = net.model()
    program = compiled(engine, model, tmp_path, "fp16")
    written = onnx.load(program.files["model.onnx"], load_external_data=False)
    assert any(node.op_type == "Cast" for node in written.graph.node)
    with engine.load(program, devices()) as executable:
        x_ = np.ones((2, 3), np.float32)
        assert executable.run({"x": x_})["y"].dtype == np.float32


def test_int8_says_that_products_are_in_float32(engine: Any, tmp_path: Path) -> None:
    net = Builder("quantised")
    x = net.input("x", (2, 3))
    scale, zero = net.constant(0.1), net.weight(np.zeros((), np.int8))
    quantised = net.node("DequantizeLinear", net.node("QuantizeLinear", x, scale, zero), scale, zero)
    net.output(net.node("Relu", quantised, name="y"), (2, 3))
    program = compiled(engine, net.model(), tmp_path, "int8")
    assert program.remark.startswith("products between 1 DequantizeLinear are computed in float32")


# Values on the device


def test_outputs_may_stay_on_the_device_and_be_handed_on(engine: Any, tmp_path: Path) -> None:
    assert engine.caps.device_tensors
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    first = engine.load(compiled(engine, mlp(outputs=16), one), devices())
    second = engine.load(compiled(engine, mlp(), two), devices())
    middle = first.run_resident({"x": x}, ["y"])["y"]
    assert middle.__dlpack_device__() == (2, 0)
    assert middle.shape == (3, 16)
    assert not isinstance(middle, np.ndarray)
    found = second.run_resident({"x": middle}, [])["y"]
    first.close()
    gc.collect()
    np.testing.assert_array_equal(found, second.run({"x": first_run(engine, one, x)})["y"])


def first_run(engine: Any, folder: Path, x: Any) -> Any:
    path = folder / "out" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def comparing() -> onnx.ModelProto:
    net = Builder("comparing")
    x = net.input("x", (2, 3))
    net.output(net.node("Greater", x, net.constant(0.0), name="y"), (2, 3), "bool")
    return net.model()


def test_truth_values_are_such_to_others_and_back(engine: Any, tmp_path: Path) -> None:
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    net = Builder("choosing")
    flags = net.input("flags", (2, 3), "bool")
    net.output(net.node("Not", flags, name="y"), (2, 3), "bool")
    x = np.array([[1, -1, 0], [2, 3, -4]], np.float32)
    with (
        engine.load(compiled(engine, comparing(), one), devices()) as first,
        engine.load(compiled(engine, net.model(), two), devices()) as second,
    ):
        kept = first.run_resident({"x": x}, ["y"])["y"]
        assert kept.dtype == "bool"
        np.testing.assert_array_equal(second.run_resident({"flags": kept}, [])["y"], x <= 0)


def test_a_capsule_says_bool_where_onnxruntime_says_uint8(engine: Any, tmp_path: Path) -> None:
    from accelrt.graph.dlpack import exported

    with engine.load(compiled(engine, comparing(), tmp_path), devices()) as executable:
        kept = executable.run_resident({"x": np.ones((2, 3), np.float32)}, ["y"])["y"]
        found = exported(kept)
    assert (found.code, found.bits, found.lanes) == (6, 8, 1)  # kDLBool in dlpack.h


@pytest.mark.torch
def test_pytorch_reads_what_stays_and_is_read(engine: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with engine.load(compiled(engine, mlp(), tmp_path), devices()) as executable:
        x = torch.randn(2, 16)
        expected = executable.run({"x": x.numpy()})["y"]
        np.testing.assert_array_equal(executable.run_resident({"x": x}, [])["y"], expected)
        with pytest.raises(ExecutionError, match="row-major"):
            executable.run_resident({"x": torch.randn(16, 2).t()}, [])


def test_a_tensor_of_another_device_is_refused(engine: Any, tmp_path: Path) -> None:
    class Elsewhere:
        def __dlpack__(self, *, stream: Any = None) -> Any:
            raise AssertionError("it must not be asked")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 1)

    with (
        engine.load(compiled(engine, mlp(), tmp_path), devices()) as executable,
        pytest.raises(ExecutionError, match=r"is on DLPack device \(2, 1\), the program on CUDA device 0"),
    ):
        executable.run_resident({"x": Elsewhere()}, [])


def test_a_tensor_is_not_copied_elsewhere(engine: Any, tmp_path: Path) -> None:
    with engine.load(compiled(engine, mlp(), tmp_path), devices()) as executable:
        kept = executable.run_resident({"x": np.zeros((1, 16), np.float32)}, ["y"])["y"]
        for wrong in ({"copy": True}, {"dl_device": (1, 0)}):
            with pytest.raises(BufferError):
                kept.__dlpack__(**wrong)
        assert kept.__dlpack__(stream=1, max_version=(1, 0), dl_device=(2, 0)) is not None


# CUDA graphs


def test_a_graph_reads_and_writes_fixed_addresses(engine: Any, tmp_path: Path) -> None:
    program = compiled(engine, sized(mlp()), tmp_path, enable_cuda_graph=True)
    (plain := tmp_path / "plain").mkdir()
    rng = np.random.default_rng(0)
    calls = [rng.standard_normal((2, 16)).astype(np.float32) for _ in range(20)]
    with (
        engine.load(program, devices()) as captured,
        engine.load(compiled(engine, sized(mlp()), plain), devices()) as normal,
        ThreadPoolExecutor(4) as pool,
    ):
        expected = [normal.run({"x": x})["y"] for x in calls]
        found = list(pool.map(lambda x: captured.run({"x": x})["y"], calls))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        kept = captured.run_resident({"x": calls[0]}, ["y"])["y"]
        captured.run({"x": calls[1]})
        np.testing.assert_array_equal(kept._value.numpy(), expected[0])


def test_a_graph_wants_every_size(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"'x' is a float32.*fixed") as raised:
        compiled(engine, mlp(), tmp_path, enable_cuda_graph=True)
    assert raised.value.hint is not None
    assert "batch=" in raised.value.hint


# Failures


def test_a_program_that_does_not_fit_says_how_much_and_what_is_free(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiled(engine, mlp(hidden=(512, 512)), tmp_path)
    monkeypatch.setenv("STAND_IN_ROOM", "100000")
    with pytest.raises(OutOfDeviceMemory) as raised:
        engine.load(program, devices())
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert f"{size:,} bytes more were asked for, 150,000,000,000 bytes are free of 150,754,820,096" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=x", OutOfDeviceMemory, "does not say how much"),
        ("Failed to allocate memory for requested buffer of size 4096", OutOfDeviceMemory, "4,096 bytes more"),
        ("Available memory of 10 is smaller than requested bytes of 2048", OutOfDeviceMemory, "2,048 bytes more"),
        ("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED", OutOfDeviceMemory, "ran out of memory on cuda:0"),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLost, "an illegal memory access"),
        ("CUDA failure 214: uncorrectable ECC error encountered", DeviceLost, "ECC"),
        ("CUDA failure 46: all CUDA-capable devices are busy or unavailable", DeviceLost, "busy or unavailable"),
        ("CUDA failure 719: unspecified launch failure", DeviceLost, "Start the process anew"),
    ],
)
def test_errors_of_a_run_are_told_apart(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception], match: str
) -> None:
    with engine.load(compiled(engine, mlp(), tmp_path), devices()) as executable:
        x = np.zeros((1, 16), np.float32)
        executable.run({"x": x})
        monkeypatch.setenv("STAND_IN_RUN_FAILS", text)
        with pytest.raises(error, match=match):
            executable.run({"x": x})
        monkeypatch.delenv("STAND_IN_RUN_FAILS")
        executable.run({"x": x})


@pytest.mark.parametrize(
    "text", ["CUDA failure 1: invalid argument", "CUDA failure 701: too many resources", "no room here"]
)
def test_other_errors_stay_what_they_are(text: str) -> None:
    assert failures.lost(text) is None
    assert not failures.out_of_memory(text)


def test_a_lost_device_is_left_for_the_cpu(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with accelrt.load(accelrt.compile(mlp(), target), fallback="allow") as session:
        x = {"x": np.ones((1, 16), np.float32)}
        expected = session.predict(x)["y"]
        monkeypatch.setenv("STAND_IN_RUN_FAILS", "CUDA failure 700: an illegal memory access was encountered")
        np.testing.assert_allclose(session.predict(x)["y"], expected, rtol=1e-6)
        assert session.stats().fallbacks


# The stand-in


def test_the_stand_in_has_onnxruntimes_signatures() -> None:
    stand_in = importlib.import_module("onnxruntime_cuda_stand_in")
    compared = 0
    for name in ("OrtValue", "InferenceSession", "IOBinding"):
        for method in vars(getattr(stand_in, name)):
            if method.startswith("_") and method not in ("__dlpack__", "__dlpack_device__"):
                continue
            wanted = inspect.signature(getattr(getattr(onnxruntime, name), method)).parameters
            given = inspect.signature(getattr(getattr(stand_in, name), method)).parameters
            assert list(given) == list(wanted), (name, method)
            assert [p.kind for p in given.values()] == [p.kind for p in wanted.values()], (name, method)
            compared += 1
    preload = inspect.signature(stand_in.preload_dlls).parameters
    assert list(preload) == list(inspect.signature(onnxruntime.preload_dlls).parameters)
    assert compared > 15


def test_the_stand_in_refuses_what_it_does_not_know() -> None:
    stand_in = importlib.import_module("onnxruntime_cuda_stand_in")
    model = mlp().SerializeToString()
    with pytest.raises(RuntimeError, match='Unknown provider option: "bogus"'):
        stand_in.InferenceSession(model, None, [("CUDAExecutionProvider", {"bogus": "1"})], enable_fallback=0)
    with pytest.raises(TypeError, match="bogus"):
        stand_in.InferenceSession(model, None, ["CUDAExecutionProvider"], bogus=1)


def test_the_stand_in_retries_on_the_cpu_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    stand_in = importlib.import_module("onnxruntime_cuda_stand_in")
    model = mlp().SerializeToString()
    made = stand_in.InferenceSession(model, None, [("CUDAExecutionProvider", {"bogus": "1"})])
    assert made.get_providers() == ["CPUExecutionProvider"]
    assert "EP Error" in capsys.readouterr().out
