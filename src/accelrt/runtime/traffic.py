"""What goes between the host and one device of a session: bytes, and runs in flight."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from accelrt.runtime.faults import peek
from accelrt.runtime.metrics import Traffic

T = TypeVar("T")

PATIENCE_S = 10.0
"""How long a run that found no memory waits for those in flight; a run that takes longer is not waited for."""


class Link:
    """Counts the bytes that cross between the host and a device, and the runs in flight there. Thread-safe.

    Args:
        device: Its name: ``cuda:0``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._to_device = self._to_host = 0
        self._lock, self._retrying = threading.Lock(), threading.Lock()
        # `next` on a count is atomic.
        self._begun, self._ended = itertools.count(), itertools.count()

    def run(self, compute: Callable[[], T]) -> T:
        """Return what ``compute`` returns, and count it as in flight meanwhile."""
        next(self._begun)
        try:
            return compute()
        finally:
            next(self._ended)

    def run_again(self, compute: Callable[[], T]) -> T:
        """Run what found no memory once more, after those runs that are in flight now; one such run at a time.

        Runs that begin later are let pass, so this may find no memory either.
        """
        with self._retrying:
            until, enough = time.monotonic() + PATIENCE_S, peek(self._begun)
            while peek(self._ended) < enough and time.monotonic() < until:
                time.sleep(0.001)
            return self.run(compute)

    def count(self, *, to_device: int = 0, to_host: int = 0) -> None:
        """Count bytes that were copied."""
        with self._lock:
            self._to_device += to_device
            self._to_host += to_host

    def traffic(self) -> Traffic:
        """Return what was counted so far."""
        with self._lock:
            return Traffic(self.device, self._to_device, self._to_host)


def host_bytes(values: Iterable[Any]) -> int:
    """Return the bytes of those values that are in the host's memory; text, which is of any size, counts as 0."""
    total = 0
    for value in values:
        if isinstance(value, np.ndarray):
            total += 0 if value.dtype.hasobject else value.nbytes
        elif isinstance(value, list):
            total += host_bytes(value)
    return total
