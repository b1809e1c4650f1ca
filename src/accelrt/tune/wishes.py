"""What a user asks of ``auto``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.artifact.candidates import CandidateTable, Objective
    from accelrt.artifact.making import Progress
    from accelrt.backend import Precision
    from accelrt.policy import Fallback
    from accelrt.precision.calibrate import Calibration
    from accelrt.precision.compare import Tolerances


@dataclass(frozen=True, slots=True)
class Wishes:
    """The arguments of `accelrt.compile` that speak of the choice; they are explained there."""

    precision: Precision | None
    fallback: Fallback
    calibration: Calibration | Iterable[Any] | None
    verify: Any
    cache: bool
    progress: Progress | None
    objective: Objective = "latency"
    latency_budget_s: float | None = None
    percentile: float = 99.0
    tolerance: Tolerances | None = None
    profile: CandidateTable | Artifact | None = None
