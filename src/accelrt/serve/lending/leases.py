"""What is written down of a client that has borrowed a slice, and of what it has loaded there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from accelrt.serve.lending.turns import Party


@dataclass(slots=True)
class Holding:
    """A program under a lease: what it counts for, and which members want it kept."""

    held_bytes: int
    by: set[str]


@dataclass(eq=False, slots=True)
class Lease:
    """What one client has.

    Attributes:
        key: Names the client: the digest of its API key, or of its token.
        id: A name for it that opens nothing, for reports.
        party: Its place in the queue.
        members: Digests of the tokens of its processes.
        held: By program name.
        reserved: Bytes of programs that are being loaded.
        loads: Programs that are being loaded, or wait for it.
        busy: Calls under way.
        used: When it was last used, of `time.monotonic`.
        one_by_one: Its programs are loaded one after another.
    """

    key: str
    id: str
    party: Party
    members: set[str] = field(default_factory=set)
    held: dict[str, Holding] = field(default_factory=dict)
    reserved: int = 0
    loads: int = 0
    busy: int = 0
    used: float = field(default_factory=time.monotonic)
    one_by_one: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def held_bytes(self) -> int:
        """What counts against the quota."""
        return self.reserved + sum(one.held_bytes for one in self.held.values())


@dataclass(slots=True)
class Program:
    """A program in memory: what it counts for, and under which leases."""

    held_bytes: int
    leases: set[Lease] = field(default_factory=set)
