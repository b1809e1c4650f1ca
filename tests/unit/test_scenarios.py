"""Scenarios: arrivals, percentiles, open-loop accounting, LoadGen and the plain driver side by side, the sweep."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accelrt
from accelrt.data import digits_model, held_out_digits
from accelrt.errors import BenchmarkError, OptionError
from accelrt.scenarios import (
    Effort,
    Latency,
    MultiStream,
    Offline,
    Scenario,
    Server,
    SingleStream,
    measure,
    plain,
    sweep,
)
from accelrt.scenarios import loadgen as loadgen_driver
from accelrt.scenarios.rates import STEPS, search
from accelrt.scenarios.scenario import PERCENTILES
from accelrt.scenarios.statistics import is_proven, percentile_of, poisson_arrivals, queries_needed

SAMPLES: list[dict[str, Any]] = [{"x": number} for number in range(5)]
ALL: tuple[Scenario, ...] = (SingleStream(), MultiStream(4), Server(200, 0.5, 90), Offline())


# Arrivals


@given(rate=st.floats(0.5, 5000), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process(rate: float, seed: int) -> None:
    times = poisson_arrivals(rate, 0, 20_000, seed)
    gaps = np.diff(times, prepend=0.0)
    assert len(times) == 20_000
    assert (gaps > 0).all()
    # Mean and deviation of exponential gaps are both 1 / rate; six standard errors of 20,000 gaps, and twice as much.
    assert gaps.mean() * rate == pytest.approx(1, abs=6 / math.sqrt(20_000))
    assert gaps.std() * rate == pytest.approx(1, abs=12 / math.sqrt(20_000))
    # No memory: one gap says nothing about the next.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 6 / math.sqrt(20_000)


@given(rate=st.floats(0.5, 5000), seconds=st.floats(0, 3), queries=st.integers(1, 3000), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_arrivals_are_seeded_and_reach_both_minima(rate: float, seconds: float, queries: int, seed: int) -> None:
    times = poisson_arrivals(rate, seconds, queries, seed)
    assert len(times) >= queries
    assert times[-1] >= seconds
    # No longer than need be: without the last one a minimum is missed.
    assert len(times) == queries or times[-2] < seconds
    assert (times == poisson_arrivals(rate, seconds, queries, seed)).all()
    longer = poisson_arrivals(rate, seconds + 1, queries + 1, seed)
    assert (longer[: len(times)] == times).all()
    assert not np.array_equal(times, poisson_arrivals(rate, seconds, queries, seed + 1)[: len(times)])


# Percentiles


@given(values=st.lists(st.floats(0, 1e3), min_size=1, max_size=400), percent=st.sampled_from(PERCENTILES))
def test_percentiles_are_measured_values_and_never_below_numpys(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    found = percentile_of(ordered, percent)
    assert found in values
    assert found >= np.percentile(values, percent, method="inverted_cdf")
    assert found >= np.percentile(values, percent) * (1 - 1e-12)
    # No more than one place above numpy's definition by the inverse of the distribution.
    place = ordered.index(float(np.percentile(values, percent, method="inverted_cdf")))
    assert found <= ordered[min(place + ordered.count(ordered[place]), len(ordered) - 1)]


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_latencies_are_ordered(values: list[float]) -> None:
    found = Latency.of(values)
    ranks = [found.at(percent) for percent in PERCENTILES]
    assert [found.min_s, *ranks, found.max_s] == sorted([found.min_s, *ranks, found.max_s])
    assert found.n == len(values)
    assert found.mean_s == pytest.approx(np.mean(values))
    assert found.to_json()["p99_ms"] == found.p99_s * 1e3


def test_as_many_queries_are_needed_as_loadgen_says() -> None:
    # What LoadGen 6.0.17 prints: 64 and 662 for one discarded query, 459 with none late, 11,696 more than 93 of 93.
    assert queries_needed(1, 90) == 64
    assert queries_needed(1, 99) == 662
    assert queries_needed(0, 99) == 459
    assert queries_needed(93, 99) == pytest.approx(11_696 + 93, abs=2)


@given(queries=st.integers(1, 3000), late=st.integers(0, 60), percent=st.sampled_from((90.0, 99.0)))
@settings(deadline=None)
def test_more_queries_prove_more_and_late_ones_less(queries: int, late: int, percent: float) -> None:
    if is_proven(queries, late, percent):
        assert is_proven(queries + 1, late, percent)
        assert late == 0 or is_proven(queries, late - 1, percent)


# Open-loop accounting, on a clock that moves only when somebody waits


class _Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


class _Inline:
    """A session that computes when asked, one call after the other, each as long as ``service`` says."""

    def __init__(self, clock: _Clock, service: Any) -> None:
        self.clock, self.service, self.calls = clock, service, 0
        self.seen: list[Any] = []

    def predict(self, *inputs: Any) -> Mapping[str, Any]:
        self.clock.time += self.service(self.calls)
        self.calls += 1
        self.seen.append(inputs[0])
        return {}

    def submit(self, *inputs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.predict(*inputs))
        return future

    def map(self, items: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
        return (self.predict(item) for item in items)


def _run(scenario: Scenario, effort: Effort, service: Any) -> tuple[Any, _Inline]:
    clock = _Clock()
    session = _Inline(clock, service)
    return plain.run(session, SAMPLES, scenario, effort, clock), session


@given(seed=st.integers(0, 1000), stalled_at=st.integers(0, 150))
@settings(max_examples=30, deadline=None)
def test_a_stall_is_paid_for_by_every_query_behind_it(seed: int, stalled_at: int) -> None:
    rate, stall, service = 100.0, 2.0, 0.001
    scenario = Server(rate, 100.0)
    effort = Effort(0, 200, seed=seed)
    result, _ = _run(scenario, effort, lambda number: stall if number == stalled_at else service)
    # What a single server does with those arrivals, worked out apart from the driver: Lindley's recursion.
    due = poisson_arrivals(rate, 0, 200, seed)
    free, expected = 0.0, []
    for number, moment in enumerate(due):
        free = max(free, moment) + (stall if number == stalled_at else service)
        expected.append(free - moment)
    assert result.latency.max_s == pytest.approx(max(expected))
    assert result.latency.mean_s == pytest.approx(np.mean(expected))
    assert result.latency.p90_s == pytest.approx(percentile_of(sorted(expected), 90))
    # Those that were due during the stall waited for the rest of it: a clock started at service would show 1 ms.
    behind = int(np.sum((due > due[stalled_at]) & (due < due[stalled_at] + stall / 2)))
    assert sum(value > stall / 2 - 0.2 for value in expected) >= behind
    assert result.queries == result.samples == 200


def test_a_closed_loop_counts_from_issue_and_stops_at_the_minima() -> None:
    result, session = _run(SingleStream(), Effort(1.0, 10), lambda number: 0.01)
    assert result.queries == session.calls == 100
    assert result.latency.p50_s == pytest.approx(0.01)
    assert result.throughput == pytest.approx(100)
    assert result.duration_s == pytest.approx(1)
    assert (result.verdict, result.reasons) == ("VALID", ())
    few, _ = _run(SingleStream(), Effort(0, 10), lambda number: 0.01)
    assert few.queries == 10
    assert few.verdict == "INVALID"
    assert "64" in few.reasons[0]


def test_multi_stream_sends_many_and_counts_queries() -> None:
    result, session = _run(MultiStream(4), Effort(0, 25), lambda number: 0.01)
    assert (result.queries, result.samples, session.calls) == (25, 100, 100)
    assert result.latency.n == 25
    assert result.latency.p50_s == pytest.approx(0.04)
    assert result.throughput == pytest.approx(100)


def test_offline_counts_from_the_start_and_reaches_both_minima() -> None:
    result, session = _run(Offline(), Effort(0.5, 10), lambda number: 0.01)
    assert result.samples == session.calls == 50
    assert result.throughput == pytest.approx(100)
    assert result.latency.max_s == pytest.approx(0.5)
    assert _run(Offline(), Effort(0, 70), lambda number: 0.01)[0].samples == 70


def test_samples_are_drawn_by_seed_and_all_of_them() -> None:
    def order(seed: int) -> list[Any]:
        return [item["x"] for item in _run(SingleStream(), Effort(0, 100, seed=seed), lambda number: 0.01)[1].seen]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert set(order(1)) == set(range(5))


def test_a_bound_that_is_kept_is_valid_and_one_that_is_not_names_the_late() -> None:
    kept, _ = _run(Server(10, 0.5), Effort(0, 500), lambda number: 0.001)
    assert (kept.verdict, kept.reasons) == ("VALID", ())
    few, _ = _run(Server(10, 0.5), Effort(0, 100), lambda number: 0.001)
    assert few.verdict == "INVALID"
    assert "459" in few.reasons[0]
    missed, _ = _run(Server(10, 0.5, 90), Effort(0, 100), lambda number: 0.6 if number < 8 else 0.001)
    assert missed.verdict == "INVALID"


class _Stuck:
    """A session whose answers come only when it is told."""

    def __init__(self) -> None:
        self.flight: list[Future[Any]] = []

    def predict(self, *inputs: Any) -> Mapping[str, Any]:
        return {}

    def submit(self, *inputs: Any) -> Future[Any]:
        self.flight.append(Future())
        return self.flight[-1]

    def map(self, items: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
        return iter([{} for _ in items])


def test_what_was_never_answered_counts_as_long_as_it_waited() -> None:
    clock, session = _Clock(), _Stuck()
    result = plain.run(session, SAMPLES, Server(10, 0.5), Effort(60, 600), clock)
    # Six of about 600 may be late, so it stops soon after the seventh is: not after a minute, and not without them.
    assert 7 < result.queries < 40
    assert result.samples == 0
    assert result.latency.n == result.queries
    assert result.latency.max_s > 0.5
    assert result.verdict == "INVALID"
    assert "Stopped" in result.reasons[0]
    assert all(future.cancelled() for future in session.flight)


def test_a_driver_that_is_interrupted_cancels_what_it_sent() -> None:
    class Interrupted(_Clock):
        def sleep_until(self, moment: float) -> None:
            super().sleep_until(moment)
            if self.time > 101:
                raise KeyboardInterrupt

    session = _Stuck()
    with pytest.raises(KeyboardInterrupt):
        plain.run(session, SAMPLES, Server(10, 100), Effort(60, 600), Interrupted())
    assert session.flight
    assert all(future.cancelled() for future in session.flight)


# Both drivers


@pytest.fixture(scope="module")
def digits() -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    images, _ = held_out_digits()
    with accelrt.load(accelrt.compile(digits_model())) as session:
        yield session, [{"image": images[number : number + 1]} for number in range(16)]


@pytest.mark.parametrize("driver", ["plain", "loadgen"])
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_drivers_report_sane_figures(digits: Any, scenario: Scenario, driver: Any) -> None:
    if driver == "loadgen":
        pytest.importorskip("mlperf_loadgen")
    session, samples = digits
    before = session.stats().calls
    result = measure(session, samples, scenario, Effort(0.3, 70, warmup=3), driver=driver)
    assert (result.driver, result.scenario) == (driver, scenario)
    assert result.driver_version != "unknown"
    assert session.stats().errors == 0
    issued = session.stats().calls - before - 6  # without the warm-up
    if driver == "plain":
        assert result.samples == issued
    else:
        assert result.samples <= issued  # LoadGen is told of a pace that was measured first
    per_query = scenario.samples_per_query if isinstance(scenario, MultiStream) else 1
    assert result.queries == 1 if isinstance(scenario, Offline) else result.samples == result.queries * per_query
    assert result.samples >= 70
    ranks = [result.latency.at(percent) for percent in PERCENTILES]
    assert [0.0, result.latency.min_s, *ranks, result.latency.max_s] == sorted(
        [0.0, result.latency.min_s, *ranks, result.latency.max_s]
    )
    assert result.latency.n == (result.queries if isinstance(scenario, MultiStream) else result.samples)
    # LoadGen starts its own clock a little later than the first query, and a shared machine may stop in between.
    assert result.throughput == pytest.approx(result.samples / result.duration_s, rel=0.5)
    assert (result.verdict == "VALID") == (result.reasons == ())
    document = result.to_json()
    assert document["percentile_ms"] == result.percentile_s * 1e3
    assert document["scenario"]["name"] == scenario.name


def test_drivers_agree_about_offline_throughput(digits: Any) -> None:
    pytest.importorskip("mlperf_loadgen")
    session, samples = digits
    plain_, loadgen = (
        measure(session, samples, Offline(), Effort(0.5, 100), driver=driver).throughput
        for driver in ("plain", "loadgen")
    )
    assert 0.1 < plain_ / loadgen < 10


def test_drivers_agree_about_a_service_of_known_length() -> None:
    pytest.importorskip("mlperf_loadgen")
    with _Sleepy(0.01) as session:
        for scenario in (SingleStream(), MultiStream(2), Server(20, 0.5, 90)):
            for driver in ("plain", "loadgen"):
                result = measure(session, SAMPLES, scenario, Effort(0.2, 70), driver=driver)
                assert result.latency.min_s >= 0.01, (scenario, driver)
                assert result.throughput < 201


class _Sleepy:
    """Two workers, each of which takes its time over a call; fails the call of a given number."""

    def __init__(self, seconds: float = 0.0, fails_at: int | None = None) -> None:
        self.seconds, self.fails_at, self.calls = seconds, fails_at, 0
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(2)

    def predict(self, *inputs: Any) -> Mapping[str, Any]:
        with self.lock:
            self.calls += 1
            number = self.calls
        if self.fails_at is not None and number >= self.fails_at:
            raise ValueError(f"call {number} failed")
        time.sleep(self.seconds)
        return {}

    def submit(self, *inputs: Any) -> Future[Any]:
        return self.pool.submit(self.predict, *inputs)

    def map(self, items: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
        return self.pool.map(self.predict, items)

    def __enter__(self) -> _Sleepy:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("driver", ["plain", "loadgen"])
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_a_failing_call_fails_the_run_and_not_the_process(scenario: Scenario, driver: Any) -> None:
    if driver == "loadgen":
        pytest.importorskip("mlperf_loadgen")
    with _Sleepy(0.001, fails_at=60) as session, pytest.raises(ValueError, match=r"call \d+ failed"):
        measure(session, SAMPLES, scenario, Effort(1.0, 100, warmup=2), driver=driver)
    # LoadGen can be used again afterwards.
    with _Sleepy(0.001) as session:
        assert measure(session, SAMPLES, scenario, Effort(0.05, 20, warmup=2), driver=driver).samples >= 20


def test_loadgen_gives_up_a_rate_that_cannot_be_kept() -> None:
    pytest.importorskip("mlperf_loadgen")
    with _Sleepy(0.02) as session:
        start = time.perf_counter()
        result = measure(session, SAMPLES, Server(2000, 0.05), Effort(5, 100), driver="loadgen")
    # All 10,000 queries would take 100 seconds.
    assert time.perf_counter() - start < 60
    assert result.verdict == "INVALID"
    assert any("Too many outstanding" in reason for reason in result.reasons)


def test_loadgen_runs_one_test_at_a_time() -> None:
    pytest.importorskip("mlperf_loadgen")
    with _Sleepy(0.001) as session, ThreadPoolExecutor(2) as pool:
        tests = [
            pool.submit(measure, session, SAMPLES, SingleStream(), Effort(0.1, 20), driver="loadgen") for _ in range(2)
        ]
        assert all(test.result().queries >= 20 for test in tests)


def test_a_missing_loadgen_is_said_or_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen_driver, "_MODULE", "no_such_module")
    with _Sleepy() as session:
        assert measure(session, SAMPLES, SingleStream(), Effort(0, 5)).driver == "plain"
        with pytest.raises(BenchmarkError, match=r"accelrt\[bench\]"):
            measure(session, SAMPLES, SingleStream(), Effort(0, 5), driver="loadgen")


def test_loadgens_log_is_read_as_it_is_written() -> None:
    def entry(key: str, value: Any) -> dict[str, Any]:
        return {"key": key, "value": value}

    with pytest.raises(BenchmarkError, match=r"no verdict.*disk full"):
        loadgen_driver._Figures([entry("error_runtime", "disk full")])
    assert loadgen_driver._sentences(" * Run\n unsuccessful.  * Processed 9 queries. ") == [
        "Run unsuccessful.",
        "Processed 9 queries.",
    ]


# The sweep


@given(limit=st.floats(1.0, 190.0))
def test_the_search_comes_close_from_below(limit: float) -> None:
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    best = search(holds, 100.0)
    assert best is not None
    assert len(tried) <= STEPS
    assert best <= limit
    if limit > 2:
        assert best >= limit / 1.06


def test_the_search_ends_where_nothing_holds() -> None:
    tried: list[float] = []
    assert search(lambda rate: bool(tried.append(rate)), 100.0) is None
    assert len(tried) < STEPS
    assert search(lambda rate: True, 100.0) == pytest.approx(200, rel=0.06)


def test_a_sweep_reports_each_step_and_the_best() -> None:
    seen: list[Any] = []
    with _Sleepy(0.005) as session:
        found = sweep(session, SAMPLES, 0.05, 90, Effort(0.2, 20, 2), driver="plain", progress=seen.append)
    assert tuple(seen) == found.steps
    kept = [step.target_qps for step in found.steps if step.within]
    assert found.best_qps == (max(kept) if kept else None)
    assert found.capacity < 401
    for step in found.steps:
        assert step.within == (step.result.percentile_s <= 0.05)
    assert found.to_json()["latency_bound_ms"] == 50


# Refusals


@pytest.mark.parametrize(
    "build",
    [
        lambda: SingleStream(42.0),
        lambda: MultiStream(0),
        lambda: Server(0, 1),
        lambda: Server(math.inf, 1),
        lambda: Server(1, -1),
        lambda: Server(1, math.nan),
        lambda: Effort(-1),
        lambda: Effort(1, 0),
        lambda: Effort(1, 1, 0),
        lambda: measure(_Stuck(), [], SingleStream()),
        lambda: measure(_Stuck(), SAMPLES, SingleStream(), driver="mlperf"),  # type: ignore[arg-type]
        lambda: sweep(_Stuck(), [], 1.0),
    ],
)
def test_values_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(OptionError):
        build()


@pytest.mark.parametrize("scenario", ["SingleStream()", "Server(50, 0.5)", "Offline()"])
def test_an_interrupt_ends_a_test_of_loadgen(scenario: str) -> None:
    pytest.importorskip("mlperf_loadgen")
    code = f"""
import os, signal, threading, time
from accelrt.scenarios import *
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
told = threading.Event()
class Session:
    calls = 0
    def predict(self, *inputs):
        self.calls += 1
        if self.calls >= 60 and not told.is_set():  # two threads count, and one of them may see 61 at once
            told.set()
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)
        return {{}}
    def submit(self, *inputs):
        return pool.submit(self.predict, *inputs)
    def map(self, items):
        return pool.map(self.predict, items)
start = time.perf_counter()
try:
    measure(Session(), [{{}}], {scenario}, Effort(100, 20, 1), driver="loadgen")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - start < 50)
# LoadGen is not left in the middle of a test.
print(measure(Session(), [{{}}], SingleStream(), Effort(0, 20, 1), driver="loadgen").queries >= 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted", "True", "True"]), done.stderr
