"""Verification: run a compiled model beside a reference, hold it to a tolerance, and find where it goes wrong."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from accelrt import options as option_module
from accelrt.artifact.parts import variant
from accelrt.backend import CompileJob, Precision
from accelrt.errors import CompileError, ExecutionError, InputError, OptionError, VerificationError
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.types import Signature, Value
from accelrt.precision.compare import (
    DEFAULT_RELATIVE_L2,
    Tolerance,
    Tolerances,
    compare,
    score_outputs,
    tolerance_of,
)
from accelrt.precision.report import Culprit, VerificationReport
from accelrt.registry import CPU, REGISTRY, Candidate, devices_of, find_engine
from accelrt.runtime.draw import random_inputs, symbolic_dimensions
from accelrt.runtime.inputs import bind_calls
from accelrt.runtime.load import open_session
from accelrt.target import Target

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.artifact.making import Check
    from accelrt.graph.model import Graph

Reference: TypeAlias = Literal["fp32", "float64"]


@dataclass(frozen=True, slots=True)
class Verification:
    """How to verify a compiled model.

    Attributes:
        inputs: Calls to compare: any iterable whose items are each a mapping by name, a tuple in order, or the value of
            a single input; one mapping is one call. None draws seeded random ones from the signature, a call with every
            symbolic dimension 1 and one with each of them 2.
        labels: The right class of every row of all calls, to report accuracy: for the first output that is a table of
            class scores, or by output name.
        tolerance: Relative L2 error, a `Tolerance`, or either by output name. None takes the default of the coarsest
            precision in the placement: fp32 1e-3, fp16 1e-2, bf16 2e-2, int8 1e-1.
        reference: ``fp32`` on cpu/onnxruntime, or ``float64``: the graph's float32 cast to float64 on ONNX's reference
            evaluator, which is slow.
        localise: On failure look for the first segment and node whose output leaves the tolerance.
        seed: Of random inputs.
    """

    inputs: Any = None
    labels: Any = None
    tolerance: Tolerances | None = None
    reference: Reference = "fp32"
    localise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reference not in get_args(Reference):
            raise OptionError(f"The reference must be one of {', '.join(get_args(Reference))}, not {self.reference!r}.")
        if self.labels is not None and self.inputs is None:
            raise OptionError("Labels need the inputs that they belong to.")


def as_verification(given: Any) -> Verification | None:
    """Read the argument ``verify``: None or False, True, a `Verification`, or its inputs."""
    if given is None or given is False:
        return None
    if given is True:
        return Verification()
    return given if isinstance(given, Verification) else Verification(inputs=given)


class Verifier:
    """A verification of one model: its inputs are checked and its reference is known when it is made.

    Args:
        graph: The model as it was before anything was done to its precision.
        request: What to verify, and how.
        cache: Whether the reference may come from the compile cache.
        known: What the reference gives for each call of the request, if that has been computed already; then nothing
            else is compared.

    Raises:
        InputError: Inputs that do not fit the signature, or none at all; labels that fit no output.
        OptionError: A tolerance for an output that is not there.
    """

    def __init__(
        self,
        graph: Graph,
        request: Verification,
        *,
        cache: bool = True,
        known: Sequence[Mapping[str, Value]] | None = None,
    ) -> None:
        self._graph, self._request, self._cache = graph, request, cache
        signature = graph.signature
        tolerance_of(request.tolerance, signature, 0.0)
        self._calls = _calls(signature, request)
        self.labels = _labels(signature, request.labels)
        self._random = request.inputs is None
        self._known = None if known is None else (self._calls, list(known))
        self._only_known = known is not None

    @property
    def given(self) -> Mapping[str, Value] | None:
        """The first of the inputs that were given, None if they are drawn."""
        return None if self._random else self._calls[0]

    def check(self) -> Check:
        """Return the check that a build runs before its artifact is seen; it raises `VerificationError`."""
        from accelrt.artifact.making import Check

        def run(artifact: Artifact) -> Mapping[str, Any]:
            report = self.verify(artifact)
            if not report.passed:
                raise failure(report, localised=self._request.localise)
            return report.to_json()

        return Check(self.key(), run)

    def reference(self) -> tuple[list[Mapping[str, Value]], list[Mapping[str, Value]]]:
        """Return the calls that are compared, and what the reference gives for each; computed once.

        Raises:
            ExecutionError, InputError: The reference cannot compute them.
        """
        if self._known is None:
            self._known = self._reference(self._graph, self._calls)
        return self._known

    def verify(self, artifact: Artifact) -> VerificationReport:
        """Compare an artifact's outputs with the reference's.

        Raises:
            ExecutionError: The artifact fails at run; no other engine takes over here.
            AccelrtError: It cannot be loaded, or the reference cannot be computed.
        """
        request, signature = self._request, self._graph.signature
        coarsest = max(
            (DEFAULT_RELATIVE_L2[segment.precision] for segment in artifact.placement.segments),
            default=DEFAULT_RELATIVE_L2["fp32"],
        )
        tolerances = tolerance_of(request.tolerance, signature, coarsest)
        calls, wanted = self._compared(artifact)
        with open_session(artifact, fallback="error") as session:
            found = [session.predict(call) for call in calls]
        outputs = compare(found, wanted, tolerances, self.labels)
        report = VerificationReport(
            "float64 on cpu/reference" if request.reference == "float64" else "fp32 on cpu/onnxruntime",
            f"random, seed {request.seed}" if self._random else "given",
            len(calls),
            outputs,
        )
        if report.passed or not request.localise:
            return report
        failed = {output.name: tolerances[output.name] for output in report.failures}
        strictest = min(tolerance.relative_l2 for tolerance in failed.values())
        bad = (
            call
            for call, have, want in zip(calls, found, wanted, strict=True)
            if any(output.problem for output in compare([have], [want], failed))
        )
        guilty = next(bad, calls[0])
        return replace(report, culprit=self._localise(artifact, guilty, Tolerance(strictest)))

    def _compared(self, artifact: Artifact) -> tuple[list[Mapping[str, Value]], list[Mapping[str, Value]]]:
        """Return the calls to compare an artifact on, and what the reference gives for each.

        Those of `reference`, and a call for each batch size, unless whoever made this knows the reference already.
        """
        batches = [] if self._only_known else self._whole_batches(artifact)
        return self._reference(self._graph, [*self._calls, *batches]) if batches else self.reference()

    def _whole_batches(self, artifact: Artifact) -> list[Mapping[str, Value]]:
        """Return a random call for each batch size that the artifact is specialised to, so that each is compared."""
        if not self._random:
            return []
        signature, batches = self._graph.signature, []
        ones = dict.fromkeys(symbolic_dimensions(signature), 1)
        for size in artifact.manifest.batch_sizes:
            rows = [random_inputs(signature, ones, self._request.seed + row) for row in range(size)]
            batches.append({name: np.concatenate([row[name] for row in rows]) for name in signature.input_names})
        return bind_calls(signature, batches)

    def _reference(
        self, graph: Graph, calls: Sequence[Mapping[str, Value]]
    ) -> tuple[list[Mapping[str, Value]], list[Mapping[str, Value]]]:
        """Return the calls that the reference can compute, and its outputs; of random calls some may not fit."""
        with open_session(self._reference_artifact(graph), fallback="allow") as session:
            kept: list[Mapping[str, Value]] = []
            wanted: list[Mapping[str, Value]] = []
            problem: ExecutionError | None = None
            for call in calls:
                try:
                    wanted.append(session.predict(call))
                    kept.append(call)
                except ExecutionError as error:
                    if not self._random:
                        raise
                    problem = error
            if not kept and problem is not None:
                raise InputError(
                    f"The reference computes none of the random inputs: {problem.message}",
                    hint="Give inputs of your own: verify=Verification(inputs=...).",
                ) from problem
            return kept, wanted

    def _reference_artifact(self, graph: Graph) -> Artifact:
        from accelrt.artifact.build import BuildRequest, build

        target = Target(CPU, "onnxruntime")
        candidates = REGISTRY.candidates(target)
        if self._request.reference == "float64":
            from accelrt.graph.cast import cast_floats

            cpu = REGISTRY.backend(CPU)
            candidates = (Candidate(cpu, find_engine(cpu, "reference")),)
            target, graph = Target(CPU, "reference"), cast_floats(graph, "float64")
        precisions: tuple[Precision, ...] = tuple("fp32" for _ in candidates)
        request = BuildRequest(
            str(target), candidates, option_module.resolve(None, candidates), "onnx", None, precisions
        )
        return build(graph, request, fallback="allow", cache=self._cache)

    def key(self) -> str:
        """Return a name for what is verified and how: equal ones have equal verdicts on equal artifacts."""
        request = self._request
        digest = hashlib.sha256()
        digest.update(digest_of([*self._calls, self.labels or {}]).encode())
        tolerance = request.tolerance
        bounds = repr(sorted(tolerance.items()) if isinstance(tolerance, Mapping) else tolerance)
        facts = [request.reference, request.localise, request.seed, self._random, bounds, self._graph.digest]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    # Where it goes wrong

    def _localise(self, artifact: Artifact, call: Mapping[str, Value], tolerance: Tolerance) -> Culprit | None:
        """Look in what is specialised to each batch size, with as many rows of the call, repeated as needed."""
        for size in artifact.manifest.batch_sizes:
            rows = {name: np.take(value, np.arange(size), 0, mode="wrap") for name, value in call.items()}
            if (culprit := self._localise_in(variant(artifact, size), rows, tolerance)) is not None:
                first = [segment.batch for segment in artifact.manifest.segments].index(size)
                return replace(culprit, segment=first + culprit.segment)
        return None if artifact.manifest.batch_sizes else self._localise_in(artifact, call, tolerance)

    def _localise_in(self, artifact: Artifact, call: Mapping[str, Value], tolerance: Tolerance) -> Culprit | None:
        """Walk the segments to the first whose output leaves the tolerance, then bisect its nodes."""
        known = {name for node in self._graph.nodes for name in node.writes}
        borders = [n for s in artifact.manifest.segments for n in s.signature.output_names if n in known]
        wanted = self._values(borders, call)
        with open_session(artifact, fallback="error") as session:
            for number, (feeds, outputs) in enumerate(session.trace(call)):
                if (bad := _first_bad(outputs, wanted, tolerance)) is not None:
                    return self._take_apart(artifact, number, feeds, call, tolerance, bad)
        return None

    def _values(self, names: Sequence[str], call: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return what the reference gives for values of the model, its outputs among them."""
        graph = self._graph
        typed = [name for name in names if name in graph.types]
        _, wanted = self._reference(graph.expose(typed), [call])
        return wanted[0]

    def _take_apart(
        self,
        artifact: Artifact,
        number: int,
        feeds: Mapping[str, Value],
        call: Mapping[str, Value],
        tolerance: Tolerance,
        bad: tuple[str, str],
    ) -> Culprit:
        """Find the node up to which a segment, compiled alone, is out of tolerance, and before which it is not."""
        place = artifact.placement.segments[number]
        graph = artifact.source_graph()
        numbers = {node.name: index for index, node in enumerate(graph.nodes)}
        indices = sorted(numbers[node.name] for node in place.nodes)
        known = {name for node in self._graph.nodes for name in node.writes}
        # Only after these nodes there is something that the reference knows too.
        stops = [count for count, index in enumerate(indices, 1) if known.intersection(graph.nodes[index].writes)]
        wanted = self._values([n for index in indices for n in graph.nodes[index].writes if n in known], call)
        low, high, worst = 0, len(stops) - 1, bad
        while low < high:
            middle = (low + high) // 2
            outputs = self._run_part(artifact, number, graph.extract(indices[: stops[middle]]), feeds)
            if outputs is None:
                del stops[middle]  # what cannot be compiled alone says nothing
                high -= 1
            elif (found := _first_bad(outputs, wanted, tolerance)) is not None:
                high, worst = middle, found
            else:
                low = middle + 1
        node = graph.nodes[indices[stops[high] - 1]] if stops else None
        return Culprit(
            number,
            place.engine,
            place.precision,
            None if node is None else node.name,
            None if node is None else node.kind,
            *worst,
        )

    def _run_part(
        self, artifact: Artifact, number: int, part: Graph, feeds: Mapping[str, Value]
    ) -> Mapping[str, Value] | None:
        """Compile and run a part of a segment on the segment's own engine; None if it does not take it alone."""
        from accelrt.graph.weights import WeightFile
        from accelrt.precision.plan import precision_named

        record = artifact.manifest.segments[number]
        backend = REGISTRY.backend(record.backend)
        engine = find_engine(backend, record.engine)
        options = option_module.from_json(engine.options, record.options)
        engine = engine.with_options(options)
        with tempfile.TemporaryDirectory(prefix="accelrt-") as scratch:
            model, out = Path(scratch) / "part.onnx", Path(scratch) / "out"
            out.mkdir()
            weights = WeightFile(Path(scratch) / WEIGHTS_FILE)
            try:
                part.write(model, weights)
                weights.close()
                job = CompileJob(model, part.signature, precision_named(record.precision), options)
                program = engine.compile(job, out)
                with engine.load(program, devices_of(backend, None, engine)) as executable:
                    return dict(executable.run({name: feeds[name] for name in part.signature.input_names}))
            except CompileError:
                return None


def failure(report: VerificationReport, *, localised: bool = False) -> VerificationError:
    """Return the error of a report that did not pass, with its table."""
    worst = report.failures[0]
    error = VerificationError(
        f"{len(report.failures)} of {len(report.outputs)} outputs are out of tolerance; "
        f"{worst.name!r}: {worst.problem}.\n{report.text()}",
        hint=None if localised else "localise=True finds the first node that goes wrong.",
    )
    error.report = report
    return error


def _first_bad(
    outputs: Mapping[str, Value], wanted: Mapping[str, Value], tolerance: Tolerance
) -> tuple[str, str] | None:
    """Return the first output that is out of tolerance, and by how much."""
    shared = {name: tolerance for name in outputs if name in wanted}
    for output in compare([outputs], [wanted], shared):
        if output.problem is not None:
            return output.name, output.problem
    return None


def _calls(signature: Signature, request: Verification) -> list[Mapping[str, Value]]:
    if request.inputs is None:
        sizes = symbolic_dimensions(signature)
        calls = [random_inputs(signature, dict.fromkeys(sizes, 1), request.seed)]
        if sizes:
            calls.append(random_inputs(signature, dict.fromkeys(sizes, 2), request.seed + 1))
        return bind_calls(signature, calls)
    inputs = request.inputs
    if isinstance(inputs, str | bytes) or not (isinstance(inputs, Mapping) or hasattr(inputs, "__iter__")):
        raise InputError(
            f"verify takes True, a mapping of inputs, an iterable of calls or a Verification, not {inputs!r}."
        )
    if isinstance(inputs, np.ndarray):
        raise InputError(
            "One array was given to verify with; it is not clear whether it is one call or many.",
            hint="Pass [array] for one call, or a mapping by name.",
        )
    bound = bind_calls(signature, [inputs] if isinstance(inputs, Mapping) else inputs)
    if not bound:
        raise InputError("There are no inputs to verify with.", hint="verify=True draws some.")
    return bound


def _labels(signature: Signature, given: Any) -> Mapping[str, np.ndarray[Any, Any]] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        named = {str(name): np.asarray(labels) for name, labels in given.items()}
    else:
        scores = score_outputs(signature)
        if not scores:
            raise InputError(f"Labels are given, but no output is a table of class scores: {signature}.")
        named = {scores[0]: np.asarray(given)}
    for name, labels in named.items():
        if name not in signature.output_names:
            raise InputError(f"Labels are given for {name!r}, which is no output.")
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise InputError(
                f"The labels of {name!r} must be a vector of whole numbers, not {labels.dtype}{list(labels.shape)}."
            )
    return named


def digest_of(calls: Sequence[Mapping[str, Value]]) -> str:
    """Return the SHA-256 of calls: their names, types, shapes and contents."""
    digest = hashlib.sha256()
    for call in calls:
        for name, value in sorted(call.items()):
            digest.update(name.encode())
            _digest(value, digest)
    return digest.hexdigest()


def _digest(value: Value, digest: Any) -> None:
    if isinstance(value, list):
        digest.update(b"[")
        for item in value:
            _digest(item, digest)
        digest.update(b"]")
    elif value is None:
        digest.update(b"none")
    else:
        array = np.asarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())


def verify_artifact(artifact: Artifact, request: Verification, *, cache: bool = True) -> VerificationReport:
    """Verify an artifact that is there already against its own source graph.

    Raises:
        ArtifactError: It was saved without its source.
        AccelrtError: Whatever `Verifier.verify` raises; a model out of tolerance is a report, no error.
    """
    return Verifier(artifact.source_graph(), request, cache=cache).verify(artifact)
