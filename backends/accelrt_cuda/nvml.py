"""The GPUs of this machine, as NVIDIA's management library tells of them; no framework is imported to look.

The Python module ``pynvml`` comes with the package nvidia-ml-py. The library is opened once and stays open: it numbers
GPUs by their place on the PCI bus, CUDA by speed unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. The two agree where all GPUs
are of one kind; where they are not, `Machine.order_is_sure` says so.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from accelrt.backend import Device
from accelrt_cuda.visible import VARIABLE, Identity, Seen, visible

ORDER = "CUDA_DEVICE_ORDER"


@dataclass(frozen=True, slots=True)
class Instance:
    """One MIG instance: a slice of a GPU that programs see as a device of its own."""

    uuid: str
    name: str
    gpu_instance: int | None
    compute_instance: int | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        index: Its number in the management library.
        uuid: ``GPU-...``.
        name: As NVIDIA calls it: ``NVIDIA H200``.
        compute: Its compute capability, major and minor; None if not told.
        memory_bytes: All of it, used or not.
        partitioned: Whether it is in MIG mode.
        instances: Its MIG instances.
    """

    index: int
    uuid: str
    name: str
    compute: tuple[int, int] | None
    memory_bytes: int | None
    partitioned: bool = False
    instances: tuple[Instance, ...] = ()


Lack = Literal["bindings", "driver", "mismatch", "other"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the management library says.

    Attributes:
        gpus: By its own numbering.
        driver: The driver's version: ``580.95.05``.
        cuda: The newest CUDA that the driver runs, major and minor.
        lack: What is missing if there is nothing to tell: the Python ``bindings``, a ``driver``, a driver of the
            version of its own library (``mismatch``), or something ``other``; None if all is well.
        problem: The library's own words about that.
        faults: GPUs that do not answer, one sentence each.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    lack: Lack | None = None
    problem: str = ""
    faults: tuple[str, ...] = ()

    def order_is_sure(self, environ: Mapping[str, str]) -> bool:
        """Whether CUDA is known to number GPUs as the management library does."""
        kinds = {(gpu.name, gpu.memory_bytes) for gpu in self.gpus}
        return len(kinds) <= 1 or environ.get(ORDER, "").strip() == "PCI_BUS_ID"


_LOCK = threading.Lock()
_found: Machine | None = None
_opened: list[tuple[int, Any]] = []
"""The process and the bindings by which the library was opened."""


def machine() -> Machine:
    """Return what is known of this machine; asked once, and again as long as there is nothing. Never raises."""
    global _found
    with _LOCK:
        if _found is None:
            read = _read()
            if not read.gpus:
                return read
            _found = read
        return _found


def forget() -> None:
    """Ask anew at the next call."""
    global _found
    with _LOCK:
        _found = None
        _opened.clear()


def seen(environ: Mapping[str, str] = os.environ) -> tuple[Seen, ...]:
    """Return which of `machine`'s GPUs this process sees, as CUDA numbers them."""
    identities = [
        Identity(
            gpu.uuid,
            gpu.partitioned,
            tuple((one.uuid, f"MIG-{gpu.uuid}/{one.gpu_instance}/{one.compute_instance}") for one in gpu.instances),
        )
        for gpu in machine().gpus
    ]
    return visible(environ.get(VARIABLE), identities)


def devices(environ: Mapping[str, str] = os.environ, backend: str = "cuda") -> tuple[Device, ...]:
    """Return one device for each that CUDA shows to this process; ``index`` is CUDA's number in this process."""
    here = machine()
    sure = "yes" if here.order_is_sure(environ) else "no"
    return tuple(_device(backend, place, one, here, sure) for place, one in enumerate(seen(environ)))


def _device(backend: str, place: int, one: Seen, here: Machine, sure: str) -> Device:
    gpu = here.gpus[one.gpu]
    part = None if one.instance is None else gpu.instances[one.instance]
    capability = "" if gpu.compute is None else f", compute capability {gpu.compute[0]}.{gpu.compute[1]}"
    properties = {
        "uuid": gpu.uuid if part is None else part.uuid,
        "gpu": str(gpu.index),
        "order_is_sure": sure,
    }
    if gpu.compute is not None:
        properties["compute_capability"] = f"{gpu.compute[0]}.{gpu.compute[1]}"
    if here.driver is not None:
        properties["driver"] = here.driver
    if here.cuda is not None:
        properties["cuda_driver"] = f"{here.cuda[0]}.{here.cuda[1]}"
    name = gpu.name if part is None else part.name
    memory = gpu.memory_bytes if part is None else part.memory_bytes
    return Device(backend, place, name + capability, memory, properties)


def compute_capability(device: Device) -> tuple[int, int] | None:
    """Return a device's compute capability, None if it is not told."""
    major, _, minor = device.properties.get("compute_capability", "").partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def free_bytes(device: Device) -> int | None:
    """Return a device's memory that nobody uses, at this moment; None if it is not told."""
    try:
        nvml = _nvml()
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(device.properties["uuid"])).free)
    except Exception:  # noqa: BLE001 - the bindings raise classes of their own, ctypes its own; there is nothing to tell
        return None


def processes(gpu: int) -> tuple[int, ...]:
    """Return the identifiers of the processes that compute on a GPU, by the management library's number."""
    try:
        nvml = _nvml()
        running = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(gpu))
        return tuple(sorted({int(process.pid) for process in running}))
    except Exception:  # noqa: BLE001 - see `free_bytes`
        return ()


def _nvml() -> Any:
    """Return the bindings with the library open; opening it again is counted and costs nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an older package of the same name says that it is deprecated
        nvml = importlib.import_module("pynvml")
    holder = (os.getpid(), nvml)  # after a fork the library must be opened again
    if _opened != [holder]:
        nvml.nvmlInit()
        _opened[:] = [holder]
    return nvml


def _read() -> Machine:
    try:
        nvml = _nvml()
    except ImportError as error:
        # Without a driver the bindings would find nothing either: that is what to say first.
        return Machine(lack="bindings" if _driver_is_there() else "driver", problem=str(error))
    except Exception as error:  # noqa: BLE001 - see `free_bytes`
        return Machine(lack=_lack_of(error), problem=_text(error))
    try:
        count = int(nvml.nvmlDeviceGetCount())
    except Exception as error:  # noqa: BLE001 - see `free_bytes`
        return Machine(lack=_lack_of(error), problem=_text(error))
    version = _ask(nvml.nvmlSystemGetCudaDriverVersion)
    gpus, faults = [], []
    for index in range(count):
        try:
            gpus.append(_gpu(nvml, index))
        except Exception as error:  # noqa: BLE001 - see `free_bytes`
            faults.append(f"GPU {index} does not answer: {_text(error)}")
    return Machine(
        tuple(gpus),
        _ask(nvml.nvmlSystemGetDriverVersion),
        None if version is None else (version // 1000, version % 1000 // 10),
        faults=tuple(faults),
    )


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    mode = _ask(nvml.nvmlDeviceGetMigMode, handle)  # not supported by most GPUs
    partitioned = bool(mode and mode[0])
    compute = _ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        index,
        str(nvml.nvmlDeviceGetUUID(handle)),
        str(nvml.nvmlDeviceGetName(handle)),
        None if compute is None else (int(compute[0]), int(compute[1])),
        None if memory is None else int(memory.total),
        partitioned,
        _instances(nvml, handle) if partitioned else (),
    )


def _instances(nvml: Any, handle: Any) -> tuple[Instance, ...]:
    found = []
    for place in range(_ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        part = _ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
        if part is None:
            continue  # places of which nothing was made are empty
        memory = _ask(nvml.nvmlDeviceGetMemoryInfo, part)
        found.append(
            Instance(
                str(nvml.nvmlDeviceGetUUID(part)),
                str(_ask(nvml.nvmlDeviceGetName, part) or "MIG instance"),
                _ask(nvml.nvmlDeviceGetGpuInstanceId, part),
                _ask(nvml.nvmlDeviceGetComputeInstanceId, part),
                None if memory is None else int(memory.total),
            )
        )
    return tuple(found)


def _ask(function: Any, *arguments: Any) -> Any:
    """Return an answer, None where the library has none: what one GPU tells another does not."""
    try:
        return function(*arguments)
    except Exception:  # noqa: BLE001 - see `free_bytes`
        return None


def _lack_of(error: BaseException) -> Lack:
    match type(error).__name__:
        case "NVMLError_LibraryNotFound" | "NVMLError_DriverNotLoaded":
            return "driver"
        case "NVMLError_LibRmVersionMismatch":
            return "mismatch"
    return "other"


def _text(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:  # noqa: BLE001 - the bindings ask the library for the text, which may not be there
        return type(error).__name__


def _driver_is_there() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True
