"""The engine `cpu/onnxruntime`: what runs everything it can, and is the oracle for all other engines."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelrt.backend import (
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
from accelrt.errors import CompileError, IncompatibleProgram, OptionError, OutOfDeviceMemory
from accelrt.graph.node import INLINE_BYTES, WEIGHTS_FILE, Node
from accelrt.graph.types import (
    OptionalType,
    SequenceType,
    Signature,
    TensorType,
    Value,
    ValueType,
    numpy_dtype,
)
from accelrt_cpu.isa import instruction_set

if TYPE_CHECKING:
    from accelrt_cpu.onnxruntime_support import Knowledge

_PROVIDERS = ["CPUExecutionProvider"]
_MODEL = "model.onnx"
_ERRORS_ONLY = 3


@dataclass(frozen=True, slots=True)
class OnnxRuntimeOptions:
    """Options of the engine.

    Attributes:
        threads: Threads that share one operator; 0 takes all cores.
        inter_threads: Threads that run independent operators side by side; 1 runs them in sequence.
        spinning: Workers wait for the next operator by spinning: faster, at the price of idle cores.
    """

    threads: int = 0
    inter_threads: int = 1
    spinning: bool = True

    def __post_init__(self) -> None:
        if self.threads < 0 or self.inter_threads < 1:
            raise OptionError(f"threads must be 0 or more and inter_threads 1 or more, not {self}.")


class OnnxRuntimeEngine(Engine):
    """onnxruntime's CPU provider."""

    name: ClassVar[str] = "onnxruntime"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2)
    options: ClassVar[type] = OnnxRuntimeOptions
    requires: ClassVar[str] = "pip install onnxruntime"

    def status(self) -> Status:
        try:
            return Status(True, version=str(self._ort.__version__))
        except Exception as error:  # noqa: BLE001 - a broken wheel may raise anything; it is a status, not a crash
            return Status(False, reason=f"onnxruntime cannot be imported: {error}", remedy=self.requires)

    def fingerprint(self) -> Mapping[str, str]:
        return {"onnxruntime": str(self._ort.__version__), "cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        if precision != "fp32":
            return Verdict.refuse(f"precision {precision} is not offered by this engine")
        return self._knowledge.verdict(node)

    def compile(self, job: CompileJob, out: Path) -> Program:
        import onnx

        proto = onnx.load(job.model, load_external_data=False)
        if problem := self._knowledge.lower(proto):
            raise CompileError(f"onnxruntime cannot take the segment: {problem}.", backend=self.name)
        if problem := _unreachable(job.signature):
            raise CompileError(
                f"onnxruntime's Python binding cannot hand over all values: {problem}.", backend=self.name
            )
        _widen_borders(proto, job.signature)
        options = self._session_options(job.options)
        options.optimized_model_filepath = str(out / _MODEL)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS_FILE)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE_BYTES)
        )
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(job.model.parent))
        try:
            self._ort.InferenceSession(proto.SerializeToString(), options, providers=_PROVIDERS)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen classes that share no base
            raise CompileError(f"onnxruntime: {_first_line(error)}", backend=self.name) from error
        return Program({_MODEL: out / _MODEL}, self.fingerprint(), job.signature, job.options)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        options = self._session_options(program.options)
        # The program holds the optimised graph; optimising again would cost ten times the load.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = self._ort.InferenceSession(str(program.files[_MODEL]), options, providers=_PROVIDERS)
        except MemoryError as error:
            raise OutOfDeviceMemory(f"onnxruntime: {error}", backend=self.name) from error
        except Exception as error:  # noqa: BLE001
            raise IncompatibleProgram(f"onnxruntime: {_first_line(error)}", backend=self.name) from error
        return executable(self._ort, session, program.signature)

    @cached_property
    def _ort(self) -> Any:
        return importlib.import_module("onnxruntime")

    @cached_property
    def _knowledge(self) -> Knowledge:
        from accelrt_cpu.onnxruntime_support import Knowledge

        return Knowledge(self._ort)

    def _session_options(self, chosen: OnnxRuntimeOptions) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = chosen.threads
        if chosen.inter_threads > 1:
            options.execution_mode = self._ort.ExecutionMode.ORT_PARALLEL
            options.inter_op_num_threads = chosen.inter_threads
        if not chosen.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


def executable(ort: Any, session: Any, signature: Signature) -> Executable:
    """Wrap a session: the short way where numpy can hold every value, through OrtValues where it cannot."""
    if all(_is_plain(port.type) for port in (*signature.inputs, *signature.outputs)):
        return _Plain(session, signature)
    return _Extended(ort, session, signature)


def _is_plain(type_: ValueType) -> bool:
    """Whether onnxruntime's binding converts the type from and to numpy by itself."""
    match type_:
        case TensorType(dtype):
            return dtype not in _SAME_BITS and dtype not in _WIDER
        case SequenceType(element):
            return _is_plain(element)
        case OptionalType():
            return False


def _needs_bits(type_: ValueType) -> bool:
    return _base(type_).dtype in (*_SAME_BITS, *_WIDER)


def _base(type_: ValueType) -> TensorType:
    while not isinstance(type_, TensorType):
        type_ = type_.element
    return type_


def _is_sequence(type_: ValueType) -> bool:
    return isinstance(type_, SequenceType) or (isinstance(type_, OptionalType) and _is_sequence(type_.element))


def _unreachable(signature: Signature) -> str | None:
    """Return which values onnxruntime's Python binding has no way to hand over, None if it has for all."""
    for port in (*signature.inputs, *signature.outputs):
        if _is_sequence(port.type) and _needs_bits(port.type):
            return f"{port.name!r} is a {port.type}"
    if any(_needs_bits(port.type) for port in signature.outputs):
        for port in signature.inputs:
            if _is_sequence(port.type):
                return f"the input {port.name!r} is a {port.type} while an output is of a type that numpy lacks"
    return None


# How types that numpy lacks travel: with the same bits, in an unsigned integer of the same width.
_SAME_BITS = {
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e4m3fnuz": np.uint8,
    "float8_e5m2": np.uint8,
    "float8_e5m2fnuz": np.uint8,
    "float8_e8m0fnu": np.uint8,
}
# How types of less than a byte travel: cast, without loss, at the borders of the program.
_WIDER = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}


def _widen_borders(proto: Any, signature: Signature) -> None:
    """Let values of less than a byte enter and leave as bytes: the binding cannot hand them over."""
    from onnx import helper

    from accelrt.graph.convert import elem_type

    for ports, values, entering in (
        (signature.inputs, proto.graph.input, True),
        (signature.outputs, proto.graph.output, False),
    ):
        for port, value in zip(ports, values, strict=True):
            if not isinstance(port.type, TensorType) or port.type.dtype not in _WIDER:
                continue
            inner = f"{port.name}__narrow"
            for node in proto.graph.node:
                names = node.input if entering else node.output
                names[:] = [inner if name == port.name else name for name in names]
                if not entering:  # what is an output may be read inside as well
                    node.input[:] = [inner if name == port.name else name for name in node.input]
            wide = elem_type(np.dtype(_WIDER[port.type.dtype]).name)
            value.type.tensor_type.elem_type = wide
            if entering:
                cast = helper.make_node("Cast", [port.name], [inner], to=elem_type(port.type.dtype))
                proto.graph.node.insert(0, cast)
            else:
                proto.graph.node.append(helper.make_node("Cast", [inner], [port.name], to=wide))


class _Plain(Executable):
    def __init__(self, session: Any, signature: Signature) -> None:
        self._session = session
        self._outputs = list(signature.output_names)
        # The binding below InferenceSession.run: the same call without checks that the session has already made.
        inner = getattr(session, "_sess", None)
        self._run = inner.run if inner is not None else session.run

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        return dict(zip(self._outputs, self._run(self._outputs, inputs, None), strict=True))

    def close(self) -> None:
        self._run = _closed
        self._session = None


class _Extended(Executable):
    def __init__(self, ort: Any, session: Any, signature: Signature) -> None:
        from accelrt.graph.convert import elem_type

        self._ort, self._session, self._signature = ort, session, signature
        self._elem_types = {name: elem_type(name) for name in _SAME_BITS}
        # Outputs that numpy lacks are had as OrtValues only; sequences can then not be inputs (see `_unreachable`).
        self._by_value = any(_needs_bits(port.type) for port in signature.outputs)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        feeds = {port.name: self._to_ort(inputs[port.name], port.type) for port in self._signature.inputs}
        feeds = {name: value for name, value in feeds.items() if value is not None}
        names = list(self._signature.output_names)
        if self._by_value:
            values = self._session.run_with_ort_values(names, feeds)
            values = [_from_ort(value, port.type) for value, port in zip(values, self._signature.outputs, strict=True)]
        else:
            values = self._session.run(names, feeds)
        return dict(zip(names, values, strict=True))

    def _to_ort(self, value: Value, type_: ValueType) -> Any:
        make = self._ort.OrtValue
        match type_:
            case TensorType(dtype) if dtype in _SAME_BITS:
                bits = np.ascontiguousarray(value).reshape(np.shape(value)).view(_SAME_BITS[dtype])
                return make.ortvalue_from_numpy_with_onnx_type(bits, self._elem_types[dtype])
            case TensorType(dtype):
                return make.ortvalue_from_numpy(np.asarray(value, _WIDER.get(dtype)))
            case OptionalType(element):
                return None if value is None else self._to_ort(value, element)
            case SequenceType():
                return value

    def close(self) -> None:
        self._session = None


def _from_ort(value: Any, type_: ValueType) -> Value:
    if not value.has_value():
        return None
    match type_:
        case TensorType(dtype) if dtype in _SAME_BITS:
            return value.numpy().view(numpy_dtype(dtype))
        case TensorType(dtype) if dtype in _WIDER:
            return value.numpy().astype(numpy_dtype(dtype))
    return value.numpy()


def _closed(*_: object) -> Any:
    raise RuntimeError("the executable was closed")


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(StopIteration):
        return next(line.strip() for line in str(error).splitlines() if line.strip())
    return type(error).__name__
