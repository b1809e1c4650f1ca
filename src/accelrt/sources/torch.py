"""PyTorch to ONNX: modules and exported programs through torch.export, TorchScript with its control flow."""

from __future__ import annotations

import contextlib
import inspect
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from accelrt.errors import ConversionError, SourceError
from accelrt.sources.request import SourceRequest
from accelrt.sources.torch_files import FileKind, recognises_file
from accelrt.sources.torch_inputs import (
    cause_of,
    device_of,
    examples_of,
    in_eval_mode,
    open_axes,
    open_file,
    quiet,
    refuse_file,
    require,
    script_arguments,
)
from accelrt.sources.torch_names import leaf_names, name_ports, names_of, rename

__all__ = ["FileKind", "recognises", "recognises_file", "to_onnx"]

_MODULE_HINT = (
    "Python control flow that depends on data cannot be captured: write it with torch.cond, or pass "
    "torch.jit.script(module), which keeps it."
)
_SCRIPT_HINT = (
    "The TorchScript exporter knows tensors, lists and tuples of them, if and while; it cannot return "
    "dictionaries. The original torch.nn.Module is the better source where it is at hand."
)
_SCRIPT_MAX_OPSET = 20


def recognises(model: object) -> bool:
    """Tell whether a model is a PyTorch object. Imports nothing: without torch loaded none exists."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "nn"):
        return False
    kinds = [torch.nn.Module, torch.jit.ScriptModule, torch.jit.ScriptFunction]
    if "torch.export" in sys.modules:
        kinds.append(torch.export.ExportedProgram)
    return isinstance(model, tuple(kinds))


def to_onnx(model: object, request: SourceRequest) -> ir.Model:
    """Turn a PyTorch object, or the path of a TorchScript or ``.pt2`` file, into ONNX.

    A module is exported in eval mode and left as it was. Its weights are shared, not copied; those of
    TorchScript are copied.

    Raises:
        SourceError: The model cannot be exported, example inputs are missing, or names do not fit.
    """
    source = str(model) if isinstance(model, Path) else f"the {type(model).__name__}"
    if isinstance(model, Path):
        kind = recognises_file(model)
        refuse_file(model, kind)
        require("torch", source)
        model = open_file(model, kind)
    import torch

    # An object made by torch.compile hides the module that can be exported.
    model = getattr(model, "_orig_mod", model)
    with quiet():
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            graph_model, outputs = _from_script(model, request, source), None
        else:
            require("onnxscript", source)
            graph_model, outputs = _from_program(model, request, source)
    name_ports(graph_model.graph, outputs, request)
    opset = request.options.opset
    if opset is not None and graph_model.opset_imports.get("") != opset:
        raise SourceError(
            f"{source} was asked for in opset {opset}, and torch could only write opset "
            f"{graph_model.opset_imports.get('')}.",
            hint="Leave options.opset out, or ask for 18 or later.",
        )
    return graph_model


def _from_program(model: Any, request: SourceRequest, source: str) -> tuple[ir.Model, list[str]]:
    import torch

    options = request.options
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(model, torch.export.ExportedProgram):
        exporting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        parameters = None
    else:
        parameters = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        args, kwargs = examples_of(request, source, parameters, device_of(model))
        exporting = in_eval_mode(model)
    try:
        with exporting:
            exported = torch.onnx.export(
                model,
                # torch takes a last positional dictionary for keyword arguments, unless another follows.
                (*args, {}) if args and isinstance(args[-1], dict) and not kwargs else args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=options.dynamic_shapes,
                opset_version=options.opset,
                verbose=False,
            )
    except Exception as error:
        raise ConversionError(
            f"{source} cannot be exported to ONNX by torch: {cause_of(error)}", hint=_MODULE_HINT
        ) from error
    program = exported.exported_program
    graph: ir.Graph = exported.model.graph
    # The exporter renames an input that is returned as it is; the program knows the parameter's own name.
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(names) == len(graph.inputs):
        rename(graph, dict(zip(graph.inputs, names, strict=True)))
    by_name = {value.name: value for value in graph.inputs}
    for name, axis, label in open_axes(options.dynamic_shapes, parameters or names):
        shape = by_name[name].shape if name in by_name else None
        if label is not None and shape is not None and isinstance(shape[axis], int):
            raise SourceError(
                f"dimension {axis} of {name} was asked to stay open, and {source} fixes it to {shape[axis]}.",
                hint="Remove it from dynamic_shapes, or change the code that needs this very size.",
            )
    return exported.model, leaf_names(program)


def _from_script(model: Any, request: SourceRequest, source: str) -> ir.Model:
    import torch

    options = request.options
    if options.opset is not None and options.opset > _SCRIPT_MAX_OPSET:
        raise SourceError(
            f"{source} was asked for in opset {options.opset}; TorchScript is exported to opset "
            f"{_SCRIPT_MAX_OPSET} at most.",
            hint=f"Leave options.opset out, or ask for {_SCRIPT_MAX_OPSET}.",
        )
    model, given = script_arguments(model, request, source)
    names = [leaf for name, value in given.items() for leaf in names_of(value, name)]
    axes: dict[str, dict[int, str]] = {}
    for name, axis, label in open_axes(options.dynamic_shapes, list(given)):
        if name not in names:
            raise SourceError(f"dynamic_shapes names {name}; the inputs of {source} are {', '.join(names)}.")
        axes.setdefault(name, {})[axis] = label or f"{name}_dim_{axis}"
    with tempfile.TemporaryDirectory(prefix="accelrt-torchscript-") as folder:
        target = Path(folder) / "model.onnx"  # a path, so that torch can lay weights beside it from 2 GB on
        try:
            with in_eval_mode(model):
                torch.onnx.export(
                    model,
                    tuple(given.values()),
                    str(target),
                    dynamo=False,
                    input_names=names,
                    dynamic_axes=axes,
                    opset_version=options.opset,
                    verbose=False,
                )
        except Exception as error:
            raise ConversionError(
                f"{source} cannot be exported from TorchScript: {cause_of(error)}", hint=_SCRIPT_HINT
            ) from error
        loaded = ir.load(target)
        ir.external_data.load_to_model(loaded)  # nothing may point into the folder, which is about to go
    return loaded
