"""The placement: which segment runs where, and why each refused node could not run on what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

from accelrt.graph.types import static_bytes
from accelrt.nature import mark_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from accelrt.graph.model import Graph
    from accelrt.partition.cost import Partition
    from accelrt.registry import Candidate


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
    emulated or a stand-in. ``batch`` is the batch size it is specialised to, None for any; ``stage`` the stage of the
    pipeline it belongs to, None if there is no pipeline.
    """

    engine: str
    device_kind: str
    precision: str
    nature: str
    nodes: tuple[NodePlace, ...]
    weight_bytes: int
    bytes_in: int | None
    bytes_out: int | None
    batch: int | None = None
    stage: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs.

    ``target`` is what was asked for, ``primary`` the engine that it stands for, ``precision`` what that one was asked
    to compute in, None for its default.
    """

    target: str
    primary: str
    segments: tuple[SegmentPlace, ...]
    refusals: tuple[Refusal, ...]
    precision: str | None = None

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
        if self.precision is None:
            del data["precision"]
        for segment in data["segments"]:
            for key in ("batch", "stage"):
                if segment[key] is None:
                    del segment[key]
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
        sizes = list(dict.fromkeys(str(segment.batch) for segment in self.segments if segment.batch is not None))
        counted = f" for batch sizes {', '.join(sizes)}" if sizes else ""
        title = Text(
            f"{self.target}{asked}: {_count(total, 'node')} in {_count(len(self.segments), 'segment')}{counted}"
        )
        table = Table(title=title, title_justify="left")
        kinds = [k for k in ("batch", "stage") if any(getattr(segment, k) is not None for segment in self.segments)]
        for heading in ("#", *kinds, "engine", "precision"):
            table.add_column(heading, no_wrap=True)
        for heading in ("nodes", "weights", "in", "out"):
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
                str(len(segment.nodes)),
                human_bytes(segment.weight_bytes),
                human_bytes(segment.bytes_in),
                human_bytes(segment.bytes_out),
                Text(_operators(segment.nodes)),
            )
        parts: list[RenderableType] = [table, Text(self._summary(total))]
        if groups := self._groups():
            parts.append(self._refusal_table(groups, reasons))
        return Group(*parts)

    def _summary(self, total: int) -> str:
        if not total:
            return "The model computes nothing: its outputs are its inputs."
        shares = ", ".join(
            f"{engine} {count} ({100 * count / total:.0f} %)" for engine, count in self.nodes_by_engine.items()
        )
        return f"Nodes by engine: {shares}."

    def _groups(self) -> list[tuple[str, str, str, list[str]]]:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for refusal in self.refusals:
            groups.setdefault((refusal.engine, refusal.kind, refusal.reason), []).append(refusal.node)
        return [(*key, names) for key, names in sorted(groups.items(), key=lambda item: -len(item[1]))]

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


def _segment(data: Mapping[str, Any]) -> SegmentPlace:
    engine, device_kind, precision, nature = _texts(data, "engine", "device_kind", "precision", "nature")
    return SegmentPlace(
        engine,
        device_kind,
        precision,
        nature,
        tuple(NodePlace(*_texts(node, "name", "kind")) for node in data["nodes"]),
        _size(data["weight_bytes"]),
        *(None if data.get(key) is None else _size(data[key]) for key in ("bytes_in", "bytes_out", "batch", "stage")),
    )


def _size(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a size in bytes")
    return value


def _texts(data: Mapping[str, Any], *names: str) -> list[str]:
    values = [data[name] for name in names]
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} are not all text")
    return values


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _operators(nodes: Sequence[NodePlace], shown: int = 6) -> str:
    counts = Counter(node.kind.rsplit("-", 1)[0] for node in nodes)
    named = [f"{count} {kind}" if count > 1 else kind for kind, count in counts.most_common(shown)]
    others = sum(counts.values()) - sum(count for _, count in counts.most_common(shown))
    return ", ".join(named) + (f" and {others} others" if others else "")


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
    batch: int | None = None,
) -> Placement:
    """Describe a partition of a graph, which may be specialised to a batch size."""
    last_use = _readers(graph, partition)
    outputs = set(graph.signature.output_names)
    segments = []
    for number, piece in enumerate(partition.pieces):
        candidate = candidates[piece.owner]
        nodes = [graph.nodes[index] for index in piece.nodes]
        produced = {name for node in nodes for name in node.writes}
        read = {name for node in nodes for name in node.reads}
        entering = [n for n in read if n not in produced and n not in graph.initializers and n in last_use]
        leaving = [n for n in produced if n in outputs or last_use.get(n, set()) - {number}]
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
                batch,
                partition.stages[number] if partition.stages else None,
            )
        )
    refusals = tuple(
        Refusal(graph.nodes[index].name, graph.nodes[index].kind, candidates[number].name, verdict.reason)
        for number, row in enumerate(partition.verdicts)
        for index, verdict in enumerate(row)
        if verdict is not None and not verdict.supported
    )
    return Placement(target, candidates[0].name, tuple(segments), refusals, precision)


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
