"""Bring an artifact onto its devices: the programs as they are, compiled again, or the CPU instead, by policy."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from accelrt import options as option_module
from accelrt.artifact.artifact import Artifact
from accelrt.artifact.manifest import SegmentRecord
from accelrt.artifact.store import program_files
from accelrt.backend import Backend, Device, Engine, Executable, Program
from accelrt.cores import Group
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
    UntrustedProgram,
)
from accelrt.graph.types import Value, shareable
from accelrt.options import Options
from accelrt.policy import Fallback, announce
from accelrt.precision.plan import plan, precision_named
from accelrt.registry import CPU, REGISTRY, Candidate, devices_of, find_engine, status_of, unavailable
from accelrt.runtime.asked import Asked, workers_of
from accelrt.runtime.compose import assemble, divide
from accelrt.runtime.dispatch import Dispatcher
from accelrt.runtime.faults import Faults, StandIn
from accelrt.runtime.ledger import LEDGER, Holders, pool_name
from accelrt.runtime.place import Spot, place
from accelrt.runtime.replica import Replica, Step
from accelrt.runtime.residency import Place, mark_kept
from accelrt.runtime.runner import Runner
from accelrt.runtime.session import Session
from accelrt.runtime.traffic import Link
from accelrt.target import Target, parse

logger = logging.getLogger("accelrt")


_NUMBERS = itertools.count(1)

_Parts: TypeAlias = "Mapping[int | None, Sequence[_PartLoader]]"
"""The stages for each batch size, as `divide` gives them."""


def open_session(
    artifact: Artifact,
    *,
    asked: Asked | None = None,
    fallback: Fallback = "warn",
    tried: frozenset[str] = frozenset(),
) -> Session:
    """Load an artifact.

    Args:
        artifact: What to load.
        asked: Devices, replicas and workers. Without devices those that the artifact's target names; without these one
            replica takes the next free place.
        fallback: What to do where a segment cannot run as it was compiled.
        tried: Engines that failed on the same work already and are not to take it over again.

    Raises:
        BackendUnavailable, IncompatibleProgram, DeviceError: By ``fallback="error"``, or because the artifact carries
            no source to compile again.
        CoresUnavailable: Devices or replicas are asked for that are not there or not free.
        TargetError: The devices are said to be another backend's than the artifact's.
    """
    if not artifact.trusted:
        _refuse_code(artifact)
    asked = asked or Asked()
    target = parse(artifact.manifest.target)
    if asked.backend not in (None, target.backend):
        raise TargetError(
            f"The devices asked for are of backend {asked.backend!r}, the artifact is for {target.backend!r}.",
            hint="Name devices of the artifact's backend, or compile the model for the other.",
        )
    if (stale := _stale(artifact)) is not None:
        artifact = _rebuilt(artifact, target, stale, fallback)
    return _Loader(artifact, target, asked, fallback, tried).session()


def _refuse_code(artifact: Artifact) -> None:
    """Raise `UntrustedProgram` if loading an artifact's programs, or compiling its source again, may run code."""
    running = [
        segment.name
        for segment in artifact.manifest.segments
        if artifact.manifest.whole_format is not None or _executes_code(segment)
    ]
    if running:
        raise UntrustedProgram(
            f"The file holds a program for {running[0]}, which may run code when it is loaded.",
            hint="If you know where the file comes from: accelrt.load(path, trust=True), --trust, or ACCELRT_TRUST=1.",
            backend=artifact.manifest.segments[0].backend,
        )


def _executes_code(segment: SegmentRecord) -> bool:
    try:
        return find_engine(REGISTRY.backend(segment.backend), segment.engine).caps.executes_code
    except (TargetError, RegistryError):
        return False  # an engine that is not there loads nothing


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
        if difference := _difference(segment.fingerprint, _as_compiled(engine, segment).fingerprint()):
            return IncompatibleProgram(
                f"The program for {segment.name} was compiled for {difference}.", backend=segment.backend
            )
    return None


def _as_compiled(engine: Engine, segment: SegmentRecord) -> Engine:
    """Return the engine as the options of a segment's program make it."""
    return engine.with_options(option_module.from_json(engine.options, segment.options))


def _engine_of(segment: SegmentRecord) -> Engine:
    """Return the engine that runs a segment, as the options of its program make it."""
    return _as_compiled(find_engine(REGISTRY.backend(segment.backend), segment.engine), segment)


def _difference(compiled: Mapping[str, str], present: Mapping[str, str]) -> str:
    keys = sorted({*compiled, *present})
    return ", ".join(
        f"{key} {compiled.get(key, 'none')} (here: {present.get(key, 'none')})"
        for key in keys
        if compiled.get(key) != present.get(key)
    )


def _rebuilt(artifact: Artifact, target: Target, reason: AccelrtError, fallback: Fallback) -> Artifact:
    """Compile the source graph again: for the same target if its engine is usable, else for the CPU."""
    if artifact.manifest.whole_format is not None:
        return _rebuilt_whole(artifact, target, reason, fallback)
    # Brings in the graph libraries, which loading can do without.
    from accelrt.artifact.build import BuildRequest, build
    from accelrt.partition.stages import StagePlan

    if fallback == "error" or not artifact.manifest.has_source:
        if not artifact.manifest.has_source:
            reason.hint = "The artifact was saved with sources=False, so it cannot be compiled again here."
        raise reason
    try:
        candidates = REGISTRY.candidates(target)
        untuned = ", and not tuned again" if artifact.manifest.options.get("tune") else ""
        announce(fallback, f"{reason.message} It is compiled again for {candidates[0].name}{untuned}.")
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


def _rebuilt_whole(artifact: Artifact, target: Target, reason: AccelrtError, fallback: Fallback) -> Artifact:
    """Compile a source that the artifact holds whole again, for the same engine; no other one has a form of it."""
    from accelrt.artifact.whole import WholeRequest, build_whole, whole_of

    (segment,) = artifact.manifest.segments[:1] or (None,)
    if fallback == "error" or segment is None or not isinstance(reason, IncompatibleProgram):
        raise reason
    backend = REGISTRY.backend(segment.backend)
    candidate = Candidate(backend, _engine_of(segment))
    announce(fallback, f"{reason.message} It is compiled again for {candidate.name}.")
    asked = artifact.manifest.options.get("precision")
    why = artifact.placement.whole
    request = WholeRequest(
        str(target),
        candidate,
        option_module.from_json(candidate.engine.options, segment.options),
        artifact.manifest.source_format,
        why.reason if why is not None else "it was compiled so.",
        precision_named(segment.precision),
        None if asked is None else precision_named(asked),
    )
    return build_whole(whole_of(artifact), request)


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
    asked: Asked
    fallback: Fallback
    tried: frozenset[str]

    def session(self) -> Session:
        workers = workers_of(self.asked, self.artifact.manifest)
        faults = Faults(self.fallback)
        links: dict[str, Link] = {}
        with ExitStack() as stack:
            parts = {
                size: [_PartLoader(part, self.target, self.asked, self.fallback, self.tried, links) for part in stages]
                for size, stages in divide(self.artifact).items()
            }
            # They hold on to the artifact, whose folder the programs are read from; closed last.
            for stand_in in (one for row in parts.values() for part in row for one in part.stand_ins):
                stack.callback(stand_in.close)
            replicas = self._replicas(stack, parts, faults)
            turns = [replica.parallelism for replica in replicas]
            if workers is not None:
                turns = [-(-workers // len(replicas))] * len(replicas)
            # What gathers or reorders calls would go around this one: it is a runner too.
            runner: Runner = replicas[0] if len(replicas) == 1 else Dispatcher(replicas, faults, turns)
            return Session(
                self.artifact.signature,
                replicas,
                runner,
                faults=faults,
                workers=workers or sum(turns),
                resources=stack.pop_all(),
            )

    def _replicas(self, stack: ExitStack, parts: _Parts, faults: Faults) -> list[Replica]:
        """Load as many replicas as are asked for; leave out those that do not fit, while one does."""
        # Devices that each stage needs: the programs for all batch sizes are loaded onto the same ones.
        widths = [max(part.width for part in stage) for stage in zip(*parts.values(), strict=True)]
        spots: tuple[Spot, ...] | None
        refused: AccelrtError | None = None
        try:
            spots = self._spots(stack, widths)
        except CoresUnavailable as error:
            if self.fallback == "error" or self.asked.explicit or self.target.backend == CPU:
                raise
            spots, refused = None, error

        def load(own: ExitStack, spot: Spot | None, *, strict: bool = False) -> Replica:
            devices = self._devices(spot) if spot is not None else ()
            shares = _shares(devices, widths)
            loaded = {
                size: [
                    part.replica(own, share, faults, refused if spot is None else None, strict=strict)
                    for part, share in zip(row, shares, strict=True)
                ]
                for size, row in parts.items()
            }
            names = tuple(device.name for device in devices)
            replica = assemble(self.artifact.signature, faults, loaded, names)
            own.callback(replica.close)
            return replica

        if spots is None or len(spots) == 1:
            return [load(stack, spots[0] if spots else None)]
        replicas: list[Replica] = []
        for spot in spots:
            with ExitStack() as own:
                try:
                    replicas.append(load(own, spot, strict=True))
                    stack.push(own.pop_all())
                except (DeviceError, IncompatibleProgram) as error:
                    if self.fallback == "error":
                        raise
                    refused = error
        if not replicas:
            return [load(stack, spots[0])]
        if refused is not None:
            announce(self.fallback, f"{len(replicas)} of {len(spots)} replicas could be loaded: {refused}")
        return replicas

    def _spots(self, stack: ExitStack, widths: Sequence[int]) -> tuple[Spot, ...]:
        """Choose devices on the target's backend and hold them; one empty place for each replica that needs none."""
        if not any(widths):
            return (Spot((), ()),) * (self.asked.replicas or 1)
        backend = REGISTRY.backend(self.target.backend)
        named = self.asked.groups
        if named is None and self.target.devices is not None:
            named = (Group(self.target.devices),)
        holder, devices = self._pool()
        groups = backend.groups(os.environ, devices)
        if not groups:
            raise CoresUnavailable(f"Backend {backend.name!r} has no device here.", backend=backend.name)
        # Stages sit on neighbours, each on devices of its own; where there is but one device, they share it.
        alone = sum(len(group.devices) for group in groups) == 1
        needs = widths if alone else [sum(widths)]

        def choose(holders: Holders) -> tuple[Spot, ...]:
            return place(
                needs,
                groups,
                self.asked.replicas,
                named=named,
                holders=holders,
                exclusive=backend.exclusive,
                backend=backend.name,
            )

        hold = LEDGER.acquire(holder, f"session {next(_NUMBERS)} ({self.target})", choose)
        stack.callback(hold.release)
        return hold.spots

    def _pool(self) -> tuple[str, tuple[Device, ...]]:
        """Return the devices for replicas, and the name under which they are held; an engine may have its own."""
        backend = REGISTRY.backend(self.target.backend)
        for segment in self.artifact.manifest.segments:
            if segment.backend == backend.name and (own := _engine_of(segment).devices()) is not None:
                return pool_name(segment.name, own), tuple(own)
        return backend.name, devices_of(backend, None)

    def _devices(self, spot: Spot) -> tuple[Device, ...]:
        found = {device.index: device for device in self._pool()[1]} if spot.devices else {}
        return tuple(found[index] for index in spot.devices)


def _shares(devices: tuple[Device, ...], widths: Sequence[int]) -> list[tuple[Device, ...]]:
    """Divide the devices of a replica among its stages, in order; if they do not suffice, all stages share them."""
    if len(devices) < sum(widths):
        return [devices[:width] for width in widths]
    ends = list(itertools.accumulate(widths))
    return [devices[end - width : end] for end, width in zip(ends, widths, strict=True)]


class _PartLoader:
    """Loads copies of one part of a model: all of it, or what is of one batch size or one stage.

    ``stand_ins`` are shared by all copies, and closed by whoever made this; ``links`` to devices, by their names, by
    all parts of a session.
    """

    def __init__(
        self,
        artifact: Artifact,
        target: Target,
        asked: Asked,
        fallback: Fallback,
        tried: frozenset[str],
        links: dict[str, Link],
    ) -> None:
        self._links = links
        self.artifact, self.target, self.asked, self.fallback, self.tried = artifact, target, asked, fallback, tried
        self.stand_ins = [StandIn(partial(self._stand_in, index)) for index in range(len(artifact.manifest.segments))]

    @property
    def width(self) -> int:
        """Devices of the target's backend that a copy needs, 0 if none."""
        needs = [0]
        for segment in self.artifact.manifest.segments:
            if segment.backend == self.target.backend:
                needs.append(_engine_of(segment).devices_needed(_options(_engine_of(segment), segment)))
        return max(needs)

    def replica(
        self,
        stack: ExitStack,
        devices: tuple[Device, ...],
        faults: Faults,
        refused: AccelrtError | None,
        *,
        strict: bool = False,
    ) -> Replica:
        """Load all segments; unless ``strict``, those that do not fit get their stand-ins by the policy.

        Args:
            devices: Those of the target's backend.
            refused: Why the target's backend has no devices for this session, if so.
        """
        steps, calls = [], 1
        for segment, stand_in in zip(self.artifact.manifest.segments, self.stand_ins, strict=True):
            backend = REGISTRY.backend(segment.backend)
            engine = _engine_of(segment)
            ours = segment.backend == self.target.backend
            lock = None if engine.caps.concurrent else threading.Lock()
            ports = segment.signature
            step = Step(segment.name, None, ports.input_names, ports.output_names, stand_in, lock)
            try:
                if ours and refused is not None:
                    raise refused
                need = engine.devices_needed(_options(engine, segment))
                given = devices[:need] if ours else _some_devices(backend, need)
                step.executable = load_program(engine, self._program(segment, engine), given)
                stack.callback(step.executable.close)
                if backend.name != CPU:
                    step.link = self._links.setdefault(given[0].name, Link(given[0].name))
                if engine.caps.device_tensors and len(given) == 1:
                    step.place = Place.on(backend, given[0])
                # A device beside the CPU is kept busy by calls of its own; on the CPU one counts.
                each = step.executable.parallelism or engine.caps.parallelism
                calls = max(calls, each * (len(given) if ours else 1))
            except (DeviceError, IncompatibleProgram) as error:
                # Devices named in this call must exist; and where the CPU's are missing there is nowhere to go.
                named = self.asked.explicit or segment.backend == CPU
                if strict or self.fallback == "error" or (isinstance(error, CoresUnavailable) and named):
                    raise
                stand_in.get(error)
                announce(self.fallback, f"{segment.name} cannot take its segment; the CPU runs it: {error}")
            steps.append(step)
        mark_spent(steps, self.artifact.signature.output_names)
        yielded = (port for segment in self.artifact.manifest.segments for port in segment.signature.outputs)
        mark_kept(steps, self.artifact.signature.output_names, {port.name for port in yielded if shareable(port.type)})
        names = tuple(device.name for device in devices)
        return Replica(self.artifact.signature, steps, faults, devices=names, parallelism=calls)

    def _program(self, segment: SegmentRecord, engine: Engine) -> Program:
        files = program_files(self.artifact.folder, segment)
        precision = precision_named(segment.precision)
        return Program(files, segment.fingerprint, segment.signature, _options(engine, segment), precision)

    def _stand_in(self, index: int, error: BaseException) -> Executable:
        """Compile a segment for the CPU, without the engines that failed."""
        from accelrt.artifact.build import BuildRequest, build

        segment = self.artifact.manifest.segments[index]
        if self.artifact.manifest.whole_format is not None:
            raise ArtifactError(
                f"{segment.name} failed, and the model runs whole: there is no graph of it that the CPU could run."
            ) from error
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
        tried = self.tried | {segment.name}
        candidates = tuple(c for c in REGISTRY.candidates(Target(CPU)) if c.name not in tried)
        if not candidates:
            raise BackendUnavailable(f"No engine is left to try: {', '.join(sorted(tried))} failed.") from error
        request = BuildRequest(CPU, candidates, option_module.resolve(None, candidates), "onnx")
        artifact = build(graph.extract(nodes), request, fallback="allow")
        return _Nested(open_session(artifact, fallback="allow", tried=tried))


def mark_spent(steps: Sequence[Step], outputs: Sequence[str]) -> None:
    """Tell each step which values nobody reads after it, so that memory is freed as early as can be."""
    needed = set(outputs)
    for step in reversed(steps):
        touched = {*step.inputs, *step.outputs}
        step.spent = tuple(sorted(touched - needed))
        needed |= touched


def _options(engine: Engine, segment: SegmentRecord) -> Any:
    return option_module.from_json(engine.options, segment.options)


def _some_devices(backend: Backend, count: int) -> tuple[Device, ...]:
    """Return the first devices of a backend that is not the target's: those are not placed, and shared by all."""
    if not (found := devices_of(backend, None)):
        raise CoresUnavailable(f"Backend {backend.name!r} has no device here.", backend=backend.name)
    return found[:count]


def load_program(engine: Engine, program: Program, devices: Sequence[Device]) -> Executable:
    """Have an engine load a program, and whatever it raises that the contract does not name be `IncompatibleProgram`.

    Raises:
        DeviceError, IncompatibleProgram: The engine cannot.
    """
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
