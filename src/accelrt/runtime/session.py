"""A session: an artifact resident on its devices, ready to predict."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from accelrt.backend import Executable
from accelrt.errors import AccelrtError, DeviceLost, ExecutionError, InputError, SessionClosed
from accelrt.graph.types import Signature, Value
from accelrt.policy import Fallback, announce
from accelrt.registry import CPU
from accelrt.runtime.buckets import BucketRunner
from accelrt.runtime.inputs import Binder
from accelrt.runtime.metrics import LatencyHistogram, SessionStats
from accelrt.runtime.runner import Outputs, OverlappingRunner, Runner, submit_ahead

_AHEAD = 2
"""Items that `map` keeps in flight for each worker: one computes, one waits."""


@dataclass(eq=False)
class Step:
    """One segment in a session.

    Attributes:
        engine: What runs it: ``cpu/onnxruntime``.
        executable: The program; None once its device is lost.
        inputs: Values it reads.
        outputs: Values it yields.
        recover: Makes a stand-in that runs the same segment on the CPU; raises if that cannot be.
        lock: Held during a run where the engine takes one call at a time.
        spent: Values that nobody reads after this step.
        stand_in: What runs the segment instead, once it was needed.
        lost: The program whose device is lost: not used again, but closed with the session.
    """

    engine: str
    executable: Executable | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    recover: Callable[[BaseException], Executable]
    lock: threading.Lock | None = None
    spent: tuple[str, ...] = ()
    stand_in: Executable | None = None
    lost: Executable | None = None
    recovery: threading.Lock = field(default_factory=threading.Lock)


class Session:
    """Runs a model. Thread-safe; close it, or use it as a context manager.

    Made by `accelrt.load`.
    """

    def __init__(
        self,
        signature: Signature,
        steps: Sequence[Step],
        *,
        fallback: Fallback,
        workers: int,
        keep: object = None,
        runner: Runner | None = None,
        parts: Sequence[Session] = (),
    ) -> None:
        self.signature = signature
        self._steps = tuple(steps)
        self._outputs = signature.output_names
        self._fallback: Fallback = fallback
        self._workers = workers
        self._keep = keep
        # What runs whole calls in place of steps, and the sessions it is made of: see `accelrt.runtime.compose`.
        self._runner, self._parts = runner, tuple(parts)
        self._binder = Binder(signature)
        self._histogram = LatencyHistogram()
        # Counters that many threads advance without a lock: `next` on a count is atomic.
        self._entered, self._left, self._failed = itertools.count(), itertools.count(), itertools.count()
        self._fell_back = itertools.count()
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._said: set[str] = set()
        self._direct = self._direct_run()

    def predict(self, *inputs: Any) -> Outputs:
        """Compute the outputs of one call, in the caller's thread.

        Args:
            inputs: One mapping of names to values, or the values in the signature's order. Arrays (numpy's, or
                anything with ``__array__`` or ``__dlpack__``) must have the dtype and shape that the signature says;
                Python numbers and lists take the dtype.

        Returns:
            A numpy array for each output by name (a list for a sequence, None for an empty optional).

        Raises:
            InputError: An input does not fit the signature.
            ExecutionError: A segment failed on every engine that may run it.
            SessionClosed: The session was closed.
        """
        next(self._entered)
        try:
            if self._closed:
                raise SessionClosed("The session was closed.", hint="Load the artifact again.")
            start = time.perf_counter_ns()
            feeds = self._binder.bind(inputs)
            direct = self._direct
            outputs = direct(feeds) if direct is not None else self._run(feeds)
            self._histogram.record(time.perf_counter_ns() - start)
            return outputs
        except BaseException:
            next(self._failed)
            raise
        finally:
            next(self._left)

    @property
    def capacity(self) -> int:
        """Calls under way at once that keep the session busy; `submit` takes more, and queues them."""
        return self._runner.capacity if isinstance(self._runner, OverlappingRunner) else self._workers

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one call whose inputs were checked, and count nothing: for what is made of sessions."""
        direct = self._direct
        return direct(feeds) if direct is not None else self._run(feeds)

    def trace(self, *inputs: Any) -> Iterator[tuple[dict[str, Value], Outputs]]:
        """Compute one call segment by segment: yield what each one read and what it gave, in order.

        A session for several batch sizes has no one order of segments: trace the part for one of them, see
        `accelrt.artifact.parts.variant`.

        Raises:
            ExecutionError: The session is for several batch sizes.
            AccelrtError: Whatever `predict` raises, at the segment's turn.
        """
        if isinstance(self._runner, BucketRunner):
            raise ExecutionError("A session for several batch sizes cannot be traced as one.")
        values = dict(self._binder.bind(inputs))
        for part in self._parts:
            for feeds, outputs in part.trace({name: values[name] for name in part.signature.input_names}):
                values.update(outputs)
                yield feeds, outputs
        for step in self._steps:
            feeds = {name: values[name] for name in step.inputs}
            outputs = self._run_step(step, feeds)
            values.update(outputs)
            yield feeds, outputs

    def submit(self, *inputs: Any) -> Future[Outputs]:
        """Queue one call on the session's threads and return its future.

        A pipeline takes a few calls ahead; if it is full, this waits. So a callback of a future must not submit.

        Raises:
            SessionClosed: The session was closed.
        """
        with self._pool_lock:
            if self._closed:
                raise SessionClosed("The session was closed.", hint="Load the artifact again.")
            runner = self._runner
            if not isinstance(runner, OverlappingRunner):
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="accelrt")
                return self._pool.submit(self.predict, *inputs)
            next(self._entered)  # from here on, closing waits for this call
        return submit_ahead(runner, lambda: self._binder.bind(inputs), self._answered)

    def map(self, items: Iterable[Any]) -> Iterator[Outputs]:
        """Yield the outputs of each item in order, computing several at once and reading only a few items ahead.

        Args:
            items: Each one the argument of a call: a mapping, a single value, or a tuple of values.

        Raises:
            AccelrtError: Whatever `predict` raises for an item, at its turn; items after it are not started.
        """
        flight: deque[Future[Outputs]] = deque()
        try:
            for item in items:
                flight.append(self.submit(*item) if isinstance(item, tuple) else self.submit(item))
                if len(flight) > _AHEAD * self._workers:
                    yield flight.popleft().result()
            while flight:
                yield flight.popleft().result()
        finally:
            for future in flight:
                future.cancel()

    def _answered(self, nanoseconds: int | None) -> None:
        """Count a call that was submitted ahead: how long it took, None if it failed."""
        if nanoseconds is None:
            next(self._failed)
        else:
            self._histogram.record(nanoseconds)
        next(self._left)

    def stats(self) -> SessionStats:
        """Return counts and latencies since the session was loaded."""
        parts = [part.stats() for part in self._parts]
        return SessionStats(
            calls=_peek(self._entered),
            errors=_peek(self._failed),
            fallbacks=_peek(self._fell_back) + sum(part.fallbacks for part in parts),
            engines=tuple(step.engine if step.executable is not None else CPU for step in self._steps)
            + tuple(engine for part in parts for engine in part.engines),
            latency=self._histogram.summary(),
            padding_rows=self._runner.stats().padding if isinstance(self._runner, BucketRunner) else 0,
        )

    def close(self) -> None:
        """Wait for the calls under way, then free the devices. Closing twice is no error."""
        with self._pool_lock:
            if self._closed:
                return
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        while _peek(self._left) < _peek(self._entered):
            time.sleep(0.0005)
        if self._runner is not None:
            self._runner.close()
        for step in self._steps:
            for executable in (step.executable, step.lost, step.stand_in):
                if executable is not None:
                    executable.close()
        self._direct, self._steps, self._keep = None, (), None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(self.stats().engines) or "nothing to compute"
        return f"<Session {self.signature} on {state}>"

    def _direct_run(self) -> Callable[[Mapping[str, Value]], Outputs] | None:
        """Return the short way of the common case: one segment that reads and yields exactly the model's values."""
        if self._runner is not None:
            return self._runner.run
        if len(self._steps) != 1:
            return None
        (step,) = self._steps
        executable = step.executable
        whole = step.inputs == self.signature.input_names and step.outputs == self._outputs
        if executable is None or step.lock is not None or not whole:
            return None
        run = executable.run

        def direct(feeds: Mapping[str, Value]) -> Outputs:
            try:
                return run(feeds)
            except Exception as error:  # noqa: BLE001 - engines raise what they like
                return self._recover(step, feeds, error)

        return direct

    def _run(self, feeds: Mapping[str, Value]) -> Outputs:
        values = dict(feeds)
        for step in self._steps:
            values.update(self._run_step(step, {name: values[name] for name in step.inputs}))
            for name in step.spent:
                values.pop(name, None)
        return {name: values[name] for name in self._outputs}

    def _run_step(self, step: Step, feeds: Mapping[str, Value]) -> Outputs:
        executable = step.executable
        if executable is None:
            return self._answer(step, feeds, DeviceLost("its device is lost, or could not take the segment"))
        try:
            if step.lock is None:
                return executable.run(feeds)
            with step.lock:
                return executable.run(feeds)
        except Exception as error:  # noqa: BLE001 - engines raise what they like
            return self._recover(step, feeds, error)

    def _recover(self, step: Step, feeds: Mapping[str, Value], error: Exception) -> Outputs:
        """Answer a call that an engine failed, by the policy; a lost device is not asked again."""
        if isinstance(error, SessionClosed | InputError):
            raise error
        if self._fallback == "error":
            raise ExecutionError(f"{step.engine} failed: {_one_line(error)}", backend=step.engine) from error
        if isinstance(error, DeviceLost):
            self._direct = None
            with step.recovery:
                step.lost = step.lost or step.executable
                step.executable = None
        outputs = self._answer(step, feeds, error)
        if step.engine not in self._said:
            self._said.add(step.engine)
            announce(self._fallback, f"{step.engine} failed and the CPU answered instead: {_one_line(error)}")
        return outputs

    def _answer(self, step: Step, feeds: Mapping[str, Value], error: Exception) -> Outputs:
        """Run a segment on its stand-in, and count that."""
        try:
            outputs = self._stand_in(step, error).run(feeds)
        except Exception as second:  # noqa: BLE001 - whatever it was, both causes are told
            raise ExecutionError(
                f"{step.engine} failed: {_one_line(error)} And the CPU failed too: {_one_line(second)}",
                hint="If both agree, the inputs are likely at fault.",
                backend=step.engine,
            ) from error
        next(self._fell_back)
        return outputs

    def _stand_in(self, step: Step, error: BaseException) -> Executable:
        with step.recovery:
            if step.stand_in is None:
                step.stand_in = step.recover(error)
            return step.stand_in


def _peek(counter: itertools.count[int]) -> int:
    """Read a counter without advancing it."""
    return int(counter.__reduce__()[1][0])


def _one_line(error: BaseException) -> str:
    text = str(error) if isinstance(error, AccelrtError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:397] + "..."
