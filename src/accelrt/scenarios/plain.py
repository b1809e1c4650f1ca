"""The plain driver: the four scenarios without LoadGen.

The server scenario is an open loop. Arrivals are drawn beforehand, and a query's latency runs from the moment it was
due: if the session stalls, or this driver is late itself, every query behind pays for it in the figures. A loop that
sends the next query when the last one is answered, or starts the clock when a worker takes a query up, would leave
out just the queries that had to wait (coordinated omission).
"""

from __future__ import annotations

import threading
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

import accelrt
from accelrt.scenarios.clock import Clock, MonotonicClock
from accelrt.scenarios.result import Latency, ScenarioResult, Verdict
from accelrt.scenarios.scenario import Effort, Feedable, MultiStream, Offline, Scenario, Server, SingleStream
from accelrt.scenarios.statistics import CONFIDENCE, is_proven, poisson_arrivals, queries_needed

NAME = "plain"

Sample = Mapping[str, Any]


def run(
    session: Feedable, samples: Sequence[Sample], scenario: Scenario, effort: Effort, clock: Clock | None = None
) -> ScenarioResult:
    """Measure one scenario; the session is warm already.

    Raises:
        Whatever the session raises for a sample: the run ends with the first failure.
    """
    clock = clock or MonotonicClock()
    match scenario:
        case SingleStream():
            return _single_stream(session, _Draw(samples, effort.seed), scenario, effort, clock)
        case MultiStream():
            return _multi_stream(session, _Draw(samples, effort.seed), scenario, effort, clock)
        case Server():
            return _Arrivals(session, _Draw(samples, effort.seed), scenario, effort, clock).run()
        case Offline():
            return _offline(session, _Draw(samples, effort.seed), scenario, effort, clock)


class _Draw:
    """Samples in a random order, with replacement, seeded: what LoadGen does."""

    def __init__(self, samples: Sequence[Sample], seed: int) -> None:
        self._samples = samples
        # Not the generator of arrivals: what comes must not depend on when.
        self._generator = np.random.default_rng((seed, 1))
        self._indices: Iterator[int] = iter(())

    def __call__(self) -> Sample:
        index = next(self._indices, None)
        if index is None:
            # Drawn in bulk, since a single draw costs more than a small model.
            self._indices = iter(self._generator.integers(len(self._samples), size=4096).tolist())
            index = next(self._indices)
        return self._samples[index]


def _single_stream(
    session: Feedable, draw: _Draw, scenario: SingleStream, effort: Effort, clock: Clock
) -> ScenarioResult:
    def query() -> None:
        session.predict(draw())

    return _closed_loop(query, 1, scenario, effort, clock)


def _multi_stream(
    session: Feedable, draw: _Draw, scenario: MultiStream, effort: Effort, clock: Clock
) -> ScenarioResult:
    count = scenario.samples_per_query

    def query() -> None:
        for _ in session.map([draw() for _ in range(count)]):
            pass

    return _closed_loop(query, count, scenario, effort, clock)


def _closed_loop(
    query: Callable[[], None], samples: int, scenario: SingleStream | MultiStream, effort: Effort, clock: Clock
) -> ScenarioResult:
    latencies: list[float] = []
    start = before = clock.now()
    while len(latencies) < effort.queries or before - start < effort.seconds:
        query()
        after = clock.now()
        latencies.append(after - before)
        before = after
    # One late query is granted, as MLPerf's rules have it for an estimate of a percentile.
    needed = queries_needed(1, scenario.percentile)
    reasons = () if len(latencies) >= needed else (_too_few(len(latencies), needed, scenario.percentile),)
    return _result(scenario, Latency.of(latencies), len(latencies), len(latencies) * samples, before - start, reasons)


def _offline(session: Feedable, draw: _Draw, scenario: Offline, effort: Effort, clock: Clock) -> ScenarioResult:
    start = clock.now()
    drawn = 0

    def items() -> Iterator[Sample]:
        nonlocal drawn
        while drawn < effort.queries or clock.now() - start < effort.seconds:
            drawn += 1
            yield draw()

    latencies = [clock.now() - start for _ in session.map(items())]
    return _result(scenario, Latency.of(latencies), 1, len(latencies), max(latencies), ())


class _Arrivals:
    """One run of the server scenario."""

    def __init__(self, session: Feedable, draw: _Draw, scenario: Server, effort: Effort, clock: Clock) -> None:
        self._session, self._draw, self._scenario, self._clock = session, draw, scenario, clock
        self._due = poisson_arrivals(scenario.target_qps, effort.seconds, effort.queries, effort.seed).tolist()
        # More late ones than this, and no further answer can bring the percentile back within the bound.
        self._allowed = int(len(self._due) * (1 - scenario.percentile / 100))
        self._latencies: list[float | None] = [None] * len(self._due)
        self._failure: BaseException | None = None
        self._answered = self._in_time = self._late = 0
        self._changed = threading.Condition()

    def run(self) -> ScenarioResult:
        """Issue every query when it is due, or stop when the bound is lost; wait for the answers."""
        start = self._clock.now()
        flight: list[Future[Any]] = []
        try:
            for number, due in enumerate(self._due):
                self._clock.sleep_until(start + due)
                if self._failure is not None or self._is_lost(start):
                    break
                future = self._session.submit(self._draw())
                flight.append(future)
                future.add_done_callback(partial(self._answer, number, start + due))
            else:
                self._wait(len(flight))
        finally:
            for future in flight:
                future.cancel()
            self._wait(len(flight))
        if self._failure is not None:
            raise self._failure
        return self._summary(len(flight), start, self._clock.now())

    def _answer(self, number: int, due: float, future: Future[Any]) -> None:
        """Count an answer, in the thread that gave it."""
        latency = self._clock.now() - due
        failure = None if future.cancelled() else future.exception()
        with self._changed:
            self._answered += 1
            if failure is not None:
                self._failure = self._failure or failure
            elif not future.cancelled():
                self._latencies[number] = latency
                in_time = latency <= self._scenario.latency_bound_s
                self._in_time += in_time
                self._late += not in_time
            self._changed.notify_all()

    def _is_lost(self, start: float) -> bool:
        """Tell whether the percentile is out of reach: too many are late, or wait too long already."""
        with self._changed:
            overdue = bisect(self._due, self._clock.now() - start - self._scenario.latency_bound_s)
            # Of those whose time is up at most all that were answered in time were: the rest is late, whatever comes.
            return max(self._late, overdue - self._in_time) > self._allowed

    def _wait(self, issued: int) -> None:
        """Wait for every answer, or for a failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._answered >= issued or self._failure is not None)

    def _summary(self, issued: int, start: float, end: float) -> ScenarioResult:
        scenario = self._scenario
        dues = self._due[:issued]
        answers = self._latencies[:issued]
        moments = [due + latency for due, latency in zip(dues, answers, strict=True) if latency is not None]
        # One without an answer has waited at least until now: leaving it out would flatter.
        latencies = [
            end - start - due if latency is None else latency for due, latency in zip(dues, answers, strict=True)
        ]
        latency = Latency.of(latencies)
        late = sum(each > scenario.latency_bound_s for each in latencies)
        reasons = []
        if issued < len(self._due):
            reasons.append(
                f"Stopped after {issued} of {len(self._due)} queries: more than {self._allowed} were late, so the "
                "bound was out of reach. Queries without an answer count as long as they had waited."
            )
        if late > issued * (1 - scenario.percentile / 100):
            reasons.append(
                f"{late} of {issued} queries took longer than {scenario.latency_bound_s * 1e3:g} ms; "
                f"{100 - scenario.percentile:g} % may."
            )
        elif not is_proven(issued, late, scenario.percentile):
            reasons.append(_too_few(issued, queries_needed(late, scenario.percentile), scenario.percentile))
        return _result(scenario, latency, issued, len(moments), max(moments, default=end - start), reasons)


def _too_few(queries: int, needed: int, percentile: float) -> str:
    return (
        f"{queries} queries are too few to prove the {percentile:g}th percentile with {CONFIDENCE:.0%} confidence; "
        f"with as few late ones {needed} do."
    )


def _result(
    scenario: Scenario, latency: Latency, queries: int, samples: int, seconds: float, reasons: Sequence[str]
) -> ScenarioResult:
    # A clock that stands still is one that tests made.
    throughput = samples / seconds if seconds > 0 else 0.0
    verdict: Verdict = "INVALID" if reasons else "VALID"
    return ScenarioResult(
        scenario, NAME, accelrt.__version__, queries, samples, seconds, latency, throughput, verdict, tuple(reasons)
    )
