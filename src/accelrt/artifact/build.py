"""Compile a graph: assign, cut, compile each segment, and put the result into an artifact's folder."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Entry
from accelrt.artifact.making import Check, Made, Progress, checked, found_or_made
from accelrt.artifact.manifest import MAX_BATCH, SCHEMA, SOURCE, Manifest, SegmentRecord
from accelrt.artifact.refine import Refine, Workbench
from accelrt.artifact.store import describe_files, merge_program, write_placement
from accelrt.backend import CompileJob, Precision, Program
from accelrt.errors import BatchError, CompileError, OptionError
from accelrt.graph.bind import bind_first_dimension
from accelrt.graph.model import Graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.weights import WeightFile
from accelrt.options import Options
from accelrt.partition.assign import assign
from accelrt.partition.cost import Partition, partition
from accelrt.partition.cut import Piece
from accelrt.partition.report import Placement, apply_policy, merge, place
from accelrt.partition.rows import BatchAxis, prove_batch_axis
from accelrt.partition.stages import StagePlan, stage_pieces
from accelrt.policy import Fallback
from accelrt.registry import Candidate

logger = logging.getLogger("accelrt")


@cache  # reading it takes as long as a quarter of a load
def _version() -> str:
    return version("accelrt")


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Everything that decides what a compile gives; two equal requests give equal artifacts, but for what is measured.

    ``precision`` is what was asked for, ``precisions`` what each candidate computes in: its default if left out.
    ``batch`` holds the batch sizes to specialise to, ascending, none for what the signature says; ``stages`` says into
    how many stages to cut, None for no pipeline. ``refine`` improves the cut before its artifact is written; it is of
    one cut in one piece, so neither of the two goes with it. The engines among ``candidates`` are replaced by what
    their options make of them.

    Raises:
        OptionError: ``refine`` together with ``batch`` or ``stages``.
    """

    target: str
    candidates: tuple[Candidate, ...]
    options: Options
    source_format: str
    precision: Precision | None = None
    precisions: tuple[Precision, ...] = ()
    batch: tuple[int, ...] = ()
    stages: StagePlan | None = None
    refine: Refine | None = None

    def __post_init__(self) -> None:
        if not self.precisions:
            defaults = tuple(candidate.engine.caps.default_precision for candidate in self.candidates)
            object.__setattr__(self, "precisions", defaults)
        pairs = zip(self.candidates, self.options.engines, strict=True)
        made = tuple(replace(one, engine=one.engine.with_options(options)) for one, options in pairs)
        object.__setattr__(self, "candidates", made)
        if self.refine is not None and (self.batch or self.stages is not None):
            raise tuned_apart("batch" if self.batch else "cores")

    def key(self, graph: Graph, check: Check | None = None) -> str:
        """Return the name under which the result is cached: model, toolchains, options, format, check, tuning."""
        facts = {
            "accelrt": _version(),
            "schema": SCHEMA,
            "graph": graph.digest,
            "target": self.target,
            "source_format": self.source_format,
            "precision": self.precision,
            "check": None if check is None else check.key,
            "batch": self.batch,
            "stages": None if self.stages is None else asdict(self.stages),
            "refine": None if self.refine is None else self.refine.key,
            "partition": asdict(self.options.partition),
            "candidates": [
                [candidate.name, precision, dict(candidate.engine.fingerprint()), asdict(options)]
                for candidate, precision, options in zip(
                    self.candidates, self.precisions, self.options.engines, strict=True
                )
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def batch_sizes(given: int | Sequence[int] | None) -> tuple[int, ...]:
    """Read the argument ``batch``: ascending sizes, none for None.

    Raises:
        OptionError: Not a positive number, or several.
    """
    if given is None:
        return ()
    sizes: list[Any] = list(given) if isinstance(given, Sequence) else [given]
    if not sizes or any(type(size) is not int or not 1 <= size <= MAX_BATCH for size in sizes):
        raise OptionError(
            f"batch takes a number of rows from 1 to {MAX_BATCH}, or several, not {given!r}.", hint="batch=(1, 8)"
        )
    return tuple(sorted(set(sizes)))


def stage_plan(cores: int | StagePlan | None) -> StagePlan | None:
    """Read the argument ``cores``: None for one core, which needs no pipeline.

    Raises:
        OptionError: Not a positive number.
    """
    if cores is None:
        return None
    plan = cores if isinstance(cores, StagePlan) else StagePlan(cores)
    return plan if plan.count > 1 else None


def tuned_apart(other: str) -> OptionError:
    """Return the error that an argument does not go together with ``tune=True``."""
    return OptionError(
        f"tune=True is not offered together with {other}.",
        hint="Leave one out; measured_plan() measures the stages of a pipeline.",
    )


def build(
    graph: Graph,
    request: BuildRequest,
    *,
    fallback: Fallback,
    cache: bool = True,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Artifact:
    """Compile a graph, or find it in the cache, and apply the fallback policy to the placement.

    Raises:
        VerificationError: It does not pass the check.
        UnsupportedNodes: ``fallback`` is ``error`` and a node would leave the requested engine.
        CompileError: A node that no candidate can compile.
    """
    artifact = found_or_made(
        lambda folder: _compile_into(folder, graph, request, progress, check),
        lambda: request.key(graph, check),
        cache=cache,
    )
    apply_policy(artifact.placement, fallback)
    return artifact


def build_into(folder: Path, graph: Graph, request: BuildRequest, progress: Progress | None = None) -> Artifact:
    """Compile a graph into an empty folder, which whoever asked keeps or removes; the cache is left alone.

    Raises:
        CompileError: A node that no candidate can compile.
    """
    made = _compile_into(folder, graph, request, progress, None)
    return Artifact(Entry(folder, made.manifest, unfinished=True))


def _compile_into(
    folder: Path, graph: Graph, request: BuildRequest, progress: Progress | None, check: Check | None
) -> Made:
    axis = _batch_axis(graph, request.batch)
    weights = WeightFile(folder / WEIGHTS_FILE)
    graph.write(folder / SOURCE, weights)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="programs-") as scratch:
        segments: list[SegmentRecord] = []
        placements: list[Placement] = []
        for batch, variant in _variants(graph, axis, request.batch):
            workshop = _Workshop(variant, request, weights, folder, Path(scratch), progress or (lambda *_: None))
            cut = workshop.compile_all()
            refined = None
            if request.refine is not None:
                refined = request.refine.run(workshop.bench(cut))
                cut = refined.partition
            programs = [workshop.program(piece) for piece in cut.pieces]
            placements.append(
                _with_remarks(
                    place(
                        request.target,
                        variant,
                        request.candidates,
                        request.precisions,
                        cut,
                        request.precision,
                        None if refined is None else refined.seconds,
                        None if refined is None else refined.tuning,
                        batch,
                    ),
                    programs,
                )
            )
            stages = cut.stages or (None,) * len(cut.pieces)
            for piece, stage, program in zip(cut.pieces, stages, programs, strict=True):
                files = merge_program(len(segments), program, folder, weights)
                segments.append(replace(_record(request, piece.owner, program, files), batch=batch, stage=stage))
    weights.close()
    write_placement(folder, merge(placements).to_json())
    manifest = Manifest(
        accelrt=_version(),
        target=request.target,
        signature=graph.signature,
        segments=tuple(segments),
        files=describe_files(folder),
        options={
            "partition": asdict(request.options.partition),
            **({} if request.precision is None else {"precision": request.precision}),
            **({} if request.refine is None else {"tune": True}),
            **({} if axis is None else {"batch": {"sizes": list(request.batch), **asdict(axis)}}),
            **({} if request.stages is None else _stage_record(request.stages)),
        },
        source_format=request.source_format,
    )
    if check is not None and progress is not None:
        progress("verifying", 0, 1)
    return checked(folder, manifest, check)


def _with_remarks(placement: Placement, programs: Sequence[Program]) -> Placement:
    """Return a placement with what the engines said of their programs."""
    said = zip(placement.segments, programs, strict=True)
    return replace(placement, segments=tuple(replace(segment, remark=one.remark) for segment, one in said))


def _stage_record(plan: StagePlan) -> dict[str, Any]:
    return {"cores": plan.count, "stage_costs": "estimated" if plan.costs is None else "given"}


def _batch_axis(graph: Graph, sizes: Sequence[int]) -> BatchAxis | None:
    """Prove that a model may be specialised to batch sizes, if that is asked for.

    Raises:
        BatchError: Its rows are not proved to be independent.
    """
    if not sizes:
        return None
    axis = prove_batch_axis(graph, sizes)
    if not axis.proved:
        raise BatchError(
            f"The model cannot be compiled for batch sizes {', '.join(map(str, sizes))}: {axis.reason}.",
            hint="Leave out batch=, and pass whole batches to predict.",
        )
    return axis


def _variants(graph: Graph, axis: BatchAxis | None, sizes: Sequence[int]) -> Iterator[tuple[int | None, Graph]]:
    if axis is None or not graph.nodes:  # a model that computes nothing takes any batch
        yield None, graph
        return
    for size in sizes:
        yield size, bind_first_dimension(graph, size)


def _record(request: BuildRequest, owner: int, program: Program, files: Mapping[str, str]) -> SegmentRecord:
    candidate = request.candidates[owner]
    return SegmentRecord(
        backend=candidate.backend.name,
        engine=candidate.engine.name,
        precision=request.precisions[owner],
        signature=program.signature,
        files=files,
        fingerprint=dict(program.fingerprint),
        options=asdict(program.options),
    )


@dataclass(frozen=True, slots=True)
class _Workshop:
    """What compiling the pieces of one graph needs at hand."""

    graph: Graph
    request: BuildRequest
    weights: WeightFile
    folder: Path
    scratch: Path
    progress: Progress
    done: dict[Piece, Program] = field(default_factory=dict)
    refused: dict[tuple[int, int], str] = field(default_factory=dict)

    def bench(self, cut: Partition) -> Workbench:
        """Return what a refinement of this cut needs."""
        request = self.request
        return Workbench(
            self.graph,
            request.target,
            request.candidates,
            request.precisions,
            cut,
            self.refused,
            self.program,
            self.done.__contains__,
            self.progress,
        )

    def program(self, piece: Piece) -> Program:
        """Return a piece's program, compiling it unless that was done before.

        Raises:
            CompileError: Its engine cannot compile it.
        """
        if piece not in self.done:
            self.done[piece] = self._compile_piece(piece)
        return self.done[piece]

    def compile_all(self) -> Partition:
        """Cut and compile; where an engine fails on a segment, it refuses those nodes and the graph is cut anew."""
        graph, request, refused = self.graph, self.request, self.refused
        while True:
            self.progress("assigning nodes", 0, len(graph.nodes))
            assignment = assign(graph.nodes, request.candidates, request.precisions, refused)
            cut = partition(
                graph.nodes,
                assignment,
                request.candidates,
                request.precisions,
                request.options.partition.min_segment_nodes,
                refused,
            )
            if request.stages is not None:
                staged = stage_pieces(graph, cut.pieces, request.stages)
                stages = tuple(one.stage for one in staged)
                cut = replace(cut, pieces=tuple(one.piece for one in staged), stages=stages)
            failure = self._compile_pieces(cut.pieces)
            if failure is None:
                return cut
            piece, error = failure
            logger.info("%s failed on %d nodes: %s", request.candidates[piece.owner].name, len(piece.nodes), error)
            refused.update(((piece.owner, index), f"failed to compile: {error}") for index in piece.nodes)

    def _compile_pieces(self, pieces: Sequence[Piece]) -> tuple[Piece, CompileError] | None:
        for number, piece in enumerate(pieces):
            self.progress("compiling segments", number, len(pieces))
            try:
                self.program(piece)
            except CompileError as error:
                return piece, error
        self.progress("compiling segments", len(pieces), len(pieces))
        return None

    def _compile_piece(self, piece: Piece) -> Program:
        segment = self.graph.extract(piece.nodes)
        model = self.folder / "segment.onnx"
        segment.write(model, self.weights)
        self.weights.flush()
        out = Path(tempfile.mkdtemp(dir=self.scratch))
        owner = piece.owner
        job = CompileJob(model, segment.signature, self.request.precisions[owner], self.request.options.engines[owner])
        try:
            return self.request.candidates[owner].engine.compile(job, out)
        finally:
            model.unlink()
