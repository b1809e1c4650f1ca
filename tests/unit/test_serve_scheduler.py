"""The queue of one model: exact un-batching, priorities, deadlines, turning away, latency targets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import AccelrtError, ExecutionError, Overloaded, RequestTimeout
from accelrt.serve.models.config import QueuePolicy
from accelrt.serve.models.latency import LatencyModel
from accelrt.serve.models.scheduler import Item, QueueClosed, Scheduler, SchedulerPolicy
from accelrt.serve.models.statistics import VersionStatistics
from tests.unit.serve_cases import run


class Model:
    """y = 2 x + 1; the first call waits until it is let go, so that requests gather behind it."""

    def __init__(self, *, held: bool = False, seconds: float = 0.0, fails: Callable[[Any], bool] | None = None) -> None:
        self.runs: list[Any] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self._seconds, self._fails = seconds, fails
        if not held:
            self.go.set()

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.entered.set()
        assert self.go.wait(20)
        time.sleep(self._seconds)
        x = feeds["x"]
        self.runs.append(x[:, 0].tolist())
        if self._fails is not None and self._fails(x):
            raise ValueError("bad row")
        return {"y": x * 2 + 1}


def rows(*values: float) -> dict[str, Any]:
    return {"x": np.array([[value] for value in values], np.float32)}


class Queue:
    """A scheduler, and what tests ask of it."""

    def __init__(self, model: Model, capacity: int = 1, **policy: Any) -> None:
        self.statistics = VersionStatistics()
        self.scheduler = Scheduler(model, capacity, SchedulerPolicy(**policy), self.statistics, name="m")

    def put(self, feeds: Mapping[str, Any], **more: Any) -> tuple[asyncio.Future[Any], Item]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        item = self.scheduler.item(feeds, loop, future, **more)
        self.scheduler.put(item)
        return future, item

    async def close(self) -> None:
        await asyncio.to_thread(self.scheduler.close)


async def held(queue: Queue, model: Model) -> asyncio.Future[Any]:
    """Queue a first request, and wait until the model has it."""
    future, _ = queue.put(rows(-1))
    await asyncio.to_thread(model.entered.wait, 20)
    return future


@given(
    calls=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(["float32", "float64"]), st.integers(1, 2)), max_size=24
    ),
    most=st.integers(1, 9),
    capacity=st.integers(1, 3),
    levels=st.integers(0, 2),
    pause=st.lists(st.booleans(), min_size=24, max_size=24),
)
@settings(max_examples=40, deadline=None)
def test_each_request_gets_exactly_its_rows(
    calls: Sequence[tuple[int, str, int]], most: int, capacity: int, levels: int, pause: Sequence[bool]
) -> None:
    model = Model()

    async def scenario() -> None:
        queue = Queue(model, capacity, max_rows=most, levels=levels, default_level=min(levels, 1), delay_s=0.0005)
        futures = []
        for number, (count, dtype, width) in enumerate(calls):
            x = (np.arange(count * width).reshape(count, width) + 1000 * number).astype(dtype)
            futures.append((x, queue.put({"x": x}, priority=number % 3)[0]))
            if pause[number]:
                await asyncio.sleep(0.0003)
        for x, future in futures:
            answer = (await future)["y"]
            assert answer.dtype == x.dtype
            np.testing.assert_array_equal(answer, x * 2 + 1)
        await queue.close()
        read = queue.statistics.read("m", "1", queue.scheduler.busy)
        assert read.pending == 0 and read.success.count == len(calls)
        assert sum(len(each) for each in model.runs) == sum(count for count, _, _ in calls)
        assert read.execution_count == len(model.runs)
        if most > 1:
            assert read.inference_count == sum(count for count, _, _ in calls)
            assert all(len(each) <= max(most, 5) for each in model.runs)

    model.runs.clear()
    run(scenario())


def test_what_waits_shares_a_run_and_nobody_holds_anothers_memory() -> None:
    model = Model(held=True)

    async def scenario() -> None:
        queue = Queue(model, max_rows=8)
        first = await held(queue, model)
        others = [queue.put(rows(number, number + 0.5))[0] for number in range(5)]
        model.go.set()
        await first
        answers = [(await future)["y"] for future in others]
        assert [len(each) for each in model.runs] == [1, 8, 2]
        assert all(answer.base is None for answer in answers[:4])
        await queue.close()

    run(scenario())


def test_a_bad_request_fails_alone() -> None:
    model = Model(held=True, fails=lambda x: bool((x == 13).any()))

    async def scenario() -> None:
        queue = Queue(model, max_rows=8)
        first = await held(queue, model)
        futures = [queue.put(rows(number))[0] for number in (11, 12, 13, 14)]
        model.go.set()
        await first
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(answers[2], ExecutionError) and "bad row" in str(answers[2])
        assert [float(answer["y"][0, 0]) for answer in (answers[0], answers[1], answers[3])] == [23, 25, 29]
        assert queue.statistics.read("m", "1", 0).fail.count == 1
        await queue.close()

    run(scenario())


def test_outputs_that_hold_no_rows_are_not_shared_out() -> None:
    async def scenario() -> None:
        gate = threading.Event()

        def model(feeds: Mapping[str, Any]) -> dict[str, Any]:
            gate.wait(20)
            return {"y": feeds["x"].sum(keepdims=True)}

        scheduler = Queue(model, max_rows=8)  # type: ignore[arg-type]
        futures = [scheduler.put(rows(number))[0] for number in (1, 2, 3)]
        gate.set()
        assert [float((await future)["y"][0, 0]) for future in futures] == [1, 2, 3]  # each was run alone
        await scheduler.close()

    run(scenario())


def test_priorities_go_first_and_unknown_ones_take_the_default() -> None:
    model = Model(held=True)

    async def scenario() -> None:
        queue = Queue(model, levels=3, default_level=2)
        first = await held(queue, model)
        asked = [(10, 3), (20, 2), (30, 1), (40, 0), (50, 99), (60, 1)]
        futures = [queue.put(rows(value), priority=priority)[0] for value, priority in asked]
        model.go.set()
        await asyncio.gather(first, *futures)
        assert [each[0] for each in model.runs] == [-1, 30, 60, 20, 40, 50, 10]
        await queue.close()

    run(scenario())


def test_a_request_whose_time_is_over_is_not_computed() -> None:
    model = Model(held=True)

    async def scenario() -> None:
        queue = Queue(model)
        first = await held(queue, model)
        late, item = queue.put(rows(1), timeout_us=20_000)
        patient, _ = queue.put(rows(2), timeout_us=60_000_000)
        other, _ = queue.put(rows(3), timeout_us=1)  # found by the queue itself, with no alarm
        asyncio.get_running_loop().call_later(0.02, queue.scheduler.expire, item)
        with pytest.raises(RequestTimeout):
            await late  # answered while the model is still busy
        assert not first.done()
        model.go.set()
        await patient
        with pytest.raises(RequestTimeout):
            await other
        await queue.close()
        assert model.runs == [[-1], [2]]
        assert queue.statistics.read("m", "1", 0).timed_out == 2

    run(scenario())


def test_by_policy_the_late_wait_behind_all_others() -> None:
    model = Model(held=True)

    async def scenario() -> None:
        queue = Queue(model, levels=2, default_level=1, queue=QueuePolicy(1000, delay=True))
        first = await held(queue, model)
        late, item = queue.put(rows(1))
        await asyncio.sleep(0.005)
        queue.scheduler.expire(item)
        fresh, _ = queue.put(rows(2), priority=2, arrived_ns=time.monotonic_ns() + 10**10)
        model.go.set()
        await asyncio.gather(first, late, fresh)
        assert model.runs == [[-1], [2], [1]]
        await queue.close()

    run(scenario())


@pytest.mark.parametrize(
    ("policy", "asked_us", "seconds"),
    [
        (QueuePolicy(), 0, None),
        (QueuePolicy(), 500, 0.0005),
        (QueuePolicy(1000), 0, 0.001),
        (QueuePolicy(1000), 200, 0.0002),
        (QueuePolicy(1000), 5000, 0.001),
        (QueuePolicy(1000, allow_timeout_override=False), 200, 0.001),
    ],
)
def test_a_request_may_shorten_its_time(policy: QueuePolicy, asked_us: int, seconds: float | None) -> None:
    async def scenario() -> None:
        queue = Queue(Model(), queue=policy)
        loop = asyncio.get_running_loop()
        item = queue.scheduler.item(rows(1), loop, loop.create_future(), timeout_us=asked_us, arrived_ns=1000)
        assert item.deadline_ns == (None if seconds is None else 1000 + round(seconds * 1e9))

    run(scenario())


def test_a_full_queue_turns_away_and_says_when_to_come_back() -> None:
    model = Model(held=True, seconds=0.01)

    async def scenario() -> None:
        queue = Queue(model, max_queue=3)
        first = await held(queue, model)
        futures = [queue.put(rows(number))[0] for number in range(3)]
        with pytest.raises(Overloaded) as error:
            queue.put(rows(9))
        assert error.value.retry_after_s is not None and error.value.retry_after_s > 0
        model.go.set()
        await asyncio.gather(first, *futures)
        await queue.put(rows(10))[0]
        assert len(model.runs) == 5 and queue.statistics.read("m", "1", 0).rejected == 1
        await queue.close()

    run(scenario())


def test_a_cancelled_request_is_not_computed() -> None:
    model = Model(held=True)

    async def scenario() -> None:
        queue = Queue(model, max_rows=8)
        first = await held(queue, model)
        gone, item = queue.put(rows(1))
        stays, _ = queue.put(rows(2))
        gone.cancel()
        queue.scheduler.cancel(item)
        queue.scheduler.cancel(item)
        model.go.set()
        await asyncio.gather(first, stays)
        assert model.runs == [[-1], [2]] and queue.scheduler.busy == 0
        await queue.close()

    run(scenario())


def test_closing_answers_what_was_taken() -> None:
    model = Model(held=True)

    async def scenario() -> None:
        queue = Queue(model, max_rows=4, delay_s=30.0)
        first = asyncio.get_running_loop().create_future()
        futures = [queue.put(rows(number))[0] for number in range(3)]
        first.cancel()
        model.go.set()
        await queue.close()
        assert [float((await future)["y"][0, 0]) for future in futures] == [1, 3, 5]
        with pytest.raises(QueueClosed):
            queue.put(rows(1))

    run(scenario())


def test_preferred_sizes_begin_at_once() -> None:
    model = Model()

    async def scenario() -> None:
        queue = Queue(model, max_rows=64, delay_s=0.3, preferred=(2, 4))
        start = time.monotonic()
        futures = [queue.put(rows(number))[0] for number in range(4)]
        await asyncio.gather(*futures)
        assert time.monotonic() - start < 0.29 and all(len(each) in (2, 4) for each in model.runs)
        await queue.put(rows(9))[0]  # none to share with: it waits in vain
        assert time.monotonic() - start > 0.29
        await queue.close()

    run(scenario())


def test_as_many_calls_as_the_capacity_are_under_way() -> None:
    together = threading.Barrier(3)

    def model(feeds: Mapping[str, Any]) -> dict[str, Any]:
        together.wait(20)  # breaks unless three calls are in it
        return {"y": feeds["x"]}

    async def scenario() -> None:
        queue = Queue(model, 3)  # type: ignore[arg-type]
        for _ in range(3):
            await asyncio.gather(*(queue.put(rows(number))[0] for number in range(3)))
        await queue.close()

    run(scenario())


def test_a_latency_target_keeps_runs_small_and_the_queue_short() -> None:
    """Each row takes 4 ms; within 40 ms a request may wait for one run and take one, of four or five rows each."""

    class Slow(Model):
        def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            self.runs.append(len(feeds["x"]))
            time.sleep(0.004 * len(feeds["x"]))
            return {"y": feeds["x"]}

    model = Slow()

    async def scenario() -> None:
        queue = Queue(model, max_rows=64, target_s=0.04, max_queue=500)
        futures, refused = [], 0
        for number in range(300):
            try:
                futures.append(queue.put(rows(number))[0])
            except Overloaded as error:
                refused += 1
                assert error.retry_after_s is not None and 0.01 <= error.retry_after_s <= 30
            await asyncio.sleep(0.001)
        await asyncio.gather(*futures)
        await queue.close()
        assert refused > 0  # 1,000 requests a second come, and 250 a second can be answered
        assert 1 < max(model.runs) <= 8

    run(scenario())


def test_latency_is_learnt_as_a_line() -> None:
    model = LatencyModel()
    assert not model.known and model.rows_within(1.0, 32) == 32
    generator = np.random.default_rng(0)
    for count in generator.integers(1, 33, 500):
        model.record(int(count), 0.002 + 0.001 * count)
    assert model.seconds(10) == pytest.approx(0.012, rel=0.01)
    assert model.rows_within(0.012, 32) in (9, 10) and model.rows_within(0.0001, 32) == 1
    assert model.rows_within(1.0, 32) == 32
    for _ in range(300):  # the machine became three times slower
        count = int(generator.integers(1, 33))
        model.record(count, 0.006 + 0.003 * count)
    assert model.seconds(10) == pytest.approx(0.036, rel=0.02)


def test_threads_and_answers_survive_a_loop_that_is_gone() -> None:
    model = Model(held=True)
    queue = Queue(model)

    async def leave() -> None:
        queue.put(rows(1))

    asyncio.run(leave())
    model.go.set()

    async def scenario() -> None:
        assert float((await queue.put(rows(2))[0])["y"][0, 0]) == 5
        await queue.close()

    run(scenario())


def test_errors_of_accelrt_arrive_as_they_are() -> None:
    def model(feeds: Mapping[str, Any]) -> dict[str, Any]:
        raise ExecutionError("no", hint="never")

    async def scenario() -> None:
        queue = Queue(model)  # type: ignore[arg-type]
        with pytest.raises(AccelrtError, match="no never"):
            await queue.put(rows(1))[0]
        await queue.close()

    run(scenario())
