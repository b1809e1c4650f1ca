"""What a session does about failures: the policy, the counts, and what was said already."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from accelrt.backend import Executable
from accelrt.errors import AccelrtError, SessionClosed
from accelrt.policy import Fallback, announce


class Faults:
    """The failures of one session: counted, and each kind said once. Thread-safe."""

    def __init__(self, policy: Fallback) -> None:
        self.policy: Fallback = policy
        # Counters that many threads advance without a lock: `next` on a count is atomic.
        self._fell_back, self._moved = itertools.count(), itertools.count()
        self._said: set[str] = set()
        self._lock = threading.Lock()

    @property
    def fallbacks(self) -> int:
        """Segments that the CPU answered instead, counted each time."""
        return peek(self._fell_back)

    @property
    def moved(self) -> int:
        """Calls that a lost replica left to another one."""
        return peek(self._moved)

    def fell_back(self) -> None:
        """Count a segment that the CPU answered instead."""
        next(self._fell_back)

    def move(self) -> None:
        """Count a call that went to another replica."""
        next(self._moved)

    def say(self, subject: str, message: str) -> None:
        """Announce something by the policy, once for each subject."""
        with self._lock:
            if subject in self._said:
                return
            self._said.add(subject)
        announce(self.policy, message)


class StandIn:
    """What runs a segment on the CPU in the place of its program: made when first needed, shared by all replicas.

    Args:
        make: Makes it, given the error that made it needed; raises if that cannot be.
    """

    def __init__(self, make: Callable[[BaseException], Executable]) -> None:
        self._make: Callable[[BaseException], Executable] | None = make
        self._lock = threading.Lock()
        self._executable: Executable | None = None

    def get(self, error: BaseException) -> Executable:
        """Return it, making it if need be.

        Raises:
            Exception: Whatever keeps it from being made.
        """
        with self._lock:
            if self._executable is None:
                if self._make is None:
                    raise SessionClosed("The session was closed.", hint="Load the artifact again.")
                self._executable = self._make(error)
            return self._executable

    def close(self) -> None:
        """Free it, if it was made, and what it would be made of."""
        with self._lock:
            executable, self._executable, self._make = self._executable, None, None
        if executable is not None:
            executable.close()


def peek(counter: itertools.count[int]) -> int:
    """Read a counter without advancing it."""
    return int(counter.__reduce__()[1][0])


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of at most 400 characters."""
    text = str(error) if isinstance(error, AccelrtError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:397] + "..."
