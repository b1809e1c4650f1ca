"""One copy of a model on its devices: the segments in order, and what happens when one of them fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from accelrt.backend import Executable
from accelrt.errors import DeviceLost, ExecutionError, InputError, SessionClosed
from accelrt.graph.types import Signature, Value
from accelrt.registry import CPU
from accelrt.runtime.faults import Faults, StandIn, one_line, peek
from accelrt.runtime.metrics import LatencyHistogram, ReplicaStats
from accelrt.runtime.runner import Outputs


class ReplicaRetired(Exception):
    """A call came to a replica whose device is lost; another one is to answer it."""


@dataclass(eq=False)
class Step:
    """One segment in a replica.

    Attributes:
        engine: What runs it: ``cpu/onnxruntime``.
        executable: The program; None where it could not be loaded, and once its device is lost.
        inputs: Values it reads.
        outputs: Values it yields.
        stand_in: Runs the same segment on the CPU.
        lock: Held during a run where the engine takes one call at a time.
        spent: Values that nobody reads after this step.
    """

    engine: str
    executable: Executable | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stand_in: StandIn
    lock: threading.Lock | None = None
    spent: tuple[str, ...] = ()


class Replica:
    """Runs the segments of a model in order, in the caller's thread.

    Args:
        signature: That of the model.
        steps: Its segments.
        faults: Policy and counts, shared by the replicas of a session.
        devices: Names of the devices it has to itself or shares: ``neuron:0``.
        parallelism: Calls in flight that keep it busy.
    """

    def __init__(
        self,
        signature: Signature,
        steps: Sequence[Step],
        faults: Faults,
        *,
        devices: tuple[str, ...] = (),
        parallelism: int = 1,
    ) -> None:
        self.devices = devices
        self.parallelism = parallelism
        self.retired = False
        self.retire: Callable[[Replica, DeviceLost], bool] | None = None
        """Asked when a device is lost: True if others carry on, so that this replica is used no more."""
        self.signature = signature
        self._steps = tuple(steps)
        self._was: tuple[str, ...] | None = None
        self._faults = faults
        self._failed = itertools.count()
        self._latency = LatencyHistogram()

    @property
    def engines(self) -> tuple[str, ...]:
        """What runs each segment now; after `close`, what ran it last."""
        if self._was is not None:
            return self._was
        return tuple(step.engine if step.executable is not None else CPU for step in self._steps)

    @property
    def errors(self) -> int:
        """Runs of a segment that its engine failed."""
        return peek(self._failed)

    @property
    def padding_rows(self) -> int:
        """Rows that were computed to no use."""
        return 0

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one call, and measure it.

        Raises:
            ExecutionError: A segment failed on every engine that may run it.
            ReplicaRetired: A device is lost and another replica is to answer.
        """
        start = time.perf_counter_ns()
        outputs = self.compute(feeds)
        self._latency.record(time.perf_counter_ns() - start)
        return outputs

    def compute(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one call, for a caller that measures it himself; raises what `run` does."""
        values = dict(feeds)
        for step in self._steps:
            values.update(self._run_step(step, {name: values[name] for name in step.inputs}))
            for name in step.spent:
                values.pop(name, None)
        return {name: values[name] for name in self.signature.output_names}

    def shortcut(self, drop: Callable[[], None]) -> Callable[[Mapping[str, Value]], Outputs] | None:
        """Return the short way of the common case: one segment that reads and yields exactly the model's values.

        Args:
            drop: Called when the way is no longer to be used, because the device is lost.
        """
        if len(self._steps) != 1:
            return None
        (step,) = self._steps
        whole = step.inputs == self.signature.input_names and step.outputs == self.signature.output_names
        if step.executable is None or step.lock is not None or not whole:
            return None
        run = step.executable.run

        def direct(feeds: Mapping[str, Value]) -> Outputs:
            try:
                return run(feeds)
            except Exception as error:  # noqa: BLE001 - engines raise what they like
                if isinstance(error, DeviceLost) and self._faults.policy != "error":
                    drop()
                return self._recover(step, feeds, error)

        return direct

    def trace(self, feeds: Mapping[str, Value]) -> Iterator[tuple[dict[str, Value], Outputs]]:
        """Compute one call segment by segment: yield what each one read and what it gave, in order."""
        values = dict(feeds)
        for step in self._steps:
            given = {name: values[name] for name in step.inputs}
            outputs = self._run_step(step, given)
            values.update(outputs)
            yield given, outputs

    def stats(self) -> ReplicaStats:
        """Return counts and times of `run`."""
        calls, busy_s = self._latency.totals()
        return ReplicaStats(self.devices, self.engines, calls, self.errors, busy_s, self.retired)

    def close(self) -> None:
        """Let go of the programs, which the session closes; what was counted stays. Closing twice is no error."""
        self._was = self.engines
        self._steps, self.retire = (), None

    def _run_step(self, step: Step, feeds: Mapping[str, Value]) -> Outputs:
        executable = step.executable
        if executable is None:
            if self.retired:
                raise ReplicaRetired
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
        next(self._failed)
        moves = isinstance(error, DeviceLost) and self.retire is not None and self.retire(self, error)
        if self._faults.policy == "error":
            raise ExecutionError(f"{step.engine} failed: {one_line(error)}", backend=step.engine) from error
        if isinstance(error, DeviceLost):
            step.executable = None  # closed with the session, when nothing is in flight any more
            if moves:
                raise ReplicaRetired from error
        outputs = self._answer(step, feeds, error)
        self._faults.say(step.engine, f"{step.engine} failed and the CPU answered instead: {one_line(error)}")
        return outputs

    def _answer(self, step: Step, feeds: Mapping[str, Value], error: Exception) -> Outputs:
        """Run a segment on its stand-in, and count that."""
        try:
            outputs = step.stand_in.get(error).run(feeds)
        except Exception as second:  # noqa: BLE001 - whatever it was, both causes are told
            raise ExecutionError(
                f"{step.engine} failed: {one_line(error)} And the CPU failed too: {one_line(second)}",
                hint="If both agree, the inputs are likely at fault.",
                backend=step.engine,
            ) from error
        self._faults.fell_back()
        return outputs
