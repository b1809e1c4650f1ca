"""Memory and streams of a CUDA device, through ``cuda-bindings``: what the engine needs of the CUDA runtime, typed.

``cuda.bindings.runtime`` returns a tuple from every function, the error first; here an error is raised instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from accelrt_cuda.tensorrt_errors import CudaFailure

_NON_BLOCKING = 1  # cudaStreamNonBlocking: work on it does not wait for the default stream
LEAST = 256
"""Bytes of the smallest block: the alignment that CUDA gives, and an empty tensor needs an address all the same."""


@cache
def runtime() -> Any:
    """Return the module; importing it loads the driver's library."""
    return importlib.import_module("cuda.bindings.runtime")


def checked(name: str, *arguments: Any, bytes: int | None = None) -> Any:
    """Call a function of the CUDA runtime; return its result, or a tuple of several.

    Raises:
        CudaFailure: It returned an error.
    """
    error, *results = getattr(runtime(), name)(*arguments)
    if (code := int(error)) != 0:
        # An error that is not sticky is told once more by the next call that asks for the last one.
        runtime().cudaGetLastError()
        raise CudaFailure(name, code, f"{getattr(error, 'name', 'cudaError')} ({code})", bytes)
    return results[0] if len(results) == 1 else tuple(results)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as the CUDA runtime numbers it."""

    ordinal: int

    def use(self) -> None:
        """Make it the device of the calling thread: CUDA keeps one for each."""
        try:
            checked("cudaSetDevice", self.ordinal)
        except CudaFailure as error:
            error.device = self.ordinal
            raise

    def memory(self) -> tuple[int, int] | None:
        """Return free and total bytes, None if they cannot be had; the device must be in use."""
        with contextlib.suppress(CudaFailure):
            free, total = checked("cudaMemGetInfo")
            return int(free), int(total)
        return None


class DeviceBlock:
    """Memory of the device that grows: at ``address`` there are ``size`` bytes."""

    def __init__(self) -> None:
        self.address, self.size = 0, 0

    def fit(self, size: int) -> int:
        """Return an address with room for ``size`` bytes; what was there is lost if it has to move.

        Raises:
            CudaFailure: There is no memory.
        """
        if size > self.size or not self.address:
            self.free()
            wanted = _rounded(size)
            self.address = int(checked("cudaMalloc", wanted, bytes=wanted))
            self.size = wanted
        return self.address

    def free(self) -> None:
        """Give the memory back; freeing twice is no error."""
        if self.address:
            address, self.address, self.size = self.address, 0, 0
            with contextlib.suppress(CudaFailure):  # after a sticky error there is nothing left to be freed
                checked("cudaFree", address)


class PinnedBlock:
    """Page-locked memory of the host that grows, so that copies to and from the device run beside other work."""

    def __init__(self) -> None:
        self.address, self.size = 0, 0
        self._bytes = np.empty(0, np.uint8)

    def fit(self, size: int) -> int:
        """Return an address with room for ``size`` bytes; what was there is lost if it has to move.

        Raises:
            CudaFailure: There is no memory.
        """
        if size > self.size or not self.address:
            self.free()
            wanted = _rounded(size)
            self.address = int(checked("cudaMallocHost", wanted, bytes=wanted))
            self.size = wanted
            self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * wanted).from_address(self.address))
        return self.address

    def view(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the first ``size`` bytes as an array over the block's own memory."""
        self.fit(size)
        return self._bytes[:size]

    def free(self) -> None:
        """Give the memory back; freeing twice is no error."""
        if self.address:
            address, self.address, self.size = self.address, 0, 0
            self._bytes = np.empty(0, np.uint8)
            with contextlib.suppress(CudaFailure):
                checked("cudaFreeHost", address)


def _rounded(size: int) -> int:
    """Return a size with an eighth to spare, in whole blocks, so that growing inputs do not move at every call."""
    return -(-max(size + size // 8, 1) // LEAST) * LEAST


class Stream:
    """A CUDA stream, with the copies that run on it."""

    def __init__(self) -> None:
        self._stream: Any = checked("cudaStreamCreateWithFlags", _NON_BLOCKING)
        self.handle = int(self._stream)

    def to_device(self, target: int, source: int, size: int) -> None:
        """Begin a copy of ``size`` bytes from the host's address ``source``."""
        self._copy(target, source, size, "cudaMemcpyHostToDevice")

    def to_host(self, target: int, source: int, size: int) -> None:
        """Begin a copy of ``size`` bytes to the host's address ``target``."""
        self._copy(target, source, size, "cudaMemcpyDeviceToHost")

    def on_device(self, target: int, source: int, size: int) -> None:
        """Begin a copy of ``size`` bytes from one place of the device to another."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        if size:
            checked("cudaMemcpyAsync", target, source, size, getattr(runtime().cudaMemcpyKind, kind), self._stream)

    def wait(self) -> None:
        """Return when everything begun on the stream is done.

        Raises:
            CudaFailure: Something on it failed.
        """
        checked("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Destroy the stream; closing twice is no error."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with contextlib.suppress(CudaFailure):
                checked("cudaStreamDestroy", stream)


def devices() -> Iterator[dict[str, Any]]:
    """Yield what the CUDA runtime knows of each device that this process sees.

    Raises:
        CudaFailure: There is none, or no driver, or one that is too old.
    """
    cuda = runtime()
    for ordinal in range(int(checked("cudaGetDeviceCount"))):
        major, minor = (
            int(
                checked(
                    "cudaDeviceGetAttribute",
                    getattr(cuda.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}"),
                    ordinal,
                )
            )
            for part in ("Major", "Minor")
        )
        name = checked("cudaGetDeviceProperties", ordinal).name
        text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        yield {"name": text.rstrip("\0"), "compute_capability": f"{major}.{minor}"}
