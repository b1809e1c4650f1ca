"""What is asked of a session: who sends queries when, and how long one measures. Plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeAlias

from accelrt.errors import OptionError

PERCENTILES = (50.0, 90.0, 95.0, 97.0, 99.0, 99.9)
"""Those that LoadGen reports, so that both drivers can answer for each."""


class Feedable(Protocol):
    """What a scenario needs of a session: the public way in."""

    def predict(self, *inputs: Any) -> Mapping[str, Any]:
        """Compute one call in the caller's thread."""

    def submit(self, *inputs: Any) -> Future[Any]:
        """Queue one call."""

    def map(self, items: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
        """Compute many calls, several at once, in order."""


@dataclass(frozen=True, slots=True)
class SingleStream:
    """One caller sends the next query when the last one is answered; what counts is latency at ``percentile``."""

    name: ClassVar[str] = "single-stream"
    percentile: float = 90.0

    def __post_init__(self) -> None:
        _check_percentile(self.percentile)


@dataclass(frozen=True, slots=True)
class MultiStream:
    """One caller sends queries of several samples at once; latency is that of the last of them."""

    name: ClassVar[str] = "multi-stream"
    samples_per_query: int = 8
    percentile: float = 99.0

    def __post_init__(self) -> None:
        _check_percentile(self.percentile)
        if not 1 <= self.samples_per_query <= 65536:
            raise OptionError(f"samples_per_query must be 1 to 65536, not {self.samples_per_query}.")


@dataclass(frozen=True, slots=True)
class Server:
    """Single samples arrive at random (a Poisson process), whether earlier ones are answered or not.

    Attributes:
        target_qps: Mean rate of arrivals, in queries a second.
        latency_bound_s: What the latency at ``percentile`` must not exceed, in seconds.
        percentile: One of `PERCENTILES`.
    """

    name: ClassVar[str] = "server"
    target_qps: float
    latency_bound_s: float
    percentile: float = 99.0

    def __post_init__(self) -> None:
        _check_percentile(self.percentile)
        if not (math.isfinite(self.target_qps) and self.target_qps > 0):
            raise OptionError(f"target_qps must be a positive rate, not {self.target_qps}.")
        if not (math.isfinite(self.latency_bound_s) and self.latency_bound_s > 0):
            raise OptionError(f"latency_bound_s must be a positive time in seconds, not {self.latency_bound_s}.")


@dataclass(frozen=True, slots=True)
class Offline:
    """All samples are there from the start; what counts is how many are done in a second.

    Latencies are counted from that start, as MLPerf has it: they say how long a batch of work takes, not one call.
    """

    name: ClassVar[str] = "offline"


Scenario: TypeAlias = SingleStream | MultiStream | Server | Offline


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: until both minima are reached.

    Attributes:
        seconds: Least duration of what is measured.
        queries: Least number of queries; of samples in the offline scenario. LoadGen's own default is 100.
        warmup: Calls before anything is measured, in the caller's thread and as many again through the pool.
        seed: Of arrivals and of the order of samples.
    """

    seconds: float = 10.0
    queries: int = 100
    warmup: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise OptionError(f"seconds must be 0 or more, not {self.seconds}.")
        if self.queries < 1 or self.warmup < 1 or self.seed < 0:
            raise OptionError(f"queries and warmup must be 1 or more and seed 0 or more, not {self}.")


def scenario_to_json(scenario: Scenario) -> dict[str, Any]:
    """Return a scenario as plain data: its name and what it was given."""
    return {"name": scenario.name, **{field.name: getattr(scenario, field.name) for field in fields(scenario)}}


def _check_percentile(percentile: float) -> None:
    if percentile not in PERCENTILES:
        known = ", ".join(f"{each:g}" for each in PERCENTILES)
        raise OptionError(f"percentile must be one of {known}, not {percentile}.")
