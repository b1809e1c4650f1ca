"""What CUDA's errors mean, whatever runtime reports them: out of memory, or a device that is lost.

Numbers are those of ``cudaError_t`` in the CUDA Runtime API reference. Errors that leave a process's context unusable
count as a lost device: every later call of that process fails with the same number, until it ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from accelrt.backend import Device
from accelrt.errors import DeviceLost, OutOfDeviceMemory
from accelrt_cuda import nvml

LOST: Mapping[int, str] = {
    46: "the device is busy or unavailable",
    100: "no device is there any more",
    101: "the device's number is not valid any more",
    214: "an uncorrectable ECC error",
    219: "an invalid graphics context",
    220: "an uncorrectable NVLink error",
    700: "an illegal memory access",
    702: "a kernel took longer than the device's limit",
    709: "the context was destroyed",
    710: "a kernel asserted",
    714: "a hardware stack error",
    715: "an illegal instruction",
    716: "a misaligned address",
    717: "an operation on an invalid address space",
    718: "an invalid program counter",
    719: "a launch that failed",
    999: "an unknown error",
}
"""Error numbers after which a process cannot use the device, and what NVIDIA's reference says of them."""

_OUT_OF_MEMORY = 2
_NUMBER = re.compile(r"\bCUDA (?:failure|error:?) (\d{1,4})\b", re.IGNORECASE)
_NO_ROOM = re.compile(
    r"out of memory|OUT_OF_MEMORY|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED"
    r"|Failed to allocate memory for requested buffer|is smaller than requested bytes|std::bad_alloc",
    re.IGNORECASE,
)
_SIZE = re.compile(r"(?:requested buffer of size|requested bytes of|tried to allocate) (\d+)", re.IGNORECASE)
_GONE = re.compile(r"GPU is lost|device is being used|uncorrectable ECC|illegal memory access", re.IGNORECASE)


def out_of_memory(text: str) -> bool:
    """Whether an error says that the device's memory did not suffice."""
    match = _NUMBER.search(text)
    if match is not None and int(match[1]) == _OUT_OF_MEMORY:
        return True
    return match is None and _NO_ROOM.search(text) is not None


def lost(text: str) -> str | None:
    """Return what happened to a device that is lost, None if the error does not say that it is."""
    match = _NUMBER.search(text)
    if match is not None:
        return LOST.get(int(match[1]))
    gone = _GONE.search(text)
    return gone[0] if gone is not None else None


def no_room(error: BaseException, device: Device, engine: str, *, weights: int | None = None) -> OutOfDeviceMemory:
    """Return the error for a program, or a call, that does not fit; what is free is asked of the driver now.

    Args:
        weights: Bytes of the program's weights, named if the error itself does not say how much it asked for.
    """
    match = _SIZE.search(str(error))
    if match is not None:
        asked = f"{int(match[1]):,} bytes more were asked for"
    elif weights is not None:
        asked = f"the program's weights alone take {weights:,} bytes"
    else:
        asked = "the runtime does not say how much it asked for"
    free = nvml.free_bytes(device)
    left = "what is free is not known" if free is None else f"{free:,} bytes are free"
    total = "" if device.memory_bytes is None else f" of {device.memory_bytes:,}"
    return OutOfDeviceMemory(
        f"{engine} ran out of memory on {device.name}: {asked}, {left}{total}.",
        hint="Take a smaller batch or fp16, free the device (`accelrt cores` shows who holds it), or raise "
        "gpu_mem_limit if it is set.",
        backend=engine,
    )


def device_lost(what: str, device: Device, engine: str) -> DeviceLost:
    """Return the error for a device that is lost."""
    return DeviceLost(
        f"{engine} lost {device.name}: {what}. CUDA does not work in this process any more.",
        hint="Start the process anew; if it happens again, look for Xid errors in the kernel's log (`dmesg`).",
        backend=engine,
    )


def short(error: BaseException) -> str:
    """Return an error on one line, without the places in a runtime's sources and signatures that it has passed."""
    text = " ".join(str(error).split()) or type(error).__name__
    if (match := re.search(r"CUD\w+ (?:failure|error).*", text)) is not None:
        text = match[0]
    text = re.sub(r"/onnxruntime_src/\S+ ", "", text)
    return text if len(text) <= 400 else text[:397] + "..."
