"""The search behind `auto`, on benches whose figures are made up: who is tried, who wins, and that nothing is random."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelrt.artifact.candidates import CandidateRow, CandidateTable, Measurement, Setup
from accelrt.errors import NoCandidate, OptionError
from accelrt.tune.goal import INDISTINGUISHABLE, Goal
from accelrt.tune.search import FINALISTS, WORTH_VARYING, Contender, choose_recorded, search

QUIET = lambda *_: None  # noqa: E731


def measured(median_s: float, percentile_s: float | None = None, memory: int = 1 << 20) -> Measurement:
    return Measurement(100, median_s, percentile_s or median_s * 1.2, 1 / median_s, memory, 0.01, median_s, True)


class MadeUp:
    """A bench that answers from a dictionary and writes down what it was asked."""

    def __init__(
        self, answers: dict[str, Measurement | str], finals: dict[str, Measurement | str] | None = None
    ) -> None:
        self.answers, self.finals = answers, finals or {}
        self.tried: list[str] = []
        self.kept: set[str] = set()

    def try_out(self, setup: Setup) -> CandidateRow:
        self.tried.append(str(setup))
        self.kept.add(str(setup))
        answer = self.answers[str(setup)]
        if isinstance(answer, str):
            return CandidateRow(setup, "rejected", answer)
        return CandidateRow(setup, "rejected", "", error=0.0, measurement=answer)

    def keep(self, setups: Sequence[Setup]) -> None:
        self.kept &= {str(setup) for setup in setups}

    def final(self, setups: Sequence[Setup]) -> list[Measurement | str]:
        assert {str(setup) for setup in setups} <= self.kept, "a finalist was let go"
        found = [self.finals.get(str(setup), self.answers[str(setup)]) for setup in setups]
        return [one if isinstance(one, str) else dataclasses.replace(one, final=True) for one in found]


def setup(name: str, precision: str = "fp32", **options: int) -> Setup:
    return Setup(f"cpu/{name}", precision, options)


def test_the_fastest_wins_and_the_rest_say_why() -> None:
    a, b, c = setup("a"), setup("b"), setup("c")
    bench = MadeUp({str(a): measured(0.010), str(b): measured(0.004), str(c): "out of tolerance"})
    rows = search(
        [Contender(a), Contender(b), Contender(c), Contender(setup("d"), excluded="broken")], Goal(), bench, QUIET
    )
    assert [(row.setup.target, row.status) for row in rows] == [
        ("cpu/b", "chosen"), ("cpu/a", "rejected"), ("cpu/c", "rejected"), ("cpu/d", "rejected"),
    ]  # fmt: skip
    assert [row.reason for row in rows] == [
        "least latency",
        "2.50 times the latency of the chosen one",
        "out of tolerance",
        "broken",
    ]


def test_only_the_near_are_varied() -> None:
    fast, slow = setup("fast"), setup("slow")
    variants = (setup("fast", threads=1), setup("slow", threads=1))
    bench = MadeUp({
        str(fast): measured(0.010), str(slow): measured(0.010 * WORTH_VARYING * 1.01),
        str(variants[0]): measured(0.006),
    })  # fmt: skip
    rows = search([Contender(fast, variants[:1]), Contender(slow, variants[1:])], Goal(), bench, QUIET)
    assert rows[0].setup == variants[0]
    assert str(variants[1]) not in bench.tried


def test_noise_is_decided_for_the_more_exact() -> None:
    exact, coarse = setup("e", "fp32"), setup("c", "bf16")
    bench = MadeUp({str(exact): measured(0.0100), str(coarse): measured(0.0100 / (1 + INDISTINGUISHABLE * 0.9))})
    rows = search([Contender(coarse), Contender(exact)], Goal(), bench, QUIET)
    assert rows[0].setup == exact
    assert "more exact" in rows[1].reason
    bench = MadeUp({str(exact): measured(0.0100), str(coarse): measured(0.0090)})
    assert search([Contender(coarse), Contender(exact)], Goal(), bench, QUIET)[0].setup == coarse


def test_the_final_decides_and_may_lose_somebody() -> None:
    a, b = setup("a"), setup("b")
    first = {str(a): measured(0.010), str(b): measured(0.011)}
    turned = MadeUp(first, {str(a): measured(0.012), str(b): measured(0.009)})
    assert search([Contender(a), Contender(b)], Goal(), turned, QUIET)[0].setup == b
    died = MadeUp(first, {str(a): "running it was killed by SIGSEGV"})
    rows = search([Contender(a), Contender(b)], Goal(), died, QUIET)
    assert rows[0].setup == b
    assert rows[1].reason == "running it was killed by SIGSEGV"
    assert rows[1].measurement is None


def test_who_met_a_busy_machine_is_not_out_of_the_final() -> None:
    calm, unlucky = setup("calm"), setup("unlucky")
    first = {str(calm): measured(0.010), str(unlucky): dataclasses.replace(measured(0.016), spread=0.6, best_s=0.009)}
    bench = MadeUp(first, {str(unlucky): measured(0.008)})  # type: ignore[arg-type]
    assert search([Contender(calm), Contender(unlucky)], Goal(), bench, QUIET)[0].setup == unlucky


def test_a_budget_comes_before_speed() -> None:
    steady, quick = setup("steady"), setup("quick")
    bench = MadeUp({str(steady): measured(0.010, 0.011), str(quick): measured(0.005, 0.050)})
    rows = search([Contender(quick), Contender(steady)], Goal(latency_budget_s=0.020), bench, QUIET)
    assert rows[0].setup == steady
    assert rows[1].reason == "its p99 of 50 ms exceeds the budget of 20 ms"
    with pytest.raises(NoCandidate, match="within the latency budget") as caught:
        search([Contender(quick), Contender(steady)], Goal(latency_budget_s=0.001), bench, QUIET)
    assert len(caught.value.rows) == 2


def test_nobody_left_is_an_error_with_all_reasons() -> None:
    bench = MadeUp({str(setup("a")): "out of tolerance"})
    with pytest.raises(NoCandidate, match=r"(?s)None of 2 candidates is verified:.*out of tolerance.*no device"):
        search([Contender(setup("a")), Contender(setup("b"), excluded="no device")], Goal(), bench, QUIET)


@pytest.mark.parametrize(
    ("objective", "winner"), [("latency", "cpu/quick"), ("throughput", "cpu/wide"), ("memory", "cpu/small")]
)
def test_objectives(objective: str, winner: str) -> None:
    answers = {
        str(setup("quick")): Measurement(100, 0.004, 0.005, 250, 300 << 20, 0.0, 0.004, True),
        str(setup("wide")): Measurement(100, 0.010, 0.012, 400, 300 << 20, 0.0, 0.010, True),
        str(setup("small")): Measurement(100, 0.009, 0.012, 110, 100 << 20, 0.0, 0.009, True),
    }
    contenders = [Contender(setup(name)) for name in ("quick", "wide", "small")]
    assert search(contenders, Goal(objective), MadeUp(answers), QUIET)[0].setup.target == winner  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"objective": "speed"}, {"percentile": 100}, {"percentile": 0}, {"percentile": True}, {"latency_budget_s": 0},
     {"latency_budget_s": float("nan")}, {"latency_budget_s": float("inf")}, {"latency_budget_s": "fast"}],
)  # fmt: skip
def test_wrong_goals(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Goal(**wrong)  # type: ignore[arg-type]


def test_percentiles_need_samples_beyond_them() -> None:
    assert Goal(percentile=99).samples == 200
    assert Goal(percentile=99.9).samples == 2000
    assert Goal(percentile=50).samples == 20


figures = st.one_of(
    st.builds(measured, st.floats(1e-5, 1), st.floats(1e-5, 1), st.integers(1 << 20, 1 << 30)),
    st.sampled_from(["out of tolerance", "killed by SIGSEGV"]),
)


@given(
    st.lists(st.tuples(figures, st.lists(figures, max_size=2), st.sampled_from(["fp32", "bf16", "int8"])), max_size=8),
    st.sampled_from(["latency", "throughput", "memory"]),
    st.one_of(st.none(), st.floats(1e-5, 1)),
)
def test_equal_figures_give_equal_choices(
    drawn: list[tuple[object, list[object], str]], objective: str, budget: float | None
) -> None:
    answers: dict[str, Measurement | str] = {}
    contenders = []
    for index, (base, others, precision) in enumerate(drawn):
        first = setup(f"e{index}", precision)
        variants = tuple(setup(f"e{index}", precision, threads=n + 1) for n in range(len(others)))
        answers |= {str(s): m for s, m in zip((first, *variants), (base, *others), strict=True)}  # type: ignore[misc]
        contenders.append(Contender(first, variants))
    goal = Goal(objective, budget)  # type: ignore[arg-type]
    bench = MadeUp(answers)
    try:
        rows = search(contenders, goal, bench, QUIET)
    except NoCandidate as error:
        # Every measured one exceeds the budget; nothing that could have won was thrown away.
        assert all(row.measurement is None or goal.excess(row.measurement) for row in error.rows)
        return
    chosen, *others_rows = rows
    assert chosen.status == "chosen"
    assert goal.excess(chosen.measured) is None
    assert all(row.status == "rejected" and row.reason for row in others_rows)
    assert len(rows) == len(set(bench.tried)) == len(bench.tried)
    assert len(bench.kept) <= FINALISTS
    within = [row for row in others_rows if row.measurement and goal.excess(row.measurement) is None]
    assert all(goal.cost(row.measured) * (1 + INDISTINGUISHABLE) >= goal.cost(chosen.measured) for row in within)
    table = CandidateTable(goal.objective, 99.0, budget, 0.01, "fp32 on cpu/onnxruntime", {"cpu:0": "a CPU"}, rows)
    again = CandidateTable.from_json(table.to_json())
    assert again == table
    assert search(contenders, goal, MadeUp(answers), QUIET) == rows
    assert choose_recorded(contenders, goal, again.rows) == rows
    assert table.chosen.setup == chosen.setup
    assert len(table.rejected) == len(rows) - 1
    assert "CHOSEN" in table.text()


def test_a_profile_knows_what_it_knows() -> None:
    row = CandidateRow(setup("a"), "chosen", "least latency", error=0.0, measurement=measured(0.01))
    faster = dataclasses.replace(row, setup=setup("gone"), status="rejected", measurement=measured(0.001))
    killed = dataclasses.replace(row, setup=setup("b"), status="rejected", reason="killed", measurement=None)
    contenders = [*(Contender(setup(name)) for name in "abc"), Contender(setup("d"), excluded="no device")]
    rows = choose_recorded(contenders, Goal(), [faster, row, killed])
    assert [(row.setup.target, row.reason) for row in rows] == [
        ("cpu/a", "least latency"),
        ("cpu/gone", "cannot be tried here"),
        ("cpu/b", "killed"),
        ("cpu/c", "not in the recorded profile"),
        ("cpu/d", "no device"),
    ]
    with pytest.raises(NoCandidate, match="exceeds the budget"):
        choose_recorded(contenders, Goal(latency_budget_s=0.001), [row])


def test_a_first_measurement_does_not_beat_a_final() -> None:
    lucky = CandidateRow(setup("lucky"), "rejected", "", measurement=measured(0.009))
    sure = CandidateRow(setup("sure"), "chosen", "", measurement=dataclasses.replace(measured(0.010), final=True))
    rows = choose_recorded([Contender(setup("lucky")), Contender(setup("sure"))], Goal(), [lucky, sure])
    assert rows[0].setup == setup("sure")
