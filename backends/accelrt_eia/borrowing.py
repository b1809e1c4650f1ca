"""What this process has borrowed: programs in use on servers that lend slices, kept alive and given back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

from accelrt.errors import AccelrtError
from accelrt.protocol.address import Address
from accelrt.protocol.client import Endpoint
from accelrt.protocol.leases import SLICE

DEFAULT_LEASE_S = 60.0
"""How long a lease is taken to last where the server did not say."""

GIVING_BACK_S = 2.0
"""How long telling a server may take that something is not needed any more; if it is not told, its lease runs out."""


class Borrowed:
    """Counts who uses which program on which server, and renews leases while anybody does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: Counter[tuple[Address, str]] = Counter()
        self._leases: dict[Address, tuple[Endpoint, float]] = {}
        self._changed = threading.Event()
        self._keeper: threading.Thread | None = None

    def use(self, endpoint: Endpoint, name: str, lease_s: float) -> None:
        """Note one more user of a program; the lease is renewed from now on."""
        with self._lock:
            self._uses[endpoint.address, name] += 1
            self._leases[endpoint.address] = (endpoint, lease_s)
            self._changed.set()
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="eia-leases", daemon=True)
                self._keeper.start()

    def release(self, endpoint: Endpoint, name: str) -> None:
        """Note one user less; the last one gives the program back, and with the last program the slice."""
        address = endpoint.address
        with self._lock:
            self._uses[address, name] -= 1
            if self._uses[address, name] > 0:
                return
            del self._uses[address, name]
            last = not any(where == address for where, _ in self._uses)
            if last:
                self._leases.pop(address, None)
        if endpoint.failing_s():
            return  # nobody to tell
        with contextlib.suppress(AccelrtError):
            endpoint.ask("RepositoryModelUnload", GIVING_BACK_S, model_name=SLICE if last else name)

    def _keep(self) -> None:
        """Renew each lease three times in its life."""
        renewed: dict[Address, float] = {}
        while True:
            with self._lock:
                leases = dict(self._leases)
                if not leases:
                    self._keeper = None
                    return
                self._changed.clear()
            now = time.monotonic()
            for address, (endpoint, lease_s) in leases.items():
                if now - renewed.setdefault(address, now) >= lease_s / 3:
                    renewed[address] = now
                    # One that has ended nevertheless is begun anew by the next call.
                    with contextlib.suppress(AccelrtError):
                        endpoint.ask("ModelReady", min(5.0, lease_s / 3), name=SLICE)
            self._changed.wait(min(lease_s for _, lease_s in leases.values()) / 6)
