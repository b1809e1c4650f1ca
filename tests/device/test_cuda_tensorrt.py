"""`cuda/tensorrt` on a device: what the stand-ins cannot tell. Skipped, with the reason, where anything is missing.

The first part needs ``cuda-bindings`` and a device only, the second TensorRT with its libraries.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

import accelrt
from accelrt.backend import Backend, CompileJob, Device, Engine
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import CompileError, OutOfDeviceMemory
from accelrt.graph.load import load_graph
from accelrt.graph.weights import WeightFile
from accelrt.registry import REGISTRY
from accelrt.testing.models import Builder, mlp, small_cnn
from accelrt_cuda import tensorrt_cuda as cuda
from accelrt_cuda import tensorrt_dlpack
from accelrt_cuda.tensorrt import PLAN, TensorRtEngine
from accelrt_cuda.tensorrt_errors import CudaFailure, typed
from accelrt_cuda.tensorrt_options import TensorRtOptions

pytestmark = pytest.mark.gpu


# Memory, streams and DLPack: no TensorRT


@pytest.fixture(scope="module")
def gpu() -> cuda.Gpu:
    try:
        found = list(cuda.devices())
    except (ImportError, OSError, CudaFailure) as error:
        pytest.skip(f"no CUDA device through cuda-bindings: {error}")
    assert found
    assert float(found[0]["compute_capability"]) >= 5.0
    assert found[0]["name"]
    device = cuda.Gpu(0)
    device.use()
    return device


def test_memory_goes_to_the_device_and_back(gpu: cuda.Gpu) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1_000_001).astype(np.uint8)
    stream, there, also, pinned = cuda.Stream(), cuda.DeviceBlock(), cuda.DeviceBlock(), cuda.PinnedBlock()
    try:
        pinned.view(data.size)[...] = data
        assert there.fit(data.size) % cuda.LEAST == 0
        stream.to_device(there.address, pinned.address, data.size)
        stream.on_device(also.fit(data.size), there.address, data.size)
        stream.wait()
        pinned.view(data.size)[...] = 0
        stream.to_host(pinned.address, also.address, data.size)
        stream.wait()
        np.testing.assert_array_equal(pinned.view(data.size), data)
    finally:
        for block in (there, also, pinned):
            block.free()
            block.free()
        stream.close()


def test_memory_that_is_not_there_is_an_error_that_passes(gpu: cuda.Gpu) -> None:
    memory = gpu.memory()
    assert memory is not None
    block = cuda.DeviceBlock()
    with pytest.raises(CudaFailure) as caught:
        block.fit(memory[1] * 2)
    error = typed(caught.value, "Trying", gpu.memory())
    assert isinstance(error, OutOfDeviceMemory)
    assert "bytes were asked for" in error.message
    assert block.fit(1024)
    block.free()


def test_tensors_cross_to_torch_and_back_without_a_copy(gpu: cuda.Gpu) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    source = torch.arange(12, dtype=torch.float32, device="cuda:0").reshape(3, 4)
    torch.cuda.synchronize()
    found = tensorrt_dlpack.read(source)
    assert (found.address, found.shape, found.dtype, found.device) == (source.data_ptr(), (3, 4), "float32", (2, 0))
    with pytest.raises(ValueError, match="C order"):
        tensorrt_dlpack.read(source.t())
    assert tensorrt_dlpack.read(source.to(torch.bfloat16)).dtype == "bfloat16"
    assert tensorrt_dlpack.read(source > 3).dtype == "bool"

    def to_host(address: int, target: np.ndarray[Any, Any]) -> None:
        stream = cuda.Stream()
        stream.to_host(target.ctypes.data, address, target.nbytes)
        stream.wait()
        stream.close()

    ours = tensorrt_dlpack.DeviceArray(found.address, found.shape, found.dtype, 0, found, to_host)
    np.testing.assert_array_equal(ours.numpy(), np.arange(12, dtype=np.float32).reshape(3, 4))
    theirs = torch.from_dlpack(ours)
    assert theirs.data_ptr() == source.data_ptr()
    assert theirs.stride() == (4, 1)
    assert len(tensorrt_dlpack._exported) == 1
    del theirs
    gc.collect()
    assert tensorrt_dlpack._exported == {}


# TensorRT


class TensorRtOnly(Backend):
    """The engine under a backend of the first device."""

    name: ClassVar[str] = "tensorrt-only"

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (TensorRtEngine(),)

    def devices(self) -> Sequence[Device]:
        return (Device(self.name, 0, "the first device"),)


TARGET = "tensorrt-only/tensorrt"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    status = TensorRtEngine().status()
    if not status.usable:
        pytest.skip(f"cuda/tensorrt is not usable here: {status.reason}")
    accelrt.register(TensorRtOnly)
    yield TARGET
    REGISTRY.unregister(TensorRtOnly.name)


def inputs_of(signature: Any, rows: int) -> dict[str, Any]:
    generator = np.random.default_rng(rows)
    sizes = {port.name: [d if isinstance(d, int) else rows for d in port.type.shape] for port in signature.inputs}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2), ("bf16", 1e-1)])
@pytest.mark.parametrize("build", [mlp, small_cnn])
def test_answers_are_those_of_the_cpu(target: str, build: Any, precision: Any, tolerance: float) -> None:
    proto = build()
    artifact = accelrt.compile(proto, target, precision=precision, fallback="error")
    with accelrt.load(artifact) as session, accelrt.load(accelrt.compile(proto, "cpu/onnxruntime")) as cpu:
        for rows in (1, 7, 32):
            inputs = inputs_of(artifact.signature, rows)
            for name, expected in cpu.predict(inputs).items():
                found = session.predict(inputs)[name]
                assert found.dtype == expected.dtype
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_int8_calibrated_symmetrically(target: str) -> None:
    images, labels = held_out_digits()
    calibration = accelrt.Calibration([images[i : i + 1] for i in range(50)], activations="int8", symmetric=True)
    artifact = accelrt.compile(digits_model(), target, precision="int8", calibration=calibration, fallback="error")
    with accelrt.load(artifact) as session:
        scores = [next(iter(session.predict(images[i : i + 32]).values())) for i in range(64, 256, 32)]
    assert (np.concatenate(scores).argmax(1) == labels[64:256]).mean() > 0.9


def test_an_output_sized_by_values(target: str) -> None:
    net = Builder("nonzero")
    net.output(net.node("NonZero", net.node("Relu", net.input("x", ("batch", 4))), name="y"), (2, None), dtype="int64")
    artifact = accelrt.compile(net.model(), target, fallback="error")
    with accelrt.load(artifact) as session:
        for x in (np.full((2, 4), -1, np.float32), np.ones((3, 4), np.float32), np.eye(4, dtype=np.float32)):
            np.testing.assert_array_equal(session.predict({"x": x})["y"], np.array(np.nonzero(x > 0)))


def test_an_unknown_operator_is_refused_with_the_parsers_words(target: str) -> None:
    ports = [onnx.helper.make_tensor_value_info(n, 1, sizes) for n, sizes in (("x", (2, 2, 2)), ("y", (2,)))]
    node = onnx.helper.make_node("Det", ["x"], ["y"])
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:]))
    verdict = TensorRtEngine().supports(load_graph(proto).nodes[0], "fp32")
    assert not verdict.supported
    assert verdict.reason.startswith("the parser refuses")


def test_sixteen_threads_get_their_own_answers(target: str) -> None:
    artifact = accelrt.compile(mlp(), target, fallback="error")
    calls = [inputs_of(artifact.signature, 1 + number % 9) for number in range(200)]
    with accelrt.load(artifact) as session:
        expected = [session.predict(inputs)["y"] for inputs in calls]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda inputs: session.predict(inputs)["y"], calls))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_timing_cache_is_written_and_a_plan_of_every_compatibility_loads(target: str, tmp_path: Path) -> None:
    inputs = inputs_of(load_graph(mlp()).signature, 2)
    expected = accelrt.load(accelrt.compile(mlp(), "cpu/onnxruntime")).predict(inputs)["y"]
    for options in (
        {},
        {"hardware_compatibility": "ampere_plus"},
        {"hardware_compatibility": "same_compute_capability"},
        {"version_compatible": True},
    ):
        path = accelrt.compile(mlp(), target, options=options, fallback="error").save(tmp_path / "m.accel")
        with accelrt.load(path, fallback="error") as session:
            np.testing.assert_allclose(
                session.predict(inputs)["y"], expected, rtol=1e-4, atol=1e-4, err_msg=str(options)
            )
    files = list((tmp_path / "cache" / "tensorrt").glob("timing-*.cache"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0


def test_outputs_that_stay_are_torch_tensors_for_who_wants_them(target: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    graph, engine = load_graph(mlp()), TensorRtEngine()
    weights = WeightFile(tmp_path / "weights.bin")
    graph.write(tmp_path / "model.onnx", weights)
    weights.close()
    (tmp_path / "out").mkdir()
    job = CompileJob(tmp_path / "model.onnx", graph.signature, "fp32", TensorRtOptions())
    program = engine.compile(job, tmp_path / "out")
    assert program.files[PLAN].stat().st_size > 0
    inputs = inputs_of(graph.signature, 4)
    with engine.load(program, [Device("tensorrt-only", 0, "x")]) as resident:
        expected = resident.run(inputs)["y"]
        on_device = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
        torch.cuda.synchronize()
        kept = resident.run_resident(on_device, {"y"})["y"]
        np.testing.assert_allclose(torch.from_dlpack(kept).cpu().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_build_that_takes_too_long_is_given_up(target: str) -> None:
    artifact = accelrt.compile(
        small_cnn(), target, fallback="allow", options={"timeout_s": 0.001, "timing_cache": False}
    )
    if artifact.placement.segments[0].engine == TARGET:
        pytest.skip("the build was done before its first step was told")
    with pytest.raises(CompileError):
        accelrt.compile(small_cnn(), target, fallback="error", options={"timeout_s": 0.001, "timing_cache": False})


def test_bindings_without_libraries_are_told_apart() -> None:
    if importlib.util.find_spec("tensorrt_bindings") is None or importlib.util.find_spec("tensorrt_libs") is not None:
        pytest.skip("for a machine with the bindings of TensorRT and without its libraries")
    status = TensorRtEngine().status()
    assert not status.usable
    assert "its libraries are not" in str(status.reason)
