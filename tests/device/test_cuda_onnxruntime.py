"""The engine cuda/onnxruntime on a real GPU; skipped with the reason where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import accelrt
from accelrt.backend import CompileJob, Device, Program
from accelrt.errors import CompileError, OutOfDeviceMemory
from accelrt.graph.load import load_graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.weights import WeightFile
from accelrt.testing.contract import BackendContract
from accelrt.testing.models import Builder, bert_base, mlp, resnet50, small_cnn
from accelrt_cuda import CudaBackend, nvml
from accelrt_cuda.onnxruntime import OnnxRuntimeCudaEngine
from accelrt_cuda.onnxruntime_options import CudaOnnxRuntimeOptions

pytestmark = pytest.mark.gpu
TARGET = "cuda/onnxruntime"


@pytest.fixture(autouse=True, scope="module")
def _usable() -> None:
    status = OnnxRuntimeCudaEngine().status()
    if not status.usable:
        pytest.skip(f"{TARGET} is not usable here: {status.reason} (try: {status.remedy})")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Any:
    from accelrt.registry import REGISTRY

    added = "cuda" not in REGISTRY.names()
    if added:
        accelrt.register(CudaBackend)
    yield
    if added:
        REGISTRY.unregister("cuda")


class TestOnnxRuntimeCuda(BackendContract):
    backend_class = CudaBackend
    engine_name: ClassVar[str | None] = "onnxruntime"
    sdk_modules = ("pynvml", "onnxruntime", "torch", "tensorrt", "onnx")


class TestCaptured(BackendContract):
    """With CUDA graphs."""

    backend_class = CudaBackend
    engine_name: ClassVar[str | None] = "onnxruntime"
    batch: ClassVar[int | None] = 2
    engine_options: ClassVar[dict[str, Any]] = {"enable_cuda_graph": True}


@pytest.fixture(scope="module")
def engine(_usable: None) -> OnnxRuntimeCudaEngine:
    return OnnxRuntimeCudaEngine()


def one() -> Sequence[Device]:
    return nvml.devices()[:1]


def compiled(
    engine: OnnxRuntimeCudaEngine, model: onnx.ModelProto, folder: Path, precision: Any = "fp32", **options: Any
) -> Program:
    graph = load_graph(model)
    weights = WeightFile(folder / WEIGHTS_FILE)
    graph.write(folder / "segment.onnx", weights)
    weights.close()
    (out := folder / "out").mkdir()
    job = CompileJob(folder / "segment.onnx", graph.signature, precision, CudaOnnxRuntimeOptions(**options))
    return engine.compile(job, out)


def test_devices_are_those_that_nvidia_smi_lists() -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("there is no nvidia-smi")
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    assert listed.returncode == 0, listed.stderr
    rows = [tuple(part.strip() for part in line.split(",")) for line in listed.stdout.splitlines()]
    assert [(gpu.uuid, gpu.name) for gpu in nvml.machine().gpus] == rows


def test_the_variable_hides_what_cuda_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = one()[0].properties["uuid"]
    code = "import ctypes; c = ctypes.c_int(); l = ctypes.CDLL('libcuda.so.1'); l.cuInit(0); l.cuDeviceGetCount(ctypes.byref(c)); print(c.value)"
    for text in ("0", "-1", "", "0,-1", "99,0", uuid, uuid[:12], f"{uuid},x", "x", "0,0", " 0 ", "0x"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert len(nvml.devices()) == int(done.stdout), text


def test_free_memory_falls_when_a_program_is_loaded(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    (device,) = one()
    program = compiled(engine, mlp(features=4096, hidden=(8192, 8192)), tmp_path)
    before = nvml.free_bytes(device)
    assert before is not None
    with engine.load(program, one()) as executable:
        executable.run({"x": np.zeros((1, 4096), np.float32)})
        after = nvml.free_bytes(device)
    assert after is not None
    assert before - after > 300e6  # 100 million weights of 4 bytes


@pytest.mark.parametrize("build", [small_cnn, mlp, resnet50], ids=lambda build: build.__name__)
def test_all_of_a_plain_model_is_on_cuda(build: Any) -> None:
    placement = accelrt.compile(build(), TARGET, fallback="error").placement
    assert [segment.engine for segment in placement.segments] == [TARGET]
    assert placement.segments[0].remark == ""


def test_a_transformer_with_open_sizes_says_what_is_on_the_cpu() -> None:
    artifact = accelrt.compile(bert_base(layers=2), TARGET, fallback="allow")
    print(artifact.explain())
    share = artifact.placement.nodes_by_engine[TARGET] / sum(artifact.placement.nodes_by_engine.values())
    assert share > 0.9
    ids = np.ones((2, 16), np.int64)
    feeds = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    with accelrt.load(artifact) as found, accelrt.load(accelrt.compile(bert_base(layers=2), "cpu/onnxruntime")) as full:
        expected = full.predict(feeds)
        for name, value in found.predict(feeds).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-3)


def test_fp32_is_not_tf32(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    net = Builder("product")
    weight = rng.standard_normal((1024, 1024)).astype(np.float32)
    net.output(net.node("MatMul", net.input("x", ("n", 1024)), net.weight(weight), name="y"), ("n", 1024))
    model, x = net.model(), rng.standard_normal((64, 1024)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    errors = {}
    for tf32 in (False, True):
        (folder := tmp_path / str(tf32)).mkdir()
        with engine.load(compiled(engine, model, folder, use_tf32=tf32), one()) as executable:
            errors[tf32] = np.abs(executable.run({"x": x})["y"] - exact).max()
    assert errors[False] < 1e-3
    if one()[0].properties["compute_capability"] >= "8.0":
        assert errors[True] > 3 * errors[False]  # else the option would do nothing


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fewer_bits(precision: Any) -> None:
    if precision == "bf16" and one()[0].properties["compute_capability"] < "8.0":
        pytest.skip("bf16 wants compute capability 8.0")
    artifact = accelrt.compile(small_cnn(), TARGET, precision=precision, fallback="allow", verify=False)
    print(artifact.explain())
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    with accelrt.load(artifact) as low, accelrt.load(accelrt.compile(small_cnn(), "cpu/onnxruntime")) as full:
        found, expected = low.predict({"image": x})["scores"], full.predict({"image": x})["scores"]
    assert 0 < np.abs(found - expected).max() < 0.1


def test_values_stay_on_the_device(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    (a := tmp_path / "a").mkdir()
    (b := tmp_path / "b").mkdir()
    with (
        engine.load(compiled(engine, mlp(outputs=16), a), one()) as first,
        engine.load(compiled(engine, mlp(), b), one()) as second,
    ):
        kept = first.run_resident({"x": x}, ["y"])["y"]
        assert kept.__dlpack_device__() == (2, 0)
        expected = second.run({"x": first.run({"x": x})["y"]})["y"]
        np.testing.assert_allclose(second.run_resident({"x": kept}, [])["y"], expected, rtol=1e-5, atol=1e-6)


def test_other_libraries_read_and_hand_in(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    with engine.load(compiled(engine, mlp(), tmp_path), one()) as executable:
        x = torch.randn(4, 16, device="cuda")
        torch.cuda.synchronize()
        expected = executable.run({"x": x.cpu().numpy()})["y"]
        kept = executable.run_resident({"x": x}, ["y"])["y"]
        read = torch.from_dlpack(kept)
        assert read.is_cuda
        del kept
        np.testing.assert_allclose(read.cpu().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_truth_values_reach_pytorch_as_such(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    net = Builder("comparing")
    net.output(net.node("Greater", net.input("x", (2, 3)), net.constant(0.0), name="y"), (2, 3), "bool")
    x = np.array([[1, -1, 0], [2, 3, -4]], np.float32)
    with engine.load(compiled(engine, net.model(), tmp_path), one()) as executable:
        read = torch.from_dlpack(executable.run_resident({"x": x}, ["y"])["y"])
        assert read.dtype == torch.bool
        np.testing.assert_array_equal(read.cpu().numpy(), x > 0)


def sized(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    return model


@pytest.mark.parametrize("build", [mlp, small_cnn], ids=lambda build: build.__name__)
def test_a_cuda_graph_answers_as_a_run_does(engine: OnnxRuntimeCudaEngine, tmp_path: Path, build: Any) -> None:
    (a := tmp_path / "a").mkdir()
    (b := tmp_path / "b").mkdir()
    model = sized(build(), 2)
    name, shape = ("x", (2, 16)) if build is mlp else ("image", (2, 3, 16, 16))
    rng = np.random.default_rng(0)
    calls = [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(24)]
    with (
        engine.load(compiled(engine, model, a, enable_cuda_graph=True), one()) as captured,
        engine.load(compiled(engine, model, b), one()) as normal,
        ThreadPoolExecutor(4) as pool,
    ):
        expected = [normal.run(feeds) for feeds in calls]
        for found, wanted in zip(pool.map(captured.run, calls), expected, strict=True):
            for output, value in wanted.items():
                np.testing.assert_allclose(found[output], value, rtol=1e-4, atol=1e-5)


def test_a_computation_with_data_does_not_slip_to_the_cpu(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    net = Builder("tempted")
    x = net.input("x", ("batch", 4))
    rows = net.node("Cast", net.node("Gather", net.node("Shape", x), net.constant(0)), to=TensorProto.FLOAT)
    net.output(net.node("Relu", net.node("Mul", x, rows, name="scaled"), name="y"), ("batch", 4))
    model = net.model()
    try:
        program = compiled(engine, model, tmp_path)
    except CompileError as error:
        assert "scaled (Mul)" in error.message  # as onnxruntime 1.31.1 places it
    else:
        assert "Mul" not in program.remark


def test_what_does_not_fit_says_how_much_was_asked_for(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    program = compiled(engine, mlp(features=1024, hidden=(4096,)), tmp_path)
    limited = replace(program, options=replace(program.options, gpu_mem_limit=1 << 20))
    with pytest.raises(OutOfDeviceMemory, match=r"bytes are free of") as raised, engine.load(limited, one()) as loaded:
        loaded.run({"x": np.zeros((1, 1024), np.float32)})
    assert "more were asked for" in str(raised.value) or "take" in str(raised.value)


def test_the_layout_of_tensor_cores_changes_no_number(engine: OnnxRuntimeCudaEngine, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    found = []
    for number, options in enumerate(({}, {"prefer_nhwc": True}, {"cudnn_conv_algo_search": "heuristic"})):
        (folder := tmp_path / str(number)).mkdir()
        with engine.load(compiled(engine, small_cnn(), folder, **options), one()) as executable:
            found.append(executable.run({"image": x})["scores"])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-4)
