"""Where a program of torch's runs: streams, pinned memory and recorded launches of a GPU; and a stand-in for tests.

The stand-in computes on the CPU and keeps to the same rules: a recording works on the tensors that it was recorded
with, and its results are overwritten by the next replay.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from accelrt.backend import Device
from accelrt.errors import DeviceLost, OutOfDeviceMemory

_RECORDING = threading.Lock()
"""CUDA allows one capture a process at a time where memory comes from torch's allocator."""

_STREAMS: dict[Any, list[Any]] = {}
"""Streams to be had, by device. torch keeps workspaces of cuBLAS, of 32 MiB, for each stream that was ever used: new
streams for each program would add up."""
_STREAMS_LOCK = threading.Lock()

_FATAL = (
    "illegal memory access",
    "device-side assert",
    "uncorrectable",  # ECC and NVLink errors
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "invalid address space",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "context is destroyed",
    "busy or unavailable",
    "no CUDA-capable device",
    "device kernel image is invalid",
    "system not yet initialized",
    "GPU is lost",
    "unknown error",
)
"""What CUDA says of an error after which no call of the process reaches the device any more: the errors of cudaError_t
that "leave the process in an inconsistent state", and those of devices that are gone."""


class Recording(Protocol):
    """Launches that were recorded, to be repeated at once; ``results`` are the tensors that each repeat writes to."""

    results: list[Any]

    def replay(self) -> None: ...

    def forget(self) -> None: ...


class CudaPlace:
    """A GPU.

    Args:
        index: As CUDA counts in this process.
    """

    def __init__(self, index: int) -> None:
        import torch

        self.device = torch.device("cuda", index)
        self._torch = torch

    def stream(self) -> Any:
        """Lend a stream that nobody else has; `give_back` it."""
        with _STREAMS_LOCK:
            if idle := _STREAMS.get(self.device):
                return idle.pop()
        return self._torch.cuda.Stream(self.device)

    def give_back(self, stream: Any) -> None:
        """Take a stream back, for the next who wants one."""
        with _STREAMS_LOCK:
            _STREAMS.setdefault(self.device, []).append(stream)

    def here(self) -> contextlib.AbstractContextManager[Any]:
        """Make this the current device while the context lasts."""
        context: contextlib.AbstractContextManager[Any] = self._torch.cuda.device(self.device)
        return context

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Launch on a stream, on this device, while the context lasts."""
        context: contextlib.AbstractContextManager[Any] = self._torch.cuda.stream(stream)
        return context

    def wait(self, stream: Any) -> None:
        """Return when all that was launched is done."""
        stream.synchronize()

    def pinned(self, shape: Sequence[int], dtype: Any) -> Any:
        """Return memory of the host that the device copies from and to by itself."""
        return self._torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def pool(self) -> Any:
        """Return a pool of memory for recordings that never run at the same time."""
        return self._torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], list[Any]], stream: Any, pool: Any) -> Recording:
        """Record what ``function`` launches, without running it.

        Raises:
            RuntimeError: Something in it cannot be recorded, such as a wait for the device; or another thread of the
                process waited for the whole device meanwhile, which ends a capture.
        """
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and launch meanwhile; only this one's calls are held to the rules of a capture.
        with (
            _RECORDING,
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = function()
        return _CudaRecording(graph, results)

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes of the device."""
        free, total = self._torch.cuda.mem_get_info(self.device)
        return int(free), int(total)

    def trim(self) -> None:
        """Give memory that torch keeps for later back to the device."""
        with _RECORDING, self.here():  # it waits for the device, which a capture forbids
            self._torch.cuda.empty_cache()

    def translated(self, error: BaseException, needed: int) -> BaseException:
        """Return what an error of torch's means to accelrt; itself if nothing in particular.

        Args:
            error: What was raised.
            needed: Bytes that the program takes at least.
        """
        return translated(error, self, needed)


class _CudaRecording:
    def __init__(self, graph: Any, results: list[Any]) -> None:
        self._graph, self.results = graph, results
        self.replay: Callable[[], None] = graph.replay

    def forget(self) -> None:
        """Free the launches; the memory of the results is freed with the tensors."""
        self.results = []
        self._graph.reset()


class HostPlace:
    """The CPU in the place of a GPU, for tests: nothing is recorded, but everything behaves as if it were."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")
        self._torch = torch

    def stream(self) -> Any:
        return None

    def give_back(self, stream: Any) -> None:
        return None

    def here(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def wait(self, stream: Any) -> None:
        return None

    def pinned(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.empty(tuple(shape), dtype=dtype)

    def pool(self) -> Any:
        return None

    def record(self, function: Callable[[], list[Any]], stream: Any, pool: Any) -> Recording:
        return _HostRecording(function)

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def trim(self) -> None:
        return None

    def translated(self, error: BaseException, needed: int) -> BaseException:
        return translated(error, self, needed)


class _HostRecording:
    def __init__(self, function: Callable[[], list[Any]]) -> None:
        self._function: Callable[[], list[Any]] | None = function
        self.results = [result.clone() for result in function()]

    def replay(self) -> None:
        if self._function is None:
            raise RuntimeError("the recording was forgotten")
        for kept, result in zip(self.results, self._function(), strict=True):
            kept.copy_(result)

    def forget(self) -> None:
        self._function, self.results = None, []


Place = CudaPlace | HostPlace


def place_of(device: Device) -> CudaPlace:
    """Return the GPU that a device of accelrt's is, by its UUID if that is known: CUDA may count otherwise than NVML.

    Raises:
        DeviceLost: This process does not see it.
    """
    import torch

    wanted = device.properties.get("uuid", "").removeprefix("GPU-").lower()
    count = torch.cuda.device_count()
    if wanted:
        for index in range(count):
            found = str(getattr(torch.cuda.get_device_properties(index), "uuid", "")).removeprefix("GPU-").lower()
            if found == wanted:
                return CudaPlace(index)
    if device.index < count:
        return CudaPlace(device.index)
    raise DeviceLost(
        f"{device.name} was asked for, and CUDA shows {count} devices to this process.",
        hint="Is CUDA_VISIBLE_DEVICES set?",
        backend="torch",
    )


def translated(error: BaseException, place: Place, needed: int) -> BaseException:
    """Return `OutOfDeviceMemory` or `DeviceLost` for what torch raises then; else the error itself."""
    import torch

    if isinstance(error, (OutOfDeviceMemory, DeviceLost)) or not isinstance(error, RuntimeError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return _out_of_memory(place, needed, text)
    about_cuda = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA" in text or "cuda" in text
    if about_cuda and any(sign.lower() in text.lower() for sign in _FATAL):
        return DeviceLost(
            f"{place.device} no longer answers this process: {text[:300]}",
            hint="Restart the process; `nvidia-smi` and the kernel's log (Xid) say more.",
            backend="torch",
        )
    return error


def _out_of_memory(place: Place, needed: int, text: str) -> OutOfDeviceMemory:
    try:
        free, total = place.memory()
        room = f"{free:,} of {total:,} bytes are free"
    except RuntimeError:
        room = "how much is free cannot be found out"
    return OutOfDeviceMemory(
        f"The program needs {needed:,} bytes at least, and on {place.device} {room}: {text[:200]}",
        hint="Take a smaller batch, fewer streams or graphs, another device, or end what else runs there.",
        backend="torch",
    )
