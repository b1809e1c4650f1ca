"""Targets: ``backend[/engine][:devices]``, as an argument or in ``ACCELRT_BACKEND``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from accelrt.cores import Group
from accelrt.errors import TargetError

VARIABLE = "ACCELRT_BACKEND"
DEFAULT = "cpu"
AUTO = "auto"
"""The target that stands for a choice between all others."""

_NAME = r"[a-z][a-z0-9_-]*"
_TARGET = re.compile(rf"(?P<backend>{_NAME})(?:/(?P<engine>{_NAME}))?(?::(?P<devices>.+))?", re.ASCII)
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_FORM = "A target reads `backend[/engine][:devices]`: `cpu`, `cpu/openvino`, `neuron:0-3`."


@dataclass(frozen=True, slots=True)
class Target:
    """What a user asked for; an engine or devices of None mean "you choose"."""

    backend: str
    engine: str | None = None
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        engine = f"/{self.engine}" if self.engine else ""
        devices = f":{','.join(map(str, self.devices))}" if self.devices is not None else ""
        return f"{self.backend}{engine}{devices}"


def is_name(text: str) -> bool:
    """Tell whether a backend or an engine may have this name."""
    return re.fullmatch(_NAME, text, re.ASCII) is not None


def parse(text: str) -> Target:
    """Parse a target.

    Raises:
        TargetError: The text is not of the form ``backend[/engine][:devices]``.
    """
    match = _TARGET.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise TargetError(f"{text!r} is not a target.", hint=_FORM)
    devices = match["devices"]
    return Target(match["backend"], match["engine"], None if devices is None else parse_devices(devices))


def parse_devices(devices: str | int | Iterable[int]) -> tuple[int, ...]:
    """Parse device indices: ``"0-3,6"``, 2, or an iterable of integers.

    Raises:
        TargetError: Not such a list, empty, or with a device named twice.
    """
    indices: list[int] = []
    if isinstance(devices, int):
        indices = [devices]
    elif isinstance(devices, str):
        for part in devices.split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise TargetError(f"{devices!r} is not a list of devices.", hint="Write `0`, `0-3` or `0,2-5`.")
            first, last = int(match[1]), int(match[2] or match[1])
            if last - first > 4096:
                raise TargetError(f"{part!r} names {last - first + 1} devices.", hint="No machine has that many.")
            indices.extend(range(first, last + 1))
    else:
        indices = list(devices)
        if not all(type(index) is int for index in indices):
            raise TargetError(f"Devices must be whole numbers, not {indices!r}.")
    if not indices or min(indices) < 0:
        raise TargetError(f"{devices!r} names no device.", hint="Write `0`, `0-3` or `0,2-5`.")
    if len(set(indices)) != len(indices):
        raise TargetError(f"{devices!r} names a device twice.")
    return tuple(indices)


def parse_groups(devices: str | int | Iterable[int] | Iterable[str]) -> tuple[str | None, tuple[Group, ...]]:
    """Parse what `accelrt.load` takes as devices: the backend, if it is named, and groups.

    ``"0-3"``, ``"neuron:0-3"``, 2 and ``[0, 1]`` are a pool, from which each replica takes what it needs;
    ``["0-3", "4-7"]`` are groups that one replica each takes whole.

    Raises:
        TargetError: Neither, or a device named twice.
    """
    listed = devices if isinstance(devices, str | int) else list(devices)
    if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
        parts = [_named_devices(str(item)) for item in listed]
        if len({backend for backend, _ in parts}) > 1:
            raise TargetError(f"{listed!r} names devices of several backends.")
        every = [device for _, group in parts for device in group]
        if len(set(every)) != len(every):
            raise TargetError(f"{listed!r} names a device twice.")
        return parts[0][0], tuple(Group(group, whole=True) for _, group in parts)
    if isinstance(listed, str):
        backend, group = _named_devices(listed)
        return backend, (Group(group),)
    return None, (Group(parse_devices(listed)),)  # type: ignore[arg-type]  # a list of anything is checked there


def _named_devices(text: str) -> tuple[str | None, tuple[int, ...]]:
    backend, colon, devices = text.rpartition(":")
    if colon and not is_name(backend.strip()):
        raise TargetError(f"{text!r} names no devices.", hint="Write `0-3`, or `neuron:0-3`.")
    return backend.strip() or None, parse_devices(devices)


def requested(argument: str | None) -> Target:
    """Return the target of the argument, else of ``ACCELRT_BACKEND``, else ``cpu``."""
    if argument is not None:
        return parse(argument)
    variable = os.environ.get(VARIABLE, "").strip()
    if not variable:
        return parse(DEFAULT)
    try:
        return parse(variable)
    except TargetError as error:
        raise TargetError(f"In the environment variable {VARIABLE}: {error.message}", hint=error.hint) from error
