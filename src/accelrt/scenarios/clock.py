"""The clock of the plain driver: one that tests can replace."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time in seconds, and waits."""

    def now(self) -> float:
        """Return seconds from some fixed moment; never goes back."""

    def sleep_until(self, moment: float) -> None:
        """Return at ``moment`` or later; at once if it is past."""


class MonotonicClock:
    """The machine's own."""

    def now(self) -> float:
        """Return `time.perf_counter`."""
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        """Sleep; never spin, which would take a core from what is measured."""
        if (rest := moment - time.perf_counter()) > 0:
            time.sleep(rest)
