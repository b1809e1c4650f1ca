"""Calls of any number of rows on programs that take fixed numbers: split, pad, run, and put together again."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from accelrt.errors import ExecutionError, InputError
from accelrt.graph.types import Value
from accelrt.runtime.runner import Outputs, OverlappingRunner, Runner


class BucketPlanner:
    """Chooses batch sizes whose sum holds a number of rows: with the least padding, then in the fewest calls.

    Thread-safe. What was computed is kept: a number for each row of the largest call so far, up to `limit`.

    Args:
        sizes: The batch sizes, positive.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"batch sizes must be positive numbers, at least one of them, not {list(sizes)}")
        self.sizes = tuple(sorted(set(sizes), reverse=True))
        largest = self.sizes[0]
        # Of a smaller size a, as many as sum to a multiple of the largest can be replaced by fewer of the largest. So
        # a best choice holds less than that of each, and beyond this sum, nothing but more of the largest.
        self.limit = sum(size * (largest // gcd(size, largest) - 1) for size in self.sizes[1:])
        self._calls: list[float] = [0]  # the fewest calls that sum to exactly this many rows
        self._last: list[int] = [0]  # the size of one of them
        self._lock = threading.Lock()

    def plan(self, rows: int) -> list[int]:
        """Return the sizes to use, the largest first: their sum is ``rows`` or the least above it that they can sum to.

        Args:
            rows: 0 or more; none need no call.
        """
        largest = self.sizes[0]
        bulk = max(0, rows - self.limit) // largest
        rest = rows - bulk * largest
        # Some multiple of the smallest size lies within its length above any number.
        self._extend(rest + self.sizes[-1])
        total = next(sum_ for sum_ in itertools.count(rest) if self._calls[sum_] < np.inf)
        chosen = [largest] * bulk
        while total:
            chosen.append(self._last[total])
            total -= self._last[total]
        return sorted(chosen, reverse=True)

    def _extend(self, rows: int) -> None:
        if len(self._calls) > rows:
            return
        with self._lock:
            for total in range(len(self._calls), rows + 1):
                best, size = min(
                    ((self._calls[total - size] + 1, -size) for size in self.sizes if size <= total),
                    default=(np.inf, 0),
                )
                self._last.append(-size)
                self._calls.append(best)  # last, since others read up to its length


def rows_of(feeds: Mapping[str, Value]) -> int:
    """Return how many rows a call has.

    Raises:
        InputError: Its inputs are no arrays that begin with the same dimension.
    """
    found = {name: np.shape(value)[0] if np.ndim(value) else None for name, value in feeds.items()}
    counts = set(found.values())
    if len(counts) != 1 or None in counts:
        raise InputError(
            f"The inputs of a call must be arrays of as many rows each; found {found}.",
            hint="The first dimension is that of the batch.",
        )
    return int(counts.pop() or 0)


@dataclass(frozen=True, slots=True)
class PaddingStats:
    """What splitting into buckets cost: rows that callers gave, and rows that were computed to no use."""

    rows: int
    padding: int
    calls: int


class BucketRunner:
    """Runs calls of any number of rows on runners that each take one number of rows.

    Rows of padding repeat the last row of the call, since that one is valid whatever the model expects; they are
    computed and dropped. Outputs are copies where anything else than the whole result of one run is returned, so that
    no caller holds rows of padding, or keeps them in memory.

    Args:
        runners: By batch size; closed with this one.
    """

    def __init__(self, runners: Mapping[int, Runner]) -> None:
        self._runners = dict(runners)
        self._planner = BucketPlanner(list(runners))
        self._counted = threading.Lock()
        self._rows = self._padding = self._calls = 0

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute a call; a call of no rows runs one of padding, to know what its outputs look like."""
        rows, chunks = self._split(feeds)
        return _join([(self._runners[size].run(part), used) for size, used, part in chunks], rows)

    def stats(self) -> PaddingStats:
        """Return what was run so far."""
        with self._counted:
            return PaddingStats(self._rows, self._padding, self._calls)

    def close(self) -> None:
        """Close all runners."""
        for runner in self._runners.values():
            runner.close()

    def _split(self, feeds: Mapping[str, Value]) -> tuple[int, list[tuple[int, int, Mapping[str, Value]]]]:
        """Return the rows of a call, and its runs: batch size, rows of the call in it, inputs."""
        rows = rows_of(feeds)
        plan = self._planner.plan(rows) or [self._planner.sizes[-1]]
        chunks: list[tuple[int, int, Mapping[str, Value]]] = []
        start = 0
        for size in plan:
            used = min(size, rows - start)
            chunks.append((size, used, feeds if used == rows == size else _part(feeds, start, used, size)))
            start += used
        with self._counted:
            self._rows += rows
            self._padding += sum(plan) - rows
            self._calls += len(plan)
        return rows, chunks


class OverlappingBucketRunner(BucketRunner):
    """The same on runners that overlap calls: the runs of one call are all under way at once, and calls overlap too."""

    def __init__(self, runners: Mapping[int, OverlappingRunner]) -> None:
        super().__init__(runners)
        self._overlapping = dict(runners)
        self.capacity = min(runner.capacity for runner in runners.values())

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        return self.submit(feeds).result()

    def submit(self, feeds: Mapping[str, Value]) -> Future[Outputs]:
        """Begin the runs of a call one after another, where the runners overlap them.

        If one fails, so does the call, with the error of the first that did.
        """
        rows, chunks = self._split(feeds)
        whole: Future[Outputs] = Future()
        whole.set_running_or_notify_cancel()
        begun: list[tuple[Future[Outputs], int]] = []
        try:
            for size, used, part in chunks:
                begun.append((self._overlapping[size].submit(part), used))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            whole.set_exception(error)
            return whole
        waiting = itertools.count(len(begun) - 1, -1)

        def finished(_: Future[Outputs]) -> None:
            if next(waiting):  # atomic: exactly one of the callbacks sees 0
                return
            try:
                whole.set_result(_join([(future.result(), used) for future, used in begun], rows))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                whole.set_exception(error)

        for future, _ in begun:
            future.add_done_callback(finished)
        return whole


def _part(feeds: Mapping[str, Value], start: int, used: int, size: int) -> dict[str, Value]:
    """Return ``used`` rows from ``start``, padded to ``size`` with the last of them, or zeros if there are none."""
    part: dict[str, Value] = {}
    for name, value in feeds.items():
        rows = value[start : start + used]
        if used < size:
            padded = np.empty((size, *value.shape[1:]), value.dtype)
            padded[:used] = rows
            padded[used:] = rows[-1] if used else ("" if value.dtype.kind == "O" else np.zeros((), value.dtype))
            rows = padded
        part[name] = rows
    return part


def _join(results: Sequence[tuple[Outputs, int]], rows: int) -> Outputs:
    """Put the rows of several runs together, without those of padding."""
    if len(results) == 1 and all(_has_rows(value, rows) for value in results[0][0].values()):
        return results[0][0]
    names = results[0][0]
    for outputs, used in results:
        for name, value in outputs.items():
            if np.ndim(value) == 0 or np.shape(value)[0] < used:
                raise ExecutionError(f"Output {name!r} of {np.shape(value)} does not hold {used} rows.")
    return {name: _concatenated([outputs[name][:used] for outputs, used in results]) for name in names}


def _has_rows(value: Any, rows: int) -> bool:
    return bool(np.ndim(value) and np.shape(value)[0] == rows)


def _concatenated(parts: Sequence[Any]) -> Any:
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)


def sliced(outputs: Mapping[str, Value], bounds: Sequence[int]) -> Iterator[Outputs]:
    """Yield the rows between each bound and the next as copies, so that nobody holds another's rows.

    Raises:
        ExecutionError: An output does not have as many rows as the last bound says.
    """
    for name, value in outputs.items():
        if not _has_rows(value, bounds[-1]):
            raise ExecutionError(
                f"Output {name!r} of shape {list(np.shape(value))} does not hold one row for each of {bounds[-1]}.",
                hint="The rows of this model are not independent.",
            )
    for start, end in itertools.pairwise(bounds):
        yield {name: value[start:end].copy() for name, value in outputs.items()}
