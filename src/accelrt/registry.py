"""Backends by name: found through the entry-point group ``accelrt.backends``, loaded one at a time, when asked for.

A broken or duplicate plug-in is an entry with a reason; it never keeps the others from working.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from accelrt.backend import API_VERSION, Backend, Device, Engine, Status
from accelrt.errors import AccelrtWarning, BackendUnavailable, RegistryError, TargetError
from accelrt.target import AUTO, Target, is_name

GROUP = "accelrt.backends"
BUNDLED = "accelrt"
CPU = "cpu"
_RESERVED = frozenset({AUTO})


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point or registered class; ``reason`` says why it is not used, None while nothing speaks against it."""

    name: str
    origin: str
    value: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that may be asked to run a node."""

    backend: Backend
    engine: Engine

    @property
    def name(self) -> str:
        """Backend and engine: ``cpu/onnxruntime``."""
        return f"{self.backend.name}/{self.engine.name}"


class Registry:
    """The backends of one process.

    Args:
        discover: Returns the entry points of the group; replaced in tests.
    """

    def __init__(self, discover: Callable[[], Iterable[EntryPoint]] = lambda: entry_points(group=GROUP)) -> None:
        self._discover = discover
        self._lock = threading.RLock()
        self._points: dict[str, EntryPoint] | None = None
        self._plugins: dict[tuple[str, str], Plugin] = {}
        self._backends: dict[str, Backend] = {}
        self._registered: dict[str, type[Backend]] = {}

    def register(self, cls: type[Backend]) -> type[Backend]:
        """Add a backend class for this process; usable as a decorator. A second one of the same name replaces it.

        Raises:
            RegistryError: The class breaks the contract, or its name belongs to an installed plug-in.
        """
        name = getattr(cls, "name", None)
        with self._lock:
            if isinstance(name, str) and name in self._found():
                raise RegistryError(
                    f"The name {name!r} belongs to the installed plug-in {self._found()[name].value}.",
                    hint="Give the class another `name`.",
                )
            backend = _instantiate(cls, None)
            self._registered[backend.name] = cls
            self._backends[backend.name] = backend
        return cls

    def unregister(self, name: str) -> None:
        """Forget a class added by `register`; unknown names are ignored."""
        with self._lock:
            if self._registered.pop(name, None):
                self._backends.pop(name, None)

    def registered(self) -> dict[str, type[Backend]]:
        """Return the classes added by `register`, by name."""
        with self._lock:
            return dict(sorted(self._registered.items()))

    def names(self) -> tuple[str, ...]:
        """Return the names of all backends that were found or registered, loaded or not."""
        with self._lock:
            return tuple(sorted({*self._found(), *self._registered}))

    def plugins(self) -> tuple[Plugin, ...]:
        """Return every plug-in with the reason why it is not used, if so; loads those not yet loaded."""
        for name in self.names():
            try:
                self.backend(name)
            except RegistryError:
                continue  # the reason is kept in the plug-in's entry
        with self._lock:
            registered = (
                Plugin(name, "registered", f"{cls.__module__}:{cls.__qualname__}")
                for name, cls in self._registered.items()
            )
            return tuple(sorted((*self._plugins.values(), *registered), key=lambda plugin: plugin.name))

    def backend(self, name: str) -> Backend:
        """Return a backend, loading it if need be.

        Raises:
            TargetError: No backend has this name.
            RegistryError: The plug-in is there but broken; the error of its import is the cause.
        """
        with self._lock:
            if (backend := self._backends.get(name)) is not None:
                return backend
            point = self._found().get(name)
            if point is None:
                raise TargetError(
                    f"There is no backend {name!r}; found: {', '.join(self.names()) or 'none'}.",
                    hint="Is the plug-in installed in this environment? `accelrt doctor` lists what is.",
                    backend=name,
                )
            try:
                backend = _instantiate(point.load(), name)
            except Exception as error:  # whatever a foreign plug-in raises on import, it must not take others down
                reason = str(error) if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
                self._mark(point, reason)
                raise RegistryError(
                    f"The plug-in {point.value} of backend {name!r} is broken: {reason}", backend=name
                ) from error
            self._backends[name] = backend
            return backend

    def candidates(self, target: Target) -> tuple[Candidate, ...]:
        """Return the engines to ask, best first: the requested one, then those of the CPU that take what it refuses.

        Raises:
            TargetError: Unknown backend or engine.
            BackendUnavailable: Known, asked for by name, and not usable; says what is missing and what installs it.
        """
        if target.backend in _RESERVED:
            raise TargetError(
                f"The target {target.backend!r} stands for a choice between backends, and has no engines of its own.",
                hint=f"Leave engine and devices out, or name a backend: {', '.join(self.names())}.",
            )
        backend = self.backend(target.backend)
        first = Candidate(backend, self._choose(backend, target))
        cpu = backend if backend.name == CPU else self.backend(CPU)
        chain = [first]
        for name in cpu.fallback:
            engine = find_engine(cpu, name)
            if engine is not first.engine and status_of(engine).usable:
                chain.append(Candidate(cpu, engine))
        return tuple(chain)

    def _choose(self, backend: Backend, target: Target) -> Engine:
        if target.engine is not None:
            engine = find_engine(backend, target.engine)
            status = status_of(engine)
            if not status.usable:
                raise unavailable(f"{backend.name}/{engine.name} is", backend.name, status)
            return engine
        reasons = []
        for engine in backend.engines:
            if engine.caps.nature == "emulated":
                reasons.append(f"{engine.name} is an emulator and must be named")
                continue
            if takes_whole(engine):
                reasons.append(f"{engine.name} takes whole models and must be named")
                continue
            status = status_of(engine)
            if status.usable:
                return engine
            reasons.append(f"{engine.name}: {status.reason}" + (f" (try: {status.remedy})" if status.remedy else ""))
        raise BackendUnavailable(
            f"No engine of backend {backend.name!r} is usable here: {'; '.join(reasons)}.",
            hint="`accelrt doctor` shows every backend.",
            backend=backend.name,
        )

    def _found(self) -> dict[str, EntryPoint]:
        if self._points is None:
            self._points = {}
            for point in sorted(self._discover(), key=lambda p: (p.name, _origin(p) != BUNDLED, _origin(p), p.value)):
                holder = self._points.setdefault(point.name, point)
                if holder is point:
                    self._mark(point, None)
                    continue
                reason = f"the name is taken by {holder.value} of {_origin(holder)}"
                self._mark(point, reason)
                warnings.warn(
                    f"The backend {point.name!r} of {_origin(point)} is ignored: {reason}.",
                    AccelrtWarning,
                    stacklevel=4,
                )
        return self._points

    def _mark(self, point: EntryPoint, reason: str | None) -> None:
        self._plugins[point.name, point.value] = Plugin(point.name, _origin(point), point.value, reason)


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown distribution"


def _instantiate(cls: object, expected: str | None) -> Backend:
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise RegistryError(f"{cls!r} is not a subclass of accelrt.backend.Backend.")
    if cls.api_version != API_VERSION:
        raise RegistryError(
            f"{cls.__qualname__} speaks version {cls.api_version} of the backend contract, this accelrt {API_VERSION}.",
            hint="Install matching versions of accelrt and the plug-in.",
        )
    backend = cls()
    if expected is not None and backend.name != expected:
        raise RegistryError(f"{cls.__qualname__} is named {backend.name!r} but its entry point {expected!r}.")
    if backend.name in _RESERVED:
        raise RegistryError(f"The name {backend.name!r} is reserved.")
    if not (isinstance(backend.name, str) and is_name(backend.name)):
        raise RegistryError(f"{backend.name!r} is not a name for a backend: no target could say it.")
    names = [engine.name for engine in backend.engines]
    if not names or len(set(names)) != len(names):
        raise RegistryError(f"Backend {backend.name!r} must have engines with names of their own, not {names}.")
    return backend


def takes_whole(engine: Engine) -> bool:
    """Tell whether an engine takes sources whole, and no segments of graphs."""
    return "onnx" not in engine.formats


def status_of(engine: Engine) -> Status:
    """Return an engine's status; one that breaks its promise and raises is not usable, and hides nobody else."""
    try:
        return engine.status()
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything
        return Status(False, reason=f"its status() raised {type(error).__name__}: {error}")


def unavailable(subject: str, backend: str, status: Status) -> BackendUnavailable:
    """Return the error about an engine that is not usable; ``subject`` is how its sentence begins, up to the verb."""
    return BackendUnavailable(
        f"{subject} not usable here: {status.reason or 'no reason given'}.",
        hint=f"Try: {status.remedy}" if status.remedy else None,
        backend=backend,
    )


def find_engine(backend: Backend, name: str) -> Engine:
    """Return an engine of a backend by name.

    Raises:
        TargetError: The backend has no such engine.
    """
    for engine in backend.engines:
        if engine.name == name:
            return engine
    raise TargetError(
        f"Backend {backend.name!r} has no engine {name!r}; it has {', '.join(e.name for e in backend.engines)}.",
        backend=backend.name,
    )


REGISTRY = Registry()
"""The registry of this process."""


def devices_of(backend: Backend, wanted: Sequence[int] | None, engine: Engine | None = None) -> tuple[Device, ...]:
    """Return the wanted devices of a backend, or of an engine that has its own; all of them for None.

    Raises:
        CoresUnavailable: One of them does not exist.
    """
    from accelrt.errors import CoresUnavailable

    own = None if engine is None else engine.devices()
    found = {device.index: device for device in (backend.devices() if own is None else own)}
    if wanted is None:
        return tuple(found.values())
    if missing := [index for index in wanted if index not in found]:
        holder = f"Backend {backend.name!r}" if engine is None or own is None else f"{backend.name}/{engine.name}"
        raise CoresUnavailable(
            f"{holder} has no device {missing[0]}; it has {sorted(found) or 'none'}.",
            backend=backend.name,
        )
    return tuple(found[index] for index in wanted)
