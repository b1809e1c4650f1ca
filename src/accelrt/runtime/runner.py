"""What the parts of the scheduler wrap, and are themselves: something that runs calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol, TypeAlias, runtime_checkable

from accelrt.graph.types import Value

Outputs: TypeAlias = dict[str, Value]


class Runner(Protocol):
    """Runs calls; thread-safe."""

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute the outputs by name of inputs that were checked."""
        ...

    def close(self) -> None:
        """Finish what is under way, then free what it holds. Called once; no ``run`` follows."""
        ...


@runtime_checkable
class OverlappingRunner(Runner, Protocol):
    """A runner that has several calls under way by itself, with no threads of the caller's."""

    @property
    def capacity(self) -> int:
        """Calls under way at once from which on more of them do not keep it busier."""
        ...

    def submit(self, feeds: Mapping[str, Value]) -> Future[Outputs]:
        """Begin a call and return its future; may wait while as many are under way as it takes."""
        ...


def submit_ahead(
    runner: OverlappingRunner, bind: Callable[[], Mapping[str, Value]], answered: Callable[[int | None], None]
) -> Future[Outputs]:
    """Check the inputs of a call and begin it; what is wrong with it is in the future.

    Args:
        runner: Where the call runs.
        bind: Returns the checked inputs, or raises.
        answered: Told once how many nanoseconds the call took, None if it failed or was cancelled.
    """
    start = time.perf_counter_ns()
    try:
        future = runner.submit(bind())
    except Exception as error:  # noqa: BLE001 - handed to whoever waits
        future = Future()
        future.set_exception(error)

    def finished(done: Future[Outputs]) -> None:
        failed = done.cancelled() or done.exception() is not None
        answered(None if failed else time.perf_counter_ns() - start)

    future.add_done_callback(finished)
    return future
