"""Sizes of slices, by the names that Amazon's accelerator types had, and how a server lends them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accelrt.errors import CoresUnavailable, OptionError
from accelrt.registry import REGISTRY, devices_of, find_engine
from accelrt.target import parse

MIB = 1 << 20
CUSTOM = "custom"

LEAST_PROGRAM_BYTES = MIB
"""What a program counts for at least: a session takes about so much, however small its model is."""


@dataclass(frozen=True, slots=True)
class Size:
    """One size: bytes of device memory, and calls that are computed at a time."""

    name: str
    memory_bytes: int
    concurrency: int


SIZES: Mapping[str, Size] = {
    name: Size(name, gib << 30, concurrency)
    for name, gib, concurrency in (
        ("eia1.medium", 1, 1),
        ("eia1.large", 2, 2),
        ("eia1.xlarge", 4, 4),
        ("eia2.medium", 2, 1),
        ("eia2.large", 4, 2),
        ("eia2.xlarge", 8, 4),
    )
}
"""Amazon's table of accelerator types: memory as published. A share of an accelerator's operations per second cannot be
held here, so calls at a time stand for it, in the proportion of the published TFLOPS (1, 2 and 4 in FP32)."""


@dataclass(frozen=True, slots=True)
class LendingSettings:
    """How an accelerator is lent.

    Attributes:
        accelerator: The target that programs are compiled for and run on: ``cuda:0``.
        size: Of each slice.
        slices: How many clients may have one at a time; None for as many as the device's memory has room for.
        lease_s: How long a lease lasts after its last use.
        turns: Calls of all clients that are computed at a time; None for those of two slices.
        max_queue: Calls of one client that may wait for their turn.
        isolate: Run each program in a process of its own, which is killed if it hangs, and dies alone.
    """

    accelerator: str
    size: Size
    slices: int | None = None
    lease_s: float = 60.0
    turns: int | None = None
    max_queue: int = 64
    isolate: bool = False

    def __post_init__(self) -> None:
        if self.size.memory_bytes < LEAST_PROGRAM_BYTES or self.size.concurrency < 1:
            raise OptionError("A slice has at least 1 MiB of memory and one call at a time.")
        if self.slices is not None and self.slices < 1:
            raise OptionError(f"slices must be 1 or more, not {self.slices}.")
        if not 1 <= self.lease_s <= 86400:
            raise OptionError(f"A lease lasts from 1 second to a day, not {self.lease_s:g} s.")
        if (self.turns is not None and self.turns < 1) or self.max_queue < 1:
            raise OptionError("turns and max_queue must be 1 or more.")

    @property
    def calls_at_a_time(self) -> int:
        """Calls of all clients that are computed at a time."""
        return self.turns if self.turns is not None else 2 * self.size.concurrency


def size_of(name: str | None, memory_mib: int | None, concurrency: int | None) -> Size:
    """Return the size that a user asked for: one of the table, or figures of their own, which overrule its.

    Raises:
        OptionError: No size has this name, or neither a size nor a memory was given.
    """
    if name is not None and name not in SIZES:
        raise OptionError(f"There is no size {name!r}.", hint=f"Sizes: {', '.join(SIZES)}; or --memory-mib.")
    if name is None and memory_mib is None:
        raise OptionError(
            "How much of the accelerator each client gets was not said.",
            hint="Give --size eia2.medium, or --memory-mib and --concurrency.",
        )
    base = SIZES[name] if name is not None else None
    if base is not None and memory_mib is None and concurrency is None:
        return base
    memory = memory_mib * MIB if memory_mib is not None else base.memory_bytes if base is not None else 0
    return Size(CUSTOM, memory, concurrency or (base.concurrency if base is not None else 1))


def slices_of(settings: LendingSettings) -> int:
    """Return for how many slices the accelerator has memory.

    Raises:
        OptionError: For none, or it does not tell how much it has.
        AccelrtError: There is no such accelerator.
    """
    target = parse(settings.accelerator)
    backend = REGISTRY.backend(target.backend)
    engine = None if target.engine is None else find_engine(backend, target.engine)
    devices = devices_of(backend, target.devices, engine)
    if not devices:
        raise CoresUnavailable(
            f"There is no accelerator {settings.accelerator} here.", hint="accelrt doctor lists them."
        )
    sizes = [device.memory_bytes for device in devices]
    if any(size is None for size in sizes):
        raise OptionError(f"{settings.accelerator} does not tell its memory.", hint="Say how many --slices there are.")
    # Each copy of a program lies on one device, whichever that is; so every slice must fit each.
    count = min(size or 0 for size in sizes) // settings.size.memory_bytes
    if count < 1:
        raise OptionError(
            f"{settings.accelerator} has {min(size or 0 for size in sizes)} bytes of memory, and a slice takes "
            f"{settings.size.memory_bytes}.",
            hint="Lend smaller slices.",
        )
    return count
