"""The feeder: order kept, nothing lost, memory bounded, and a clean end however it ends."""

from __future__ import annotations

import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import SessionClosed
from accelrt.runtime.pool import AHEAD, KEPT, Feeder


@contextmanager
def feeder(call: Callable[..., Any], workers: int, queue: int = 8) -> Iterator[Feeder[Any]]:
    made = Feeder(call, workers, queue)
    try:
        yield made
    finally:
        made.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(), st.integers(0, 3)), max_size=60),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(0, 2),
)
def test_map_is_the_builtin_map(items: list[tuple[int, int]], workers: int, queue: int, late: int) -> None:
    def call(number: int, delay: int) -> int:
        time.sleep(delay / 4000)
        return number * 3

    def slowly() -> Iterator[tuple[int, int]]:
        for item in items:
            time.sleep(late / 4000)
            yield item

    with feeder(call, workers, queue) as pool:
        assert list(pool.map(slowly())) == [call(*item) for item in items]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.booleans())
def test_an_exception_comes_in_its_turn(position: int, workers: int, in_the_iterable: bool) -> None:
    def call(number: int) -> int:
        if number == position and not in_the_iterable:
            raise KeyError("item")
        return number

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            if number == position and in_the_iterable:
                raise KeyError("iterable")
            yield number

    got = []
    with feeder(call, workers) as pool:
        with pytest.raises(KeyError, match="iterable" if in_the_iterable else "item"):
            for result in pool.map(numbers()):
                got.append(result)
        assert got == list(range(position))
        assert list(pool.map(range(position + 1, position + 4))) == list(range(position + 1, position + 4))


def test_map_reads_no_more_ahead_than_it_says() -> None:
    workers, read, gate = 3, itertools.count(), threading.Event()

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            next(read)
            yield number

    def call(number: int) -> int:
        if number == 0:
            gate.wait(10)
        return number

    with feeder(call, workers, queue=100) as pool:
        results = pool.map(numbers())
        opener = threading.Timer(0.3, gate.set)
        opener.start()
        assert next(results) == 0
        # While the first item was stuck, the other threads went on, up to the bound.
        assert read.__reduce__()[1][0] == KEPT * workers
        assert list(itertools.islice(results, 100)) == list(range(1, 101))
        results.close()
        opener.join()

    gate.clear()
    read = itertools.count()
    stuck: Callable[[int], Any] = lambda number: gate.wait(0.3)  # noqa: E731
    with feeder(stuck, workers, queue=100) as pool:
        results = pool.map(numbers())
        next(results)
        assert read.__reduce__()[1][0] <= (AHEAD + 2) * workers


def test_a_slow_thread_takes_less() -> None:
    slow, counts = threading.local(), {True: 0, False: 0}
    ticket = itertools.count()

    def call(_: int) -> None:
        if not hasattr(slow, "yes"):
            slow.yes = next(ticket) == 0
        time.sleep(0.02 if slow.yes else 0.001)
        counts[slow.yes] += 1

    with feeder(call, 2) as pool:
        start = time.perf_counter()
        assert len(list(pool.map(range(200)))) == 200
        elapsed = time.perf_counter() - start
    assert counts[True] < 40
    assert elapsed < 1.5  # half of the items on the slow thread would take two seconds


def test_closing_the_iterator_cancels_what_has_not_started() -> None:
    started = itertools.count()

    def call(number: int) -> int:
        next(started)
        time.sleep(0.01)
        return number

    with feeder(call, 2) as pool:
        results = pool.map(itertools.count())
        assert next(results) == 0
        results.close()
        time.sleep(0.05)
        seen = started.__reduce__()[1][0]
        assert seen <= 2 * AHEAD + 3
        time.sleep(0.05)
        assert started.__reduce__()[1][0] == seen
        assert pool.submit(7).result() == 7


def test_submit_waits_while_the_queue_is_full() -> None:
    gate = threading.Event()
    with feeder(lambda: gate.wait(10), workers=2, queue=3) as pool:
        futures = [pool.submit() for _ in range(5)]
        late: list[Future[Any]] = []
        waiting = threading.Thread(target=lambda: late.append(pool.submit()))
        waiting.start()
        time.sleep(0.05)
        assert not late
        gate.set()
        waiting.join(10)
        assert late[0].result(10)
        assert all(future.result(10) for future in futures)


def test_a_cancelled_call_makes_room() -> None:
    gate = threading.Event()
    with feeder(lambda: gate.wait(10), workers=1, queue=1) as pool:
        running = pool.submit()
        while not running.running():
            time.sleep(0.001)
        for _ in range(50):
            assert pool.submit().cancel()
        gate.set()


def test_a_callback_may_submit_to_a_full_queue() -> None:
    """On a thread of the pool nobody else may be left to make room, so that waiting would be for ever."""
    chained: list[Future[int]] = []
    done = threading.Event()

    with feeder(lambda number: number, workers=1, queue=0) as pool:

        def follow(future: Future[int]) -> None:
            if future.result() < 20:
                chained.append(pool.submit(future.result() + 1))
                chained[-1].add_done_callback(follow)
            else:
                done.set()

        pool.submit(0).add_done_callback(follow)
        assert done.wait(10)
    assert [future.result() for future in chained] == list(range(1, 21))


def test_closing_wakes_everybody() -> None:
    """Threads that wait for room, one that iterates, and futures that wait for a thread."""
    gate = threading.Event()
    pool: Feeder[bool] = Feeder(lambda *_: gate.wait(10), workers=1, queue=2)
    outcomes: list[type] = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            outcomes.append(type(error))

    futures = [pool.submit() for _ in range(3)]
    threads = [threading.Thread(target=attempt, args=(pool.submit,)) for _ in range(4)]
    threads.append(threading.Thread(target=attempt, args=(lambda: list(pool.map(range(9))),)))
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    closer = threading.Thread(target=pool.close)
    closer.start()
    time.sleep(0.05)
    gate.set()
    for thread in (*threads, closer):
        thread.join(10)
        assert not thread.is_alive()
    assert outcomes == [SessionClosed] * 5
    assert futures[0].result() is True
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result()
    with pytest.raises(SessionClosed):
        pool.submit()


def test_closing_while_map_waits_is_an_error_of_ours() -> None:
    gate = threading.Event()
    pool: Feeder[bool] = Feeder(lambda _: gate.wait(10), workers=1, queue=50)
    results = pool.map(itertools.count())
    closer = threading.Timer(0.05, pool.close)
    opener = threading.Timer(0.1, gate.set)
    closer.start()
    opener.start()
    with pytest.raises(SessionClosed):
        list(results)
    closer.join(10)
    opener.join(10)


def test_a_callback_may_close() -> None:
    pool = Feeder(lambda: 1, workers=2)
    closed = threading.Event()
    pool.submit().add_done_callback(lambda _: (pool.close(), closed.set()))
    assert closed.wait(10)
    with pytest.raises(SessionClosed):
        pool.submit()


def test_what_closes_at_once_stays_closed() -> None:
    """Many threads submit while one closes: every future ends, every refusal is ours."""
    for _ in range(30):
        pool = Feeder(lambda number: number, workers=3, queue=4)
        start = threading.Barrier(5)

        def work(pool: Feeder[int] = pool, start: threading.Barrier = start) -> list[Future[int]]:
            start.wait()
            futures = []
            with pytest.raises(SessionClosed):
                for number in itertools.count():
                    futures.append(pool.submit(number))
            return futures

        with ThreadPoolExecutor(4) as threads:
            running = [threads.submit(work) for _ in range(4)]
            start.wait()
            time.sleep(0.002)
            pool.close()
            for futures in [future.result(10) for future in running]:
                assert not wait(futures, timeout=10).not_done
                assert all(f.cancelled() or f.result() == number for number, f in enumerate(futures))


@pytest.mark.suite
def test_many_items_in_bounded_memory() -> None:
    # Tracing memory is slow; a million go through a session in `test_scheduler`.
    def sample(results: Iterator[bytes], count: int) -> int:
        for _ in itertools.islice(results, count):
            pass
        return tracemalloc.get_traced_memory()[0]

    with feeder(bytes, workers=2) as pool:
        results = pool.map(itertools.repeat(1000, 200_000))
        tracemalloc.start()
        try:
            early = sample(results, 1000)
            tracemalloc.reset_peak()
            late = sample(results, 198_900)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(list(results)) == 100
    assert abs(late - early) < 100_000
    assert peak - early < 200_000  # a hundred kilobytes is a hundred of the results
