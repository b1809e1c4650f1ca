"""One copy of a model on its devices: the segments in order, and what happens when one of them fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from accelrt.backend import DeviceTensor, Executable
from accelrt.errors import DeviceLost, ExecutionError, InputError, OutOfDeviceMemory, SessionClosed
from accelrt.graph.types import Signature, Value, shareable
from accelrt.registry import CPU
from accelrt.runtime.faults import Faults, StandIn, one_line, peek
from accelrt.runtime.metrics import LatencyHistogram, ReplicaStats
from accelrt.runtime.residency import DeviceFeeds, Held, OnDevice, Place, Unreadable, all_on_host, landings, on_host
from accelrt.runtime.runner import Outputs
from accelrt.runtime.traffic import Link, host_bytes


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
        link: Counts what goes to its device and back; None on the CPU.
        place: Its device, if tensors may stay there between steps.
        keep: Its outputs that stay there, for later steps.
        keep_asked: Those that stay there if the caller wants the model's outputs there.
    """

    engine: str
    executable: Executable | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stand_in: StandIn
    lock: threading.Lock | None = None
    spent: tuple[str, ...] = ()
    link: Link | None = None
    place: Place | None = None
    keep: frozenset[str] = frozenset()
    keep_asked: frozenset[str] = frozenset()


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
        self._resident = any(step.place is not None for step in steps)
        self._keeps = any(step.keep for step in steps)
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

    @property
    def links(self) -> tuple[Link, ...]:
        """The links to the devices of its segments, each once."""
        return tuple(dict.fromkeys(step.link for step in self._steps if step.link is not None))

    @property
    def landings(self) -> dict[str, dict[tuple[int, int], Place]]:
        """On which devices an input may lie already when it is given, by its name and DLPack's device."""
        names = {port.name for port in self.signature.inputs if shareable(port.type)}
        return landings(self._steps, names)

    def run(self, feeds: Mapping[str, Value], *, stay: bool = False) -> Outputs:
        """Compute one call, and measure it.

        Raises:
            ExecutionError: A segment failed on every engine that may run it.
            ReplicaRetired: A device is lost and another replica is to answer.
        """
        start = time.perf_counter_ns()
        outputs = self.compute(feeds, stay=stay)
        self._latency.record(time.perf_counter_ns() - start)
        return outputs

    def compute(self, feeds: Mapping[str, Value], *, stay: bool = False) -> Outputs:
        """Compute one call, for a caller that measures it himself; raises what `run` does.

        Args:
            feeds: By name; on a device some of them only if they are `DeviceFeeds`.
            stay: Outputs that are on a device stay there, and are returned as tensors there.
        """
        if self._resident and (self._keeps or stay or type(feeds) is DeviceFeeds):
            try:
                return self._compute_on_devices(feeds, stay)
            except Unreadable:
                pass  # Whatever was computed is out of reach: it is computed again, and this time stays in reach.
        values = all_on_host(feeds) if type(feeds) is DeviceFeeds else dict(feeds)
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
        # What is counted, or may lie on a device, takes the common way: beside a device's call that costs nothing.
        if step.executable is None or step.lock is not None or step.link is not None or not whole:
            return None
        run = step.executable.run

        def direct(feeds: Mapping[str, Value]) -> Outputs:
            try:
                return run(feeds)
            except Exception as error:  # noqa: BLE001 - engines raise what they like
                if isinstance(error, DeviceLost) and self._faults.policy != "error":
                    drop()
                return self._recover(step, feeds, error, None)

        return direct

    def trace(self, feeds: Mapping[str, Value]) -> Iterator[tuple[dict[str, Value], Outputs]]:
        """Compute one call segment by segment, through the host: yield what each read and what it gave, in order."""
        values = all_on_host(feeds)
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

    def _compute_on_devices(self, feeds: Mapping[str, Held], stay: bool) -> Outputs:
        """Compute one call, and leave on a device what is read there next.

        Raises:
            Unreadable: A value is needed on the host, and its device does not give it.
        """
        values: dict[str, Held] = dict(feeds)
        for step in self._steps:
            values.update(self._run_held(step, {name: values[name] for name in step.inputs}, stay))
            for name in step.spent:
                values.pop(name, None)
        found = {name: values[name] for name in self.signature.output_names}
        if not stay:
            return all_on_host(found)
        return {name: value.tensor if isinstance(value, OnDevice) else value for name, value in found.items()}

    def _run_held(self, step: Step, given: dict[str, Held], stay: bool) -> Mapping[str, Held]:
        """Run a segment on values that may be on its device, and on the host what is anywhere else."""
        executable, place = step.executable, step.place
        here = None if place is None or executable is None else place.device
        feeds = {
            name: value if isinstance(value, OnDevice) and value.device == here else on_host(value)
            for name, value in given.items()
        }
        keep = step.keep_asked if stay else step.keep
        if (
            here is None
            or executable is None
            or (not keep and not any(isinstance(v, OnDevice) for v in feeds.values()))
        ):
            return self._run_step(step, feeds)
        handed = {name: value.tensor if isinstance(value, OnDevice) else value for name, value in feeds.items()}
        run = partial(self._once, step, partial(executable.run_resident, handed, keep), feeds)
        try:
            outputs = run() if step.link is None else step.link.run(run)
        except Exception as error:  # noqa: BLE001 - engines raise what they like
            outputs = self._recover(step, feeds, error, run)
        return {
            name: self._held(step, executable, here, value) if name in keep and not _plain(value) else value
            for name, value in outputs.items()
        }

    def _held(self, step: Step, executable: Executable, device: str, tensor: DeviceTensor) -> OnDevice:
        def read() -> np.ndarray[Any, Any]:
            try:
                array = executable.to_host(tensor)
            except Exception as error:
                self._blame(step, error)
                self._faults.say(step.engine, f"{step.engine} lost what it had computed: {one_line(error)}")
                raise Unreadable from error
            if step.link is not None:
                step.link.count(to_host=array.nbytes)
            return array

        return OnDevice(tensor, device, read)

    def _run_step(self, step: Step, feeds: Mapping[str, Value]) -> Outputs:
        executable = step.executable
        if executable is None:
            if self.retired:
                raise ReplicaRetired
            return self._answer(step, feeds, DeviceLost("its device is lost, or could not take the segment"))
        if step.link is None:
            try:
                if step.lock is None:
                    return executable.run(feeds)
                with step.lock:
                    return executable.run(feeds)
            except Exception as error:  # noqa: BLE001 - engines raise what they like
                return self._recover(step, feeds, error, None)
        run = partial(self._once, step, partial(executable.run, feeds), feeds)
        try:
            return step.link.run(run)
        except Exception as error:  # noqa: BLE001 - engines raise what they like
            return self._recover(step, feeds, error, run)

    @staticmethod
    def _once(step: Step, run: Callable[[], Outputs], feeds: Mapping[str, Held]) -> Outputs:
        """Run a segment on its device, and count the bytes that crossed."""
        turn: AbstractContextManager[Any] = nullcontext() if step.lock is None else step.lock
        with turn:
            outputs = run()
        if step.link is not None:
            step.link.count(to_device=host_bytes(feeds.values()), to_host=host_bytes(outputs.values()))
        return outputs

    def _recover(
        self, step: Step, feeds: Mapping[str, Held], error: Exception, again: Callable[[], Outputs] | None
    ) -> Outputs:
        """Answer a call that an engine failed, by the policy; a lost device is not asked again.

        Args:
            again: Runs the segment once more on its device; None on the CPU. Done where only memory was wanting, after
                the runs that took it.
        """
        if isinstance(error, OutOfDeviceMemory) and step.link is not None and again is not None:
            next(self._failed)
            try:
                return step.link.run_again(again)
            except Exception as second:  # noqa: BLE001 - engines raise what they like
                error = second
        if isinstance(error, SessionClosed | InputError):
            raise error
        self._blame(step, error)
        if isinstance(error, DeviceLost) and any(isinstance(value, OnDevice) for value in feeds.values()):
            self._faults.say(step.engine, f"{step.engine} failed, and is done without: {one_line(error)}")
            raise Unreadable from error
        outputs = self._answer(step, all_on_host(feeds), error)
        self._faults.say(step.engine, f"{step.engine} failed and the CPU answered instead: {one_line(error)}")
        return outputs

    def _blame(self, step: Step, error: Exception) -> None:
        """Count a failure of an engine, and see to it that a lost device is not asked again.

        Raises:
            ExecutionError: The policy is that failures are errors.
            ReplicaRetired: The device is lost and another replica is to answer.
        """
        next(self._failed)
        moves = isinstance(error, DeviceLost) and self.retire is not None and self.retire(self, error)
        if self._faults.policy == "error":
            raise ExecutionError(f"{step.engine} failed: {one_line(error)}", backend=step.engine) from error
        if isinstance(error, DeviceLost):
            step.executable = None  # closed with the session, when nothing is in flight any more
            if moves:
                raise ReplicaRetired from error

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


def _plain(value: object) -> bool:
    return value is None or isinstance(value, np.ndarray | list)
