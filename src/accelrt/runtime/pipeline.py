"""A model as a pipeline: each stage on a core of its own, so that one call computes in each at the same time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from accelrt.errors import SessionClosed
from accelrt.graph.types import Value
from accelrt.runtime.runner import Outputs, Runner

DEPTH = 2
"""Calls that may wait before a stage: one is taken at once when the stage is free, one makes up for uneven times."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        runner: Computes it; called from one thread only.
        reads: The values that it is given, of the call's inputs and the outputs of earlier stages.
        spent: Values that nobody needs after it.
    """

    runner: Runner
    reads: tuple[str, ...]
    spent: tuple[str, ...] = ()


class _Call:
    """A call on its way through the stages: the values that are still needed, and who waits."""

    __slots__ = ("future", "values")

    def __init__(self, values: dict[str, Value]) -> None:
        self.values = values
        self.future: Future[Outputs] = Future()


class Pipeline:
    """Runs stages in threads of their own, joined by bounded queues. It is a runner, and overlaps calls.

    Calls finish in the order in which they began. What a stage raises fails that call alone, as it is; later stages
    pass it by. A caller waits in ``submit`` while the first queue is full, so an endless stream takes bounded memory.

    Args:
        stages: In order; their runners are closed with the pipeline.
        outputs: Names of the values that a call returns.
        depth: Calls that may wait before each stage, 1 or more.
    """

    def __init__(self, stages: Sequence[Stage], outputs: Sequence[str], *, depth: int = DEPTH) -> None:
        if not stages or depth < 1:
            raise ValueError(f"a pipeline has at least one stage, and queues of 1 or more, not {len(stages)}, {depth}")
        self._stages, self._outputs = tuple(stages), tuple(outputs)
        self.capacity = len(stages) * (depth + 1)
        """Calls that are under way at most: one in each stage, and those that wait before it."""
        self._queues: list[queue.Queue[_Call | None]] = [queue.Queue(depth) for _ in stages]
        self._entry = threading.Lock()  # keeps calls before the closing mark
        self._closed = False
        self._cancelled = False
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"accelrt-stage-{number}", daemon=True)
            for number in range(len(stages))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, feeds: Mapping[str, Value]) -> Future[Outputs]:
        """Begin a call; waits while the first queue is full. The future can be cancelled until a stage takes it.

        Raises:
            SessionClosed: The pipeline was closed.
        """
        call = _Call(dict(feeds))
        with self._entry:
            if self._closed:
                raise SessionClosed("The pipeline was closed.", hint="Load the artifact again.")
            self._queues[0].put(call)
        return call.future

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one call, and wait for it."""
        return self.submit(feeds).result()

    def close(self, *, cancel: bool = False) -> None:
        """Refuse new calls, wait for those under way, then close the runners. Closing twice is no error.

        Args:
            cancel: Answer with `SessionClosed` those that no stage is computing just now.
        """
        self._cancelled = self._cancelled or cancel
        with self._entry:
            if self._closed:
                return
            self._closed = True
            self._queues[0].put(None)
        for thread in self._threads:
            thread.join()
        for stage in self._stages:
            stage.runner.close()

    def _work(self, number: int) -> None:
        stage, inbox = self._stages[number], self._queues[number]
        outbox = self._queues[number + 1] if number + 1 < len(self._stages) else None
        while (call := inbox.get()) is not None:
            if number == 0 and not call.future.set_running_or_notify_cancel():
                continue
            if self._advance(stage, call):
                if outbox is not None:
                    outbox.put(call)
                else:
                    self._finish(call)
            # Else the last call, and what it holds, would stay until the next comes.
            del call
        if outbox is not None:
            outbox.put(None)

    def _advance(self, stage: Stage, call: _Call) -> bool:
        """Compute one stage of a call; False if it ends here."""
        if self._cancelled:
            call.future.set_exception(SessionClosed("The pipeline was closed before the call was computed."))
            return False
        try:
            call.values.update(stage.runner.run({name: call.values[name] for name in stage.reads}))
            for name in stage.spent:
                call.values.pop(name, None)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the call
            call.future.set_exception(error)
            return False
        return True

    def _finish(self, call: _Call) -> None:
        try:
            outputs = {name: call.values[name] for name in self._outputs}
        except KeyError as error:
            call.future.set_exception(error)
            return
        call.future.set_result(outputs)


def chain(
    runners: Sequence[tuple[Runner, Sequence[str], Sequence[str]]], outputs: Sequence[str], *, depth: int = DEPTH
) -> Pipeline:
    """Make a pipeline of runners given with the names that each reads and gives, working out what is spent when."""
    needed = set(outputs)
    stages: list[Stage] = []
    for runner, reads, gives in reversed(runners):
        touched = {*reads, *gives}
        stages.append(Stage(runner, tuple(reads), tuple(sorted(touched - needed))))
        needed |= touched
    return Pipeline(stages[::-1], outputs, depth=depth)
