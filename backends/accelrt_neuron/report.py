"""What the authors need to see of a machine with Neuron devices: no secrets, processes or variables but Neuron's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelrt_neuron.discovery import chips, instance_type, listing, sysfs_folder

_VARIABLES = (
    "NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES", "NEURONCORE_GROUP_SIZES", "NEURON_RT_VIRTUAL_CORE_SIZE",
    "NEURON_RT_EXEC_TIMEOUT", "NEURON_RT_LOG_LEVEL", "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS",
    "NEURON_RT_MULTI_INSTANCE_SHARED_WEIGHTS", "NEURON_RT_ALLOW_LEGACY_NEFF", "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NEURON_CC_FLAGS", "AWS_NEURON_VISIBLE_DEVICES", "ACCELRT_NEURON_EMULATE",
)  # fmt: skip
_DRIVER = "proc/driver/neuron", "sys/module/neuron/version"


def facts_of(root: Path, engines: Mapping[str, Callable[[], Mapping[str, Any] | None]]) -> dict[str, Any]:
    """Return the machine's Neuron devices as each source tells of them, and the vendor's packages with signatures."""
    found = chips(root)
    return {
        "instance_type": instance_type(root),
        "chips": [asdict(chip) for chip in found],
        "sysfs": {f"neuron{chip.index}": _architecture(root, chip.index) for chip in found},
        "neuron_ls": listing(root),
        "driver": {path: text for path in _DRIVER if (text := _text(root / path))},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "packages": {name: facts() for name, facts in engines.items()},
    }


def _architecture(root: Path, number: int) -> dict[str, Any]:
    """Return the driver's words on one device, and the names of the folders beside them."""
    folder = sysfs_folder(root, number)
    if folder is None:
        return {}
    about = folder / "info" / "architecture"
    words = {path.name: _text(path) for path in sorted(about.iterdir())} if about.is_dir() else {}
    return {**words, "entries": sorted(path.name for path in folder.iterdir())}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[:4000] if path.is_file() else ""
    except OSError as error:
        return f"cannot be read: {error.strerror}"
