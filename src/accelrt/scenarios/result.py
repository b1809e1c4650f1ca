"""What a scenario measured. Times are in seconds here and in milliseconds in reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from accelrt.scenarios.scenario import PERCENTILES, Offline, Scenario, scenario_to_json
from accelrt.scenarios.statistics import percentile_of

Verdict: TypeAlias = Literal["VALID", "INVALID"]


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies of ``n`` queries in seconds (of samples, in the offline scenario)."""

    n: int
    mean_s: float
    min_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p97_s: float
    p99_s: float
    p99_9_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarise latencies; there must be one at least."""
        ordered = sorted(seconds)
        p50, p90, p95, p97, p99, p99_9 = (percentile_of(ordered, percent) for percent in PERCENTILES)
        mean = sum(ordered) / len(ordered)
        return cls(len(ordered), mean, ordered[0], p50, p90, p95, p97, p99, p99_9, ordered[-1])

    def at(self, percentile: float) -> float:
        """Return one of the `accelrt.scenarios.scenario.PERCENTILES`."""
        return float(getattr(self, f"p{percentile:g}_s".replace(".", "_")))

    def to_json(self) -> dict[str, Any]:
        """Return the figures in milliseconds: ``p99_ms``."""
        names = ("mean", "min", "p50", "p90", "p95", "p97", "p99", "p99_9", "max")
        return {"n": self.n, **{f"{name}_ms": getattr(self, f"{name}_s") * 1e3 for name in names}}


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """One run of a scenario.

    Attributes:
        scenario: What was asked.
        driver: Who drove: ``plain`` or ``loadgen``; ``driver_version`` is that of its package.
        queries: Queries that were issued.
        samples: Samples in them.
        duration_s: From the first query (in the server scenario from the start of the schedule) to the last answer.
        latency: Of queries, from when they were due; in the offline scenario of samples, from the start.
        throughput: Samples answered a second.
        verdict: Whether the figures prove what they say; if not, ``reasons`` says why.
    """

    scenario: Scenario
    driver: str
    driver_version: str
    queries: int
    samples: int
    duration_s: float
    latency: Latency
    throughput: float
    verdict: Verdict
    reasons: tuple[str, ...] = ()

    @property
    def percentile(self) -> float:
        """The percentile that the scenario is about; the 99th where it is about none."""
        return 99.0 if isinstance(self.scenario, Offline) else self.scenario.percentile

    @property
    def percentile_s(self) -> float:
        """Latency at the scenario's percentile, in seconds."""
        return self.latency.at(self.percentile)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, times in milliseconds except ``duration_s``."""
        return {
            "scenario": scenario_to_json(self.scenario),
            "driver": {"name": self.driver, "version": self.driver_version},
            "queries": self.queries,
            "samples": self.samples,
            "duration_s": self.duration_s,
            "latency": self.latency.to_json(),
            "percentile": self.percentile,
            "percentile_ms": self.percentile_s * 1e3,
            "throughput_per_s": self.throughput,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
        }
