"""The engine `cuda/torch`, on the CPU in the place of a GPU: recordings, transfers, compiled code, whole models, errors."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accelrt
from accelrt.backend import CompileJob, Device, Executable, Precision, Program
from accelrt.errors import CompileError, DeviceLost, IncompatibleProgram, InputError, OptionError, OutOfDeviceMemory
from accelrt.graph.load import load_graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.graph.weights import WeightFile
from accelrt.testing.models import Builder, bert_base, mlp, small_cnn

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins" / "cuda"))
_stand_in = importlib.import_module("torch_backends")

from accelrt_cuda import torch_lanes, torch_transfer  # noqa: E402 - they need torch
from accelrt_cuda.torch import TorchCudaEngine  # noqa: E402
from accelrt_cuda.torch_lanes import Work  # noqa: E402
from accelrt_cuda.torch_math import float32_math  # noqa: E402
from accelrt_cuda.torch_place import HostPlace, place_of, translated  # noqa: E402
from accelrt_cuda.torch_runtime import TorchExecutable  # noqa: E402
from accelrt_cuda.torch_settings import FACTS, PACKAGE, SEGMENT, TorchCudaOptions, inductor_cache  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]

DEVICE = Device("cuda", 0, "the CPU in the place of a GPU")


def compiled(
    model: onnx.ModelProto, folder: Path, precision: Precision = "fp32", **options: Any
) -> tuple[TorchCudaEngine, Program]:
    """Compile a model as one segment."""
    engine = _stand_in.OnCpu()
    graph = load_graph(model)
    weights = WeightFile(folder / WEIGHTS_FILE)
    graph.write(folder / "segment.onnx", weights)
    weights.close()
    out = folder / "out"
    out.mkdir()
    job = CompileJob(folder / "segment.onnx", graph.signature, precision, TorchCudaOptions(**options))
    return engine, engine.compile(job, out)


def loaded(model: onnx.ModelProto, folder: Path, precision: Precision = "fp32", **options: Any) -> Executable:
    engine, program = compiled(model, folder, precision, **options)
    return engine.load(program, [DEVICE])


def oracle(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    with accelrt.load(accelrt.compile(model, "cpu/onnxruntime")) as session:
        return session.predict(feeds)


def batch(size: int, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((size, 16)).astype(np.float32)}


# Recordings


class CountingPlace(HostPlace):
    """Counts what is recorded, replayed and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.forgotten = self.waits = 0
        self.refuses = ""

    def record(self, function: Any, stream: Any, pool: Any) -> Any:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.recorded += 1
        recording = super().record(function, stream, pool)
        forget = recording.forget

        def forgotten() -> None:
            self.forgotten += 1
            forget()

        recording.forget = forgotten  # type: ignore[method-assign]
        return recording

    def wait(self, stream: Any) -> None:
        self.waits += 1


def _signature(shape: tuple[Any, ...]) -> Signature:
    type_ = TensorType("float32", shape)
    return Signature((Port("x", type_),), (Port("y", type_),))


def _double(tensors: list[Any]) -> list[Any]:
    return [tensors[0] * 2]


def _executable(place: Any, shape: tuple[Any, ...], call: Any = _double, streams: int = 1, **work: Any) -> Any:
    graphs = work.pop("graphs", 3)
    made = Work(call, (torch.float32,), ("float32",), **work)
    options = TorchCudaOptions(streams=streams, graphs=graphs)
    return TorchExecutable(place, made, _signature(shape), options, lambda inputs: None)


def ones(*shape: int) -> dict[str, Any]:
    return {"x": np.ones(shape, np.float32)}


def test_static_shapes_are_recorded_while_loading_in_every_lane() -> None:
    place = CountingPlace()
    executable = _executable(place, (2, 3), streams=3)
    assert place.recorded == executable.recordings == 3
    for _ in range(5):
        np.testing.assert_array_equal(executable.run(ones(2, 3))["y"], np.full((2, 3), 2))
    assert place.recorded == 3
    executable.close()
    assert place.forgotten == 3


def test_open_shapes_are_recorded_when_they_come_again() -> None:
    place = CountingPlace()
    executable = _executable(place, ("batch", 3))
    executable.run(ones(2, 3))
    assert place.recorded == 0
    for size in (2, 5, 5, 2, 5):
        np.testing.assert_array_equal(executable.run(ones(size, 3))["y"], np.full((size, 3), 2))
    assert place.recorded == 2


def test_recordings_are_bounded_and_the_least_used_makes_room_when_it_is_idle() -> None:
    place = CountingPlace()
    executable = _executable(place, ("batch",), graphs=2)
    for size in (1, 1, 2, 2, 3, 3, 3):
        executable.run(ones(size))
    assert (place.recorded, executable.recordings) == (2, 2), "3 must wait: 1 and 2 were in use just now"
    for _ in range(torch_lanes.IDLE_CALLS):
        executable.run(ones(2))
    assert executable.run(ones(3))["y"].shape == (3,)
    assert (place.recorded, place.forgotten, executable.recordings) == (3, 1, 2)
    executable.run(ones(1))
    assert place.recorded == 3, "1 was sent away, and 2 is in use"


def test_empty_inputs_are_not_recorded() -> None:
    place = CountingPlace()
    executable = _executable(place, ("batch", 3))
    for _ in range(4):
        assert executable.run(ones(0, 3))["y"].shape == (0, 3)
    assert place.recorded == 0


def test_what_cannot_be_recorded_is_run_as_it_is_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    place = CountingPlace()
    place.refuses = "CUDA error: operation not permitted when stream is capturing"
    executable = _executable(place, (2,))
    for _ in range(3):
        np.testing.assert_array_equal(executable.run(ones(2))["y"], [2, 2])
    assert [record.message for record in caplog.records if "cannot be recorded" in record.message]
    assert len(caplog.records) == 1


def test_a_recording_that_another_thread_spoils_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    class Spoilt(CountingPlace):
        def record(self, function: Any, stream: Any, pool: Any) -> Any:
            self.waits += 1
            if self.waits < 4:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            return super().record(function, stream, pool)

    place = Spoilt()
    executable = _executable(place, (2,))
    np.testing.assert_array_equal(executable.run(ones(2))["y"], [2, 2])
    assert (place.recorded, executable.recordings) == (1, 1)
    assert not caplog.records


def test_running_out_of_memory_while_recording_is_no_reason_to_run_it_otherwise() -> None:
    place = CountingPlace()
    place.refuses = "CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(RuntimeError, match="out of memory"):
        _executable(place, (2,))


def test_no_memory_for_a_second_lane_leaves_one(caplog: pytest.LogCaptureFixture) -> None:
    class Small(CountingPlace):
        def record(self, function: Any, stream: Any, pool: Any) -> Any:
            if self.recorded:
                self.refuses = "CUDA out of memory."
            return super().record(function, stream, pool)

    executable = _executable(Small(), (2,), streams=4)
    assert executable.recordings == 1
    np.testing.assert_array_equal(executable.run(ones(2))["y"], [2, 2])
    assert "1 streams" in caplog.text


def test_work_that_writes_to_its_inputs_finds_them_as_they_were_sent() -> None:
    def doubled_in_place(tensors: list[Any]) -> list[Any]:
        return [tensors[0].mul_(2)]

    executable = _executable(CountingPlace(), (2,), doubled_in_place, writes=True)
    for _ in range(3):
        np.testing.assert_array_equal(executable.run(ones(2))["y"], [2, 2])
    given = torch.ones(2)
    executable.run_resident({"x": given}, ())
    assert given.tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(3,), ("batch",)])
def test_results_are_the_callers(shape: Any) -> None:
    """Also where a program returns its input or a weight as it is."""
    weight = torch.ones(3)
    held = frozenset({weight.untyped_storage().data_ptr()})
    for call in (lambda tensors: [tensors[0]], lambda tensors: [weight], lambda tensors: [tensors[0].view(3)]):
        executable = _executable(CountingPlace(), shape, call, held=held)
        for _ in range(3):
            kept = executable.run(ones(3))["y"]
            resident = executable.run_resident({"x": torch.ones(3)}, {"y"})["y"]
            executable.run({"x": np.full(3, 7, np.float32)})
            executable.run_resident({"x": torch.full((3,), 7.0)}, {"y"})
            kept[...] += 1
            assert resident.tolist() == [1, 1, 1]
            np.testing.assert_array_equal(kept, [2, 2, 2])
    assert weight.tolist() == [1, 1, 1]


def test_lanes_take_calls_side_by_side_and_no_more_than_there_are() -> None:
    inside, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2, timeout=20)

    def slow(tensors: list[Any]) -> list[Any]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        both.wait()
        with lock:
            inside -= 1
        return [tensors[0] * 2]

    executable = _executable(CountingPlace(), ("batch",), slow, streams=2, recordable=False)
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(executable.run, ones(number + 1)) for number in range(6)]
        assert [call.result()["y"].shape for call in calls] == [(number + 1,) for number in range(6)]
    assert most == 2


def test_a_call_that_fails_gives_its_lane_back() -> None:
    def call(tensors: list[Any]) -> list[Any]:
        if tensors[0].shape[0] == 3:
            raise ValueError("no threes")
        return [tensors[0]]

    executable = _executable(CountingPlace(), ("batch",), call)
    for _ in range(3):
        with pytest.raises(ValueError, match="no threes"):
            executable.run(ones(3))
        assert executable.run(ones(2))["y"].shape == (2,)


def test_closing_lets_go_of_the_weights() -> None:
    weight = torch.ones(4)
    gone = weakref.ref(weight)
    executable = _executable(CountingPlace(), (4,), lambda tensors, weight=weight: [tensors[0] * weight])
    del weight
    executable.close()
    executable.close()
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="closed"):
        executable.run(ones(4))
    with pytest.raises(RuntimeError, match="closed"):
        executable.run_resident(ones(4), ())


# Tensors on the device


def test_tensors_of_any_library_come_in_and_what_is_kept_stays() -> None:
    executable = _executable(CountingPlace(), (2, 3))

    class Foreign:
        """As another library's tensor: DLPack and nothing else."""

        def __init__(self) -> None:
            self._inner = torch.arange(6.0).reshape(2, 3)

        def __dlpack__(self, *, stream: Any = None, **rest: Any) -> Any:
            return self._inner.__dlpack__(**rest)

        def __dlpack_device__(self) -> Any:
            return self._inner.__dlpack_device__()

    expected = np.arange(6).reshape(2, 3) * 2
    kept = executable.run_resident({"x": Foreign()}, {"y"})["y"]
    assert isinstance(kept, torch.Tensor)
    np.testing.assert_array_equal(kept, expected)
    again = executable.run_resident({"x": kept}, ())["y"]
    assert isinstance(again, np.ndarray)
    np.testing.assert_array_equal(again, expected * 2)


@pytest.mark.parametrize("shape", [(2, 3), ("batch", 3)])
def test_tensors_that_do_not_fit_are_refused_before_they_reach_the_device(shape: Any) -> None:
    executable = _executable(CountingPlace(), shape)
    with pytest.raises(InputError, match="float64"):
        executable.run_resident({"x": torch.zeros(2, 3, dtype=torch.float64)}, ())
    with pytest.raises(InputError, match="shape"):
        executable.run_resident({"x": torch.zeros(2, 4)}, ())
    with pytest.raises(InputError, match="shape"):
        executable.run_resident({"x": torch.zeros(6)}, ())


def test_code_that_checks_nothing_gets_rows_without_gaps_at_even_addresses() -> None:
    seen = []

    def call(tensors: list[Any]) -> list[Any]:
        seen.append(tensors[0])
        return [tensors[0] * 2]

    executable = _executable(CountingPlace(), ("batch", 3), call, recordable=False)
    transposed, shifted = torch.arange(6.0).reshape(3, 2).t(), torch.arange(7.0)[1:].reshape(2, 3)
    for tensor in (transposed, shifted):
        found = executable.run_resident({"x": tensor}, {"y"})["y"]
        assert found.tolist() == (tensor * 2).tolist()
    assert all(tensor.is_contiguous() and tensor.data_ptr() % torch_lanes.ALIGNMENT == 0 for tensor in seen)


# Transfers


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    dtype=st.sampled_from(["float32", "float64", "int64", "bool", "float16", "bfloat16", "uint8"]),
    writeable=st.booleans(),
    chunk=st.sampled_from([8, 24, 1 << 20]),
    small=st.sampled_from([0, 1 << 16]),
)
def test_arrays_come_back_as_they_went(shape: list[int], dtype: str, writeable: bool, chunk: int, small: int) -> None:
    from accelrt.graph.types import numpy_dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_transfer, "CHUNK_BYTES", chunk)
        patch.setattr(torch_transfer, "SMALL_BYTES", small)
        place, kind = HostPlace(), getattr(torch, dtype)
        array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, shape).astype(numpy_dtype(dtype))
        array.flags.writeable = writeable
        upload = torch_transfer.Upload(place, tuple(shape), kind)
        upload.send(array)
        download = torch_transfer.Download(place, tuple(shape), kind, dtype, torch_transfer.Lent())
        found = download.end(download.begin(upload.tensor))
        assert found.dtype == array.dtype
        assert found.shape == array.shape
        assert found.tobytes() == array.tobytes()
        upload.send(np.zeros_like(array))
        other = download.end(download.begin(upload.tensor))
        assert found.tobytes() == array.tobytes(), "results stay valid"
        assert not np.shares_memory(found, other) or not found.size


def test_pinned_memory_that_callers_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_transfer, "SMALL_BYTES", 0)
    monkeypatch.setattr(torch_transfer, "LENT_BYTES", 100)
    lent = torch_transfer.Lent()
    way = torch_transfer.Download(HostPlace(), (10,), torch.float32, "float32", lent)
    pinned = []

    def fetch() -> Any:
        begun = way.begin(torch.ones(10))
        array = way.end(begun)
        pinned.append(np.shares_memory(array, begun.numpy()))
        return array

    held = [fetch(), fetch(), fetch()]
    assert pinned == [True, True, False]
    held.clear()
    gc.collect()
    fetch()
    assert pinned[-1]


# float32


def _math() -> tuple[Any, ...]:
    backends = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
        backends.cudnn.benchmark,
    )


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("outer", ["as it was", "matmul by its new name", "from above"])
def test_float32_is_multiplied_as_asked_and_as_before_afterwards(outer: str) -> None:
    place = {"matmul by its new name": torch.backends.cuda.matmul, "from above": torch.backends}.get(outer)
    if place is not None:
        place.fp32_precision = "tf32"
    try:
        _check_float32_math()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.fp32_precision = "none"


def _check_float32_math() -> None:
    before = _math()
    with float32_math(allow_tf32=False):
        assert "tf32" not in _math()
        assert torch.backends.cudnn.benchmark
        with float32_math(allow_tf32=False):
            pass
        assert "tf32" not in _math()
    assert _math() == before
    with float32_math(allow_tf32=True):
        assert _math()[:2] == ("tf32", "tf32")
    assert _math() == before


def test_programs_that_want_different_float32_wait_for_each_other() -> None:
    inside, went_in = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(20)
        with float32_math(allow_tf32=True):
            went_in.set()

    thread = threading.Thread(target=other)
    thread.start()
    with float32_math(allow_tf32=False):
        inside.set()
        assert not went_in.wait(0.2)
    thread.join(20)
    assert went_in.is_set()


# Errors


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    ],
)
def test_errors_after_which_the_device_answers_no_more(text: str) -> None:
    found = translated(RuntimeError(text), HostPlace(), 0)
    assert isinstance(found, DeviceLost)
    assert "illegal" in str(found) or text.split("\n", 1)[0] in str(found)


def test_no_memory_says_how_much_is_needed_and_free() -> None:
    class Full(HostPlace):
        def memory(self) -> tuple[int, int]:
            return 1_000, 2_000

    found = translated(torch.OutOfMemoryError("CUDA out of memory."), Full(), 123_456)
    assert isinstance(found, OutOfDeviceMemory)
    assert "123,456" in str(found)
    assert "1,000 of 2,000" in str(found)


def test_other_errors_stay_what_they_are() -> None:
    for error in (ValueError("CUDA error: an illegal memory access"), RuntimeError("shapes cannot be multiplied")):
        assert translated(error, HostPlace(), 0) is error


def test_errors_of_a_call_are_translated() -> None:
    def call(tensors: list[Any]) -> list[Any]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    executable = _executable(CountingPlace(), ("batch",), call, recordable=False)
    with pytest.raises(DeviceLost):
        executable.run(ones(2))
    with pytest.raises(DeviceLost):
        executable.run_resident(ones(2), ())


# The engine


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"streams": 0}, {"streams": 9}, {"graphs": 0}, {"graphs": 65}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        TorchCudaOptions(**options)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_is_a_status() -> None:
    status = TorchCudaEngine().status()
    assert not status.usable
    assert "without CUDA" in str(status.reason)


def test_what_is_refused_says_why() -> None:
    engine = _stand_in.OnCpu()
    nodes = load_graph(mlp()).nodes
    assert "cuda/tensorrt" in engine.supports(nodes[0], "int8").reason
    net = Builder("values")
    places = net.node("NonZero", net.input("x", (3,)), name="y")
    net.output(places, (1, "count"), "int64")
    assert "wait" in engine.supports(load_graph(net.model()).nodes[0], "fp32").reason
    old = mlp()
    old.opset_import[0].version = 12
    assert "opset 13" in engine.supports(load_graph(old).nodes[0], "bf16").reason
    assert engine.supports(load_graph(old).nodes[0], "fp16").supported
    net = Builder("unsigned")
    net.output(
        net.node("Add", net.input("a", (3,), "uint32"), net.input("b", (3,), "uint32"), name="y"), (3,), "uint32"
    )
    assert "uint32" in engine.supports(load_graph(net.model()).nodes[0], "fp32").reason
    text = Signature((Port("x", TensorType("string", (1,))),), ())
    assert "string" in engine.supports_source("torch.export", text, "fp32").reason
    assert not engine.supports_source("saved_model", Signature((), ()), "fp32").supported


def test_devices_are_found_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        def __init__(self, uuid: str) -> None:
            self.uuid = uuid

    cards = [Properties("aaaa-1"), Properties("BBBB-2")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    assert place_of(Device("cuda", 0, "", None, {"uuid": "GPU-bbbb-2"})).device == torch.device("cuda", 1)
    assert place_of(Device("cuda", 1, "")).device == torch.device("cuda", 1)
    with pytest.raises(DeviceLost, match="shows 2"):
        place_of(Device("cuda", 2, ""))


def test_inductor_keeps_its_cache_beside_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path))
    assert inductor_cache() == {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    assert inductor_cache() == {}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_segments(mode: str, precision: Precision, tmp_path: Path) -> None:
    model = small_cnn()
    feeds = {"image": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}
    expected = oracle(model, feeds)["scores"]
    with loaded(model, tmp_path, precision, mode=mode) as executable:
        for _ in range(3):
            found = executable.run(feeds)["scores"]
            assert found.dtype == np.float32
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}[precision]


def test_a_program_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt_cuda import torch_runtime

    engine, program = compiled(mlp(), tmp_path, mode="graph")
    weights: list[Any] = []
    to_device = torch_runtime.prepare

    def prepared(*arguments: Any, **rest: Any) -> Any:
        found = to_device(*arguments, **rest)
        weights.extend(weakref.ref(buffer) for buffer in found.module.buffers())
        return found

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(torch_runtime, "prepare", prepared)
    monkeypatch.setattr(torch_runtime, "TorchExecutable", full)
    with pytest.raises(OutOfDeviceMemory, match="needs") as held:
        engine.load(program, [DEVICE])
    assert weights
    assert all(weight() is None for weight in weights), "the error that the caller holds keeps weights on the device"
    assert held.value.hint


def test_places_outside_an_axis_are_refused_before_they_reach_the_device(tmp_path: Path) -> None:
    model = bert_base(layers=1, hidden=32, heads=2)
    feeds = {name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    with loaded(model, tmp_path, mode="graph") as executable:
        executable.run(feeds)
        for bad in (30522, -30523, 1 << 40):
            with pytest.raises(InputError, match="30522"):
                executable.run({**feeds, "input_ids": np.full((1, 4), bad)})
        with pytest.raises(InputError, match="30522"):
            executable.run_resident({**feeds, "input_ids": torch.full((1, 4), 30522)}, ())
        executable.run(feeds)


def test_a_segment_whose_launches_depend_on_values_is_not_recorded(tmp_path: Path) -> None:
    net = Builder("depends")
    shape = net.input("shape", (2,), "int64")
    net.output(net.node("Reshape", net.input("x", (2, 6)), shape, name="y"), (None, None))
    model = net.model()
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(2, 6), "shape": np.array([3, 4])}
    (tmp_path / "named").mkdir()
    with pytest.raises(CompileError, match="depends on values"):
        compiled(model, tmp_path / "named", mode="graph")
    engine, program = compiled(model, tmp_path, mode="eager")
    with engine.load(replace(program, options=TorchCudaOptions(mode="auto")), [DEVICE]) as executable:
        for _ in range(3):
            np.testing.assert_array_equal(executable.run(feeds)["y"], feeds["x"].reshape(3, 4))
        np.testing.assert_array_equal(
            executable.run({**feeds, "shape": np.array([4, 3])})["y"], feeds["x"].reshape(4, 3)
        )


def test_a_program_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    engine, program = compiled(mlp(), tmp_path, mode="graph")
    with pytest.raises(IncompatibleProgram, match="nothing that cuda/torch wrote"):
        engine.load(replace(program, files={"other": tmp_path / "x"}), [DEVICE])
    (tmp_path / "facts").write_text("{}")
    with pytest.raises(IncompatibleProgram, match="facts"):
        engine.load(replace(program, files={PACKAGE: tmp_path / "x", FACTS: tmp_path / "facts"}), [DEVICE])
    (tmp_path / "facts").write_text('{"run": "fast"}')
    with pytest.raises(IncompatibleProgram, match="fast"):
        files = {SEGMENT: program.files[SEGMENT], FACTS: tmp_path / "facts"}
        engine.load(replace(program, options=TorchCudaOptions(), files=files), [DEVICE])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(IncompatibleProgram):
        engine.load(replace(program, files={SEGMENT: tmp_path / "broken.onnx"}), [DEVICE])


# Compiled code: a minute of a compiler's time


def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor, any batch, in bfloat16 and recorded; compiled code checks nothing, so accelrt does."""
    model = bert_base(layers=1, hidden=64, heads=4)
    engine, program = compiled(model, tmp_path, "bf16", mode="aot")
    assert set(program.files) == {PACKAGE, FACTS}
    facts = json.loads(program.files[FACTS].read_bytes())
    assert facts["bounds"] == {"input_ids": 30522, "token_type_ids": 2}
    with engine.load(program, [DEVICE]) as executable:
        for rows, length in ((1, 9), (3, 16), (3, 16), (3, 16)):
            generator = np.random.default_rng(rows)
            feeds = {name: generator.integers(0, 2, (rows, length)) for name in program.signature.input_names}
            found, expected = executable.run(feeds), oracle(model, feeds)
            for name, array in expected.items():
                assert np.linalg.norm(found[name] - array) / np.linalg.norm(array) < 3e-2
        with pytest.raises(InputError, match="input_ids"):
            executable.run({**feeds, "token_type_ids": np.zeros((3, 15), np.int64)})
        with pytest.raises(InputError, match="30522"):
            executable.run({**feeds, "input_ids": np.full((3, 16), 30522)})
        with pytest.raises(InputError, match="shape"):
            executable.run_resident({**feeds, "input_ids": torch.zeros(3, dtype=torch.int64)}, ())


def test_compiled_when_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = mlp()
    with loaded(model, tmp_path, mode="compile") as executable:
        for _ in range(3):
            np.testing.assert_allclose(
                executable.run(batch(4))["y"], oracle(model, batch(4))["y"], rtol=1e-4, atol=1e-5
            )
    assert list((tmp_path / "inductor").iterdir())


@pytest.mark.parametrize("rows", ["batch", 4])
def test_without_a_compiler_torchs_own_kernels_run_and_the_program_says_so(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = mlp(seed=7, batch=rows)
    engine, program = compiled(model, tmp_path)
    assert "not compiled ahead of time: AOTInductor" in program.remark
    assert "does not compile ahead of time" in caplog.text
    assert set(program.files) == {SEGMENT, FACTS}
    assert json.loads(program.files[FACTS].read_bytes()) == {"run": "graph" if rows == "batch" else "compile"}

    def fails(module: Any, **arguments: Any) -> Any:
        def run(*tensors: Any) -> Any:
            raise RuntimeError("no compiler")

        return run

    monkeypatch.setattr(torch, "compile", fails)  # this process has found its compiler long ago
    with engine.load(program, [DEVICE]) as executable:
        np.testing.assert_allclose(executable.run(batch(4))["y"], oracle(model, batch(4))["y"], rtol=1e-4, atol=1e-5)
    assert ("inductor failed" in caplog.text) == (rows == 4)
    if rows == 4:
        with pytest.raises(IncompatibleProgram):
            engine.load(replace(program, options=TorchCudaOptions(mode="compile")), [DEVICE])
        return
    (tmp_path / "named").mkdir()
    with pytest.raises(CompileError, match="mode='auto'"):
        compiled(model, tmp_path / "named", mode="aot")


# Whole models


def _whole(kind: str, folder: Path) -> tuple[Path, Signature, Any]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    signature = Signature((Port("x", TensorType("float32", (2, 8))),), (Port("y", TensorType("float32", (2, 4))),))
    example = (torch.randn(2, 8),)
    if kind == "torch.export":
        path = folder / "model.pt2"
        torch.export.save(torch.export.export(module, example), path)
    else:
        path = folder / "model.pt"
        torch.jit.save(torch.jit.trace(module, example), str(path))
    return path, signature, module


@pytest.mark.parametrize(
    ("kind", "mode", "precision"),
    [
        ("torch.export", "graph", "fp32"),
        ("torch.export", "eager", "bf16"),
        ("torch.export", "auto", "bf16"),
        ("torch.export", "aot", "fp32"),
        ("torchscript", "auto", "fp32"),
        ("torchscript", "eager", "bf16"),
    ],
)
def test_whole_models(kind: str, mode: str, precision: Precision, tmp_path: Path) -> None:
    path, signature, module = _whole(kind, tmp_path)
    engine = _stand_in.OnCpu()
    (tmp_path / "out").mkdir()
    job = CompileJob(path, signature, precision, TorchCudaOptions(mode=mode), kind)
    program = engine.compile(job, tmp_path / "out")
    assert path.name in program.files
    assert (PACKAGE in program.files) == (mode == "aot")
    assert program.remark
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    with engine.load(program, [DEVICE]) as executable:
        for _ in range(3):
            found = executable.run({"x": x})["y"]
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < (1e-5 if precision == "fp32" else 2e-2)
            assert precision == "fp32" or error > 1e-6, "it computed in float32"


def test_whole_models_that_cannot_be_compiled_ahead_say_so(tmp_path: Path) -> None:
    path, signature, _ = _whole("torchscript", tmp_path)
    (tmp_path / "out").mkdir()
    job = CompileJob(path, signature, "fp32", TorchCudaOptions(mode="aot"), "torchscript")
    with pytest.raises(CompileError, match="TorchScript"):
        _stand_in.OnCpu().compile(job, tmp_path / "out")


def test_calls_from_sixteen_threads_get_their_own_answers(tmp_path: Path) -> None:
    model = mlp()
    with loaded(model, tmp_path, mode="graph") as executable:
        calls: Sequence[Mapping[str, Any]] = [batch(1 + number % 3, number) for number in range(160)]
        expected = [oracle(model, calls[number])["y"] for number in range(16)]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(executable.run, calls))
    for number, array in enumerate(expected):
        np.testing.assert_allclose(found[number]["y"], array, rtol=1e-4, atol=1e-5)
