"""What is to be best, and the choice among measured candidates: pure, so that equal figures give equal choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from accelrt.artifact.candidates import CandidateRow, Measurement, Objective
from accelrt.backend import Precision
from accelrt.errors import OptionError

INDISTINGUISHABLE = 0.02
"""Figures nearer than this are noise: runs of one program differ as much on a quiet machine."""

_SAMPLES_BEYOND = 2
"""Calls that must lie beyond a percentile before it is more than the largest value seen."""

_LEAST_SAMPLES = 20
_EXACTEST_FIRST: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be best, and within which bound.

    Attributes:
        objective: ``latency`` (least median of a call), ``throughput`` (most rows a second) or ``memory`` (least).
        latency_budget_s: Most seconds of a call at the percentile; None for no bound.
        percentile: Of latency, above 0 and below 100.
    """

    objective: Objective = "latency"
    latency_budget_s: float | None = None
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise OptionError(f"objective must be one of {', '.join(get_args(Objective))}, not {self.objective!r}.")
        if not _is_number(self.percentile) or not 0 < self.percentile < 100:
            raise OptionError(f"percentile must lie between 0 and 100, not {self.percentile!r}.")
        budget = self.latency_budget_s
        if budget is not None and not (_is_number(budget) and 0 < budget < math.inf):
            raise OptionError(f"latency_budget must be a number of seconds above 0, not {budget!r}.")

    @property
    def samples(self) -> int:
        """Calls that the percentile needs."""
        return max(_LEAST_SAMPLES, math.ceil(round(_SAMPLES_BEYOND * 100 / (100 - self.percentile), 6)))

    def cost(self, measured: Measurement) -> float:
        """Return what is to be least."""
        match self.objective:
            case "latency":
                return measured.median_s
            case "throughput":
                return 1 / measured.rows_per_s
            case _:
                return float(measured.memory_bytes)

    def hope(self, measured: Measurement) -> float:
        """Return what the cost may be on a quiet machine: a short measurement may have met a busy one."""
        if self.objective == "memory":
            return self.cost(measured)
        return self.cost(measured) * min(1.0, measured.best_s / measured.median_s)

    def excess(self, measured: Measurement) -> str | None:
        """Return how a candidate exceeds the budget, None if it does not."""
        if self.latency_budget_s is None or measured.percentile_s <= self.latency_budget_s:
            return None
        return (
            f"its p{self.percentile:g} of {measured.percentile_s * 1e3:.3g} ms exceeds the budget of "
            f"{self.latency_budget_s * 1e3:g} ms"
        )

    def choose(self, rows: Sequence[CandidateRow]) -> CandidateRow:
        """Return the best of measured rows; of those that noise cannot tell from it, the most exact."""
        costs = {index: self.cost(row.measured) for index, row in enumerate(rows)}
        least = min(costs.values())
        near = [index for index, cost in costs.items() if cost <= least * (1 + INDISTINGUISHABLE)]
        return rows[min(near, key=lambda i: (_EXACTEST_FIRST.index(rows[i].setup.precision), costs[i], i))]

    def compare(self, row: CandidateRow, chosen: CandidateRow) -> str:
        """Say why a measured row is not the chosen one."""
        ratio = self.cost(row.measured) / self.cost(chosen.measured)
        if abs(ratio - 1) <= INDISTINGUISHABLE:
            return "as good as the chosen one; of two that noise cannot tell apart the more exact one is taken"
        what = {"latency": "the latency", "throughput": "the time a row", "memory": "the memory"}[self.objective]
        return f"{ratio:.2f} times {what} of the chosen one"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
