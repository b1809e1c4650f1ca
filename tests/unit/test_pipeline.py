"""Pipelines: every call its own answer, in order, whatever fails on the way."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import DeviceLost, SessionClosed
from accelrt.runtime.pipeline import Pipeline, Stage, chain
from accelrt.runtime.runner import OverlappingRunner


class Step:
    """A runner of one function; counts calls, and sees whether two overlap."""

    def __init__(self, function: Callable[..., dict[str, Any]], seconds: float = 0.0) -> None:
        self.function, self.seconds = function, seconds
        self.calls, self.closed, self._inside = 0, 0, threading.Lock()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert not self.closed
        assert self._inside.acquire(blocking=False), "a stage was called by two threads"
        try:
            self.calls += 1
            if self.seconds:
                time.sleep(self.seconds)
            return self.function(**feeds)
        finally:
            self._inside.release()

    def close(self) -> None:
        self.closed += 1


def numbered(count: int, seconds: float = 0.0, depth: int = 2) -> tuple[Pipeline, list[Step]]:
    """Stages that add 1, 10, 100...; the last also reads the input, across all others."""

    def stage(number: int) -> Callable[..., dict[str, Any]]:
        last = number == count - 1

        def add(**values: Any) -> dict[str, Any]:
            total = values[f"v{number}"] + 10**number
            return {"y": total, "x_again": values["v0"]} if last else {f"v{number + 1}": total}

        return add

    steps = [Step(stage(number), seconds) for number in range(count)]
    runners = []
    for number, step in enumerate(steps):
        last = number == count - 1
        reads = [f"v{number}", *(["v0"] if last and number else [])]
        runners.append((step, reads, ["y", "x_again"] if last else [f"v{number + 1}"]))
    return chain(runners, ["y", "x_again"], depth=depth), steps


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 10**6), max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_call_has_its_own_answer(stages: int, depth: int, values: list[int]) -> None:
    pipeline, steps = numbered(stages, depth=depth)
    assert isinstance(pipeline, OverlappingRunner)
    added = sum(10**number for number in range(stages))
    futures = [pipeline.submit({"v0": value}) for value in values]
    assert [future.result(10) for future in futures] == [{"y": v + added, "x_again": v} for v in values]
    assert pipeline.run({"v0": 5}) == {"y": 5 + added, "x_again": 5}
    pipeline.close()
    pipeline.close()
    assert [step.closed for step in steps] == [1] * stages
    assert [step.calls for step in steps] == [len(values) + 1] * stages


def test_stages_work_at_the_same_time() -> None:
    pipeline, _ = numbered(3, seconds=0.03)
    start = time.perf_counter()
    futures = [pipeline.submit({"v0": value}) for value in range(20)]
    wait(futures)
    took = time.perf_counter() - start
    pipeline.close()
    # One after another it would take 1.8 s; three at a time 0.66 s.
    assert took < 1.3


def test_calls_finish_in_order() -> None:
    rng = np.random.default_rng(0)
    pauses = iter(rng.random(1000) * 0.002)

    def slow(**values: Any) -> dict[str, Any]:
        time.sleep(next(pauses))
        return {"b": values["a"]}

    finished: list[int] = []
    pipeline = chain([(Step(slow), ["a"], ["b"]), (Step(lambda b: {"y": b}), ["b"], ["y"])], ["y"])
    for number in range(200):
        pipeline.submit({"a": number}).add_done_callback(lambda done: finished.append(done.result()["y"]))
    pipeline.close()
    assert finished == list(range(200))


@pytest.mark.parametrize("kind", [RuntimeError, DeviceLost, KeyError])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_call_fails_alone_and_as_it_did(kind: type[Exception], failing: int) -> None:
    def step(number: int) -> Callable[..., dict[str, Any]]:
        def function(**values: Any) -> dict[str, Any]:
            (value,) = values.values()
            if number == failing and value % 3 == 0:
                raise kind(f"call {value}")
            return {"b" if number == 0 else "y": value}

        return function

    pipeline = chain([(Step(step(0)), ["a"], ["b"]), (Step(step(1)), ["b"], ["y"])], ["y"])
    futures = [pipeline.submit({"a": number}) for number in range(30)]
    for number, future in enumerate(futures):
        if number % 3 == 0:
            with pytest.raises(kind, match=f"call {number}"):
                future.result(5)
        else:
            assert future.result(5) == {"y": number}
    pipeline.close()


def test_a_full_pipeline_makes_callers_wait() -> None:
    gate = threading.Event()

    def held(v0: int) -> dict[str, Any]:
        gate.wait(10)
        return {"y": v0}

    pipeline = chain([(Step(held), ["v0"], ["y"])], ["y"], depth=2)
    begun: list[Future[dict[str, Any]]] = []
    source = threading.Thread(target=lambda: begun.extend(pipeline.submit({"v0": n}) for n in range(50)), daemon=True)
    taken: list[int] = []
    numbers = itertools.count()

    def feed() -> None:
        while len(taken) < 20:
            taken.append(next(numbers))
            begun.append(pipeline.submit({"v0": taken[-1]}))

    source = threading.Thread(target=feed, daemon=True)
    source.start()
    time.sleep(0.2)
    assert len(taken) <= pipeline.capacity + 1 == 4
    gate.set()
    source.join(10)
    assert [future.result(5)["y"] for future in begun] == list(range(20))
    pipeline.close()


def test_closing_answers_all_that_were_begun() -> None:
    pipeline, steps = numbered(2, seconds=0.01)
    futures = [pipeline.submit({"v0": value}) for value in range(6)]
    pipeline.close()
    assert [future.result(0)["x_again"] for future in futures] == list(range(6))
    assert all(step.closed == 1 for step in steps)
    with pytest.raises(SessionClosed):
        pipeline.submit({"v0": 1})


def test_closing_with_cancel_computes_no_more_than_it_must() -> None:
    pipeline, steps = numbered(2, seconds=0.2, depth=8)
    futures = [pipeline.submit({"v0": value}) for value in range(8)]
    time.sleep(0.05)
    pipeline.close(cancel=True)
    assert all(future.done() for future in futures)
    closed = [future for future in futures if isinstance(future.exception(0), SessionClosed)]
    assert len(closed) >= 6
    assert steps[0].calls <= 2
    assert all(step.closed == 1 for step in steps)


def test_a_cancelled_call_is_not_computed() -> None:
    pipeline, steps = numbered(1, seconds=0.05)
    first, second, third = (pipeline.submit({"v0": value}) for value in range(3))
    assert third.cancel()
    assert first.result(5) and second.result(5)
    with pytest.raises(CancelledError):
        third.result(5)
    pipeline.close()
    assert steps[0].calls == 2


def test_values_go_when_nobody_needs_them() -> None:
    """What a stage leaves for nobody is dropped before the next one runs."""
    stages = chain(
        [
            (Step(lambda a: {"big": a, "b": a}), ["a"], ["big", "b"]),
            (Step(lambda big, b: {"c": b}), ["big", "b"], ["c"]),
            (Step(lambda c: {"y": c}), ["c"], ["y"]),
        ],
        ["y", "b"],
    )
    assert [stage.spent for stage in stages._stages] == [("a",), ("big",), ("c",)]
    assert stages.run({"a": 1}) == {"y": 1, "b": 1}
    stages.close()


def test_a_stage_that_gives_too_little_fails_the_call() -> None:
    pipeline = chain([(Step(lambda a: {}), ["a"], ["y"])], ["y"])
    with pytest.raises(KeyError):
        pipeline.run({"a": 1})
    pipeline.close()


@pytest.mark.parametrize(("stages", "depth"), [((), 2), ((Stage(Step(dict), ()),), 0)])
def test_a_pipeline_has_stages_and_queues(stages: tuple[Stage, ...], depth: int) -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        Pipeline(stages, [], depth=depth)
