"""Record signatures: ``record.py OUT.json`` of TensorRT's Python bindings, ``record.py OUT.json cuda`` of cuda-bindings.

The packages must be on the import path.

The bindings' wheels hold no stubs; pybind11 tells the signatures when the module is imported. Without TensorRT's
libraries, shared objects of their names do: ``libnvinfer``, ``libnvinfer_plugin`` and ``libnvonnxparser`` that export the
functions which ``nm -D --undefined-only`` lists of the module, each returning 0. Nothing of it is called on import.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "ITensor", "OnnxParser", "ParserError", "IOptimizationProfile",
    "ITimingCache", "IHostMemory", "Runtime", "ICudaEngine", "IExecutionContext", "IOutputAllocator",
    "IProgressMonitor", "ILogger", "Logger",
)  # fmt: skip
ENUMS = (
    "ErrorCode", "DataType", "BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType",
    "HardwareCompatibilityLevel", "TensorLocation", "TensorIOMode",
)  # fmt: skip


CUDA_FUNCTIONS = (
    "cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetLastError", "cudaGetDeviceCount", "cudaSetDevice",
    "cudaDeviceGetAttribute", "cudaGetDeviceProperties", "cudaMemGetInfo", "cudaMalloc", "cudaFree", "cudaMallocHost",
    "cudaFreeHost", "cudaStreamCreateWithFlags", "cudaStreamSynchronize", "cudaStreamDestroy", "cudaMemcpyAsync",
)  # fmt: skip
CUDA_ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr")


def cuda(out: str) -> None:
    """Write the parameters of the functions of the CUDA runtime that the engine calls, as their documentation has them."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    functions = {}
    for name in CUDA_FUNCTIONS:
        line = (getattr(runtime, name).__doc__ or "").strip().splitlines()[0]
        # Cython writes C types before names: ``cudaMalloc(size_t size)``.
        functions[name] = ", ".join(parameter.split(" ")[-1] for parameter in _parameters(line))
    found = {"functions": functions, "enums": {name: _values(getattr(runtime, name)) for name in CUDA_ENUMS}}
    Path(out).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main(out: str) -> None:
    trt = importlib.import_module("tensorrt_bindings")
    classes = {name: _members(getattr(trt, name)) for name in CLASSES}
    enums = {name: _values(getattr(trt, name)) for name in ENUMS}
    enums["ILogger.Severity"] = _values(trt.ILogger.Severity)
    found = {"version": trt.__version__, "classes": classes, "enums": enums}
    Path(out).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def _values(enum: Any) -> dict[str, int]:
    return {name: int(value) for name, value in enum.__members__.items()}


def _members(cls: type) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__init__":
            continue
        if type(value).__name__ == "property":
            members[name] = "property" if value.fset else "read-only property"
        elif callable(value) and not inspect.isclass(value):
            lines = (value.__doc__ or "").splitlines()
            own = [line for line in lines if re.match(rf"(\d+\. )?{name}\(", line) and "*args" not in line]
            if own:
                members[name] = sorted({", ".join(_parameters(line)) for line in own})
    return members


def _parameters(line: str) -> list[str]:
    """Return the names in a signature, those with a default marked ``=``."""
    depth, names, text = 0, [], ""
    for character in line[line.index("(") + 1 :]:
        depth += (character in "[(<{") - (character in "])>}")
        if depth < 0:
            break
        if character == "," and depth == 0:
            names.append(text)
            text = ""
        else:
            text += character
    names.append(text)
    return [n.partition(":")[0].strip() + ("=" if " = " in n else "") for n in names if n.strip()]


if __name__ == "__main__":
    (cuda if sys.argv[2:] == ["cuda"] else main)(sys.argv[1])
