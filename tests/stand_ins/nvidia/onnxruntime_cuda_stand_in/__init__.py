"""A stand-in for onnxruntime-gpu 1.31.1: real sessions on the CPU that are placed and named as on CUDA.

It has a name of its own, since the real package is beside it. What it refuses, drops and raises is what the wheel was
seen to: unknown options of a provider, providers without libraries dropped in silence, a retry on the CPU unless
``enable_fallback=0``, and the texts of CUDA's errors. Device memory is the host's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as _real
from onnxruntime import ExecutionMode as ExecutionMode
from onnxruntime import GraphOptimizationLevel as GraphOptimizationLevel
from onnxruntime import RunOptions as RunOptions
from onnxruntime import SessionOptions as SessionOptions
from onnxruntime import disable_telemetry_events as disable_telemetry_events

from . import capi as capi
from .capi.build_and_package_info import __version__ as __version__
from .capi.build_and_package_info import cuda_version as cuda_version
from .capi.onnxruntime_pybind11_state import CUDA, cuda_kernels

TENSORRT, CPU = "TensorrtExecutionProvider", "CPUExecutionProvider"
OPTIONS = {
    CUDA: {
        "device_id", "has_user_compute_stream", "user_compute_stream", "gpu_mem_limit", "arena_extend_strategy",
        "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d", "do_copy_in_default_stream",
        "enable_cuda_graph", "enable_cudnn", "enable_skip_layer_norm_strict_mode", "fuse_conv_bias", "prefer_nhwc",
        "sdpa_kernel", "tunable_op_enable", "tunable_op_max_tuning_duration_ms", "tunable_op_tuning_enable",
        "use_ep_level_unified_stream", "use_tf32",
    },
    TENSORRT: {"device_id", "trt_max_workspace_size", "trt_fp16_enable", "trt_engine_cache_enable"},
}  # fmt: skip
"""The names that the provider's library holds."""

CALLS: list[tuple[str, Any]] = []
"""What was asked, for tests to look at."""


class Fail(Exception):
    """onnxruntime's own errors derive from Exception alone."""


def get_available_providers() -> list[str]:
    return [TENSORRT, CUDA, CPU]


def get_build_info() -> str:
    return "ORT Build Info: stand-in"


def set_default_logger_severity(severity: int) -> None:
    global _severity
    _severity = severity


_severity = 2


def preload_dlls(cuda: bool = True, cudnn: bool = True, msvc: bool = True, directory: str | None = None) -> None:
    print("Failed to load libsomething.so: a line that nobody wants to see")


def _devices() -> int:
    return int(os.environ.get("STAND_IN_CUDA_DEVICES", "1"))


class OrtValue:
    """A value in the host's memory that says where it is."""

    def __init__(self, ortvalue: Any, device: tuple[str, int] = ("cpu", 0)) -> None:
        self.real, self.device = ortvalue, device

    @classmethod
    def ortvalue_from_numpy(
        cls, numpy_obj: np.ndarray, /, device_type: str = "cpu", device_id: int = 0, vendor_id: int = -1
    ) -> OrtValue:
        if device_type != "cpu":
            numpy_obj = numpy_obj.copy()
        return cls(_real.OrtValue.ortvalue_from_numpy(numpy_obj), (device_type, device_id))

    @classmethod
    def ortvalue_from_numpy_with_onnx_type(cls, data: np.ndarray, /, onnx_element_type: int) -> OrtValue:
        return cls(_real.OrtValue.ortvalue_from_numpy_with_onnx_type(data, onnx_element_type))

    @classmethod
    def ortvalue_from_shape_and_type(
        cls,
        shape: list[int],
        element_type: Any,
        device_type: str = "cpu",
        device_id: int = 0,
        vendor_id: int = -1,
        memory_info: Any = None,
    ) -> OrtValue:
        made = _real.OrtValue.ortvalue_from_shape_and_type(shape, element_type, "cpu", 0)
        return cls(made, (device_type, device_id))

    @classmethod
    def from_dlpack(cls, data: Any, /) -> OrtValue:
        capsule = data.__dlpack__()
        kind, index = _device_in(capsule)
        _device_in(capsule, (1, 0))
        held = SimpleNamespace(dtype=getattr(data, "dtype", None), __dlpack__=None)
        is_bool = getattr(held.dtype, "name", str(held.dtype)) in ("bool", "bool_", "torch.bool")
        made = _real.OrtValue(_real.capi.onnxruntime_pybind11_state.OrtValue.from_dlpack(capsule, is_bool))
        return cls(made, ("cuda", index) if kind == 2 else ("cpu", 0))

    def __dlpack__(self, *, stream: Any = None) -> Any:
        capsule = self.real.__dlpack__()
        _device_in(capsule, self.__dlpack_device__())
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device[1]) if self.device[0] == "cuda" else (1, 0)

    def numpy(self) -> np.ndarray:
        found = self.real.numpy()
        return found.copy() if self.device[0] == "cuda" else found

    def update_inplace(self, data: Any) -> None:
        source = data.real.numpy() if isinstance(data, OrtValue) else data
        np.copyto(self.real.numpy(), source, casting="no")

    def has_value(self) -> bool:
        return self.real.has_value()

    def shape(self) -> list[int]:
        return self.real.shape()

    def data_ptr(self) -> int:
        return self.real.data_ptr()

    def data_type(self) -> str:
        return self.real.data_type()

    def element_type(self) -> int:
        return self.real.element_type()

    def tensor_size_in_bytes(self) -> int:
        return self.real.tensor_size_in_bytes()

    def device_name(self) -> str:
        return self.device[0]


class IOBinding:
    """A real binding, with a record of what is bound where."""

    def __init__(self, session: InferenceSession) -> None:
        self.session = session
        self.real = session.real.io_binding()
        self.addresses: dict[str, int | None] = {}
        self.outputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, ortvalue: OrtValue) -> None:
        self.addresses[name] = ortvalue.data_ptr() if ortvalue.device[0] == "cuda" else None
        self.real.bind_ortvalue_input(name, ortvalue.real)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: Any = None,
    ) -> None:
        self.addresses[name] = None
        self.outputs[name] = (device_type, device_id)
        self.real.bind_output(name)

    def bind_ortvalue_output(self, name: str, ortvalue: OrtValue) -> None:
        self.addresses[name] = ortvalue.data_ptr()
        self.outputs[name] = ortvalue.device
        self.real.bind_ortvalue_output(name, ortvalue.real)

    def get_outputs(self) -> list[OrtValue]:
        return [OrtValue(v, d) for v, d in zip(self.real.get_outputs(), self.outputs.values(), strict=True)]


class InferenceSession:
    def __init__(
        self,
        path_or_bytes: str | bytes | os.PathLike[str],
        sess_options: Any = None,
        providers: Any = None,
        provider_options: Any = None,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - {"enable_fallback", "read_config_from_model", "disabled_optimizers"}:
            raise TypeError(f"unexpected arguments: {sorted(unknown)}")
        chosen = {}
        for entry in providers or get_available_providers():
            name, options = (entry, {}) if isinstance(entry, str) else entry
            if name not in get_available_providers():
                warnings.warn(f"Specified provider '{name}' is not in available provider names.", stacklevel=2)
            else:
                chosen[name] = options
        CALLS.append(("session", chosen))
        if CUDA in chosen and _severity < 3:
            print(f"[W:onnxruntime:Default] No registered plugin EP device found for '{CUDA}'", file=sys.stderr)
        try:
            self._make(path_or_bytes, sess_options or SessionOptions(), chosen)
        except (ValueError, RuntimeError):
            if int(kwargs.get("enable_fallback", 1)) != 1:
                raise
            print("*************** EP Error ***************")
            self._make(path_or_bytes, sess_options or SessionOptions(), {CPU: {}})

    def _make(self, model: Any, options: Any, chosen: dict[str, dict[str, str]]) -> None:
        for name, given in chosen.items():
            if unknown := set(given) - OPTIONS.get(name, set(given)):
                raise RuntimeError(
                    f'provider_options_utils.h:182 Parse Unknown provider option: "{sorted(unknown)[0]}".'
                )
        self.graph = chosen.get(CUDA, {}).get("enable_cuda_graph") == "1"
        self.captured: dict[str, int | None] | None = None
        self.device_id = int(chosen.get(CUDA, {}).get("device_id", 0))
        if CUDA in chosen and self.device_id >= _devices():
            raise RuntimeError(f"CUDA failure 101: invalid device ordinal ; GPU={self.device_id} ; hostname=stand-in")
        present = {TENSORRT: "STAND_IN_TENSORRT" in os.environ, CUDA: "STAND_IN_DROPS_CUDA" not in os.environ}
        self._providers = [name for name in chosen if present.get(name, True)]
        if CPU not in self._providers:
            self._providers.append(CPU)
        path = None if isinstance(model, bytes) else Path(model)
        proto = onnx.load_from_string(model) if path is None else onnx.load(path, load_external_data=False)
        _check_room(proto, path)
        plain = SessionOptions()
        plain.log_severity_level = 4
        plain.intra_op_num_threads = options.intra_op_num_threads
        plain.graph_optimization_level = min(
            options.graph_optimization_level, GraphOptimizationLevel.ORT_ENABLE_BASIC, key=lambda level: level.value
        )
        plain.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.real = _real.InferenceSession(
            model if path is None else str(path), plain, providers=[CPU], enable_fallback=0
        )
        parts = self.real.get_provider_graph_assignment_info()
        listed = [node for part in parts for node in part.get_nodes()]
        self.placed = _place(proto, listed) if CUDA in self._providers else [(CPU, node) for node in listed]
        if TENSORRT in self._providers:
            self.placed = [(TENSORRT if n.op_type in ("Conv", "Gemm", "MatMul") else p, n) for p, n in self.placed]
        if _entry(options, "session.disable_cpu_ep_fallback") == "1" and any(p == CPU for p, _ in self.placed):
            raise Fail(
                "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU "
                "EP, but fallback to CPU EP has been explicitly disabled by the user."
            )
        self._records = _entry(options, "session.record_ep_graph_assignment_info") == "1"

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[Any]:
        if not self._records:
            raise Fail("[ONNXRuntimeError] : 1 : FAIL : session.record_ep_graph_assignment_info is not enabled")
        return [SimpleNamespace(ep_name=name, get_nodes=lambda node=node: [node]) for name, node in self.placed]

    def io_binding(self) -> IOBinding:
        return IOBinding(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: Any = None) -> None:
        if fault := os.environ.get("STAND_IN_RUN_FAILS"):
            raise Fail(f"[ONNXRuntimeError] : 1 : FAIL : {fault}")
        if self.graph:
            if None in iobinding.addresses.values():
                raise Fail(
                    "[ONNXRuntimeError] : 1 : FAIL : a CUDA graph was asked for, and a value is not on the device"
                )
            if self.captured not in (None, iobinding.addresses):
                raise AssertionError("the graph that was captured reads and writes other addresses")
            self.captured = dict(iobinding.addresses)
        CALLS.append(("run", dict(iobinding.outputs)))
        self.real.run_with_iobinding(iobinding.real)


def _entry(options: Any, key: str) -> str:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:
        return ""


def _check_room(proto: onnx.ModelProto, path: Path | None) -> None:
    room = os.environ.get("STAND_IN_ROOM")
    if room is None or path is None:
        return
    beside = path.with_name("weights.bin")
    size = path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    if size > int(room):
        raise RuntimeError(
            "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::"
            f"AllocateRawInternal() Failed to allocate memory for requested buffer of size {size}"
        )


def _place(proto: onnx.ModelProto, listed: list[Any]) -> list[tuple[str, Any]]:
    """Give to CUDA what its kernels take, and to the CPU what onnxruntime keeps there on purpose."""
    imports = {("" if entry.domain == "ai.onnx" else entry.domain): entry.version for entry in proto.opset_import}
    types = _types(proto)
    by_name = {node.name: node for node in proto.graph.node}
    taken = {node.name for node in proto.graph.node if _has_kernel(node, imports, types)}
    kept = _preferred_on_cpu(proto, taken)
    placed = []
    for node in listed:
        known = by_name.get(node.name) if node.name else None
        if known is None:
            fits = any(kernel.op_name == node.op_type and kernel.domain == node.domain for kernel in cuda_kernels())
        else:
            fits = node.name in taken and node.name not in kept
        placed.append((CUDA if fits else CPU, node))
    return placed


def _types(proto: onnx.ModelProto) -> dict[str, str]:
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        proto = onnx.shape_inference.infer_shapes(proto)
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    found = {tensor.name: names[tensor.data_type] for tensor in proto.graph.initializer}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        found[value.name] = names[value.type.tensor_type.elem_type]
    return found


def _has_kernel(node: onnx.NodeProto, imports: dict[str, int], types: dict[str, str]) -> bool:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, imports.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return False
    bound: dict[str, str] = {}
    for parameters, names in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for index, name in enumerate(names):
            if parameters and types.get(name, "undefined") != "undefined":
                parameter = parameters[min(index, len(parameters) - 1)]
                bound[parameter.name] = bound[parameter.type_str] = f"tensor({types[name]})"
    return any(
        kernel.domain == domain
        and kernel.op_name == node.op_type
        and kernel.version_range[0] <= schema.since_version <= kernel.version_range[1]
        and all(bound[key] in allowed for key, allowed in kernel.type_constraints.items() if key in bound and allowed)
        for kernel in cuda_kernels()
    )


def _preferred_on_cpu(proto: onnx.ModelProto, taken: set[str]) -> set[str]:
    """Return what only reads sizes, small constants and inputs of the model: what onnxruntime moves to the CPU."""
    small = {tensor.name for tensor in proto.graph.initializer if int(np.prod(tensor.dims)) <= 100}
    free = small | {value.name for value in proto.graph.input}
    on_cpu: set[str] = set()
    kept: set[str] = set()
    for node in proto.graph.node:
        reads = [name for name in node.input if name]
        only_cpu = any(name in on_cpu for name in reads) and all(name in on_cpu or name in free for name in reads)
        if node.op_type in ("Shape", "Size") or node.name not in taken:
            on_cpu.update(node.output)
        elif only_cpu and not any(name in on_cpu for name in _taken_on_cpu(node)):
            kept.add(node.name)
            on_cpu.update(node.output)
    return kept


def _taken_on_cpu(node: onnx.NodeProto) -> list[str]:
    """Return the inputs that CUDA's kernel of an operator wants in the host's memory."""
    places = {"Reshape": [1], "Expand": [1], "Slice": [1, 2, 3, 4], "Tile": [1], "Range": [0, 1, 2], "Pad": [1, 2],
              "ConstantOfShape": [0], "Unsqueeze": [1], "Squeeze": [1], "Resize": [1, 2, 3], "TopK": [1]}  # fmt: skip
    return [node.input[place] for place in places.get(node.op_type, []) if place < len(node.input)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _device_in(capsule: Any, device: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the device that a DLPack capsule names; with one given, write it there."""
    held = (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + 8)
    if device is not None:
        held[0], held[1] = device
    return held[0], held[1]
