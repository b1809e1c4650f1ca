"""The Neuron runtime's status codes, and the errors of accelrt that they become.

Codes and names are those of the vendor's page neuron-runtime/api/nrt_status.rst; texts are those that the runtime and
the frameworks print, by which they are recognised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from accelrt.errors import (
    AccelrtError,
    CoresUnavailable,
    DeviceError,
    DeviceLost,
    ExecutionError,
    IncompatibleProgram,
    OutOfDeviceMemory,
)

STATUS: Mapping[int, str] = MappingProxyType(
    {
        0: "NRT_SUCCESS",
        1: "NRT_FAILURE",
        2: "NRT_INVALID",
        3: "NRT_INVALID_HANDLE",
        4: "NRT_RESOURCE",
        5: "NRT_TIMEOUT",
        6: "NRT_HW_ERROR",
        7: "NRT_QUEUE_FULL",
        9: "NRT_LOAD_NOT_ENOUGH_NC",
        10: "NRT_UNSUPPORTED_NEFF_VERSION",
        11: "NRT_FAIL_HOST_MEM_ALLOC",
        13: "NRT_UNINITIALIZED",
        14: "NRT_CLOSED",
        15: "NRT_QUEUE_EMPTY",
        101: "NRT_EXEC_UNIT_UNRECOVERABLE",
        1002: "NRT_EXEC_BAD_INPUT",
        1003: "NRT_EXEC_COMPLETED_WITH_NUM_ERR",
        1004: "NRT_EXEC_COMPLETED_WITH_ERR",
        1005: "NRT_EXEC_NC_BUSY",
        1006: "NRT_EXEC_OOB",
        1100: "NRT_COLL_PENDING",
        1200: "NRT_EXEC_HW_ERR_COLLECTIVES",
        1201: "NRT_EXEC_HW_ERR_HBM_UE",
        1202: "NRT_EXEC_HW_ERR_NC_UE",
        1203: "NRT_EXEC_HW_ERR_DMA_ABORT",
        1204: "NRT_EXEC_SW_NQ_OVERFLOW",
        1205: "NRT_EXEC_HW_ERR_REPAIRABLE_HBM_UE",
        1206: "NRT_NETWORK_PROXY_FAILURE",
    }
)

_HINTS: Mapping[type[AccelrtError], str] = {
    OutOfDeviceMemory: "Put fewer models on the core, take a smaller batch, or name other cores.",
    CoresUnavailable: "Another process may hold the cores: `neuron-ls` shows which; they are free when it ends.",
    IncompatibleProgram: "Compile the model again with the SDK of this machine.",
    DeviceLost: "See the system's log (dmesg) for what the driver says of the device.",
}

_BY_STATUS: Mapping[int, type[AccelrtError]] = {
    2: IncompatibleProgram,
    4: OutOfDeviceMemory,
    6: DeviceLost,
    9: CoresUnavailable,
    10: IncompatibleProgram,
    11: OutOfDeviceMemory,
    13: DeviceError,
    14: DeviceLost,
    101: DeviceLost,
    1201: DeviceLost,
    1202: DeviceLost,
    1203: DeviceLost,
    1205: DeviceLost,
}

_BY_TEXT: tuple[tuple[str, type[AccelrtError]], ...] = (
    (r"Neuron Core\(s\) not available|NeuronCore\(s\) not available", CoresUnavailable),
    (r"requires \d+ NeuronCores, but there are only", CoresUnavailable),
    (r"cannot determine the number of available NeuronCores", CoresUnavailable),
    (r"Runtime could not be initialized|Unable to determine Neuron Driver version", CoresUnavailable),
    (r"NEFF version mismatch|Unknown builtin op: neuron::", IncompatibleProgram),
    (r"[Aa]llocation [Ff]ailure", OutOfDeviceMemory),
)


def name_of(status: int) -> str:
    """Return the runtime's name of a status code: ``NRT_RESOURCE``."""
    return STATUS.get(status, f"NRT status {status}")


def status_in(text: str) -> int | None:
    """Return the status code that an error's text carries, None if it carries none."""
    found = re.search(r"\bstatus\s*=\s*(\d+)", text)
    return int(found.group(1)) if found else None


def typed(error: BaseException, doing: str, backend: str) -> AccelrtError:
    """Return the error of accelrt for what a framework raised while ``doing`` something: loading, running.

    A status code decides; where there is none, the texts that the runtime is known to print. What is known by neither
    is an `ExecutionError`.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    status = status_in(text)
    cls: type[AccelrtError] = ExecutionError
    if status is not None and status in _BY_STATUS:
        cls = _BY_STATUS[status]
    else:
        cls = next((known for pattern, known in _BY_TEXT if re.search(pattern, text)), ExecutionError)
    named = f" ({name_of(status)})" if status is not None else ""
    return cls(f"{doing} failed{named}: {text}", hint=_HINTS.get(cls), backend=backend)
