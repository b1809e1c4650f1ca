"""Values that lie on a device: where they may stay, who gave them, and how they come to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from accelrt.backend import Backend, Device, DeviceTensor
from accelrt.graph.types import Value

if TYPE_CHECKING:
    from accelrt.runtime.replica import Step

HOST_KINDS = frozenset({1, 3, 11, 13})
"""Kinds of DLPack's devices whose memory the host reads: ``kDLCPU``, ``kDLCUDAHost``, ``kDLROCMHost`` and
``kDLCUDAManaged``."""


@dataclass(frozen=True, slots=True)
class Place:
    """A device on which tensors may stay.

    Attributes:
        device: Its name: ``cuda:0``.
        dlpack: Its kind and index by DLPack's count, None if callers' tensors cannot be taken there.
        settle: Waits until callers' tensors there are complete.
    """

    device: str
    dlpack: tuple[int, int] | None
    settle: Callable[[Sequence[DeviceTensor]], None]

    @classmethod
    def on(cls, backend: Backend, device: Device) -> Place:
        """Return a device of a backend as a place."""
        return cls(device.name, backend.dlpack_device(device), backend.settle)


class Unreadable(Exception):
    """A value cannot be brought from its device; the call is to be computed again, on what is left."""


class OnDevice:
    """A value on a device; its copy on the host is made when first needed, and once. For one thread at a time.

    Args:
        tensor: Where it is.
        device: The name of the device.
        read: Copies it to the host.
    """

    __slots__ = ("_copy", "_read", "device", "tensor")

    def __init__(self, tensor: DeviceTensor, device: str, read: Callable[[], np.ndarray[Any, Any]]) -> None:
        self.tensor, self.device = tensor, device
        self._read = read
        self._copy: np.ndarray[Any, Any] | None = None

    def host(self) -> np.ndarray[Any, Any]:
        """Return the copy on the host.

        Raises:
            Unreadable: The device does not give it.
            ExecutionError, ReplicaRetired: The same, and the policy says what follows; or it is the caller's tensor.
        """
        if self._copy is None:
            self._copy = self._read()
        return self._copy


Held: TypeAlias = Value | OnDevice
"""A value between two segments."""


class DeviceFeeds(dict[str, Any]):
    """The inputs of a call some of which are `OnDevice`; of all others the mapping is a plain one."""


def on_host(value: Held) -> Value:
    """Return a value in the host's memory."""
    return value.host() if isinstance(value, OnDevice) else value


def all_on_host(feeds: Mapping[str, Held]) -> dict[str, Value]:
    """Return values in the host's memory."""
    return {name: on_host(value) for name, value in feeds.items()}


def mark_kept(steps: Sequence[Step], outputs: Sequence[str], shareable: Set[str]) -> None:
    """Tell each step which of its outputs stay on its device: those that a later step reads there, if ``shareable``.

    Steps whose engines take no tensors on a device, or that are not loaded, keep nothing and are given nothing.
    """
    for number, step in enumerate(steps):
        if step.place is None:
            continue
        read = {
            name
            for later in steps[number + 1 :]
            if later.place is not None and later.place.device == step.place.device
            for name in later.inputs
        }
        mine = shareable & set(step.outputs)
        step.keep = frozenset(mine & read)
        step.keep_asked = step.keep | (mine & set(outputs))


def landings(steps: Sequence[Step], shareable: Set[str]) -> dict[str, dict[tuple[int, int], Place]]:
    """Return on which devices an input of the model may lie when it is given, by its name and DLPack's device."""
    found: dict[str, dict[tuple[int, int], Place]] = {}
    for step in steps:
        if step.place is not None and step.place.dlpack is not None:
            for name in shareable & set(step.inputs):
                found.setdefault(name, {})[step.place.dlpack] = step.place
    return found
