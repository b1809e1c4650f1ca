"""What the stand-ins for TensorRT 10 and 11 have in common: names and parameters are the bindings', the work is onnxruntime's.

A plan is the ONNX model with its weights, behind a header that says what it was built for. Tensors are read and written
at the addresses that they are given, in the memory of the stand-in for ``cuda-bindings``, which knows what lies there.
Messages are those of the library where they are known: the log of TensorRT 10, the parser's assertions.

How it behaves is told by variables of the environment, since it is mostly used in child processes:

``TENSORRT_STAND_IN_REFUSES``  operators that the parser refuses before it begins, after those that it really refuses.
``TENSORRT_STAND_IN_STUMBLES``  operators at which it fails on the way: it stops at the first.
``TENSORRT_STAND_IN_NAMELESS``  errors do not say which node they are about.
``TENSORRT_STAND_IN_BUILD``  ``fail``, ``oom``, ``crash``, or ``slow`` (ten seconds, in steps).
``TENSORRT_STAND_IN_PARSE``  ``crash`` at any of the operators that it stumbles over.
``TENSORRT_STAND_IN_LOST_AFTER``  so many executions, after which the device is lost.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cuda.bindings.runtime import STATE

REFUSED = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BlackmanWindow",
        "Col2Im", "CenterCropPad", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det",
        "DynamicQuantizeLinear", "HammingWindow", "HannWindow", "ImageDecoder", "MatMulInteger", "MaxRoiPool",
        "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "QLinearConv", "QLinearMatMul",
        "RegexFullMatch", "STFT", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique",
    }
)  # fmt: skip
"""What TensorRT's table of operators says that the parser does not take."""

SIZED_BY_VALUES = frozenset({"NonZero", "NonMaxSuppression"})
_MAGIC = b"ptrt-stand-in"
_SHAPE_INPUTS = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Tile": (1,), "Slice": (1, 2, 3, 4)}


def _told(name: str) -> list[str]:
    return [item for item in os.environ.get(f"TENSORRT_STAND_IN_{name}", "").split(",") if item]


class Enum(enum.Enum):
    """An enumeration of pybind11's: it turns into an int, and is none."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class ErrorCode(Enum):
    SUCCESS = 0
    INTERNAL_ERROR = 1
    MEM_ALLOC_FAILED = 2
    MODEL_DESERIALIZE_FAILED = 3
    INVALID_VALUE = 4
    INVALID_GRAPH = 5
    INVALID_NODE = 6
    UNSUPPORTED_GRAPH = 7
    UNSUPPORTED_NODE = 8
    UNSUPPORTED_NODE_ATTR = 9
    UNSUPPORTED_NODE_INPUT = 10
    UNSUPPORTED_NODE_DATATYPE = 11
    UNSUPPORTED_NODE_DYNAMIC = 12
    UNSUPPORTED_NODE_SHAPE = 13
    REFIT_FAILED = 14


class MemoryPoolType(Enum):
    WORKSPACE = 0
    DLA_MANAGED_SRAM = 1
    DLA_LOCAL_DRAM = 2
    DLA_GLOBAL_DRAM = 3
    TACTIC_DRAM = 4
    TACTIC_SHARED_MEMORY = 5


class HardwareCompatibilityLevel(Enum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8
    INT4 = 9
    FP4 = 10
    E8M0 = 11


_TYPES = {
    1: DataType.FLOAT, 10: DataType.HALF, 16: DataType.BF16, 3: DataType.INT8, 2: DataType.UINT8, 6: DataType.INT32,
    7: DataType.INT64, 9: DataType.BOOL, 17: DataType.FP8, 22: DataType.INT4,
}  # fmt: skip


class Dims(tuple):  # type: ignore[type-arg]
    """Sizes; -1 for one that is open."""

    __slots__ = ()


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Any, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


def _made(thing: Any, kind: type) -> Any:
    if not isinstance(thing, kind) or not hasattr(thing, "_made"):
        raise TypeError(f"{type(thing).__name__} is no {kind.__name__}, or its __init__ was not called")
    return thing


class IOutputAllocator:
    def __init__(self) -> None:
        self._made = True


class IProgressMonitor:
    def __init__(self) -> None:
        self._made = True

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        return True

    def phase_finish(self, phase_name: str) -> None: ...


def _memory(data: bytes) -> Any:
    """Return bytes as the library hands them out: a buffer. Before Python 3.12 no class of Python can be one."""
    return memoryview(data)


class ParserError:
    __slots__ = ("_code", "_desc", "_file", "_func", "_name", "_node", "_operator")

    def code(self) -> ErrorCode:
        return self._code

    def desc(self) -> str:
        return self._desc

    def file(self) -> str:
        return self._file

    def func(self) -> str:
        return self._func

    def line(self) -> int:
        return 0

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


def _error(
    code: ErrorCode, desc: str, func: str, node: int = -1, proto: Any = None, file: str = "onnxOpCheckers.cpp"
) -> Any:
    error = ParserError()
    if os.environ.get("TENSORRT_STAND_IN_NAMELESS"):
        node, proto, file = -1, None, ""
    error._code, error._desc, error._func, error._node, error._file = code, desc, func, node, file
    error._name, error._operator = (proto.name, proto.op_type) if proto is not None else ("", "")
    return error


class ITensor:
    __slots__ = ("_dtype", "_is_shape", "_name", "_shape")

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def shape(self) -> Dims:
        return self._shape

    @property
    def is_shape_tensor(self) -> bool:
        return self._is_shape


class INetworkDefinition:
    __slots__ = ("_flags", "_inputs", "_logger", "_model", "_outputs")

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class IOptimizationProfile:
    __slots__ = ("_shapes", "_values")

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [tuple(map(int, sizes)) for sizes in (min, opt, max)]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._values[input] = [tuple(map(int, values)) for values in (min, opt, max)]


class ITimingCache:
    __slots__ = ("_device", "_timings")

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache._device != self._device and not ignore_mismatch:
            return False
        self._timings = {**input_cache._timings, **self._timings}
        return True

    def serialize(self) -> Any:
        return _memory(json.dumps([self._device, self._timings]).encode())


class IBuilderConfig:
    __slots__ = (
        "_cache", "_flags", "_logger", "_pools", "_profiles", "builder_optimization_level", "hardware_compatibility_level",
        "progress_monitor",
    )  # fmt: skip

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for sizes in profile._shapes.values():
            if len({len(part) for part in sizes}) != 1:
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool.name] = int(pool_size)

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        data = bytes(serialized_timing_cache)
        cache = ITimingCache()
        cache._device, cache._timings = f"{STATE.name} {STATE.capability}", {}
        if data:
            try:
                cache._device, cache._timings = json.loads(data)
            except ValueError:
                _log(self._logger, ILogger.Severity.ERROR, "Error Code 2: Internal Error (timing cache is corrupt)")
                return None
        return cache

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._device != f"{STATE.name} {STATE.capability}" and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


def _log(logger: Any, severity: ILogger.Severity, text: str) -> None:
    logger.log(severity, text)


class OnnxParser:
    __slots__ = ("_errors", "_logger", "_network", "_subgraphs")

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        if not isinstance(network, INetworkDefinition):
            raise TypeError("__init__(): incompatible constructor arguments")
        self._network, self._logger = network, _made(logger, ILogger)
        self._errors: list[ParserError] = []
        self._subgraphs: list[tuple[list[int], bool]] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    @property
    def num_subgraphs(self) -> int:
        return len(self._subgraphs)

    def clear_errors(self) -> None:
        self._errors.clear()

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def is_subgraph_supported(self, index: int) -> bool:
        return self._subgraphs[index][1]

    def get_subgraph_nodes(self, index: int) -> list[int]:
        return list(self._subgraphs[index][0])

    def parse(self, model: Any, path: str | None = None) -> bool:
        proto = self._read(model, path)
        if proto is None:
            return False
        for value in proto.graph.input:
            if value.type.tensor_type.elem_type not in _TYPES or not value.type.tensor_type.HasField("shape"):
                self._errors.append(
                    _error(
                        ErrorCode.INVALID_GRAPH, "Assertion failed: convertDtype(...)", "importInput", file=value.name
                    )
                )
                return False
        static = [error for index, node in enumerate(proto.graph.node) if (error := _static_error(proto, index, node))]
        for index, node in enumerate(proto.graph.node):
            if static and index >= max(static[0].node(), 0):
                break
            if node.op_type in _told("STUMBLES"):
                if _told("PARSE") == ["crash"]:
                    os.abort()
                self._errors = [_error(
                    ErrorCode.INVALID_NODE, f"Assertion failed: {node.op_type} cannot be imported", "parseNode", index, node, "ModelImporter.cpp",
                )]  # fmt: skip
                return False
        self._errors = static
        if static:
            return False
        _fill(self._network, proto)
        return True

    def supports_model_v2(self, model: Any, path: str | None = None) -> bool:
        ok = self.parse(model, path)
        proto = onnx.ModelProto.FromString(bytes(model))
        failed = self._errors[-1].node() if self._errors else None
        self._subgraphs, fresh = [], True
        for index, node in enumerate(proto.graph.node):
            if node.op_type in SIZED_BY_VALUES or index == failed:
                fresh, ok = True, False
                continue
            if fresh:
                self._subgraphs.append(([], False))
                fresh = False
            self._subgraphs[-1][0].append(index)
        if ok:
            self._subgraphs = [(nodes, True) for nodes, _ in self._subgraphs]
        return ok

    def _read(self, model: Any, path: str | None) -> Any:
        if isinstance(model, str) or not (path is None or isinstance(path, str)):
            raise TypeError("parse(): incompatible function arguments")
        try:
            proto = onnx.ModelProto.FromString(bytes(model))
            if path is not None:
                onnx.load_external_data_for_model(proto, str(Path(path).parent))
        except Exception as error:
            self._errors.append(
                _error(ErrorCode.MODEL_DESERIALIZE_FAILED, f"Failed to parse ONNX model: {error}", "parse")
            )
            return None
        for tensor in proto.graph.initializer:
            if onnx.external_data_helper.uses_external_data(tensor):
                self._errors.append(_error(
                    ErrorCode.INVALID_GRAPH, f"Failed to open file for weights: {tensor.name}", "parseExternalWeights", file=tensor.name,
                ))  # fmt: skip
                return None
        return proto


def _static_error(model: Any, index: int, node: Any) -> ParserError | None:
    if node.op_type in REFUSED | set(_told("REFUSES")) or node.domain not in ("", "ai.onnx"):
        text = "Plugin not found, are the plugin name, version, and namespace correct?"
        return _error(ErrorCode.UNSUPPORTED_NODE, text, "checkFallbackPluginImporter", index, node)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        held = {t.name: t.data_type for t in model.graph.initializer}
        if held.get(node.input[0]) == onnx.TensorProto.INT32:
            text = "Assertion failed: inputs.at(0) is of a type that can be dequantized"
            return _error(ErrorCode.UNSUPPORTED_NODE_DATATYPE, text, "QuantDequantLinearHelper", index, node)
        zero = next((t for t in model.graph.initializer if t.name == node.input[2]), None)
        if zero is not None and (zero.data_type == onnx.TensorProto.UINT8 or np.any(onnx.numpy_helper.to_array(zero))):
            text = "Assertion failed: shiftIsAllZeros(zeroPoint): TensorRT only supports symmetric quantization"
            return _error(ErrorCode.UNSUPPORTED_NODE_INPUT, text, "QuantDequantLinearHelper", index, node)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for place, inner in enumerate(attribute.g.node):
                if (error := _static_error(model, place, inner)) is not None:
                    return error
    return None


def _fill(network: INetworkDefinition, proto: Any) -> None:
    network._model = proto
    shapes = {
        node.input[place]
        for node in proto.graph.node
        for place in _SHAPE_INPUTS.get(node.op_type, ())
        if place < len(node.input)
    }
    held = {tensor.name for tensor in proto.graph.initializer}

    def tensor(value: Any) -> ITensor:
        made, type_ = ITensor(), value.type.tensor_type
        made._name, made._dtype = value.name, _TYPES[type_.elem_type]
        made._shape = Dims(d.dim_value if d.HasField("dim_value") else -1 for d in type_.shape.dim)
        made._is_shape = value.name in shapes
        return made

    network._inputs = [tensor(value) for value in proto.graph.input if value.name not in held]
    network._outputs = [tensor(value) for value in proto.graph.output]


class Builder:
    __slots__ = ("_logger",)

    def __init__(self, logger: ILogger) -> None:
        self._logger = _made(logger, ILogger)
        if STATE.lost or not STATE.devices:
            _log(
                logger,
                ILogger.Severity.ERROR,
                "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 100)",
            )
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        network = INetworkDefinition()
        network._flags, network._logger = int(flags), self._logger
        return network

    def create_optimization_profile(self) -> IOptimizationProfile:
        profile = IOptimizationProfile()
        profile._shapes, profile._values = {}, {}
        return profile

    def create_builder_config(self) -> IBuilderConfig:
        config = IBuilderConfig()
        config._flags, config._pools, config._profiles, config._cache = {"TF32"}, {}, [], None
        config._logger = self._logger
        config.builder_optimization_level = 3
        config.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        config.progress_monitor = None
        return config

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        error = ILogger.Severity.ERROR
        how = os.environ.get("TENSORRT_STAND_IN_BUILD", "")
        if how == "crash":
            os.abort()
        if how == "fail":
            _log(
                self._logger,
                error,
                "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[MatMul_0]}.)",
            )
            return None
        if how == "oom":
            _log(self._logger, error, "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)")
            _log(
                self._logger,
                ILogger.Severity.WARNING,
                "Requested amount of GPU memory (15485030400 bytes) could not be allocated. There may not be enough free memory for allocation to succeed.",
            )
            _log(
                self._logger,
                error,
                "IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (Requested size was 15485030400 bytes.)",
            )
            return None
        if not _progress(config.progress_monitor, 200 if how == "slow" else 2, 0.05 if how == "slow" else 0.0):
            _log(
                self._logger,
                error,
                "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (build was cancelled)",
            )
            return None
        profile = config._profiles[0] if config._profiles else None
        for tensor in network._inputs:
            needs = tensor.is_shape_tensor or -1 in tensor.shape
            told = profile is not None and tensor.name in (
                profile._values if tensor.is_shape_tensor else profile._shapes
            )
            if needs and not told:
                _log(
                    self._logger,
                    error,
                    "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile has been defined.)",
                )
                return None
        if config._cache is not None:
            for node in network._model.graph.node:
                config._cache._timings.setdefault(node.op_type, 1.0)
        header = {
            "version": self._version(),
            "device": STATE.name,
            "capability": STATE.capability,
            "level": config.hardware_compatibility_level.name,
            "flags": sorted(config._flags),
            "network_flags": network._flags,
            "pools": config._pools,
            "optimization_level": config.builder_optimization_level,
            "profile": None if profile is None else {**profile._shapes},
            "values": None if profile is None else {**profile._values},
            "hosts": [tensor.name for tensor in network._inputs if tensor.is_shape_tensor],
        }
        text = json.dumps(header).encode()
        return _memory(_MAGIC + len(text).to_bytes(8, "little") + text + network._model.SerializeToString())

    def _version(self) -> str:
        raise NotImplementedError


def _progress(monitor: Any, steps: int, pause: float) -> bool:
    if monitor is None:
        return True
    _made(monitor, IProgressMonitor)
    monitor.phase_start("Building engine", None, steps)
    monitor.phase_start("Timing graph nodes", "Building engine", steps)
    for step in range(steps):
        time.sleep(pause)
        if not (monitor.step_complete("Timing graph nodes", step) and monitor.step_complete("Building engine", step)):
            return False
    monitor.phase_finish("Timing graph nodes")
    monitor.phase_finish("Building engine")
    return True


def read_plan(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a plan and the model in it."""
    size = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 8], "little")
    start = len(_MAGIC) + 8
    return json.loads(data[start : start + size]), data[start + size :]


class Runtime:
    __slots__ = ("_logger", "engine_host_code_allowed")

    def __init__(self, logger: ILogger) -> None:
        self._logger = _made(logger, ILogger)
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        data, error = bytes(serialized_engine), ILogger.Severity.ERROR
        if not data.startswith(_MAGIC):
            _log(
                self._logger,
                error,
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed.)",
            )
            return None
        header, model = read_plan(data)
        if (
            "VERSION_COMPATIBLE" in header["flags"]
            and "EXCLUDE_LEAN_RUNTIME" not in header["flags"]
            and not self.engine_host_code_allowed
        ):
            _log(
                self._logger,
                error,
                "IRuntime::deserializeCudaEngine: Error Code 4: the plan holds host code, which is not allowed",
            )
            return None
        if header["version"] != self._version() and "VERSION_COMPATIBLE" not in header["flags"]:
            _log(
                self._logger,
                error,
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match.)",
            )
            return None
        address = STATE.allocate(len(model), "device")
        if address is None:
            _log(self._logger, error, "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)")
            _log(
                self._logger,
                ILogger.Severity.WARNING,
                f"Requested amount of GPU memory ({len(model)} bytes) could not be allocated. There may not be enough free memory for allocation to succeed.",
            )
            return None
        engine = ICudaEngine()
        engine._logger, engine._header, engine._proto = self._logger, header, onnx.ModelProto.FromString(model)
        engine._compute = _computer(engine._proto)
        engine._shapes, engine._address = {}, address
        network = INetworkDefinition()
        _fill(network, engine._proto)
        engine._inputs = {tensor.name: tensor for tensor in network._inputs}
        engine._outputs = {tensor.name: tensor for tensor in network._outputs}
        return engine

    def _version(self) -> str:
        raise NotImplementedError


def _computer(proto: Any) -> Any:
    """Return a function from inputs by name to outputs in order: onnxruntime, or ONNX's evaluator where it has no kernel."""
    import onnxruntime

    values = (*proto.graph.input, *proto.graph.output)
    try:
        if any(value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for value in values):
            raise NotImplementedError("numpy has no such type for onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda feeds: session.run(None, feeds)
    except Exception:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(proto)
        return lambda feeds: evaluator.run(None, feeds)


class ICudaEngine:
    __slots__ = ("_address", "_compute", "_header", "_inputs", "_logger", "_outputs", "_proto", "_shapes")

    def __del__(self) -> None:
        STATE.release(getattr(self, "_address", 0), "device")

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensor(name).dtype

    def get_tensor_shape(self, name: str) -> Dims:
        return self._tensor(name).shape

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._header["hosts"] else TensorLocation.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self._header["hosts"]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(sizes) for sizes in self._header["profile"][name]]

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        context = IExecutionContext()
        context._engine, context._addresses, context._allocators, context._sizes = self, {}, {}, {}
        return context

    def _tensor(self, name: str) -> ITensor:
        return self._inputs.get(name) or self._outputs[name]

    def _inferred(self, sizes: dict[str, tuple[int, ...]], values: dict[str, Any]) -> dict[str, Dims]:
        key = json.dumps([sorted(sizes.items()), sorted((name, value.tolist()) for name, value in values.items())])
        if key not in self._shapes:
            proto = onnx.ModelProto()
            proto.CopyFrom(self._proto)
            for value in proto.graph.input:
                for dim, size in zip(value.type.tensor_type.shape.dim, sizes.get(value.name, ()), strict=False):
                    dim.dim_value = size
            for name, value in values.items():
                proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
            for value in proto.graph.output:
                value.type.tensor_type.ClearField("shape")
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
            self._shapes[key] = {
                value.name: Dims(
                    d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim
                )
                for value in inferred.graph.output
            }
        return self._shapes[key]


_BYTES = {
    DataType.FLOAT: "float32", DataType.HALF: "float16", DataType.BF16: "bfloat16", DataType.INT8: "int8",
    DataType.UINT8: "uint8", DataType.INT32: "int32", DataType.INT64: "int64", DataType.BOOL: "bool",
}  # fmt: skip
_executions = 0


def _dtype(kind: DataType) -> np.dtype[Any]:
    if kind is DataType.BF16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_BYTES[kind])


class IExecutionContext:
    __slots__ = ("_addresses", "_allocators", "_engine", "_sizes")

    def set_input_shape(self, name: str, shape: tuple[int, ...] | list[int] | Dims) -> bool:
        if not isinstance(shape, tuple | list):
            raise TypeError("set_input_shape(): incompatible function arguments")
        least, _, greatest = self._engine._header["profile"][name]
        if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, greatest, strict=True)):
            _log(
                self._engine._logger,
                ILogger.Severity.ERROR,
                f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (Parameter check failed, condition: engineDims.d[i] == dims.d[i]. Static dimension mismatch while setting input shape for {name}.)",
            )
            return False
        self._sizes[name] = tuple(map(int, shape))
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        engine = self._engine
        if name in engine._inputs:
            return Dims(self._sizes.get(name, engine._inputs[name].shape))
        values = {n: self._read(n) for n in engine._header["hosts"] if n in self._addresses}
        return engine._inferred({n: self.get_tensor_shape(n) for n in engine._inputs}, values)[name]

    def infer_shapes(self) -> list[str]:
        inputs = self._engine._inputs
        return [name for name in inputs if -1 in self.get_tensor_shape(name)]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not isinstance(memory, int):
            raise TypeError("set_tensor_address(): incompatible function arguments")
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator | None) -> bool:
        self._allocators[name] = None if output_allocator is None else _made(output_allocator, IOutputAllocator)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        global _executions
        error, logger = ILogger.Severity.ERROR, self._engine._logger
        if int(stream_handle) not in STATE.streams:
            _log(logger, error, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (invalid resource handle)")
            return False
        _executions += 1
        if STATE.lost or ((limit := _told("LOST_AFTER")) and _executions > int(limit[0])):
            STATE.lost = True
            _log(
                logger,
                error,
                "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access was encountered)",
            )
            return False
        for name in self._engine._inputs:
            wanted = "pinned" if name in self._engine._header["hosts"] else "device"
            address, size = self._addresses.get(name, 0), self._size(name)
            if not address or address % 256 or (size and STATE.kind_at(address, size) != wanted):
                _log(
                    logger,
                    error,
                    f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error (Parameter check failed, condition: mContext.profileObliviousBindings. Address is not set for input tensor {name}.)",
                )
                return False
        results = self._engine._compute({name: self._read(name) for name in self._engine._inputs})
        for (name, tensor), value in zip(self._engine._outputs.items(), results, strict=True):
            array = np.ascontiguousarray(value, _dtype(tensor.dtype)).reshape(np.shape(value))
            if not self._write(name, array, stream_handle):
                return False
        return True

    def _write(self, name: str, array: Any, stream: int) -> bool:
        address, allocator = self._addresses.get(name, 0), self._allocators.get(name)
        if allocator is not None:
            new = getattr(allocator, "reallocate_output_async", None)
            if new is not None and self._asynchronous():
                address = new(name, address, max(array.nbytes, 1), 256, stream)
            else:
                address = allocator.reallocate_output(name, address, max(array.nbytes, 1), 256)
            if address:
                allocator.notify_shape(name, Dims(array.shape))
        if not address or address % 256 or (array.nbytes and STATE.kind_at(address, array.nbytes) != "device"):
            _log(
                self._engine._logger,
                ILogger.Severity.ERROR,
                f"IExecutionContext::enqueueV3: Error Code 2: Internal Error (no room for output {name})",
            )
            return False
        if array.nbytes:
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return True

    def _asynchronous(self) -> bool:
        return True

    def _size(self, name: str) -> int:
        return math.prod(self.get_tensor_shape(name)) * _dtype(self._engine._tensor(name).dtype).itemsize

    def _read(self, name: str) -> Any:
        shape, dtype = self.get_tensor_shape(name), _dtype(self._engine._tensor(name).dtype)
        size = math.prod(shape) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self._addresses[name], size), dtype).reshape(shape)
