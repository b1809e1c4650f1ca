"""``accelrt bench``: measure a model. What is measured, and how, is in the modules ``bench_*``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from accelrt.cli.bench_compare import SECONDS, Effort, Subject, compare
from accelrt.cli.bench_scenarios import SCENARIO_SECONDS, Asked, run_scenario
from accelrt.cli.common import (
    BackendsOption,
    DimOption,
    JsonFlag,
    SeedOption,
    TracebackFlag,
    TrustFlag,
    dimensions,
    engine_options,
    guarded,
    print_json,
)
from accelrt.cli.durations import parse_duration

_UNITS = "50ms, 0.1s, 800us"


class ScenarioName(StrEnum):
    """What ``--scenario`` takes."""

    SINGLE_STREAM = "single-stream"
    MULTI_STREAM = "multi-stream"
    SERVER = "server"
    OFFLINE = "offline"


class Driver(StrEnum):
    """What ``--driver`` takes."""

    AUTO = "auto"
    LOADGEN = "loadgen"
    PLAIN = "plain"


@guarded
def bench(
    model: Annotated[Path, typer.Argument(help="A model, or a compiled artifact.", show_default=False)],
    backend: BackendsOption = None,
    scenario: Annotated[
        ScenarioName | None,
        typer.Option("--scenario", help="Measure as MLPerf does; else latency of one caller, targets in turns."),
    ] = None,
    qps: Annotated[
        float | None, typer.Option("--qps", help="server: mean rate of arrivals a second.", show_default=False)
    ] = None,
    latency_bound: Annotated[
        str | None,
        typer.Option("--latency-bound", help=f"server: what the percentile must keep: {_UNITS}.", metavar="TIME"),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option("--percentile", help="50, 90, 95, 97, 99 or 99.9; else 90 for single-stream, 99 for others."),
    ] = None,
    samples_per_query: Annotated[
        int | None, typer.Option("--samples-per-query", help="multi-stream: samples sent at once, else 8.", min=1)
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="server: find the highest rate that keeps the bound; --qps is not given.")
    ] = False,
    driver: Annotated[
        Driver, typer.Option("--driver", help="MLPerf's LoadGen, our own, or LoadGen if it is installed.")
    ] = Driver.AUTO,
    warmup: Annotated[int, typer.Option("--warmup", help="Calls before anything is measured.", min=1)] = 10,
    number: Annotated[
        int | None,
        typer.Option("--number", "-n", help="Calls measured on each target; the least, in a scenario.", min=1),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            "-s",
            help=f"Time to measure each target, else {SECONDS:g}; the least, in a scenario, else {SCENARIO_SECONDS:g}.",
            min=0.001,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", help="Threads of each engine that can be told; else its own choice.", min=1),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="An option that every target knows: streams=2; repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw latency over throughput into this .png or .html file.", metavar="FILE"),
    ] = None,
    candidates: Annotated[
        bool,
        typer.Option("--candidates", help="Measure nothing: show what an artifact of backend auto was chosen from."),
    ] = False,
    seed: SeedOption = 0,
    trust: TrustFlag = False,
    dim: DimOption = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Measure the latency of a model on one or more targets, which take turns, or run a scenario on each.

    Without a scenario throughput is that of one caller: the batch times the rate of calls. The batch is the first
    dimension, where all inputs and outputs share it. The ratio compares median latencies with the first target: 2x is
    twice as fast.

    With a scenario each target is measured for itself, and the verdict says whether the figures prove what they say.
    """
    asked = Asked(
        scenario=None if scenario is None else scenario.value,
        qps=qps,
        bound_s=None if latency_bound is None else parse_duration(latency_bound, "--latency-bound"),
        percentile=percentile,
        samples_per_query=samples_per_query,
        sweep=sweep,
        driver=driver.value,
        warmup=warmup,
        number=number,
        seconds=seconds,
        seed=seed,
    )
    _check(asked, number, seconds)
    if plot is not None:
        from accelrt.plots.page import check_name

        check_name(plot)
    if candidates:
        _candidates(model, plot, as_json, [backend, scenario, number, seconds, option, threads])
        return
    options: dict[str, Any] = engine_options(option)
    if threads is not None:
        options["threads"] = threads
    subject = Subject(model, backend or [None], options, dimensions(dim), trust)
    if scenario is None:
        effort = Effort(warmup, number, seconds if seconds is not None else SECONDS)
        document = compare(subject, effort, seed, as_json)
    else:
        document = run_scenario(subject, asked, as_json)
    _deliver(document, plot, as_json)


def _check(asked: Asked, number: int | None, seconds: float | None) -> None:
    """Refuse options that do not go together.

    Raises:
        typer.BadParameter: Some do not.
    """
    if asked.scenario is None:
        if number is not None and seconds is not None:
            raise typer.BadParameter("Give calls or seconds, not both.", param_hint="--number")
        if asked.driver != "auto" or asked.percentile is not None:
            raise typer.BadParameter("A driver or a percentile needs a scenario.", param_hint="--scenario")
    if asked.scenario != "server":
        if asked.qps is not None or asked.bound_s is not None or asked.sweep:
            raise typer.BadParameter(
                "A rate, a latency bound and a sweep need --scenario server.", param_hint="--scenario"
            )
    elif asked.bound_s is None:
        raise typer.BadParameter(f"The server scenario needs a bound: {_UNITS}.", param_hint="--latency-bound")
    elif asked.sweep == (asked.qps is not None):
        raise typer.BadParameter(
            "The server scenario needs either a rate or --sweep, which finds one.", param_hint="--qps"
        )
    if asked.samples_per_query is not None and asked.scenario != "multi-stream":
        raise typer.BadParameter("Samples per query need --scenario multi-stream.", param_hint="--samples-per-query")
    if asked.scenario == "offline" and asked.percentile is not None:
        raise typer.BadParameter("The offline scenario has no percentile.", param_hint="--percentile")


def _candidates(model: Path, plot: Path | None, as_json: bool, others: Sequence[object]) -> None:
    from accelrt.cli.bench_plots import show_candidates

    if any(other is not None for other in others):
        raise typer.BadParameter("--candidates goes with --plot and --json alone.", param_hint="--candidates")
    show_candidates(model, plot, as_json)


def _deliver(document: Mapping[str, Any], plot: Path | None, as_json: bool) -> None:
    """Draw what was measured, then print it: if drawing fails, there must be no second document."""
    if plot is not None:
        from accelrt.cli.bench_plots import plot_document

        plot_document(document, plot, as_json)
    if as_json:
        print_json(document)
