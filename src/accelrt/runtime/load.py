"""Bring an artifact onto its devices: the programs as they are, compiled again, or the CPU instead, by policy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelrt import options as option_module
from accelrt.artifact.artifact import Artifact
from accelrt.artifact.manifest import SegmentRecord
from accelrt.artifact.store import program_files
from accelrt.backend import Device, Engine, Executable, Program
from accelrt.errors import (
    AccelrtError,
    ArtifactError,
    BackendUnavailable,
    CoresUnavailable,
    CorruptArtifact,
    DeviceError,
    IncompatibleProgram,
    RegistryError,
    TargetError,
)
from accelrt.graph.types import Value
from accelrt.options import Options
from accelrt.policy import Fallback, announce
from accelrt.precision.plan import plan, precision_named
from accelrt.registry import CPU, REGISTRY, Candidate, devices_of, find_engine, status_of, unavailable
from accelrt.runtime.compose import composed_session, is_composed
from accelrt.runtime.session import Session, Step
from accelrt.target import Target, parse

logger = logging.getLogger("accelrt")


def open_session(artifact: Artifact, *, devices: tuple[int, ...] | None = None, fallback: Fallback = "warn") -> Session:
    """Load an artifact.

    Args:
        artifact: What to load.
        devices: Indices within the artifact's backend; None for those its target names, else all.
        fallback: What to do where a segment cannot run as it was compiled.

    Raises:
        BackendUnavailable, IncompatibleProgram, DeviceError: By ``fallback="error"``, or because the artifact carries
            no source to compile again.
        CoresUnavailable: ``devices`` names one that does not exist.
    """
    target = parse(artifact.manifest.target)
    wanted = devices if devices is not None else target.devices
    if (stale := _stale(artifact)) is not None:
        artifact = _rebuilt(artifact, target, stale, fallback)

    def load_part(part: Artifact) -> Session:
        return _Loader(part, target, wanted, devices is not None, fallback).session()

    if is_composed(artifact):
        return composed_session(artifact, load_part, fallback)
    return load_part(artifact)


def _stale(artifact: Artifact) -> AccelrtError | None:
    """Return why a segment's program cannot be loaded here as it is, None if all can."""
    for segment in artifact.manifest.segments:
        try:
            engine = find_engine(REGISTRY.backend(segment.backend), segment.engine)
        except (TargetError, RegistryError) as error:
            return BackendUnavailable(
                f"The artifact needs {segment.name}: {error.message}",
                hint=error.hint,
                backend=segment.backend,
            )
        status = status_of(engine)
        if not status.usable:
            return unavailable(f"The artifact needs {segment.name}, which is", segment.backend, status)
        if difference := _difference(segment.fingerprint, engine.fingerprint()):
            return IncompatibleProgram(
                f"The program for {segment.name} was compiled for {difference}.", backend=segment.backend
            )
    return None


def _difference(compiled: Mapping[str, str], present: Mapping[str, str]) -> str:
    keys = sorted({*compiled, *present})
    return ", ".join(
        f"{key} {compiled.get(key, 'none')} (here: {present.get(key, 'none')})"
        for key in keys
        if compiled.get(key) != present.get(key)
    )


def _rebuilt(artifact: Artifact, target: Target, reason: AccelrtError, fallback: Fallback) -> Artifact:
    """Compile the source graph again: for the same target if its engine is usable, else for the CPU."""
    # Brings in the graph libraries, which loading can do without.
    from accelrt.artifact.build import BuildRequest, build
    from accelrt.partition.stages import StagePlan

    if fallback == "error" or not artifact.manifest.has_source:
        if not artifact.manifest.has_source:
            reason.hint = "The artifact was saved with sources=False, so it cannot be compiled again here."
        raise reason
    try:
        candidates = REGISTRY.candidates(target)
        announce(fallback, f"{reason.message} It is compiled again for {candidates[0].name}.")
    except (TargetError, RegistryError):
        target = Target(CPU)
        candidates = REGISTRY.candidates(target)
        announce(fallback, f"{reason} It is compiled for {candidates[0].name} instead.")
    if (asked := artifact.manifest.options.get("precision")) is not None:
        asked = precision_named(asked)
    candidates, precisions = plan(candidates, asked)
    request = BuildRequest(
        str(target),
        candidates,
        _recorded(artifact, candidates),
        artifact.manifest.source_format,
        asked,
        precisions,
        artifact.manifest.batch_sizes,
        StagePlan(count) if (count := artifact.manifest.stages) else None,
    )
    return build(artifact.source_graph(), request, fallback=fallback)


def _recorded(artifact: Artifact, candidates: Sequence[Candidate]) -> Options:
    """Return the options the artifact was compiled with, as far as the candidates still know them."""
    by_engine = {segment.name: segment.options for segment in artifact.manifest.segments}
    engines = tuple(
        option_module.from_json(candidate.engine.options, by_engine.get(candidate.name, {})) for candidate in candidates
    )
    partition = option_module.from_json(option_module.PartitionOptions, artifact.manifest.options.get("partition", {}))
    return Options(partition=partition, engines=engines)


@dataclass(frozen=True)
class _Loader:
    artifact: Artifact
    target: Target
    wanted: tuple[int, ...] | None
    explicit: bool
    fallback: Fallback

    def session(self) -> Session:
        steps: list[Step] = []
        try:
            for index, segment in enumerate(self.artifact.manifest.segments):
                steps.append(self._step(index, segment))
        except BaseException:
            for step in steps:
                for executable in (step.executable, step.stand_in):
                    if executable is not None:
                        executable.close()
            raise
        self._mark_spent(steps)
        workers = max((find_engine(REGISTRY.backend(s.backend), s.engine).caps.parallelism
                       for s in self.artifact.manifest.segments), default=1)  # fmt: skip
        return Session(self.artifact.signature, steps, fallback=self.fallback, workers=workers, keep=self.artifact)

    def _step(self, index: int, segment: SegmentRecord) -> Step:
        engine = find_engine(REGISTRY.backend(segment.backend), segment.engine)
        lock = None if engine.caps.concurrent else threading.Lock()

        def recover(error: BaseException) -> Executable:
            return self._stand_in(index, error)

        step = Step(segment.name, None, segment.signature.input_names, segment.signature.output_names, recover, lock)
        try:
            step.executable = _load(engine, self._program(segment, engine), self._devices(segment))
        except (DeviceError, IncompatibleProgram) as error:
            # Devices named in this call must exist; and where the CPU's are missing there is nowhere to go.
            named = self.explicit or segment.backend == CPU
            asked_for = isinstance(error, CoresUnavailable) and named
            if self.fallback == "error" or asked_for:
                raise
            step.stand_in = self._stand_in(index, error)
            announce(self.fallback, f"{segment.name} cannot take its segment; the CPU runs it: {error}")
        return step

    def _program(self, segment: SegmentRecord, engine: Engine) -> Program:
        files = program_files(self.artifact.folder, segment)
        options = option_module.from_json(engine.options, segment.options)
        return Program(files, segment.fingerprint, segment.signature, options, precision_named(segment.precision))

    def _devices(self, segment: SegmentRecord) -> tuple[Device, ...]:
        backend = REGISTRY.backend(segment.backend)
        found = devices_of(backend, self.wanted if segment.backend == self.target.backend else None)
        if not found:
            raise CoresUnavailable(f"Backend {backend.name!r} has no device here.", backend=backend.name)
        return found

    def _stand_in(self, index: int, error: BaseException) -> Executable:
        """Compile a segment for the CPU, without the engine that failed."""
        from accelrt.artifact.build import BuildRequest, build

        segment = self.artifact.manifest.segments[index]
        if not self.artifact.manifest.has_source:
            raise ArtifactError(
                f"{segment.name} failed, and in an artifact saved with sources=False nothing else can run its segment.",
                hint="Save the artifact with its source graph.",
            ) from error
        graph = self.artifact.source_graph()
        numbers = {node.name: number for number, node in enumerate(graph.nodes)}
        try:
            nodes = [numbers[node.name] for node in self.artifact.placement.segments[index].nodes]
        except (IndexError, KeyError) as mismatch:
            raise CorruptArtifact(
                f"The placement of the artifact does not fit its source graph: {mismatch!r}."
            ) from mismatch
        candidates = tuple(c for c in REGISTRY.candidates(Target(CPU)) if c.name != segment.name)
        request = BuildRequest(CPU, candidates, option_module.resolve(None, candidates), "onnx")
        artifact = build(graph.extract(nodes), request, fallback="allow")
        return _Nested(open_session(artifact, fallback="allow"))

    def _mark_spent(self, steps: Sequence[Step]) -> None:
        """Tell each step which values nobody reads after it, so that memory is freed as early as can be."""
        needed = set(self.artifact.signature.output_names)
        for step, segment in zip(reversed(steps), reversed(self.artifact.manifest.segments), strict=True):
            touched = {*segment.signature.input_names, *segment.signature.output_names}
            step.spent = tuple(sorted(touched - needed))
            needed |= touched


def _load(engine: Engine, program: Program, devices: Sequence[Device]) -> Executable:
    try:
        return engine.load(program, devices)
    except AccelrtError:
        raise
    except Exception as error:
        # The contract names what may be raised; files made to be wrong bring out the rest.
        raise IncompatibleProgram(
            f"{engine.name} cannot load the program: {type(error).__name__}: {error}", backend=engine.name
        ) from error


class _Nested(Executable):
    """A session in the place of a program."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        return self._session.predict(inputs)

    def close(self) -> None:
        self._session.close()
