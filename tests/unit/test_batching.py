"""Batching of requests: none lost, doubled or swapped; one that is late or wrong harms no other."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import DeviceLost, InputError, OptionError, RequestTimeout, SessionClosed
from accelrt.runtime.batching import BatcherStats, RequestBatcher
from accelrt.runtime.buckets import BucketRunner, OverlappingBucketRunner
from accelrt.runtime.pipeline import chain
from accelrt.runtime.runner import Runner


class Function:
    """A runner of one function of x; records how many rows each run had."""

    def __init__(self, function: Callable[[Any], Any] = lambda x: x * 2 + 1) -> None:
        self.function, self.runs, self.closed = function, list[int](), 0

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert not self.closed
        self.runs.append(len(feeds["x"]))
        return {"y": self.function(feeds["x"])}

    def close(self) -> None:
        self.closed += 1


class Gate(Function):
    """Its first run waits until it is opened."""

    def __init__(self, function: Callable[[Any], Any] = lambda x: x * 2 + 1) -> None:
        super().__init__(function)
        self.opened, self.entered = threading.Event(), threading.Event()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.entered.set()
        assert self.opened.wait(20)
        return super().run(feeds)


def batcher(runner: Runner, **settings: Any) -> RequestBatcher:
    return RequestBatcher(runner, **{"max_batch_size": 8, "max_queue_delay_us": 2000, **settings})


def rows(count: int, start: float = 0.0) -> dict[str, Any]:
    return {"x": np.arange(start, start + count, dtype=np.float64).reshape(count, 1)}


def piped(stages: int) -> Runner:
    """y = 2 x + 1 through a pipeline of so many stages."""
    one = [(Function(lambda x: x * 2), ["x"], ["y"])]

    class Pass:
        def __init__(self, source: str, target: str, last: bool) -> None:
            self.source, self.target, self.last = source, target, last

        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return {self.target: feeds[self.source] + 1 if self.last else feeds[self.source] + 0}

        def close(self) -> None:
            pass

    names = ["y", *(f"s{number}" for number in range(stages))]
    steps = [(Pass(a, b, b == names[-1]), [a], [b]) for a, b in itertools.pairwise(names)]

    class Renamed:
        """The pipeline, its output named as `Function` names it."""

        def __init__(self) -> None:
            self.inner = chain([*one, *steps], [names[-1]])
            self.capacity = self.inner.capacity

        def submit(self, feeds: Mapping[str, Any]) -> Future[dict[str, Any]]:
            out: Future[dict[str, Any]] = Future()

            def done(future: Future[dict[str, Any]]) -> None:
                error = future.exception()
                if error is not None:
                    out.set_exception(error)
                else:
                    out.set_result({"y": future.result()[names[-1]]})

            self.inner.submit(feeds).add_done_callback(done)
            return out

        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return self.submit(feeds).result()

        def close(self) -> None:
            self.inner.close()

    return Renamed()


def test_requests_share_a_run_and_get_their_rows_exactly() -> None:
    seen: list[Any] = []
    runner = Gate(lambda x: seen.append(np.sin(x)) or seen[-1])  # type: ignore[func-returns-value]
    with_delay = batcher(runner, max_queue_delay_us=1)
    first = with_delay.submit(rows(1))
    runner.entered.wait(5)
    futures = [with_delay.submit(rows(count, 10.0 * count)) for count in (3, 1, 0, 4)]
    runner.opened.set()
    answers = [future.result(5)["y"] for future in futures]
    assert first.result(5)["y"].shape == (1, 1)
    assert runner.runs == [1, 8]
    assert np.array_equal(np.concatenate(answers), seen[1])  # bit for bit
    for answer, count in zip(answers, (3, 1, 0, 4), strict=True):
        assert answer.shape == (count, 1)
        assert answer.base is None  # nobody holds another's rows
    assert with_delay.stats() == BatcherStats(5, 2, 9, 0, 0)
    with_delay.close()
    with_delay.close()
    assert runner.closed == 1


def test_a_run_begins_when_it_is_full_or_the_delay_is_over() -> None:
    runner = Function()
    patient = batcher(runner, max_queue_delay_us=200_000)
    start = time.perf_counter()
    futures = [patient.submit(rows(2)) for _ in range(4)]
    for future in futures:
        future.result(5)
    assert time.perf_counter() - start < 0.15  # full: no waiting
    start = time.perf_counter()
    patient.submit(rows(1)).result(5)
    assert 0.19 < time.perf_counter() - start < 2
    assert runner.runs == [8, 1]
    patient.close()


def test_what_does_not_fit_waits_for_the_next_run_and_keeps_its_place() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    futures = [with_gate.submit(rows(count)) for count in (5, 4, 1, 20, 8)]
    runner.opened.set()
    assert [len(future.result(5)["y"]) for future in futures] == [5, 4, 1, 20, 8]
    assert runner.runs == [1, 5, 5, 20, 8]
    with_gate.close()


def test_different_shapes_and_types_do_not_meet() -> None:
    runner = Gate(lambda x: x)
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    given_ = [np.ones((1, 2)), np.ones((2, 3)), np.ones((3, 2)), np.ones((1, 2), np.float32)]
    futures = [with_gate.submit({"x": x}) for x in given_]
    runner.opened.set()
    for x, future in zip(given_, futures, strict=True):
        answer = future.result(5)["y"]
        assert answer.dtype == x.dtype and np.array_equal(answer, x)
    assert runner.runs == [1, 4, 2, 1]
    with_gate.close()


def test_one_bad_request_fails_alone() -> None:
    def picky(x: Any) -> Any:
        if (x == 13).any():
            raise ValueError("thirteen")
        return x

    runner = Gate(picky)
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    futures = [with_gate.submit(rows(1, value)) for value in (11, 12, 13, 14)]
    runner.opened.set()
    for value, future in zip((11, 12, 13, 14), futures, strict=True):
        if value == 13:
            with pytest.raises(ValueError, match="thirteen"):
                future.result(5)
        else:
            assert future.result(5)["y"].item() == value
    assert with_gate.stats().retried == 4
    with_gate.close()


def test_a_lost_device_is_told_to_all_and_asked_once() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    futures = [with_gate.submit(rows(1)) for _ in range(3)]

    def lost(x: Any) -> Any:
        raise DeviceLost("gone")

    runner.function = lost
    runner.opened.set()
    for future in futures:
        with pytest.raises(DeviceLost, match="gone"):
            future.result(5)
    assert runner.runs == [1, 3]
    with_gate.close()


def test_a_model_whose_rows_are_not_independent_is_run_alone() -> None:
    """Outputs without a row for each row cannot be divided; each request then has a run of its own."""
    runner = Gate(lambda x: x.sum(0, keepdims=True))
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    futures = [with_gate.submit(rows(2, 1)), with_gate.submit(rows(2, 5))]
    runner.opened.set()
    assert [future.result(5)["y"].item() for future in futures] == [3, 11]
    with_gate.close()


def test_a_request_that_is_late_before_its_turn_is_not_computed() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1)
    first = with_gate.submit(rows(1))
    runner.entered.wait(5)
    start = time.perf_counter()
    with pytest.raises(RequestTimeout, match="not computed") as caught:
        with_gate.submit(rows(3, 100), timeout=0.05).result(5)
    assert 0.04 < time.perf_counter() - start < 2  # answered at its time, while the runner was busy
    assert isinstance(caught.value, TimeoutError)
    runner.opened.set()
    assert first.result(5)["y"].shape == (1, 1)
    assert with_gate.run(rows(2))["y"].shape == (2, 1)
    assert runner.runs == [1, 2]
    assert with_gate.stats().timeouts == 1
    with_gate.close()


def test_a_request_that_is_late_while_it_is_computed_is_answered() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1, timeout=0.05)
    future = with_gate.submit(rows(1))
    with pytest.raises(RequestTimeout, match="being computed"):
        future.result(5)
    runner.opened.set()
    with_gate.close()  # what the runner gives in the end is dropped
    assert isinstance(future.exception(0), RequestTimeout)


def test_timeouts_of_each_request_are_its_own() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    late = [0.30, 0.05, 0.15]
    ended: dict[float, float] = {}
    start = time.perf_counter()
    futures = [with_gate.submit(rows(1), timeout=seconds) for seconds in late]
    for seconds, future in zip(late, futures, strict=True):
        future.add_done_callback(lambda _, s=seconds: ended.setdefault(s, time.perf_counter() - start))
    for future in futures:
        with pytest.raises(RequestTimeout):
            future.result(5)
    assert sorted(ended) == [s for s, _ in sorted(ended.items(), key=lambda item: item[1])]
    runner.opened.set()
    with_gate.close()


def test_a_cancelled_request_is_not_computed() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    dropped, kept = with_gate.submit(rows(2)), with_gate.submit(rows(3))
    assert dropped.cancel()
    runner.opened.set()
    assert kept.result(5)["y"].shape == (3, 1)
    with pytest.raises(CancelledError):
        dropped.result(5)
    with_gate.close()
    assert runner.runs == [1, 3]


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_answers_all(cancel: bool) -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=10**7)
    futures = [with_gate.submit(rows(count)) for count in (8, 3, 4)]
    runner.entered.wait(5)
    closing = threading.Thread(target=with_gate.close, kwargs={"cancel": cancel})
    closing.start()
    time.sleep(0.02)
    with pytest.raises(SessionClosed):
        with_gate.submit(rows(1))
    runner.opened.set()
    closing.join(5)
    assert futures[0].result(0)["y"].shape == (8, 1)
    for future, count in zip(futures[1:], (3, 4), strict=True):
        if cancel:
            assert isinstance(future.exception(0), SessionClosed)
        else:
            assert future.result(0)["y"].shape == (count, 1)
    assert runner.closed == 1


def test_callers_wait_while_too_many_are_queued() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1, max_batch_size=2, max_queued=3)
    begun = [with_gate.submit(rows(1))]
    runner.entered.wait(5)
    begun += [with_gate.submit(rows(1)) for _ in range(3)]
    with pytest.raises(RequestTimeout, match="too many"):
        with_gate.submit(rows(1), timeout=0.02)
    waiting = threading.Thread(target=lambda: begun.append(with_gate.submit(rows(1, 9))), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert len(begun) == 4
    runner.opened.set()
    waiting.join(5)
    assert begun[4].result(5)["y"].item() == 19
    with_gate.close()


def test_a_waiting_caller_learns_that_the_batcher_was_closed() -> None:
    runner = Gate()
    with_gate = batcher(runner, max_queue_delay_us=1, max_queued=1)
    with_gate.submit(rows(1))
    runner.entered.wait(5)
    with_gate.submit(rows(1))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            with_gate.submit(rows(1))
        except SessionClosed as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.05)
    closing = threading.Thread(target=with_gate.close)
    closing.start()
    asking.join(5)
    assert len(errors) == 1
    runner.opened.set()
    closing.join(5)
    assert not closing.is_alive()


@pytest.mark.parametrize(
    "feeds", [{"x": [1.0]}, {"x": np.float32(1)}, {"x": np.ones(2), "z": np.ones(3)}], ids=["list", "scalar", "uneven"]
)
def test_what_has_no_rows_is_refused_at_once(feeds: dict[str, Any]) -> None:
    plain = batcher(Function())
    with pytest.raises(InputError):
        plain.submit(feeds)
    plain.close()


@pytest.mark.parametrize(
    "wrong", [{"max_batch_size": 0}, {"max_queue_delay_us": -1}, {"timeout": 0}, {"max_queued": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="must be 1 or more"):
        batcher(Function(), **wrong)


KINDS: dict[str, Callable[[list[int]], Runner]] = {
    "plain": lambda sizes: Function(),
    "buckets": lambda sizes: BucketRunner({size: Function() for size in sizes}),
    "pipeline": lambda sizes: piped(2),
    "buckets of pipelines": lambda sizes: OverlappingBucketRunner({size: piped(1) for size in sizes}),  # type: ignore[misc]
}


@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    st.integers(1, 12),
    st.sampled_from([0, 300, 3000]),
    st.lists(st.integers(0, 14), min_size=1, max_size=40),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_any_requests_through_any_parts_are_as_from_one_thread(
    kind: str, sizes: list[int], largest: int, delay: float, counts: list[int], seed: int
) -> None:
    """Any sizes of requests, buckets and stages, from several threads, give the single-threaded answer, in order."""
    rng = np.random.default_rng(seed)
    given_ = [rng.standard_normal((count, 3)) for count in counts]
    runner = batcher(KINDS[kind](sizes), max_batch_size=largest, max_queue_delay_us=delay)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda x: runner.run({"x": x})["y"], given_))
    ahead = [runner.submit({"x": x}) for x in given_]
    later = [future.result(20)["y"] for future in ahead]
    runner.close()
    for x, now, then in zip(given_, answers, later, strict=True):
        assert np.array_equal(now, x * 2 + 1)
        assert np.array_equal(then, x * 2 + 1)


def _flood(kind: str, count: int) -> None:
    """Many requests of random sizes at random times from several threads: each has its own answer, exactly once."""
    runner = batcher(KINDS[kind]([1, 4, 16]), max_batch_size=16, max_queue_delay_us=200, timeout=60)
    threads = 4
    answered = [np.zeros(count // threads, np.int32) for _ in range(threads)]
    wrong: list[str] = []

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        sizes, pauses = rng.integers(0, 6, count // threads), rng.random(count // threads)
        flight: list[tuple[int, Any, Future[dict[str, Any]]]] = []

        def settle() -> None:
            for index, x, future in flight:
                if not np.array_equal(future.result(60)["y"], x * 2 + 1):
                    wrong.append(f"client {number}, request {index}")
            flight.clear()

        for index, (size, pause) in enumerate(zip(sizes, pauses, strict=True)):
            # Values tell client, request and row apart.
            x = (np.arange(size, dtype=np.float64) + 8 * index + 8 * count * number).reshape(size, 1)
            future = runner.submit({"x": x})
            future.add_done_callback(lambda _, i=index: answered[number].__setitem__(i, answered[number][i] + 1))
            flight.append((index, x, future))
            if pause < 0.02:
                time.sleep(pause / 20)
            if len(flight) > 50:
                settle()
        settle()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(threads)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    runner.close()
    assert not wrong
    assert all((one == 1).all() for one in answered)
    assert runner.stats().requests == count
    assert runner.stats().timeouts == runner.stats().retried == 0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_thousands_of_requests_are_each_answered_once(kind: str) -> None:
    _flood(kind, 4000)


@pytest.mark.suite
@pytest.mark.parametrize("kind", ["buckets", "buckets of pipelines"])
def test_a_hundred_thousand_requests_are_each_answered_once(kind: str) -> None:
    _flood(kind, 100_000)


def test_memory_is_bounded_on_an_endless_stream() -> None:
    """Requests with deadlines far away come and go; what stays does not grow with them."""
    runner = batcher(Function(lambda x: x), max_batch_size=4, max_queue_delay_us=1, timeout=3600)

    def stream(count: int) -> None:
        flight: list[Future[dict[str, Any]]] = []
        for _ in range(count):
            flight.append(runner.submit({"x": np.ones((1, 1000))}))
            if len(flight) >= 8:
                flight.pop(0).result(20)
        for future in flight:
            future.result(20)

    stream(500)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    stream(4000)  # 32 MB of inputs and as much of outputs
    gc.collect()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 1 << 20
    assert peak - before < 4 << 20
    assert len(runner._deadlines) < 200
    runner.close()
