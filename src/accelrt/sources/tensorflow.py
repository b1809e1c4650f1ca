"""TensorFlow to ONNX: files and folders in a child process, live objects through a SavedModel."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir as ir

from accelrt import isolation
from accelrt.errors import OptionError, SourceError
from accelrt.sources.request import SourceRequest
from accelrt.sources.tensorflow_files import FileKind, recognises_file, vet_keras
from accelrt.sources.torch_names import name_ports

__all__ = ["FileKind", "recognises", "recognises_file", "to_onnx"]

_CHILD = "accelrt.sources.tensorflow_child"
_ACCEPTED = (
    "Accepted: a SavedModel folder, a .keras file, a frozen graph (.pb), or in Python a keras.Model, "
    "a tf.function or a tf.Module."
)


def recognises(model: object) -> bool:
    """Tell whether a model is a TensorFlow or Keras object. Imports nothing: without them loaded none exists."""
    kinds: list[type] = []
    keras: Any = sys.modules.get("keras")
    tensorflow: Any = sys.modules.get("tensorflow")
    if hasattr(keras, "Model"):
        kinds.append(keras.Model)
    if hasattr(tensorflow, "Module") and hasattr(tensorflow, "types"):
        functions = tensorflow.types.experimental
        kinds += [tensorflow.Module, functions.PolymorphicFunction, functions.ConcreteFunction]
        if hasattr(model, "signatures"):
            kinds.append(tensorflow.__internal__.tracking.AutoTrackable)
    return isinstance(model, tuple(kinds))


def to_onnx(model: object, request: SourceRequest) -> ir.Model:
    """Turn a TensorFlow object, or the path of a TensorFlow model, into ONNX.

    Raises:
        SourceError: The model cannot be read or converted, example inputs are missing, or names do not fit.
        IsolatedError: TensorFlow or tf2onnx crashed or hung in the child process.
        OptionError: An option that has no meaning for this model.
    """
    check_options(request)
    source = str(model) if isinstance(model, Path) else f"the {type(model).__name__}"
    kind: FileKind | None = recognises_file(model) if isinstance(model, Path) else "saved-model"
    if isinstance(model, Path):
        refuse(model, kind, request)
    for package in ("tensorflow", "tf2onnx"):
        if not is_installed(package):
            raise SourceError(
                f"{source} needs {package}, which is not installed.", hint="Run: pip install 'accelrt[tensorflow]'"
            )
    with tempfile.TemporaryDirectory(prefix="accelrt-tensorflow-") as folder:
        target = Path(folder) / "model.onnx"
        traced = None
        arguments: dict[str, Any] = {"signature": request.options.signature}
        if isinstance(model, Path):
            path = model.absolute()
            if kind == "saved-model" and path.is_file():
                path = path.parent
            elif kind == "graph-def":
                # The child looks the tensors up, and names them.
                arguments.update(inputs=plain(request.input_names), outputs=plain(request.output_names))
                request = replace(request, input_names=None, output_names=None)
        else:
            from accelrt.sources.tensorflow_live import export

            path = Path(folder) / "saved_model"
            traced = export(model, request, source, path)
            arguments["signature"] = None  # the one asked for is the only one written
        ports = isolation.call(
            f"{_CHILD}:convert",
            path=str(path),
            kind=kind,
            target=str(target),
            source=source,
            opset=request.options.opset,
            **arguments,
        )
        converted = ir.load(target)
        ir.external_data.load_to_model(converted)  # nothing may point into the folder, which is about to go
    if traced is not None:
        ports["batch"] = traced.batch
        for side, own in (("inputs", traced.inputs), ("outputs", traced.outputs)):
            for port, name in zip(ports[side], own, strict=True):
                port["name"] = name
    _arrange(converted.graph, ports, request, source)
    return converted


def check_options(request: SourceRequest) -> None:
    """Raise `OptionError` for an option that has no meaning for TensorFlow."""
    if request.options.dynamic_shapes is not None:
        raise OptionError(
            "The option `dynamic_shapes` is for PyTorch models; a TensorFlow model has its own open dimensions.",
            hint="Where examples give the shapes, pass tf.TensorSpec([None, 224, 224, 3]) as an example input.",
        )


def refuse(path: Path, kind: FileKind | None, request: SourceRequest) -> None:
    """Refuse a file that is no model of TensorFlow, or one that would run code.

    Raises:
        SourceError: It is such a file.
        OptionError: A signature is asked for, and the file has none.
    """
    if kind == "tflite":
        raise SourceError(
            f"{path} is a TensorFlow Lite model, and those are not taken.",
            hint=f"Pass the model that it was converted from. {_ACCEPTED}",
        )
    if kind == "keras-h5":
        raise SourceError(
            f"{path} is an HDF5 file: Keras's old format, which may hold code, or weights alone.",
            hint="If you trust it: keras.saving.load_model(path).save('model.keras'), or pass the keras.Model itself.",
        )
    if kind is None:
        raise SourceError(f"{path} is not a TensorFlow model.", hint=_ACCEPTED)
    if kind != "saved-model" and request.options.signature is not None:
        raise OptionError(f"The option `signature` is for a SavedModel or a tf.Module; {path} has no signatures.")
    if kind == "keras":
        vet_keras(path)


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules, but made by hand
        return sys.modules.get(package) is not None


def plain(names: Sequence[str] | Mapping[str, str] | None) -> list[str] | dict[str, str] | None:
    """Return names as JSON has them."""
    if names is None:
        return None
    return dict(names) if isinstance(names, Mapping) else list(names)


def _arrange(graph: ir.Graph, ports: dict[str, Any], request: SourceRequest, source: str) -> None:
    """Put inputs and outputs in the signature's order, under its names or those asked for."""
    by_name = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for port in ports["inputs"]:
        if port["tensor"] not in by_name:  # the model does not read it, and still takes it
            shape = None if port["shape"] is None else ir.Shape(port["shape"])
            kind = ir.TensorType(ir.DataType(port["dtype"]))
            by_name[port["tensor"]] = ir.Value(name=port["tensor"], shape=shape, type=kind)
    inputs, outputs = select(ports, request, source)
    for values, chosen in ((graph.inputs, inputs), (graph.outputs, outputs)):
        values[:] = [by_name[port["tensor"]] for port in chosen]
    own = own_names(inputs, outputs, request)
    name_ports(graph, unlike([port["name"] for port in outputs], own.input_names), own)
    _name_axes(graph, ports["batch"])


Ports: TypeAlias = list[dict[str, Any]]
"""Inputs or outputs as the child describes them: ``name`` and what else it says of each."""


def select(ports: Mapping[str, Ports], request: SourceRequest, source: str) -> tuple[Ports, Ports]:
    """Return the inputs and outputs that were asked for, in that order.

    Raises:
        SourceError: One is not there, or an input is left out.
    """
    inputs = selected("input", ports["inputs"], request.input_names, source)
    outputs = selected("output", ports["outputs"], request.output_names, source)
    if len(inputs) < len(ports["inputs"]):
        lacking = [port["name"] for port in ports["inputs"] if port["name"] not in {p["name"] for p in inputs}]
        raise SourceError(f"The input names lack {', '.join(lacking)}, which {source} takes.")
    return inputs, outputs


def own_names(inputs: Ports, outputs: Ports, request: SourceRequest) -> SourceRequest:
    """Return a request that asks for the names which selected ports are to have."""
    asked = [
        [port["alias"] for port in chosen] if isinstance(names, Mapping) else names
        for chosen, names in ((inputs, request.input_names), (outputs, request.output_names))
    ]
    return SourceRequest(input_names=asked[0] or [port["name"] for port in inputs], output_names=asked[1])


def unlike(outputs: list[str], inputs: Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """An ONNX value has one name: an output called as an input gets another, as with PyTorch's."""
    return [f"{name}_output" if name in (inputs or ()) else name for name in outputs]


def selected(
    side: str, ports: list[dict[str, Any]], names: Sequence[str] | Mapping[str, str] | None, source: str
) -> list[dict[str, Any]]:
    """Return the ports that an alias mapping speaks of, in its order; all of them where there is no mapping."""
    if not isinstance(names, Mapping):
        return ports
    by_name = {port["name"]: port for port in ports}
    if unknown := [name for name in names.values() if name not in by_name]:
        raise SourceError(f"{source} has no {side} {unknown[0]!r}; its {side}s are {', '.join(by_name)}.")
    return [{**by_name[name], "alias": alias} for alias, name in names.items()]


def _name_axes(graph: ir.Graph, batch: bool) -> None:
    """Name open dimensions after their place: tf2onnx numbers them as it comes, and differently each time."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(named_axes(value.name or "", tuple(value.shape), batch))


def named_axes(name: str, shape: Sequence[Any], batch: bool) -> tuple[int | str, ...]:
    """Return a shape whose open dimensions are named after their place."""
    return tuple(
        size if isinstance(size, int) else "batch" if batch and axis == 0 else f"{name}_dim_{axis}"
        for axis, size in enumerate(shape)
    )
