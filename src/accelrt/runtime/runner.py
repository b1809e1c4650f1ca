"""What the parts of the scheduler wrap, and are themselves: something that runs calls."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol, TypeAlias, runtime_checkable

from accelrt.graph.types import Value

Outputs: TypeAlias = dict[str, Value]


class Runner(Protocol):
    """Answers calls: a replica, several behind one face, or what is put around them (buckets, a pipeline, a batcher).

    Thread-safe.
    """

    def run(self, feeds: Mapping[str, Value]) -> Outputs:
        """Compute the outputs by name of inputs that were checked."""
        ...

    def close(self) -> None:
        """Finish what is under way, then let go of what it holds; no ``run`` follows."""
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
