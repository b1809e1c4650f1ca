"""A stand-in for ``cuda.bindings.runtime``: a device whose memory is the host's, and that keeps account of it.

The functions are those that accelrt calls, with the names, parameters and results of cuda-bindings 13.5: a tuple, the
error first, None for results that are not to be had. Copies look whether the addresses lie in memory of the kind that
the direction says. `STATE` is what tests turn; variables of the environment set it for processes that are started.
"""

# ruff: noqa: N801, N802, N803, N815 - the names are the vendor's

from __future__ import annotations

import ctypes
import enum
import os
import threading
from dataclasses import dataclass, field
from typing import Any


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidMemcpyDirection = 21
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaStream_t:
    def __init__(self, handle: int = 0) -> None:
        self._handle = handle

    def __int__(self) -> int:
        return self._handle


@dataclass
class cudaDeviceProp:
    name: bytes
    major: int
    minor: int
    totalGlobalMem: int


@dataclass
class State:
    """What the stand-in pretends, and what it holds."""

    devices: int = int(os.environ.get("CUDA_STAND_IN_DEVICES", "1"))
    driver: int = int(os.environ.get("CUDA_STAND_IN_DRIVER", "13010"))
    total: int = int(os.environ.get("CUDA_STAND_IN_MEMORY", str(8 << 30)))
    capability: str = os.environ.get("CUDA_STAND_IN_CAPABILITY", "9.0")
    name: str = os.environ.get("CUDA_STAND_IN_NAME", "Stand-in GPU")
    lost: bool = False
    blocks: dict[int, tuple[Any, int, str]] = field(default_factory=dict)  # address: memory, size, kind
    streams: set[int] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def used(self) -> int:
        with self.lock:
            return sum(size for _, size, kind in self.blocks.values() if kind == "device")

    def kind_at(self, address: int, size: int) -> str | None:
        """Return the kind of memory that holds so many bytes from an address on: device, pinned, or None."""
        with self.lock:
            for start, (_, room, kind) in self.blocks.items():
                if start <= address and address + size <= start + room:
                    return kind
        return None

    def allocate(self, size: int, kind: str) -> int | None:
        with self.lock:
            if kind == "device" and self.used() + size > self.total:
                return None
            memory = (ctypes.c_uint8 * (size + 256))()
            address = -(-ctypes.addressof(memory) // 256) * 256
            self.blocks[address] = (memory, size, kind)
            return address

    def release(self, address: int, kind: str) -> bool:
        with self.lock:
            if address in self.blocks and self.blocks[address][2] == kind:
                del self.blocks[address]
                return True
            return False


STATE = State()
_OK = cudaError_t.cudaSuccess
_current = threading.local()


def _fault() -> cudaError_t | None:
    if STATE.lost:
        return cudaError_t.cudaErrorIllegalAddress
    if STATE.driver < 13000:
        return cudaError_t.cudaErrorInsufficientDriver
    return cudaError_t.cudaErrorNoDevice if STATE.devices == 0 else None


def cudaDriverGetVersion() -> tuple[Any, ...]:
    return _OK, STATE.driver


def cudaRuntimeGetVersion() -> tuple[Any, ...]:
    return _OK, 13050


def cudaGetLastError() -> tuple[Any, ...]:
    return (_fault() or _OK,)


def cudaGetDeviceCount() -> tuple[Any, ...]:
    return (fault, None) if (fault := _fault()) else (_OK, STATE.devices)


def cudaSetDevice(device: int) -> tuple[Any, ...]:
    if fault := _fault():
        return (fault,)
    if not 0 <= device < STATE.devices:
        return (cudaError_t.cudaErrorInvalidDevice,)
    _current.device = device
    return (_OK,)


def cudaDeviceGetAttribute(attr: cudaDeviceAttr, device: int) -> tuple[Any, ...]:
    if fault := _fault():
        return fault, None
    return _OK, int(STATE.capability.split(".")[attr is cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor])


def cudaGetDeviceProperties(device: int) -> tuple[Any, ...]:
    if fault := _fault():
        return fault, None
    major, minor = map(int, STATE.capability.split("."))
    return _OK, cudaDeviceProp(STATE.name.encode() + b"\0" * 8, major, minor, STATE.total)


def cudaMemGetInfo() -> tuple[Any, ...]:
    return (fault, None, None) if (fault := _fault()) else (_OK, STATE.total - STATE.used(), STATE.total)


def cudaMalloc(size: int) -> tuple[Any, ...]:
    if fault := _fault():
        return fault, None
    if not hasattr(_current, "device"):
        raise AssertionError("memory was asked for by a thread that has not said for which device")
    address = STATE.allocate(size, "device")
    return (cudaError_t.cudaErrorMemoryAllocation, None) if address is None else (_OK, address)


def cudaFree(devPtr: int) -> tuple[Any, ...]:
    return (_OK if STATE.release(devPtr, "device") else cudaError_t.cudaErrorInvalidValue,)


def cudaMallocHost(size: int) -> tuple[Any, ...]:
    return (fault, None) if (fault := _fault()) else (_OK, STATE.allocate(size, "pinned"))


def cudaFreeHost(ptr: int) -> tuple[Any, ...]:
    return (_OK if STATE.release(ptr, "pinned") else cudaError_t.cudaErrorInvalidValue,)


def cudaStreamCreateWithFlags(flags: int) -> tuple[Any, ...]:
    if fault := _fault():
        return fault, None
    with STATE.lock:
        handle = max(STATE.streams, default=0x1000) + 1
        STATE.streams.add(handle)
    return _OK, cudaStream_t(handle)


def cudaStreamSynchronize(stream: cudaStream_t) -> tuple[Any, ...]:
    if fault := _fault():
        return (fault,)
    return (_OK if int(stream) in STATE.streams else cudaError_t.cudaErrorInvalidResourceHandle,)


def cudaStreamDestroy(stream: cudaStream_t) -> tuple[Any, ...]:
    with STATE.lock:
        STATE.streams.discard(int(stream))
    return (_OK,)


def cudaMemcpyAsync(dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: cudaStream_t) -> tuple[Any, ...]:
    if fault := _fault():
        return (fault,)
    if int(stream) not in STATE.streams:
        return (cudaError_t.cudaErrorInvalidResourceHandle,)
    to_device = kind in (cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToDevice)
    from_device = kind in (cudaMemcpyKind.cudaMemcpyDeviceToHost, cudaMemcpyKind.cudaMemcpyDeviceToDevice)
    for address, on_device in ((dst, to_device), (src, from_device)):
        if (STATE.kind_at(address, count) == "device") != on_device:
            return (cudaError_t.cudaErrorInvalidValue,)
    ctypes.memmove(dst, src, count)
    return (_OK,)
