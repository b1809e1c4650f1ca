"""Buckets: plans no other plan beats, and calls of any size that get exactly their rows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import ExecutionError, InputError
from accelrt.runtime.buckets import BucketPlanner, BucketRunner, OverlappingBucketRunner, PaddingStats, sliced
from accelrt.runtime.runner import OverlappingRunner

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True)


class Rows:
    """A runner for one number of rows: y = 2 x, and what it was given."""

    def __init__(self, size: int) -> None:
        self.size, self.closed, self.seen = size, False, list[np.ndarray]()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        x = feeds["x"]
        assert x.shape[0] == self.size and x.flags.c_contiguous and not self.closed
        self.seen.append(x)
        return {"y": x * 2, "row": np.arange(self.size)}

    def close(self) -> None:
        self.closed = True


class Overlapping(Rows):
    """The same, on threads."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.pool, self.capacity = ThreadPoolExecutor(3), 3

    def submit(self, feeds: Mapping[str, Any]) -> Future[dict[str, Any]]:
        return self.pool.submit(self.run, feeds)


def brute(sizes: list[int], rows: int) -> tuple[int, int]:
    """Padding and calls of the best of all plans, found by trying sums of 0, 1, 2... sizes."""
    best: tuple[int, int] | None = None
    for calls in range(rows // min(sizes) + 2):
        for chosen in itertools.combinations_with_replacement(sizes, calls):
            if sum(chosen) >= rows and (best is None or (sum(chosen) - rows, calls) < best):
                best = (sum(chosen) - rows, calls)
    assert best is not None
    return best


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True), st.integers(0, 14))
@settings(max_examples=400, deadline=None)
def test_no_plan_is_better(sizes: list[int], rows: int) -> None:
    plan = BucketPlanner(sizes).plan(rows)
    assert set(plan) <= set(sizes)
    assert (sum(plan) - rows, len(plan)) == brute(sizes, rows)


@given(sizes, st.integers(0, 3000))
@settings(max_examples=200, deadline=None)
def test_large_calls_are_planned_as_well_as_step_by_step(sizes: list[int], rows: int) -> None:
    """The shortcut for large calls against the whole table."""
    whole = BucketPlanner(sizes)
    whole.limit = 10**9
    assert sorted(BucketPlanner(sizes).plan(rows)) == sorted(whole.plan(rows)) or (
        len(BucketPlanner(sizes).plan(rows)) == len(whole.plan(rows))
        and sum(BucketPlanner(sizes).plan(rows)) == sum(whole.plan(rows))
    )


def test_known_plans() -> None:
    planner = BucketPlanner([1, 8])
    assert planner.plan(0) == []
    assert planner.plan(17) == [8, 8, 1]
    assert BucketPlanner([4, 6]).plan(13) == [6, 4, 4]
    assert BucketPlanner([8]).plan(9) == [8, 8]
    assert len(BucketPlanner([1, 8]).plan(8_000_003)) == 1_000_003  # in the time and memory of a small one


@pytest.mark.parametrize("wrong", [[], [0], [-1, 2]])
def test_sizes_are_positive(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        BucketPlanner(wrong)


@given(sizes, st.lists(st.integers(0, 30), min_size=1, max_size=5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_call_gets_exactly_its_rows(sizes: list[int], calls: list[int], overlapping: bool) -> None:
    runners = {size: Overlapping(size) if overlapping else Rows(size) for size in sizes}
    runner = OverlappingBucketRunner(runners) if overlapping else BucketRunner(runners)  # type: ignore[arg-type]
    assert isinstance(runner, OverlappingRunner) == overlapping
    for number, rows in enumerate(calls):
        x = np.arange(1, rows * 3 + 1, dtype=np.float32).reshape(rows, 3) + 1000 * number
        outputs = runner.run({"x": x})
        assert np.array_equal(outputs["y"], x * 2)
        assert outputs["row"].shape == (rows,)
        for value in outputs.values():
            # Nothing that a caller holds leads to rows of padding.
            assert value.base is None or value.base.shape[0] == rows
    planned = [BucketPlanner(sizes).plan(rows) or [min(sizes)] for rows in calls]
    padding = sum(map(sum, planned)) - sum(calls)
    assert runner.stats() == PaddingStats(sum(calls), padding, sum(map(len, planned)))
    runner.close()
    assert all(one.closed for one in runners.values())


def test_padding_repeats_the_last_row() -> None:
    runner = BucketRunner({4: Rows(4)})
    runner.run({"x": np.array([[1.0], [7.0]])})
    (seen,) = runner._runners[4].seen  # type: ignore[attr-defined]
    assert seen.tolist() == [[1.0], [7.0], [7.0], [7.0]]


def test_a_whole_call_is_not_copied() -> None:
    runner = BucketRunner({2: Rows(2)})
    x = np.ones((2, 1))
    runner.run({"x": x})
    assert runner._runners[2].seen[0] is x  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [object, np.int8, bool])
def test_any_type_is_padded(dtype: type) -> None:
    class Echo:
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return dict(feeds)

        def close(self) -> None:
            pass

    runner = BucketRunner({3: Echo()})
    for rows in (0, 1, 5):
        x = np.array([["a"] if dtype is object else [1]] * rows, dtype).reshape(rows, 1)
        y = runner.run({"x": x})["x"]
        assert y.dtype == x.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("feeds", [{"x": np.ones(3), "z": np.ones(2)}, {"x": np.float32(1)}, {}])
def test_inputs_without_common_rows_are_refused(feeds: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="as many rows each"):
        BucketRunner({1: Rows(1)}).run(feeds)


def test_outputs_without_rows_are_an_error() -> None:
    class Sum:
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            return {"y": feeds["x"].sum(0)}

        def close(self) -> None:
            pass

    with pytest.raises(ExecutionError, match="does not hold 2 rows"):
        BucketRunner({2: Sum()}).run({"x": np.ones((3, 1))})
    with pytest.raises(ExecutionError, match="not independent"):
        list(sliced({"y": np.ones(1)}, [0, 1, 3]))


def test_one_failed_run_fails_the_call_alone() -> None:
    class Picky(Overlapping):
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            if (feeds["x"] == 13).any():
                raise RuntimeError("thirteen")
            return super().run(feeds)

    runner = OverlappingBucketRunner({2: Picky(2)})
    good, bad = (np.arange(start, start + 8.0).reshape(8, 1) for start in (0, 10))
    futures = [runner.submit({"x": x}) for x in (good, bad, good)]
    with pytest.raises(RuntimeError, match="thirteen"):
        futures[1].result(5)
    assert np.array_equal(futures[0].result(5)["y"], good * 2)
    assert np.array_equal(futures[2].result(5)["y"], good * 2)


def test_planning_from_many_threads() -> None:
    planner = BucketPlanner([3, 5])
    found: list[bool] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for rows in rng.integers(0, 400, 200):
            plan = planner.plan(int(rows))
            found.append(sum(plan) == next(t for t in itertools.count(int(rows)) if t not in (1, 2, 4, 7)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800 and all(found)
