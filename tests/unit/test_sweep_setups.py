"""A sweep over set-ups: every combination is a row, in order; failures have reasons, an interrupt keeps what was done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import accelrt
from accelrt.backend import Backend
from accelrt.cli import app
from accelrt.data import digits_model
from accelrt.errors import CoresUnavailable, OptionError, SourceError, TargetError, UnsupportedNodes
from accelrt.plots import setups as setups_plot
from accelrt.registry import REGISTRY
from accelrt.runtime.occupancy import cores
from accelrt.scenarios import Effort
from accelrt.scenarios import sweep_setups as sweep_module
from accelrt.scenarios.sweep_setups import Setup, SetupRow, combinations, sweep_setups
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import mlp
from accelrt_neuron import NeuronBackend

DIGITS = str(digits_model())
EFFORT = Effort(0.01, 5, 1)


@pytest.fixture
def npu() -> Iterator[type[Backend]]:
    """Two exclusive devices."""
    yield accelrt.register(FakeBackend.configured("npu", devices=2, exclusive=True))
    REGISTRY.unregister("npu")


@pytest.fixture
def neuron() -> Iterator[None]:
    """The backend of Neuron, registered unless it is installed."""
    present = "neuron" in REGISTRY.names()
    if not present:
        accelrt.register(NeuronBackend)
    yield
    if not present:
        REGISTRY.unregister("neuron")


@pytest.fixture
def perceptron(tmp_path: Path) -> str:
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp(batch=1), path)
    return str(path)


def run(model: Any, setups: Any, **more: Any) -> list[SetupRow]:
    return list(sweep_setups(model, setups, EFFORT, driver="plain", **more))


NUMBERS = st.lists(st.integers(1, 64), unique=True, max_size=3)


@given(NUMBERS, NUMBERS, NUMBERS, st.lists(st.sampled_from(["fp32", "bf16", "int8"]), unique=True))
def test_combinations_are_all_there_once_in_order(
    batches: list[int], stages: list[int], replicas: list[int], precisions: list[str]
) -> None:
    found = combinations(
        ["cpu", "cpu/openvino"], precisions=precisions, batches=batches, cores=stages, replicas=replicas
    )
    lists = (precisions, batches, stages, replicas)
    assert len(found) == len(set(found)) == 2 * math.prod(max(1, len(each)) for each in lists)
    assert [setup.target for setup in found] == sorted((setup.target for setup in found), key=len)
    fastest = [setup.replicas for setup in found][: max(1, len(replicas))]
    assert fastest == (replicas or [None])
    assert {setup.batch for setup in found} == set(batches or [None])


@pytest.mark.parametrize(
    "more, error",
    [
        ({"batches": [1, 1]}, OptionError),
        ({"cores": [0]}, OptionError),
        ({"replicas": [True]}, OptionError),
        ({"precisions": ["fp33"]}, OptionError),
        ({"targets": []}, OptionError),
        ({"targets": ["c p u"]}, TargetError),
    ],
)
def test_what_cannot_be_combined_is_refused_at_once(more: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        combinations(**{"targets": ["cpu"], **more})


def test_failures_are_rows_and_the_sweep_goes_on(npu: type[Backend]) -> None:
    rows = run(DIGITS, combinations(["npu", "cpu/absent", "cpu"], replicas=[3, 1]))
    assert [(row.setup.target, row.setup.replicas) for row in rows] == [
        ("npu", 3), ("npu", 1), ("cpu/absent", 3), ("cpu/absent", 1), ("cpu", 3), ("cpu", 1),
    ]  # fmt: skip
    assert [row.measured for row in rows] == [False, True, False, False, True, True]
    assert isinstance(rows[0].error, CoresUnavailable) and rows[0].stage == "load"
    assert "room for 2 among 2" in rows[0].reason
    assert isinstance(rows[2].error, TargetError) and rows[2].stage == "compile"
    assert [row.nature for row in rows] == ["stand-in", "stand-in", None, None, "real", "real"]
    good = rows[1]
    assert good.latency is not None and good.offline is not None
    assert good.latency.queries >= 5 and good.rows_per_s == good.offline.throughput > 0
    assert good.nodes_by_engine == {"npu/fake": 10} and good.elsewhere == {}
    assert not any(core.holders for core in cores("npu").cores), "every session was closed"


def test_figures_of_something_else_are_a_failure(npu: type[Backend]) -> None:
    accelrt.register(FakeBackend.configured("picky", operators={"Gemm"}))
    accelrt.register(FakeBackend.configured("none", operators=set()))
    try:
        some, nothing = run(DIGITS, combinations(["picky", "none"]))
        narrow, strict = run(DIGITS, [Setup("npu", "bf16")]) + run(DIGITS, [Setup("picky")], fallback="error")
    finally:
        for name in ("picky", "none"):
            REGISTRY.unregister(name)
    assert some.measured and "9 nodes on cpu/onnxruntime" in some.reason
    for row in (nothing, narrow):
        assert isinstance(row.error, UnsupportedNodes) and "No node runs on" in row.reason
    assert "npu/fake in bf16" in narrow.reason
    assert isinstance(strict.error, UnsupportedNodes) and strict.stage == "compile"


def test_a_failing_run_is_not_answered_by_the_cpu() -> None:
    accelrt.register(FakeBackend.configured("frail", fails_to_run=lambda kinds, call: call > 2))
    try:
        (row,) = run(DIGITS, combinations(["frail"]))
    finally:
        REGISTRY.unregister("frail")
    assert row.stage == "run" and not row.measured
    assert row.rows_per_s is None


def test_a_model_that_is_compiled_or_absent_is_refused(tmp_path: Path) -> None:
    artifact = accelrt.compile(DIGITS)
    for model in (artifact, artifact.save(tmp_path / "digits.accel")):
        with pytest.raises(OptionError, match="compiled already"):
            run(model, combinations(["cpu"]))
    with pytest.raises(SourceError, match="no file"):
        run(tmp_path / "absent.onnx", combinations(["cpu"]))


def test_batches_and_pipelines_are_measured(npu: type[Backend]) -> None:
    rows = run(DIGITS, combinations(["npu"], batches=[2, 4], cores=[1, 2, 3]))
    assert [(row.setup.batch, row.setup.cores, row.measured) for row in rows] == [
        (2, 1, True), (2, 2, True), (2, 3, False), (4, 1, True), (4, 2, True), (4, 3, False),
    ]  # fmt: skip
    for row in rows:
        if row.offline is not None and row.setup.batch is not None:
            assert row.rows_per_s == row.offline.throughput * row.setup.batch
    assert isinstance(rows[2].error, CoresUnavailable)


def test_a_model_of_fixed_batch_fails_as_rows(perceptron: str) -> None:
    (row,) = run(perceptron, combinations(["cpu"], batches=[4]))
    assert row.stage == "compile" and "fixed to 1" in row.reason


def test_the_verb_shows_a_table_marks_emulators_and_draws(neuron: None, perceptron: str, tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    arguments = ["sweep", perceptron, "-b", "cpu", "-b", "neuron/emulator", "--replicas", "1,3", "--seconds", "0.01"]
    done = CliRunner().invoke(app, [*arguments, "--driver", "plain", "--plot", str(page)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == ["cpu", "cpu", *["neuron/emulator (emulated)"] * 2]
    assert "failed [1]" in lines[5]
    (footnote,) = (line for line in lines if line.startswith("[1]"))
    assert "CoresUnavailable" in footnote and "load:" in footnote
    assert any("say nothing about its speed" in line for line in lines)
    html = page.read_text()
    assert html.count("<tr>") == 5 and "CoresUnavailable" in html and "say nothing about its speed" in html


def test_the_document_says_everything(perceptron: str) -> None:
    arguments = ["sweep", perceptron, "-b", "cpu/onnxruntime", "-b", "cpu/absent", "--seconds", "0.01", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--driver", "plain"])
    found = json.loads(done.stdout)
    assert (found["combinations"], found["interrupted"], found["note"], found["driver"]) == (2, False, None, "plain")
    good, bad = found["rows"]
    assert good["status"] == "measured" and good["error"] is None and good["single_stream"]["queries"] >= 10
    assert bad["status"] == "failed" and bad["rows_per_s"] is None
    assert bad["error"]["type"] == "TargetError" and bad["error"]["stage"] == "compile"
    chart = setups_plot.chart_of(found)
    assert [curve.label for curve in chart.curves] == ["cpu/onnxruntime, fp32"]
    assert "1 of 2 combinations failed" in chart.subtitle


def test_if_nothing_could_be_measured_it_says_so(perceptron: str, tmp_path: Path) -> None:
    page = tmp_path / "sweep.png"
    done = CliRunner().invoke(app, ["sweep", perceptron, "-b", "cpu/absent", "--plot", str(page)])
    assert done.exit_code == 1 and "Nothing was measured" in done.output
    assert not page.exists()
    for bad in (["--batch", "1,x"], ["--seconds", "0"]):
        assert CliRunner().invoke(app, ["sweep", perceptron, *bad]).exit_code == 2
    assert CliRunner().invoke(app, ["sweep", perceptron, "--plot", "sweep.pdf"]).exit_code == 3


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_keeps_what_was_measured(
    npu: type[Backend], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    calls = 0
    measure = sweep_module.measure

    def interrupted(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first scenario of the second combination
            raise KeyboardInterrupt
        return measure(*arguments, **more)

    monkeypatch.setattr(sweep_module, "measure", interrupted)
    arguments = ["sweep", DIGITS, "-b", "npu", "--replicas", "1,2", "--seconds", "0.01", "--driver", "plain"]
    done = CliRunner().invoke(app, [*arguments, *(["--json"] if as_json else [])])
    assert done.exit_code == 130
    if as_json:
        found = json.loads(done.stdout)
        assert (found["interrupted"], found["combinations"], len(found["rows"])) == (True, 2, 1)
        assert found["rows"][0]["status"] == "measured"
    else:
        assert "Stopped after 1 of 2 combinations." in done.stdout and "npu (stand-in)" in done.stdout
    assert not any(core.holders for core in cores("npu").cores), "the session was closed"
