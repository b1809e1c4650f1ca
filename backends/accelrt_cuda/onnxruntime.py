"""The engine `cuda/onnxruntime`: onnxruntime's CUDA provider, and nothing that runs elsewhere unsaid.

onnxruntime gives to the CPU what it cannot or will not run on CUDA, without a word. So sessions are made without the
CPU among their providers, and where every node went is read back: at each trial, when a program is compiled, and when
it is loaded (docs/decisions/0020). What tries runs in a child process.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelrt import isolation
from accelrt.backend import SUPPORTED, Caps, CompileJob, Device, Engine, Executable, Precision, Program, Status, Verdict
from accelrt.errors import AccelrtError, CompileError, IncompatibleProgram, IsolatedError
from accelrt.graph.node import WEIGHTS_FILE, Node
from accelrt.graph.types import TensorType
from accelrt_cuda import diagnosis, nvml
from accelrt_cuda.failures import device_lost, lost, no_room, out_of_memory, short
from accelrt_cuda.onnxruntime_options import CudaOnnxRuntimeOptions

_CHILD = "accelrt_cuda.onnxruntime_child"
_MODEL = "model.onnx"
_PROBE_S, _TRIAL_S = 180.0, 600.0
_TRIED_ON = 0
"""The device on which is tried, by CUDA's number: the first that is visible."""

Cast = Literal["float16", "bfloat16"]
_CASTS: Mapping[Precision, Cast] = {"fp16": "float16", "bf16": "bfloat16"}
_BF16_CAPABILITY = (8, 0)
"""Ampere, the first whose tensor cores multiply bfloat16: CUDA Programming Guide, table of compute capabilities."""


class OnnxRuntimeCudaEngine(Engine):
    """onnxruntime's CUDA provider."""

    name: ClassVar[str] = "onnxruntime"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, device_tensors=True)
    options: ClassVar[type] = CudaOnnxRuntimeOptions
    requires: ClassVar[str] = f"pip uninstall -y onnxruntime && {diagnosis.ONNXRUNTIME_GPU}"
    module: ClassVar[str] = "onnxruntime"
    """What is imported; stand-ins have a name of their own, so that the real one can be beside them."""

    def __init__(self) -> None:
        self._probed: dict[str, Any] = {}
        self._trials: dict[tuple[object, ...], str | None] = {}
        self._table: Any = None

    def status(self) -> Status:
        found = diagnosis.hardware() or diagnosis.onnxruntime(self.module) or self._problem()
        return Status(True, version=self._facts()["version"]) if found is None else found.status()

    def fingerprint(self) -> Mapping[str, str]:
        facts = self._facts()
        kinds = {nvml.compute_capability(device) for device in nvml.devices()} - {None}
        return {
            "onnxruntime": facts["version"],
            "cuda": facts["cuda"],
            "cudnn": facts["cudnn"] or "none",
            "compute_capability": "+".join(sorted(f"{kind[0]}.{kind[1]}" for kind in kinds if kind is not None)),
        }

    # What is supported

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return self.supports_all([node], precision)[0]

    def supports_all(self, nodes: Sequence[Node], precision: Precision) -> list[Verdict]:
        if (lacking := _lacking(precision)) is not None:
            return [Verdict.refuse(lacking)] * len(nodes)
        # A node that has no kernel in fewer bits stays in float32 beside those that have: see `compile`.
        reasons = self._reasons(nodes, None)
        if (cast := _CASTS.get(precision)) is not None:
            refused = [index for index, reason in enumerate(reasons) if reason is not None]
            again = self._reasons([nodes[index] for index in refused], cast)
            for index, reason in zip(refused, again, strict=True):
                if reason is None:
                    reasons[index] = None
        return [SUPPORTED if reason is None else Verdict.refuse(reason) for reason in reasons]

    def _reasons(self, nodes: Sequence[Node], cast: Cast | None) -> list[str | None]:
        """Return why each node is refused, cast to fewer bits or as it is; what a trial told is remembered."""
        keys = [(cast, *_key(node)) for node in nodes]
        untried = {key: node for key, node in zip(keys, nodes, strict=True) if key not in self._trials}
        models: dict[tuple[object, ...], bytes] = {}
        for key, node in untried.items():
            prepared = self._trial_model(node, cast)
            if isinstance(prepared, bytes):
                models[key] = prepared
            else:
                self._trials[key] = prepared
        self._trials.update(zip(models, self._try_out(list(models.values())), strict=True))
        return [self._trials[key] for key in keys]

    def _trial_model(self, node: Node, cast: Cast | None) -> bytes | str | None:
        """Return a model of one node to be tried, or the reason why that is needless."""
        from accelrt.graph.cast import cast_floats
        from accelrt.graph.load import load_graph
        from accelrt.graph.trial import single_node_model

        if (reason := _unknown_values(node)) is not None:
            return reason
        if cast is None and (reason := self._missing_kernel(node)) is not None:
            return reason
        model = single_node_model(node)
        if cast is not None:
            try:
                plain = load_graph(model)
                model = cast_floats(plain, cast).proto
            except AccelrtError as error:
                return f"cannot be cast to {cast}: {error.message}"
            if len(model.graph.node) == len(plain.proto.graph.node) and _has_float32(node):
                return f"{node.kind} takes no {cast}"
        problem = self._lower(model)
        return problem if problem is not None else bytes(model.SerializeToString())

    def _missing_kernel(self, node: Node) -> str | None:
        reason: str | None = self._kernels().missing(node)
        if reason is None:
            for body in node.bodies:
                for inner in body:
                    if (inside := self._missing_kernel(inner)) is not None:
                        return f"its body holds {inner.name!r} ({inner.kind}): {inside}"
        return reason

    def _kernels(self) -> Any:
        """Return the table of CUDA's kernels; where onnxruntime cannot list them, one that leaves all to trials."""
        from accelrt.graph.kernel_table import Kernel, KernelTable

        if self._table is None:
            rows = []
            if diagnosis.onnxruntime_tensorrt(self.module) is None:
                with contextlib.suppress(AccelrtError, OSError), isolation.Child() as child:
                    rows = child.call(f"{_CHILD}:kernels", timeout_s=_PROBE_S, module=self.module)
            entries = [
                Kernel(domain, name, (versions[0], versions[1]), types) for domain, name, versions, types in rows
            ]
            self._table = KernelTable(entries, "CUDA") if entries else _Unlisted()
        return self._table

    def _try_out(self, models: Sequence[bytes]) -> list[str | None]:
        if not models:
            return []
        texts = [base64.b64encode(model).decode() for model in models]
        try:
            reasons: list[str | None] = self._call("try_out", models=texts)
        except IsolatedError as error:
            if len(models) == 1:
                return [f"its trial failed: {error.message}"]
        except AccelrtError as error:
            return [f"its trial failed: {error.message}"] * len(models)
        else:
            return reasons
        # One of them takes the process down: each alone tells which.
        return [reason for model in models for reason in self._try_out([model])]

    # Compiling and loading

    def compile(self, job: CompileJob, out: Path) -> Program:
        if (lacking := _lacking(job.precision)) is not None:
            raise CompileError(f"onnxruntime cannot take the segment: {lacking}.", backend=self.name)
        if job.options.enable_cuda_graph:
            from accelrt_cuda.onnxruntime_runtime import cannot_capture

            if (problem := cannot_capture(job.signature)) is not None:
                raise CompileError(
                    f"enable_cuda_graph is not possible: {problem}.",
                    hint="Give every size, with batch= for instance, or leave the option out.",
                    backend=self.name,
                )
        if (absent := self._lacks_tensorrt(job.options)) is not None:
            raise CompileError(f"{absent.reason}.", hint=f"Try: {absent.remedy}", backend=self.name)
        cast = _CASTS.get(job.precision)
        notes = [self._write(job, out)] if cast is None else [self._write_cast(job, out, cast)]
        try:
            found = self._call("build", model=str(out / _MODEL), options=asdict(job.options))
        except IsolatedError as error:
            raise CompileError(f"onnxruntime failed on the segment: {error.message}", backend=self.name) from error
        remark = "; ".join(filter(None, [*notes, found["remark"]]))
        return Program(
            {_MODEL: out / _MODEL}, self.fingerprint(), job.signature, job.options, job.precision, remark=remark
        )

    def _write(self, job: CompileJob, out: Path) -> str:
        """Write the model with versions that onnxruntime knows, its weights beside it; return what is to be said."""
        import onnx

        from accelrt.graph.ort_values import widen_borders

        proto = onnx.load(job.model, load_external_data=False)
        if (problem := self._lower(proto)) is not None:
            raise CompileError(f"onnxruntime cannot take the segment: {problem}.", backend=self.name)
        widen_borders(proto, job.signature)
        (out / _MODEL).write_bytes(proto.SerializeToString())
        if (weights := job.model.with_name(WEIGHTS_FILE)).is_file():
            _link(weights, out / WEIGHTS_FILE)
        quantised = sum(node.op_type == "DequantizeLinear" for node in proto.graph.node)
        if job.precision != "int8" or not quantised:
            return ""
        return (
            f"products between {quantised} DequantizeLinear are computed in float32: CUDA has none of integers for them"
        )

    def _write_cast(self, job: CompileJob, out: Path, cast: Cast) -> str:
        """Write the model cast to fewer bits, but for nodes without such a kernel; return what is to be said."""
        from accelrt.graph.cast import cast_floats
        from accelrt.graph.load import load_graph
        from accelrt.graph.ort_values import widen_borders
        from accelrt.graph.weights import WeightFile

        graph = load_graph(job.model)
        reasons = self._reasons(graph.nodes, cast)
        kept = {node.name: node.kind for node, reason in zip(graph.nodes, reasons, strict=True) if reason is not None}
        graph = cast_floats(graph, cast, keep=lambda node: node.name in kept)
        proto = graph.proto
        if (problem := self._lower(proto)) is not None:
            raise CompileError(f"onnxruntime cannot take the segment: {problem}.", backend=self.name)
        widen_borders(proto, job.signature)
        weights = WeightFile(out / WEIGHTS_FILE)
        try:
            graph.write(out / _MODEL, weights)
        finally:
            weights.close()
        if not kept:
            return ""
        kinds = ", ".join(sorted(set(kept.values())))
        return f"{len(kept)} nodes stay in float32, having no CUDA kernel in {cast}: {kinds}"

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        import onnx

        from accelrt_cuda.onnxruntime_child import weight_bytes
        from accelrt_cuda.onnxruntime_runtime import NAME, Captured, Resident
        from accelrt_cuda.onnxruntime_session import absent_provider, assignments, runtime, session, shape_nodes, strays

        (device,) = devices
        path, options = program.files[_MODEL], program.options
        if (lack := self._lacks_tensorrt(options)) is not None:
            raise IncompatibleProgram(f"{lack.reason}.", hint=f"Try: {lack.remedy}", backend=self.name)
        try:
            ort = runtime(self.module)
            made = session(ort, str(path), options, device.index)
        except Exception as error:
            if (what := lost(str(error))) is not None:
                raise device_lost(what, device, NAME) from error
            if out_of_memory(str(error)):
                raise no_room(error, device, NAME, weights=weight_bytes([path])) from error
            raise IncompatibleProgram(f"onnxruntime: {short(error)}", backend=self.name) from error
        if (absent := absent_provider(made, options)) is not None:
            raise IncompatibleProgram(
                f"onnxruntime dropped {absent} in this process, and would run the program on "
                f"{', '.join(made.get_providers())}.",
                hint="`accelrt doctor cuda` says what is missing.",
                backend=self.name,
            )
        proto = onnx.load(path, load_external_data=False)
        if stray := strays(assignments(made), shape_nodes(proto), options):
            raise IncompatibleProgram(
                f"onnxruntime would run {len(stray)} nodes on the CPU, which it did not when the program was compiled: "
                f"{', '.join(node.name or node.op_type for node in stray[:5])}.",
                backend=self.name,
            )
        return (Captured if options.enable_cuda_graph else Resident)(ort, made, program.signature, device)

    def _lacks_tensorrt(self, options: CudaOnnxRuntimeOptions) -> diagnosis.Diagnosis | None:
        if options.execution_provider != "tensorrt":
            return None
        return diagnosis.onnxruntime_tensorrt(self.module)

    # The child process

    def _problem(self) -> diagnosis.Diagnosis | None:
        """Return what is wrong with the libraries or the runtime, as a child process finds out; asked once."""
        facts = self._facts()
        return facts.get("diagnosis")

    def _facts(self) -> dict[str, Any]:
        if not self._probed:
            self._probed.update(self._ask())
        return self._probed

    def _ask(self) -> dict[str, Any]:
        build = diagnosis.onnxruntime_build(self.module)
        if build is None:
            return {"diagnosis": diagnosis.onnxruntime(self.module)}
        absent = diagnosis.libraries(build.libraries, "onnxruntime's CUDA provider", build.install)
        if absent is not None:
            return {"diagnosis": absent}
        holder = f"onnxruntime {build.version} on CUDA"
        try:
            found: dict[str, Any] = self._call("probe")
        except (AccelrtError, OSError) as error:
            return {"diagnosis": diagnosis.broken(holder, str(error), build.install)}
        if "problem" in found:
            return {"diagnosis": diagnosis.broken(holder, found["problem"], build.install)}
        return found

    def _call(self, function: str, **arguments: Any) -> Any:
        return isolation.call(
            f"{_CHILD}:{function}", timeout_s=_TRIAL_S, module=self.module, device_id=_TRIED_ON, **arguments
        )

    def _lower(self, proto: Any) -> str | None:
        from accelrt.graph.trial import lower_versions

        facts = self._facts()
        return lower_versions(proto, facts["opsets"], facts["ir_version"])


class _Unlisted:
    """The table of a build that cannot list its kernels."""

    def missing(self, node: Node) -> str | None:
        return None


def _lacking(precision: Precision) -> str | None:
    """Return why a precision is not to be had on the device on which is tried, None if it is."""
    if precision != "bf16":
        return None
    device = next(iter(nvml.devices()), None)
    capability = None if device is None else nvml.compute_capability(device)
    if device is None or capability is None or capability >= _BF16_CAPABILITY:
        return None
    return f"bf16 takes compute capability 8.0 or more, and {device.description} has less"


def _unknown_values(node: Node) -> str | None:
    """Return which value of a node cannot be on a GPU, None if all can be."""
    for type_ in (*node.input_types, *node.output_types, *node.capture_types):
        if type_ is not None and not isinstance(type_, TensorType):
            return f"it has a value of type {type_}, and only tensors are kept on the GPU"
        if isinstance(type_, TensorType) and type_.dtype in ("string", "complex64", "complex128"):
            return f"it has a value of type {type_.dtype}, which is not kept on the GPU"
    return None


def _has_float32(node: Node) -> bool:
    types = (*node.input_types, *node.output_types)
    return any(isinstance(type_, TensorType) and type_.dtype == "float32" for type_ in types)


def _key(node: Node) -> tuple[object, ...]:
    """Return what a trial depends on: the signature, and the types that bodies capture."""
    captured = tuple(type_.dtype if isinstance(type_, TensorType) else str(type_) for type_ in node.capture_types)
    return (node.signature, captured)


def _link(source: Path, target: Path) -> None:
    """Bring weights along: a link, for they are as large as the model."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
