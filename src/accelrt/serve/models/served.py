"""One version of a model that is loaded: the short way for fast calls, and the queue for all others."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from accelrt.errors import AccelrtError, ModelUnavailable, RequestError, SessionClosed
from accelrt.graph.types import Signature, TensorType, Value
from accelrt.runtime.inputs import Binder
from accelrt.runtime.runner import Outputs
from accelrt.serve.interface import InferRequest, InferResponse, ModelMetadata, ServedModel
from accelrt.serve.models.loading import Facts, Predictor
from accelrt.serve.models.scheduler import QueueClosed, Scheduler, SchedulerPolicy
from accelrt.serve.models.statistics import VersionStatistics

_SLOW_WEIGHT = 20
"""A slow call weighs as much as so many fast ones: with fewer than one in twenty slow, the 95th percentile is fast."""
_EXCUSED = 25
"""Times the limit that a call may take while models are loaded; with 200 µs that is 5 ms."""
_CLOSED_AT, _MOST = 100, 400
"""Five slow calls more than fast ones make up for close the short way; 300 fast ones in the queue open it again."""


class Loads:
    """How many models are being loaded now; their loaders contend with everybody for Python's interpreter lock."""

    __slots__ = ("_lock", "under_way")

    def __init__(self) -> None:
        self.under_way = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.under_way += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.under_way -= 1


class DirectGate:
    """Decides whether calls are fast enough to be made in the front end's thread. Has no lock, and errs a little.

    While models are loaded a call may take long because it waits for the interpreter lock, which it would do in any
    other thread as well, and more often; so that only what takes `_EXCUSED` times the limit counts as slow then.

    Args:
        limit_us: Microseconds that nearly all calls must stay below; 0 keeps the short way closed.
        loads: What is being loaded.
    """

    __slots__ = ("_loads", "limit_ns", "most_bytes", "score")

    def __init__(self, limit_us: float, loads: Loads | None = None) -> None:
        self.limit_ns = int(limit_us * 1000)
        self._loads = loads or Loads()
        self.score = _MOST
        self.most_bytes = -1
        """The largest inputs that are known to be fast, where sizes are open."""

    def learn(self, size: int, nanoseconds: int) -> None:
        """Learn from a call of the queue: bytes of its inputs, and what it took."""
        if nanoseconds <= self.limit_ns:
            self.score = max(0, self.score - 1)
            self.most_bytes = max(self.most_bytes, size)
        elif size <= self.most_bytes or self.most_bytes < 0:
            self.slow(size, nanoseconds)

    def slow(self, size: int, nanoseconds: int) -> None:
        """Learn that a call took so long, which is more than the limit."""
        if self._loads.under_way and nanoseconds <= _EXCUSED * self.limit_ns:
            return
        self.score = min(_MOST, self.score + _SLOW_WEIGHT)
        if self.score > _CLOSED_AT:
            self.most_bytes = min(self.most_bytes, size - 1)  # larger ones have to show again that they are fast

    def open_after(self, size: int, nanoseconds: int) -> None:
        """Decide by what a call took that was made to warm up."""
        self.score = 0 if nanoseconds <= self.limit_ns else _MOST
        self.most_bytes = size if nanoseconds <= self.limit_ns else -1


class LiveModel:
    """One version of a model, as front ends hold it while they answer a request.

    While somebody refers to it after it was taken out of service, its predictor stays, for a while; `released` is set
    when nobody does. Asked after that, it hands the request on to whatever the service has in its place.

    Args:
        again: Finds the model anew, by name and version.
        check: Refuses inputs that the model would take and its configuration does not allow; None if there are none.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_asked",
        "_binder",
        "_check",
        "_direct",
        "_gate",
        "_open_sizes",
        "_predict",
        "_predictor",
        "_rows",
        "_statistics",
        "config",
        "facts",
        "metadata",
        "name",
        "queue",
        "released",
        "signature",
        "version",
    )

    def __init__(
        self,
        name: str,
        version: str,
        predictor: Predictor,
        predict: Callable[[Mapping[str, Value]], Outputs],
        facts: Facts,
        metadata: ModelMetadata,
        config: Mapping[str, Any],
        policy: SchedulerPolicy,
        statistics: VersionStatistics,
        gate: DirectGate,
        again: Callable[[str, str], Awaitable[ServedModel]],
        check: Callable[[Mapping[str, Value]], None] | None = None,
    ) -> None:
        self.name, self.version = name, version
        self.signature: Signature = facts.signature
        self.metadata, self.config, self.facts = metadata, config, facts
        self._predictor, self._predict, self._gate, self._again = predictor, predict, gate, again
        self._check = check
        self._statistics, self._direct = statistics, statistics.direct
        self._binder = Binder(facts.signature)
        self._asked = frozenset(facts.signature.output_names)
        types = [port.type for port in facts.signature.inputs]
        self._open_sizes = not all(
            isinstance(each, TensorType) and each.shape is not None and all(isinstance(dim, int) for dim in each.shape)
            for each in types
        )
        # Whose first dimension counts the rows of a request, for statistics.
        self._rows = facts.signature.input_names[0] if facts.rows_proved and facts.signature.inputs else None
        self.queue = Scheduler(predict, predictor.capacity, policy, statistics, learn=gate.learn, name=name)
        self.released = threading.Event()
        weakref.finalize(self, self.released.set)

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """Answer at once if calls are fast and none is under way; see `ServedModel`. The hot path of the server."""
        gate, queue = self._gate, self.queue
        if gate.score > _CLOSED_AT or queue.busy:
            return None
        inputs = request.inputs
        size = 0
        if self._open_sizes:
            for value in inputs.values():
                size += value.nbytes
            if size > gate.most_bytes:
                return None
        asked = request.outputs
        if asked is not None:
            self._check_outputs(asked)
        start = time.monotonic_ns()
        try:
            if self._check is not None:
                self._check(inputs)
            outputs = self._predict(inputs)
        except SessionClosed:
            return None  # it was unloaded just now: the long way finds what has taken its place
        except Exception:
            self._statistics.failed(time.monotonic_ns() - start)
            raise
        spent = time.monotonic_ns() - start
        if spent > gate.limit_ns:
            gate.slow(size, spent)
        elif gate.score:
            gate.score -= 1
        statistics = self._statistics
        statistics.last_used_ns = start
        if self._rows is None or (rows := inputs[self._rows].shape[0]) == 1:
            self._direct(spent)
        else:
            statistics.direct_rows(rows, spent)
        if asked is not None:
            outputs = {name: outputs[name] for name in asked}
        return InferResponse(self.name, self.version, outputs, request.id)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer when the request's turn has come; see `ServedModel`."""
        asked = request.outputs
        if asked is not None:
            self._check_outputs(asked)
        try:
            feeds = self._binder.bind((request.inputs,))
            if self._check is not None:
                self._check(feeds)
        except AccelrtError:
            self._statistics.failed(0)
            raise
        self._statistics.last_used_ns = time.monotonic_ns()
        try:
            outputs = await self._turn(feeds, request)
        except (QueueClosed, SessionClosed):
            return await self._hand_on(request)
        if asked is not None:
            outputs = {name: outputs[name] for name in asked}
        return InferResponse(self.name, self.version, outputs, request.id)

    async def _turn(self, feeds: Mapping[str, Value], request: InferRequest) -> Outputs:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outputs] = loop.create_future()
        queue = self.queue
        item = queue.item(
            feeds,
            loop,
            future,
            priority=request.priority,
            timeout_us=request.timeout_us,
            arrived_ns=request.arrived_ns,
        )
        item.clock = request.clock
        queue.put(item)
        alarm = None
        if item.deadline_ns is not None:
            alarm = loop.call_later(max(0.0, (item.deadline_ns - time.monotonic_ns()) / 1e9), queue.expire, item)
        try:
            return await future
        except asyncio.CancelledError:
            queue.cancel(item)
            raise
        finally:
            if alarm is not None:
                alarm.cancel()

    async def _hand_on(self, request: InferRequest) -> InferResponse:
        other = await self._again(self.name, self.version)
        if other is self:
            error = ModelUnavailable(f"Model {self.name!r} is being unloaded.", hint="Ask again.")
            error.retry_after_s = 0.1
            raise error
        return await other.infer(request)

    def _check_outputs(self, asked: Any) -> None:
        for name in asked:
            if name not in self._asked:
                raise RequestError(
                    f"Model {self.name!r} has no output {str(name)[:80]!r}.",
                    hint=f"Its outputs: {', '.join(self.signature.output_names)}.",
                )

    @property
    def predictor(self) -> Predictor:
        """What computes its calls."""
        return self._predictor

    def __repr__(self) -> str:
        return f"<LiveModel {self.name} version {self.version}>"


def bytes_of(feeds: Mapping[str, Value]) -> int:
    """Return the bytes of a call's arrays."""
    return sum(value.nbytes for value in feeds.values() if isinstance(value, np.ndarray))
