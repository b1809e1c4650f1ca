"""A stand-in for pynvml of nvidia-ml-py 13: the functions that accelrt calls, with its names, parameters and errors.

``STAND_IN_NVML`` holds what the library finds, as JSON: ``error`` with which it fails to open, ``driver``, ``cuda`` and
``gpus``, each with ``name``, ``uuid``, ``total``, ``used``, ``compute``, ``mig`` and ``pids``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
NVML_ERROR_UNKNOWN = 999

_TEXTS = {
    1: "Uninitialized", 2: "Invalid Argument", 3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found", 15: "GPU is lost", 18: "RM has detected an NVML/RM version mismatch.",
    999: "Unknown Error",
}  # fmt: skip

CALLS: list[str] = []


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value

    def __str__(self) -> str:
        return _TEXTS[self.value]


class NVMLError_Uninitialized(NVMLError): ...  # noqa: N801


class NVMLError_InvalidArgument(NVMLError): ...  # noqa: N801


class NVMLError_NotSupported(NVMLError): ...  # noqa: N801


class NVMLError_NotFound(NVMLError): ...  # noqa: N801


class NVMLError_DriverNotLoaded(NVMLError): ...  # noqa: N801


class NVMLError_LibraryNotFound(NVMLError): ...  # noqa: N801


class NVMLError_GpuIsLost(NVMLError): ...  # noqa: N801


class NVMLError_LibRmVersionMismatch(NVMLError): ...  # noqa: N801


class NVMLError_Unknown(NVMLError): ...  # noqa: N801


_CLASSES = {
    1: NVMLError_Uninitialized, 2: NVMLError_InvalidArgument, 3: NVMLError_NotSupported, 6: NVMLError_NotFound,
    9: NVMLError_DriverNotLoaded, 12: NVMLError_LibraryNotFound, 15: NVMLError_GpuIsLost,
    18: NVMLError_LibRmVersionMismatch, 999: NVMLError_Unknown,
}  # fmt: skip

ONE_H200 = {
    "driver": "580.95.05",
    "cuda": 13000,
    "gpus": [
        {
            "name": "NVIDIA H200",
            "uuid": "GPU-5fe6a1b2-0000-4000-8000-000000000001",
            "total": 150_754_820_096,
            "used": 754_820_096,
            "compute": [9, 0],
        }
    ],
}


@dataclass(frozen=True)
class _Handle:
    gpu: int
    part: int | None = None


@dataclass
class c_nvmlMemory_t:  # noqa: N801
    total: int
    free: int
    used: int


@dataclass
class _Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815


_open = False


def _found() -> dict[str, Any]:
    text = os.environ.get("STAND_IN_NVML")
    return ONE_H200 if text is None else json.loads(text)


def _raise(value: int) -> None:
    raise _CLASSES[value](value)


def _said(handle: _Handle) -> dict[str, Any]:
    if not _open:
        _raise(NVML_ERROR_UNINITIALIZED)
    gpu = _found()["gpus"][handle.gpu]
    if gpu.get("lost"):
        _raise(NVML_ERROR_GPU_IS_LOST)
    return gpu if handle.part is None else gpu["mig"][handle.part]


def nvmlInit() -> None:
    global _open
    CALLS.append("nvmlInit")
    if error := _found().get("error"):
        _raise(error)
    _open = True


def nvmlShutdown() -> None:
    global _open
    _open = False


def nvmlSystemGetDriverVersion() -> str:
    return _found()["driver"]


def nvmlSystemGetCudaDriverVersion() -> int:
    return _found()["cuda"]


def nvmlDeviceGetCount() -> int:
    CALLS.append("nvmlDeviceGetCount")
    if not _open:
        _raise(NVML_ERROR_UNINITIALIZED)
    return len(_found()["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> _Handle:
    if not 0 <= index < len(_found()["gpus"]):
        _raise(NVML_ERROR_INVALID_ARGUMENT)
    _said(_Handle(index))
    return _Handle(index)


def nvmlDeviceGetHandleByUUID(uuid: str) -> _Handle:
    for index, gpu in enumerate(_found()["gpus"]):
        if gpu["uuid"] == uuid:
            return _Handle(index)
        for place, part in enumerate(gpu.get("mig") or []):
            if part is not None and part["uuid"] == uuid:
                return _Handle(index, place)
    _raise(NVML_ERROR_NOT_FOUND)
    raise AssertionError


def nvmlDeviceGetName(handle: _Handle) -> str:
    return _said(handle)["name"]


def nvmlDeviceGetUUID(handle: _Handle) -> str:
    return _said(handle)["uuid"]


def nvmlDeviceGetMemoryInfo(handle: _Handle, version: int | None = None) -> c_nvmlMemory_t:
    said = _said(handle)
    return c_nvmlMemory_t(said["total"], said["total"] - said.get("used", 0), said.get("used", 0))


def nvmlDeviceGetCudaComputeCapability(handle: _Handle) -> tuple[int, int]:
    major, minor = _said(handle)["compute"]
    return (major, minor)


def nvmlDeviceGetMigMode(device: _Handle) -> list[int]:
    said = _said(device)
    if "mig" not in said:
        _raise(NVML_ERROR_NOT_SUPPORTED)
    return [int(said["mig"] is not None)] * 2


def nvmlDeviceGetMaxMigDeviceCount(device: _Handle) -> int:
    _said(device)
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(device: _Handle, index: int) -> _Handle:
    parts = _said(device)["mig"]
    if index >= len(parts) or parts[index] is None:
        _raise(NVML_ERROR_NOT_FOUND)
    return _Handle(device.gpu, index)


def nvmlDeviceGetGpuInstanceId(device: _Handle) -> int:
    return _said(device)["gi"]


def nvmlDeviceGetComputeInstanceId(device: _Handle) -> int:
    return _said(device).get("ci", 0)


def nvmlDeviceGetComputeRunningProcesses(handle: _Handle) -> list[_Process]:
    return [_Process(pid, None) for pid in _said(handle).get("pids", [])]
