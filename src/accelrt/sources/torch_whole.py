"""PyTorch models whole: an exported program, else TorchScript, in a file, with the signature that ONNX would have."""

from __future__ import annotations

import inspect
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from accelrt.backend import WHOLE_FILES
from accelrt.errors import OptionError, SourceError
from accelrt.graph.types import Port, Signature, TensorType, numpy_dtype
from accelrt.sources.request import SourceRequest
from accelrt.sources.torch_files import load_program, recognises_file
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
from accelrt.sources.torch_names import leaf_names, output_names, port_names
from accelrt.sources.whole import WholeModel

_EXPORT, _SCRIPT = "torch.export", "torchscript"


def formats_of(model: object) -> tuple[str, ...]:
    """Return the forms that a PyTorch object can be written in, best first."""
    import torch

    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return (_SCRIPT,)
    return (_EXPORT, _SCRIPT) if isinstance(model, torch.nn.Module) else (_EXPORT,)


def write(model: Any, request: SourceRequest, folder: Path, accepted: Collection[str]) -> WholeModel:
    """Write a PyTorch object, or the model in a file, into an empty folder.

    A module is captured in eval mode and left as it was: by ``torch.export``, else by ``torch.jit.script``, else by
    ``torch.jit.trace``, which is believed only if nothing in it depends on data.

    Raises:
        SourceError: It cannot be captured, example inputs are missing, or names do not fit.
    """
    if request.options.signature is not None:
        raise OptionError("The option `signature` is for TensorFlow models; a PyTorch model has no signatures.")
    for side, names in (("input", request.input_names), ("output", request.output_names)):
        if isinstance(names, Mapping):
            raise SourceError(f"{side}_names is a mapping, and those are for TensorFlow models.")
    source = str(model) if isinstance(model, Path) else f"the {type(model).__name__}"
    file = model if isinstance(model, Path) else None
    if file is not None:
        kind = recognises_file(file)
        refuse_file(file, kind)
        require("torch", source)
        model = open_file(file, kind)
    import torch

    model = getattr(model, "_orig_mod", model)
    with quiet():
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            return _write_script(model, request, source, folder, file)
        if isinstance(model, torch.export.ExportedProgram):
            return _write_program(model, request, source, folder, file, None)
        return _write_module(model, request, source, folder, accepted)


def _write_module(
    model: Any, request: SourceRequest, source: str, folder: Path, accepted: Collection[str]
) -> WholeModel:
    parameters = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    args, kwargs = examples_of(request, source, parameters, device_of(model))
    failures: list[str] = []
    with in_eval_mode(model):
        if _EXPORT in accepted:
            for strict in (False, True):
                try:
                    program = _exported(model, args, kwargs, request.options.dynamic_shapes, strict)
                except Exception as error:  # noqa: BLE001 - torch raises every kind of exception; all are told below
                    failures.append(f"torch.export, strict={strict}: {cause_of(error)}")
                    continue
                try:
                    return _write_program(program, request, source, folder, None, parameters)
                except SourceError as error:
                    failures.append(f"torch.export: {error.message}")
                    break
            if failures and request.options.dynamic_shapes is not None:
                _blame_shapes(model, args, kwargs, source, failures)
        if _SCRIPT in accepted:
            for name, capture in (("torch.jit.script", _scripted), ("torch.jit.trace", _traced)):
                try:
                    script = capture(model, args, kwargs)
                except Exception as error:  # noqa: BLE001 - as above
                    failures.append(f"{name}: {cause_of(error)}")
                    continue
                try:
                    return _write_script(script, request, source, folder, None)
                except SourceError as error:
                    failures.append(f"{name}: {error.message}")
    raise SourceError(
        f"{source} cannot be captured whole either. {' '.join(failures)}",
        hint="Each attempt has its reason; torch.jit.script keeps control flow that depends on data.",
    )


def _exported(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, strict: bool) -> Any:
    import torch

    # Of their own, because torch marks open dimensions on the tensors themselves.
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    return torch.export.export(model, args, kwargs, dynamic_shapes=_without_labels(shapes), strict=strict)


def _blame_shapes(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: str, failures: list[str]) -> None:
    """Raise if a module can be exported but for its open dimensions: TorchScript would take them, and fail later."""
    try:
        _exported(model, args, kwargs, None, strict=False)
    except Exception:  # noqa: BLE001 - then the dimensions are not what is wrong
        return
    raise SourceError(
        f"{source} cannot be captured with the dimensions that are to stay open. {shorten(failures[0], 240)}",
        hint="Remove them from dynamic_shapes, or change the code that needs these very sizes.",
    )


def _without_labels(shapes: Any) -> Any:
    """Return dynamic shapes as torch.export takes them: a dimension that has but a name stays open."""
    import torch

    if isinstance(shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(shapes, Mapping):
        return {key: _without_labels(item) for key, item in shapes.items()}
    return type(shapes)(map(_without_labels, shapes)) if type(shapes) in (list, tuple) else shapes


def _scripted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    return torch.jit.script(model)


def _traced(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    with warnings.catch_warnings():
        # What a tracer warns of is what it gets wrong: a branch or a number taken from the example's data.
        warnings.simplefilter("error", torch.jit.TracerWarning)
        if kwargs:
            return torch.jit.trace(model, example_kwarg_inputs=kwargs, strict=False)
        return torch.jit.trace(model, args, strict=False)


# Exported programs


def _write_program(
    program: Any, request: SourceRequest, source: str, folder: Path, file: Path | None, parameters: list[str] | None
) -> WholeModel:
    import torch

    path = folder / WHOLE_FILES[_EXPORT]
    signature = _signature_of(program, request, source, parameters)
    try:
        if file is None:
            torch.export.save(program, path)
        else:
            shutil.copyfile(file, path)
        if any(tensor.device.type != "cpu" for tensor in _tensors(program)):
            _move_to_cpu(path)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{source} cannot be saved by torch.export.save: {cause_of(error)}") from error
    return WholeModel(_EXPORT, path, signature, sum(t.numel() * t.element_size() for t in _tensors(program)))


def _tensors(program: Any) -> list[Any]:
    import torch

    held = (*program.state_dict.values(), *program.constants.values())
    return [value for value in held if isinstance(value, torch.Tensor)]


def _move_to_cpu(path: Path) -> None:
    """Rewrite a program for the CPU; on a copy, because torch moves the weights of the one it is given."""
    import torch
    from torch.export.passes import move_to_device_pass

    torch.export.save(move_to_device_pass(load_program(path), "cpu"), path)


def _signature_of(program: Any, request: SourceRequest, source: str, parameters: list[str] | None) -> Signature:
    from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT or isinstance(spec.arg, ConstantArgument):
            continue
        if not isinstance(spec.arg, TensorArgument):
            raise SourceError(f"{source} takes {spec.arg.name!r}, which is no tensor.", hint="Pass it as a tensor.")
        inputs.append(spec.arg.name)
    for result in _without_writes(program).graph_signature.output_specs:
        if result.kind is OutputKind.BUFFER_MUTATION:
            raise SourceError(
                f"{source} changes its buffer {result.target!r} when it runs, so calls would depend on each other."
            )
    outputs = []
    for result in program.graph_signature.output_specs:
        if result.kind is OutputKind.USER_OUTPUT and not isinstance(result.arg, ConstantArgument):
            outputs.append(result.arg.name)
    labels: dict[str, str] = {}
    if parameters is not None:
        for name, axis, label in open_axes(request.options.dynamic_shapes, parameters):
            size = values[name].shape[axis] if name in inputs else None
            if label is not None and isinstance(size, int):
                raise SourceError(
                    f"dimension {axis} of {name} was asked to stay open, and {source} fixes it to {size}.",
                    hint="Remove it from dynamic_shapes, or change the code that needs this very size.",
                )
            if label is not None and size is not None and str(size).isidentifier():
                labels[str(size)] = label
    names = port_names(inputs, leaf_names(program), request)
    ports = [
        tuple(Port(name, _type_of(values[own], labels, source)) for name, own in zip(side, found, strict=True))
        for side, found in zip(names, (inputs, outputs), strict=True)
    ]
    return Signature(*ports)


def _without_writes(program: Any) -> Any:
    """Return a program whose signature tells what it writes to: operators that work in place do not show there."""
    graphs = (module.graph for module in program.graph_module.modules() if hasattr(module, "graph"))
    schemas = (getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes)
    if any(schema is not None and schema.is_mutable for schema in schemas):
        return program.run_decompositions({})
    return program


def _type_of(value: Any, labels: Mapping[str, str], source: str) -> TensorType:
    if not hasattr(value, "dtype"):  # a size that is returned
        return TensorType("int64", ())
    shape = tuple(
        size if isinstance(size, int) else re.sub(r"\w+", lambda m: labels.get(m[0], m[0]), str(size))
        for size in value.shape
    )
    return TensorType(_dtype_of(value, source), shape)


def _dtype_of(tensor: Any, source: str) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        numpy_dtype(name)
    except ValueError as error:
        raise SourceError(f"{source} has a value of {tensor.dtype}, which has no counterpart in numpy.") from error
    return name


# TorchScript


def _write_script(model: Any, request: SourceRequest, source: str, folder: Path, file: Path | None) -> WholeModel:
    import torch

    script, given = script_arguments(model, request, source)
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise SourceError(
                f"{source} takes {name} as a {type(value).__name__}; TorchScript runs whole on tensors alone.",
                hint="Leave it out if it has a default, or pass tensors.",
            )
    labels: dict[str, dict[int, str]] = {}
    for name, axis, label in open_axes(request.options.dynamic_shapes, list(given)):
        if name not in given:
            raise SourceError(f"dynamic_shapes names {name}; the inputs of {source} are {', '.join(given)}.")
        labels.setdefault(name, {})[axis] = label or f"{name}_dim_{axis}"
    try:
        with in_eval_mode(script), torch.inference_mode():
            result = script(*(value.clone() for value in given.values()))
    except Exception as error:
        raise SourceError(f"{source} fails on the example inputs: {cause_of(error)}") from error
    results = [leaf for leaf in _leaves(result) if leaf is not None]
    if not all(isinstance(leaf, torch.Tensor) for leaf in results):
        raise SourceError(f"{source} returns something else than tensors.", hint="Return tensors, or nests of them.")
    inputs, outputs = port_names(list(given), output_names(result), request)
    signature = Signature(
        tuple(
            Port(name, TensorType(_dtype_of(value, source), _labelled(value.shape, labels.get(own, {}))))
            for name, (own, value) in zip(inputs, given.items(), strict=True)
        ),
        # A script may return another shape for other data: one run tells the rank.
        tuple(
            Port(name, TensorType(_dtype_of(leaf, source), (None,) * leaf.dim()))
            for name, leaf in zip(outputs, results, strict=True)
        ),
    )
    path = folder / WHOLE_FILES[_SCRIPT]
    with in_eval_mode(script):
        if file is not None and script is model and not _is_training(script):
            shutil.copyfile(file, path)
        else:
            script.save(str(path))
    tensors = [*script.parameters(), *script.buffers()] if hasattr(script, "parameters") else []
    return WholeModel(_SCRIPT, path, signature, sum(t.numel() * t.element_size() for t in tensors))


def _is_training(script: Any) -> bool:
    return any(getattr(module, "training", False) for module in script.modules())


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _labelled(shape: Iterable[int], labels: Mapping[int, str]) -> tuple[int | str, ...]:
    return tuple(labels.get(axis, size) for axis, size in enumerate(shape))
