"""The search: in which order set-ups are tried, which are not worth trying, and who wins. Pure but for its `Bench`.

First every engine in every precision that the tolerance allows, with the options that suit the objective. Then other
threads, callers and batches, of those only that were not far behind. At last those that are close to the best take
turns, so that whatever else the machine does hits all of them alike, until there are enough calls to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from accelrt.artifact.candidates import CandidateRow, Measurement, Setup
from accelrt.errors import NoCandidate
from accelrt.tune.goal import Goal

WORTH_VARYING = 1.5
"""A set-up this many times as costly as the best is not tried with other options: they rarely bring more."""

FINAL = 1.25
"""How far from the best, in the first short measurement, a set-up may be to take part in the final."""

FINALISTS = 6


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine in a precision: the set-up to begin with, others to try after it, or why it is not tried."""

    base: Setup
    variants: tuple[Setup, ...] = ()
    excluded: str | None = None
    nature: str = "real"


class Bench(Protocol):
    """Where set-ups are tried."""

    def try_out(self, setup: Setup) -> CandidateRow:
        """Compile, verify and measure; the row has a measurement, or it is rejected with the reason."""

    def keep(self, setups: Sequence[Setup]) -> None:
        """Let go of all set-ups but these."""

    def final(self, setups: Sequence[Setup]) -> list[Measurement | str]:
        """Measure set-ups against each other; one that fails has the reason instead."""


Say = Callable[[str, int, int], None]


def search(contenders: Sequence[Contender], goal: Goal, bench: Bench, say: Say) -> tuple[CandidateRow, ...]:
    """Try what is worth trying and choose.

    Returns:
        The rows of the table: the chosen one, the measured ones from best to worst, the others.

    Raises:
        NoCandidate: None is verified and within the budget; its ``rows`` say why.
    """
    rows = [_excluded(contender) for contender in contenders if contender.excluded is not None]
    open_ = [contender for contender in contenders if contender.excluded is None]
    tried: list[CandidateRow] = []
    total = len(open_) + 1

    def attempt(setup: Setup) -> CandidateRow:
        best = _best(tried, goal)
        so_far = "" if best is None else f"; best so far: {best.setup}, {_figure(best, goal)}"
        say(f"trying {setup}{so_far}", len(tried), total)
        row = bench.try_out(setup)
        tried.append(row)
        bench.keep([row.setup for row in _front(tried, goal)])
        return row

    bases = [(contender, attempt(contender.base)) for contender in open_]
    best = _best(tried, goal)
    if best is not None:
        limit = goal.hope(best.measured) * WORTH_VARYING
        worth = [c for c, row in bases if row.measurement is not None and goal.hope(row.measurement) <= limit]
        variants = [setup for contender in worth for setup in contender.variants]
        total += len(variants)
        for setup in variants:
            attempt(setup)
    finalists = _front(tried, goal)
    if finalists:
        say(f"final between {len(finalists)}", total - 1, total)
    finals = dict(zip((str(row.setup) for row in finalists), bench.final([r.setup for r in finalists]), strict=True))
    tried = [_after_final(row, finals.get(str(row.setup))) for row in tried]
    eligible = [r for r in tried if str(r.setup) in finals and r.measurement and not goal.excess(r.measurement)]
    if not eligible:
        raise _none(rows, tried, goal)
    say(f"chose {goal.choose(eligible).setup}", total, total)
    return _ordered(goal.choose(eligible), eligible, tried, rows, goal)


def _ordered(
    chosen: CandidateRow,
    eligible: Sequence[CandidateRow],
    tried: Sequence[CandidateRow],
    others: Sequence[CandidateRow],
    goal: Goal,
) -> tuple[CandidateRow, ...]:
    """Return the rows of a table, each with its reason."""
    measured = sorted((r for r in tried if r.measurement and r is not chosen), key=lambda r: goal.cost(r.measured))
    return (
        replace(chosen, status="chosen", reason=_praise(chosen, eligible, goal)),
        *(replace(row, reason=_verdict(row, chosen, goal)) for row in measured),
        *(row for row in tried if row.measurement is None),
        *others,
    )


def _excluded(contender: Contender) -> CandidateRow:
    return CandidateRow(contender.base, "rejected", contender.excluded or "", contender.nature)


def _best(rows: Sequence[CandidateRow], goal: Goal) -> CandidateRow | None:
    """Return the least costly row, one within the budget before one that is not."""
    measured = [row for row in rows if row.measurement is not None]
    return min(
        measured,
        key=lambda r: (goal.excess(r.measured) is not None, goal.hope(r.measured)),
        default=None,
    )


def _front(rows: Sequence[CandidateRow], goal: Goal) -> list[CandidateRow]:
    """Return the rows that may still win, best first."""
    if (best := _best(rows, goal)) is None:
        return []
    within = goal.excess(best.measured) is None
    near = [
        row
        for row in rows
        if row.measurement is not None
        and goal.hope(row.measurement) <= goal.hope(best.measured) * FINAL
        and (goal.excess(row.measurement) is None) == within
    ]
    return sorted(near, key=lambda row: goal.hope(row.measured))[:FINALISTS]


def _after_final(row: CandidateRow, found: Measurement | str | None) -> CandidateRow:
    if found is None:
        return row
    if isinstance(found, str):
        return replace(row, measurement=None, reason=found)
    return replace(row, measurement=found)


def _praise(chosen: CandidateRow, eligible: Sequence[CandidateRow], goal: Goal) -> str:
    others = [goal.cost(row.measured) for row in eligible if row is not chosen]
    if others and min(others) < goal.cost(chosen.measured):
        return "the most exact of those that noise cannot tell from the best"
    return {"latency": "least latency", "throughput": "most rows a second", "memory": "least memory"}[goal.objective]


def _verdict(row: CandidateRow, chosen: CandidateRow, goal: Goal) -> str:
    return goal.excess(row.measured) or goal.compare(row, chosen)


def _none(excluded: Sequence[CandidateRow], tried: Sequence[CandidateRow], goal: Goal) -> NoCandidate:
    rows = (
        *(
            row if row.measurement is None else replace(row, reason=goal.excess(row.measurement) or row.reason)
            for row in tried
        ),
        *excluded,
    )
    reasons = "\n".join(f"  {row.setup}: {row.reason}" for row in rows)
    slow = any(row.measurement is not None for row in rows)
    error = NoCandidate(
        f"None of {len(rows)} candidates is verified{' and within the latency budget' if slow else ''}:\n{reasons}",
        hint="A larger tolerance allows more precisions." if not slow else "Allow more latency, or more error.",
    )
    error.rows = rows
    return error


def _figure(row: CandidateRow, goal: Goal) -> str:
    measured = row.measured
    match goal.objective:
        case "latency":
            return f"{measured.median_s * 1e3:.3g} ms"
        case "throughput":
            return f"{measured.rows_per_s:.4g} a second"
        case _:
            return f"{measured.memory_bytes / 1e6:.0f} MB"


def choose_recorded(
    contenders: Sequence[Contender], goal: Goal, recorded: Sequence[CandidateRow]
) -> tuple[CandidateRow, ...]:
    """Choose among set-ups that were tried earlier, by their figures; the same figures give the same choice.

    Returns:
        The rows of the table, as `search` does; what is not recorded, and what cannot be tried here, says so.

    Raises:
        NoCandidate: None that can be tried here was verified and is within the budget.
    """
    excluded = {str(contender.base): contender.excluded for contender in contenders if contender.excluded is not None}
    here = {str(s) for c in contenders if c.excluded is None for s in (c.base, *c.variants)}
    known = {str(row.setup) for row in recorded}
    new = [replace(_excluded(c), reason=c.excluded or _UNKNOWN) for c in contenders if str(c.base) not in known]
    rows = [_as_tried(row, str(row.setup) in here, excluded.get(str(row.setup))) for row in recorded]
    measured = [row for row in rows if row.measurement is not None]
    eligible = [row for row in measured if goal.excess(row.measured) is None]
    finalists = [row for row in eligible if row.measured.final] or eligible
    if not finalists:
        raise _none(new, rows, goal)
    return _ordered(goal.choose(finalists), finalists, rows, new, goal)


_UNKNOWN = "not in the recorded profile"


def _as_tried(row: CandidateRow, here: bool, excluded: str | None) -> CandidateRow:
    """Return a recorded row as it would be if it had just been tried here."""
    if row.measurement is None:
        return replace(row, status="rejected")
    if here:
        return replace(row, status="rejected", reason="")
    return replace(row, status="rejected", reason=excluded or "cannot be tried here", measurement=None)
