"""``auto``: try every way to run a model that is exact enough, take the best as measured, and remember it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.candidates import CandidateRow, CandidateTable, Setup
from accelrt.artifact.making import Made, found_or_made
from accelrt.artifact.manifest import CANDIDATES, MANIFEST, SCHEMA, VERIFICATION, Manifest
from accelrt.artifact.store import add_records, finish
from accelrt.backend import Precision
from accelrt.errors import SourceError
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.types import Signature, TensorType, Value
from accelrt.graph.weights import WeightFile
from accelrt.partition.report import apply_policy
from accelrt.policy import Fallback
from accelrt.precision.compare import DEFAULT_RELATIVE_L2, Tolerance, tolerance_of
from accelrt.registry import REGISTRY, Candidate, takes_whole
from accelrt.target import parse
from accelrt.tune.goal import Goal
from accelrt.tune.machine import fingerprint, hidden_backends, machine, registered_classes
from accelrt.tune.search import Contender, choose_recorded, search
from accelrt.tune.space import Space, engine_options
from accelrt.tune.values import write_values
from accelrt.tune.workbench import Job, TuneOptions, Workbench
from accelrt.verification import Verification, Verifier, digest_of

if TYPE_CHECKING:
    from accelrt.artifact.making import Progress
    from accelrt.graph.model import Graph
    from accelrt.sources import WholeSource


@dataclass(frozen=True, slots=True)
class AutoRequest:
    """Everything that decides a choice, besides the model and the machine.

    Attributes:
        goal: What is to be best.
        verification: Inputs and tolerance that every candidate is held to; a tolerance of None is that of float32.
        example: The call that is timed; None for the first that is verified with.
        precision: The only precision to consider; None for all that the tolerance allows.
        given: Options of engines and the partitioner; what they fix is not varied.
        limits: Time and memory of trials.
        fallback: ``error`` rejects candidates that leave nodes to others.
        source_format: What the model was.
        quantise: Returns the graph in Q/DQ form; None where there are no inputs to calibrate with.
        calibration: Names what `quantise` works with.
        quantised: The model says itself where its integers are.
        profile: Figures measured earlier, on this machine or another, to choose by instead of measuring.
        whole: How engines that take whole sources get it; None where it is not to be had so.
    """

    goal: Goal
    verification: Verification
    example: Mapping[str, Value] | None
    precision: Precision | None
    given: Mapping[str, Any]
    limits: TuneOptions
    fallback: Fallback
    source_format: str
    quantise: Callable[[], Graph] | None = None
    calibration: str | None = None
    quantised: bool = False
    profile: CandidateTable | None = None
    whole: WholeSource | None = None

    def key(self, verifier: Verifier) -> str:
        """Return the name under which the choice is cached: model, request, toolchains and machine."""
        call = None if self.example is None else digest_of([self.example])
        facts = {
            "accelrt": version("accelrt"),
            "schema": SCHEMA,
            "verification": verifier.key(),  # which names the model, too
            "goal": asdict(self.goal),
            "example": call,
            "precision": self.precision,
            "given": {name: repr(value) for name, value in self.given.items()},
            "limits": asdict(self.limits),
            "fallback": self.fallback == "error",
            "source_format": self.source_format,
            "calibration": self.calibration,
            "profile": None if self.profile is None else self.profile.to_json(),
            "machine": fingerprint(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def choose(graph: Graph, request: AutoRequest, *, cache: bool = True, progress: Progress | None = None) -> Artifact:
    """Return the best artifact for a model, measured now or earlier, with the table of all candidates in it.

    Raises:
        NoCandidate: None is verified and within the budget.
        InputError: The inputs to verify with do not fit, or the reference cannot compute them.
    """
    verifier = Verifier(graph, request.verification, cache=cache)
    artifact = found_or_made(
        lambda folder: _tune(folder, graph, request, verifier, progress), lambda: request.key(verifier), cache=cache
    )
    apply_policy(artifact.placement, request.fallback)
    return artifact


def _tune(work: Path, graph: Graph, request: AutoRequest, verifier: Verifier, progress: Progress | None) -> Made:
    """Choose; return the winner, complete with what is known of it."""
    say = progress or (lambda *_: None)
    say("computing the reference", 0, 1)
    calls, wanted = verifier.reference()
    call = request.example if request.example is not None else calls[0]
    rows, open_batch = batch_of(graph.signature, call)
    bound = _bound(graph.signature, request)
    sources, int8_problem = _sources(work, graph, request, bound)
    space = Space(
        request.goal.objective,
        bound,
        request.precision,
        request.quantised,
        int8_problem,
        tuple(request.given),
        rows if open_batch else None,
        () if request.whole is None else request.whole.formats,
        graph.signature,
    )
    contenders, wholes = _captured(work, request.whole, _importable(space.contenders()))
    write_values(work / "wanted", wanted)
    write_values(work / "verified", calls)
    timed: dict[int | None, Path] = {None: work / "timed"}
    write_values(timed[None], [call])
    for count in {setup.batch for contender in contenders for setup in contender.variants} - {None}:
        timed[count] = work / f"timed-{count}"
        write_values(timed[count], [_repeat(call, (count or rows) // rows)])
    job = Job(
        sources,
        request.source_format,
        timed,
        work / "verified",
        work / "wanted",
        {c.base.target: engine_options(request.given, _chain(c.base.target)) for c in contenders if not c.excluded},
        request.fallback,
        _plain(graph.signature, request, verifier),
        registered_classes(),
        rows,
        request.verification.inputs is None,
        wholes,
    )
    with Workbench(job, request.goal, request.limits, work) as bench:
        if request.profile is None:
            table = search(contenders, request.goal, bench, say)
        else:
            table = _from_profile(contenders, request, bench, request.profile)
        winner = table[0].setup
        return _finished(bench, winner, _table(request, verifier, bench, winner, table))


def _from_profile(
    contenders: Sequence[Contender], request: AutoRequest, bench: Workbench, profile: CandidateTable
) -> tuple[CandidateRow, ...]:
    """Choose by recorded figures; the winner must still compile and be verified here, else the next one is taken."""
    recorded = list(profile.rows)
    while True:
        table = choose_recorded(contenders, request.goal, recorded)
        found = bench.compile(table[0].setup)
        if not found.reason:
            first = replace(table[0], error=found.error, compile_s=found.compile_s, size_bytes=found.size_bytes)
            return (first, *table[1:])
        recorded = [found if str(row.setup) == str(found.setup) else row for row in recorded]


def _finished(bench: Workbench, winner: Setup, table: CandidateTable) -> Made:
    """Put what is known of the winner beside what was compiled."""
    folder = bench.folder_of(winner)
    manifest = Manifest.parse((folder / MANIFEST).read_bytes())
    known = {VERIFICATION: bench.report_of(winner).to_json(), CANDIDATES: table.to_json()}
    options = dict(manifest.options) | ({"workers": winner.workers} if winner.workers > 1 else {})
    manifest = replace(add_records(folder, manifest, known), options=options)
    return Made(folder, manifest, finish(folder, manifest))


def _table(
    request: AutoRequest, verifier: Verifier, bench: Workbench, winner: Setup, rows: tuple[CandidateRow, ...]
) -> CandidateTable:
    tolerance = request.verification.tolerance
    return CandidateTable(
        request.goal.objective,
        request.goal.percentile,
        request.goal.latency_budget_s,
        float(tolerance) if isinstance(tolerance, int | float) else None,
        bench.report_of(winner).reference,
        dict(request.profile.machine) if request.profile is not None else machine(),
        rows,
    )


def _sources(work: Path, graph: Graph, request: AutoRequest, bound: float) -> tuple[dict[str, Path], str | None]:
    """Write the graph, and its Q/DQ form where int8 may be tried; return why it may not."""
    sources: dict[str, Path] = {}

    def write(name: str, version: Graph) -> None:
        (work / name).mkdir()
        with contextlib.closing(WeightFile(work / name / WEIGHTS_FILE)) as weights:
            version.write(work / name / "model.onnx", weights)
        sources[name] = work / name / "model.onnx"

    write("fp32", graph)
    if request.quantised:
        return sources, None
    if request.quantise is None:
        return sources, "int8 needs typical inputs to calibrate with: pass calibration=[...]"
    if request.precision not in (None, "int8") or Space("latency", bound).rules_out("int8"):
        return sources, None
    try:
        write("int8", request.quantise())
    except SourceError as error:
        return sources, error.message
    return sources, None


def _captured(
    work: Path, whole: WholeSource | None, contenders: Sequence[Contender]
) -> tuple[list[Contender], dict[str, Path]]:
    """Write the source whole for each engine that would take it so; exclude those for which that fails."""
    written: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for target in sorted({contender.base.target for contender in contenders if contender.excluded is None}):
        engine = _chain(target)[0].engine
        if whole is None or not takes_whole(engine):
            continue
        folder = work / f"whole-{len(written) + len(problems)}"
        folder.mkdir()
        try:
            whole.write(folder, engine.formats)
            written[target] = folder
        except SourceError as error:
            problems[target] = error.message
    return [
        replace(contender, variants=(), excluded=problems[contender.base.target])
        if contender.excluded is None and contender.base.target in problems
        else contender
        for contender in contenders
    ], written


def _bound(signature: Signature, request: AutoRequest) -> float:
    """Return the largest relative error that is tolerated of any output."""
    default = DEFAULT_RELATIVE_L2[request.precision or ("int8" if request.quantised else "fp32")]
    tolerances = tolerance_of(request.verification.tolerance, signature, default)
    return max((tolerance.relative_l2 for tolerance in tolerances.values()), default=default)


def _plain(signature: Signature, request: AutoRequest, verifier: Verifier) -> dict[str, Any]:
    """Return tolerance, labels and reference for a child process."""
    given = request.verification
    default = DEFAULT_RELATIVE_L2[request.precision or ("int8" if request.quantised else "fp32")]
    tolerances: Mapping[str, Tolerance] = tolerance_of(given.tolerance, signature, default)
    return {
        "tolerance": {name: asdict(tolerance) for name, tolerance in tolerances.items()},
        "labels": verifier.labels and {name: values.tolist() for name, values in verifier.labels.items()},
        "reference": given.reference,
    }


def batch_of(signature: Signature, call: Mapping[str, Value]) -> tuple[int, bool]:
    """Return how many rows a call has, and whether other calls may have more.

    A model has rows where all inputs and outputs share their first dimension; a call of one that has not counts as one.
    """
    firsts: set[int | str] = set()
    for port in (*signature.inputs, *signature.outputs):
        shape = port.type.shape if isinstance(port.type, TensorType) else None
        if not shape or shape[0] is None:
            return 1, False
        firsts.add(shape[0])
    if len(firsts) != 1 or not signature.inputs:
        return 1, False
    rows = int(np.asarray(call[signature.inputs[0].name]).shape[0])
    return max(rows, 1), isinstance(firsts.pop(), str) and rows > 0


def _repeat(call: Mapping[str, Value], times: int) -> dict[str, Value]:
    return {name: np.concatenate([value] * times) for name, value in call.items()}


def _importable(contenders: Sequence[Contender]) -> list[Contender]:
    """Exclude backends that were registered here by classes that a child process could not import."""
    hidden = hidden_backends()
    return [
        replace(c, variants=(), excluded="its class was registered in this process, and no child process can import it")
        if c.excluded is None and parse(c.base.target).backend in hidden
        else c
        for c in contenders
    ]


def every_engine() -> list[Candidate]:
    """Return every engine of every backend that can be loaded, usable or not."""
    found = []
    for name in REGISTRY.names():
        with contextlib.suppress(Exception):  # broken plug-ins know no options
            backend = REGISTRY.backend(name)
            found += [Candidate(backend, engine) for engine in backend.engines]
    return found


def _chain(target: str) -> Sequence[Candidate]:
    """Return the engines that may have a share in a model compiled for a target."""
    candidates = REGISTRY.candidates(parse(target))
    return candidates[:1] if takes_whole(candidates[0].engine) else candidates
