"""Time calls until the times agree, and choose among contestants that take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

WINDOW = 5
"""Calls whose median makes one figure."""
AGREE = 0.03
"""Two windows in a row agree if their medians differ by this share at most."""
SETTLE_S = 2.0
"""Time after which what was measured of one contestant must do, agreed or not."""
HOPELESS = 3.0
"""Who takes so many times the best is not timed on."""
LEAST_ROUNDS, MOST_ROUNDS = 9, 300
CONTEST_S = 6.0
"""Time after which a contest ends with what it has."""
SHOWN = 0.01
"""Slower by more than this share, with 95 % confidence, is slower; anything less is a tie."""
TOLERATED = 0.03
"""Nobody whose median is higher than the best by more than this share wins by a tie."""
_CONFIDENT = 0.98
"""The rank of a median spreads by sqrt(n) / 2, and 95 % of a normal distribution lie within 1.96 times that."""


def settle(run: Callable[[], object], *, best_s: float = math.inf) -> list[float]:
    """Call until two windows agree, time is up, or it is clear that this is no match for ``best_s``.

    The first call warms up and is not counted.

    Returns:
        The seconds of each call that counts; 3 at the least.
    """
    run()
    end = time.perf_counter() + SETTLE_S
    times: list[float] = []
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        times.append(now - start)
        if len(times) < 3:
            continue
        if now >= end or (len(times) >= WINDOW and median(times) > HOPELESS * best_s):
            return times
        if len(times) % WINDOW == 0 and len(times) >= 2 * WINDOW:
            before, last = median(times[-2 * WINDOW : -WINDOW]), median(times[-WINDOW:])
            if abs(before - last) <= AGREE * min(before, last):
                return times


def take_turns(runs: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Time contestants in turn, the order turned by one place each round, until their ratios are known or time is up.

    Noise that lasts longer than a call hits all of them alike, so that the ratio within a round is steadier than
    either time.

    Returns:
        For each contestant its seconds in each round.
    """
    for run in runs:
        run()
    samples: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + CONTEST_S
    for number in range(MOST_ROUNDS):
        turn = number % len(runs)
        for index in (*range(turn, len(runs)), *range(turn)):
            start = time.perf_counter()
            runs[index]()
            samples[index].append(time.perf_counter() - start)
        if number + 1 >= LEAST_ROUNDS and (time.perf_counter() >= end or _is_decided(samples)):
            break
    return samples


def choose(samples: Sequence[Sequence[float]], costs: Sequence[Any]) -> int:
    """Return the number of the contestant with the least cost among the fastest and those that tie with it.

    Args:
        samples: For each contestant its seconds in each round, rounds taken together.
        costs: What decides a tie, comparable.
    """
    fastest = min(range(len(samples)), key=lambda number: median(samples[number]))
    tied = [number for number in range(len(samples)) if _ties(samples[number], samples[fastest])]
    return min(tied, key=lambda number: (costs[number], median(samples[number])))


def _ties(times: Sequence[float], best: Sequence[float]) -> bool:
    if times is best:
        return True
    low, _ = _ratio(times, best)
    return low <= 1 + SHOWN and median(times) <= median(best) * (1 + TOLERATED)


def _is_decided(samples: Sequence[Sequence[float]]) -> bool:
    """Tell whether more rounds would not change who is faster than whom, or by so little that it is all the same."""
    best = min(samples, key=median)
    for times in samples:
        if times is best:
            continue
        low, high = _ratio(times, best)
        if low <= 1 + TOLERATED and high - low > SHOWN:
            return False
    return True


def _ratio(times: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Return bounds within which the median of the ratios of one round lies, 95 % of the time."""
    ratios = sorted(mine / its for mine, its in zip(times, best, strict=True))
    spread = _CONFIDENT * math.sqrt(len(ratios))
    low = max(0, math.floor(len(ratios) / 2 - spread))
    high = min(len(ratios) - 1, math.ceil(len(ratios) / 2 + spread))
    return ratios[low], ratios[high]
