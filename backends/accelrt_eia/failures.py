"""What Amazon's Elastic Inference client says when it fails, as accelrt's errors."""

from __future__ import annotations

import re

from accelrt.errors import (
    AccelrtError,
    CoresUnavailable,
    DeviceLost,
    ExecutionError,
    IncompatibleProgram,
    OutOfDeviceMemory,
)
from accelrt_eia.discovery import CLOSED, INSTEAD, one_line
from accelrt_eia.vendor_process import VendorDied, VendorError

_CODE = re.compile(r"EI Error Code:\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
OUT_OF_MEMORY = (12, 5, 13)
"""What users saw where a model was larger than its accelerator."""

_UNREACHED = (
    "Failed to detect any accelerator",
    "Preconditions not met for reaching Accelerator",
    "Error during accelerator discovery",
    "Failed to query accelerator metadata",
)


def typed(error: VendorError | VendorDied, what: str, engine: str, *, loading: bool) -> AccelrtError:
    """Return the error of accelrt's that stands for one of the vendor's.

    Args:
        error: What happened in the vendor's process.
        what: What was being done: ``Loading the program``.
        engine: Which engine was at it.
        loading: Whether the program was being loaded; else it was running.
    """
    text = one_line(str(error))
    if any(words in text for words in _UNREACHED):
        lost: type[AccelrtError] = CoresUnavailable if loading else DeviceLost
        return lost(
            f"{what} failed, because the client reached no accelerator: {text}. {CLOSED}.",
            hint=INSTEAD[0].upper() + INSTEAD[1:] + ".",
            backend=engine,
        )
    if (code := _CODE.search(text)) is not None:
        if tuple(map(int, code.groups())) == OUT_OF_MEMORY:
            return OutOfDeviceMemory(
                f"{what} failed with the client's code for a model that does not fit: {text}.",
                hint="Take a larger type of accelerator, or fewer signatures: each takes the memory of a model.",
                backend=engine,
            )
        return ExecutionError(f"{what} failed: {text}.", backend=engine)
    if isinstance(error, VendorDied):
        if loading:
            return IncompatibleProgram(f"{what} ended the vendor's process. {text}", backend=engine)
        return DeviceLost(f"{what} ended the vendor's process. {text}", backend=engine)
    if loading or "already defined" in text:
        hint = "Trace the model rather than script it: PyTorch's EI builds mix up classes of the same name."
        return IncompatibleProgram(
            f"{what} failed: {text}.", hint=hint if "already defined" in text else None, backend=engine
        )
    return ExecutionError(f"{what} failed: {text}.", backend=engine)
