"""Latency against throughput: one curve or point for each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from accelrt.nature import mark_of
from accelrt.plots.figure import COLOURS, new_figure, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TAIL = 99.0


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: samples a second, milliseconds at the median and at the percentile; ``good`` is drawn filled.

    In a sweep ``throughput`` is the rate of arrivals. Within the bound it is what was answered too; above it the
    answered rate says little, because such a run is cut short.
    """

    throughput: float
    median_ms: float
    tail_ms: float
    good: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """The points of one target in order of throughput; ``best`` is the highest rate that kept the bound, if sought."""

    label: str
    points: tuple[Point, ...]
    best: float | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """All that is drawn.

    Attributes:
        title: Says model and machine.
        subtitle: Says how it was measured.
        percentile: That of the tails.
        bound_ms: A latency bound, drawn as a line.
        hollow: What an empty marker means; empty text if there is none.
        across: What the horizontal axis shows.
    """

    title: str
    subtitle: str
    percentile: float
    bound_ms: float | None
    hollow: str
    curves: tuple[Curve, ...]
    across: str = "throughput, samples per second"


def chart_of(document: Mapping[str, Any]) -> Chart:
    """Read the JSON document of ``accelrt bench``: of a comparison, a scenario or a sweep."""
    results: Sequence[Mapping[str, Any]] = document["results"]
    machine = "; ".join(f"{name} {description}" for name, description in document["devices"].items())
    title = f"{PurePath(document['model']).name}, batch {document['batch']}, on {machine}"
    curves = tuple(
        Curve(result["target"] + mark_of(result["nature"]), _points(result), result.get("sweep", {}).get("best_qps"))
        for result in results
    )
    setting = document.get("scenario")
    if setting is None:
        return Chart(title, "one caller, targets in turns", _TAIL, None, "", curves)
    percentile = setting.get("percentile", _TAIL)
    bound = setting.get("latency_bound_s")
    driver = f"driver {document['driver']}"
    if "sweep" in results[0]:
        subtitle = f"server scenario, Poisson arrivals at rising rates, {driver}, {document['seconds']:g} s a point"
        across = "throughput asked for, arrivals per second"
        return Chart(title, subtitle, percentile, bound * 1e3, "above the bound", curves, across)
    given = ", ".join(f"{name} {value:g}" for name, value in setting.items() if isinstance(value, int | float))
    subtitle = f"{setting['name']} scenario{f' ({given})' if given else ''}, {driver}"
    return Chart(title, subtitle, percentile, None if bound is None else bound * 1e3, "INVALID", curves)


def _points(result: Mapping[str, Any]) -> tuple[Point, ...]:
    if "sweep" in result:
        steps = sorted(result["sweep"]["steps"], key=lambda step: float(step["target_qps"]))
        return tuple(_point(step["result"], step["within"], step["target_qps"]) for step in steps)
    if "run" in result:
        run = result["run"]
        return (_point(run, run["verdict"] == "VALID", run["throughput_per_s"]),)
    return (Point(result["throughput_per_s"], result["p50_ms"], result["p99_ms"], True),)


def _point(run: Mapping[str, Any], good: bool, across: float) -> Point:
    return Point(across, run["latency"]["p50_ms"], run["percentile_ms"], good)


def draw(chart: Chart) -> Figure:
    """Draw a chart; inside `accelrt.plots.figure.drawing`."""
    figure, axes = new_figure(chart.title, chart.subtitle)
    for number, curve in enumerate(chart.curves):
        _draw_curve(axes, curve, COLOURS[number % len(COLOURS)])
    points = [point for curve in chart.curves for point in curve.points]
    heights = [height for point in points for height in (point.median_ms, point.tail_ms)]
    if chart.bound_ms is not None:
        axes.axhline(chart.bound_ms, color="#888888", linestyle=":", linewidth=1.4)
        heights.append(chart.bound_ms)
    scale(axes.xaxis, axes.set_xscale, [point.throughput for point in points])
    scale(axes.yaxis, axes.set_yscale, heights)
    axes.margins(0.08)
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xlabel(chart.across)
    axes.set_ylabel("latency, ms")
    _legend(figure, chart)
    return figure


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    across = [point.throughput for point in curve.points]
    axes.plot(across, [point.tail_ms for point in curve.points], color=colour, linewidth=1.5)
    axes.plot(across, [point.median_ms for point in curve.points], color=colour, linewidth=1, linestyle="--", alpha=0.7)
    good = [point for point in curve.points if point.good]
    if curve.best is not None and good:
        last = good[-1]
        axes.annotate(
            f"{curve.best:,.4g} per second", (last.throughput, last.tail_ms), xytext=(-8, 6),
            textcoords="offset points", ha="right", fontsize=8, color=colour,
        )  # fmt: skip
    for point in curve.points:
        fill = colour if point.good else "white"
        axes.plot(point.throughput, point.tail_ms, "o", color=colour, markerfacecolor=fill, markersize=6)
        axes.plot(point.throughput, point.median_ms, "s", color=colour, markerfacecolor=fill, markersize=4, alpha=0.7)


def _legend(figure: Figure, chart: Chart) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=3, label=curve.label)
        for number, curve in enumerate(chart.curves)
    ]
    grey = "#555555"
    tail = f"{chart.percentile:g}th percentile"
    entries += [
        Line2D([], [], color=grey, marker="o", linewidth=1.5, label=tail),
        Line2D([], [], color=grey, marker="s", markersize=4, linewidth=1, linestyle="--", label="median"),
    ]
    if chart.hollow and not all(point.good for curve in chart.curves for point in curve.points):
        entries.append(
            Line2D([], [], color=grey, marker="o", markerfacecolor="white", linestyle="", label=chart.hollow)
        )
    if chart.bound_ms is not None:
        label = f"bound {chart.bound_ms:g} ms"
        entries.append(Line2D([], [], color="#888888", linestyle=":", linewidth=1.4, label=label))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


COLUMNS = ("target", "per second", "median, ms", "percentile, ms", "")


def rows(chart: Chart) -> list[tuple[str, ...]]:
    """Return the table beneath the picture; its columns are `COLUMNS`."""
    return [
        (
            curve.label,
            f"{point.throughput:,.4g}" if point.throughput < 1000 else f"{point.throughput:,.0f}",
            f"{point.median_ms:.4g}",
            f"{point.tail_ms:.4g}",
            "" if point.good else chart.hollow,
        )
        for curve in chart.curves
        for point in curve.points
    ]
