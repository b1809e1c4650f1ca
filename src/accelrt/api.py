"""compile() and load(): the glue between a source, the partitioner, the artifact and the session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from accelrt import options as option_module
from accelrt.artifact.artifact import Artifact, is_artifact, open_artifact
from accelrt.errors import CalibrationError, InputError, OptionError
from accelrt.policy import check as check_policy
from accelrt.registry import REGISTRY
from accelrt.target import parse_devices, requested

if TYPE_CHECKING:
    from accelrt.artifact.build import Progress
    from accelrt.backend import Precision
    from accelrt.graph.model import Graph
    from accelrt.partition.stages import StagePlan
    from accelrt.precision.calibrate import Calibration
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
    batch: int | Sequence[int] | None = None,
    cores: int | StagePlan | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model for a target; what the target cannot run goes to the CPU, and the artifact says so.

    Args:
        model: ONNX (path, bytes, ``onnx.ModelProto``, ``onnx_ir.Model``), PyTorch (``nn.Module``,
            ``ExportedProgram``, ``ScriptModule``, a ``.pt2`` or TorchScript file) or TensorFlow (a SavedModel folder,
            ``.keras`` file or frozen graph, ``keras.Model``, ``tf.function``, ``tf.Module``).
        backend: A target, ``backend[/engine][:devices]``; if absent that of ``ACCELRT_BACKEND``, else ``cpu``.
        example_inputs: Inputs the model accepts, positional or by name. PyTorch modules, TorchScript and
            TensorFlow functions without a signature need them; those of ONNX models are checked against it.
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
        batch: Batch sizes to specialise the model to, such as ``(1, 8)``; the session then takes any number of rows, in
            the runs of these sizes that pad least. Only for models whose rows are proved to be independent.
        cores: Cut the model into so many stages of even work, one core each; ``submit`` and ``map`` keep all of them
            busy. A `StagePlan` also says what nodes cost; else that is estimated.
        cache: Look the result up in the compile cache, and put it there.
        progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The artifact: ``explain()`` it, ``save()`` it, ``load()`` it.

    Raises:
        TargetError, BackendUnavailable: The target is unknown or not usable; says what installs it.
        SourceError: The model is not recognised or cannot be converted.
        OptionError: An option nobody knows, or of the wrong type.
        UnsupportedNodes: ``fallback="error"`` and a node would leave the requested engine.
        CompileError: A node that nothing here can run.
        VerificationError: An output is out of tolerance.
        BatchError: ``batch`` for a model whose rows are not proved to be independent; says where they may meet.
        CalibrationError: A calibration set that is empty, does not fit, or holds NaN.
        InputError: Inputs for ``verify`` or of ``example_inputs`` that do not fit.
    """
    from accelrt.artifact.build import BuildRequest, batch_sizes, build, stage_plan
    from accelrt.precision.plan import plan, precision_named
    from accelrt.runtime.inputs import check_examples
    from accelrt.sources import SourceRequest, open_source

    policy = check_policy(fallback)
    target = requested(backend)
    asked = None if precision is None else precision_named(precision)
    if calibration is not None and asked != "int8":
        raise OptionError("A calibration is given, but precision='int8' is not.", hint="Pass both, or neither.")
    candidates, precisions = plan(REGISTRY.candidates(target), asked)
    stages = stage_plan(cores)
    resolved = option_module.resolve(options, candidates)
    if stages is not None:
        resolved = option_module.one_core_each(resolved)
    if progress is not None:
        progress("reading the model", 0, 1)
    source = open_source(model, SourceRequest(example_inputs, input_names, output_names, resolved.source))
    if source.format == "onnx" and example_inputs is not None:
        check_examples(source.graph.signature, example_inputs)
    check = None
    if verify is not None and verify is not False:
        from accelrt.verification import Verifier, as_verification

        if (wanted := as_verification(verify)) is not None:
            check = Verifier(source.graph, wanted, cache=cache).check()
    graph = _quantised(source.graph, calibration, progress) if asked == "int8" else source.graph
    request = BuildRequest(
        str(target), candidates, resolved, source.format, asked, precisions, batch_sizes(batch), stages
    )
    return build(graph, request, fallback=policy, cache=cache, progress=progress, check=check)


def _quantised(graph: Graph, calibration: Calibration | Iterable[Any] | None, progress: Progress | None) -> Graph:
    """Return a graph in Q/DQ form, checking the calibration set before any work."""
    from accelrt.precision.calibrate import Calibration, check_calls, is_quantised, quantise
    from accelrt.runtime.inputs import bind_calls

    if is_quantised(graph):
        if calibration is not None:
            raise OptionError("The model is quantised already, and takes no calibration.")
        return graph
    if calibration is None:
        raise OptionError(
            "precision='int8' needs typical inputs to calibrate with.",
            hint="Pass calibration=[...]; a hundred are usually enough.",
        )
    how = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    inputs = [how.inputs] if isinstance(how.inputs, Mapping) else how.inputs
    if isinstance(inputs, str | bytes) or not hasattr(inputs, "__iter__"):
        raise CalibrationError(f"The calibration set must be an iterable of inputs, not {inputs!r}.")
    try:
        calls = bind_calls(graph.signature, inputs)
    except InputError as error:
        raise CalibrationError(f"The calibration set does not fit. {error.message}", hint=error.hint) from error
    check_calls(calls)
    return quantise(graph, calls, how, progress)


def load(
    model: Any,
    *,
    backend: str | None = None,
    devices: str | int | Iterable[int] | None = None,
    fallback: str = "warn",
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Session:
    """Load an artifact onto its devices; a model that is not compiled yet is compiled first.

    Args:
        model: An `Artifact`, the path of a saved one, or any model that `compile` takes.
        backend: For a model: its target, as for `compile`. An artifact has its own and takes none.
        devices: Indices of the backend's devices, ``"0-3"``, 2 or a list; all of them if absent.
        fallback: What happens where a segment cannot run as compiled: no such engine or device, another toolchain, a
            failure at run time.
        example_inputs: For a model: as for `compile`.
        options: For a model: as for `compile`.

    Returns:
        A session, ready to predict. Close it, or use it as a context manager.

    Raises:
        CorruptArtifact, ArtifactVersionError: The file is no artifact that can be trusted.
        IncompatibleProgram, BackendUnavailable, DeviceError: ``fallback="error"``, or there is no source to compile.
        AccelrtError: Whatever `compile` raises, for a model.
    """
    from accelrt.runtime.load import open_session

    policy = check_policy(fallback)
    wanted = None if devices is None else parse_devices(devices)
    artifact = _as_artifact(model)
    if artifact is None:
        artifact = compile(model, backend, example_inputs=example_inputs, fallback=policy, options=options)
    elif surplus := [
        n for n, v in (("backend", backend), ("example_inputs", example_inputs), ("options", options)) if v
    ]:
        raise OptionError(
            f"{surplus[0]!r} belongs to compiling, and the artifact is compiled already.",
            hint="Pass it to accelrt.compile().",
        )
    return open_session(artifact, devices=wanted, fallback=policy)


def _as_artifact(model: Any) -> Artifact | None:
    if isinstance(model, Artifact):
        return model
    if isinstance(model, str | Path) or hasattr(model, "__fspath__"):
        path = Path(model)
        if is_artifact(path):
            return open_artifact(path)
    return None
