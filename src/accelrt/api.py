"""compile() and load(): the glue between a source, the partitioner, the artifact and the session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from accelrt import options as option_module
from accelrt.artifact.artifact import Artifact, is_artifact, open_artifact
from accelrt.errors import ConversionError, OptionError
from accelrt.policy import check as check_policy
from accelrt.protocol.address import is_address
from accelrt.registry import REGISTRY, takes_whole
from accelrt.sources.request import SourceRequest
from accelrt.target import AUTO, parse_groups, requested
from accelrt.tune.wishes import Wishes

if TYPE_CHECKING:
    from accelrt.artifact.candidates import CandidateTable, Objective
    from accelrt.artifact.making import Progress
    from accelrt.backend import Precision
    from accelrt.partition.stages import StagePlan
    from accelrt.precision.calibrate import Calibration
    from accelrt.precision.compare import Tolerances
    from accelrt.runtime.session import Session
    from accelrt.verification import Verification

    Verify: TypeAlias = bool | Mapping[str, Any] | Iterable[Any] | Verification | None


def compile(
    model: Any,
    backend: str | None = None,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    fallback: str = "warn",
    input_names: Sequence[str] | Mapping[str, str] | None = None,
    output_names: Sequence[str] | Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    precision: Precision | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    verify: Verify = None,
    tune: bool = False,
    objective: Objective | None = None,
    latency_budget: float | None = None,
    percentile: float | None = None,
    tolerance: Tolerances | None = None,
    profile: CandidateTable | Artifact | None = None,
    batch: int | Sequence[int] | None = None,
    cores: int | StagePlan | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model for a target; what the target cannot run goes to the CPU, and the artifact says so.

    The target ``auto`` tries every engine in every precision that the tolerance allows, each in a child process,
    verifies and measures it, and takes the best; the table of all is in the artifact's ``candidates``.

    Args:
        model: ONNX (path, bytes, ``onnx.ModelProto``, ``onnx_ir.Model``), PyTorch (``nn.Module``,
            ``ExportedProgram``, ``ScriptModule``, a ``.pt2`` or TorchScript file) or TensorFlow (a SavedModel folder,
            ``.keras`` file or frozen graph, ``keras.Model``, ``tf.function``, ``tf.Module``), or a model that a server
            holds (``grpc://host:8001/name``, with ``/version`` if one is meant).
        backend: A target, ``backend[/engine][:devices]`` or ``auto``; if absent that of ``ACCELRT_BACKEND``, else
            ``cpu``.
        example_inputs: Inputs the model accepts, positional or by name. PyTorch modules, TorchScript and
            TensorFlow functions without a signature need them; those of ONNX models are checked against it. ``auto``
            times calls with them, and verifies with them unless ``verify`` says otherwise.
        fallback: ``"warn"`` lets nodes run elsewhere and says so once, ``"allow"`` is silent, ``"error"`` raises.
        input_names: Names for the inputs, in order, instead of the model's own. TensorFlow models take a mapping
            of names to their own as well; of a frozen graph, tensors are named: ``{"x": "input:0"}``.
        output_names: Likewise for the outputs.
        options: Options by name, of the source, the partitioner and the engines; ``"engine.name"`` for one alone.
        precision: What the requested engine computes in: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``; inputs and
            outputs keep their types. Nodes that the engine does not compute in it run on the CPU in float32, as
            ``fallback`` says. If absent each engine computes in its default, which the placement records.
        calibration: For ``"int8"``: typical inputs, or a `Calibration` that says more. A model that holds
            QuantizeLinear already takes none.
        verify: Hold the outputs against those of float32 on onnxruntime before the artifact is returned: True draws
            inputs, a mapping is one call, an iterable several, a `Verification` says more. The figures are in the
            artifact's ``verification``.
        tune: Measure the cut on the devices at hand, return segments to the CPU that lose, transfers included, and
            keep the cut that is fastest as measured, or as fast with fewer segments. Measured with ``example_inputs``
            that fit the signature, else the first inputs given for ``verify``, else random ones with every symbolic
            dimension 1. Takes a second to a minute or two; the cache remembers the result for this machine. Not for
            ``auto``, nor with ``batch`` or ``cores``, nor for a model that runs whole.
        objective: For ``auto``: ``"latency"`` (least median of a call, the default), ``"throughput"`` (most rows a
            second) or ``"memory"`` (least peak resident memory).
        latency_budget: For ``auto``: most seconds that a call may take at the percentile.
        percentile: For ``auto``: the percentile of latency to measure, 99 if absent.
        tolerance: For ``auto``: relative L2 error that outputs may have, a `Tolerance`, or either by output name. If
            absent that of float32, 1e-3, which allows no other precision.
        profile: For ``auto``: figures measured earlier to choose by, instead of measuring: a `CandidateTable`, or the
            artifact that holds it. The winner is verified all the same.
        batch: Batch sizes to specialise the model to, such as ``(1, 8)``; the session then takes any number of rows, in
            the runs of these sizes that pad least. Only for models whose rows are proved to be independent. Not for
            ``auto``, nor for a model that runs whole.
        cores: Cut the model into so many stages of even work, one core each; ``submit`` and ``map`` keep all of them
            busy. A `StagePlan` also says what nodes cost; else that is estimated. Not for ``auto``, nor for a model
            that runs whole.
        cache: Look the result up in the compile cache, and put it there.
        progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The artifact: ``explain()`` it, ``save()`` it, ``load()`` it.

    Raises:
        TargetError, BackendUnavailable: The target is unknown or not usable; says what installs it.
        SourceError: The model is not recognised or cannot be converted, and no engine takes it whole.
        OptionError: An option nobody knows, or of the wrong type, or arguments that do not go together.
        UnsupportedNodes: ``fallback="error"`` and a node would leave the requested engine.
        CompileError: A node that nothing here can run.
        NoCandidate: ``auto`` found none that is verified and within the budget; its ``rows`` say why.
        VerificationError: An output is out of tolerance.
        BatchError: ``batch`` for a model whose rows are not proved to be independent; says where they may meet.
        CalibrationError: A calibration set that is empty, does not fit, or holds NaN.
        InputError: Inputs for ``verify`` or of ``example_inputs`` that do not fit; with ``tune``, random inputs that
            cannot be drawn, or that the model does not take.
        DeviceError: ``tune`` finds no device to measure on, or none that can take the model.
        ExecutionError: With ``tune``, the model fails on the inputs that were given.
    """
    from accelrt.precision.plan import plan, precision_named
    from accelrt.sources import served

    policy = check_policy(fallback)
    # A model that a server holds can be predicted with there and nowhere else, whatever is the default.
    target = requested(served.TARGET if backend is None and served.recognises(model) else backend)
    asked = None if precision is None else precision_named(precision)
    wishes = {
        "objective": objective,
        "latency_budget_s": latency_budget,
        "percentile": percentile,
        "tolerance": tolerance,
        "profile": profile,
    }
    wishes = {name: value for name, value in wishes.items() if value is not None}
    if str(target) == AUTO:
        if tune:
            raise OptionError(
                "tune=True measures the cut of one target, and 'auto' is a choice between all.",
                hint="Leave tune out; compile for the target that auto chose with tune=True.",
            )
        if batch is not None or cores is not None:
            raise OptionError(
                f"{'batch' if batch is not None else 'cores'!r} is not offered together with the target {AUTO!r}.",
                hint="Leave it out; compile for the target that auto chose with it.",
            )
        return _auto(
            model,
            SourceRequest(example_inputs, input_names, output_names),
            options,
            Wishes(asked, policy, calibration, verify, cache, progress, **wishes),  # type: ignore[arg-type]
        )
    if wishes:
        raise OptionError(
            f"{next(iter(wishes)).removesuffix('_s')!r} belongs to the target {AUTO!r}, and the target is {target}.",
            hint="Pass backend='auto', or leave it out. verify=Verification(tolerance=...) holds any target to one.",
        )
    if calibration is not None and asked != "int8":
        raise OptionError("A calibration is given, but precision='int8' is not.", hint="Pass both, or neither.")
    from accelrt.artifact.build import BuildRequest, batch_sizes, build, stage_plan, tuned_apart
    from accelrt.runtime.inputs import bind_examples
    from accelrt.sources import open_source
    from accelrt.whole import WholeCompile, compile_whole, whole_if_it_can

    candidates, precisions = plan(REGISTRY.candidates(target), asked)
    sizes, stages = batch_sizes(batch), stage_plan(cores)
    if tune and (sizes or stages is not None):
        raise tuned_apart("batch" if sizes else "cores")
    named_whole = takes_whole(candidates[0].engine)  # nothing is converted then, and no other engine has a share
    resolved = option_module.resolve(options, candidates[:1] if named_whole else candidates)
    if stages is not None:
        resolved = option_module.one_core_each(resolved)
    asked_of_source = SourceRequest(example_inputs, input_names, output_names, resolved.source)
    whole = WholeCompile(
        model,
        target,
        asked_of_source,
        options,
        asked,
        policy,
        verify,
        cache,
        progress,
        of_graphs="batch" if sizes else "cores" if stages is not None else "tune" if tune else None,
    )
    if named_whole:
        return compile_whole(whole)
    if (found := whole_if_it_can(whole)) is not None:
        return found
    if progress is not None:
        progress("reading the model", 0, 1)
    try:
        source = open_source(model, asked_of_source)
    except ConversionError as failure:
        return compile_whole(whole, failure)
    samples = bind_examples(source.graph.signature, example_inputs, strict=source.format == "onnx")
    check = None
    if verify is not None and verify is not False:
        from accelrt.verification import Verifier, as_verification

        if (wanted := as_verification(verify)) is not None:
            verifier = Verifier(source.graph, wanted, cache=cache)
            check, samples = verifier.check(), samples or verifier.given
    graph = source.graph
    if asked == "int8":
        from accelrt.tune.calibration import quantised

        graph = quantised(graph, calibration, progress)
    refine = None
    if tune:
        from accelrt.tune.cuts import cut_tuner

        refine = cut_tuner(graph.signature, candidates, target, samples)
    request = BuildRequest(
        str(target), candidates, resolved, source.format, asked, precisions, sizes, stages, refine=refine
    )
    return build(graph, request, fallback=policy, cache=cache, progress=progress, check=check)


def _auto(model: Any, request: SourceRequest, options: Mapping[str, Any] | None, wishes: Wishes) -> Artifact:
    """Find what ``auto`` chose earlier, by the model's file alone if that can be, else choose."""
    from accelrt.tune.shortcut import find, shortcut_key

    key = shortcut_key(model, request, options, wishes)
    if key is not None and (found := find(key, wishes)) is not None:
        return found
    # Brings in what reads and converts models, which the short way can do without.
    from accelrt.tune.request import auto

    return auto(model, request, options, wishes, key)


def load(
    model: Any,
    *,
    backend: str | None = None,
    devices: str | int | Iterable[int] | Iterable[str] | None = None,
    replicas: int | None = None,
    workers: int | None = None,
    fallback: str = "warn",
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Session:
    """Load an artifact onto its devices; a model that is not compiled yet is compiled first.

    Args:
        model: An `Artifact`, the path of a saved one, or any model that `compile` takes.
        backend: For a model: its target, as for `compile`; if absent the backend that ``devices`` names, if so. An
            artifact has its own and takes none.
        devices: Indices of the backend's devices: ``"0-3"``, ``"neuron:0-3"``, 2 or a list of numbers, from which each
            replica takes as many as a copy of the model needs; or a list of texts, ``["0-3", "4-7"]``, groups that one
            replica each takes whole. If absent those of the artifact's target; else one replica takes the next free
            place.
        replicas: Copies of the model, each with devices of its own where a backend gives each to one session only;
            elsewhere they may share. If absent as many as ``devices`` has room for, else 1.
        workers: Calls that `Session.submit` and `Session.map` have in flight at a time. If absent what the artifact
            records, else what keeps each device busy, by its engine.
        fallback: What happens where a segment cannot run as compiled: no such engine or device, another toolchain, a
            failure at run time.
        example_inputs: For a model: as for `compile`.
        options: For a model: as for `compile`.
        trust: For the path of an artifact: let programs that run code when they are loaded do so, such as PyTorch's and
            TensorFlow's. ``ACCELRT_TRUST=1`` says it of every file.

    Returns:
        A session, ready to predict. Close it, or use it as a context manager.

    Raises:
        CoresUnavailable: ``devices`` or ``replicas`` ask for more than there is, or than is free; says who holds what.
        OptionError: ``replicas`` or ``workers`` is no such number.
        CorruptArtifact, ArtifactVersionError: The file is no artifact that can be trusted.
        UntrustedProgram: The file holds programs that run code, and ``trust`` was not given.
        IncompatibleProgram, BackendUnavailable, DeviceError: ``fallback="error"``, or there is no source to compile.
        AccelrtError: Whatever `compile` raises, for a model.
    """
    from accelrt.runtime.asked import Asked
    from accelrt.runtime.load import open_session

    policy = check_policy(fallback)
    of, groups = (None, None) if devices is None else parse_groups(devices)
    asked = Asked(groups, of, replicas, workers)
    artifact = _as_artifact(model, trust)
    if artifact is None:
        # Devices that name their backend are a target.
        artifact = compile(model, backend or of, example_inputs=example_inputs, fallback=policy, options=options)
    elif surplus := [
        n for n, v in (("backend", backend), ("example_inputs", example_inputs), ("options", options)) if v
    ]:
        raise OptionError(
            f"{surplus[0]!r} belongs to compiling, and the artifact is compiled already.",
            hint="Pass it to accelrt.compile().",
        )
    return open_session(artifact, asked=asked, fallback=policy)


def _as_artifact(model: Any, trust: bool) -> Artifact | None:
    if isinstance(model, Artifact):
        return model
    if (isinstance(model, str | Path) and not is_address(model)) or hasattr(model, "__fspath__"):
        path = Path(model)
        if is_artifact(path):
            return open_artifact(path, trust=trust)
    return None
