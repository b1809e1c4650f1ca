"""Plots: what is drawn, that text in them is text, and that an HTML page fetches nothing."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelrt.errors import BenchmarkError, OptionError
from accelrt.plots import candidates, curves, page
from accelrt.plots.figure import drawing

pytest.importorskip("matplotlib")

HOSTILE = "</title></svg><script>alert('$x$')</script>--><b>&\n$\\frac{1}{0}$"


def run_of(throughput: float, median: float, tail: float, verdict: str = "VALID") -> dict[str, Any]:
    return {
        "throughput_per_s": throughput,
        "latency": {"p50_ms": median},
        "percentile_ms": tail,
        "verdict": verdict,
        "reasons": [],
    }


def sweep_document(target: str = "cpu/openvino", model: str = "folder/net.onnx") -> dict[str, Any]:
    steps = [
        {"target_qps": rate, "within": tail <= 50, "result": run_of(rate, tail / 2, tail)}
        for rate, tail in ((40.0, 90.0), (10.0, 20.0), (30.0, 45.0))
    ]
    sweep = {"latency_bound_ms": 50.0, "percentile": 99.0, "capacity_per_s": 45.0, "steps": steps, "best_qps": 30.0}
    return {
        "model": model,
        "batch": 1,
        "driver": "plain",
        "seconds": 3.0,
        "scenario": {"name": "server", "latency_bound_s": 0.05, "percentile": 99.0},
        "devices": {"cpu:0": "a processor, 2 cores"},
        "results": [
            {"target": target, "nature": "real", "sweep": sweep},
            {"target": "neuron/emulator", "nature": "emulated", "sweep": {**sweep, "best_qps": None}},
        ],
    }


def row_of(target: str, status: str, reason: str, error: float | None, seconds: float | None, **more: Any) -> Any:
    measured = None
    if seconds is not None:
        measured = {
            "n": 200,
            "median_s": seconds * 0.9,
            "percentile_s": seconds,
            "rows_per_s": 1 / seconds,
            "memory_bytes": 120_000_000,
            "spread": 0.01,
            "stable": True,
        }
    setup = {"target": target, "precision": "fp32", "options": {"threads": 2}, "workers": 1, "batch": None}
    return {
        "setup": setup,
        "status": status,
        "reason": reason,
        "error": error,
        "measurement": measured,
        "compile_s": 1.0,
        "size_bytes": 1000,
        "nature": "real",
        **more,
    }


def table_of(*rows: Any, **more: Any) -> dict[str, Any]:
    table = {"objective": "latency", "percentile": 99, "latency_budget_s": 0.03, "tolerance": 0.02, "rows": list(rows)}
    return {**table, **more}


TABLE = table_of(
    row_of("cpu/onnxruntime", "rejected", "slower: 38.2 ms against 11.9 ms", 0.0, 0.038),
    row_of("cpu/openvino", "chosen", "the fastest within the tolerance", 0.0037, 0.0119),
    row_of("cpu/openvino", "rejected", "error 0.034 exceeds the tolerance 0.02", 0.034, 0.0101),
    row_of("cpu/openvino", "rejected", "error 0.051 exceeds the tolerance 0.02", 0.051, 0.0102),
    row_of("neuron/emulator", "rejected", "emulated: never chosen", None, 0.5, nature="emulated"),
    row_of("cpu/reference", "rejected", "could not be compiled", None, None),
)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    from matplotlib import image

    return np.asarray(image.imread(path))


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(item.get_text() for item in figure.findobj(Text))


def test_curves_show_bound_best_and_machine(tmp_path: Path) -> None:
    chart = curves.chart_of(sweep_document())
    assert [point.throughput for point in chart.curves[0].points] == [10, 30, 40]
    assert [point.good for point in chart.curves[0].points] == [True, True, False]
    with drawing():
        figure = curves.draw(chart)
        page.save(figure, tmp_path / "a.png", chart.title, curves.COLUMNS, curves.rows(chart), [])
    shown = texts(figure)
    for word in (
        "net.onnx, batch 1, on cpu:0 a processor, 2 cores",
        "neuron/emulator (emulated)",
        "99th percentile",
        "bound 50 ms",
        "latency, ms",
        "arrivals per second",
        "30 per second",
        "above the bound",
    ):
        assert word in shown, word
    assert "folder" not in shown
    # The three lines of the first target, the bound among them, are where the figures say.
    lines = {tuple(np.ravel(line.get_ydata())) for line in figure.axes[0].lines}
    assert {(20.0, 45.0, 90.0), (10.0, 22.5, 45.0), (50.0, 50.0)} <= lines
    assert pixels(tmp_path / "a.png").std() > 0.01


def test_single_runs_and_comparisons_are_points() -> None:
    document = sweep_document()
    document["results"] = [{"target": "cpu", "nature": "real", "run": run_of(100, 1, 2, "INVALID")}]
    (curve,) = curves.chart_of(document).curves
    assert curve.points == (curves.Point(100, 1, 2, False),)
    del document["scenario"]
    document["results"] = [
        {"target": "cpu", "nature": "real", "throughput_per_s": 7.0, "p50_ms": 3.0, "p99_ms": 4.0},
    ]
    (curve,) = curves.chart_of(document).curves
    assert curve.points == (curves.Point(7, 3, 4, True),)
    with drawing():
        assert curves.draw(curves.chart_of(document)).axes[0].get_xlim()[0] == 0


def test_axes_are_logarithmic_where_figures_span_much() -> None:
    document = sweep_document()
    with drawing():
        narrow = curves.draw(curves.chart_of(document)).axes[0]
        document["results"][0]["sweep"]["steps"][0]["target_qps"] = 4000.0
        wide = curves.draw(curves.chart_of(document)).axes[0]
    assert (narrow.get_xscale(), wide.get_xscale()) == ("linear", "log")


def test_candidates_are_numbered_marked_and_the_chosen_stands_out() -> None:
    with drawing():
        figure = candidates.draw(TABLE, "net.accel, candidates on a processor")
    shown = texts(figure)
    for word in (
        "chosen: cpu/openvino fp32 threads=2",
        "rejected: slower",
        "rejected: error # exceeds the tolerance #",
        "rejected: emulated",
        "tolerance 0.02",
        "budget 30 ms",
        "1 more was not measured",
        "no error, or none computed",
    ):
        assert word in shown, word
    assert figure.axes[0].get_yscale() == "log"
    places = {
        tuple(point) for group in figure.axes[0].collections for point in np.asarray(group.get_offsets()).tolist()
    }
    assert (11.9, 0.0037) in places
    assert len(places) == 5
    # Those without an error lie below all that have one.
    assert min(height for _, height in places) < 0.0037


def test_candidates_without_errors_show_memory_and_without_measurements_a_word() -> None:
    rows = [row_of("cpu/a", "chosen", "", None, 0.01), row_of("cpu/b", "rejected", "slower", None, 0.02)]
    with drawing():
        figure = candidates.draw(table_of(*rows, objective="throughput"), "t")
        empty = candidates.draw(table_of(row_of("cpu", "rejected", "no", None, None)), "t")
    assert "memory, MB" in texts(figure)
    assert "rows per second" in texts(figure)
    assert "No candidate was measured." in texts(empty)


def test_many_reasons_share_a_marker() -> None:
    names = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota")
    rows = [row_of("cpu", "rejected", name, 0.1, 0.01 + number / 1000) for number, name in enumerate(names)]
    with drawing():
        figure = candidates.draw(table_of(*rows), "t")
    assert "rejected: other reasons" in texts(figure)
    assert sum(len(group.get_offsets()) for group in figure.axes[0].collections) == len(names)


def test_every_candidate_is_in_the_table() -> None:
    rows = candidates.rows(TABLE)
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(len(row) == len(candidates.COLUMNS) for row in rows)
    assert rows[5][1] == "cpu/reference fp32 threads=2"
    assert rows[5][2:7] == ("",) * 5
    assert rows[4][1].startswith("neuron/emulator (emulated)")
    assert rows[0][8] == "slower: 38.2 ms against 11.9 ms"


class _Tags(HTMLParser):
    """Collects tags, the addresses that attributes name, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_self_contained_and_its_text_is_text(tmp_path: Path) -> None:
    document = sweep_document(target=HOSTILE, model=HOSTILE.replace("/", ""))
    chart = curves.chart_of(document)
    path = tmp_path / "a.html"
    with drawing():
        page.save(curves.draw(chart), path, chart.title, curves.COLUMNS, curves.rows(chart), [HOSTILE])
    found = _Tags()
    found.feed(path.read_text())
    assert not {"script", "b", "img", "iframe", "link"} & set(found.tags)
    assert found.tags.count("svg") == 1
    assert found.tags.count("tr") == 1 + 6
    # Within the picture things are named by fragments; nothing is fetched.
    assert found.addresses
    assert all(address.startswith("#") for address in found.addresses)
    assert not re.search(r"url\((?!#)", path.read_text())
    assert HOSTILE in found.text
    assert "@import" not in path.read_text()


def test_the_same_figures_give_the_same_page(tmp_path: Path) -> None:
    chart = curves.chart_of(sweep_document())
    for name in ("a", "b"):
        with drawing():
            page.save(curves.draw(chart), tmp_path / f"{name}.html", "t", curves.COLUMNS, curves.rows(chart), [])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_other_names_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.png or \.html"):
        page.check_name(tmp_path / "a.pdf")
    chart = curves.chart_of(sweep_document())
    with drawing(), pytest.raises(BenchmarkError, match="cannot be written"):
        page.save(curves.draw(chart), tmp_path / "no" / "a.png", "t", (), (), ())


def test_a_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchmarkError, match=r"accelrt\[bench\]"), drawing():
        pass


def test_the_style_is_not_left_behind() -> None:
    import matplotlib

    before = matplotlib.rcParams["text.parse_math"]
    with drawing():
        assert matplotlib.rcParams["text.parse_math"] is False
    assert matplotlib.rcParams["text.parse_math"] == before
