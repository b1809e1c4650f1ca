"""Who holds which device in this process."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

from accelrt.backend import Device
from accelrt.errors import CoresUnavailable
from accelrt.runtime.place import Spot

Holders = Mapping[int, tuple[str, ...]]


class Hold:
    """Devices held until `release`, or until nobody refers to this any more."""

    __slots__ = ("__weakref__", "backend", "owner", "released", "spots")

    def __init__(self, backend: str, owner: str, spots: tuple[Spot, ...]) -> None:
        self.backend, self.owner, self.spots = backend, owner, spots
        self.released = False

    def release(self) -> None:
        """Give the devices back; releasing twice is no error."""
        self.released = True


class Ledger:
    """Devices of all backends, and who holds them. Thread-safe.

    A hold is kept by reference only weakly: a session that is dropped without being closed gives its devices back when
    it is collected.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holds: list[weakref.ref[Hold]] = []

    def acquire(self, backend: str, owner: str, choose: Callable[[Holders], tuple[Spot, ...]]) -> Hold:
        """Hold the devices that ``choose`` picks, given who holds what; nobody else chooses meanwhile.

        Raises:
            CoresUnavailable: ``choose`` found no room, also after what is no longer referred to was collected.
        """
        try:
            return self._acquire(backend, owner, choose)
        except CoresUnavailable:
            # Sessions are parts of cycles, so those that were dropped without being closed wait for the collector. Who
            # holds what now is not asked: the collector may have come by itself since.
            pass
        gc.collect()
        return self._acquire(backend, owner, choose)

    def holders(self, backend: str) -> Holders:
        """Return who holds each device of a backend that is held at all."""
        with self._lock:
            return self._holders(backend)

    def _acquire(self, backend: str, owner: str, choose: Callable[[Holders], tuple[Spot, ...]]) -> Hold:
        with self._lock:
            hold = Hold(backend, owner, choose(self._holders(backend)))
            self._holds.append(weakref.ref(hold))
            return hold

    def _holders(self, backend: str) -> Holders:
        found: dict[int, tuple[str, ...]] = {}
        alive = []
        for reference in self._holds:
            hold = reference()
            if hold is None or hold.released:
                continue
            alive.append(reference)
            if hold.backend == backend:
                for device in sorted({device for spot in hold.spots for device in spot.held}):
                    found[device] = (*found.get(device, ()), hold.owner)
        self._holds = alive
        return found


def pool_name(engine: str, devices: Sequence[Device]) -> str:
    """Return the name under which devices of an engine's own are held, apart from those of its backend.

    Args:
        engine: ``backend/engine``.
        devices: All that the engine has. The first one's description tells one emulated machine from another.
    """
    return f"{engine} {devices[0].description if devices else ''}"


LEDGER = Ledger()
"""The ledger of this process."""
