"""The candidates of an ``auto`` compile: what was measured, what was chosen, and why not the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelrt.nature import mark_of
from accelrt.plots.figure import COLOURS, new_figure, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = 6
"""Reasons that get a marker of their own; what is rarer is drawn as one."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_OTHER = "other reasons"


@dataclass(frozen=True, slots=True)
class Spot:
    """A measured candidate: its number in the table, where it lies, and why it was rejected (empty: it was chosen).

    ``error`` is relative, None where it was not computed; ``memory`` is in MB.
    """

    number: int
    label: str
    latency_ms: float
    rows_per_s: float
    error: float | None
    memory: float | None
    reason: str


def label_of(row: Mapping[str, Any]) -> str:
    """Return a set-up in one line: ``cpu/openvino bf16 threads=2``."""
    setup = row["setup"]
    parts = [setup["target"] + mark_of(row.get("nature") or "real"), setup["precision"]]
    parts += [f"{name}={value}" for name, value in sorted((setup.get("options") or {}).items())]
    if (setup.get("workers") or 1) != 1:
        parts.append(f"workers={setup['workers']}")
    if setup.get("batch") is not None:
        parts.append(f"batch={setup['batch']}")
    return " ".join(parts)


def spots_of(table: Mapping[str, Any]) -> list[Spot]:
    """Return the candidates that were measured; they are numbered from 1 in the order of the table."""
    spots = []
    for number, row in enumerate(table["rows"], start=1):
        if (measured := row["measurement"]) is None:
            continue
        latency = measured["median_s" if table.get("latency_budget_s") is None else "percentile_s"]
        memory = measured.get("memory_bytes")
        reason = "" if row["status"] == "chosen" else kind_of(row["reason"])
        spots.append(
            Spot(number, label_of(row), latency * 1e3, measured["rows_per_s"], row["error"],
                 None if memory is None else memory / 1e6, reason)
        )  # fmt: skip
    return spots


def kind_of(reason: str) -> str:
    """Return what kind of reason it is: its words up to the first colon, without the figures in them."""
    head = re.split(r"[:;(]", reason.strip(), maxsplit=1)[0].strip() or "no reason given"
    words = re.sub(r"(?<!\w)[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", head)
    return (words[:57] + "...") if len(words) > 60 else words


def draw(table: Mapping[str, Any], title: str) -> Figure:
    """Draw the candidates, error (or, where none was computed, memory) over speed; inside `drawing`."""
    spots = spots_of(table)
    by_latency = table["objective"] == "latency"
    unmeasured = len(table["rows"]) - len(spots)
    subtitle = f"candidates of auto, objective {table['objective']}; numbers are those of the table"
    if unmeasured:
        subtitle += f"; {unmeasured} more {'was' if unmeasured == 1 else 'were'} not measured"
    figure, axes = new_figure(title, subtitle)
    if not spots:
        axes.text(0.5, 0.5, "No candidate was measured.", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return figure
    across = [spot.latency_ms if by_latency else spot.rows_per_s for spot in spots]
    errors = [spot.error for spot in spots if spot.error]
    up, floor = _heights(spots, bool(errors))
    _draw_spots(axes, spots, across, up)
    scale(axes.xaxis, axes.set_xscale, across)
    if errors:
        _error_axis(axes, table, up, floor)
    else:
        scale(axes.yaxis, axes.set_yscale, up)
        axes.set_ylabel("memory, MB" if any(up) else "error and memory not known")
    budget, percentile = table.get("latency_budget_s"), table.get("percentile")
    latency = "median latency, ms"
    if by_latency and budget is not None:
        latency = f"latency at the {percentile:g}th percentile, ms"
        axes.axvline(budget * 1e3, color="#888888", linestyle=":", label=f"budget {budget * 1e3:g} ms")
    axes.set_xlabel(latency if by_latency else "throughput, rows per second")
    axes.margins(0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _heights(spots: Sequence[Spot], has_errors: bool) -> tuple[list[float], float]:
    """Return how high each spot lies, and where those lie whose error a logarithmic axis cannot show."""
    if not has_errors:
        return [spot.memory or 0.0 for spot in spots], 0.0
    floor = min(spot.error for spot in spots if spot.error) / 10
    return [spot.error or floor for spot in spots], floor


def _error_axis(axes: Axes, table: Mapping[str, Any], up: Sequence[float], floor: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    axes.set_ylabel("relative error against fp32")
    if floor in up:
        axes.axhline(floor, color="#bbbbbb", linewidth=0.8)
        axes.annotate(
            "on this line: no error, or none computed", (1, floor), xycoords=("axes fraction", "data"),
            xytext=(0, -3), textcoords="offset points", ha="right", va="top", fontsize=7, color="#666666",
        )  # fmt: skip
    if (tolerance := table.get("tolerance")) is not None:
        axes.axhline(tolerance, color="#888888", linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")


def _draw_spots(axes: Axes, spots: Sequence[Spot], across: Sequence[float], up: Sequence[float]) -> None:
    kinds: dict[str, list[int]] = {}
    for index, spot in enumerate(spots):
        kinds.setdefault(spot.reason, []).append(index)
    kept = sorted((kind for kind in kinds if kind), key=lambda kind: -len(kinds[kind]))
    if len(kept) > _KINDS:
        for kind in kept[_KINDS - 1 :]:
            kinds.setdefault(_OTHER, []).extend(kinds.pop(kind))
        kept = [*kept[: _KINDS - 1], _OTHER]
    for number, kind in enumerate(kept):
        chosen = kinds[kind]
        axes.scatter(
            [across[index] for index in chosen], [up[index] for index in chosen], s=36, alpha=0.85,
            marker=_MARKERS[number], color=COLOURS[(number + 1) % len(COLOURS)], label=f"rejected: {kind}",
        )  # fmt: skip
    for index in kinds.get("", ()):
        axes.scatter(
            across[index], up[index], s=230, marker="*", color=COLOURS[0], edgecolors="black", linewidths=0.8,
            zorder=3, label=f"chosen: {spots[index].label}",
        )  # fmt: skip
    for index, spot in enumerate(spots):
        axes.annotate(
            str(spot.number), (across[index], up[index]), xytext=(5, 5), textcoords="offset points", fontsize=7.5
        )


COLUMNS = ("", "candidate", "latency, ms", "rows per s", "relative error", "memory, MB", "n", "status", "reason")


def rows(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return every candidate, measured or not; the columns are `COLUMNS`."""
    spots = {spot.number: spot for spot in spots_of(table)}
    found: list[tuple[str, ...]] = []
    for number, row in enumerate(table["rows"], start=1):
        spot = spots.get(number)
        figures = ("", "", "", "", "")
        if spot is not None:
            figures = (
                f"{spot.latency_ms:.4g}",
                f"{spot.rows_per_s:,.4g}",
                "" if spot.error is None else f"{spot.error:.2g}",
                "" if spot.memory is None else f"{spot.memory:,.0f}",
                str(row["measurement"]["n"]),
            )
        found.append((str(number), label_of(row), *figures, row["status"], row["reason"]))
    return found
