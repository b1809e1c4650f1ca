"""A session: an artifact resident on its devices, ready to predict."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from accelrt.errors import ExecutionError, OptionError, SessionClosed
from accelrt.graph.types import Signature, Value
from accelrt.runtime.dispatch import Dispatcher
from accelrt.runtime.faults import Faults, peek
from accelrt.runtime.inputs import Binder
from accelrt.runtime.metrics import LatencyHistogram, SessionStats
from accelrt.runtime.pool import Feeder
from accelrt.runtime.replica import Replica, ReplicaRetired
from accelrt.runtime.residency import Place
from accelrt.runtime.runner import Outputs, Runner


class Session:
    """Runs a model. Thread-safe; close it, or use it as a context manager.

    Made by `accelrt.load`.
    """

    def __init__(
        self,
        signature: Signature,
        replicas: Sequence[Replica],
        runner: Runner,
        *,
        faults: Faults,
        workers: int,
        resources: ExitStack,
    ) -> None:
        self.signature = signature
        self._replicas = tuple(replicas)
        self._runner = runner
        self._faults = faults
        self._resources = resources
        self._binder = Binder(signature, _landings(self._replicas))
        self._histogram = LatencyHistogram()
        # Counters that many threads advance without a lock: `next` on a count is atomic.
        self._entered, self._left, self._failed = itertools.count(), itertools.count(), itertools.count()
        # Kept beside the replicas, which let go of theirs when they are closed.
        self._links = sorted({link for each in self._replicas for link in each.links}, key=lambda link: link.device)
        self._closed = False
        self._closing = threading.Lock()
        self._feeder = Feeder(self.predict, workers)
        self._alone = runner if isinstance(runner, Replica) else None
        # A replica alone does not measure too: its latencies are the session's.
        self._measured_here = self._alone is not None
        self._run: Callable[[Mapping[str, Value]], Outputs] = runner.run
        if self._alone is not None:
            self._run = self._alone.shortcut(self._drop_shortcut) or self._alone.compute

    def predict(self, *inputs: Any, outputs: Literal["host", "device"] = "host") -> Outputs:
        """Compute the outputs of one call, in the caller's thread; with several replicas on one that is idle.

        Args:
            inputs: One mapping of names to values, or the values in the signature's order. Arrays (numpy's, or
                anything with ``__array__`` or ``__dlpack__``) must have the dtype and shape that the signature says;
                Python numbers and lists take the dtype. A tensor on the device of a segment that reads it is not
                copied, if it lies in C order and the engine takes it so; any other is copied to the host. Do not write
                to it before the call returns.
            outputs: ``device`` leaves each output where the segment that yields it left it, and returns it as a DLPack
                tensor: on the device without a copy where that segment's engine can, otherwise a numpy array, which
                is a DLPack tensor on the host. So are all outputs of pipelines and models for several batch sizes.

        Returns:
            A numpy array for each output by name (a list for a sequence, None for an empty optional).

        Raises:
            InputError: An input does not fit the signature, or lies where it cannot be read.
            OptionError: ``outputs`` is neither of the two.
            ExecutionError: A segment failed on every engine that may run it.
            SessionClosed: The session was closed.
        """
        next(self._entered)
        try:
            if self._closed:
                raise SessionClosed("The session was closed.", hint="Load the artifact again.")
            start = time.perf_counter_ns()
            found = self._run(self._binder.bind(inputs)) if outputs == "host" else self._run_there(inputs, outputs)
            self._histogram.record(time.perf_counter_ns() - start)
            return found
        except BaseException:
            next(self._failed)
            raise
        finally:
            next(self._left)

    @property
    def capacity(self) -> int:
        """Calls under way at once that keep the session busy; `submit` takes more, and queues them."""
        return self._feeder.workers

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute the outputs of one call as `predict` does: a session is a runner too, for what gathers calls."""
        return self.predict(feeds)

    def trace(self, *inputs: Any) -> Iterator[tuple[dict[str, Value], Outputs]]:
        """Compute one call segment by segment: yield what each one read and what it gave, in order.

        A session for several batch sizes has no one order of segments: trace the part for one of them, see
        `accelrt.artifact.parts.variant`.

        Raises:
            ExecutionError: The session is for several batch sizes.
            Whatever `predict` raises, at the segment's turn.
        """
        try:
            yield from self._leader().trace(self._binder.bind(inputs))
        except ReplicaRetired as retired:
            raise ExecutionError("The device was lost in the middle of a trace.", hint="Trace again.") from retired

    def submit(self, *inputs: Any) -> Future[Outputs]:
        """Queue one call on the session's threads and return its future.

        While 1,024 calls wait for a thread, this waits too, so that a fast producer does not fill the memory.

        Raises:
            SessionClosed: The session was closed.
        """
        return self._feeder.submit(*inputs)

    def map(self, items: Iterable[Any]) -> Iterator[Outputs]:
        """Yield the outputs of each item in order, computing several at once and reading only a few items ahead.

        Args:
            items: Each one the argument of a call: a mapping, a single value, or a tuple of values. There may be no
                end of them.

        Raises:
            AccelrtError: Whatever `predict` raises for an item, at its turn; items after it are not started.
            Exception: Whatever ``items`` raises, after the outputs of the items before.
        """
        return self._feeder.map(items)

    def stats(self) -> SessionStats:
        """Return counts and latencies since the session was loaded."""
        replicas = tuple(replica.stats() for replica in self._replicas)
        if self._measured_here:
            calls, busy_s = self._histogram.totals()
            replicas = tuple(replace(stats, calls=calls, busy_s=busy_s) for stats in replicas)
        return SessionStats(
            calls=peek(self._entered),
            errors=peek(self._failed),
            fallbacks=self._faults.fallbacks,
            engines=self._leader().engines,
            latency=self._histogram.summary(),
            moved=self._faults.moved,
            workers=self._feeder.workers,
            replicas=replicas,
            padding_rows=sum(replica.padding_rows for replica in self._replicas),
            traffic=tuple(link.traffic() for link in self._links),
        )

    def close(self) -> None:
        """Wait for the calls under way, then free the devices. Closing twice is no error."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._feeder.close()
        while peek(self._left) < peek(self._entered):
            time.sleep(0.0005)
        self._alone, self._run = None, _refuse
        self._runner.close()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        copies = f", {len(self._replicas)} replicas" * (len(self._replicas) > 1)
        state = "closed" if self._closed else (", ".join(self._leader().engines) or "nothing to compute") + copies
        return f"<Session {self.signature} on {state}>"

    def _leader(self) -> Replica:
        """The first replica in use, which speaks for all: they run the same segments."""
        return next((replica for replica in self._replicas if not replica.retired), self._replicas[0])

    def _run_there(self, inputs: tuple[Any, ...], outputs: str) -> Outputs:
        """Compute one call whose outputs stay on a device, where the runner can have them there."""
        if outputs != "device":
            raise OptionError(f"outputs are wanted on 'host' or 'device', not on {outputs!r}.")
        feeds = self._binder.bind(inputs)
        runner = self._runner
        if isinstance(runner, Dispatcher):
            return runner.run(feeds, stay=True)
        return self._run(feeds) if self._alone is None else self._alone.compute(feeds, stay=True)

    def _drop_shortcut(self) -> None:
        if self._alone is not None:
            self._run = self._alone.compute


def _landings(replicas: Sequence[Replica]) -> dict[str, dict[tuple[int, int], Place]]:
    """Return on which devices inputs may lie: those of any replica; one that meets another's device reads a copy."""
    found: dict[str, dict[tuple[int, int], Place]] = {}
    for replica in replicas:
        for name, places in replica.landings.items():
            found.setdefault(name, {}).update(places)
    return found


def _refuse(feeds: Mapping[str, Value]) -> Outputs:
    raise SessionClosed("The session was closed.", hint="Load the artifact again.")
