"""The highest rate of random arrivals that a latency bound allows, and the curve of latency on the way there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelrt.errors import OptionError
from accelrt.scenarios import plain
from accelrt.scenarios.drivers import DriverName, measure, warm_up
from accelrt.scenarios.result import ScenarioResult
from accelrt.scenarios.scenario import Effort, Feedable, Offline, Server

RESOLUTION = 0.05
"""The search ends when the highest rate that holds and the lowest that does not are this close, relatively."""
STEPS = 14
_LADDER = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the offline throughput to begin with, for the flat part of the curve."""
_ABOVE, _LEAST = 2.0, 1 / 64
"""Shares of it between which the search stays: it was measured in a short run, so the truth may lie above. A bound that
does not hold at the lower one is not missed for want of capacity."""


@dataclass(frozen=True, slots=True)
class SweepStep:
    """One rate that was tried; ``within`` tells whether the percentile stayed within the bound."""

    target_qps: float
    within: bool
    result: ScenarioResult

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"target_qps": self.target_qps, "within": self.within, "result": self.result.to_json()}


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search for the highest rate.

    Attributes:
        latency_bound_s: The bound, in seconds.
        percentile: Of the latencies, which the bound is about.
        capacity: Samples a second in a short run of the offline scenario: about the highest rate that can last.
        steps: Every rate that was tried, in the order of trial.
        best_qps: The highest rate that stayed within the bound; None where not even the lowest did.
    """

    latency_bound_s: float
    percentile: float
    capacity: float
    steps: tuple[SweepStep, ...]
    best_qps: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data, times in milliseconds."""
        return {
            "latency_bound_ms": self.latency_bound_s * 1e3,
            "percentile": self.percentile,
            "capacity_per_s": self.capacity,
            "steps": [step.to_json() for step in self.steps],
            "best_qps": self.best_qps,
        }


def sweep(
    session: Feedable,
    samples: Sequence[Mapping[str, Any]],
    latency_bound_s: float,
    percentile: float = 99.0,
    effort: Effort | None = None,
    *,
    driver: DriverName = "auto",
    progress: Callable[[SweepStep], None] | None = None,
) -> Sweep:
    """Find the highest Poisson rate whose latency at ``percentile`` stays within the bound.

    Begins with shares of the offline throughput, then bisects on a logarithmic scale. Each step is a run of the
    server scenario for the seconds that ``effort`` says. A step holds if its percentile is within the bound; whether
    that is proven statistically is in its verdict.

    Args:
        session: As for `measure`.
        samples: As for `measure`.
        effort: As for `measure`.
        driver: As for `measure`.
        latency_bound_s: In seconds.
        percentile: One of `accelrt.scenarios.scenario.PERCENTILES`.
        progress: Called after each step.

    Raises:
        AccelrtError: Whatever `measure` raises.
    """
    effort = effort or Effort()
    if not samples:
        raise OptionError("There are no samples to measure with.", hint="Give at least one mapping of inputs.")
    scenario = Server(1.0, latency_bound_s, percentile)
    warm_up(session, samples, effort.warmup)
    short = replace(effort, seconds=min(effort.seconds, 2.0), queries=min(effort.queries, 20))
    capacity = plain.run(session, samples, Offline(), short).throughput
    steps: list[SweepStep] = []

    def holds(rate: float) -> bool:
        # The time is what is asked for: a least number of queries would take hours at the lowest rates.
        within_time = int(rate * effort.seconds) if effort.seconds > 0 else effort.queries
        step_effort = replace(effort, queries=max(1, min(effort.queries, within_time)))
        result = measure(session, samples, replace(scenario, target_qps=rate), step_effort, driver=driver)
        step = SweepStep(rate, result.percentile_s <= latency_bound_s, result)
        steps.append(step)
        if progress is not None:
            progress(step)
        return step.within

    best = search(holds, capacity)
    return Sweep(latency_bound_s, percentile, capacity, tuple(steps), best)


def search(holds: Callable[[float], bool], capacity: float) -> float | None:
    """Return the highest rate that held, None if none did; at most `STEPS` are tried."""
    low, high, tried = 0.0, capacity * _ABOVE, 0
    for share in _LADDER:
        tried += 1
        if holds(capacity * share):
            low = capacity * share
        else:
            high = capacity * share
            break
    while tried < STEPS and high > capacity * _LEAST and high / max(low, 1e-300) > 1 + RESOLUTION:
        tried += 1
        # Below the ladder there is no lower end yet: go down in big steps until one holds.
        rate = math.sqrt(low * high) if low else high / 4
        if holds(rate):
            low = rate
        else:
            high = rate
    return low or None
