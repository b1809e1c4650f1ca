"""Compile and measure one model in every combination of target, precision, batch size, pipeline and replicas.

What vendors tell their users to do by hand: each combination is compiled, loaded and measured for itself, in a fixed
order, one at a time, so that none takes cores from another. One that fails is a row with its reason, and the sweep goes
on::

    from accelrt.scenarios.sweep_setups import combinations, sweep_setups

    for row in sweep_setups("resnet50.onnx", combinations(["cpu"], batches=[1, 8], replicas=[1, 2])):
        print(row.setup, row.rows_per_s, row.reason)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import accelrt
from accelrt.errors import AccelrtError, OptionError, SourceError, UnsupportedNodes
from accelrt.nature import Nature
from accelrt.precision.plan import precision_named
from accelrt.registry import REGISTRY
from accelrt.scenarios.drivers import DriverName, measure, resolve
from accelrt.scenarios.result import ScenarioResult
from accelrt.scenarios.scenario import Effort, Offline, SingleStream
from accelrt.target import parse

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.backend import Precision
    from accelrt.graph.types import Signature, Value

Stage: TypeAlias = Literal["compile", "load", "run"]

SECONDS, QUERIES, WARMUP = 2.0, 10, 3
"""How long each scenario of a combination is measured, if nobody says otherwise."""

_SAMPLES, _SAMPLES_BYTES = 4, 256 * 2**20
"""Different inputs that calls draw from, fewer where they are large."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One combination; None is what was not asked for, and is not passed on.

    Attributes:
        target: ``backend[/engine][:devices]``.
        precision: Of the engine; else its default.
        batch: Rows of each call, to which the model is specialised.
        cores: Stages of a pipeline.
        replicas: Copies of the model.
    """

    target: str
    precision: Precision | None = None
    batch: int | None = None
    cores: int | None = None
    replicas: int | None = None

    def __str__(self) -> str:
        given = (("batch", self.batch), ("cores", self.cores), ("replicas", self.replicas))
        named = [f"{name} {value}" for name, value in given if value is not None]
        return ", ".join([" ".join(filter(None, (self.target, self.precision))), *named])


@dataclass(frozen=True, slots=True)
class SetupRow:
    """What became of a combination.

    Attributes:
        setup: What was asked for.
        nature: Of the engine asked for; None where that is unknown.
        precisions: What its segments compute in.
        nodes_by_engine: How many nodes run where; empty if it was not compiled.
        elsewhere: Those that do not run on the engine asked for, in the precision asked for.
        primary: The engine asked for.
        compile_s: Seconds to compile, or to find it in the cache; None if that failed.
        latency: Single-stream: one caller, a call at a time.
        offline: All calls there from the start, through the session's own threads.
        error: Why it could not be measured; None if it was. ``stage`` says where it failed.
    """

    setup: Setup
    nature: Nature | None = None
    precisions: tuple[str, ...] = ()
    nodes_by_engine: Mapping[str, int] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    primary: str | None = None
    compile_s: float | None = None
    latency: ScenarioResult | None = None
    offline: ScenarioResult | None = None
    error: AccelrtError | None = None
    stage: Stage | None = None

    @property
    def measured(self) -> bool:
        """Whether there are figures."""
        return self.error is None and self.latency is not None and self.offline is not None

    @property
    def rows_per_s(self) -> float | None:
        """Offline throughput in rows: calls a second times the batch, where none is given calls a second."""
        return None if self.offline is None else self.offline.throughput * (self.setup.batch or 1)

    @property
    def reason(self) -> str:
        """Why there are no figures, or what is to be known about them; empty if nothing."""
        if self.error is not None:
            return f"{self.stage}: {type(self.error).__name__}: {self.error.message}"
        remarks = [f"{count} nodes on {where}" for where, count in self.elsewhere.items()]
        if self.latency is not None and self.latency.verdict != "VALID":
            remarks.append(f"{self.latency.queries} calls are few")
        return "; ".join(remarks)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        error = self.error
        return {
            "target": self.setup.target,
            "precision": self.setup.precision,
            "batch": self.setup.batch,
            "cores": self.setup.cores,
            "replicas": self.setup.replicas,
            "status": "measured" if self.measured else "failed",
            "nature": self.nature,
            "engine": self.primary,
            "precisions": list(self.precisions),
            "nodes_by_engine": dict(self.nodes_by_engine),
            "nodes_elsewhere": dict(self.elsewhere),
            "compile_s": self.compile_s,
            "rows_per_s": self.rows_per_s,
            "single_stream": None if self.latency is None else self.latency.to_json(),
            "offline": None if self.offline is None else self.offline.to_json(),
            "reason": self.reason,
            "error": None
            if error is None
            else {"stage": self.stage, "type": type(error).__name__, "message": error.message, "hint": error.hint},
        }


def combinations(
    targets: Sequence[str],
    *,
    precisions: Sequence[str] = (),
    batches: Sequence[int] = (),
    cores: Sequence[int] = (),
    replicas: Sequence[int] = (),
) -> tuple[Setup, ...]:
    """Return every combination, the last argument changing fastest; an empty sequence leaves that choice alone.

    Raises:
        TargetError: A target cannot be read.
        OptionError: There is no target, a value is named twice, is no precision, or no number of 1 or more.
    """
    numbers = {"batch": batches, "cores": cores, "replicas": replicas}
    for name, values in (("target", targets), ("precision", precisions), *numbers.items()):
        if len(set(values)) != len(values):
            raise OptionError(f"{name} names a value twice: {', '.join(map(str, values))}.")
    for name, sizes in numbers.items():
        if any(type(size) is not int or size < 1 for size in sizes):
            raise OptionError(f"{name} takes whole numbers from 1, not {', '.join(map(str, sizes))}.")
    if not targets:
        raise OptionError("There is no target to sweep over.", hint="Name one: cpu.")
    named: list[Precision | None] = [precision_named(precision) for precision in precisions]
    texts = [str(parse(target)) for target in targets]
    every = itertools.product(texts, named or (None,), batches or (None,), cores or (None,), replicas or (None,))
    return tuple(Setup(*each) for each in every)


def sweep_setups(
    model: Any,
    setups: Sequence[Setup],
    effort: Effort | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    fallback: str = "allow",
    driver: DriverName = "auto",
) -> Iterator[SetupRow]:
    """Compile, load and measure every combination in turn, and yield its row when it is done.

    A combination of which no node runs on the engine and in the precision asked for fails; where only some do not, the
    row says how many. A session is loaded with ``fallback="error"``: figures are never those of another engine than
    the artifact says. Whoever stops early, by an interrupt too, keeps the rows that were yielded.

    Args:
        model: Whatever `accelrt.compile` takes, but no artifact: that is compiled already.
        setups: What `combinations` returns, or some of it.
        effort: For each of two scenarios of each combination, two seconds by default; its seed draws the inputs too.
        options: Of source, partitioner and engines; every target must know them.
        sizes: Of open dimensions other than the batch, else 1.
        fallback: For compiling: ``"error"`` makes a combination fail that would leave nodes to the CPU.
        driver: As for `accelrt.scenarios.measure`.

    Raises:
        OptionError: The model is an artifact, or there is no such driver.
        SourceError: There is no such file.
        BenchmarkError: LoadGen was asked for and is not installed.
    """
    effort = effort or Effort(SECONDS, QUERIES, WARMUP)
    _check_model(model)
    chosen = resolve(driver)
    for setup in setups:
        yield _Attempt(model, setup, effort, options, sizes or {}, fallback, chosen).row()


def _check_model(model: Any) -> None:
    from accelrt.artifact.artifact import Artifact, is_artifact

    path = Path(model) if isinstance(model, str | Path) else None
    if isinstance(model, Artifact) or (path is not None and is_artifact(path)):
        raise OptionError(
            "The model is an artifact, which is compiled already: there is nothing to sweep over.",
            hint="Give the model it came from.",
        )
    if path is not None and not path.exists():
        raise SourceError(f"There is no file {path}.")


@dataclass(frozen=True, slots=True)
class _Attempt:
    model: Any
    setup: Setup
    effort: Effort
    options: Mapping[str, Any] | None
    sizes: Mapping[str, int]
    fallback: str
    driver: str

    def row(self) -> SetupRow:
        """Return figures, or why there are none."""
        row = SetupRow(self.setup, _nature_of(self.setup.target))
        stage: Stage = "compile"
        try:
            start = time.perf_counter()
            artifact = self._compile()
            row = replace(_placed(row, artifact), compile_s=time.perf_counter() - start)
            _check_placement(artifact)
            stage = "load"
            with accelrt.load(artifact, replicas=self.setup.replicas, fallback="error") as session:
                stage = "run"
                samples = _samples(artifact.signature, self.setup.batch, self.sizes, self.effort.seed)
                driver: Any = self.driver
                row = replace(row, latency=measure(session, samples, SingleStream(), self.effort, driver=driver))
                return replace(row, offline=measure(session, samples, Offline(), self.effort, driver=driver))
        except AccelrtError as error:
            return replace(row, error=error, stage=stage)

    def _compile(self) -> Artifact:
        asked: dict[str, Any] = {"batch": self.setup.batch, "cores": self.setup.cores}
        given = {name: value for name, value in asked.items() if value is not None}
        setup = self.setup
        return accelrt.compile(
            self.model,
            setup.target,
            precision=setup.precision,
            options=self.options,
            fallback=self.fallback,
            **given,
        )


def _nature_of(target: str) -> Nature | None:
    try:
        return REGISTRY.candidates(parse(target))[0].engine.caps.nature
    except AccelrtError:
        return None  # compiling says what is wrong


def _placed(row: SetupRow, artifact: Artifact) -> SetupRow:
    placement = artifact.placement
    return replace(
        row,
        precisions=tuple(sorted({segment.precision for segment in placement.segments})),
        nodes_by_engine=dict(placement.nodes_by_engine),
        elsewhere=dict(placement.nodes_elsewhere),
        primary=placement.primary,
    )


def _check_placement(artifact: Artifact) -> None:
    """Raise `UnsupportedNodes` if nothing runs as asked: the figures would be those of something else."""
    placement = artifact.placement
    nodes = sum(placement.nodes_by_engine.values())
    if nodes and placement.fallen_back == nodes:
        wanted = placement.primary + (f" in {placement.precision}" if placement.precision is not None else "")
        refusal = next((one for one in placement.refusals if one.engine == placement.primary), None)
        why = f" First: {refusal.node} ({refusal.kind}): {refusal.reason}." if refusal is not None else ""
        raise UnsupportedNodes(f"No node runs on {wanted}.{why}", hint="`accelrt explain` lists every reason.")


def _samples(signature: Signature, batch: int | None, sizes: Mapping[str, int], seed: int) -> list[dict[str, Value]]:
    from accelrt.runtime.draw import random_inputs

    bound = signature if batch is None else _with_rows(signature, batch)
    first = random_inputs(bound, sizes, seed)
    size = sum(getattr(value, "nbytes", 0) for value in first.values())
    count = max(1, min(_SAMPLES, _SAMPLES_BYTES // max(1, size)))
    return [first, *(random_inputs(bound, sizes, seed + number) for number in range(1, count))]


def _with_rows(signature: Signature, rows: int) -> Signature:
    """Return the signature with the open first dimension of every input set to a number."""
    from accelrt.graph.types import TensorType

    ports = []
    for port in signature.inputs:
        type_ = port.type
        if isinstance(type_, TensorType) and type_.shape and not isinstance(type_.shape[0], int):
            port = replace(port, type=TensorType(type_.dtype, (rows, *type_.shape[1:])))
        ports.append(port)
    return replace(signature, inputs=tuple(ports))
