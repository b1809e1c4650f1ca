"""TensorFlow models whole: a SavedModel in one file, with the signature that ONNX would have."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelrt import isolation
from accelrt.backend import SAVED_MODEL_BINDING, WHOLE_FILES
from accelrt.errors import SourceError
from accelrt.graph.types import Port, Signature, TensorType, numpy_dtype
from accelrt.sources.request import SourceRequest
from accelrt.sources.tensorflow import (
    FileKind,
    Ports,
    check_options,
    is_installed,
    named_axes,
    own_names,
    plain,
    recognises_file,
    refuse,
    select,
    unlike,
)
from accelrt.sources.torch_names import port_names
from accelrt.sources.whole import WholeModel

_CHILD = "accelrt.sources.tensorflow_whole_child"
_FORMAT = "saved_model"
# A fixed time stamp, so that equal folders are equal files; the earliest that zip can say.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write(model: Any, request: SourceRequest, folder: Path) -> WholeModel:
    """Write a TensorFlow object, or the model at a path, into an empty folder as a SavedModel in one file.

    Raises:
        SourceError: The model cannot be read or saved, example inputs are missing, or names do not fit.
        IsolatedError: TensorFlow crashed or hung in the child process.
        OptionError: An option that has no meaning for this model.
    """
    check_options(request)
    source = str(model) if isinstance(model, Path) else f"the {type(model).__name__}"
    kind: FileKind | None = recognises_file(model) if isinstance(model, Path) else "saved-model"
    if isinstance(model, Path):
        refuse(model, kind, request)
    if not is_installed("tensorflow"):
        raise SourceError(
            f"{source} needs tensorflow, which is not installed.", hint="Run: pip install 'accelrt[tensorflow]'"
        )
    path = folder / WHOLE_FILES[_FORMAT]
    with tempfile.TemporaryDirectory(prefix="accelrt-tensorflow-") as scratch:
        saved = Path(scratch) / "saved_model"
        if not isinstance(model, Path):
            from accelrt.sources.tensorflow_live import describe, export

            facts = describe(export(model, request, source, saved))
        else:
            arguments: dict[str, Any] = {}
            if kind == "saved-model":
                saved = (model.parent if model.is_file() else model).absolute()
                arguments["signature"] = request.options.signature
            elif kind == "graph-def":
                # The child looks the tensors up, and names them.
                arguments.update(inputs=plain(request.input_names), outputs=plain(request.output_names))
                request = replace(request, input_names=None, output_names=None)
            facts = isolation.call(
                f"{_CHILD}:describe",
                path=str(model.absolute()),
                kind=kind,
                saved=str(saved),
                source=source,
                **arguments,
            )
        inputs, outputs = select(facts, request, source)
        binding = {
            "signature": facts["signature"],
            "inputs": [port["key"] for port in inputs],
            "outputs": [port["key"] for port in outputs],
        }
        _pack(saved, path, binding, source)
    signature = _signature(inputs, outputs, facts["batch"], request, source)
    return WholeModel(_FORMAT, path, signature, facts["weight_bytes"])


def _signature(inputs: Ports, outputs: Ports, batch: bool, request: SourceRequest, source: str) -> Signature:
    own = own_names(inputs, outputs, request)
    found = unlike([port["name"] for port in outputs], own.input_names)
    names = port_names([port["name"] for port in inputs], found, own)
    return Signature(
        *(
            tuple(Port(name, _type_of(name, port, batch, source)) for name, port in zip(side, ports, strict=True))
            for side, ports in zip(names, (inputs, outputs), strict=True)
        )
    )


def _type_of(name: str, port: Mapping[str, Any], batch: bool, source: str) -> TensorType:
    try:
        numpy_dtype(port["dtype"])
    except ValueError as error:
        raise SourceError(f"{source} has {name!r} of {port['dtype']}, which has no counterpart in numpy.") from error
    return TensorType(port["dtype"], None if port["shape"] is None else named_axes(name, port["shape"], batch))


def _pack(saved: Path, target: Path, binding: Mapping[str, Any], source: str) -> None:
    """Put a SavedModel folder into one zip file without compression: equal folders give equal bytes."""
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    if any(path.relative_to(saved).as_posix() == SAVED_MODEL_BINDING for path in files):
        raise SourceError(f"{source} holds a file {SAVED_MODEL_BINDING!r} of its own.", hint="Rename it.")
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.writestr(zipfile.ZipInfo(SAVED_MODEL_BINDING, _EPOCH), json.dumps(binding))
            for path in files:
                entry = zipfile.ZipInfo(path.relative_to(saved).as_posix(), _EPOCH)
                entry.file_size = path.stat().st_size
                with path.open("rb") as data, archive.open(entry, "w") as sink:
                    shutil.copyfileobj(data, sink, 1 << 20)
    except OSError as error:
        raise SourceError(f"{source} cannot be copied: {error}") from error
