"""Feed every core: a pool of threads with a bounded queue, futures, and a map that reads little ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from accelrt.errors import SessionClosed

T = TypeVar("T")

QUEUE = 1024
"""Calls that wait for a thread before `Feeder.submit` waits too: a producer that is faster than the devices is slowed
down to their pace instead of filling the memory."""

AHEAD = 2
"""Items in flight that `Feeder.map` has for each thread: one computes, one waits."""

KEPT = 16
"""Items for each thread that `Feeder.map` holds in all, answers that wait for an earlier one included: a device may be
this many times slower than the others before they wait for it."""


class Feeder(Generic[T]):
    """Calls a function on threads of its own, made on first use.

    Args:
        call: What is called; thread-safe.
        workers: How many threads, which is how many calls are in flight at a time.
        queue: How many calls wait for a thread before `submit` waits.
    """

    def __init__(self, call: Callable[..., T], workers: int, queue: int = QUEUE) -> None:
        self.workers = workers
        self._call = call
        self._closed = False
        self._draining: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._room = threading.Semaphore(workers + queue)
        self._inside = threading.local()

    def submit(self, *arguments: Any) -> Future[T]:
        """Queue one call and return its future; waits while the queue is full.

        Called from one of the pool's own threads (a callback of a future) it never waits, since nobody might be left
        to make room.

        Raises:
            SessionClosed: The feeder was closed, before or while this waited.
        """
        counted = self._room.acquire(blocking=False)
        if not counted and not getattr(self._inside, "yes", False):
            counted = self._room.acquire()
        try:
            future = (self._pool or self._start()).submit(self._call, *arguments)
        except BaseException as error:
            if counted:
                self._room.release()
            if isinstance(error, RuntimeError) and self._closed:
                raise _closed() from None
            raise
        future.add_done_callback(self._leave if counted else self._notify)
        return future

    def map(self, items: Iterable[Any]) -> Iterator[T]:
        """Yield the result of each item in order; a tuple is several arguments.

        At most `AHEAD` items a thread are read that are not computed yet, and at most `KEPT` a thread are held. When
        the iterator is closed, or an item fails, what has not started is cancelled.

        Raises:
            Exception: What a call raises, in its turn; what the iterable raises, after the results before it.
            SessionClosed: The feeder was closed meanwhile.
        """
        source = iter(items)
        flight: deque[Future[T]] = deque()
        finished = threading.Semaphore(0)
        computing, fresh = 0, False
        ending: Exception | None = None
        try:
            while flight or ending is None:
                while finished.acquire(blocking=False):
                    computing -= 1
                # After each result one more item is read before the next is given, so that the threads stay busy.
                if flight and flight[0].done() and (fresh or ending is not None):
                    fresh = False
                    yield _result(flight.popleft())
                elif ending is None and computing < AHEAD * self.workers and len(flight) < KEPT * self.workers:
                    try:
                        item = next(source)
                    except Exception as error:  # noqa: BLE001 - the end, or raised in its turn below
                        ending = error
                        continue
                    future = self.submit(*item) if isinstance(item, tuple) else self.submit(item)
                    del item  # or it would be kept while this waits for the caller
                    future.add_done_callback(lambda _: finished.release())
                    flight.append(future)
                    computing, fresh = computing + 1, True
                elif flight[0].done():
                    yield _result(flight.popleft())
                else:
                    # The first is not done, so at least its end is still to come.
                    finished.acquire()
                    computing -= 1
            if ending is not None and not isinstance(ending, StopIteration):
                raise ending
        finally:
            for future in flight:
                future.cancel()

    def close(self) -> None:
        """Refuse new calls, cancel those that wait, and wait for those under way."""
        with self._lock:
            self._closed = True
            pool = self._pool
        if pool is None:
            return
        self._draining = threading.get_ident()
        pool.shutdown(wait=False, cancel_futures=True)
        self._draining = None
        # A thread cannot wait for itself: a callback may close the session whose call it follows.
        if not getattr(self._inside, "yes", False):
            pool.shutdown()

    def _start(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise _closed()
            if self._pool is None:
                # The threads must not refer to this: a session that is dropped without being closed would live as long
                # as they do, and they as long as the session.
                self._pool = ThreadPoolExecutor(self.workers, "accelrt", _enter, (self._inside,))
            return self._pool

    def _leave(self, future: Future[T]) -> None:
        self._room.release()
        self._notify(future)

    def _notify(self, future: Future[T]) -> None:
        """Tell those in `concurrent.futures.wait` of a call that closing cancelled; the executor forgets to.

        Only for what `close` has just taken out of the queue: elsewhere a thread of the pool does it.
        """
        if self._draining == threading.get_ident() and future.cancelled():
            future.set_running_or_notify_cancel()


def _enter(inside: threading.local) -> None:
    inside.yes = True


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except CancelledError:
        # Only closing cancels what `map` has in flight.
        raise _closed() from None


def _closed() -> SessionClosed:
    return SessionClosed("The session was closed.", hint="Load the artifact again.")
