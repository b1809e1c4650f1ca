"""``accelrt bench``: one model on several targets, measured side by side.

Targets take turns, round by round: whatever else the machine does meanwhile hits all of them alike. In each round a
target first makes one call that is not counted, because the one before it has left its threads and data on the cores.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.common import (
    BackendsOption,
    DimOption,
    JsonFlag,
    SeedOption,
    TracebackFlag,
    TrustFlag,
    candidate_of,
    dimensions,
    guarded,
    number_or_text,
    open_or_compile,
    out,
    plain_table,
    print_json,
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


@guarded
def bench(
    model: Annotated[Path, typer.Argument(help="A model, or a compiled artifact.", show_default=False)],
    backend: BackendsOption = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Calls before anything is measured.", min=1)] = 10,
    number: Annotated[int | None, typer.Option("--number", "-n", help="Calls measured on each target.", min=1)] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", "-s", help=f"Time to measure each target, else {SECONDS:g}.", min=0.001)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", help="Threads of each engine that can be told; else its own choice.", min=1),
    ] = None,
    seed: SeedOption = 0,
    trust: TrustFlag = False,
    dim: DimOption = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Measure the latency of a model on one or more targets, which take turns.

    Throughput is that of one caller: the batch times the rate of calls. The batch is the first dimension, where all
    inputs and outputs share it. The ratio compares median latencies with the first target: 2x is twice as fast.
    """
    if number is not None and seconds is not None:
        raise typer.BadParameter("Give calls or seconds, not both.", param_hint="--number")
    sizes = dimensions(dim)
    effort = Effort(warmup, number, seconds if seconds is not None else SECONDS)
    targets: Sequence[str | None] = backend or [None]
    with working(as_json), contextlib.ExitStack() as stack:
        contestants = [_enter(stack, model, target, threads, trust) for target in targets]
        signature = contestants[0].artifact.signature
        inputs = random_inputs(signature, sizes, seed)
        batch = batch_size(signature, sizes)
        _compare_answers(contestants, inputs)
        _measure(contestants, inputs, effort)
    results = [_result(contestant, contestants[0], batch) for contestant in contestants]
    if as_json:
        print_json(_document(model, inputs, batch, effort, seed, results))
    else:
        _show(model, inputs, batch, contestants, results)


def _enter(
    stack: contextlib.ExitStack, model: Path, target: str | None, threads: int | None, trust: bool
) -> Contestant:
    import accelrt

    artifact = open_or_compile(model, target, None if threads is None else {"threads": threads}, trust=trust)
    session = stack.enter_context(accelrt.load(artifact))
    obeys = hasattr(candidate_of(artifact).engine.options, "threads")
    return Contestant(artifact.placement.target, artifact, session, threads if obeys else None)


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


def _measure(contestants: Sequence[Contestant], inputs: Mapping[str, Value], effort: Effort) -> None:
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
    candidate = candidate_of(contestant.artifact)
    placement = contestant.artifact.placement
    difference = contestant.difference
    return {
        "target": contestant.target,
        "engine": placement.primary,
        "version": candidate.engine.status().version,
        "nature": candidate.engine.caps.nature,
        "precision": sorted({segment.precision for segment in placement.segments}),
        "threads": contestant.threads,
        "n": len(times),
        "mean_ms": float(times.mean()),
        "min_ms": float(times.min()),
        **latency(contestant.nanoseconds),
        "max_ms": float(times.max()),
        "throughput_per_s": batch * 1000 / float(times.mean()),
        "ratio": float(np.median(first.nanoseconds) / np.median(contestant.nanoseconds)),
        "max_difference": None if difference is None else number_or_text(difference),
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
        "inputs": {name: _kind(value) for name, value in inputs.items()},
        "batch": batch,
        "warmup": effort.warmup,
        "number": effort.number,
        "seconds": effort.seconds if effort.number is None else None,
        "seed": seed,
        "devices": _devices(results),
        "results": results,
    }


def _kind(value: Value) -> str:
    return f"list of {len(value)}" if isinstance(value, list) else f"{value.dtype}{list(value.shape)}"


def _devices(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
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
    shapes = ", ".join(f"{name} {_kind(value)}" for name, value in inputs.items())
    console.print(f"{model}: {shapes or 'no inputs'}; batch {batch}", soft_wrap=True)
    for name, description in _devices(results).items():
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
        f"{result['throughput_per_s']:,.0f}"
        if result["throughput_per_s"] >= 100
        else f"{result['throughput_per_s']:.2f}",
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
