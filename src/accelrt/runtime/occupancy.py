"""Which devices there are, in which groups, and who holds them: sessions of this process, and what vendors' tools tell.

A hold is kept by the process that loaded the session (`accelrt.runtime.ledger`), so another process's sessions are not
seen here. Where a vendor's tool lists processes, `accelrt.backend.Backend.occupants` passes that on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelrt import options as option_module
from accelrt.backend import Backend, Device, Engine
from accelrt.errors import AccelrtError, OptionError, TargetError
from accelrt.nature import Nature
from accelrt.registry import REGISTRY, devices_of, find_engine
from accelrt.runtime.ledger import LEDGER, pool_name
from accelrt.target import Target, parse


@dataclass(frozen=True, slots=True)
class Core:
    """One device and who holds it.

    Attributes:
        device: What it is.
        group: The number of its group, from 0 in the order in which sessions take them; None if this process may not
            use it, or no group has it.
        whole: Whether one copy of a program takes that group whole.
        holders: Sessions of this process that hold it, in the order in which they were loaded.
        others: Other processes, as far as the vendor's tool tells.
    """

    device: Device
    group: int | None
    whole: bool
    holders: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The devices of a backend, or of an engine that has its own.

    Attributes:
        backend: Its name.
        engine: The engine whose own devices these are; None for those of the backend.
        nature: Of that engine.
        exclusive: Whether a device takes one session only.
        cores: In the order of the backend, or of the target that named them.
        reason: Why nothing is known, None if it is.
    """

    backend: str
    engine: str | None
    nature: Nature
    exclusive: bool
    cores: tuple[Core, ...]
    reason: str | None = None

    @property
    def name(self) -> str:
        """Backend, or backend and engine."""
        return self.backend if self.engine is None else f"{self.backend}/{self.engine}"


def cores(target: str, options: Mapping[str, Any] | None = None) -> Occupancy:
    """Return the devices of a target and who holds them.

    Args:
        target: A backend, or ``backend/engine`` for an engine that has devices of its own, as an emulator does. Devices
            named in it narrow the list.
        options: Options of the engine, such as the instance that an emulator takes itself for.

    Raises:
        TargetError: There is no such backend or engine, or options are given without an engine.
        OptionError: An option that the engine does not know, or a variable of the environment that cannot be read.
        CoresUnavailable: The target or a variable names devices that are not there.
    """
    wanted = parse(target)
    backend = REGISTRY.backend(wanted.backend)
    if wanted.engine is None and options:
        raise TargetError(
            f"Options belong to an engine, and {target!r} names none.",
            hint=f"Name one: {', '.join(f'{backend.name}/{engine.name}' for engine in backend.engines)}.",
        )
    engine = None if wanted.engine is None else _engine(backend, wanted.engine, options)
    return _occupancy(backend, engine, wanted)


def all_cores() -> tuple[Occupancy, ...]:
    """Return the devices of every backend; one that fails has a reason in place of devices."""
    found = []
    for name in REGISTRY.names():
        try:
            found.append(cores(name))
        except AccelrtError as error:
            found.append(Occupancy(name, None, "real", False, (), str(error)))
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything, and hides nobody else
            found.append(Occupancy(name, None, "real", False, (), f"{type(error).__name__}: {error}"))
    return tuple(found)


def emulator_of(target: str) -> str:
    """Return the target that names a backend's emulator: ``neuron/emulator`` for ``neuron``.

    Raises:
        TargetError: There is no such backend, it has no emulator, or the target names another engine.
    """
    wanted = parse(target)
    backend = REGISTRY.backend(wanted.backend)
    for engine in backend.engines:
        if engine.caps.nature == "emulated" and wanted.engine in (None, engine.name):
            return str(Target(backend.name, engine.name, wanted.devices))
    raise TargetError(f"{target!r} names no emulator, nor a backend that has one.", backend=backend.name)


def _engine(backend: Backend, name: str, options: Mapping[str, Any] | None) -> Engine:
    engine = find_engine(backend, name)
    taken, unknown = option_module.take(engine.options, options)
    if unknown:
        raise OptionError(f"{backend.name}/{name} has no option {sorted(unknown)[0]!r}.")
    return engine.with_options(taken)


def _occupancy(backend: Backend, engine: Engine | None, wanted: Target) -> Occupancy:
    own = None if engine is None else engine.devices()
    every = tuple(backend.devices() if own is None else own)
    pool = backend.name if own is None or engine is None else pool_name(f"{backend.name}/{engine.name}", every)
    groups = backend.groups(os.environ, every)
    place = {index: (number, group) for number, group in enumerate(groups) for index in group.devices}
    holders = LEDGER.holders(pool)
    others = backend.occupants() if own is None else {}
    chosen = every if wanted.devices is None else devices_of(backend, wanted.devices, engine)
    return Occupancy(
        backend.name,
        None if own is None or engine is None else engine.name,
        "real" if own is None or engine is None else engine.caps.nature,
        backend.exclusive,
        tuple(
            Core(
                device,
                group=place[device.index][0] if device.index in place else None,
                whole=device.index in place and place[device.index][1].whole,
                holders=tuple(holders.get(device.index, ())),
                others=tuple(others.get(device.index, ())),
            )
            for device in chosen
        ),
    )
