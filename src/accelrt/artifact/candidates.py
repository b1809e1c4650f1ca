"""The candidates table: every set-up that ``auto`` considered, its figures, and why it won or did not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from accelrt import plain
from accelrt.nature import mark_of

if TYPE_CHECKING:
    from rich.console import RenderableType

Objective: TypeAlias = Literal["latency", "throughput", "memory"]
"""What is to be best: the median latency of a call (least), rows a second (most), peak resident memory (least)."""

RowStatus: TypeAlias = Literal["chosen", "rejected"]


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run a model.

    Attributes:
        target: Backend and engine: ``cpu/openvino``.
        precision: What the engine is asked to compute in.
        options: The engine's options that are not at their defaults.
        workers: Calls in flight at a time.
        batch: Rows of a call, where the model's batch is open and more than one size was considered; else None.
    """

    target: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    batch: int | None = None

    def __str__(self) -> str:
        parts = [self.target, self.precision, *(f"{name}={value}" for name, value in sorted(self.options.items()))]
        if self.workers > 1:
            parts.append(f"{self.workers} calls at a time")
        if self.batch is not None:
            parts.append(f"batch {self.batch}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a set-up was seen to do.

    Attributes:
        n: Calls measured.
        median_s: Median latency of a call, in seconds.
        percentile_s: Latency at the percentile asked for, in seconds.
        rows_per_s: Rows a second of all calls in flight together; calls a second where a model has no batch.
        memory_bytes: Peak resident bytes of a process that loads and runs the model, the interpreter included.
        spread: By how much the medians of the last windows differ, as a share of the least.
        best_s: The least median of a window: what a machine that is busy with other things leaves nearly alone.
        stable: Whether the windows agreed, and there were enough calls for the percentile, before time was up.
        final: Whether it took turns with others near the best; the first, short measurement decides that alone.
    """

    n: int
    median_s: float
    percentile_s: float
    rows_per_s: float
    memory_bytes: int
    spread: float
    best_s: float
    stable: bool
    final: bool = False


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One set-up and what became of it; a figure is None where it was not reached.

    Attributes:
        setup: What was tried.
        status: ``chosen`` or ``rejected``.
        reason: Why.
        nature: Whether its engine is real or a stand-in.
        elsewhere: Nodes that run on another engine, or in another precision, than the set-up names.
        error: Relative L2 error of its worst output against the reference; infinity for NaN where there should be none.
        measurement: Its figures.
        compile_s: Seconds that compiling took.
        size_bytes: Bytes of the programs and weights on disk.
    """

    setup: Setup
    status: RowStatus
    reason: str
    nature: str = "real"
    elsewhere: int = 0
    error: float | None = None
    measurement: Measurement | None = None
    compile_s: float | None = None
    size_bytes: int | None = None

    @property
    def measured(self) -> Measurement:
        """Its figures.

        Raises:
            LookupError: There are none.
        """
        if self.measurement is None:
            raise LookupError(f"{self.setup} was not measured: {self.reason}")
        return self.measurement


@dataclass(frozen=True, slots=True)
class CandidateTable:
    """All candidates of one choice.

    Attributes:
        objective: What was to be best.
        percentile: The percentile of latency that was measured, 0 to 100.
        latency_budget_s: Most seconds at that percentile; None for no bound.
        tolerance: Most relative L2 error, as asked; None where each output had its own, or the default.
        reference: What outputs were held against.
        machine: What the figures were measured on.
        rows: The chosen candidate first, then the measured ones from best to worst, then the others.
    """

    objective: Objective
    percentile: float
    latency_budget_s: float | None
    tolerance: float | None
    reference: str
    machine: Mapping[str, str]
    rows: tuple[CandidateRow, ...]

    @property
    def chosen(self) -> CandidateRow:
        """The one that won.

        Raises:
            LookupError: None did.
        """
        for row in self.rows:
            if row.status == "chosen":
                return row
        raise LookupError("No candidate was chosen.")

    @property
    def rejected(self) -> tuple[CandidateRow, ...]:
        """All others."""
        return tuple(row for row in self.rows if row.status == "rejected")

    def render(self) -> RenderableType:
        """Return the table for a rich console: measured candidates with figures, then the others with their reason."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = f"Candidates for {self._goal()}, verified against {self.reference}"
        table = Table(title=Text(title), title_justify="left")
        table.add_column("candidate", overflow="fold")
        for heading in ("median ms", f"p{self.percentile:g} ms", "per s", "memory", "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", overflow="fold", ratio=1)
        for row in self.rows:
            chosen = row.status == "chosen"
            table.add_row(
                Text(str(row.setup) + mark_of(row.nature), style="bold" if chosen else ""),
                *_figures(row.measurement),
                "" if row.error is None else f"{row.error:.1e}",
                Text(("CHOSEN: " if chosen else "") + row.reason),
            )
        where = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return Group(table, Text(f"Measured on: {where}."))

    def _goal(self) -> str:
        goal = {"latency": "least latency", "throughput": "most throughput", "memory": "least memory"}[self.objective]
        if self.latency_budget_s is not None:
            goal += f", p{self.percentile:g} within {self.latency_budget_s * 1e3:g} ms"
        return goal if self.tolerance is None else f"{goal}, error within {self.tolerance:g}"

    def text(self, width: int = 140) -> str:
        """Return `render` as plain text."""
        from rich.console import Console

        stream = StringIO()
        Console(file=stream, width=width, color_system=None).print(self.render())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads back; an infinite error is text."""
        data = asdict(self)
        for row in data["rows"]:
            if row["error"] is not None and not math.isfinite(row["error"]):
                row["error"] = str(row["error"])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CandidateTable:
        """Rebuild a table.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what `to_json` writes.
        """
        return cls(
            plain.one_of(data["objective"], get_args(Objective)),
            plain.number(data["percentile"]),
            None if data["latency_budget_s"] is None else plain.number(data["latency_budget_s"]),
            None if data["tolerance"] is None else plain.number(data["tolerance"]),
            plain.text(data["reference"]),
            {plain.text(name): plain.text(value) for name, value in data["machine"].items()},
            tuple(_row(row) for row in data["rows"]),
        )


def _figures(measured: Measurement | None) -> tuple[str, ...]:
    if measured is None:
        return ("", "", "", "")
    from accelrt.partition.report import human_bytes

    return (
        f"{measured.median_s * 1e3:.3g}" + ("" if measured.stable else " ±"),
        f"{measured.percentile_s * 1e3:.3g}",
        f"{measured.rows_per_s:,.0f}" if measured.rows_per_s >= 100 else f"{measured.rows_per_s:.3g}",
        human_bytes(measured.memory_bytes),
    )


def _row(data: Mapping[str, Any]) -> CandidateRow:
    setup, measured = data["setup"], data["measurement"]
    return CandidateRow(
        Setup(
            plain.text(setup["target"]),
            plain.text(setup["precision"]),
            {plain.text(name): value for name, value in setup["options"].items()},
            plain.whole(setup["workers"]),
            None if setup["batch"] is None else plain.whole(setup["batch"]),
        ),
        plain.one_of(data["status"], get_args(RowStatus)),
        plain.text(data["reason"]),
        plain.text(data["nature"]),
        plain.whole(data["elsewhere"]),
        None if data["error"] is None else float(data["error"]),
        None if measured is None else _measurement(measured),
        None if data["compile_s"] is None else plain.number(data["compile_s"]),
        None if data["size_bytes"] is None else plain.whole(data["size_bytes"]),
    )


def _measurement(data: Mapping[str, Any]) -> Measurement:
    if unknown := set(data) - {known.name for known in fields(Measurement)}:
        raise ValueError(f"{unknown!r} are no figures of a measurement")
    if not isinstance(data["stable"], bool) or not isinstance(data["final"], bool):
        raise TypeError(f"{data['stable']!r} or {data['final']!r} is not true or false")
    return Measurement(
        plain.whole(data["n"]),
        plain.number(data["median_s"]),
        plain.number(data["percentile_s"]),
        plain.number(data["rows_per_s"]),
        plain.whole(data["memory_bytes"]),
        plain.number(data["spread"]),
        plain.number(data["best_s"]),
        data["stable"],
        data["final"],
    )
