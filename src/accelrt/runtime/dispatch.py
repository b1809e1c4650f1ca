"""Several replicas behind one face: each call goes to an idle one, and leaves one whose device is lost."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue

from accelrt.errors import DeviceLost
from accelrt.graph.types import Value
from accelrt.runtime.faults import Faults, one_line
from accelrt.runtime.replica import Replica, ReplicaRetired
from accelrt.runtime.runner import Outputs


class Dispatcher:
    """Hands each call to a replica that has room for it; with none, the caller waits for the next.

    The replicas share one queue of turns instead of having one of calls each: a slow device comes back for its next
    call later, so it takes fewer.

    Args:
        replicas: At least one.
        faults: Those of the session.
        turns: Calls that each replica takes at a time.
    """

    def __init__(self, replicas: Sequence[Replica], faults: Faults, turns: Sequence[int]) -> None:
        self._faults = faults
        self._all, self._alive = tuple(replicas), list(replicas)
        self._lock = threading.Lock()
        self._idle: SimpleQueue[Replica] = SimpleQueue()
        for turn in range(max(turns)):
            for replica, most in zip(replicas, turns, strict=True):
                if turn < most:
                    self._idle.put(replica)
        for replica in replicas:
            replica.retire = self._retire

    def run(self, feeds: Mapping[str, Value], *, stay: bool = False) -> Outputs:
        """Compute one call on an idle replica, on another one if its device is lost meanwhile.

        ``stay`` leaves outputs on the replica's device, as `Replica.compute` has it.

        Raises:
            ExecutionError: A segment failed on every engine that may run it.
        """
        while True:
            replica = self._idle.get()
            # A retired replica's turns leave the queue as they come. The last replica is never retired, so that there
            # is always somebody to wait for.
            if replica.retired:
                continue
            try:
                return replica.run(feeds, stay=stay)
            except ReplicaRetired:
                self._faults.move()
            finally:
                self._idle.put(replica)

    def close(self) -> None:
        """Close all replicas, those that were retired too; no call is under way any more."""
        for replica in self._all:
            replica.close()

    def _retire(self, replica: Replica, error: DeviceLost) -> bool:
        """Take a replica out of service if another one is left; tell whether it is out."""
        with self._lock:
            if replica.retired:
                return True
            if len(self._alive) == 1:
                return False
            self._alive.remove(replica)
            replica.retired = True
            left = len(self._alive)
        self._faults.say(
            f"replica on {','.join(replica.devices)} {id(replica)}",
            f"{', '.join(replica.devices) or 'A replica'} is lost; its calls go to the other "
            f"{left} of {len(self._all)} replicas: {one_line(error)}",
        )
        return True
