"""The set-ups that ``auto`` considers: engines, the precisions that the tolerance allows, threads, callers, batches."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from accelrt.artifact.candidates import Objective, Setup
from accelrt.backend import Engine, Precision
from accelrt.errors import AccelrtError
from accelrt.graph.types import Signature
from accelrt.registry import REGISTRY, Candidate, status_of, takes_whole
from accelrt.tune.search import Contender

ROUNDING: Mapping[Precision, float] = {"fp32": 2**-24, "fp16": 2**-11, "bf16": 2**-8, "int8": 2**-8}
"""Relative error of rounding one number once: half the distance of neighbours (IEEE 754 for the floats; for int8 that
of the largest value). Whole networks are rarely nearer to the truth than this, so a stricter tolerance rules it out."""

BATCHES = (1, 4, 16)
"""Multiples of the rows given that are tried where throughput is wanted and the batch is open."""


@dataclass(frozen=True, slots=True)
class Space:
    """What decides which set-ups there are.

    Attributes:
        objective: What is to be best.
        bound: The largest relative L2 error that any output may have.
        precision: The only precision to consider; None for all.
        quantised: The model says itself where its integers are.
        int8_problem: Why a model that is not quantised cannot be tried in int8; None if it can.
        given: The user's options; what they fix is not varied.
        rows: Rows of the call where the model's batch is open, None where it is not.
        formats: Formats in which the source can be had whole.
        signature: Of the model.
    """

    objective: Objective
    bound: float
    precision: Precision | None = None
    quantised: bool = False
    int8_problem: str | None = None
    given: Collection[str] = ()
    rows: int | None = None
    formats: tuple[str, ...] = ()
    signature: Signature = field(default_factory=lambda: Signature((), ()))

    def contenders(self) -> list[Contender]:
        """Return every engine of every backend in every precision, those that cannot be tried with the reason."""
        found: list[Contender] = []
        for name in REGISTRY.names():
            try:
                backend = REGISTRY.backend(name)
                devices = len(backend.devices())
            except Exception as error:  # noqa: BLE001 - a broken plug-in is a row with its reason
                told = error.message if isinstance(error, AccelrtError) else f"{type(error).__name__}: {error}"
                found.append(Contender(Setup(name, "fp32"), excluded=told))
                continue
            for engine in backend.engines:
                found.extend(self._of_engine(Candidate(backend, engine), devices))
        return found

    def _of_engine(self, candidate: Candidate, devices: int) -> list[Contender]:
        engine, nature = candidate.engine, candidate.engine.caps.nature
        reason = self._unfit(candidate, devices)
        if reason is not None:
            precision = self.precision or engine.caps.default_precision
            return [Contender(Setup(candidate.name, precision), excluded=reason, nature=nature)]
        wanted = [p for p in get_args(Precision) if (self.precision or ("int8" if self.quantised else p)) == p]
        return [self._contender(candidate, precision, devices) for precision in wanted]

    def _unfit(self, candidate: Candidate, devices: int) -> str | None:
        caps = candidate.engine.caps
        if caps.nature == "emulated":
            return "an emulator is never chosen unless it is asked for by name"
        if caps.last_resort:
            return "right but slow; it takes only what nothing else can run"
        # Before its status, for which some import a framework in a child process: seconds that nobody asked for.
        if takes_whole(candidate.engine) and self._format_for(candidate.engine) is None:
            return f"it takes sources whole, as {' or '.join(candidate.engine.formats)}; this one is not to be had so"
        if not (status := status_of(candidate.engine)).usable:
            return f"not usable here: {status.reason}" + (f" (try: {status.remedy})" if status.remedy else "")
        return None if devices else "its backend has no device here"

    def _format_for(self, engine: Engine) -> str | None:
        """Return the format in which an engine gets the source whole, None if there is none."""
        return next((name for name in self.formats if name in engine.formats), None)

    def _contender(self, candidate: Candidate, precision: Precision, devices: int) -> Contender:
        excluded = self._excluded(precision) or self._refused(candidate.engine, precision)
        setups = [] if excluded else self._setups(candidate, precision, devices)
        first, *others = setups or [Setup(candidate.name, precision)]
        return Contender(first, tuple(others), excluded, candidate.engine.caps.nature)

    def _excluded(self, precision: Precision) -> str | None:
        if self.quantised:
            return None if precision == "int8" else "the model is quantised already, which is int8"
        if self.rules_out(precision):
            return f"rounding to {precision} alone costs {ROUNDING[precision]:.1e}; the tolerance is {self.bound:g}"
        return self.int8_problem if precision == "int8" else None

    def _refused(self, engine: Engine, precision: Precision) -> str | None:
        """Return why an engine does not take the source whole in a precision; None if it does, or takes graphs."""
        if not takes_whole(engine):
            return None
        verdict = engine.supports_source(self._format_for(engine) or "", self.signature, precision)
        return None if verdict.supported else verdict.reason

    def rules_out(self, precision: Precision) -> bool:
        """Whether the tolerance is stricter than what rounding to a precision costs."""
        return ROUNDING[precision] > self.bound

    def _setups(self, candidate: Candidate, precision: Precision, devices: int) -> list[Setup]:
        """Return set-ups, the most promising first."""
        setups = [
            Setup(candidate.name, precision, options, workers, self.rows if self._batched else None)
            for options, workers in self._sharing(candidate.engine, devices)
        ]
        if self._batched:
            first, rows = setups[0], self.rows or 1
            setups += [Setup(first.target, precision, first.options, first.workers, rows * n) for n in BATCHES[1:]]
        return setups

    @property
    def _batched(self) -> bool:
        return self.objective == "throughput" and self.rows is not None

    def _sharing(self, engine: Engine, devices: int) -> list[tuple[dict[str, Any], int]]:
        """Return how the cores may be shared out: threads of an engine, and calls in flight."""
        known = {option.name for option in fields(engine.options)}
        threads = "threads" in known and not {"threads", f"{engine.name}.threads"} & set(self.given)
        streams = "streams" in known and not {"streams", f"{engine.name}.streams"} & set(self.given)
        if self.objective != "throughput":
            return [({}, 1), *(({"threads": count}, 1) for count in fewer_cores() if threads)]
        if not threads:
            return [({}, max(1, engine.caps.parallelism * devices)), ({}, 1)]
        cores = available_cores()
        shares = [(cores // count, count) for count in (1, *fewer_cores()[:-1])]
        return [
            *(
                ({"threads": cores if streams else each} | ({"streams": workers} if streams else {}), workers)
                for workers, each in shares
                if workers > 1
            ),
            ({}, 1),
        ]


def fewer_cores() -> list[int]:
    """Return smaller numbers of threads that are worth trying: half of the cores (one of each pair), and one."""
    cores = available_cores()
    return sorted({cores // 2, 1} - {0, cores}, reverse=True)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_options(given: Mapping[str, Any], chain: Sequence[Candidate]) -> dict[str, Any]:
    """Return those of a user's options that one of these engines, the partitioner or the source knows."""
    from accelrt.options import PartitionOptions

    known = {known.name for known in fields(PartitionOptions)}
    for candidate in chain:
        names = {known.name for known in fields(candidate.engine.options)}
        known |= names | {f"{candidate.engine.name}.{name}" for name in names}
    return {name: value for name, value in given.items() if name in known}
