"""NVIDIA devices without a GPU: what CUDA_VISIBLE_DEVICES shows, what NVML tells, and why CUDA cannot be used."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accelrt
from accelrt import isolation
from accelrt.errors import BackendUnavailable
from accelrt.registry import REGISTRY
from accelrt.target import parse
from accelrt_cuda import CudaBackend, diagnosis, libraries, nvml
from accelrt_cuda.visible import Identity, Seen, visible

STAND_INS = Path(__file__).parents[1] / "stand_ins" / "nvidia"
sys.path.insert(0, str(STAND_INS))
site = importlib.import_module("stand_in_site")
sys.path.remove(str(STAND_INS))

GPUS = [Identity(f"GPU-{name}") for name in ("aa11-0001", "aa22-0002", "bb33-0003", "cc44-0004")]
ENTRIES = st.one_of(
    st.integers(-2, 6).map(str),
    st.sampled_from(
        ["GPU-aa11-0001", "GPU-aa", "GPU-bb", "GPU-cc44", "GPU-", "MIG-x", "none", "", " 1", "+2", "1gpu", "x1"]
    ),
)


# CUDA_VISIBLE_DEVICES


@pytest.mark.torch
@settings(deadline=None)  # the first example imports PyTorch
@given(entries=st.lists(ENTRIES, max_size=5))
def test_the_variable_is_read_as_pytorch_reads_it(entries: list[str]) -> None:
    torch = pytest.importorskip("torch")

    def read(entries: list[str]) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(entries))
            return list(torch.cuda._parse_visible_devices())

    # This reader of PyTorch's does not know which GPUs there are: what follows an entry that names none of them, doubles
    # among them, is hidden from it.
    def names_one(entry: str) -> bool:
        if entry.startswith("GPU-"):
            return sum(gpu.uuid.startswith(entry) for gpu in GPUS) == 1
        return not any(isinstance(number, int) and number >= len(GPUS) for number in read([entry]))

    shown = list(itertools.takewhile(names_one, entries))
    named = read(shown)
    if named and isinstance(named[0], str):
        named = torch.cuda._transform_uuid_to_ordinals(named, [gpu.uuid for gpu in GPUS])
    assert [one.gpu for one in visible(",".join(entries), GPUS)] == named


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("1,-1,2", [1]),
        ("0,9,1", [0]),
        ("0,0", []),
        ("GPU-bb,GPU-aa11", [2, 0]),
        ("GPU-aa", []),
        ("GPU-aa11,1", [0]),
        ("NoDevFiles", []),
        (" 1 , 2 ", [1, 2]),
    ],
)
def test_what_the_variable_shows(text: str | None, expected: list[int]) -> None:
    assert [one.gpu for one in visible(text, GPUS)] == expected


@given(st.text(max_size=40), st.integers(0, 4))
def test_no_text_breaks_the_reader(text: str, count: int) -> None:
    shown = visible(text, GPUS[:count])
    assert len(set(shown)) == len(shown)
    assert all(0 <= one.gpu < count for one in shown)


SPLIT = [
    Identity("GPU-aa", True, (("MIG-11", "MIG-GPU-aa/1/0"), ("MIG-22", "MIG-GPU-aa/2/0"))),
    Identity("GPU-bb"),
    Identity("GPU-cc", True),
]


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("MIG-22", SPLIT, [Seen(0, 1)]),
        ("MIG-GPU-aa/2/0", SPLIT, [Seen(0, 1)]),
        ("MIG-11,MIG-22", SPLIT, [Seen(0, 0)]),  # a process sees one instance
        ("MIG-", SPLIT, []),
        ("MIG-33", SPLIT, []),
        (None, SPLIT[:1], [Seen(0, 0)]),
        ("0", SPLIT, [Seen(0, 0)]),
        ("1", SPLIT, [Seen(1)]),
        ("2", SPLIT, []),  # in MIG mode, and not one instance made
        (None, SPLIT, [Seen(1)]),
    ],
)
def test_instances(text: str | None, gpus: list[Identity], expected: list[Seen]) -> None:
    assert list(visible(text, gpus)) == expected


# NVML


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that makes this a machine with GPUs, and packages as `stand_in_site.build` has them."""
    with pytest.MonkeyPatch.context() as patch:
        held: list[Any] = []

        def make(found: dict[str, Any] | None = None, **packages: Any) -> None:
            if found is not None:
                patch.setenv("STAND_IN_NVML", json.dumps(found))
            held.append(site.installed(site.build(tmp_path / f"site{len(held)}", **packages)))
            held[-1].__enter__()

        yield make
        for one in reversed(held):
            one.__exit__(None, None, None)


def gpu(number: int, **changes: Any) -> dict[str, Any]:
    facts = {
        "name": "NVIDIA L4",
        "uuid": f"GPU-{number}{number}",
        "total": 24 << 30,
        "used": 1 << 30,
        "compute": [8, 9],
    }
    return {**facts, **changes}


def box(*gpus: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"driver": "580.95.05", "cuda": 13000, "gpus": list(gpus), **changes}


def test_devices_are_numbered_as_cuda_does(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(box(gpu(0), gpu(1), gpu(2)))
    backend = CudaBackend()
    assert [device.index for device in backend.devices()] == [0, 1, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    first, second = backend.devices()
    assert (first.index, first.properties["gpu"], first.properties["uuid"]) == (0, "2", "GPU-22")
    assert second.properties["gpu"] == "0"
    assert first.memory_bytes == 24 << 30
    assert first.description == "NVIDIA L4, compute capability 8.9"
    assert (first.properties["driver"], first.properties["cuda_driver"]) == ("580.95.05", "13.0")
    assert nvml.compute_capability(first) == (8, 9)
    assert nvml.free_bytes(first) == 23 << 30


def test_the_library_is_asked_once(machine: Callable[..., None]) -> None:
    machine(box(gpu(0)))
    backend = CudaBackend()
    backend.devices()
    calls = importlib.import_module("pynvml").CALLS
    before = list(calls)
    for _ in range(50):
        backend.devices()
    assert calls == before


def test_instances_of_a_gpu_are_devices(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        None,
        {"name": "NVIDIA H100 MIG 1g.10gb", "uuid": "MIG-a", "total": 10 << 30, "gi": 7},
        {"name": "NVIDIA H100 MIG 2g.20gb", "uuid": "MIG-b", "total": 20 << 30, "gi": 3},
    ]
    machine(box(gpu(0, name="NVIDIA H100", compute=[9, 0], mig=parts)))
    (device,) = CudaBackend().devices()
    assert (device.properties["uuid"], device.memory_bytes) == ("MIG-a", 10 << 30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-00/3/0")
    (device,) = CudaBackend().devices()
    assert device.description == "NVIDIA H100 MIG 2g.20gb, compute capability 9.0"
    assert nvml.free_bytes(device) == 20 << 30


def test_occupants_are_other_processes(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(box(gpu(0, pids=[4242, os.getpid()]), gpu(1, pids=[os.getpid()])))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert CudaBackend().occupants() == {1: ("process 4242",)}


def test_a_gpu_that_is_lost_leaves_the_others(machine: Callable[..., None]) -> None:
    machine(box(gpu(0, lost=True), gpu(1)))
    (device,) = CudaBackend().devices()
    assert device.properties["gpu"] == "1"
    assert nvml.machine().faults == ("GPU 0 does not answer: GPU is lost",)


def test_gpus_of_several_kinds_may_be_numbered_otherwise(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(box(gpu(0), gpu(1, name="NVIDIA T4")))
    assert {device.properties["order_is_sure"] for device in CudaBackend().devices()} == {"no"}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert {device.properties["order_is_sure"] for device in CudaBackend().devices()} == {"yes"}


def test_the_report_is_json_and_tells_all(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(box(gpu(0), gpu(1)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    report = json.loads(json.dumps(CudaBackend().report()))
    assert len(report["machine"]["gpus"]) == 2
    assert [one["uuid"] for one in report["visible"]] == ["GPU-11"]
    assert report["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert report["onnxruntime"]["version"] == onnxruntime.__version__


def _real_pynvml() -> Any:
    spec = importlib.util.find_spec("pynvml")
    if spec is None or "stand_ins" in str(spec.origin):
        pytest.skip("nvidia-ml-py is not installed")
    return importlib.import_module("pynvml")


def test_the_stand_in_has_the_functions_of_nvidia_ml_py() -> None:
    real = _real_pynvml()
    spec = importlib.util.spec_from_file_location("pynvml_stand_in", STAND_INS / "pynvml.py")
    assert spec is not None
    assert spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    sys.modules["pynvml_stand_in"] = stand_in
    spec.loader.exec_module(stand_in)
    compared = 0
    for name, value in vars(stand_in).items():
        if name.startswith("nvml"):
            wanted = inspect.signature(inspect.unwrap(getattr(real, name)))
            assert [str(p).partition(":")[0].partition("=")[0].strip() for p in inspect.signature(value).parameters.values()] == list(wanted.parameters), name  # fmt: skip
            compared += 1
        elif name.startswith("NVML_ERROR_"):
            assert getattr(real, name) == value
        elif name.startswith("NVMLError_"):
            assert issubclass(getattr(real, name), real.NVMLError)
    assert compared > 15


def test_every_function_that_is_called_exists_in_nvidia_ml_py() -> None:
    import re

    real = _real_pynvml()
    called = set(re.findall(r"nvml\.(nvml\w+)", Path(nvml.__file__).read_text()))
    assert len(called) > 10
    assert [name for name in sorted(called) if not hasattr(real, name)] == []


# Libraries


@given(st.lists(st.from_regex(r"lib[a-z]{1,12}\.so\.[0-9]{1,2}", fullmatch=True), max_size=8))
def test_needed_libraries_are_read_from_the_file(names: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lib.so"
        path.write_bytes(site.shared_library(names))
        assert list(libraries.needed_by(path)) == names


def test_needed_libraries_of_a_real_file() -> None:
    (path,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*.so")
    assert {"libc.so.6", "libpthread.so.0", "libstdc++.so.6"} <= set(libraries.needed_by(path))


@given(st.binary(max_size=300))
def test_no_file_breaks_the_reader(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\x7fELF\x02\x01" + data)
        file.flush()
        assert isinstance(libraries.needed_by(Path(file.name)), tuple)


# The seven situations, and some more


def status_of(engine_name: str = "onnxruntime") -> Any:
    backend = importlib.import_module("cuda_stand_in").StandInCudaBackend()
    return next(engine for engine in backend.engines if engine.name == engine_name).status()


@pytest.mark.parametrize(
    ("found", "packages", "variables", "reason", "remedy"),
    [
        (box(error=12), {}, {}, "no NVIDIA driver on this machine", ("ubuntu-drivers", "--gpus all")),
        (box(error=9), {}, {}, "no NVIDIA driver on this machine", ("ubuntu-drivers", "--gpus all")),
        (box(error=18), {}, {}, "not of the version of its library", ("restart",)),
        (box(error=999), {}, {}, "does not answer", ("nvidia-smi",)),
        (box(gpu(0), cuda=12020), {}, {}, "runs CUDA 12.2 at most", ("install a build for CUDA 12",)),
        (box(), {}, {}, "no GPU that it knows", ("lspci", "--gpus all")),
        (box(gpu(0)), {}, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides all", ("unset CUDA_VISIBLE_",)),
        (box(gpu(0)), {}, {"CUDA_VISIBLE_DEVICES": "3"}, "CUDA_VISIBLE_DEVICES='3' hides all", ("from 0 to 0",)),
        (box(gpu(0, mig=[])), {}, {}, "no instance has been made", ("mig -cgi",)),
        (box(gpu(0, lost=True)), {}, {}, "GPU is lost", ("--gpu-reset",)),
        (box(gpu(0)), {"cudnn": False}, {}, "needs libcudnn.so.9, which", ("onnxruntime-gpu[cuda,cudnn]==1.31.1",)),
        (
            box(gpu(0)),
            {"needed": ("libc.so.6", "libcublasLt.so.99", "libcurand.so.99")},
            {},
            "needs libcublasLt.so.99, libcurand.so.99, which",
            ("onnxruntime-gpu[cuda,cudnn]",),
        ),
        (
            box(gpu(0)),
            {"needed": ("libcuda.so.1",)},
            {},
            "needs libcuda.so.1, which",
            ("NVIDIA_DRIVER_CAPABILITIES", "libcuda1"),
        ),
        (box(gpu(0)), {"cuda": ""}, {}, "a build without CUDA", ("pip uninstall -y onnxruntime",)),
        (box(gpu(0)), {"provider": False}, {}, "a build without CUDA", ("pip uninstall -y onnxruntime",)),
        (box(gpu(0)), {}, {"STAND_IN_CUDA_DEVICES": "0"}, "invalid device ordinal", ("onnxruntime-gpu",)),
        (box(gpu(0)), {}, {"STAND_IN_DROPS_CUDA": "1"}, "fallback to CPU EP has been explicitly disabled", ("pip",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_situation_has_its_words_and_its_command(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    found: dict[str, Any],
    packages: dict[str, Any],
    variables: dict[str, str],
    reason: str,
    remedy: tuple[str, ...],
) -> None:
    wanted = [*packages.get("needed", ()), *([] if packages.get("cudnn", True) else ["libcudnn.so.9"])]
    expected = [name for name in wanted if name in reason]
    if isolation.call("accelrt_cuda.libraries:missing", names=expected) != expected:
        pytest.skip("this machine has what the test wants to be missing")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machine(found, **packages)
    status = status_of()
    assert not status.usable
    assert reason in status.reason
    assert any(text in status.remedy for text in remedy), status.remedy


def test_usable(machine: Callable[..., None]) -> None:
    machine(box(gpu(0)))
    status = status_of()
    assert (status.usable, status.version, status.reason) == (True, "1.31.1", None)


def test_bindings_are_missing_where_a_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml.forget()
    monkeypatch.setattr(nvml, "_driver_is_there", lambda: True)
    found = diagnosis.hardware()
    assert found is not None
    assert (found.situation, found.remedy) == ("not installed", "pip install 'accelrt[cuda]'")
    monkeypatch.setattr(nvml, "_driver_is_there", lambda: False)
    found = diagnosis.hardware()
    assert found is not None
    assert found.situation == "no driver"
    nvml.forget()


def test_minor_versions_of_cuda_do_not_matter(machine: Callable[..., None]) -> None:
    machine(box(gpu(0), cuda=13000))
    assert diagnosis.driver_for((13, 2)) is None
    assert diagnosis.driver_for((12, 9)) is None
    assert diagnosis.driver_for(None) is None
    found = diagnosis.driver_for((14, 0))
    assert found is not None
    assert found.situation == "driver too old"


def test_tensorrts_bindings_without_libraries(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(box(gpu(0)))
    assert diagnosis.tensorrt() is not None
    found = diagnosis.tensorrt()
    assert found is not None
    assert found.situation == "not installed"
    package = Path(sys.path[0]) / "tensorrt_bindings"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('nobody may import this')")
    (package / "tensorrt.so").write_bytes(
        site.shared_library(["libnvinfer.so.99", "libnvonnxparser.so.99", "libc.so.6"])
    )
    importlib.invalidate_caches()
    found = diagnosis.tensorrt()
    assert found is not None
    assert found.situation == "bindings without libraries"
    assert "libnvinfer.so.99, libnvonnxparser.so.99" in found.reason
    assert found.remedy is not None
    assert "pypi.nvidia.com" in found.remedy


def test_asked_for_by_name_the_error_says_the_same(machine: Callable[..., None]) -> None:
    machine(box(error=12))
    registered = "cuda" not in REGISTRY.names()
    if registered:
        accelrt.register(CudaBackend)
    try:
        with pytest.raises(BackendUnavailable, match="no NVIDIA driver on this machine") as raised:
            REGISTRY.candidates(parse("cuda/onnxruntime"))
        assert raised.value.hint is not None
        assert raised.value.hint.startswith("Try: ")
    finally:
        if registered:
            REGISTRY.unregister("cuda")


def test_where_there_is_no_driver_nothing_is_raised_or_started() -> None:
    code = (
        "import sys, subprocess; subprocess.Popen = None; from accelrt_cuda import CudaBackend; b = CudaBackend();"
        "print(b.devices(), b.occupants(), b.groups({}, ()), [e.status().usable for e in b.engines]);"
        "print([m for m in ('torch', 'onnxruntime', 'tensorrt', 'onnx') if m in sys.modules])"
    )
    if CudaBackend().devices():
        pytest.skip("there is a driver here")
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["() {} () [False, False, False]", "[]"], done.stderr
