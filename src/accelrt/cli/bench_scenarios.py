"""``accelrt bench --scenario``: each target measured for itself, through LoadGen or the plain driver."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelrt.cli.bench_compare import Contestant, Subject, batch_size, devices_of, identity, kind_of, milliseconds, rate
from accelrt.cli.common import err, out, plain_table, where_it_runs, working
from accelrt.cli.values import random_inputs
from accelrt.nature import mark_of

if TYPE_CHECKING:
    from accelrt.graph.types import Value
    from accelrt.scenarios import Effort, Scenario, Sweep, SweepStep

SCENARIO_SECONDS, SCENARIO_QUERIES = 10.0, 100
_SAMPLES, _SAMPLES_BYTES = 8, 256 * 2**20
"""Different inputs that queries draw from, fewer where they are large."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asked for; None is what was not given."""

    scenario: str | None
    qps: float | None
    bound_s: float | None
    percentile: float | None
    samples_per_query: int | None
    sweep: bool
    driver: Literal["auto", "loadgen", "plain"]
    warmup: int
    number: int | None
    seconds: float | None
    seed: int

    def scenario_of(self) -> Scenario:
        """Return the scenario; in a sweep one with a rate that stands for all of them.

        Raises:
            OptionError: A value is out of its range.
        """
        from accelrt.scenarios import MultiStream, Offline, Server, SingleStream

        percentile = {} if self.percentile is None else {"percentile": self.percentile}
        match self.scenario:
            case "single-stream":
                return SingleStream(**percentile)
            case "multi-stream":
                return MultiStream(self.samples_per_query or 8, **percentile)
            case "server":
                assert self.bound_s is not None
                return Server(self.qps if self.qps is not None else 1.0, self.bound_s, **percentile)
        return Offline()

    def effort(self) -> Effort:
        """Return how long to measure: a number alone is not stretched to the usual time, nor the other way round."""
        from accelrt.scenarios import Effort

        seconds, number = self.seconds, self.number
        if seconds is None:
            seconds = SCENARIO_SECONDS if number is None else 0.0
        if number is None:
            number = SCENARIO_QUERIES if self.seconds is None else 1
        return Effort(seconds, number, self.warmup, self.seed)


def run_scenario(subject: Subject, asked: Asked, as_json: bool) -> dict[str, Any]:
    """Run a scenario or a sweep on each target and show the figures, unless they are to be JSON; return the document.

    Raises:
        OptionError: A value is out of its range.
        BenchmarkError: LoadGen was asked for by name and is not installed.
    """
    from accelrt.scenarios.drivers import resolve

    scenario, effort, driver = asked.scenario_of(), asked.effort(), resolve(asked.driver)
    with working(as_json), contextlib.ExitStack() as stack:
        contestants = subject.enter(stack)
        signature = contestants[0].artifact.signature
        samples = _samples(signature, subject.sizes, asked.seed)
        batch = batch_size(signature, subject.sizes)
        results = [_measure(contestant, samples, asked, scenario, effort) for contestant in contestants]
        document = _document(subject.model, samples[0], batch, asked, scenario, effort, driver, results)
    if not as_json:
        _show(document, contestants)
    return document


def _samples(signature: Any, sizes: Mapping[str, int], seed: int) -> list[dict[str, Value]]:
    first = random_inputs(signature, sizes, seed)
    # Lists and text are small; arrays tell their size.
    size = sum(getattr(value, "nbytes", 0) for value in first.values())
    count = max(1, min(_SAMPLES, _SAMPLES_BYTES // max(1, size)))
    return [first, *(random_inputs(signature, sizes, seed + number) for number in range(1, count))]


def _measure(
    contestant: Contestant,
    samples: Sequence[Mapping[str, Value]],
    asked: Asked,
    scenario: Scenario,
    effort: Effort,
) -> dict[str, Any]:
    from accelrt.scenarios import measure, sweep

    if not asked.sweep:
        run = measure(contestant.session, samples, scenario, effort, driver=asked.driver)
        return {**identity(contestant), "run": run.to_json()}
    assert asked.bound_s is not None
    found: Sweep = sweep(
        contestant.session, samples, asked.bound_s, getattr(scenario, "percentile", 99.0), effort,
        driver=asked.driver, progress=lambda step: _tell(contestant.target, step),
    )  # fmt: skip
    return {**identity(contestant), "sweep": found.to_json()}


def _tell(target: str, step: SweepStep) -> None:
    """Report a step of a sweep when it is done: a sweep takes minutes."""
    reached = f"{milliseconds(step.result.percentile_s * 1e3)} ms"
    word = "within the bound" if step.within else "above the bound"
    err().print(
        f"{target}: {step.target_qps:.4g} a second: p{step.result.percentile:g} {reached}, {word}", soft_wrap=True
    )


def _document(
    model: Path,
    sample: Mapping[str, Value],
    batch: int,
    asked: Asked,
    scenario: Scenario,
    effort: Effort,
    driver: str,
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    import accelrt
    from accelrt.scenarios.scenario import scenario_to_json

    setting = scenario_to_json(scenario)
    if asked.sweep:
        del setting["target_qps"]  # it has many
    return {
        "accelrt": accelrt.__version__,
        "model": str(model),
        "inputs": {name: kind_of(value) for name, value in sample.items()},
        "batch": batch,
        "scenario": setting,
        "driver": driver,
        "warmup": effort.warmup,
        "number": effort.queries,
        "seconds": effort.seconds,
        "seed": effort.seed,
        "devices": devices_of(results),
        "results": results,
    }


def _show(document: Mapping[str, Any], contestants: Sequence[Contestant]) -> None:
    console = out()
    inputs = ", ".join(f"{name} {kind}" for name, kind in document["inputs"].items())
    console.print(f"{document['model']}: {inputs or 'no inputs'}; batch {document['batch']}", soft_wrap=True)
    for name, description in document["devices"].items():
        console.print(f"{name}: {description}", soft_wrap=True)
    setting = document["scenario"]
    given = ", ".join(f"{name} {value:g}" for name, value in setting.items() if name != "name")
    console.print(f"{setting['name']}{f': {given}' if given else ''}; driver {document['driver']}", soft_wrap=True)
    for contestant, result in zip(contestants, document["results"], strict=True):
        console.print()
        label = result["target"] + mark_of(result["nature"])
        console.print(f"{label} ({result['version']}): nodes: ", where_it_runs(contestant.artifact), soft_wrap=True)
        _show_sweep(result["sweep"]) if "sweep" in result else _show_runs([result["run"]], None)
    console.print()
    console.print("Latency is in milliseconds, throughput in samples a second; a sample is one call.", soft_wrap=True)


def _show_runs(runs: Sequence[Mapping[str, Any]], rates: Sequence[str] | None) -> None:
    table = plain_table()
    headings = ("queries", "samples", "p50", "p90", "p95", "p99", "per s", "verdict")
    for heading in (*(("rate",) if rates else ()), *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, run in enumerate(runs):
        latencies = (milliseconds(run["latency"][f"p{percent}_ms"]) for percent in (50, 90, 95, 99))
        first = (rates[number],) if rates else ()
        counts = (str(run["queries"]), str(run["samples"]))
        table.add_row(*first, *counts, *latencies, rate(run["throughput_per_s"]), run["verdict"])
    console = out()
    console.print(table)
    if rates is None:
        for reason in runs[0]["reasons"]:
            console.print(f"  {reason}", soft_wrap=True)


def _show_sweep(found: Mapping[str, Any]) -> None:
    steps = sorted(found["steps"], key=lambda step: step["target_qps"])
    marks = [f"{step['target_qps']:.4g}{'' if step['within'] else ' (late)'}" for step in steps]
    _show_runs([step["result"] for step in steps], marks)
    bound = f"p{found['percentile']:g} within {found['latency_bound_ms']:g} ms"
    best = found["best_qps"]
    text = "No rate that was tried keeps" if best is None else f"{best:.4g} arrivals a second keep"
    out().print(f"{text} {bound}; offline it does {rate(found['capacity_per_s'])} a second.", soft_wrap=True)
