"""The engine `cpu/openvino`: Intel's runtime, chosen by name.

OpenVINO has crashed in its compiler on CPUs that it does not know (openvino#35943), so everything that compiles
runs in a child process; only programs that have come out of one are imported into this one.
"""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelrt import isolation
from accelrt.backend import (
    SUPPORTED,
    Caps,
    CompileJob,
    Device,
    Engine,
    Executable,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.errors import (
    AccelrtError,
    CompileError,
    ExecutionError,
    IncompatibleProgram,
    IsolatedError,
    OptionError,
    OutOfDeviceMemory,
)
from accelrt.graph.node import Node
from accelrt.graph.types import Dim, Port, Signature, TensorType, Value, numpy_dtype
from accelrt_cpu.isa import instruction_set
from accelrt_cpu.openvino_deviations import deviation

_DEVICE = "CPU"
_BLOB = "model.blob"
_PROBE_S, _TRIAL_S = 120.0, 300.0
_OPSET, _IR_VERSION = 28, 14
"""The newest versions of ONNX on which the engine was checked: OpenVINO itself never refuses a version."""


@dataclass(frozen=True, slots=True)
class OpenVinoOptions:
    """Options of the engine.

    Attributes:
        threads: Threads that share one inference; 0 takes all cores.
        streams: Inferences that run side by side, each with its share of the threads.
        pinning: Threads stay on their cores; None leaves it to OpenVINO.
    """

    threads: int = 0
    streams: int = 1
    pinning: bool | None = None

    def __post_init__(self) -> None:
        if self.threads < 0 or self.streams < 1:
            raise OptionError(f"threads must be 0 or more and streams 1 or more, not {self}.")


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plug-in."""

    name: ClassVar[str] = "openvino"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2)
    options: ClassVar[type] = OpenVinoOptions
    requires: ClassVar[str] = "pip install accelrt[openvino]"

    def __init__(self) -> None:
        self._trials: dict[tuple[object, ...], str | None] = {}

    def status(self) -> Status:
        try:
            found = importlib.util.find_spec("openvino") is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            return Status(False, reason="openvino is not installed", remedy=self.requires)
        facts = _facts()
        if "problem" in facts:
            return Status(False, reason=f"openvino does not work here: {facts['problem']}", remedy=self.requires)
        return Status(True, version=facts["version"])

    def fingerprint(self) -> Mapping[str, str]:
        facts = _facts()
        return {"openvino": facts["version"], "device": facts["device"], "cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return self.supports_all([node], precision)[0]

    def supports_all(self, nodes: Sequence[Node], precision: Precision) -> list[Verdict]:
        if precision != "fp32":
            return [Verdict.refuse(f"precision {precision} is not offered by this engine")] * len(nodes)
        # Rules look at sizes, so they are asked each time; trials do not tell sizes apart and are remembered.
        refusals = [deviation(node) for node in nodes]
        untold = {_key(node): node for node, reason in zip(nodes, refusals, strict=True) if reason is None}
        untried = {key: node for key, node in untold.items() if key not in self._trials}
        answers = _try_out([_trial_model(node) for node in untried.values()])
        self._trials.update(zip(untried, answers, strict=True))
        reasons = (
            self._trials[_key(node)] if reason is None else reason for node, reason in zip(nodes, refusals, strict=True)
        )
        return [SUPPORTED if reason is None else Verdict.refuse(reason) for reason in reasons]

    def compile(self, job: CompileJob, out: Path) -> Program:
        if job.precision != "fp32":
            raise CompileError(f"Precision {job.precision} is not offered by this engine.", backend=self.name)
        isolation.call(
            f"{__name__}:build",
            model=str(job.model),
            blob=str(out / _BLOB),
            signature=job.signature.to_json(),
            properties=_properties(job.options),
        )
        return Program({_BLOB: out / _BLOB}, self.fingerprint(), job.signature, job.options)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            blob = _mapped(program.files[_BLOB])
            compiled = _core().import_model(blob, _DEVICE, _properties(program.options))
        except MemoryError as error:
            raise OutOfDeviceMemory(f"openvino: {error}", backend=self.name) from error
        except Exception as error:
            raise IncompatibleProgram(f"openvino: {_short(error)}", backend=self.name) from error
        return _Resident(compiled, blob, program.signature)


def _key(node: Node) -> tuple[object, ...]:
    """Return what a trial depends on: the signature and, as kernels go by it, which sizes are open, 0 or 1."""
    types = (*node.input_types, *node.capture_types, *node.output_types)
    shapes = (type_.shape for type_ in types if isinstance(type_, TensorType))
    sizes = tuple(
        None if shape is None else tuple(min(dim, 2) if isinstance(dim, int) else None for dim in shape)
        for shape in shapes
    )
    captures = tuple(type_.dtype if isinstance(type_, TensorType) else str(type_) for type_ in node.capture_types)
    return (node.signature, sizes, captures)


def _properties(options: OpenVinoOptions) -> dict[str, str]:
    """Return every property that changes numbers or threads: no default of a CPU or a release decides."""
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": "ACCURACY",
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
        "CPU_DENORMALS_OPTIMIZATION": "NO",
        "NUM_STREAMS": str(options.streams),
        "INFERENCE_NUM_THREADS": str(options.threads),
    }
    if options.pinning is not None:
        properties["ENABLE_CPU_PINNING"] = "YES" if options.pinning else "NO"
    return properties


def _trial_model(node: Node) -> bytes:
    from accelrt.graph.trial import single_node_model

    return bytes(single_node_model(node).SerializeToString())


def _try_out(models: Sequence[bytes]) -> list[str | None]:
    """Ask the child about models; where one takes the child down, halve the batch until it stands alone."""
    if not models:
        return []
    try:
        texts = [base64.b64encode(model).decode() for model in models]
        reasons: list[str | None] = isolation.call(f"{__name__}:try_out", timeout_s=_TRIAL_S, models=texts)
        return reasons
    except IsolatedError as error:
        if len(models) == 1:
            return [f"OpenVINO did not survive the trial: {error.message}"]
        middle = len(models) // 2
        return _try_out(models[:middle]) + _try_out(models[middle:])


@cache
def _facts() -> dict[str, str]:
    """Return version and device as the child sees them, or the problem that it has with them; asked once."""
    try:
        facts: dict[str, str] = isolation.call(f"{__name__}:probe", timeout_s=_PROBE_S)
        return facts
    except (AccelrtError, OSError) as error:
        return {"problem": str(error)}


@cache
def _core() -> Any:
    """Return the one `openvino.Core` of this process: each loads the plug-in and its threads anew."""
    import openvino

    return openvino.Core()


def _mapped(path: Path) -> Any:
    """Return a file as a tensor over its pages, in which a program then leaves its weights."""
    import openvino

    # Copy-on-write, because OpenVINO shares only what numpy may write to.
    return openvino.Tensor(np.memmap(path, np.uint8, mode="c"), shared_memory=True)


# --- what runs in the child process ---


def probe() -> dict[str, str]:
    """Return OpenVINO's version and the full name of its device."""
    import openvino

    version = openvino.get_version()
    return {"version": version, "device": str(_core().get_property(_DEVICE, "FULL_DEVICE_NAME"))}


def try_out(models: Sequence[str]) -> list[str | None]:
    """Return for each model, as base64, why OpenVINO cannot compile it, None where it can."""
    with tempfile.TemporaryDirectory() as folder:
        return [_trial(base64.b64decode(text), Path(folder)) for text in models]


def _trial(data: bytes, folder: Path) -> str | None:
    import onnx

    from accelrt.graph.convert import from_type_proto

    proto = onnx.ModelProto.FromString(data)
    ports = (
        tuple(Port(v.name, type_) for v in values if (type_ := from_type_proto(v.type)) is not None)
        for values in (proto.graph.input, proto.graph.output)
    )
    signature = Signature(*ports)
    if (problem := _lower(proto)) is not None:
        return problem
    try:
        model = _read(proto, folder, signature)
    except Exception as error:  # noqa: BLE001 - the text of whatever it raises is the reason
        return f"refused on conversion: {_short(error)}"
    properties = _properties(OpenVinoOptions(threads=1))
    try:
        # `query_model` would name what lacks a kernel, but 2026.4 also names an Unsqueeze that does compile.
        return _mismatch(_core().compile_model(model, _DEVICE, properties), signature)
    except Exception as error:  # noqa: BLE001
        return f"refused on trial: {_short(error)}"


def build(model: str, blob: str, signature: Mapping[str, Any], properties: Mapping[str, str]) -> None:
    """Compile the ONNX file ``model`` and write the program to ``blob``.

    Raises:
        CompileError: OpenVINO cannot take the model as it is.
    """
    import onnx

    folder, ports = Path(model).parent, Signature.from_json(signature)
    proto = onnx.load(model, load_external_data=False)
    if problem := _lower(proto) or _wide_weight(proto, folder):
        raise CompileError(f"OpenVINO cannot take the segment: {problem}.", backend=OpenVinoEngine.name)
    try:
        compiled = _core().compile_model(_read(proto, folder, ports), _DEVICE, dict(properties))
    except Exception as error:
        raise CompileError(f"OpenVINO: {_short(error)}", backend=OpenVinoEngine.name) from error
    if problem := _mismatch(compiled, ports):
        raise CompileError(f"OpenVINO changed the segment: {problem}.", backend=OpenVinoEngine.name)
    Path(blob).write_bytes(compiled.export_model().getbuffer())


def _lower(proto: Any) -> str | None:
    from accelrt.graph.trial import lower_versions

    return lower_versions(proto, {"": _OPSET}, _IR_VERSION)


def _read(proto: Any, folder: Path, signature: Signature) -> Any:
    """Read a model by way of a file in ``folder``, where its weights are, and name its ports as ONNX does.

    Trials take the same way: from memory, OpenVINO converts with another frontend. Where an output is but an input,
    it keeps one of the two names, so inputs go by the friendly name, which compilation leaves alone.
    """
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
        file.write(proto.SerializeToString())
        file.flush()
        model = _core().read_model(file.name)
    parameters = model.get_parameters()
    if len(parameters) == len(signature.inputs):  # else some are of no use, and the rest have kept their names
        for parameter, name in zip(parameters, signature.input_names, strict=True):
            parameter.set_friendly_name(name)
    for port, name in zip(model.outputs, signature.output_names, strict=True):
        port.add_names({name})
    return model


def _wide_weight(proto: Any, folder: Path) -> str | None:
    """Return which weight holds 64-bit integers that exceed the 32 bits that OpenVINO computes in."""
    import onnx
    from onnx import numpy_helper

    from accelrt.graph.weights import is_external

    for tensor in proto.graph.initializer:
        is_wide = tensor.data_type == onnx.TensorProto.INT64 and is_external(tensor)
        if is_wide and _exceeds_int32(numpy_helper.to_array(tensor, str(folder))):
            return f"the weight {tensor.name!r} holds integers that exceed 32 bits"
    return None


def _mismatch(compiled: Any, signature: Signature) -> str | None:
    """Return how inputs or outputs differ from what was asked for, None if they do not."""
    inputs, outputs = _places(compiled, signature)
    if len(inputs) != len(compiled.inputs):
        return "its inputs have lost their names"
    if len(outputs) != len(signature.outputs):
        return "its outputs have lost their names"
    for found, port in (
        *((compiled.inputs[index], port) for index, port in inputs),
        *((compiled.outputs[index], port) for index, port in outputs),
    ):
        if not isinstance(port.type, TensorType):
            return f"{port.name!r} is a {port.type}"
        if (name := found.get_element_type().get_type_name()) != _TYPE_NAMES[port.type.dtype]:
            return f"{port.name!r} is {name}, not {port.type.dtype}"
        rank = found.get_partial_shape().rank
        if rank.is_static and port.type.shape is not None and rank.get_length() != len(port.type.shape):
            return f"{port.name!r} has {rank.get_length()} dimensions, not {len(port.type.shape)}"
    return None


_TYPE_NAMES = {
    "bool": "boolean", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8", "uint16": "u16",
    "float16": "f16", "bfloat16": "bf16", "float32": "f32",
}  # fmt: skip


# --- what runs the program ---


class _Resident(Executable):
    """A compiled model and the requests that run it: one for each call at a time, kept for the next."""

    def __init__(self, compiled: Any, blob: Any, signature: Signature) -> None:
        import openvino

        self._compiled = compiled
        self._blob = blob  # the program reads weights from it but does not keep it
        self._tensor = openvino.Tensor
        self._bf16 = openvino.Type.bf16
        inputs, outputs = _places(compiled, signature)
        if len(outputs) != len(signature.outputs):
            raise IncompatibleProgram("The program has not the outputs it is to have.", backend="openvino")
        self._inputs = [(index, port.name, _dtype(port)) for index, port in inputs]
        self._empty = {port.name for port in signature.inputs if 0 in _shape(port)}
        self._outputs = [(index, port.name, _dtype(port)) for index, port in outputs]
        self._idle: deque[Any] = deque()  # append and pop are atomic

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        for index, name, dtype in self._inputs:
            request.set_input_tensor(index, self._share(name, inputs[name], dtype))
        request.infer(None)
        results = {name: _copy(request.get_output_tensor(index), dtype) for index, name, dtype in self._outputs}
        self._idle.append(request)  # a request that failed is not kept
        return results

    def _share(self, name: str, value: Value, dtype: str) -> Any:
        """Return a tensor over an array's memory; a read-only array cannot be shared and is copied."""
        if not value.size and name not in self._empty:
            raise ExecutionError(
                f"The input {name!r} of shape {list(value.shape)} is empty, which OpenVINO gets wrong or crashes on.",
                hint="Run the model on cpu/onnxruntime.",
                backend=OpenVinoEngine.name,
            )
        if dtype == "int64" and _exceeds_int32(value):
            raise ExecutionError(
                f"The input {name!r} holds integers that exceed 32 bits, in which OpenVINO computes int64.",
                hint="Run the model on cpu/onnxruntime.",
                backend=OpenVinoEngine.name,
            )
        if dtype == "bfloat16":
            return self._tensor(np.array(value).view(np.uint16), value.shape, self._bf16)
        return self._tensor(value, shared_memory=value.flags.writeable)

    def close(self) -> None:
        self._idle.clear()
        self._compiled = self._blob = None


def _places(compiled: Any, signature: Signature) -> tuple[list[tuple[int, Port]], list[tuple[int, Port]]]:
    """Return where a program has the ports of a signature; inputs on which nothing depends have no place."""
    parameters = {port.get_node().get_friendly_name(): index for index, port in enumerate(compiled.inputs)}
    results = {name: index for index, port in enumerate(compiled.outputs) for name in port.get_names()}
    return (
        [(parameters[port.name], port) for port in signature.inputs if port.name in parameters],
        [(results[port.name], port) for port in signature.outputs if port.name in results],
    )


def _dtype(port: Port) -> str:
    return port.type.dtype if isinstance(port.type, TensorType) else ""


def _shape(port: Port) -> tuple[Dim, ...]:
    return (port.type.shape or ()) if isinstance(port.type, TensorType) else ()


def _copy(tensor: Any, dtype: str) -> Value:
    """Return an output as an array of its own: the request writes into the same memory next time."""
    array = tensor.data.copy()
    return array.view(numpy_dtype(dtype)) if dtype == "bfloat16" else array


def _exceeds_int32(array: Any) -> bool:
    return bool(array.size) and bool(array.max() > 2**31 - 1 or array.min() < -(2**31))


def _short(error: BaseException) -> str:
    """Return an error on one line, without the places in OpenVINO's sources that it has passed."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))
    text = text or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
