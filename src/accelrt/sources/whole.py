"""A source in its framework's own form: written into a folder when somebody wants it whole, and opened again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelrt.backend import WHOLE_FILES
from accelrt.errors import SourceError
from accelrt.graph.types import Signature
from accelrt.sources.request import SourceRequest

DESCRIPTION = "whole.json"


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A source on disk, described by plain data.

    ``path`` is the one file that holds it, ``format`` one of `accelrt.backend.WHOLE_FILES`; ``signature`` has the names
    that the converted graph would have. ``weight_bytes`` counts parameters and constants, None where nobody counted.
    """

    format: str
    path: Path
    signature: Signature
    weight_bytes: int | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data; the path is a name within its folder."""
        return {
            "format": self.format,
            "path": self.path.name,
            "signature": self.signature.to_json(),
            "weight_bytes": self.weight_bytes,
        }


@dataclass(frozen=True, slots=True)
class WholeSource:
    """A source that can be had whole. Nothing has been paid for it until it is written.

    Attributes:
        framework: ``torch``, ``tensorflow``, or ``open-inference`` for a model that a server holds.
        formats: What it can be written as, best first.
        capture: Writes it into an empty folder in one of the formats that are accepted.
    """

    framework: str
    formats: tuple[str, ...]
    capture: Callable[[Path, Collection[str]], WholeModel]

    def write(self, folder: Path, accepted: Collection[str] | None = None) -> WholeModel:
        """Write the source and its description into an empty folder, from which `open_whole` reads it.

        Args:
            folder: Where to.
            accepted: Formats that will do; None for any.

        Raises:
            SourceError: The source cannot be captured in any of them; says what was tried and how it failed.
        """
        model = self.capture(folder, self.formats if accepted is None else accepted)
        (folder / DESCRIPTION).write_text(json.dumps(model.to_json()))
        return model


def open_whole(folder: Path) -> WholeModel:
    """Return what `WholeSource.write` wrote into a folder.

    Raises:
        SourceError: There is none, or its description is malformed.
    """
    try:
        data: Mapping[str, Any] = json.loads((folder / DESCRIPTION).read_bytes())
        format_, path = data["format"], folder / WHOLE_FILES[data["format"]]
        signature = Signature.from_json(data["signature"])
        weight_bytes = data["weight_bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{folder} holds no source that was written whole: {type(error).__name__}: {error}."
        ) from error
    if not path.is_file():
        raise SourceError(f"{folder} describes a {format_} source, and its file {path.name!r} is missing.")
    return WholeModel(format_, path, signature, weight_bytes if type(weight_bytes) is int else None)


def whole_source(model: Any, request: SourceRequest) -> WholeSource | None:
    """Return how a model can be had whole, None if it is ONNX or nothing that accelrt knows.

    Looks at the kind of the model alone: what is wrong with it shows when it is written.
    """
    from accelrt.sources import served, tensorflow_files, torch_files

    if served.recognises(model):
        return WholeSource("open-inference", (served.FORMAT,), partial(served.write, model, request))
    if isinstance(model, str | Path) or hasattr(model, "__fspath__"):
        model = Path(model)
        kind = torch_files.recognises_file(model)
        if kind in ("torchscript", "exported-program"):
            return _torch(model, request, ("torchscript",) if kind == "torchscript" else ("torch.export",))
        if tensorflow_files.recognises_file(model) in ("saved-model", "keras", "graph-def"):
            return _tensorflow(model, request)
        return None
    if isinstance(model, bytes | bytearray | memoryview):
        return None
    from accelrt.sources import tensorflow, torch

    if torch.recognises(model):
        from accelrt.sources.torch_whole import formats_of

        return _torch(model, request, formats_of(model))
    return _tensorflow(model, request) if tensorflow.recognises(model) else None


def _torch(model: Any, request: SourceRequest, formats: tuple[str, ...]) -> WholeSource:
    def capture(folder: Path, accepted: Collection[str]) -> WholeModel:
        from accelrt.sources.torch_whole import write

        return write(model, request, folder, accepted)

    return WholeSource("torch", formats, capture)


def _tensorflow(model: Any, request: SourceRequest) -> WholeSource:
    def capture(folder: Path, accepted: Collection[str]) -> WholeModel:
        from accelrt.sources.tensorflow_whole import write

        if "saved_model" not in accepted:
            raise SourceError(f"A TensorFlow model is had whole as a SavedModel only, not as {', '.join(accepted)}.")
        return write(model, request, folder)

    return WholeSource("tensorflow", ("saved_model",), capture)
