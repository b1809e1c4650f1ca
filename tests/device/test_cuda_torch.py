"""`cuda/torch` on an NVIDIA GPU: the contract, recordings, numbers, memory, threads, tensors of other libraries, speed.

Run with ``pytest -m gpu tests/device/test_cuda_torch.py``; what compiles takes minutes, ``-k "not compiled"`` leaves it out.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

import accelrt
from accelrt.backend import CompileJob, Device, Executable, Precision, Program
from accelrt.errors import InputError, OutOfDeviceMemory
from accelrt.graph.bind import bind_first_dimension
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.weights import WeightFile
from accelrt.testing.contract import BackendContract
from accelrt.testing.models import bert_base, mlp, resnet50, small_cnn

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins" / "cuda"))


def _problem() -> str:
    """Return why nothing here can run, empty if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no GPU"


PROBLEM = _problem()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM or "there is a GPU")]

_backends = importlib.import_module("torch_backends")

from accelrt_cuda.torch import TorchCudaEngine  # noqa: E402 - beside the path set above
from accelrt_cuda.torch_settings import FACTS, PACKAGE, TorchCudaOptions  # noqa: E402

DEVICE = Device("cuda", 0, "the first GPU")
SEQUENCE = 128


class _Trusted(BackendContract):
    sdk_modules = ("torch", "triton", "onnx", "onnxruntime", "cupy", "pynvml")
    backend_class = _backends.GpuBackend

    @pytest.fixture(autouse=True)
    def trust(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELRT_TRUST", "1")


class TestContract(_Trusted):
    pass


class TestContractWithStaticShapes(_Trusted):
    batch: ClassVar[int | None] = 3

    @pytest.fixture(autouse=True)
    def whole_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from accelrt.testing import contract

        draw = contract.draw
        monkeypatch.setattr(contract, "draw", lambda signature, batch, seed=0: draw(signature, 3, seed))


# What the tests work with


def compiled(source: onnx.ModelProto | Graph, folder: Path, precision: Precision = "fp32", **options: Any) -> Program:
    """Compile a model as one segment."""
    folder.mkdir(exist_ok=True)
    graph = source if isinstance(source, Graph) else load_graph(source)
    weights = WeightFile(folder / WEIGHTS_FILE)
    graph.write(folder / "segment.onnx", weights)
    weights.close()
    (folder / "out").mkdir()
    job = CompileJob(folder / "segment.onnx", graph.signature, precision, TorchCudaOptions(**options))
    return TorchCudaEngine().compile(job, folder / "out")


def opened(program: Program, **options: Any) -> Any:
    if options:
        program = replace(program, options=replace(program.options, **options))
    return TorchCudaEngine().load(program, [DEVICE])


def loaded(source: onnx.ModelProto | Graph, folder: Path, precision: Precision = "fp32", **options: Any) -> Any:
    return opened(compiled(source, folder, precision, **options))


@cache
def network(name: str) -> onnx.ModelProto:
    return resnet50() if name == "resnet50" else bert_base(sequence=SEQUENCE)


def feeds_for(name: str, batch: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    if name == "resnet50":
        return {"image": generator.standard_normal((batch, 3, 224, 224), dtype=np.float32)}
    mask = np.ones((batch, SEQUENCE), np.int64)
    mask[:, SEQUENCE - 17 :] = 0
    return {
        "input_ids": generator.integers(0, 30522, (batch, SEQUENCE)),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, 2, (batch, SEQUENCE)),
    }


@cache
def truth(name: str, batch: int) -> dict[str, Any]:
    """Return what onnxruntime computes on the CPU in float32."""
    with accelrt.load(accelrt.compile(network(name), "cpu/onnxruntime")) as session:
        return session.predict(feeds_for(name, batch))


def error(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Return the largest relative L2 error of the outputs."""
    return max(float(np.linalg.norm(found[n] - a) / np.linalg.norm(a)) for n, a in expected.items())


def seconds(call: Callable[[], object], rounds: int = 200) -> float:
    """Return the median time of a call."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def free_bytes() -> int:
    import gc

    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(0)[0])


# Numbers


BOUNDS = {"fp32": 2e-5, "bf16": 3e-2, "fp16": 5e-3}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["resnet50", "bert_base"])
def test_networks_are_near_float32_on_the_cpu(
    name: str, precision: Precision, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with loaded(network(name), tmp_path, precision, mode="graph") as executable:
        for _ in range(3):
            found = error(executable.run(feeds_for(name, 2)), truth(name, 2))
            assert found < BOUNDS[precision]
        assert executable.recordings >= 1
    record_property("summary", f"{name} in {precision}, torch's own kernels: relative L2 error {found:.1e}")


def test_float32_is_not_rounded_unless_that_is_asked_for(tmp_path: Path) -> None:
    """Both products and convolutions; cuDNN would round by default."""
    import torch

    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark
    for mode in ("graph", "eager"):
        program = compiled(network("resnet50"), tmp_path / mode, mode=mode)
        with opened(program) as executable:
            exact = error(executable.run(feeds_for("resnet50", 2)), truth("resnet50", 2))
        with opened(program, allow_tf32=True) as executable:
            rounded = error(executable.run(feeds_for("resnet50", 2)), truth("resnet50", 2))
        assert exact < BOUNDS["fp32"] < 1e-4 < rounded < 1e-2
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_reaches_a_fused_kernel(precision: Precision, tmp_path: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with loaded(network("bert_base"), tmp_path, precision, mode="eager") as executable:
        executable.run(feeds_for("bert_base", 1))
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            executable.run(feeds_for("bert_base", 1))
            torch.cuda.synchronize()
    kernels = " ".join(event.key.lower() for event in seen.key_averages())
    assert any(sign in kernels for sign in ("fmha", "flash", "attention", "sdpa")), kernels


def test_halves_make_convolutions_with_channels_last(tmp_path: Path) -> None:
    """No kernel turns images from one layout to the other between convolutions."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with loaded(network("resnet50"), tmp_path, "bf16", mode="eager") as executable:
        executable.run(feeds_for("resnet50", 8))
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            executable.run(feeds_for("resnet50", 8))
            torch.cuda.synchronize()
    turns = sum(event.count for event in seen.key_averages() if "nchwtonhwc" in event.key.lower())
    assert turns <= 4, {event.key: event.count for event in seen.key_averages()}


# Recordings


def test_a_recording_for_each_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each shape with an open batch; one in each lane, made while loading, where the batch is bound."""
    with loaded(small_cnn(), tmp_path / "open", mode="graph", streams=1) as executable:
        generator = np.random.default_rng(0)
        for _ in range(3):
            for batch in (1, 4, 8):
                executable.run({"image": generator.standard_normal((batch, 3, 16, 16), dtype=np.float32)})
        assert executable.recordings == 3
    bound = bind_first_dimension(load_graph(small_cnn()), 4)
    with loaded(bound, tmp_path / "bound", mode="graph", streams=2) as executable:
        assert executable.recordings == 2


def test_batches_of_a_session_are_buckets() -> None:
    backend = _backends.GpuBackend
    accelrt.register(backend)
    try:
        artifact = accelrt.compile(small_cnn(), "torchgpu/torch", batch=(1, 8), fallback="error")
        oracle = accelrt.load(accelrt.compile(small_cnn(), "cpu/onnxruntime"))
        with accelrt.load(artifact) as session, oracle:
            for rows in (1, 3, 8, 11):
                image = np.random.default_rng(rows).standard_normal((rows, 3, 16, 16), dtype=np.float32)
                found, expected = session.predict(image)["scores"], oracle.predict(image)["scores"]
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            assert session.stats().fallbacks == 0
    finally:
        from accelrt.registry import REGISTRY

        REGISTRY.unregister("torchgpu")


def test_recordings_of_many_shapes_are_bounded_in_memory(tmp_path: Path) -> None:
    with loaded(small_cnn(), tmp_path, mode="graph", streams=1, graphs=2) as executable:
        image = np.zeros((64, 3, 16, 16), np.float32)
        for batch in range(1, 33):
            for _ in range(3):
                executable.run({"image": image[:batch]})
        assert executable.recordings <= 2


def test_large_inputs_and_results_arrive_whole(tmp_path: Path) -> None:
    """Beyond the size from which they travel in pieces, and results in memory of their own."""
    net = importlib.import_module("accelrt.testing.models").Builder("large")
    net.output(net.node("Relu", net.input("x", ("batch", 1024, 1024)), name="y"), ("batch", 1024, 1024))
    with loaded(net.model(), tmp_path, mode="graph") as executable:
        arrays = [np.random.default_rng(seed).standard_normal((9, 1024, 1024), dtype=np.float32) for seed in range(3)]
        arrays[1].flags.writeable = False
        for _ in range(2):
            found = [executable.run({"x": array})["y"] for array in arrays]
            for array, result in zip(arrays, found, strict=True):
                np.testing.assert_array_equal(result, np.maximum(array, 0))


# Threads, memory, errors


def test_sixteen_threads_get_their_own_answers(tmp_path: Path) -> None:
    with loaded(mlp(), tmp_path, mode="graph") as executable:
        calls = [
            {"x": np.random.default_rng(number).standard_normal((1 + number % 4, 16), dtype=np.float32)}
            for number in range(800)
        ]
        alone = [executable.run(call)["y"] for call in calls]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(executable.run, calls))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other["y"], one, rtol=1e-4, atol=1e-5)


def test_two_programs_are_recorded_and_run_at_the_same_time(tmp_path: Path) -> None:
    programs = [compiled(small_cnn(seed=seed), tmp_path / str(seed), mode="graph") for seed in range(4)]
    image = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)

    def work(program: Program) -> Any:
        with opened(program) as executable:
            return [executable.run({"image": image[: 1 + n % 2]})["scores"] for n in range(40)]

    alone = [work(program) for program in programs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, programs))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def little_memory() -> Iterator[int]:
    """Take all of the device's memory but a little."""
    import torch

    left = 64 << 20
    held = torch.empty(free_bytes() - left, dtype=torch.uint8, device="cuda")
    yield left
    del held
    torch.cuda.empty_cache()


def test_a_program_that_does_not_fit_says_what_it_needs(tmp_path: Path, little_memory: int) -> None:
    program = compiled(network("bert_base"), tmp_path, mode="graph")
    with pytest.raises(OutOfDeviceMemory, match="bytes are free"):
        opened(program)


def test_after_running_out_of_memory_the_device_works(tmp_path: Path) -> None:
    import torch

    program = compiled(network("bert_base"), tmp_path, mode="graph")
    held = torch.empty(free_bytes() - (64 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfDeviceMemory):
        opened(program)
    del held
    torch.cuda.empty_cache()
    with opened(program) as executable:
        assert error(executable.run(feeds_for("bert_base", 2)), truth("bert_base", 2)) < BOUNDS["fp32"]


def test_closing_frees_the_device(tmp_path: Path) -> None:
    program = compiled(network("bert_base"), tmp_path, mode="graph")
    with opened(program) as executable:  # what torch and cuBLAS keep for good is taken now
        executable.run(feeds_for("bert_base", 2))
    before = free_bytes()
    for _ in range(3):
        with opened(program) as executable:
            for _ in range(3):
                executable.run(feeds_for("bert_base", 2))
            assert before - free_bytes() > 400 << 20
        del executable
    assert before - free_bytes() < 64 << 20


def test_a_place_outside_a_table_does_not_reach_the_device(tmp_path: Path) -> None:
    feeds = feeds_for("bert_base", 2)
    with loaded(network("bert_base"), tmp_path, mode="graph") as executable:
        with pytest.raises(InputError):
            executable.run({**feeds, "input_ids": np.full((2, SEQUENCE), 30522)})
        assert error(executable.run(feeds), truth("bert_base", 2)) < BOUNDS["fp32"]


# Tensors that stay


@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("batch", ["batch", 3])
def test_tensors_come_and_go_without_leaving_the_device(library: str, batch: Any, tmp_path: Path) -> None:
    module = pytest.importorskip(library)
    x = np.random.default_rng(0).standard_normal((3, 16), dtype=np.float32)
    with loaded(mlp(batch=batch), tmp_path, mode="graph") as executable:
        expected = executable.run({"x": x})["y"]
        given = module.asarray(x, device="cuda") if library == "torch" else module.asarray(x)
        if library == "cupy":
            module.cuda.get_current_stream().synchronize()
        else:
            module.cuda.synchronize()
        for _ in range(3):
            kept = executable.run_resident({"x": given}, {"y"})["y"]
            assert kept.__dlpack_device__() == (2, 0)
            executable.run({"x": np.zeros((3, 16), np.float32)})
            back = kept.cpu().numpy() if library == "torch" else module.asnumpy(module.from_dlpack(kept))
            np.testing.assert_allclose(back, expected, rtol=1e-4, atol=1e-5)
        found = executable.run_resident({"x": kept.new_tensor(x) if library == "torch" else given}, ())["y"]
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Compiled: minutes


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision, int | None], Program]:
    """Compile a network once for all tests: by name, precision and batch."""
    known: dict[Any, Program] = {}

    def package(name: str, precision: Precision, batch: int | None) -> Program:
        key = name, precision, batch
        if key not in known:
            graph = load_graph(network(name))
            bound = graph if batch is None else bind_first_dimension(graph, batch)
            known[key] = compiled(bound, tmp_path_factory.mktemp("package"), precision, mode="aot")
        return known[key]

    return package


@pytest.mark.parametrize(
    ("name", "precision", "batch"),
    [("resnet50", "bf16", 1), ("bert_base", "bf16", 1), ("bert_base", "fp32", 1), ("bert_base", "bf16", None)],
)
def test_compiled_networks_are_near_and_recorded(
    packages: Any, name: str, precision: Precision, batch: int | None, record_property: Callable[[str, object], None]
) -> None:
    program = packages(name, precision, batch)
    assert set(program.files) == {PACKAGE, FACTS}
    assert json.loads(program.files[FACTS].read_bytes())["capability"] != "none"
    with opened(program) as executable:
        assert (executable.recordings == 2) == (batch is not None)
        for rows in (batch,) * 3 if batch else (1, 2, 2, 2, 5):
            found = error(executable.run(feeds_for(name, rows)), truth(name, rows))
            assert found < BOUNDS[precision]
        assert executable.recordings >= 1
        calls = [feeds_for(name, batch or 2, seed) for seed in range(8)] * 4
        alone = [executable.run(call) for call in calls]
        with ThreadPoolExecutor(16) as pool:
            for one, other in zip(alone, pool.map(executable.run, calls), strict=True):
                assert error(other, one) < 1e-3
    record_property("summary", f"{name} in {precision}, AOTInductor: relative L2 error {found:.1e}")


@pytest.mark.parametrize("name", ["resnet50", "bert_base"])
def test_compiled_and_recorded_takes_less_than_half_of_eager(
    packages: Any, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    feeds, times = feeds_for(name, 1), {}
    graph = bind_first_dimension(load_graph(network(name)), 1)
    for mode in ("eager", "graph"):
        with loaded(graph, tmp_path / mode, "bf16", mode=mode) as executable:
            times[mode] = seconds(lambda executable=executable: executable.run(feeds))
    with opened(packages(name, "bf16", 1)) as executable:
        times["aot"] = seconds(lambda: executable.run(feeds))
    text = ", ".join(f"{mode} {1e3 * value:.3f} ms" for mode, value in times.items())
    record_property("summary", f"{name} in bf16, batch 1, arrays in and out: {text}")
    assert times["aot"] < 0.5 * times["eager"], text
    assert times["aot"] <= 1.05 * times["graph"], text


def test_compiled_when_loaded(tmp_path: Path) -> None:
    graph = bind_first_dimension(load_graph(small_cnn()), 2)
    image = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)
    with loaded(graph, tmp_path / "a", mode="graph") as executable:
        expected = executable.run({"image": image})["scores"]
    with loaded(graph, tmp_path / "b", mode="compile") as executable:
        assert executable.recordings == 2
        np.testing.assert_allclose(executable.run({"image": image})["scores"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "mode", "precision"),
    [("torch.export", "graph", "fp32"), ("torch.export", "graph", "bf16"), ("torch.export", "aot", "fp32"),
     ("torchscript", "auto", "fp32"), ("torchscript", "auto", "fp16")],
)  # fmt: skip
def test_whole_models_compiled_or_not(kind: str, mode: str, precision: Precision, tmp_path: Path) -> None:
    import torch

    from accelrt.graph.types import Port, Signature, TensorType

    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten())
    module = torch.nn.Sequential(*layers, torch.nn.Linear(512, 10)).eval()
    example = (torch.randn(2, 3, 8, 8),)
    signature = Signature(
        (Port("x", TensorType("float32", (2, 3, 8, 8))),), (Port("y", TensorType("float32", (2, 10))),)
    )
    path = tmp_path / ("model.pt2" if kind == "torch.export" else "model.pt")
    if kind == "torch.export":
        torch.export.save(torch.export.export(module, example), path)
    else:
        torch.jit.save(torch.jit.trace(module, example), str(path))
    (tmp_path / "out").mkdir()
    job = CompileJob(path, signature, precision, TorchCudaOptions(mode=mode), kind)
    program = TorchCudaEngine().compile(job, tmp_path / "out")
    with torch.no_grad():
        expected = module(*example).numpy()
    executable: Executable
    with opened(program) as executable:
        assert executable.recordings == 2  # type: ignore[attr-defined]
        for _ in range(3):
            found = executable.run({"x": example[0].numpy()})
            assert error(found, {"y": expected}) < BOUNDS[precision]
