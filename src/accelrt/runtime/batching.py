"""Batching of requests: calls that arrive at about the same time share one run, and each gets its own rows back."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from accelrt.errors import DeviceLost, InputError, OptionError, RequestTimeout, SessionClosed
from accelrt.graph.types import Value
from accelrt.runtime.buckets import rows_of, sliced
from accelrt.runtime.runner import Outputs, OverlappingRunner, Runner

MAX_QUEUED = 1024
"""Requests that may wait before the next caller has to."""


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """What a batcher has done.

    Attributes:
        requests: Requests taken.
        runs: Runs begun, those of single requests after a failed batch included.
        rows: Rows in them.
        retried: Requests that were run alone because the batch they were in failed.
        timeouts: Requests that were answered with `RequestTimeout`.
    """

    requests: int
    runs: int
    rows: int
    retried: int
    timeouts: int


class _Request:
    """One request; ``feeds`` is None once it was answered, so that what still refers to it holds no arrays."""

    __slots__ = ("answered", "arrived", "deadline", "feeds", "future", "key", "rows", "started")

    def __init__(self, feeds: Mapping[str, Value], deadline: float | None) -> None:
        self.rows = rows_of(feeds)
        self.feeds: Mapping[str, Value] | None = feeds
        # What can share a run: equal names, types and sizes beyond the rows.
        self.key = tuple(sorted((name, value.dtype, value.shape[1:]) for name, value in feeds.items()))
        self.arrived = time.monotonic()
        self.deadline = deadline
        self.future: Future[Outputs] = Future()
        self.started = self.answered = False

    def start(self) -> bool:
        """Keep the request from being cancelled; False if it was before. Called under the batcher's lock."""
        if not self.started and not self.future.set_running_or_notify_cancel():
            return False
        self.started = True
        return True


class RequestBatcher:
    """Gathers requests of any numbers of rows into runs, and gives each request exactly its rows of the run.

    It is a runner, and a session can be its runner: each run is then a call of the session, checked and counted by it.
    Only for models whose rows are independent, as ``accelrt.compile(..., batch=...)`` proves. Requests that differ in a
    type or a size beyond the rows do not share a run; those that do keep their order. If a run of several requests
    fails, each is run alone, so that one bad request fails alone; after `DeviceLost` and `SessionClosed`, which all
    would meet again, all fail with it.

    Arrays of a request must not be written to before it is answered.

    Args:
        runner: Runs the batches: one at a time, or as many as keep it busy if it overlaps calls. Closed with the
            batcher.
        max_batch_size: Rows at which a run begins at once. A request of more is run by itself, undivided.
        max_queue_delay_us: Microseconds that the first request of a run waits for others.
        timeout: Seconds in which a request must be answered; None for no limit.
        max_queued: Requests that may wait; when there are so many, `submit` waits too.

    Raises:
        OptionError: A number is out of range.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_size: int,
        max_queue_delay_us: float = 1000,
        timeout: float | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        if max_batch_size < 1 or max_queue_delay_us < 0 or max_queued < 1 or (timeout is not None and timeout <= 0):
            raise OptionError(
                "max_batch_size and max_queued must be 1 or more, max_queue_delay_us 0 or more, timeout more than 0, "
                f"not {max_batch_size}, {max_queued}, {max_queue_delay_us} and {timeout}."
            )
        self._runner = runner
        self._max_rows, self._delay_s = max_batch_size, max_queue_delay_us / 1e6
        self._timeout, self._max_queued = timeout, max_queued
        self._lock = threading.Lock()
        self._work, self._space, self._alarm = (threading.Condition(self._lock) for _ in range(3))
        self._numbers = itertools.count()
        self._waiting: dict[int, _Request] = {}  # by number, in order of arrival
        self._rows_waiting: dict[object, int] = {}  # by key
        self._alone: deque[_Request] = deque()
        self._deadlines: list[tuple[float, int, _Request]] = []
        self._open = 0  # requests that are not answered
        self._running = 0  # runs that an overlapping runner has under way
        self._most_running = runner.capacity if isinstance(runner, OverlappingRunner) else 1
        self._closed = False
        self._requests = self._runs = self._rows = self._retried = self._timeouts = 0
        self._server = threading.Thread(target=self._serve, name="accelrt-batcher", daemon=True)
        self._watch: threading.Thread | None = None
        self._server.start()

    def submit(self, feeds: Mapping[str, Value], timeout: float | None = None) -> Future[Outputs]:
        """Queue a request; waits while too many are queued. The future can be cancelled until its run begins.

        Args:
            feeds: Arrays by name, all of as many rows.
            timeout: Seconds in place of the batcher's own.

        Raises:
            InputError: The inputs do not have as many rows each, or are no arrays.
            RequestTimeout: The time was over while too many were queued.
            SessionClosed: The batcher was closed.
        """
        if strange := [name for name, value in feeds.items() if not isinstance(value, np.ndarray)]:
            raise InputError(f"Input {strange[0]!r} of a request must be an array, not {type(feeds[strange[0]])!r}.")
        seconds = self._timeout if timeout is None else timeout
        request = _Request(feeds, None if seconds is None else time.monotonic() + seconds)
        with self._lock:
            while len(self._waiting) >= self._max_queued and not self._closed:
                left = None if request.deadline is None else request.deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._timeouts += 1
                    raise _late(request, "too many requests were queued before it")
                self._space.wait(left)
            if self._closed:
                raise SessionClosed("The batcher was closed.", hint="Make another.")
            number = next(self._numbers)
            if request.deadline is not None:
                self._watch_for(request.deadline, number, request)
            self._waiting[number] = request
            rows = self._rows_waiting.get(request.key, 0)
            self._rows_waiting[request.key] = rows + request.rows
            self._requests += 1
            self._open += 1
            # Between the first of a run and the one that fills it, nobody has to look.
            if len(self._waiting) == 1 or rows + request.rows >= self._max_rows:
                self._work.notify()
        return request.future

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one request, and wait for it.

        Raises:
            RequestTimeout: It was not answered in time.
            Exception: Whatever `submit` and the runner raise.
        """
        return self.submit(feeds).result()

    def stats(self) -> BatcherStats:
        """Return what was done so far."""
        with self._lock:
            return BatcherStats(self._requests, self._runs, self._rows, self._retried, self._timeouts)

    def close(self, *, cancel: bool = False) -> None:
        """Refuse new requests, answer all that were taken, and close the runner. Closing twice is no error.

        Args:
            cancel: Answer those whose run has not begun with `SessionClosed`, rather than compute them.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            dropped = [*self._waiting.values(), *self._alone] if cancel else []
            if cancel:
                self._waiting.clear()
                self._rows_waiting.clear()
                self._alone.clear()
            for condition in (self._work, self._space, self._alarm):
                condition.notify_all()
        for request in dropped:
            self._answer(request, SessionClosed("The batcher was closed before the request was computed."))
        if not first:
            return
        self._server.join()
        if self._watch is not None:
            self._watch.join()
        self._runner.close()

    # The server's thread

    def _serve(self) -> None:
        while (batch := self._next()) is not None:
            if batch := [request for request in batch if self._starts(request)]:
                self._run(batch)

    def _next(self) -> list[_Request] | None:
        """Wait for the next run; None when the batcher was closed and all is answered."""
        with self._lock:
            while True:
                if self._running >= self._most_running:
                    self._work.wait()  # meanwhile, requests gather
                elif self._alone:
                    return [self._alone.popleft()]
                elif self._waiting:
                    head = next(iter(self._waiting.values()))
                    left = head.arrived + self._delay_s - time.monotonic()
                    if self._closed or left <= 0 or self._rows_waiting[head.key] >= self._max_rows:
                        batch = self._take(head)
                        self._space.notify(len(batch))
                        return batch
                    self._work.wait(left)
                elif self._closed and not self._running:
                    return None
                else:
                    self._work.wait()

    def _take(self, head: _Request) -> list[_Request]:
        """Take the first request and those after it that can share its run, up to the first that does not fit."""
        taken: list[int] = []
        rows = 0
        for number, request in self._waiting.items():
            if request.key == head.key:
                if taken and rows + request.rows > self._max_rows:
                    break
                taken.append(number)
                rows += request.rows
        return [self._drop(number) for number in taken]

    def _drop(self, number: int) -> _Request:
        """Take a request out of those that wait."""
        request = self._waiting.pop(number)
        self._rows_waiting[request.key] -= request.rows
        if not self._rows_waiting[request.key] and not any(r.key == request.key for r in self._waiting.values()):
            del self._rows_waiting[request.key]
        return request

    def _starts(self, request: _Request) -> bool:
        """Tell whether a request is still to be computed; answer it if its time is over."""
        if request.deadline is not None and request.deadline <= time.monotonic():
            self._expire(request)
            return False
        with self._lock:
            if request.answered:
                return False
            if not request.start():
                self._close_request(request)
                return False
            return True

    def _run(self, requests: Sequence[_Request]) -> None:
        with self._lock:
            # The time of one may have been over just now.
            given = [(request, request.feeds) for request in requests if request.feeds is not None]
            batch = [request for request, _ in given]
            if not batch:
                return
            self._runs += 1
            self._rows += sum(request.rows for request in batch)
        try:
            feeds = together([feeds for _, feeds in given])
            if isinstance(self._runner, OverlappingRunner):
                future = self._runner.submit(feeds)
                with self._lock:
                    self._running += 1
                # Called in this thread if it is done already.
                future.add_done_callback(lambda done: self._finished(batch, done))
                return
            outputs = self._runner.run(feeds)
            parts = apart(outputs, [request.rows for request in batch])
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._failed(batch, error)
            return
        self._succeeded(batch, parts)

    def _finished(self, batch: Sequence[_Request], future: Future[Outputs]) -> None:
        """Answer a batch from an overlapping runner's thread, which must not be kept."""
        try:
            self._succeeded(batch, apart(future.result(), [request.rows for request in batch]))
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._failed(batch, error)
        finally:
            with self._lock:
                self._running -= 1
                self._work.notify()

    def _succeeded(self, batch: Sequence[_Request], parts: Sequence[Outputs]) -> None:
        for request, outputs in zip(batch, parts, strict=True):
            self._answer(request, outputs)

    def _failed(self, batch: Sequence[_Request], error: BaseException) -> None:
        """Fail a request that was alone; queue those of a batch to be run alone."""
        if len(batch) == 1 or isinstance(error, DeviceLost | SessionClosed):
            for request in batch:
                self._answer(request, error)
            return
        with self._lock:
            self._alone.extend(batch)
            self._retried += len(batch)
            self._work.notify()

    # Answers

    def _answer(self, request: _Request, answer: Outputs | BaseException) -> None:
        """Answer a request once: what comes later, after its time was over, is dropped."""
        with self._lock:
            if request.answered:
                return
            self._close_request(request)
            if not request.start():
                return
        if isinstance(answer, BaseException):
            request.future.set_exception(answer)
        else:
            request.future.set_result(answer)

    def _close_request(self, request: _Request) -> None:
        request.answered, request.feeds = True, None
        self._open -= 1
        if self._closed and not self._open:
            self._alarm.notify()

    def _expire(self, request: _Request) -> None:
        with self._lock:
            where = "it was being computed" if request.started else "it waited for its turn, and is not computed"
            self._timeouts += not request.answered
        self._answer(request, _late(request, where))

    # The watch's thread

    def _watch_for(self, deadline: float, number: int, request: _Request) -> None:
        """Remember when a request must be answered. Deadlines of those that were are dropped before they pile up."""
        if len(self._deadlines) > 2 * self._open + 64:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].answered]
            heapify(self._deadlines)
        earliest = not self._deadlines or deadline < self._deadlines[0][0]
        heappush(self._deadlines, (deadline, number, request))
        if self._watch is None:
            self._watch = threading.Thread(target=self._keep_time, name="accelrt-batcher-watch", daemon=True)
            self._watch.start()
        elif earliest:
            self._alarm.notify()

    def _keep_time(self) -> None:
        while True:
            late: list[_Request] = []
            with self._lock:
                if self._closed and not self._open:
                    return
                now = time.monotonic()
                while self._deadlines and (self._deadlines[0][2].answered or self._deadlines[0][0] <= now):
                    _, number, request = heappop(self._deadlines)
                    if not request.answered:
                        late.append(request)
                        if number in self._waiting:
                            self._drop(number)
                            self._space.notify()
                if not late:
                    self._alarm.wait(self._deadlines[0][0] - now if self._deadlines else None)
            for request in late:
                self._expire(request)


def together(feeds: Sequence[Mapping[str, Value]]) -> Mapping[str, Value]:
    """Return the inputs of one run of several calls, which agree in names, types and sizes beyond the rows."""
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]}


def apart(outputs: Outputs, rows: Sequence[int]) -> list[Outputs]:
    """Return each call's own outputs of a run that they shared.

    Args:
        outputs: Of the run.
        rows: Of each call; of a single one, whatever it says, all outputs are its own.

    Raises:
        ExecutionError: An output does not have as many rows as the calls.
    """
    if len(rows) == 1:
        return [outputs]
    return list(sliced(outputs, [0, *itertools.accumulate(rows)]))


def _late(request: _Request, why: str) -> RequestTimeout:
    seconds = 0.0 if request.deadline is None else request.deadline - request.arrived
    return RequestTimeout(
        f"A request of {request.rows} rows was not answered within {max(seconds, 0):.3g} s: {why}.",
        hint="Allow more time, or add devices.",
    )
