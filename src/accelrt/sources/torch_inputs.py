"""What a PyTorch model is opened and called with: files, example inputs, open dimensions, quiet exporters."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.errors import SourceError
from accelrt.sources.request import SourceRequest
from accelrt.sources.torch_files import FileKind, load_program, load_script

_EXAMPLE = (
    "Pass what the model takes, e.g. accelrt.compile(model, example_inputs=(torch.randn(1, 3, 224, 224),)) "
    'or example_inputs={"input_ids": ids}.'
)


def refuse_file(path: Path, kind: FileKind | None) -> None:
    """Refuse a file that is no model of PyTorch, or one that would run code.

    Raises:
        SourceError: It is such a file.
    """
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


def require(package: str, source: str) -> None:
    """Raise `SourceError` where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SourceError(
            f"{source} needs {package}, which is not installed.", hint="Run: pip install 'accelrt[torch]'"
        )


def open_file(path: Path, kind: FileKind | None) -> object:
    """Open a TorchScript or ``.pt2`` file.

    Raises:
        SourceError: torch cannot read it.
    """
    try:
        with quiet():
            return load_script(path) if kind == "torchscript" else load_program(path)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{path} cannot be loaded: {cause_of(error)}", hint="The file may be damaged, or of another torch version."
        ) from error


def script_arguments(model: Any, request: SourceRequest, source: str) -> tuple[Any, dict[str, Any]]:
    """Return a script whose parameters are all given, and the examples by parameter, in order.

    Raises:
        SourceError: The examples do not fit the parameters.
    """
    import torch

    is_module = isinstance(model, torch.jit.ScriptModule)
    arguments = model.forward.schema.arguments[1:] if is_module else model.schema.arguments
    parameters = [argument.name for argument in arguments]
    args, kwargs = examples_of(request, source, parameters, device_of(model) if is_module else None)
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
    return model, given


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


def examples_of(
    request: SourceRequest, source: str, parameters: Sequence[str], device: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs as torch's, positional ones and those by name, in the order of the parameters.

    Raises:
        SourceError: There are none.
    """
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


def device_of(module: Any) -> Any:
    """Return where a module's weights are, None if it has none."""
    first = next(module.parameters(), None)
    return None if first is None else first.device


def open_axes(shapes: Any, parameters: Sequence[str]) -> Iterator[tuple[str, int, str | None]]:
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
def in_eval_mode(model: Any) -> Iterator[None]:
    """Put a module into eval mode, and back into the mode it was in."""
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
def quiet() -> Iterator[None]:
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


def cause_of(error: BaseException) -> str:
    """Return what an error of torch says, in one line, without its pages of advice."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(cause)).splitlines() if line.strip()]
    message = " ".join(lines[:3])
    return f"{type(cause).__name__}: {message[:500].rstrip('.')}."
