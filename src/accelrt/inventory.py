"""What is on this machine: backends, engines and devices, as data for people and tools."""

from __future__ import annotations

from dataclasses import dataclass

from accelrt.backend import Device, Status
from accelrt.errors import RegistryError, TargetError
from accelrt.nature import Nature
from accelrt.registry import REGISTRY, status_of


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine and whether it is usable here; ``formats`` says what it compiles, ``onnx`` or sources whole."""

    name: str
    status: Status
    nature: Nature
    default_precision: str
    formats: tuple[str, ...] = ("onnx",)

    @property
    def takes_onnx(self) -> bool:
        """Whether it takes segments of graphs, and so has a share in any model."""
        return "onnx" in self.formats


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One backend: where it comes from, its engines and devices; ``reason`` says why it is not used, None if it is."""

    name: str
    origin: str
    reason: str | None
    engines: tuple[EngineInfo, ...] = ()
    devices: tuple[Device, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether at least one engine is usable."""
        return any(engine.status.usable for engine in self.engines)


def backends() -> tuple[BackendInfo, ...]:
    """Return every backend that is installed or registered, broken and duplicate plug-ins included."""
    return tuple(_describe(plugin.name, plugin.origin, plugin.reason) for plugin in REGISTRY.plugins())


def backend(name: str) -> BackendInfo | None:
    """Return one backend, None if none has this name; the others' engines are not asked, which may take seconds."""
    found = (plugin for plugin in REGISTRY.plugins() if plugin.name == name)
    return next((_describe(plugin.name, plugin.origin, plugin.reason) for plugin in found), None)


def devices() -> tuple[Device, ...]:
    """Return every device of every backend that works."""
    return tuple(device for backend in backends() for device in backend.devices)


def _describe(name: str, origin: str, reason: str | None) -> BackendInfo:
    if reason is not None:
        return BackendInfo(name, origin, reason)
    try:
        backend = REGISTRY.backend(name)
    except (RegistryError, TargetError) as error:
        return BackendInfo(name, origin, str(error))
    engines = tuple(
        EngineInfo(engine.name, status_of(engine), engine.caps.nature, engine.caps.default_precision, engine.formats)
        for engine in backend.engines
    )
    try:
        return BackendInfo(name, origin, None, engines, tuple(backend.devices()))
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything
        return BackendInfo(name, origin, f"its devices() raised {type(error).__name__}: {error}", engines)
