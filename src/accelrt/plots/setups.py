"""A sweep over set-ups: latency of one caller against rows a second, one curve for each but the batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from accelrt.nature import mark_of
from accelrt.plots import curves
from accelrt.plots.curves import Chart, Curve, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PERCENTILE = 90.0
"""That of the single-stream scenario."""

COLUMNS = ("target", "precision", "batch", "cores", "replicas", "rows/s", "p50, ms", "p90, ms", "compile, s", "")


def chart_of(document: Mapping[str, Any]) -> Chart:
    """Read the JSON document of ``accelrt sweep``; combinations that failed are not drawn."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in _measured(document):
        grouped.setdefault(_label(row), []).append(row)
    machine = "; ".join(f"{name} {description}" for name, description in document["devices"].items())
    failed = len(document["rows"]) - len(_measured(document))
    parts = [
        f"one caller's latency over offline throughput, driver {document['driver']}, {document['seconds']:g} s each",
        f"{failed} of {len(document['rows'])} combinations failed" if failed else "",
        "stopped early" if document["interrupted"] else "",
        "what is emulated says nothing about the hardware's speed" if document["note"] else "",
    ]
    return Chart(
        f"{PurePath(document['model']).name} on {machine}",
        "; ".join(part for part in parts if part),
        _PERCENTILE,
        None,
        "too few calls to prove the percentile",
        tuple(Curve(label, tuple(_point(row) for row in rows)) for label, rows in grouped.items()),
        "throughput, rows per second",
    )


def draw(document: Mapping[str, Any]) -> Figure:
    """Draw a document in which something was measured; inside `accelrt.plots.figure.drawing`."""
    figure = curves.draw(chart_of(document))
    for row in _measured(document):
        if row["batch"] is not None:
            point = _point(row)
            figure.axes[0].annotate(
                f"batch {row['batch']}", (point.throughput, point.tail_ms), xytext=(5, 5),
                textcoords="offset points", fontsize=7.5,
            )  # fmt: skip
    return figure


def rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return every combination, measured or not; the columns are `COLUMNS`."""
    return [cells(row) for row in document["rows"]]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one combination as texts under `COLUMNS`."""
    figures = ["", "", ""]
    if row["status"] == "measured":
        latency = row["single_stream"]["latency"]
        figures = [f"{row['rows_per_s']:,.4g}" if row["rows_per_s"] < 1000 else f"{row['rows_per_s']:,.0f}"]
        figures += [f"{latency['p50_ms']:.4g}", f"{latency['p90_ms']:.4g}"]
    numbers = ["" if row[name] is None else str(row[name]) for name in ("batch", "cores", "replicas")]
    spent = "" if row["compile_s"] is None else f"{row['compile_s']:.2f}"
    reason = f"failed at {row['reason']}" if row["status"] == "failed" else row["reason"]
    return (row["target"] + mark_of(row["nature"] or "real"), _precision(row), *numbers, *figures, spent, reason)


def _measured(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in document["rows"] if row["status"] == "measured"]


def _precision(row: Mapping[str, Any]) -> str:
    """Return what was asked for, else what the engine chose."""
    return str(row["precision"] or "+".join(row["precisions"]))


def _label(row: Mapping[str, Any]) -> str:
    parts = [row["target"] + mark_of(row["nature"] or "real"), _precision(row)]
    parts += [f"{name} {row[name]}" for name in ("cores", "replicas") if row[name] is not None]
    return ", ".join(parts)


def _point(row: Mapping[str, Any]) -> Point:
    run = row["single_stream"]
    return Point(row["rows_per_s"], run["latency"]["p50_ms"], run["latency"]["p90_ms"], run["verdict"] == "VALID")
