"""``accelrt bench`` without a scenario: one model on several targets, measured side by side by one caller.

Targets take turns, round by round: whatever else the machine does meanwhile hits all of them alike. In each round a
target first makes one call that is not counted, because the one before it has left its threads and data on the cores.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelrt.cli.common import (
    candidate_of,
    number_or_text,
    open_or_compile,
    out,
    plain_table,
    where_it_runs,
    working,
)
from accelrt.cli.values import random_inputs
from accelrt.nature import mark_of

if TYPE_CHECKING:
    from rich.text import Text

    from accelrt.artifact.artifact import Artifact
    from accelrt.graph.types import Signature, Value
    from accelrt.runtime.session import Session

ROUNDS = 10
SECONDS = 2.0
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure each target: so many calls, or so many seconds."""

    warmup: int
    number: int | None
    seconds: float


@dataclass(slots=True)
class Contestant:
    """One target in a comparison; ``threads`` is None where its engine has no such option."""

    target: str
    artifact: Artifact
    session: Session
    threads: int | None
    nanoseconds: list[int] = field(default_factory=list)
    difference: float | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a model on targets, with options that all of them know; ``sizes`` are of open dimensions."""

    model: Path
    targets: Sequence[str | None]
    options: Mapping[str, Any]
    sizes: Mapping[str, int]
    trust: bool

    def enter(self, stack: contextlib.ExitStack) -> list[Contestant]:
        """Compile or open the model for each target and load it, until the stack is left."""
        return [self._contestant(stack, target) for target in self.targets]

    def _contestant(self, stack: contextlib.ExitStack, target: str | None) -> Contestant:
        import accelrt

        artifact = open_or_compile(self.model, target, self.options, trust=self.trust)
        session = stack.enter_context(accelrt.load(artifact))
        obeys = hasattr(candidate_of(artifact).engine.options, "threads")
        threads = self.options.get("threads") if obeys else None
        return Contestant(artifact.placement.target, artifact, session, threads)


def compare(subject: Subject, effort: Effort, seed: int, as_json: bool) -> dict[str, Any]:
    """Measure targets in turns and show the figures, unless they are to be JSON; return the document."""
    model = subject.model
    with working(as_json), contextlib.ExitStack() as stack:
        contestants = subject.enter(stack)
        signature = contestants[0].artifact.signature
        inputs = random_inputs(signature, subject.sizes, seed)
        batch = batch_size(signature, subject.sizes)
        _compare_answers(contestants, inputs)
        measure(contestants, inputs, effort)
    results = [_result(contestant, contestants[0], batch) for contestant in contestants]
    if not as_json:
        _show(model, inputs, batch, contestants, results)
    return _document(model, inputs, batch, effort, seed, results)


def batch_size(signature: Signature, sizes: Mapping[str, int]) -> int:
    """Return the first dimension, where all inputs and outputs share it and are more than vectors; else 1."""
    from accelrt.graph.types import TensorType

    firsts: set[int | str] = set()
    for port in (*signature.inputs, *signature.outputs):
        shape = port.type.shape if isinstance(port.type, TensorType) else None
        if shape is None or len(shape) < 2 or shape[0] is None:
            return 1
        firsts.add(shape[0])
    if len(firsts) != 1:
        return 1
    (first,) = firsts
    return first if isinstance(first, int) else sizes.get(first, 1)


def _compare_answers(contestants: Sequence[Contestant], inputs: Mapping[str, Value]) -> None:
    """Record how far each target's answer is from the first one's: a faster wrong answer is worth nothing."""
    first = contestants[0].session.predict(inputs)
    for contestant in contestants[1:]:
        contestant.difference = _largest_difference(first, contestant.session.predict(inputs))


def _largest_difference(first: Mapping[str, Value], other: Mapping[str, Value]) -> float | None:
    """Return the largest absolute difference between numbers; None where there is nothing to subtract."""
    import numpy as np

    from accelrt.cli.values import plain_array

    largest: float | None = None
    for name, value in first.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind in "OUc" or not value.size:
            continue
        a, b = plain_array(value), plain_array(other[name])
        if a.shape != b.shape:
            return float("inf")
        same = (a == b) | ((a != a) & (b != b))
        gap = np.where(same, 0.0, np.abs(a.astype(np.float64) - b.astype(np.float64)))
        largest = max(largest or 0.0, float(np.where(np.isnan(gap), np.inf, gap).max()))
    return largest


def measure(contestants: Sequence[Contestant], inputs: Mapping[str, Value], effort: Effort) -> None:
    """Time every contestant, round by round."""
    for contestant in contestants:
        for _ in range(effort.warmup):
            contestant.session.predict(inputs)
    rounds = ROUNDS if effort.number is None else min(ROUNDS, effort.number)
    for index in range(rounds):
        for contestant in contestants:
            contestant.session.predict(inputs)
            if effort.number is None:
                _measure_for(contestant, inputs, effort.seconds / rounds)
            else:
                # So that all rounds together make exactly `number` calls.
                _measure_calls(
                    contestant, inputs, effort.number * (index + 1) // rounds - effort.number * index // rounds
                )


def _measure_for(contestant: Contestant, inputs: Mapping[str, Value], seconds: float) -> None:
    end = time.perf_counter() + seconds
    _measure_calls(contestant, inputs, 1)
    while time.perf_counter() < end:
        _measure_calls(contestant, inputs, 1)


def _measure_calls(contestant: Contestant, inputs: Mapping[str, Value], calls: int) -> None:
    predict, clock, record = contestant.session.predict, time.perf_counter_ns, contestant.nanoseconds.append
    for _ in range(calls):
        start = clock()
        predict(inputs)
        record(clock() - start)


def _result(contestant: Contestant, first: Contestant, batch: int) -> dict[str, Any]:
    import numpy as np

    times = np.array(contestant.nanoseconds) / 1e6
    difference = contestant.difference
    return {
        **identity(contestant),
        "n": len(times),
        "mean_ms": float(times.mean()),
        "min_ms": float(times.min()),
        **latency(contestant.nanoseconds),
        "max_ms": float(times.max()),
        "throughput_per_s": batch * 1000 / float(times.mean()),
        "ratio": float(np.median(first.nanoseconds) / np.median(contestant.nanoseconds)),
        "max_difference": None if difference is None else number_or_text(difference),
    }


def identity(contestant: Contestant) -> dict[str, Any]:
    """Return what ran: target, engine, version, nature, precision, threads, nodes by engine."""
    candidate = candidate_of(contestant.artifact)
    placement = contestant.artifact.placement
    return {
        "target": contestant.target,
        "engine": placement.primary,
        "version": candidate.engine.status().version,
        "nature": candidate.engine.caps.nature,
        "precision": sorted({segment.precision for segment in placement.segments}),
        "threads": contestant.threads,
        "nodes_by_engine": placement.nodes_by_engine,
    }


def latency(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Return percentiles in milliseconds by name: ``p50_ms``."""
    import numpy as np

    values = np.percentile(np.array(nanoseconds) / 1e6, PERCENTILES)
    return {f"p{percent}_ms": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def _document(
    model: Path, inputs: Mapping[str, Value], batch: int, effort: Effort, seed: int, results: list[dict[str, Any]]
) -> dict[str, Any]:
    import accelrt

    return {
        "accelrt": accelrt.__version__,
        "model": str(model),
        "inputs": {name: kind_of(value) for name, value in inputs.items()},
        "batch": batch,
        "warmup": effort.warmup,
        "number": effort.number,
        "seconds": effort.seconds if effort.number is None else None,
        "seed": seed,
        "devices": devices_of(results),
        "results": results,
    }


def kind_of(value: Value) -> str:
    """Return dtype and shape of an input as text."""
    return f"list of {len(value)}" if isinstance(value, list) else f"{value.dtype}{list(value.shape)}"


def devices_of(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the description of each device that results may have come from, by name."""
    from accelrt.registry import REGISTRY

    engines = {engine for result in results for engine in (result["engine"], *result["nodes_by_engine"])}
    backends = sorted({engine.partition("/")[0] for engine in engines})
    return {device.name: device.description for name in backends for device in REGISTRY.backend(name).devices()}


def _show(
    model: Path,
    inputs: Mapping[str, Value],
    batch: int,
    contestants: Sequence[Contestant],
    results: Sequence[Mapping[str, Any]],
) -> None:
    console = out()
    shapes = ", ".join(f"{name} {kind_of(value)}" for name, value in inputs.items())
    console.print(f"{model}: {shapes or 'no inputs'}; batch {batch}", soft_wrap=True)
    for name, description in devices_of(results).items():
        console.print(f"{name}: {description}", soft_wrap=True)
    table = plain_table()
    table.add_column("target", overflow="fold")
    for heading in ("n", "mean", *(f"p{percent}" for percent in PERCENTILES), "per s", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_row(result))
    console.print(table)
    console.print("Latency is in milliseconds; the ratio is that of medians, and more is faster.")
    for contestant, result in zip(contestants, results, strict=True):
        console.print(_remarks(contestant, result), soft_wrap=True)


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        result["target"] + mark_of(result["nature"]),
        str(result["n"]),
        milliseconds(result["mean_ms"]),
        *(milliseconds(result[f"p{percent}_ms"]) for percent in PERCENTILES),
        rate(result["throughput_per_s"]),
        f"{result['ratio']:.3g}x",
    )


def _remarks(contestant: Contestant, result: Mapping[str, Any]) -> Text:
    """Return where a target ran, with how many threads, and how far its answer is from the first target's."""
    from rich.text import Text

    text = Text.assemble(f"{contestant.target} ({result['version']}): nodes: ", where_it_runs(contestant.artifact))
    if contestant.threads is not None:
        text.append(f"; {contestant.threads} thread{'s' if contestant.threads > 1 else ''}")
    if (difference := result["max_difference"]) is not None:
        shown = difference if isinstance(difference, str) else f"{difference:.1e}"
        text.append(f"; largest difference from the first target {shown}")
    return text


def milliseconds(value: float) -> str:
    """Return a latency with three or so digits."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def rate(value: float) -> str:
    """Return a number a second with three or more digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
