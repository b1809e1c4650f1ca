"""The command line of scenarios, sweeps, plots and candidates."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import accelrt
from accelrt.artifact.artifact import Artifact
from accelrt.cli import app, bench_compare
from accelrt.cli.durations import parse_duration
from accelrt.data import digits_model

DIGITS = str(digits_model())
SHORT = ("--seconds", "0.1", "--warmup", "2")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELRT_BACKEND", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def invoke(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def document(*arguments: object, code: int = 0) -> Any:
    return json.loads(invoke(*arguments, "--json", code=code).stdout)


@pytest.mark.parametrize("driver", ["plain", "loadgen"])
@pytest.mark.parametrize(
    "scenario",
    [
        ("single-stream", "--percentile", "99"),
        ("multi-stream", "--samples-per-query", "3"),
        ("server", "--qps", "100", "--latency-bound", "500ms", "--percentile", "90"),
        ("offline",),
    ],
    ids=lambda words: words[0],
)
def test_each_scenario_gives_figures_and_a_verdict(scenario: tuple[str, ...], driver: str) -> None:
    if driver == "loadgen":
        pytest.importorskip("mlperf_loadgen")
    found = document(
        DIGITS, "-b", "cpu/onnxruntime", "-b", "cpu/reference", *SHORT, "--driver", driver, "--scenario", *scenario
    )
    assert found["scenario"]["name"] == scenario[0]
    assert found["driver"] == driver
    assert [result["target"] for result in found["results"]] == ["cpu/onnxruntime", "cpu/reference"]
    for result in found["results"]:
        run = result["run"]
        assert run["driver"]["name"] == driver
        assert run["verdict"] in ("VALID", "INVALID")
        assert bool(run["reasons"]) == (run["verdict"] == "INVALID")
        latencies = [run["latency"][f"p{percent}_ms"] for percent in (50, 90, 95, 99)]
        assert 0 < latencies[0] <= latencies[1] <= latencies[2] <= latencies[3] <= run["latency"]["max_ms"]
        assert run["throughput_per_s"] > 0


def test_a_number_alone_is_the_count() -> None:
    found = document(DIGITS, "--scenario", "single-stream", "-n", "7", "--driver", "plain")
    assert found["results"][0]["run"]["queries"] == 7
    assert (found["seconds"], found["number"]) == (0, 7)


def test_a_run_is_shown_with_its_verdict_and_reasons() -> None:
    arguments = (DIGITS, "--scenario", "multi-stream", "-n", "5", "--driver", "plain")
    text = " ".join(invoke(*arguments).stdout.split())
    assert "multi-stream: samples_per_query 8, percentile 99; driver plain" in text
    assert "INVALID" in text
    assert "662" in text


def test_a_sweep_reports_its_steps_and_draws_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = (DIGITS, "--scenario", "server", "--sweep", "--latency-bound", "0.5s", "--percentile", "90")
    arguments += ("--driver", "plain", *SHORT, "--plot")
    result = invoke(*arguments, tmp_path / "sweep.html", "--json")
    found = json.loads(result.stdout)
    (sweep,) = (each["sweep"] for each in found["results"])
    assert result.stderr.count("a second: p90") == len(sweep["steps"])
    kept = [step["target_qps"] for step in sweep["steps"] if step["within"]]
    assert sweep["best_qps"] == (max(kept) if kept else None)
    assert "target_qps" not in found["scenario"]
    assert (tmp_path / "sweep.html").read_text().count("<tr>") == 1 + len(sweep["steps"])
    text = invoke(*arguments, tmp_path / "sweep.png").stdout
    assert "p90 within 500 ms" in text
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    invoke(DIGITS, "-n", "5", "--plot", tmp_path / "compare.html")
    assert "digits.onnx" in (tmp_path / "compare.html").read_text()


def test_a_plot_that_cannot_be_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(bench_compare, "measure", measured)
    found = document(DIGITS, "-n", "5", "--plot", "plot.pdf", code=3)
    assert found["error"]["type"] == "OptionError"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--qps", "5"), "--scenario server"),
        (("--sweep",), "--scenario server"),
        (("--scenario", "offline", "--latency-bound", "5ms"), "--scenario server"),
        (("--scenario", "server", "--qps", "5"), "needs a bound"),
        (("--scenario", "server", "--latency-bound", "5ms"), "needs either a rate"),
        (("--scenario", "server", "--latency-bound", "5ms", "--qps", "5", "--sweep"), "needs either a rate"),
        (("--scenario", "server", "--qps", "5", "--latency-bound", "5"), "is no time"),
        (("--scenario", "offline", "--percentile", "99"), "no percentile"),
        (("--scenario", "offline", "--samples-per-query", "2"), "multi-stream"),
        (("--percentile", "99"), "needs a scenario"),
        (("--driver", "plain"), "needs a scenario"),
        (("--candidates", "-b", "cpu"), "alone"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: tuple[str, ...], words: str) -> None:
    output = " ".join(invoke(DIGITS, *arguments, code=2).output.replace("│", " ").split())
    assert words in output


def test_values_out_of_range_are_refused() -> None:
    assert (
        document(DIGITS, "--scenario", "single-stream", "--percentile", "42", code=3)["error"]["type"] == "OptionError"
    )


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("0.1s", 0.1), ("800us", 8e-4), ("3 µs", 3e-6), (".5s", 0.5), ("2.s", 2)]
)
def test_times_have_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text, "--x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["50", "", "ms", "-1s", "0ms", "1e3s", "infs", "5m", "1s2"])
def test_other_texts_are_no_times(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_duration(text, "--x")


# Candidates


TABLE = {
    "objective": "latency",
    "percentile": 99,
    "latency_budget_s": None,
    "tolerance": 0.02,
    "rows": [
        {
            "setup": {"target": "cpu/openvino", "precision": "fp32", "options": {}, "workers": 2, "batch": 8},
            "status": "chosen",
            "reason": "the fastest",
            "error": 1e-5,
            "measurement": {
                "n": 9,
                "median_s": 0.01,
                "percentile_s": 0.012,
                "rows_per_s": 98.0,
                "memory_bytes": None,
                "spread": 0.01,
                "stable": True,
            },
            "compile_s": 1.2,
            "size_bytes": 1000,
            "nature": "real",
        }
    ],
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return accelrt.compile(digits_model()).save(tmp_path / "digits.accel")


def test_candidates_of_an_artifact_are_shown_and_drawn(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Artifact, "candidates", SimpleNamespace(to_json=lambda: TABLE), raising=False)
    text = invoke("--candidates", artifact, "--plot", tmp_path / "c.png").stdout
    assert "cpu/openvino fp32 workers=2 batch=8" in text
    assert np.frombuffer((tmp_path / "c.png").read_bytes()[:4], np.uint8).tolist() == [0x89, 0x50, 0x4E, 0x47]
    assert document("--candidates", artifact) == TABLE


def test_what_has_no_candidates_is_told_so(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Artifact, "candidates", None, raising=False)
    assert 'backend="auto"' in document("--candidates", artifact, code=3)["error"]["message"]
    assert "no artifact" in document("--candidates", DIGITS, code=3)["error"]["message"]
