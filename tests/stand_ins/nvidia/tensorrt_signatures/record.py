"""Record the signatures of TensorRT's Python bindings: ``record.py OUT.json``, with the bindings on the import path.

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
    main(sys.argv[1])
