"""A model as a pipeline: each stage on a core of its own, so that one call computes in each at the same time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

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


class _Inbox:
    """The calls that wait before a stage, so many at most; one thread takes them."""

    def __init__(self, depth: int) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._room = threading.Semaphore(depth)

    def put(self, call: _Call) -> None:
        """Wait for room, and add a call."""
        self._room.acquire()
        self._calls.put(call)

    def end(self) -> None:
        """Add the mark after the last call. Never waits, and may be called by the garbage collector."""
        self._calls.put(None)

    def get(self) -> _Call | None:
        """Wait for a call, or for the end, which is None."""
        call = self._calls.get()
        if call is not None:
            self._room.release()
        return call


class Pipeline:
    """Runs stages in threads of their own, joined by bounded queues. It is a runner, and overlaps calls.

    Calls finish in the order in which they began. What a stage raises fails that call alone, as it is; later stages
    pass it by. A caller waits in ``submit`` while the first queue is full, so an endless stream takes bounded memory.
    The threads end when it is closed, or nobody refers to it any more.

    Args:
        stages: In order; their runners are closed with the pipeline.
        outputs: Names of the values that a call returns.
        depth: Calls that may wait before each stage, 1 or more.
    """

    def __init__(self, stages: Sequence[Stage], outputs: Sequence[str], *, depth: int = DEPTH) -> None:
        if not stages or depth < 1:
            raise ValueError(f"a pipeline has at least one stage, and queues of 1 or more, not {len(stages)}, {depth}")
        self._stages = tuple(stages)
        self.capacity = len(stages) * (depth + 1)
        """Calls that are under way at most: one in each stage, and those that wait before it."""
        inboxes = [_Inbox(depth) for _ in stages]
        self._first = inboxes[0]
        self._entry = threading.Lock()  # keeps calls before the closing mark
        self._closed = False
        self._cancelled = threading.Event()
        # The threads do not refer to the pipeline, so that it can be collected while they wait.
        self._threads = [
            threading.Thread(
                target=_work,
                args=(stage, inbox, outbox, tuple(outputs), self._cancelled),
                name=f"accelrt-stage-{number}",
                daemon=True,
            )
            for number, (stage, inbox, outbox) in enumerate(zip(stages, inboxes, [*inboxes[1:], None], strict=True))
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, self._first.end)

    def submit(self, feeds: Mapping[str, Value]) -> Future[Outputs]:
        """Begin a call; waits while the first queue is full. The future can be cancelled until a stage takes it.

        Raises:
            SessionClosed: The pipeline was closed.
        """
        call = _Call(dict(feeds))
        with self._entry:
            if self._closed:
                raise SessionClosed("The pipeline was closed.", hint="Load the artifact again.")
            self._first.put(call)
        return call.future

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute one call, and wait for it."""
        return self.submit(feeds).result()

    def close(self, *, cancel: bool = False) -> None:
        """Refuse new calls, wait for those under way, then close the runners. Closing twice is no error.

        Args:
            cancel: Answer with `SessionClosed` those that no stage is computing just now.
        """
        if cancel:
            self._cancelled.set()
        with self._entry:
            if self._closed:
                return
            self._closed = True
            self._first.end()
        for thread in self._threads:
            thread.join()
        for stage in self._stages:
            stage.runner.close()


def _work(
    stage: Stage, inbox: _Inbox, outbox: _Inbox | None, outputs: tuple[str, ...], cancelled: threading.Event
) -> None:
    """Compute one stage of each call, and hand it on: the thread of the stage."""
    while (call := inbox.get()) is not None:
        # A call that another stage has had is running already, and stays so.
        if (call.future.running() or call.future.set_running_or_notify_cancel()) and _advance(stage, call, cancelled):
            if outbox is not None:
                outbox.put(call)
            else:
                _finish(call, outputs)
        # Else the last call, and what it holds, would stay until the next comes.
        del call
    if outbox is not None:
        outbox.end()


def _advance(stage: Stage, call: _Call, cancelled: threading.Event) -> bool:
    """Compute one stage of a call; False if it ends here."""
    if cancelled.is_set():
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


def _finish(call: _Call, outputs: tuple[str, ...]) -> None:
    try:
        found = {name: call.values[name] for name in outputs}
    except KeyError as error:
        call.future.set_exception(error)
        return
    call.future.set_result(found)


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
