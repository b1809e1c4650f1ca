"""What measurements depend on besides the model: the machine, and everything that is installed on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelrt.backend import Device
from accelrt.registry import REGISTRY
from accelrt.tune.space import available_cores


def machine() -> dict[str, str]:
    """Return what figures were measured on, for people."""
    found = {device.name: device.description for device in _devices()}
    return {**found, "accelrt": version("accelrt"), "python": sys.version.split()[0]}


def fingerprint() -> dict[str, Any]:
    """Return what a choice depends on: devices, cores, and every installed distribution with its version.

    Runtimes are not asked, because that takes seconds where one is imported in a child process.
    """
    return {
        "devices": [asdict(device) for device in _devices()],
        "cores": available_cores(),
        "python": sys.version,
        "installed": sorted(_installed()),
        "registered": registered_classes(),
        "threads": {name: value for name, value in os.environ.items() if name in _THREAD_VARIABLES},
    }


_THREAD_VARIABLES = frozenset({"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"})


def registered_classes() -> list[str]:
    """Return the backends that this process registered and a child process can import, as ``module:class``."""
    hidden = hidden_backends()
    return [f"{cls.__module__}:{cls.__qualname__}" for name, cls in REGISTRY.registered().items() if name not in hidden]


def hidden_backends() -> set[str]:
    """Return the names of backends that this process registered by classes no child process could import."""
    return {
        name
        for name, cls in REGISTRY.registered().items()
        if cls.__module__ == "__main__" or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls
    }


def _devices() -> list[Device]:
    found: list[Device] = []
    for name in REGISTRY.names():
        try:
            found.extend(REGISTRY.backend(name).devices())
        except Exception:  # noqa: BLE001 - a broken plug-in has a row with its reason; it has no devices
            continue
    return found


def _installed() -> Iterator[str]:
    """Yield ``name-version`` of each distribution, from the names of their folders: reading them all is slow."""
    for entry in {path for path in sys.path if path}:
        try:
            for item in Path(entry).iterdir():
                if item.suffix in (".dist-info", ".egg-info"):
                    yield item.stem
        except OSError:
            continue
