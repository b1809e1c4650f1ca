"""The file of ``accelrt doctor --report``: all that the doctor knows, for somebody who cannot see the machine.

Only what is named here goes in. The home folder and passwords in addresses are taken out of every text; of the
environment only accelrt's variables are told, and those that a backend names in its own report.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, OptionError

FORMAT = "accelrt-doctor-report"
VERSION = 1

_VARIABLES = (
    "ACCELRT_BACKEND",
    "ACCELRT_CACHE_DIR",
    "ACCELRT_CACHE_SIZE",
    "ACCELRT_TRACEBACK",
    "ACCELRT_NEURON_EMULATE",
)
_PACKAGES = re.compile(
    r"accelrt|numpy|ml[-_.]dtypes|onnx|openvino|torch|tensorflow|keras|tf2onnx|neuron|libneuronxla|tensorrt|nvidia|protobuf"
)
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


def write_report(path: Path, known: Mapping[str, Any]) -> None:
    """Write what the doctor knows and what every backend adds to it.

    Raises:
        OptionError: The file cannot be written.
    """
    report = {
        "format": FORMAT,
        "version": VERSION,
        **known,
        "machine": {
            "processor": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "libc": " ".join(platform.libc_ver()),
            "cores": os.cpu_count(),
        },
        "packages": _packages(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "details": _details(),
    }
    try:
        path.write_text(json.dumps(scrubbed(report), indent=2, sort_keys=True, default=str) + "\n")
    except OSError as error:
        raise OptionError(f"The report cannot be written to {path}: {error.strerror}.") from error


def scrubbed(value: Any) -> Any:
    """Return plain data without the home folder and without passwords in addresses."""
    match value:
        case str():
            home = str(Path.home())
            text = value.replace(home, "~") if home not in ("/", "") else value
            return _PASSWORD.sub("***@", text)
        case Mapping():
            return {str(scrubbed(str(key))): scrubbed(item) for key, item in value.items()}
        case list() | tuple():
            return [scrubbed(item) for item in value]
        case _:
            return value


def _packages() -> dict[str, str]:
    found = {}
    for distribution in distributions():
        name = str(distribution.metadata["Name"] or "").lower()
        if _PACKAGES.match(name) or "neuron" in name:
            found[name] = distribution.version
    return found


def _details() -> dict[str, Any]:
    """Ask every backend for its own report; one that fails says why and hides nobody else."""
    from accelrt.registry import REGISTRY

    found: dict[str, Any] = {}
    for name in REGISTRY.names():
        try:
            details = dict(REGISTRY.backend(name).report())
        except AccelrtError as error:
            details = {"problem": error.message}
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything
            details = {"problem": f"its report() raised {type(error).__name__}: {error}"}
        if details:
            found[name] = details
    return found
