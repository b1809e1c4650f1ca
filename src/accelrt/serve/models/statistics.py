"""What a version of a model has done: cheap to count, read as the statistics extension means it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from accelrt.runtime.faults import peek
from accelrt.runtime.metrics import LatencyHistogram, LatencySummary
from accelrt.serve.interface import Duration, ModelStatistics


@dataclass(slots=True)
class _Sum:
    """Of one batch size: executions, and nanoseconds of input, inference and output."""

    executions: int = 0
    compute_input: int = 0
    infer: int = 0
    output: int = 0


class VersionStatistics:
    """Counts of one version.

    Calls that are answered in the front end's thread are counted by their latency alone, without a lock. Calls that go
    through the queue are counted run by run.
    """

    def __init__(self) -> None:
        self.latency = LatencyHistogram()
        """Of all requests that were answered: from when they came to the model until they left it."""
        self.direct = self.latency.record
        """Count a request of one row that was computed at once, with the nanoseconds that it took."""
        self.last_used_ns = time.monotonic_ns()
        """When a request last came, of `time.monotonic_ns`; also set from outside, by the short way."""
        self._failed, self._rejected, self._timed_out = itertools.count(), itertools.count(), itertools.count()
        self._lock = threading.Lock()
        self._fail_ns = self._queue_ns = self._total_ns = 0
        self._queued = self._wide = self._wide_rows = 0
        self._runs: dict[int, _Sum] = {}
        self._rate_mark = (time.monotonic(), 0, 0.0)

    def direct_rows(self, rows: int, nanoseconds: int) -> None:
        """Count a request of any number of rows that was computed at once."""
        self.latency.record(nanoseconds)
        with self._lock:
            self._queued += 1
            self._total_ns += nanoseconds
            self._add(rows, 0, nanoseconds, 0)

    def run(self, rows: int, queue_ns: Sequence[int], total_ns: Sequence[int], times: tuple[int, int, int]) -> None:
        """Count one run that answered several requests.

        Args:
            rows: Of all of them.
            queue_ns: How long each waited.
            total_ns: How long each took from its arrival to its answer.
            times: Nanoseconds to put inputs together, to compute, and to take outputs apart.
        """
        for each in total_ns:
            self.latency.record(each)
        with self._lock:
            self._queued += len(total_ns)
            self._queue_ns += sum(queue_ns)
            self._total_ns += sum(total_ns)
            self._add(rows, *times)
        self.last_used_ns = time.monotonic_ns()

    def _add(self, rows: int, compute_input: int, infer: int, output: int) -> None:
        one = self._runs.setdefault(rows, _Sum())
        one.executions += 1
        one.compute_input += compute_input
        one.infer += infer
        one.output += output

    def failed(self, nanoseconds: int) -> None:
        """Count a request that failed."""
        next(self._failed)
        with self._lock:
            self._fail_ns += nanoseconds

    def rejected(self) -> None:
        """Count a request that was turned away because the queue was full."""
        next(self._rejected)

    def timed_out(self) -> None:
        """Count a request whose time was over before its turn had come."""
        next(self._timed_out)

    def rate(self) -> float:
        """Return requests answered a second, since this was last asked a second ago or longer."""
        calls, _ = self.latency.totals()
        then, before, rate = self._rate_mark
        now = time.monotonic()
        if now - then >= 1:
            rate = (calls - before) / (now - then)
            self._rate_mark = (now, calls, rate)
        return rate

    def summary(self) -> LatencySummary:
        """Return percentiles of the latency of requests that were answered."""
        return self.latency.summary()

    def read(self, name: str, version: str, pending: int) -> ModelStatistics:
        """Return all counts."""
        with self._lock:
            calls, seconds = self.latency.totals()
            # What is in the histogram and was not counted run by run are calls of one row, computed at once.
            single, single_ns = calls - self._queued, round(seconds * 1e9) - self._total_ns
            runs = {
                rows: _Sum(one.executions, one.compute_input, one.infer, one.output) for rows, one in self._runs.items()
            }
            queue_ns, fail_ns = self._queue_ns, self._fail_ns
        if single > 0:
            one = runs.setdefault(1, _Sum())
            one.executions += single
            one.infer += max(single_ns, 0)
        executions = sum(one.executions for one in runs.values())
        failed, rejected, timed_out = peek(self._failed), peek(self._rejected), peek(self._timed_out)
        idle_s = (time.monotonic_ns() - self.last_used_ns) / 1e9
        return ModelStatistics(
            name,
            version,
            last_inference_ms=int((time.time() - idle_s) * 1000) if calls or failed else 0,
            inference_count=sum(rows * one.executions for rows, one in runs.items()),
            execution_count=executions,
            success=Duration(calls, round(seconds * 1e9)),
            # A request that was turned away or came too late failed as well, at no cost.
            fail=Duration(failed + rejected + timed_out, fail_ns),
            queue=Duration(calls, queue_ns),
            compute_input=Duration(calls, sum(one.compute_input for one in runs.values())),
            compute_infer=Duration(calls, sum(one.infer for one in runs.values())),
            compute_output=Duration(calls, sum(one.output for one in runs.values())),
            batches={
                rows: (
                    Duration(one.executions, one.compute_input),
                    Duration(one.executions, one.infer),
                    Duration(one.executions, one.output),
                )
                for rows, one in sorted(runs.items())
            },
            pending=pending,
            rejected=rejected,
            timed_out=timed_out,
        )
