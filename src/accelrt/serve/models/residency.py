"""Which models may be in memory at a time: room is made by unloading those that were used least recently."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelrt.errors import ModelUnavailable


@dataclass(slots=True)
class Resident:
    """A model in memory, or one that is about to be.

    Attributes:
        name: For messages.
        size: Bytes that it holds, or is expected to.
        pinned: Never to be unloaded to make room.
        idle: Whether it has no request now; None while it is being loaded.
        last_used_ns: When a request last came to it.
        evict: Begins to unload it, and returns at once.
        leaving: It is being unloaded.
    """

    name: str
    size: int
    pinned: bool = False
    idle: Callable[[], bool] | None = None
    last_used_ns: Callable[[], int] | None = None
    evict: Callable[[], None] | None = None
    leaving: bool = False


def choose_victim(residents: Sequence[Resident]) -> Resident | None:
    """Return whom to unload: of those that are neither pinned nor busy nor leaving, the least recently used."""
    able = [
        (each.last_used_ns(), number, each)
        for number, each in enumerate(residents)
        if each.idle is not None
        and each.last_used_ns is not None
        and not each.pinned
        and not each.leaving
        and each.idle()
    ]
    return min(able)[2] if able else None


class Residency:
    """Counts models in memory and makes room for others. Thread-safe.

    Args:
        most: Models at a time, None for no limit.
        most_bytes: Bytes at a time, None for no limit.
    """

    def __init__(self, most: int | None, most_bytes: int | None) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._residents: dict[object, Resident] = {}
        self._line: list[object] = []  # who waits for room, in order
        self._changed = threading.Condition()
        self.evictions = 0

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self._most is not None or self._most_bytes is not None

    @property
    def count(self) -> int:
        """Models in memory, those that are being loaded or unloaded included."""
        return len(self._residents)

    @property
    def total_bytes(self) -> int:
        """Bytes that they hold."""
        with self._changed:
            return sum(each.size for each in self._residents.values())

    def reserve(
        self, token: object, resident: Resident, *, wait_s: float, evict: bool, replaces: object = None
    ) -> None:
        """Wait until there is room for one more, unloading others; it counts from then on.

        Args:
            token: Names it in `settle` and `release`.
            resident: What is known of it so far.
            wait_s: Longest wait.
            evict: Others may be unloaded.
            replaces: One that leaves as soon as this one is there, so that it does not count.

        Raises:
            ModelUnavailable: There was no room in time, or there never can be.
        """
        deadline = time.monotonic() + wait_s
        with self._changed:
            if self._most_bytes is not None and resident.size > self._most_bytes:
                raise ModelUnavailable(
                    f"Model {resident.name!r} holds {resident.size} bytes; {self._most_bytes} may be in memory.",
                    hint="Raise max_resident_bytes.",
                )
            self._line.append(token)
            try:
                self._make_room(token, resident, deadline, evict, replaces)
            finally:
                self._line.remove(token)
                self._changed.notify_all()
            self._residents[token] = resident

    def _make_room(self, token: object, resident: Resident, deadline: float, evict: bool, replaces: object) -> None:
        """Wait for room, and for those who came before: else whoever is loaded most often would always be faster."""
        while self._line[0] is not token or not self._fits(resident.size, replaces, leaving=True):
            victim = None
            if self._line[0] is token and evict and not self._fits(resident.size, replaces, leaving=False):
                victim = choose_victim([one for key, one in self._residents.items() if key is not replaces])
            if victim is not None and victim.evict is not None:
                victim.leaving = True
                self.evictions += 1
                victim.evict()
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                error = ModelUnavailable(
                    f"There is no room for model {resident.name!r}: every other one is pinned or busy.",
                    hint="Ask again, or raise max_resident_models or max_resident_bytes.",
                )
                error.retry_after_s = 1.0
                raise error
            # What is busy becomes idle without telling.
            self._changed.wait(min(left, 0.05))

    def _fits(self, size: int, replaces: object, *, leaving: bool) -> bool:
        """Whether there is room, counting those that are leaving or not."""
        there = [one for key, one in self._residents.items() if key is not replaces and (leaving or not one.leaving)]
        if self._most is not None and len(there) + 1 > self._most:
            return False
        return self._most_bytes is None or sum(one.size for one in there) + size <= self._most_bytes

    def settle(self, token: object, resident: Resident) -> None:
        """Say what a model that was reserved turned out to be, if it is not gone already."""
        with self._changed:
            if token in self._residents:
                self._residents[token] = resident
            self._changed.notify_all()

    def release(self, token: object) -> None:
        """Say that a model is gone."""
        with self._changed:
            self._residents.pop(token, None)
            self._changed.notify_all()

    def trim(self) -> None:
        """Unload others while there are more bytes than allowed: a model turned out larger than expected."""
        with self._changed:
            while not self._fits(0, None, leaving=False) and self._most_bytes is not None:
                if sum(one.size for one in self._residents.values() if not one.leaving) <= self._most_bytes:
                    return
                victim = choose_victim(list(self._residents.values()))
                if victim is None or victim.evict is None:
                    return
                victim.leaving = True
                self.evictions += 1
                victim.evict()
