"""TensorRT's Python bindings as this engine uses them, of 10.1 and later and of 11: told apart by what they have.

TensorRT 11 removed weak typing, calibrators and the first generation of several calls, and bindings of one major
version differ among themselves, so no version number is compared anywhere: what is there is used.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from functools import cache
from typing import Any

MODULES = ("tensorrt", "tensorrt_bindings")
"""What is imported: the package of all bindings, or where only those of one CUDA version lie, these."""

NEEDED = {
    "OnnxParser": ("supports_model_v2", "num_subgraphs", "is_subgraph_supported", "get_subgraph_nodes", "parse"),
    "ParserError": ("code", "desc", "node", "node_name", "node_operator", "func"),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "set_output_allocator", "execute_async_v3"),
    "ICudaEngine": ("is_shape_inference_io", "get_tensor_location"),
}
"""What a binding must have to be used: that of TensorRT 10.1, the first whose parser answers for single nodes."""

REPORTED = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "IBuilderConfig": (
        "set_flag", "clear_flag", "set_memory_pool_limit", "add_optimization_profile", "create_timing_cache",
        "set_timing_cache",
    ),
    "IOptimizationProfile": ("set_shape", "set_shape_input"),
    "ITimingCache": ("combine", "serialize"),
    "OnnxParser": ("__init__", "supports_model_v2", "get_subgraph_nodes", "get_error", "parse"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape",
        "get_tensor_location", "get_tensor_profile_shape",
    ),
    "IExecutionContext": (
        "set_input_shape", "set_tensor_address", "set_output_allocator", "get_tensor_shape", "execute_async_v3",
    ),
}  # fmt: skip
"""All functions that the engine calls, for a report from a machine where one of them is not as it was expected."""

logger = logging.getLogger("accelrt")

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8_e4m3fn", "INT4": "int4", "FP4": "float4_e2m1fn",
    "E8M0": "float8_e8m0fnu",
}  # fmt: skip


@cache
def bindings() -> Any:
    """Return the module.

    Raises:
        ImportError: It is not installed, or its libraries are not.
    """
    missing: ImportError | None = None
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in MODULES:
                raise
            missing = error
    raise missing or ImportError("tensorrt")


def lacking(trt: Any) -> list[str]:
    """Return what a binding lacks to be used here, as ``OnnxParser.supports_model_v2``."""
    return [
        f"{owner}.{name}"
        for owner, names in NEEDED.items()
        for name in names
        if not hasattr(getattr(trt, owner, None), name)
    ]


def signatures(trt: Any) -> dict[str, list[str]]:
    """Return how a binding declares the functions of `REPORTED`, as pybind11 writes it into their documentation."""
    found = {}
    for owner, names in REPORTED.items():
        for name in names:
            text = getattr(getattr(getattr(trt, owner, None), name, None), "__doc__", None) or ""
            found[f"{owner}.{name}"] = [line.strip() for line in text.splitlines() if f"{name}(self" in line]
    return found


def dtype_of(kind: Any) -> str | None:
    """Return the name of a data type of TensorRT's, None for one that accelrt does not know."""
    return _DTYPES.get(kind.name)


def network_flags(trt: Any) -> int:
    """Return the flags of a network whose types are those of the model: always so in TensorRT 11, a flag in 10."""
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strongly is None else 1 << int(strongly)


class Log:
    """What TensorRT said lately: errors and warnings, with a mark to tell what is new."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=64)
        self._count = 0
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        """Remember a line; may be called from threads of TensorRT's own."""
        with self._lock:
            self._count += 1
            self._lines.append((self._count, line))

    def mark(self) -> int:
        """Return where the log ends now."""
        return self._count

    def since(self, mark: int) -> list[str]:
        """Return the lines after a mark, oldest first."""
        with self._lock:
            return [line for number, line in self._lines if number > mark]


LOG = Log()


@cache
def trt_logger() -> Any:
    """Return the one logger of this process: TensorRT keeps the first that it is given for all it makes."""
    trt = bindings()
    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # as pybind11 wants it, not by way of super()

        def log(self, severity: Any, msg: str) -> None:
            if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                LOG.add(msg)
                logger.debug("TensorRT: %s", msg)
            elif severity == severities.WARNING:
                if "could not be allocated" in msg or "memory" in msg:
                    LOG.add(msg)  # the amount that was asked for is told in a warning
                logger.debug("TensorRT: %s", msg)

    return Logger()
