"""PyTorch to ONNX: modules and exported programs through torch.export, TorchScript with its control flow."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from accelrt.errors import SourceError
from accelrt.sources.request import SourceRequest
from accelrt.sources.torch_files import FileKind, load_program, load_script, recognises_file
from accelrt.sources.torch_names import leaf_names, name_ports, names_of, rename

__all__ = ["FileKind", "recognises", "recognises_file", "to_onnx"]

_EXAMPLE = (
    "Pass what the model takes, e.g. accelrt.compile(model, example_inputs=(torch.randn(1, 3, 224, 224),)) "
    'or example_inputs={"input_ids": ids}.'
)
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
        _refuse(model, kind)
        _require("torch", source)
        model = _open(model, kind)
    import torch

    # An object made by torch.compile hides the module that can be exported.
    model = getattr(model, "_orig_mod", model)
    with _quiet():
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            graph_model, outputs = _from_script(model, request, source), None
        else:
            _require("onnxscript", source)
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


def _refuse(path: Path, kind: FileKind | None) -> None:
    accepted = (
        "Accepted: TorchScript (torch.jit.script(module).save(path)), an exported program "
        "(torch.export.save(program, path)), ONNX, or the torch.nn.Module itself in Python."
    )
    if kind == "pickle":
        raise SourceError(f"{path} is a Python pickle, which may run any code, and is never loaded.", hint=accepted)
    if kind == "aoti-package":
        raise SourceError(
            f"{path} is an AOTInductor package: machine code for one device, with no model left to compile.",
            hint="Save the exported program it was made from: torch.export.save(program, path).",
        )
    if kind is None:
        raise SourceError(f"{path} is not a PyTorch file, or does not exist.", hint=accepted)


def _require(package: str, source: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SourceError(f"{source} needs {package}, which is not installed.", hint="Run: pip install accelrt[torch]")


def _open(path: Path, kind: FileKind | None) -> object:
    try:
        with _quiet():
            return load_script(path) if kind == "torchscript" else load_program(path)
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises many kinds on a bad file
        _failed(f"{path} cannot be loaded", error, "The file may be damaged, or of another torch version.")


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
        args, kwargs = _examples(request, source, parameters, _device_of(model))
        exporting = _in_eval_mode(model)
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
    except Exception as error:  # noqa: BLE001 - exporters raise every kind of exception
        _failed(f"{source} cannot be exported by torch.export", error, _MODULE_HINT)
    program = exported.exported_program
    graph: ir.Graph = exported.model.graph
    # The exporter renames an input that is returned as it is; the program knows the parameter's own name.
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if len(names) == len(graph.inputs):
        rename(graph, dict(zip(graph.inputs, names, strict=True)))
    by_name = {value.name: value for value in graph.inputs}
    for name, axis, label in _open_axes(options.dynamic_shapes, parameters or names):
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
    is_module = isinstance(model, torch.jit.ScriptModule)
    arguments = model.forward.schema.arguments[1:] if is_module else model.schema.arguments
    parameters = [argument.name for argument in arguments]
    args, kwargs = _examples(request, source, parameters, _device_of(model) if is_module else None)
    given = dict(zip(parameters, args, strict=False)) | kwargs
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted({*given} - {*parameters}) or len(args) > len(parameters):
        raise SourceError(
            f"{source} takes {', '.join(parameters)}, and the example inputs hold "
            f"{len(args) if unknown is True else ', '.join(unknown)}."
        )
    given = {name: given[name] for name in parameters if name in given}
    if len(given) < len(parameters):
        model = _without_defaults(model, arguments, given, source)
    names = [leaf for name, value in given.items() for leaf in names_of(value, name)]
    axes: dict[str, dict[int, str]] = {}
    for name, axis, label in _open_axes(options.dynamic_shapes, list(given)):
        if name not in names:
            raise SourceError(f"dynamic_shapes names {name}; the inputs of {source} are {', '.join(names)}.")
        axes.setdefault(name, {})[axis] = label or f"{name}_dim_{axis}"
    with tempfile.TemporaryDirectory(prefix="accelrt-torchscript-") as folder:
        target = Path(folder) / "model.onnx"  # a path, so that torch can lay weights beside it from 2 GB on
        try:
            with _in_eval_mode(model):
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
        except Exception as error:  # noqa: BLE001 - exporters raise every kind of exception
            _failed(f"{source} cannot be exported from TorchScript", error, _SCRIPT_HINT)
        loaded = ir.load(target)
        ir.external_data.load_to_model(loaded)  # nothing may point into the folder, which is about to go
    return loaded


def _without_defaults(model: Any, arguments: Sequence[Any], given: Mapping[str, Any], source: str) -> Any:
    """Wrap a ScriptModule so that parameters left out keep their defaults, and do not become inputs."""
    import torch

    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if missing or not isinstance(model, torch.jit.ScriptModule):
        left_out = missing or [a.name for a in arguments if a.name not in given]
        raise SourceError(f"the example inputs of {source} lack {', '.join(left_out)}.", hint=_EXAMPLE)
    types = {
        a.name: "Tensor" if isinstance(given[a.name], torch.Tensor) else a.type.annotation_str
        for a in arguments
        if a.name in given
    }
    shell = type("Shell", (torch.nn.Module,), {})()  # a class of its own: torch keeps one script type a class
    shell.inner = model
    wrapper = torch.jit.script(shell)
    signature = ", ".join(f"{name}: {kind}" for name, kind in types.items())
    call = ", ".join(f"{name}={name}" for name in types)
    wrapper.define(f"def forward(self, {signature}):\n    return self.inner({call})\n")
    return wrapper


def _examples(
    request: SourceRequest, source: str, parameters: Sequence[str], device: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs: Any = request.example_inputs
    if inputs is None:
        raise SourceError(
            f"{source} carries no shapes or types of its inputs ({', '.join(parameters)}), and "
            "no example_inputs were given.",
            hint=_EXAMPLE,
        )
    seen: set[int] = set()
    if isinstance(inputs, Mapping):
        # In the order of the parameters, not of the mapping: it becomes the order of the inputs.
        order = [name for name in parameters if name in inputs] + [n for n in inputs if n not in parameters]
        return (), {name: _tensor(inputs[name], device, seen) for name in order}
    if not isinstance(inputs, list | tuple):
        inputs = (inputs,)
    return tuple(_tensor(value, device, seen) for value in inputs), {}


def _tensor(value: Any, device: Any, seen: set[int]) -> Any:
    import torch

    match value:
        case torch.Tensor():
            # torch.export takes one tensor given twice for one input, and would leave the other one unused.
            if id(value) in seen:
                return value.clone()
            seen.add(id(value))
            return value
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {key: _tensor(item, device, seen) for key, item in value.items()}
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(_tensor(item, device, seen) for item in value))
        case list() | tuple():
            return type(value)(_tensor(item, device, seen) for item in value)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray | np.generic):
        return torch.from_dlpack(value).to(device)
    if not hasattr(value, "__array__"):
        return value
    array = np.array(value)  # a copy: torch would share memory that may be read-only
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _device_of(module: Any) -> Any:
    first = next(module.parameters(), None)
    return None if first is None else first.device


def _open_axes(shapes: Any, parameters: Sequence[str]) -> Iterator[tuple[str, int, str | None]]:
    """Yield (input, axis, name) of each dimension that stays open; the name is None where torch decides."""
    by_name = shapes if isinstance(shapes, Mapping) else dict(zip(parameters, shapes or (), strict=False))
    for name, spec in by_name.items():
        axes = enumerate(spec) if isinstance(spec, list | tuple) else (spec or {}).items()
        for axis, dim in axes:
            if not isinstance(axis, int) or dim is None or isinstance(dim, int):
                continue
            if isinstance(dim, str):
                yield name, axis, dim
            elif hasattr(dim, "__name__"):
                yield name, axis, dim.__name__
            elif (hint := getattr(getattr(dim, "type", None), "name", "STATIC")) != "STATIC":
                yield name, axis, None if hint == "AUTO" else f"{name}_dim_{axis}"


@contextlib.contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    modules = list(model.modules()) if hasattr(model, "modules") else []
    flags = [(module, module.training) for module in modules if hasattr(module, "training")]
    if any(flag for _, flag in flags):
        model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            if module.training != flag:
                module.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters from printing, logging and warning: what matters of it comes back in the error."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        _without_onnx_log(),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _without_onnx_log() -> Iterator[None]:
    """Silence the TorchScript exporter: it prints past Python's standard output, and its own switch fails."""
    import torch

    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def _failed(what: str, error: Exception, hint: str) -> NoReturn:
    cause: BaseException = error
    while cause.__cause__ is not None:  # torch wraps the cause in pages of advice
        cause = cause.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(cause)).splitlines() if line.strip()]
    message = " ".join(lines[:3])
    raise SourceError(f"{what}: {type(cause).__name__}: {message[:500].rstrip('.')}.", hint=hint) from error
