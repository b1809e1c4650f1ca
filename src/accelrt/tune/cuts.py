"""Cuts that pay: measure segments on the requested engine and on the CPU, and keep the cut that is fastest.

What is measured are whole calls of a `Session` on programs as they will be loaded, so that hand-overs count as they
will in use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import NoReturn, Self

from accelrt.artifact.refine import Refine, Refined, Workbench
from accelrt.backend import Executable
from accelrt.errors import CompileError, CoresUnavailable, DeviceError, ExecutionError, IncompatibleProgram, InputError
from accelrt.graph.types import Signature, Value
from accelrt.partition.cut import Piece, cut
from accelrt.partition.report import Tuning
from accelrt.partition.search import (
    MAX_CUTS,
    Island,
    Owners,
    cpu_alone,
    explained,
    heir_of,
    look_of,
    owners_of,
    search,
    unite,
)
from accelrt.registry import Candidate, devices_of
from accelrt.runtime.draw import random_inputs, symbolic_dimensions
from accelrt.runtime.faults import Faults, StandIn
from accelrt.runtime.load import load_program, mark_spent
from accelrt.runtime.replica import Replica, Step
from accelrt.runtime.session import Session
from accelrt.target import Target, parse
from accelrt.tune.contest import choose, settle, take_turns
from accelrt.verification import digest_of

logger = logging.getLogger("accelrt")

MAX_ALONE = 32
"""Islands that are compiled for the CPU by themselves at most; of those that look alike one stands for all."""
MAX_COMPILES = 96
"""Segments compiled at most beyond the first cut and the CPU alone, those islands included. A cut that would need more
is not tried."""
OUTCLASSED = 10.0
"""Who took so many times the best does not enter the contest: no noise makes up for that. It is more than `HOPELESS`,
which ends a measurement early and may do so because of a burst of other work."""
SEED = 0

_UNFIT = (CompileError, DeviceError, IncompatibleProgram, ExecutionError)
"""What rules one cut out, but not the model."""

Call = Mapping[str, Value]


def cut_tuner(signature: Signature, candidates: Sequence[Candidate], target: Target, call: Call | None) -> Refine:
    """Return a refinement of a compile that keeps the fastest cut.

    Args:
        signature: Of the model.
        candidates: The engines that a compile will ask, best first.
        target: What was asked for.
        call: The inputs of one call to measure, bound to the signature; None draws seeded random ones.

    Raises:
        CoresUnavailable: A backend has no device here to measure on.
        InputError: Nothing can be drawn for an input of unknown rank.
    """
    digest = hashlib.sha256()
    if call is None:
        random_inputs(signature, {}, SEED)  # whether it can be drawn is known before anything is compiled
        digest.update(f"random {SEED}".encode())
    else:
        digest.update(digest_of([call]).encode())
    facts = []
    for candidate in candidates:
        found = devices_of(candidate.backend, target.devices if candidate.backend.name == target.backend else None)
        if not found:
            _no_device(candidate.backend.name)
        facts.append([[d.name, d.description, d.memory_bytes, dict(d.properties)] for d in found])
    digest.update(json.dumps(facts, sort_keys=True).encode())

    def run(bench: Workbench) -> Refined:
        with _Residents(bench) as residents:
            return _CutTuner(bench, residents, call).run()

    return Refine(digest.hexdigest(), run)


class _Timed(Executable):
    """A program that notes how long each run took; the one it stands for is closed by who loaded it."""

    def __init__(self, inner: Executable) -> None:
        self._inner = inner
        self.seconds: list[float] = []

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        start = time.perf_counter()
        outputs = self._inner.run(inputs)
        self.seconds.append(time.perf_counter() - start)
        return outputs

    def close(self) -> None:
        self.seconds.clear()


class _Residents:
    """Programs on their devices. What several cuts share is loaded once."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._target = parse(bench.target)
        self._loaded: dict[Piece, Executable] = {}

    def load(self, piece: Piece) -> Executable:
        """Return a piece's program, resident.

        Raises:
            CompileError, DeviceError, IncompatibleProgram: It cannot be had.
        """
        if piece not in self._loaded:
            program = self._bench.program(piece)
            candidate = self._bench.candidates[piece.owner]
            mine = candidate.backend.name == self._target.backend
            devices = devices_of(candidate.backend, self._target.devices if mine else None)
            if not devices:
                _no_device(candidate.backend.name)
            self._loaded[piece] = load_program(candidate.engine, program, devices)
        return self._loaded[piece]

    def keep(self, pieces: Sequence[Piece]) -> None:
        """Close all programs but these."""
        for piece in self._loaded.keys() - set(pieces):
            self._loaded.pop(piece).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(())


@dataclass(frozen=True, slots=True)
class _Rig:
    """A cut ready to be called."""

    pieces: tuple[Piece, ...]
    session: Session
    timed: tuple[_Timed, ...]

    def seconds_of(self, calls: int) -> tuple[float, ...]:
        """Return the median seconds of each segment over its last calls."""
        return tuple(median(timed.seconds[-calls:]) for timed in self.timed)


@dataclass(frozen=True, slots=True)
class _Measured:
    """A cut that was measured: seconds a call, of the whole and of each segment."""

    pieces: tuple[Piece, ...]
    whole: float
    parts: tuple[float, ...]


class _CutTuner:
    def __init__(self, bench: Workbench, residents: _Residents, call: Call | None) -> None:
        self._bench, self._residents = bench, residents
        self._given = call
        self._measured: dict[Owners, _Measured] = {}
        self._asked = 0
        self._compiled = 0

    def run(self) -> Refined:
        bench = self._bench
        nodes, candidates = bench.graph.nodes, bench.candidates
        first = owners_of(bench.first.pieces)
        call, feeds = self._first_call()
        self._measured[first] = self._time(self._rig(bench.first.pieces), call)
        islands = self._islands(feeds)
        del feeds
        units = unite(nodes, islands)
        alone = cpu_alone(nodes, first, candidates, bench.precisions, bench.refused)
        found = search(first, alone, units, lambda owners: self._measure(owners, call, anchor=owners in (first, alone)))
        kept, measured = self._decide(first, alone, found.best, call)
        whole, cpu = measured[kept].whole, measured.get(alone)
        before = measured[first]
        tuning = Tuning(
            "random" if self._given is None else "given",
            len(self._measured),
            whole,
            before.whole,
            len(before.pieces),
            cpu.whole if cpu is not None and alone != first else None,
            len(cpu.pieces) if cpu is not None else 0,
        )
        best = explained(bench.first, measured[kept].pieces, units, candidates, before.whole, whole)
        return Refined(best, measured[kept].parts, tuning)

    # Calls

    def _first_call(self) -> tuple[Call, list[Call]]:
        """Return the inputs to measure with, and what each segment of the first cut reads when it is given them.

        Raises:
            ExecutionError: The model fails on the inputs that were given.
            InputError: It fails on random ones.
        """
        rig = self._rig(self._bench.first.pieces)
        if self._given is not None:
            return self._given, [feeds for feeds, _ in rig.session.trace(self._given)]
        signature = self._bench.graph.signature
        sizes = symbolic_dimensions(signature)
        problem: ExecutionError | None = None
        for size in (1, 2) if sizes else (1,):  # models exist that do not take a dimension of 1
            call = random_inputs(signature, dict.fromkeys(sizes, size), SEED)
            try:
                return call, [feeds for feeds, _ in rig.session.trace(call)]
            except ExecutionError as error:
                problem = error
        raise InputError(
            f"The model is to be measured, and fails on random inputs: {problem.message if problem else ''}",
            hint="Give inputs of your own: example_inputs=...",
        ) from problem

    # Measuring

    def _rig(self, pieces: Sequence[Piece]) -> _Rig:
        """Load a cut.

        Raises:
            CompileError, DeviceError, IncompatibleProgram: It cannot be had.
        """
        signature = self._bench.graph.signature
        timed: list[_Timed] = []
        steps: list[Step] = []
        stand_in, faults = StandIn(_no_stand_in), Faults("error")
        for piece in pieces:
            ports = self._bench.program(piece).signature
            timed.append(_Timed(self._residents.load(piece)))
            name = self._bench.candidates[piece.owner].name
            steps.append(Step(name, timed[-1], ports.input_names, ports.output_names, stand_in))
        mark_spent(steps, signature.output_names)
        replica = Replica(signature, steps, faults)
        session = Session(signature, [replica], replica, faults=faults, workers=1, resources=ExitStack())
        return _Rig(tuple(pieces), session, tuple(timed))

    def _time(self, rig: _Rig, call: Call, best_s: float = math.inf) -> _Measured:
        samples = settle(lambda: rig.session.predict(call), best_s=best_s)
        return _Measured(rig.pieces, median(samples), rig.seconds_of(len(samples)))

    def _measure(self, owners: Owners, call: Call, *, anchor: bool) -> float | None:
        """Time a cut as the search asks for it; None where it cannot be had, or not within the bound on compiles."""
        self._bench.progress("measuring cuts", self._asked, MAX_CUTS)
        self._asked += 1
        if owners in self._measured:
            return self._measured[owners].whole
        pieces = cut(self._bench.graph.nodes, owners)
        new = sum(1 for piece in pieces if not self._bench.is_compiled(piece))
        if not anchor:
            if self._compiled + new > MAX_COMPILES:
                return None
            self._compiled += new
        self._residents.keep((*self._bench.first.pieces, *pieces))
        best = min(measured.whole for measured in self._measured.values())
        try:
            try:
                rig = self._rig(pieces)
            except DeviceError:  # perhaps for want of room beside the first cut
                self._residents.keep(pieces)
                rig = self._rig(pieces)
            self._measured[owners] = self._time(rig, call, best)
        except _UNFIT as error:
            logger.info("A cut into %d segments is out: %s", len(pieces), error)
            return None
        return self._measured[owners].whole

    def _islands(self, feeds: Sequence[Call]) -> list[Island]:
        """Return the pieces that could run on the CPU, with their times there and here."""
        bench, nodes = self._bench, self._bench.graph.nodes
        there = self._measured[owners_of(bench.first.pieces)].parts
        able = [
            (number, heir)
            for number, piece in enumerate(bench.first.pieces)
            if (heir := heir_of(nodes, piece, bench.candidates, bench.precisions, bench.refused)) is not None
        ]
        # Those that take the longest first: if not all can be tried alone, these matter most.
        here: dict[object, float] = {}
        islands: dict[int, Island] = {}
        for number, heir in sorted(able, key=lambda item: (-there[item[0]], item[0])):
            piece = bench.first.pieces[number]
            look = (look_of(nodes, piece), heir)
            if look not in here and len(here) < MAX_ALONE:
                bench.progress("measuring segments on the CPU", len(here), min(len(able), MAX_ALONE))
                here[look] = self._time_alone(Piece(heir, piece.nodes), feeds[number])
            if here.get(look) != math.inf:
                islands[number] = Island(piece, heir, there[number], here.get(look))
        return [islands[number] for number in sorted(islands)]

    def _time_alone(self, piece: Piece, feeds: Call) -> float:
        """Time an island on the CPU by itself; infinite if it cannot be had."""
        self._compiled += not self._bench.is_compiled(piece)
        try:
            executable = self._residents.load(piece)
            seconds = median(settle(lambda: executable.run(feeds)))
        except Exception as error:  # noqa: BLE001 - engines raise what they like at run
            logger.info("An island of %d nodes does not run on the CPU: %s", len(piece.nodes), error)
            return math.inf
        self._residents.keep(self._bench.first.pieces)
        return seconds

    # Deciding

    def _decide(self, first: Owners, alone: Owners, best: Owners, call: Call) -> tuple[Owners, dict[Owners, _Measured]]:
        """Let those that are any match take turns; return who is kept, and what was measured of each."""
        measured = {owners: self._measured[owners] for owners in (first, alone, best) if owners in self._measured}
        limit = OUTCLASSED * measured[best].whole
        finalists = [owners for owners in measured if measured[owners].whole <= limit]
        pieces = {owners: measured[owners].pieces for owners in finalists}
        if len(finalists) == 1:
            return best, measured
        self._bench.progress("comparing the fastest cuts", 0, 1)
        self._residents.keep([piece for owners in finalists for piece in pieces[owners]])
        try:
            rigs = [self._rig(pieces[owners]) for owners in finalists]
        except DeviceError as error:
            # They do not fit side by side: what each took by itself must do.
            logger.info("The fastest cuts cannot be compared side by side: %s", error)
            samples = [[measured[owners].whole] for owners in finalists]
        else:
            samples = take_turns([_caller(rig, call) for rig in rigs])
            for owners, rig, times in zip(finalists, rigs, samples, strict=True):
                measured[owners] = _Measured(rig.pieces, median(times), rig.seconds_of(len(times)))
        moved = [sum(a != b for a, b in zip(owners, first, strict=True)) for owners in finalists]
        costs = [(len(pieces[owners]), count) for owners, count in zip(finalists, moved, strict=True)]
        return finalists[choose(samples, costs)], measured


def _caller(rig: _Rig, call: Call) -> Callable[[], object]:
    return lambda: rig.session.predict(call)


def _no_stand_in(error: BaseException) -> Executable:
    raise error  # a session with fallback="error" never asks


def _no_device(backend: str) -> NoReturn:
    raise CoresUnavailable(
        f"tune=True measures the model on its devices, and backend {backend!r} has none here.",
        hint="Compile where the device is, or without tune.",
        backend=backend,
    )
