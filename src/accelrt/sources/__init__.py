"""One module a framework: recognise a source, and turn it into a graph."""

from __future__ import annotations

import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelrt.errors import OptionError, SourceError
from accelrt.sources import torch_files
from accelrt.sources.request import SourceOptions, SourceRequest

if TYPE_CHECKING:
    from accelrt.graph.model import Graph

__all__ = ["Source", "SourceOptions", "SourceRequest", "open_source"]

ACCEPTED = (
    "Accepted: ONNX (a path, bytes, onnx.ModelProto, onnx_ir.Model), PyTorch (nn.Module, ExportedProgram, .pt2, "
    "ScriptModule, TorchScript .pt)."
)


@dataclass(frozen=True, slots=True)
class Source:
    """A source turned into a graph; ``format`` says what it was: ``onnx``, ``torch``."""

    graph: Graph
    format: str


def open_source(model: Any, request: SourceRequest) -> Source:
    """Turn any accepted model into a graph.

    Raises:
        SourceError: Not recognised, or cannot be converted; says what was found and what is accepted.
        GraphError: The ONNX model is not valid.
    """
    if isinstance(model, str | Path) or hasattr(model, "__fspath__"):
        return _open_path(Path(model), request)
    if isinstance(model, bytes | bytearray | memoryview):
        return _open_onnx(bytes(model), request)
    if _is_instance_of(model, "onnx", "ModelProto") or _is_instance_of(model, "onnx_ir", "Model"):
        return _open_onnx(model, request)
    from accelrt.sources import torch

    if torch.recognises(model):
        return _open_torch(model, request)
    raise SourceError(f"A {_type_name(model)} is not a model that accelrt knows.", hint=ACCEPTED)


def _open_path(path: Path, request: SourceRequest) -> Source:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise SourceError(f"There is no file {str(path)[:200]!r}.", hint=ACCEPTED) from error
    if stat.S_ISDIR(mode):
        raise SourceError(f"{path} is a folder, and no folder is a model in this version.", hint=ACCEPTED)
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path} is no regular file.", hint=ACCEPTED)
    if torch_files.recognises_file(path) is not None or path.suffix in (".pt", ".pth", ".pt2"):
        return _open_torch(path, request)
    from accelrt.errors import GraphError

    try:
        return _open_onnx(path, request)
    except GraphError as error:
        if path.suffix == ".onnx":
            raise
        raise SourceError(f"{path} is no model that accelrt knows. As ONNX: {error.message}", hint=ACCEPTED) from error


def _open_onnx(model: Any, request: SourceRequest) -> Source:
    from accelrt.graph.load import load_graph

    if request.options != SourceOptions():
        raise OptionError("The options `dynamic_shapes` and `opset` are for PyTorch models; an ONNX model has its own.")
    graph = load_graph(model)
    for side, names, known in (
        ("input", request.input_names, graph.signature.input_names),
        ("output", request.output_names, graph.signature.output_names),
    ):
        if names is not None and len(names) != len(known):
            raise SourceError(
                f"{len(names)} {side} names were given ({', '.join(names)}); the model has {len(known)}: "
                f"{', '.join(known)}."
            )
    return Source(graph.rename(request.input_names, request.output_names), "onnx")


def _open_torch(model: Any, request: SourceRequest) -> Source:
    from accelrt.graph.load import load_graph
    from accelrt.sources import torch

    return Source(load_graph(torch.to_onnx(model, request)), "torch")


def _is_instance_of(model: Any, module: str, name: str) -> bool:
    """Tell whether an object is of a class without importing the package that it would come from."""
    loaded = sys.modules.get(module)
    cls = getattr(loaded, name, None)
    return isinstance(cls, type) and isinstance(model, cls)


def _type_name(model: Any) -> str:
    cls = type(model)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
