"""One module a framework: recognise a source, and turn it into a graph."""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelrt.errors import ConversionError, GraphError, OptionError, SourceError
from accelrt.sources import served, tensorflow_files, torch_files
from accelrt.sources.request import SourceOptions, SourceRequest
from accelrt.sources.whole import WholeModel, WholeSource, open_whole, whole_source

if TYPE_CHECKING:
    from accelrt.graph.model import Graph

__all__ = [
    "Source",
    "SourceOptions",
    "SourceRequest",
    "WholeModel",
    "WholeSource",
    "open_source",
    "open_whole",
    "whole_source",
]

ACCEPTED = (
    "Accepted: ONNX (a path, bytes, onnx.ModelProto, onnx_ir.Model), PyTorch (nn.Module, ExportedProgram, .pt2, "
    "ScriptModule, TorchScript .pt), TensorFlow (SavedModel folder, .keras, frozen graph .pb, keras.Model, "
    "tf.function, tf.Module), or a model that a server holds (grpc://host:8001/name)."
)


@dataclass(frozen=True, slots=True)
class Source:
    """A source turned into a graph.

    ``format`` says what it was: ``onnx``, ``torch``, ``tensorflow``; ``whole`` how it can be had in its own form, which
    costs nothing until it is written.
    """

    graph: Graph
    format: str
    whole: WholeSource | None = None


def open_source(model: Any, request: SourceRequest) -> Source:
    """Turn any accepted model into a graph.

    Raises:
        SourceError: Not recognised; says what was found and what is accepted.
        ConversionError: Recognised, and its framework cannot write it as ONNX; `whole_source` may still have it.
        GraphError: The ONNX model is not valid.
    """
    if served.recognises(model):
        raise SourceError(
            f"{str(model)[:200]} is a model that a server holds; there is no graph of it to compile.",
            hint=f"Only {served.TARGET!r} predicts with it. Leave the target out.",
        )
    if isinstance(model, str | Path) or hasattr(model, "__fspath__"):
        return _open_path(Path(model), request)
    if isinstance(model, bytes | bytearray | memoryview):
        return _open_onnx(bytes(model), request)
    if _is_instance_of(model, "onnx", "ModelProto") or _is_instance_of(model, "onnx_ir", "Model"):
        return _open_onnx(model, request)
    from accelrt.sources import tensorflow, torch

    if torch.recognises(model):
        return _open_torch(model, request)
    if tensorflow.recognises(model):
        return _open_tensorflow(model, request)
    raise SourceError(f"A {_type_name(model)} is not a model that accelrt knows.", hint=ACCEPTED)


def _open_path(path: Path, request: SourceRequest) -> Source:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise SourceError(f"There is no file {str(path)[:200]!r}.", hint=ACCEPTED) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SourceError(f"{path} is no regular file.", hint=ACCEPTED)
    if tensorflow_files.recognises_file(path) is not None or path.suffix in (".keras", ".h5", ".hdf5", ".tflite"):
        return _open_tensorflow(path, request)
    if stat.S_ISDIR(mode):
        raise SourceError(f"{path} is a folder without a saved_model.pb; no other is a model.", hint=ACCEPTED)
    if torch_files.recognises_file(path) is not None or path.suffix in (".pt", ".pth", ".pt2"):
        return _open_torch(path, request)
    try:
        return _open_onnx(path, request)
    except GraphError as error:
        if path.suffix == ".onnx":
            raise
        raise SourceError(f"{path} is no model that accelrt knows. As ONNX: {error.message}", hint=ACCEPTED) from error


def _open_onnx(model: Any, request: SourceRequest) -> Source:
    from accelrt.graph.load import load_graph

    if request.options != SourceOptions():
        raise OptionError(
            "The options `dynamic_shapes`, `opset` and `signature` are for PyTorch and TensorFlow models; an "
            "ONNX model has its own."
        )
    _refuse_aliases(request)
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
    return Source(graph.rename(list(request.input_names or ()), list(request.output_names or ())), "onnx")


def _open_torch(model: Any, request: SourceRequest) -> Source:
    from accelrt.sources import torch

    if request.options.signature is not None:
        raise OptionError("The option `signature` is for TensorFlow models; a PyTorch model has no signatures.")
    _refuse_aliases(request)
    return _converted(torch.to_onnx(model, request), "torch", model, request)


def _open_tensorflow(model: Any, request: SourceRequest) -> Source:
    from accelrt.sources import tensorflow

    return _converted(tensorflow.to_onnx(model, request), "tensorflow", model, request)


def _converted(converted: Any, framework: str, model: Any, request: SourceRequest) -> Source:
    from accelrt.graph.load import load_graph

    try:
        graph = load_graph(converted)
    except GraphError as error:
        raise ConversionError(f"{framework} wrote ONNX that is not valid: {error.message}", hint=error.hint) from error
    return Source(graph, framework, whole_source(model, request))


def _refuse_aliases(request: SourceRequest) -> None:
    for side, names in (("input", request.input_names), ("output", request.output_names)):
        if isinstance(names, Mapping):
            raise SourceError(
                f"{side}_names is a mapping, and those are for TensorFlow models.",
                hint=f"Give the names in order: {side}_names={list(names)}.",
            )


def _is_instance_of(model: Any, module: str, name: str) -> bool:
    """Tell whether an object is of a class without importing the package that it would come from."""
    loaded = sys.modules.get(module)
    cls = getattr(loaded, name, None)
    return isinstance(cls, type) and isinstance(model, cls)


def _type_name(model: Any) -> str:
    cls = type(model)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
