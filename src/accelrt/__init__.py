"""One model in, any accelerator under it.

::

    import accelrt

    artifact = accelrt.compile("model.onnx")     # for the target in ACCELRT_BACKEND, else the CPU
    print(artifact.explain())                    # what runs where, and why
    artifact.save("model.accel")
    with accelrt.load("model.accel") as session:
        outputs = session.predict({"x": image})

Importing accelrt imports no engine and no framework; each name brings in what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelrt import errors
    from accelrt.api import compile, load
    from accelrt.artifact.artifact import Artifact
    from accelrt.backend import Backend
    from accelrt.inventory import backends, devices
    from accelrt.precision.calibrate import Calibration
    from accelrt.precision.compare import Tolerance
    from accelrt.runtime.session import Session
    from accelrt.verification import Verification

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Calibration",
    "Session",
    "Tolerance",
    "Verification",
    "__version__",
    "backends",
    "compile",
    "devices",
    "errors",
    "load",
    "register",
]

_HOMES = {
    "Artifact": "accelrt.artifact.artifact",
    "Calibration": "accelrt.precision.calibrate",
    "Session": "accelrt.runtime.session",
    "Tolerance": "accelrt.precision.compare",
    "Verification": "accelrt.verification",
    "backends": "accelrt.inventory",
    "compile": "accelrt.api",
    "devices": "accelrt.inventory",
    "load": "accelrt.api",
}


def register(cls: type[Backend]) -> type[Backend]:
    """Add a backend class for this process; usable as a decorator.

    Raises:
        RegistryError: The class breaks the contract, or its name belongs to an installed plug-in.
    """
    from accelrt.registry import REGISTRY

    return REGISTRY.register(cls)


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("accelrt.errors")
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'accelrt' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
