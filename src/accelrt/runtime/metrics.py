"""What a session counts: cheap to record on every call, exact to a few per cent when read."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

_SUBBUCKETS = 32
"""Buckets per doubling: a percentile is off by at most 1/64, about 1.6 %."""
_DOUBLINGS = 48
"""From 1 ns to three days."""
_DRAIN_AT = 1024
"""At once: some 90 µs, which the call that brings them waits. For 8192 it was 0.5 ms, by which a server stood still."""


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Latency of single calls in milliseconds; percentiles are None while nothing was measured."""

    n: int
    mean_ms: float | None
    min_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None


class LatencyHistogram:
    """A histogram with logarithmic buckets. `record` may be called from many threads."""

    def __init__(self) -> None:
        self._counts = np.zeros(_SUBBUCKETS * _DOUBLINGS, np.int64)
        self._sum = 0
        self._least, self._most = np.iinfo(np.int64).max, 0
        # Appending to a deque is atomic and takes 30 ns; the buckets are filled in bulk.
        self._pending: deque[int] = deque()
        self._lock = threading.Lock()

    def record(self, nanoseconds: int) -> None:
        """Count one latency."""
        self._pending.append(nanoseconds)
        if len(self._pending) >= _DRAIN_AT:
            self._drain()

    def summary(self) -> LatencySummary:
        """Return what was recorded so far."""
        self._drain()
        with self._lock:
            n = int(self._counts.sum())
            if n == 0:
                return LatencySummary(0, None, None, None, None, None, None, None)
            p50, p90, p95, p99 = (self._percentile(q, n) for q in (50, 90, 95, 99))
            mean = self._sum / n / 1e6
            return LatencySummary(n, mean, self._least / 1e6, p50, p90, p95, p99, self._most / 1e6)

    def totals(self) -> tuple[int, float]:
        """Return how many latencies were recorded, and their sum in seconds."""
        self._drain()
        with self._lock:
            return int(self._counts.sum()), self._sum / 1e9

    def _percentile(self, percent: float, n: int) -> float:
        rank = max(1, -(-n * percent // 100))
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        middle = 2 ** ((bucket + 0.5) / _SUBBUCKETS)
        return float(np.clip(middle, self._least, self._most)) / 1e6

    def _drain(self) -> None:
        with self._lock:
            batch = []
            while self._pending:
                batch.append(self._pending.popleft())
            if not batch:
                return
            values = np.maximum(np.asarray(batch, np.int64), 1)
            buckets = np.minimum((np.log2(values) * _SUBBUCKETS).astype(np.int64), self._counts.size - 1)
            np.add.at(self._counts, buckets, 1)
            self._sum += int(values.sum())
            self._least = min(self._least, int(values.min()))
            self._most = max(self._most, int(values.max()))


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """What one copy of the model has done.

    Attributes:
        devices: Names of the devices it was placed on: ``neuron:0``.
        engines: What runs its segments now; ``cpu`` for one that a stand-in has taken over for good.
        calls: Calls that it answered.
        errors: Runs of a segment that its engine failed.
        busy_s: Seconds spent in the calls that it answered, summed over threads.
        lost: Its device is lost, and it is used no more.
    """

    devices: tuple[str, ...]
    engines: tuple[str, ...]
    calls: int
    errors: int
    busy_s: float
    lost: bool


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of tensors that were copied between the host and one device for a session: by calls that are done with
    them, not when programs are loaded. What stays on the device from one segment to the next is not among them."""

    device: str
    to_device: int
    to_host: int


@dataclass(frozen=True, slots=True)
class SessionStats:
    """What a session has done.

    Attributes:
        calls: Calls of `predict`, those under way and those that failed included.
        errors: Calls that raised.
        fallbacks: Segments that ran on another engine than the artifact says, counted each time.
        engines: The engines in use, in the order in which they run.
        latency: Of calls that returned.
        moved: Calls that a lost replica left and another one took up.
        workers: Calls that `submit` and `map` have in flight at a time.
        replicas: What each copy of the model has done.
        padding_rows: Rows that were computed to no use, to fill up batch sizes that the model is specialised to.
        traffic: Bytes between the host and each device other than the CPU, in the order of their names.
    """

    calls: int
    errors: int
    fallbacks: int
    engines: tuple[str, ...]
    latency: LatencySummary
    moved: int
    workers: int
    replicas: tuple[ReplicaStats, ...]
    padding_rows: int
    traffic: tuple[Traffic, ...] = ()

    @property
    def host_bytes(self) -> int:
        """Bytes copied between the host and all devices, both ways together."""
        return sum(each.to_device + each.to_host for each in self.traffic)

    @property
    def host_bytes_per_call(self) -> float | None:
        """The mean of `host_bytes` over the calls that returned, None before the first."""
        return self.host_bytes / self.latency.n if self.latency.n else None
