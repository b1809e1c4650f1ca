"""Compile a source that is taken whole: one segment, whose program holds the source, in an artifact's folder."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Entry
from accelrt.artifact.making import Check, Made, Progress, checked, found_or_made
from accelrt.artifact.manifest import SCHEMA, Manifest, SegmentRecord
from accelrt.artifact.store import describe_files, merge_program, program_files, write_placement
from accelrt.backend import WHOLE_FILES, CompileJob, Precision, Program
from accelrt.errors import CompileError, CorruptArtifact
from accelrt.graph.types import Port, static_bytes
from accelrt.partition.report import Placement, SegmentPlace, WholePlace
from accelrt.registry import Candidate
from accelrt.sources.whole import WholeModel

logger = logging.getLogger("accelrt")


@dataclass(frozen=True, slots=True)
class WholeRequest:
    """Everything besides the source that decides what compiling it whole gives.

    ``options`` are those of the candidate's engine, ``precision`` what it computes in, ``asked`` what the user asked
    for; ``framework`` is where the source comes from, ``reason`` why it runs whole.
    """

    target: str
    candidate: Candidate
    options: Any
    framework: str
    reason: str
    precision: Precision
    asked: Precision | None = None

    def key(self, model: WholeModel, check: Check | None = None) -> str:
        """Return the name under which the result is cached."""
        facts = {
            "accelrt": version("accelrt"),
            "schema": SCHEMA,
            "whole": [model.format, model.digest, model.signature.to_json()],
            "target": self.target,
            "framework": self.framework,
            "reason": self.reason,
            "precision": [self.precision, self.asked],
            "engine": [self.candidate.name, dict(self.candidate.engine.fingerprint()), asdict(self.options)],
            "check": None if check is None else check.key,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def build_whole(
    model: WholeModel,
    request: WholeRequest,
    *,
    cache: bool = True,
    progress: Progress | None = None,
    check: Check | None = None,
) -> Artifact:
    """Compile a source whole, or find it in the cache.

    Raises:
        CompileError: The engine refuses it, or fails.
        VerificationError: It does not pass the check.
    """
    _check_taken(model, request)
    if progress is not None:
        progress("compiling the whole model", 0, 1)
    return found_or_made(
        lambda folder: _compile_into(folder, model, request, check), lambda: request.key(model, check), cache=cache
    )


def build_whole_into(folder: Path, model: WholeModel, request: WholeRequest) -> Artifact:
    """Compile a source whole into an empty folder, which whoever asked keeps or removes; the cache is left alone.

    Raises:
        CompileError: The engine refuses it, or fails.
    """
    _check_taken(model, request)
    made = _compile_into(folder, model, request, None)
    return Artifact(Entry(folder, made.manifest, unfinished=True))


def _check_taken(model: WholeModel, request: WholeRequest) -> None:
    verdict = request.candidate.engine.supports_source(model.format, model.signature, request.precision)
    if not verdict.supported:
        raise CompileError(
            f"{request.candidate.name} does not take the source whole: {verdict.reason}.",
            backend=request.candidate.engine.name,
        )


def _compile_into(folder: Path, model: WholeModel, request: WholeRequest, check: Check | None) -> Made:
    engine = request.candidate.engine
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="programs-") as scratch:
        job = CompileJob(model.path, model.signature, request.precision, request.options, model.format)
        program = engine.compile(job, Path(scratch))
        if WHOLE_FILES[model.format] not in program.files:
            raise CompileError(f"{engine.name} kept no {WHOLE_FILES[model.format]!r} among the files of its program.")
        stored = merge_program(0, program, folder, None)
    placement = _placement(model, request, program.remark)
    write_placement(folder, placement.to_json())
    manifest = Manifest(
        accelrt=version("accelrt"),
        target=request.target,
        signature=model.signature,
        segments=(_record(request, program, stored),),
        files=describe_files(folder),
        options={"whole": model.format, **({} if request.asked is None else {"precision": request.asked})},
        source_format=request.framework,
    )
    return checked(folder, manifest, check)


def _record(request: WholeRequest, program: Program, files: Mapping[str, str]) -> SegmentRecord:
    return SegmentRecord(
        backend=request.candidate.backend.name,
        engine=request.candidate.engine.name,
        precision=program.precision,
        signature=program.signature,
        files=files,
        fingerprint=dict(program.fingerprint),
        options=asdict(program.options),
    )


def _placement(model: WholeModel, request: WholeRequest, remark: str) -> Placement:
    candidate = request.candidate
    segment = SegmentPlace(
        candidate.name,
        candidate.backend.name,
        request.precision,
        candidate.engine.caps.nature,
        (),
        model.path.stat().st_size if model.weight_bytes is None else model.weight_bytes,
        _total(model.signature.inputs),
        _total(model.signature.outputs),
    )
    place = WholePlace(model.format, request.reason, remark)
    return Placement(request.target, candidate.name, (segment,), (), request.asked, whole=place)


def _total(ports: tuple[Port, ...]) -> int | None:
    sizes = [static_bytes(port.type) for port in ports]
    return None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)


def whole_of(artifact: Artifact) -> WholeModel:
    """Return the source that an artifact holds whole.

    Raises:
        CorruptArtifact: It holds none.
    """
    manifest = artifact.manifest
    name = WHOLE_FILES.get(manifest.whole_format or "")
    if name is None or len(manifest.segments) != 1 or name not in manifest.segments[0].files:
        raise CorruptArtifact("The artifact says that its model runs whole, and does not hold it.")
    path = program_files(artifact.folder, manifest.segments[0])[name]
    placed = artifact.placement.segments
    return WholeModel(manifest.whole_format or "", path, manifest.signature, placed[0].weight_bytes if placed else None)
