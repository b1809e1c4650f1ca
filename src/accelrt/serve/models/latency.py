"""What a model's calls take by their number of rows, learnt while it runs."""

from __future__ import annotations

import threading

_FORGET = 0.98
"""What an earlier measurement weighs at each new one: fifty calls later it counts for a third."""


class LatencyModel:
    """A line through recent calls: seconds = fixed + each * rows, by least squares with forgetting. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._fixed = self._each = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was measured yet."""
        return self._weight > 0

    def record(self, rows: int, seconds: float) -> None:
        """Learn from one call. One that took more than ten times what was expected counts as ten times."""
        with self._lock:
            if self._weight > 5:
                seconds = min(seconds, 10 * max(self._fixed + self._each * rows, 1e-6))
            for name, value in (
                ("_weight", 1.0),
                ("_x", float(rows)),
                ("_y", seconds),
                ("_xx", float(rows * rows)),
                ("_xy", rows * seconds),
            ):
                setattr(self, name, getattr(self, name) * _FORGET + value)
            spread = self._weight * self._xx - self._x * self._x
            # With one number of rows only there is no slope to see: all is in proportion, which errs to the slow side.
            each = (self._weight * self._xy - self._x * self._y) / spread if spread > 1e-9 * self._xx else None
            if each is None:
                each = self._y / self._x if self._x else 0.0
            self._each = max(each, 0.0)
            self._fixed = max((self._y - self._each * self._x) / self._weight, 0.0)

    def seconds(self, rows: int) -> float:
        """Return what a call of so many rows is expected to take; 0 while nothing is known."""
        return self._fixed + self._each * rows

    def rows_within(self, seconds: float, most: int) -> int:
        """Return the most rows whose call is expected to take no longer: 1 at least, ``most`` if nothing is known."""
        if not self.known or self._each <= 0:
            return most if self._fixed <= seconds else 1
        return max(1, min(most, int((seconds - self._fixed) / self._each)))
