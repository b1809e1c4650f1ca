"""The queue of one model: whose turn it is, who shares a run, who has waited too long, and when to turn away.

`runtime.batching.RequestBatcher` makes callers wait while its queue is full, and answers late requests even in the
middle of a run; a server has to turn requests away, keep priorities, and compute what it began. So the queue is its
own, and how calls are put together and taken apart is the batcher's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from accelrt.errors import (
    AccelrtError,
    DeviceLost,
    ExecutionError,
    ModelUnavailable,
    Overloaded,
    RequestTimeout,
    SessionClosed,
)
from accelrt.graph.types import Value
from accelrt.runtime.batching import apart, together
from accelrt.runtime.runner import Outputs
from accelrt.serve.interface import Clock
from accelrt.serve.models.config import QueuePolicy
from accelrt.serve.models.latency import LatencyModel
from accelrt.serve.models.statistics import VersionStatistics

_MAX_THREADS = 64
_LEAST_RETRY_S, _MOST_RETRY_S = 0.01, 30.0


@dataclass(frozen=True, slots=True)
class SchedulerPolicy:
    """How a queue works.

    Attributes:
        max_rows: Rows of a run that several requests share; 1 for no sharing.
        delay_s: How long a request waits for others.
        preferred: Sizes of a run that begin at once; empty for any.
        target_s: What a request may take in all; None for no limit.
        levels: Priorities, 1 the highest; 0 if there are none.
        default_level: That of requests that name none.
        max_queue: Requests that may wait.
        queue: What happens to requests that wait too long.
    """

    max_rows: int = 1
    delay_s: float = 0.0
    preferred: tuple[int, ...] = ()
    target_s: float | None = None
    levels: int = 0
    default_level: int = 0
    max_queue: int = 1024
    queue: QueuePolicy = field(default_factory=QueuePolicy)


class Item:
    """One request in the queue. ``answer`` is called once, in any thread, with outputs or an error."""

    __slots__ = (
        "arrived_ns",
        "clock",
        "deadline_ns",
        "done",
        "feeds",
        "future",
        "key",
        "level",
        "loop",
        "number",
        "rows",
        "started",
    )

    def __init__(
        self,
        feeds: Mapping[str, Value],
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Outputs],
        *,
        level: int = 0,
        deadline_ns: int | None = None,
        arrived_ns: int = 0,
    ) -> None:
        self.feeds: Mapping[str, Value] | None = feeds
        self.loop, self.future = loop, future
        self.level, self.deadline_ns = level, deadline_ns
        self.arrived_ns = arrived_ns or time.monotonic_ns()
        self.number, self.rows = -1, 1
        self.key: object = None
        self.started = self.done = False
        self.clock: Clock | None = None

    def share(self) -> None:
        """Find out what can share a run with this: equal names, types and sizes beyond the rows; None if nothing."""
        feeds = self.feeds or {}
        counts = {value.shape[0] if isinstance(value, np.ndarray) and value.ndim else -1 for value in feeds.values()}
        if len(counts) == 1 and (rows := counts.pop()) > 0:
            self.rows = rows
            self.key = tuple((name, feeds[name].dtype, feeds[name].shape[1:]) for name in sorted(feeds))


class QueueClosed(Exception):
    """The queue takes no more requests: the model was unloaded, and is to be asked for again."""


class Scheduler:
    """Runs the requests of one model on threads of its own, made when they are first needed.

    Args:
        predict: Computes one call; thread-safe.
        capacity: Calls under way at a time.
        policy: How.
        statistics: Where it is counted.
        learn: Told the bytes of inputs and the nanoseconds of each call of one request.
        name: Of the model, for messages.
    """

    def __init__(
        self,
        predict: Callable[[Mapping[str, Value]], Outputs],
        capacity: int,
        policy: SchedulerPolicy,
        statistics: VersionStatistics,
        *,
        learn: Callable[[int, int], None] | None = None,
        name: str = "",
    ) -> None:
        self.busy = 0
        """Requests that wait or are being computed. Read without a lock by the short way."""
        self.latency = LatencyModel()
        self._predict, self._policy, self._statistics = predict, policy, statistics
        self._learn, self._name = learn, name
        self._capacity = max(1, min(capacity, _MAX_THREADS))
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._numbers = itertools.count()
        # By level, the highest first, in order of arrival; the last is of requests that are late and wait on.
        self._levels: list[dict[int, Item]] = [{} for _ in range(max(policy.levels, 1) + 1)]
        self._waiting = self._rows_waiting = 0
        self._rows_by_key: dict[object, int] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._largest = 1  # rows of the largest run so far, where there is a target: sizes grow step by step
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return self._waiting

    def item(
        self,
        feeds: Mapping[str, Value],
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Outputs],
        *,
        priority: int = 0,
        timeout_us: int = 0,
        arrived_ns: int = 0,
    ) -> Item:
        """Make a request of this queue: with its priority and its deadline as the policy says."""
        policy = self._policy
        level = priority if 1 <= priority <= policy.levels else policy.default_level
        timeout = policy.queue.timeout_us
        if timeout_us > 0 and policy.queue.allow_timeout_override:
            timeout = min(timeout_us, timeout) if timeout else timeout_us  # a request may shorten it, not lengthen it
        arrived = arrived_ns or time.monotonic_ns()
        deadline = arrived + timeout * 1000 if timeout else None
        made = Item(feeds, loop, future, level=max(level, 1) - 1, deadline_ns=deadline, arrived_ns=arrived)
        if policy.max_rows > 1:
            made.share()
        return made

    def put(self, item: Item) -> None:
        """Queue a request.

        Raises:
            Overloaded: The queue is full, or it would wait longer than the target allows.
            QueueClosed: The queue was closed.
        """
        with self._lock:
            if self._closed:
                raise QueueClosed
            if self._waiting >= self._policy.max_queue:
                raise self._overloaded(f"{self._waiting} requests wait, as many as may")
            if self._policy.target_s is not None and self._waiting and self._expected_s() > self._policy.target_s:
                raise self._overloaded(
                    f"it would wait {self._expected_s() * 1e3:.3g} ms, its target is {self._policy.target_s * 1e3:.3g}"
                )
            item.number = next(self._numbers)
            self._insert(item.level, item)
            self.busy += 1
            self._work.notify()
            # A thread that was woken for another request may not have left its wait yet, and still counts as idle.
            if self._waiting > self._idle and len(self._threads) < self._capacity:
                thread = threading.Thread(target=self._serve, name=f"accelrt-serve {self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def expire(self, item: Item) -> None:
        """Answer a request whose time is over, if its turn has not come; or let it wait behind all others."""
        with self._lock:
            if item.started or item.done:
                return
            late = not self._policy.queue.delay
            self._remove(item)
            if late:
                self._finish(item)
            else:
                item.deadline_ns = None
                self._insert(len(self._levels) - 1, item)
        if late:
            self._statistics.timed_out()
            _deliver([(item, _late(self._name, item))])

    def cancel(self, item: Item) -> None:
        """Forget a request that nobody waits for any more, if its turn has not come."""
        with self._lock:
            if not item.started and not item.done:
                self._remove(item)
                self._finish(item)

    def close(self) -> None:
        """Refuse new requests, compute those that were taken, and end the threads."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # The queue, under the lock

    def _insert(self, level: int, item: Item) -> None:
        item.level = level
        self._levels[level][item.number] = item
        self._waiting += 1
        self._rows_waiting += item.rows
        if item.key is not None:
            self._rows_by_key[item.key] = self._rows_by_key.get(item.key, 0) + item.rows

    def _remove(self, item: Item) -> None:
        del self._levels[item.level][item.number]
        self._waiting -= 1
        self._rows_waiting -= item.rows
        if item.key is not None:
            self._rows_by_key[item.key] -= item.rows
            if not self._rows_by_key[item.key]:
                del self._rows_by_key[item.key]

    def _finish(self, item: Item) -> None:
        item.done, item.feeds = True, None
        self.busy -= 1

    def _in_order(self) -> Iterator[Item]:
        for level in self._levels:
            yield from level.values()

    def _limit(self) -> int:
        """Return how many rows a run of several requests may have."""
        policy = self._policy
        if policy.target_s is None or policy.max_rows == 1:
            return policy.max_rows
        # A request waits for the run that is under way, and then takes one itself: each may have half the time.
        within = self.latency.rows_within(policy.target_s / 2, policy.max_rows)
        return min(within, 2 * self._largest)

    def _expected_s(self) -> float:
        """Return how long a request that came now would take: the runs before it, and its own."""
        limit = self._limit()
        runs = -(-self._rows_waiting // limit) if self._policy.max_rows > 1 else self._waiting
        return (runs / self._capacity + 1) * self.latency.seconds(min(limit, max(self._rows_waiting, 1)))

    def _overloaded(self, why: str) -> Overloaded:
        self._statistics.rejected()
        error = Overloaded(
            f"Model {self._name!r} turned a request away: {why}.", hint="Ask again later, or add replicas."
        )
        error.retry_after_s = min(max(self._expected_s(), _LEAST_RETRY_S), _MOST_RETRY_S)
        return error

    def _next(self) -> list[Item] | None:
        """Wait for the next run; None when the queue was closed and is empty. Those whose time is over are left out."""
        while True:
            late: list[Item] = []
            with self._lock:
                batch = self._take_when_due(late)
            for item in late:
                self._statistics.timed_out()
                _deliver([(item, _late(self._name, item))])
            if batch is None or batch:
                return batch

    def _take_when_due(self, late: list[Item]) -> list[Item] | None:
        while True:
            now = time.monotonic_ns()
            head = next(self._in_order(), None)
            if head is None:
                if self._closed:
                    return None
                self._wait(None)
                continue
            if head.deadline_ns is not None and head.deadline_ns <= now:
                self._remove(head)
                if self._policy.queue.delay:
                    head.deadline_ns = None
                    self._insert(len(self._levels) - 1, head)
                    continue
                self._finish(head)
                late.append(head)
                return []
            if head.key is None:
                return self._start([head])
            limit, rows = self._limit(), self._rows_by_key[head.key]
            due = rows >= limit
            if self._policy.preferred and not due:
                reached = [size for size in self._policy.preferred if size <= rows]
                if reached:
                    limit, due = max(reached), True
            left = self._delay(rows) - (now - head.arrived_ns) / 1e9
            if due or left <= 0 or self._closed:
                return self._start(self._gather(head, limit, now))
            self._wait(left)

    def _delay(self, rows: int) -> float:
        policy = self._policy
        if policy.target_s is None:
            return policy.delay_s
        return min(policy.delay_s, max(0.0, policy.target_s - 2 * self.latency.seconds(rows)))

    def _gather(self, head: Item, limit: int, now: int) -> list[Item]:
        """Return the first request and those after it that can share its run, up to the first that does not fit."""
        batch: list[Item] = []
        rows = 0
        for item in self._in_order():
            if item.key == head.key and (item.deadline_ns is None or item.deadline_ns > now):
                if batch and rows + item.rows > limit:
                    break
                batch.append(item)
                rows += item.rows
                if rows >= limit:
                    break
        return batch

    def _start(self, batch: list[Item]) -> list[Item]:
        for item in batch:
            self._remove(item)
            item.started = True
        return batch

    def _wait(self, seconds: float | None) -> None:
        self._idle += 1
        try:
            self._work.wait(seconds)
        finally:
            self._idle -= 1

    # The threads

    def _serve(self) -> None:
        while (batch := self._next()) is not None:
            self._run(batch)

    def _run(self, batch: Sequence[Item]) -> None:
        begun = time.monotonic_ns()
        given = [item.feeds or {} for item in batch]
        try:
            feeds = together(given)
            together_ns = time.monotonic_ns()
            outputs = self._predict(feeds)
            computed = time.monotonic_ns()
            parts = apart(outputs, [item.rows for item in batch])
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            _note(batch, begun, time.monotonic_ns())
            self._failed(batch, error)
            return
        ended = time.monotonic_ns()
        _note(batch, begun, ended)
        rows = sum(item.rows for item in batch)
        self.latency.record(rows, (ended - begun) / 1e9)
        if rows > self._largest:
            self._largest = rows
        if self._learn is not None and len(batch) == 1:
            self._learn(sum(getattr(value, "nbytes", 0) for value in given[0].values()), computed - together_ns)
        self._statistics.run(
            rows,
            [max(begun - item.arrived_ns, 0) for item in batch],
            [max(ended - item.arrived_ns, 0) for item in batch],
            (together_ns - begun, computed - together_ns, ended - computed),
        )
        self._close(batch)
        _deliver(list(zip(batch, parts, strict=True)))

    def _failed(self, batch: Sequence[Item], error: BaseException) -> None:
        """Fail a request that was alone; run those of a batch one by one, so that a bad one fails alone."""
        if len(batch) > 1 and not isinstance(error, DeviceLost | SessionClosed | ModelUnavailable):
            for item in batch:
                self._run([item])
            return
        now = time.monotonic_ns()
        for item in batch:
            self._statistics.failed(max(now - item.arrived_ns, 0))
        self._close(batch)
        told = error if isinstance(error, AccelrtError) else _foreign(error)
        _deliver([(item, told) for item in batch])

    def _close(self, batch: Sequence[Item]) -> None:
        with self._lock:
            for item in batch:
                self._finish(item)


def _note(batch: Sequence[Item], begun: int, ended: int) -> None:
    """Tell those who want to know when they were computed."""
    for item in batch:
        if (clock := item.clock) is not None:
            clock.begun_ns, clock.ended_ns, clock.rows = begun, ended, sum(each.rows for each in batch)


def _deliver(answers: Sequence[tuple[Item, Outputs | BaseException]]) -> None:
    """Hand answers to those who wait, with one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Outputs], Outputs | BaseException]]] = {}
    for item, answer in answers:
        by_loop.setdefault(item.loop, []).append((item.future, answer))
    for loop, pairs in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
            loop.call_soon_threadsafe(_set, pairs)


def _set(pairs: Sequence[tuple[asyncio.Future[Outputs], Outputs | BaseException]]) -> None:
    for future, answer in pairs:
        if future.done():
            continue
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def _foreign(error: BaseException) -> ExecutionError:
    made = ExecutionError(f"The model failed: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def _late(name: str, item: Item) -> RequestTimeout:
    waited = (time.monotonic_ns() - item.arrived_ns) / 1e6
    return RequestTimeout(
        f"A request for model {name!r} waited {waited:.3g} ms, longer than it allows; it was not computed.",
        hint="Allow more time, or add replicas.",
    )
