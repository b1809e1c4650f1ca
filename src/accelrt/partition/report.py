"""The placement: which segment runs where, and why each refused node could not run on what was asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

from accelrt import plain
from accelrt.errors import UnsupportedNodes
from accelrt.graph.types import shareable, static_bytes
from accelrt.nature import mark_of
from accelrt.policy import Fallback, announce
from accelrt.registry import CPU

if TYPE_CHECKING:
    from rich.console import RenderableType

    from accelrt.graph.model import Graph
    from accelrt.partition.cost import Partition
    from accelrt.registry import Candidate

MEASURED = "supported, but measured "
"""How the reason begins for nodes that moved because of what was measured."""

_FOREVER_S = 1e12
"""No call takes 30,000 years; what says so was not measured."""


@dataclass(frozen=True, slots=True)
class NodePlace:
    """One node: its name, operator with version, and the engine that runs it."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """One engine's refusal of one node."""

    node: str
    kind: str
    engine: str
    reason: str


@dataclass(frozen=True, slots=True)
class SegmentPlace:
    """One segment.

    ``weight_bytes`` counts the weights its nodes read. ``bytes_in`` and ``bytes_out`` count what crosses from and to
    other segments on each run, None where a dimension is open. ``nature`` says whether the engine is real,
    emulated or a stand-in. ``seconds`` is the median of one run as it was measured, transfer included, None if the
    model was not tuned. ``from_host`` and ``to_host`` count what of that is copied between the host and the device,
    with the model's inputs and outputs, when these are arrays on the host: 0 on the CPU, None where a dimension is
    open. ``batch`` is the batch size it is specialised to, None for any; ``stage`` the stage of the
    pipeline it belongs to, None if there is no pipeline. ``remark`` is what the engine says of how it runs, if it says
    anything: nodes that its runtime keeps on the CPU, for instance.
    """

    engine: str
    device_kind: str
    precision: str
    nature: str
    nodes: tuple[NodePlace, ...]
    weight_bytes: int
    bytes_in: int | None
    bytes_out: int | None
    seconds: float | None = None
    batch: int | None = None
    stage: int | None = None
    from_host: int | None = None
    to_host: int | None = None
    remark: str = ""

    @property
    def resident(self) -> bool:
        """Whether something stays on the device between this segment and another."""
        return self.device_kind != CPU and (
            self.from_host not in (None, self.bytes_in) or self.to_host not in (None, self.bytes_out)
        )


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured when a model was compiled with ``tune=True``; times are medians in seconds a call.

    Attributes:
        inputs: What was computed: ``given`` or ``random``.
        cuts: How many cuts were measured.
        seconds: The cut that was kept.
        first_seconds: The cut as it was before anything was measured.
        first_segments: Its number of segments.
        cpu_seconds: As much on the CPU as the CPU can run; None if that is the first cut, or could not
            be measured.
        cpu_segments: Its number of segments.
    """

    inputs: str
    cuts: int
    seconds: float
    first_seconds: float
    first_segments: int
    cpu_seconds: float | None
    cpu_segments: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tuning:
        """Rebuild a record from what `dataclasses.asdict` gives.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is no such record.
        """
        cpu = data["cpu_seconds"]
        return cls(
            _texts(data, "inputs")[0],
            plain.whole(data["cuts"]),
            _seconds(data["seconds"]),
            _seconds(data["first_seconds"]),
            plain.whole(data["first_segments"]),
            None if cpu is None else _seconds(cpu),
            plain.whole(data["cpu_segments"]),
        )

    def __str__(self) -> str:
        best = f", the best of {self.cuts} cuts" if self.cuts > 1 else ""
        first = f"{human_seconds(self.first_seconds)} in {_count(self.first_segments, 'segment')}"
        lines = [
            f"Measured with {self.inputs} inputs: {human_seconds(self.seconds)} a call{best}.",
            f"First cut: {first}.",
        ]
        if self.cpu_seconds is not None:
            cpu = f"{human_seconds(self.cpu_seconds)} in {_count(self.cpu_segments, 'segment')}"
            lines[1] += f" The CPU alone: {cpu}."
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class WholePlace:
    """That a model runs whole, in its framework's own ``format``, and the ``reason`` why.

    ``remark`` is what the engine says of how it runs, if it says anything.
    """

    format: str
    reason: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs.

    ``target`` is what was asked for, ``primary`` the engine that it stands for, ``precision`` what that one was asked
    to compute in, None for its default. ``tuning`` is what was measured, None if the model was not tuned. A model that
    runs whole is one segment without nodes; ``whole`` says why.
    """

    target: str
    primary: str
    segments: tuple[SegmentPlace, ...]
    refusals: tuple[Refusal, ...]
    precision: str | None = None
    tuning: Tuning | None = None
    whole: WholePlace | None = None

    @property
    def share_of_time_elsewhere(self) -> float | None:
        """The share of measured time, 0 to 1, that did not run on the primary engine; None if it was not measured."""
        times = [(segment.seconds, self._as_asked(segment)) for segment in self.segments]
        total = sum(seconds for seconds, _ in times if seconds is not None)
        if any(seconds is None for seconds, _ in times) or not 0 < total < math.inf:
            return None
        return sum(seconds for seconds, as_asked in times if seconds is not None and not as_asked) / total

    @property
    def nodes_by_engine(self) -> dict[str, int]:
        """Count nodes by the engine that runs them."""
        counts: Counter[str] = Counter()
        for segment in self.segments:
            counts[segment.engine] += len(segment.nodes)
        return dict(counts)

    @property
    def fallen_back(self) -> int:
        """Count the nodes that do not run on the primary engine, or there in another precision than asked for."""
        return sum(self.nodes_elsewhere.values())

    @property
    def nodes_elsewhere(self) -> dict[str, int]:
        """Count those nodes by where they run: ``cpu/onnxruntime``, with a precision asked for also ``... in fp32``."""
        counts: Counter[str] = Counter()
        for segment in self.segments:
            if not self._as_asked(segment):
                where = segment.engine if self.precision is None else f"{segment.engine} in {segment.precision}"
                counts[where] += len(segment.nodes)
        return dict(counts)

    def _as_asked(self, segment: SegmentPlace) -> bool:
        return segment.engine == self.primary and self.precision in (None, segment.precision)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads back."""
        data = asdict(self)
        for name in ("precision", "tuning", "whole"):
            if data[name] is None:
                del data[name]
        for segment in data["segments"]:
            for name in ("seconds", "batch", "stage", "from_host", "to_host"):
                if segment[name] is None:
                    del segment[name]
            if not segment["remark"]:
                del segment["remark"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placement:
        """Rebuild a placement.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what `to_json` writes.
        """
        return cls(
            _texts(data, "target")[0],
            _texts(data, "primary")[0],
            tuple(_segment(segment) for segment in data["segments"]),
            tuple(Refusal(*_texts(refusal, "node", "kind", "engine", "reason")) for refusal in data["refusals"]),
            _texts(data, "precision")[0] if "precision" in data else None,
            Tuning.from_json(data["tuning"]) if "tuning" in data else None,
            WholePlace(*_texts(data["whole"], "format", "reason", "remark")) if "whole" in data else None,
        )

    def render(self, *, reasons: int = 20) -> RenderableType:
        """Return the placement for a rich console: segments, then refusals grouped by engine and reason.

        Args:
            reasons: At most so many groups of refusals; the rest is counted.
        """
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        total = sum(self.nodes_by_engine.values())
        # Names come from models and hold brackets, which rich would take for markup: `Text` keeps it from that.
        asked = "" if self.precision is None else f" in {self.precision}"
        count = _count(total, "node") if self.whole is None else "the whole model"
        sizes = list(dict.fromkeys(str(segment.batch) for segment in self.segments if segment.batch is not None))
        counted = f" for batch sizes {', '.join(sizes)}" if sizes else ""
        title = Text(f"{self.target}{asked}: {count} in {_count(len(self.segments), 'segment')}{counted}")
        table = Table(title=title, title_justify="left")
        kinds = [k for k in ("batch", "stage") if any(getattr(segment, k) is not None for segment in self.segments)]
        for heading in ("#", *kinds, "engine", "precision"):
            table.add_column(heading, no_wrap=True)
        timed = any(segment.seconds is not None for segment in self.segments)
        # What crosses to the host is what goes in and out, unless something stays on a device.
        stays = any(segment.resident for segment in self.segments)
        for heading in (
            *(("time",) if timed else ()),
            *("nodes", "weights", "in", "out"),
            *(("from host", "to host") if stays else ()),
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("operators", overflow="fold")
        for index, segment in enumerate(self.segments):
            table.add_row(
                str(index),
                *(str(getattr(segment, kind)) for kind in kinds),
                Text(
                    segment.engine + mark_of(segment.nature),
                    style="" if self._as_asked(segment) else "yellow",
                ),
                Text(segment.precision),
                *((human_seconds(segment.seconds),) if timed else ()),
                str(len(segment.nodes)) if self.whole is None else "all",
                human_bytes(segment.weight_bytes),
                human_bytes(segment.bytes_in),
                human_bytes(segment.bytes_out),
                *((human_bytes(segment.from_host), human_bytes(segment.to_host)) if stays else ()),
                Text(_operators(segment.nodes) if self.whole is None else f"whole, as {self.whole.format}"),
            )
        parts: list[RenderableType] = [table, Text(self._summary(total))]
        if groups := self._groups():
            parts.append(self._refusal_table(groups, reasons))
        return Group(*parts)

    def _summary(self, total: int) -> str:
        if self.whole is not None:
            engines = ", ".join(segment.engine for segment in self.segments)
            how = f" ({self.whole.remark})" if self.whole.remark else ""
            return f"The model runs whole on {engines}{how}, because {self.whole.reason}"
        if not total:
            return "The model computes nothing: its outputs are its inputs."
        shares = ", ".join(
            f"{engine} {count} ({100 * count / total:.0f} %)" for engine, count in self.nodes_by_engine.items()
        )
        lines = [f"Nodes by engine: {shares}."]
        if (share := self.share_of_time_elsewhere) is not None:
            asked = "" if self.precision is None else f" in {self.precision}"
            lines.append(f"Time off {self.primary}{asked}: {100 * share:.0f} % ({self._times()}).")
        if self.tuning is not None:
            lines.append(str(self.tuning))
        said = [(number, segment) for number, segment in enumerate(self.segments) if segment.remark]
        lines += [f"Segment {number}, {segment.engine}: {segment.remark}." for number, segment in said]
        return "\n".join(lines)

    def _times(self) -> str:
        times: dict[str, float] = {}
        for segment in self.segments:
            times[segment.engine] = times.get(segment.engine, 0.0) + (segment.seconds or 0.0)
        return ", ".join(f"{engine} {human_seconds(seconds)}" for engine, seconds in times.items())

    def _groups(self) -> list[tuple[str, str, str, list[str]]]:
        """Group refusals; what was measured was measured of islands, so their operators share a row."""
        groups: dict[tuple[str, str, str], list[Refusal]] = {}
        for refusal in self.refusals:
            kind = "" if refusal.reason.startswith(MEASURED) else refusal.kind
            groups.setdefault((refusal.engine, kind, refusal.reason), []).append(refusal)
        return [
            (engine, kind or _kinds(refusals), reason, [refusal.node for refusal in refusals])
            for (engine, kind, reason), refusals in sorted(groups.items(), key=lambda item: -len(item[1]))
        ]

    def _refusal_table(self, groups: Sequence[tuple[str, str, str, list[str]]], limit: int) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Refused", title_justify="left")
        for heading in ("engine", "operator"):
            table.add_column(heading, no_wrap=True)
        table.add_column("nodes", justify="right")
        table.add_column("for example", overflow="fold")
        table.add_column("reason", overflow="fold", ratio=1)
        for engine, kind, reason, names in groups[:limit]:
            table.add_row(Text(engine), Text(kind), str(len(names)), Text(names[0]), Text(reason))
        if len(groups) > limit:
            table.add_row("", "", "", "", f"and {len(groups) - limit} more kinds; `placement` holds all")
        return table

    def text(self, width: int = 120) -> str:
        """Return `render` as plain text."""
        from rich.console import Console

        stream = StringIO()
        Console(file=stream, width=width, color_system=None).print(self.render())
        # rich pads titles to the width of the console.
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).rstrip()


def apply_policy(placement: Placement, fallback: Fallback) -> None:
    """Tell, allow or refuse that nodes do not run on the requested engine.

    Raises:
        UnsupportedNodes: ``fallback`` is ``error`` and there are such nodes.
    """
    if not placement.fallen_back:
        return
    refusal = next((r for r in placement.refusals if r.engine == placement.primary), None)
    example = f"{refusal.node} ({refusal.kind}): {refusal.reason}" if refusal else "none recorded"
    elsewhere = ", ".join(f"{count} on {where}" for where, count in placement.nodes_elsewhere.items())
    total = sum(placement.nodes_by_engine.values())
    wanted = placement.primary if placement.precision is None else f"{placement.primary} in {placement.precision}"
    message = f"{placement.fallen_back} of {total} nodes do not run on {wanted}: {elsewhere}. First: {example}."
    if fallback == "error":
        raise UnsupportedNodes(message, hint="Pass fallback='warn' to let them run there; explain() lists all.")
    announce(fallback, message + " explain() lists all.")


def _segment(data: Mapping[str, Any]) -> SegmentPlace:
    engine, device_kind, precision, nature = _texts(data, "engine", "device_kind", "precision", "nature")
    return SegmentPlace(
        engine,
        device_kind,
        precision,
        nature,
        tuple(NodePlace(*_texts(node, "name", "kind")) for node in data["nodes"]),
        plain.whole(data["weight_bytes"]),
        None if data["bytes_in"] is None else plain.whole(data["bytes_in"]),
        None if data["bytes_out"] is None else plain.whole(data["bytes_out"]),
        _seconds(data["seconds"]) if "seconds" in data else None,
        remark=_texts(data, "remark")[0] if "remark" in data else "",
        **{key: plain.whole(data[key]) for key in ("batch", "stage", "from_host", "to_host") if key in data},
    )


def _seconds(value: object) -> float:
    if not 0 <= (seconds := plain.number(value)) < _FOREVER_S:
        raise TypeError(f"{value!r} is not a time in seconds")
    return seconds


def _texts(data: Mapping[str, Any], *names: str) -> list[str]:
    return [plain.text(data[name]) for name in names]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _operators(nodes: Sequence[NodePlace], shown: int = 6) -> str:
    counts = Counter(node.kind.rsplit("-", 1)[0] for node in nodes)
    named = [f"{count} {kind}" if count > 1 else kind for kind, count in counts.most_common(shown)]
    others = sum(counts.values()) - sum(count for _, count in counts.most_common(shown))
    return ", ".join(named) + (f" and {others} others" if others else "")


def _kinds(refusals: Sequence[Refusal], shown: int = 3) -> str:
    kinds = [kind for kind, _ in Counter(refusal.kind for refusal in refusals).most_common()]
    return "\n".join((*kinds[:shown], *((f"and {len(kinds) - shown} more",) if len(kinds) > shown else ())))


def human_seconds(seconds: float | None) -> str:
    """Return a time for people, three digits: ``412 µs``, ``3.14 ms``, ``1.50 s``; ``?`` for None."""
    if seconds is None:
        return "?"
    for unit, scale in (("µs", 1e6), ("ms", 1e3), ("s", 1.0)):
        value = seconds * scale
        if value < 999.5 or unit == "s":
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    raise AssertionError("unreachable")


def human_bytes(count: int | None) -> str:
    """Return a number of bytes for people: ``102.1 MB``; ``?`` for None."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def place(
    target: str,
    graph: Graph,
    candidates: Sequence[Candidate],
    precisions: Sequence[str],
    partition: Partition,
    precision: str | None = None,
    seconds: Sequence[float] | None = None,
    tuning: Tuning | None = None,
    batch: int | None = None,
) -> Placement:
    """Describe a partition of a graph, which may be specialised to a batch size.

    ``seconds`` are the times of its pieces, if they were measured.
    """
    last_use = _readers(graph, partition)
    places = [_place_of(candidates[piece.owner], number, partition) for number, piece in enumerate(partition.pieces)]
    makers = {
        name: n for n, piece in enumerate(partition.pieces) for i in piece.nodes for name in graph.nodes[i].writes
    }
    outputs = set(graph.signature.output_names)

    def stays(name: str, readers: set[int]) -> bool:
        """Whether a value is made on the device where all these pieces read it, and may stay there."""
        maker = places[makers[name]] if name in makers else None
        here = maker is not None and shareable(graph.types.get(name))
        return here and all(places[reader] == maker for reader in readers)

    segments = []
    for number, piece in enumerate(partition.pieces):
        candidate = candidates[piece.owner]
        nodes = [graph.nodes[index] for index in piece.nodes]
        produced = {name for node in nodes for name in node.writes}
        read = {name for node in nodes for name in node.reads}
        entering = [n for n in read if n not in produced and n not in graph.initializers and n in last_use]
        leaving = [n for n in produced if n in outputs or last_use.get(n, set()) - {number}]
        crossing = [n for n in leaving if n in outputs or not stays(n, last_use.get(n, set()) - {number})]
        weights: dict[str, int] = {}
        for node in nodes:
            weights.update(graph.weight_bytes(node))
        segments.append(
            SegmentPlace(
                candidate.name,
                candidate.backend.name,
                precisions[piece.owner],
                candidate.engine.caps.nature,
                tuple(NodePlace(node.name, node.kind) for node in nodes),
                sum(weights.values()),
                _total(graph, entering),
                _total(graph, leaving),
                None if seconds is None else seconds[number],
                batch,
                partition.stages[number] if partition.stages else None,
                *(
                    (0, 0)
                    if candidate.backend.name == CPU
                    else (_total(graph, [n for n in entering if not stays(n, {number})]), _total(graph, crossing))
                ),
            )
        )
    refusals = tuple(
        Refusal(graph.nodes[index].name, graph.nodes[index].kind, candidates[number].name, verdict.reason)
        for number, row in enumerate(partition.verdicts)
        for index, verdict in enumerate(row)
        if verdict is not None and not verdict.supported
    )
    return Placement(target, candidates[0].name, tuple(segments), refusals, precision, tuning)


def _place_of(candidate: Candidate, number: int, partition: Partition) -> tuple[str, int | None] | None:
    """Return on what a piece leaves its tensors, None if it leaves none: a backend's device, of a stage its own."""
    if not candidate.engine.caps.device_tensors:
        return None
    return candidate.backend.name, partition.stages[number] if partition.stages else None


def merge(placements: Sequence[Placement]) -> Placement:
    """Return the placements of one model for several batch sizes as one; each refusal is there once."""
    return replace(
        placements[0],
        segments=tuple(segment for placement in placements for segment in placement.segments),
        refusals=tuple(dict.fromkeys(refusal for placement in placements for refusal in placement.refusals)),
    )


def _readers(graph: Graph, partition: Partition) -> dict[str, set[int]]:
    readers: dict[str, set[int]] = {}
    for number, piece in enumerate(partition.pieces):
        for index in piece.nodes:
            for name in graph.nodes[index].reads:
                readers.setdefault(name, set()).add(number)
    return readers


def _total(graph: Graph, names: Sequence[str]) -> int | None:
    sizes = [static_bytes(graph.types.get(name)) for name in names]
    return None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)
