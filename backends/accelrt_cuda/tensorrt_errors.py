"""What TensorRT and CUDA report, as errors of accelrt.

Codes and their names are those of ``cudaError_t`` in CUDA 13; texts are those that TensorRT's logger prints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from accelrt.errors import AccelrtError, CompileError, CoresUnavailable, DeviceLost, ExecutionError, OutOfDeviceMemory

NAME = "tensorrt"

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

STICKY = frozenset(
    {
        46, 201,  # DevicesUnavailable, DeviceUninitialized
        214, 220, 226,  # ECCUncorrectable, NvlinkUncorrectable, Contained
        700, 702, 709, 710,  # IllegalAddress, LaunchTimeout, ContextIsDestroyed, Assert
        714, 715, 716, 717, 718, 719, 721,  # HardwareStackError to LaunchFailure, TensorMemoryLeak
        802, 805, 806, 807, 810, 999,  # SystemNotReady, three of MPS, MpsClientTerminated, Unknown
    }
)  # fmt: skip
"""Errors after which every call of the process fails, or the device does not answer: only a new process helps."""

_STICKY_TEXT = re.compile(
    r"illegal memory access|unspecified launch failure|device-side assert|misaligned address|"
    r"illegal instruction|uncorrectable (ECC|NVLink) error|launch timed out|device is busy or unavailable",
    re.IGNORECASE,
)
_MEMORY_TEXT = re.compile(r"out ?of ?memory|could not be allocated|allocator error|kFAILED_ALLOCATION", re.IGNORECASE)
_BYTES = re.compile(r"\((\d+) bytes\)|[Rr]equested size was (\d+)|allocating (\d+)-byte")
_SHOWN = 600


class CudaFailure(Exception):
    """A CUDA call that failed: ``code`` is that of ``cudaError_t``; ``bytes`` what was asked for, if memory was."""

    device: int | None = None
    """The device, if one was chosen."""

    def __init__(self, call: str, code: int, name: str, bytes: int | None = None) -> None:
        super().__init__(f"{call}: {name}")
        self.call, self.code, self.name, self.bytes = call, code, name, bytes


def typed(failure: CudaFailure, doing: str, free: tuple[int, int] | None) -> AccelrtError:
    """Return the error of accelrt for a CUDA call that failed; ``free`` is free and total memory of the device."""
    if failure.code in STICKY:
        return lost(f"{doing} failed at {failure}")
    if failure.code == OUT_OF_MEMORY:
        return out_of_memory(doing, str(failure), failure.bytes, free)
    if failure.call == "cudaSetDevice":
        return CoresUnavailable(
            f"{doing} failed: the CUDA runtime has no device {failure.device} ({failure}).",
            hint="CUDA_VISIBLE_DEVICES says which devices it sees.",
            backend=NAME,
        )
    return ExecutionError(f"{doing} failed at {failure}.", backend=NAME)


def lost(what: str) -> DeviceLost:
    """Return the error of a device that answers no more."""
    return DeviceLost(
        f"{what}. The process can no longer use the device.",
        hint="Start the process anew; `nvidia-smi -q` and the system's log (Xid) say more of the device.",
        backend=NAME,
    )


def out_of_memory(doing: str, detail: str, needed: int | None, free: tuple[int, int] | None) -> OutOfDeviceMemory:
    """Return the error of memory that is not there, with bytes needed and free as far as they are known."""
    figures = []
    if needed is not None:
        figures.append(f"{needed} bytes were asked for")
    if free is not None:
        figures.append(f"{free[0]} of {free[1]} bytes of the device are free")
    told = f"; {', '.join(figures)}" if figures else ""
    return OutOfDeviceMemory(
        f"{doing} took more memory than the device has{told} ({detail}).",
        hint="Put fewer models on the device, take smaller greatest sizes in `profiles` or `batch`, or fp16.",
        backend=NAME,
    )


def from_log(
    messages: Sequence[str], doing: str, free: tuple[int, int] | None, otherwise: type[AccelrtError]
) -> AccelrtError:
    """Return the error for a call of TensorRT that failed, told by what its logger said since the call began.

    TensorRT's own calls raise nothing: they return None or False, and the reason is in the log.
    """
    text = tail(messages)
    if _STICKY_TEXT.search(text):
        return lost(f"{doing} failed: {text}")
    if _MEMORY_TEXT.search(text):
        return out_of_memory(doing, text, bytes_in(text), free)
    return otherwise(f"{doing} failed: {text or 'TensorRT gave no reason'}.", backend=NAME)


def bytes_in(text: str) -> int | None:
    """Return the largest amount of memory that a message says was asked for, None if it says none."""
    found = [int(group) for match in _BYTES.finditer(text) for group in match.groups() if group]
    return max(found, default=None)


def tail(messages: Sequence[str]) -> str:
    """Return the last messages on one line, as many as fit."""
    kept: list[str] = []
    for message in reversed(messages):
        line = " ".join(message.split())
        if kept and sum(map(len, kept)) + len(line) > _SHOWN:
            break
        kept.append(line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "...")
    return "; ".join(reversed(kept))


def compile_error(text: str, hint: str | None = None) -> CompileError:
    """Return the error of a segment that cannot be built."""
    return CompileError(text, hint=hint, backend=NAME)


def short(error: Any) -> str:
    """Return an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
