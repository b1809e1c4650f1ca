"""What a verification found: figures for each output, the node where it went wrong, as text and as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from io import StringIO
from typing import TYPE_CHECKING, Any

from accelrt import plain
from accelrt.precision.compare import OutputError, Tolerance

if TYPE_CHECKING:
    from rich.console import RenderableType

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first segment, and in it the node, whose output leaves the tolerance.

    Attributes:
        segment: Number of the segment.
        engine: What runs it.
        precision: What it computes in.
        node: Name of the node; None where the segment could not be taken apart.
        kind: Its operator with version.
        value: The value that leaves the tolerance.
        problem: By how much.
    """

    segment: int
    engine: str
    precision: str
    node: str | None
    kind: str | None
    value: str
    problem: str

    def __str__(self) -> str:
        where = f"segment {self.segment} on {self.engine} in {self.precision}"
        if self.node is not None:
            where = f"node {self.node!r} ({self.kind}), {where}"
        return f"First out of tolerance: {where}: {self.value!r} has {self.problem}."


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """The result of a verification.

    Attributes:
        reference: What the outputs were held against: ``fp32 on cpu/onnxruntime``.
        inputs: Where the inputs came from: ``given``, or ``random, seed 0``.
        calls: How many calls were compared.
        outputs: Figures for each output.
        culprit: Where it went wrong, if that was asked for and found.
    """

    reference: str
    inputs: str
    calls: int
    outputs: tuple[OutputError, ...]
    culprit: Culprit | None = None

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.problem is None for output in self.outputs)

    @property
    def failures(self) -> tuple[OutputError, ...]:
        """The outputs that are not."""
        return tuple(output for output in self.outputs if output.problem is not None)

    def render(self) -> RenderableType:
        """Return the report for a rich console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        calls = f"{self.calls} call{'' if self.calls == 1 else 's'}"
        verdict = "within tolerance" if self.passed else "OUT OF TOLERANCE"
        title = Text(f"Verified against {self.reference}: {calls}, inputs {self.inputs}: {verdict}")
        table = Table(title=title, title_justify="left")
        table.add_column("output", overflow="fold", min_width=8)
        for heading in ("rel. L2", "tolerance", "max abs", "cosine", "top-1", "top-5", "NaN", "Inf"):
            table.add_column(heading, justify="right", no_wrap=True)
        labelled = any(output.accuracy for output in self.outputs)
        if labelled:
            table.add_column("accuracy", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for output in self.outputs:
            error = output.relative_l2 if output.relative_l2 is not None else output.differing
            row = [
                _figure(error) + ("" if output.relative_l2 is not None or error is None else " differ"),
                f"{output.tolerance.relative_l2:g}",
                _figure(output.max_abs),
                "" if output.cosine is None else f"{output.cosine:.6f}",
                _share(output.top1),
                _share(output.top5),
                _sides(output.nan),
                _sides(output.infinite),
            ]
            if labelled:
                row.append("" if output.accuracy is None else " / ".join(map(_share, output.accuracy)))
            table.add_row(Text(output.name), *row, "ok" if output.problem is None else "FAILED")
        lines = [f"{output.name!r}: {output.problem}." for output in self.failures]
        if labelled or any(counts[0] != counts[1] for o in self.outputs for counts in (o.nan, o.infinite)):
            lines.append("A / B: of this model / of the reference.")
        if self.culprit is not None:
            lines.append(str(self.culprit))
        return Group(table, *(Text(line) for line in lines))

    def text(self, width: int = 120) -> str:
        """Return `render` as plain text."""
        from rich.console import Console

        stream = StringIO()
        Console(file=stream, width=width, color_system=None).print(self.render())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads back; NaN and infinities are text."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "inputs": self.inputs,
            "calls": self.calls,
            "outputs": [{**_plain(output), "problem": output.problem} for output in self.outputs],
            "culprit": None if self.culprit is None else _plain(self.culprit),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VerificationReport:
        """Rebuild a report.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what `to_json` writes.
        """
        culprit = data["culprit"]
        return cls(
            plain.text(data["reference"]),
            plain.text(data["inputs"]),
            plain.whole(data["calls"]),
            tuple(_output(item) for item in data["outputs"]),
            None if culprit is None else _culprit(culprit),
        )


def _plain(item: Any) -> dict[str, Any]:
    return {field.name: _json(getattr(item, field.name)) for field in fields(item)}


def _json(value: Any) -> Any:
    if isinstance(value, Tolerance):
        return _plain(value)
    if isinstance(value, tuple):
        return [_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _output(data: Mapping[str, Any]) -> OutputError:
    bound = data["tolerance"]
    nan, infinite = (tuple(plain.whole(count) for count in data[key]) for key in ("nan", "infinite"))
    accuracy = data["accuracy"]
    shares = None if accuracy is None else tuple(_number(share) or 0.0 for share in accuracy)
    if len(nan) != 2 or len(infinite) != 2 or (shares is not None and len(shares) != 2):
        raise ValueError("counts and accuracies come in pairs")
    problem = data["shape_problem"]
    return OutputError(
        plain.text(data["name"]),
        Tolerance(_number(bound["relative_l2"]) or 0.0, _number(bound["max_abs"]), _number(bound["top1"])),
        relative_l2=_number(data["relative_l2"]),
        max_abs=_number(data["max_abs"]),
        cosine=_number(data["cosine"]),
        differing=_number(data["differing"]),
        rows=plain.whole(data["rows"]),
        top1=_number(data["top1"]),
        top5=_number(data["top5"]),
        nan=(nan[0], nan[1]),
        infinite=(infinite[0], infinite[1]),
        mismatched=plain.whole(data["mismatched"]),
        accuracy=None if shares is None else (shares[0], shares[1]),
        shape_problem=None if problem is None else plain.text(problem),
    )


def _culprit(data: Mapping[str, Any]) -> Culprit:
    return Culprit(
        plain.whole(data["segment"]),
        plain.text(data["engine"]),
        plain.text(data["precision"]),
        None if data["node"] is None else plain.text(data["node"]),
        None if data["kind"] is None else plain.text(data["kind"]),
        plain.text(data["value"]),
        plain.text(data["problem"]),
    )


def _number(value: object) -> float | None:
    if value is None:
        return None
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else plain.number(value)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}" if value else "0"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _sides(counts: tuple[int, int]) -> str:
    return f"{counts[0]}" if counts[0] == counts[1] else f"{counts[0]} / {counts[1]}"
