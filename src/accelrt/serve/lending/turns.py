"""Whose turn it is: calls of several clients, each with a limit of its own, in turn where not all can be computed.

For one event loop: nothing here is thread-safe, and nothing needs to be.
"""

from __future__ import annotations

import asyncio
from collections import deque

from accelrt.errors import Overloaded, RequestTimeout


class Party:
    """A client in the queue: how many calls of it are computed at a time, and which of it wait."""

    __slots__ = ("limit", "most_waiting", "running", "waiting")

    def __init__(self, limit: int, most_waiting: int) -> None:
        self.limit, self.most_waiting = limit, most_waiting
        self.running = 0
        self.waiting: deque[asyncio.Future[None]] = deque()


class Turns:
    """A queue that is fair among clients: whoever waits gets every n-th turn, however many calls the others queue.

    Nobody waits who could run, so whoever may run at once finds that out from two numbers.

    Args:
        most: Calls computed at a time, of all clients.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.running = 0
        self._ring: deque[Party] = deque()

    def try_enter(self, party: Party) -> bool:
        """Take a turn if there is one now; whoever got one gives it back by `leave`."""
        if self.running >= self._most or party.running >= party.limit:
            return False
        self.running += 1
        party.running += 1
        return True

    async def enter(self, party: Party, timeout_s: float | None = None) -> None:
        """Wait for a turn.

        Args:
            party: Whose.
            timeout_s: How long; None for ever.

        Raises:
            Overloaded: As many calls of this client wait as may.
            RequestTimeout: There was none in time.
        """
        if self.try_enter(party):
            return
        if len(party.waiting) >= party.most_waiting:
            raise _overloaded(party)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not party.waiting:
            self._ring.append(party)
        party.waiting.append(turn)
        try:
            await asyncio.wait_for(asyncio.shield(turn), timeout_s)
        except BaseException as error:
            self._forget(party, turn)
            if isinstance(error, TimeoutError | asyncio.TimeoutError):
                raise RequestTimeout(f"The call's turn did not come within {timeout_s:.3g} s.") from None
            raise

    def leave(self, party: Party) -> None:
        """Give a turn back; whoever is next gets it."""
        self.running -= 1
        party.running -= 1
        self._grant()

    def _grant(self) -> None:
        """Hand out turns, one to each client before any gets a second."""
        passed = 0
        while self._ring and self.running < self._most and passed < len(self._ring):
            party = self._ring.popleft()
            if party.running >= party.limit:
                self._ring.append(party)
                passed += 1
                continue
            passed = 0
            turn = party.waiting.popleft()
            self.running += 1
            party.running += 1
            turn.set_result(None)
            if party.waiting:
                self._ring.append(party)

    def _forget(self, party: Party, turn: asyncio.Future[None]) -> None:
        """Take back a call that nobody waits for any more; its turn may have come in the same moment."""
        if turn.done() and not turn.cancelled():
            self.leave(party)
            return
        turn.cancel()
        party.waiting.remove(turn)
        if not party.waiting:
            self._ring.remove(party)


def _overloaded(party: Party) -> Overloaded:
    # Not where it is raised: a frame that holds the error that holds the frame would keep the model in memory.
    error = Overloaded(
        f"{len(party.waiting)} calls of this client wait, and {party.running} are computed, as many as may.",
        hint="Ask again later, or borrow a larger slice.",
    )
    error.retry_after_s = 0.1
    return error
