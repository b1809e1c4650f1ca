"""The mathematics of the scenarios: arrivals, percentiles, and how many queries a percentile takes. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

CONFIDENCE = 0.99
"""With which a verdict about a percentile must hold; MLPerf's rules for ending a run early have it so."""

_BLOCK = 1024

Times: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def poisson_arrivals(rate: float, seconds: float, queries: int, seed: int) -> Times:
    """Return the times of a Poisson process, in seconds from the start, increasing.

    Gaps are exponential with mean ``1 / rate``. There are at least ``queries`` of them, and the last is the first one
    at or past ``seconds``, so that a run lasts as long as it is to. The same seed gives the same times, and a longer
    run begins with those of a shorter one.
    """
    generator = np.random.default_rng(seed)
    blocks: list[Times] = []
    total, last = 0, 0.0
    while total < queries or last < seconds:
        block = last + np.cumsum(generator.exponential(1 / rate, _BLOCK))
        blocks.append(block)
        total, last = total + _BLOCK, float(block[-1])
    times = np.concatenate(blocks)
    return times[: max(queries, int(np.searchsorted(times, seconds)) + 1)]


def percentile_of(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted values: the one at index ``floor(n * percent / 100)``, as LoadGen has it.

    It is a value that was measured, and never less than what any usual definition between two of them would say.
    """
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * (percent / 100)))])


def is_proven(queries: int, late: int, percent: float) -> bool:
    """Tell whether so few were late that, with `CONFIDENCE`, the share of late ones is below ``1 - percent / 100``.

    The test is exact: were the true share just that, ``late`` or fewer of ``queries`` would have to be less likely
    than ``1 - CONFIDENCE``.
    """
    share = 1 - percent / 100
    if queries == 0 or late >= queries * share:
        return False
    return _binomial_tail(queries, late, share) <= 1 - CONFIDENCE


def queries_needed(late: int, percent: float) -> int:
    """Return the least number of queries at which ``late`` late ones still prove the percentile."""
    low, high = late, max(2, late * 2)
    while not is_proven(high, late, percent):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_proven(middle, late, percent) else (middle, high)
    return high


def _binomial_tail(n: int, k: int, share: float) -> float:
    """Return the probability of ``k`` or fewer among ``n`` that each have the probability ``share``."""
    logs = np.array(
        [
            math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            + i * math.log(share) + (n - i) * math.log1p(-share)
            for i in range(k + 1)
        ]
    )  # fmt: skip
    return float(np.exp(logs).sum())
