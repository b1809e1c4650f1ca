"""What a TensorFlow file or folder is, told by its content without TensorFlow; whether a Keras file is harmless."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from accelrt.errors import SourceError

FileKind: TypeAlias = Literal["saved-model", "keras", "keras-h5", "graph-def", "tflite"]

SAVED_MODEL = "saved_model.pb"
_HEAD = 1 << 16
_CONFIG_BYTES = 256 << 20
_CODE = {
    "Lambda": "a Lambda layer, whose code would be run",
    "__lambda__": "a Python function as code, which would be run",
    "TorchModuleWrapper": "a PyTorch pickle, which would be run",
    "JaxLayer": "a JAX function as code, which would be run",
    "FlaxLayer": "a Flax module as code, which would be run",
    "TFSMLayer": "the path of another model, which would be loaded",
}
# A function named in a configuration is called with arguments of the file's choosing.
_FUNCTION_MODULES = ("activations", "constraints", "initializers", "losses", "metrics", "ops", "regularizers")


def recognises_file(path: Path) -> FileKind | None:
    """Tell which kind of TensorFlow model this is, or None. Needs no TensorFlow and trusts no suffix."""
    if path.is_dir():
        return "saved-model" if (path / SAVED_MODEL).is_file() else None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras-h5"
    if head[4:8] == b"TFL3":
        return "tflite"
    if path.name == SAVED_MODEL and head[:2] == b"\x08\x01":
        return "saved-model"
    if _is_graph_def(head):
        return "graph-def"
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = {*archive.namelist()}
    except zipfile.BadZipFile:
        return None
    return "keras" if {"config.json", "metadata.json"} <= names else None


def _is_graph_def(head: bytes) -> bool:
    """Tell a GraphDef: its first field is a node, and that one's first two are texts, its name and its operator.

    An ONNX model begins with its version, a number; what ONNX puts first otherwise is never two texts in a message.
    """
    length, at = _text_at(head, 0)
    if not length:
        return False
    name, at_name = _text_at(head, at)
    if name is None or not 0 < name < length:
        return False
    operator, at_operator = _text_at(head, at_name + name, field=2)
    if operator is None or not 0 < operator < length:
        return False
    text = head[at_operator : at_operator + operator]
    return len(text) == operator and text.isascii() and text.replace(b">", b"").replace(b"_", b"").isalnum()


def _text_at(data: bytes, at: int, field: int = 1) -> tuple[int | None, int]:
    """Read the tag and length of a length-delimited field; return its length and where its content begins."""
    if at >= len(data) or data[at] != field << 3 | 2:
        return None, at
    length = shift = 0
    for index in range(at + 1, min(at + 6, len(data))):
        length |= (data[index] & 0x7F) << shift
        shift += 7
        if data[index] < 0x80:
            return length, index + 1
    return None, at


def vet_keras(path: Path) -> None:
    """Refuse a ``.keras`` file that would run code, or call or import anything but Keras's own parts.

    Keras's safe mode refuses code too; its past faults lay in what a configuration may name.

    Raises:
        SourceError: The file holds code, names something foreign, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > _CONFIG_BYTES:
                raise SourceError(f"{path} has a configuration of more than {_CONFIG_BYTES >> 20} MiB.")
            config = json.loads(archive.read("config.json"))
            if "model.weights.h5" not in archive.namelist():
                raise SourceError(f"{path} holds no weights (model.weights.h5).", hint="Is the file complete?")
            damaged = archive.testzip()
    except (OSError, ValueError, KeyError, RecursionError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as e:
        raise SourceError(f"{path} is no Keras file that can be read: {e}.", hint="Is the file complete?") from e
    if damaged is not None:
        raise SourceError(f"{path} is damaged: {damaged} does not match its checksum.")
    hint = (
        "If you trust it, load it in Python with the code it belongs to, and pass the keras.Model: "
        "accelrt.compile(keras.saving.load_model(path, ...))."
    )
    for entry in _objects(config):
        name = entry["class_name"]
        # Keras joins module and class by a dot, and looks a registered name up first.
        for part in (*name.split("."), *re.split(r"[.>]", str(entry.get("registered_name")))):
            if part in _CODE:
                raise SourceError(f"{path} holds {_CODE[part]}.", hint=hint)
        module = str(entry.get("module") or "builtins")
        parts = [part for part in module.split(".") if part != "src"]
        if parts[0] not in ("keras", "builtins") or "." in name:
            raise SourceError(f"{path} uses {name} of the module {module}, which is not part of Keras.", hint=hint)
        if name == "function" and parts[0] == "keras" and (len(parts) < 2 or parts[1] not in _FUNCTION_MODULES):
            raise SourceError(f"{path} would call {entry.get('config')!r} of the module {module}.", hint=hint)
        registered = str(entry.get("registered_name") or name)
        if ">" in registered and not registered.startswith("keras"):
            raise SourceError(f"{path} uses {registered}, a class that is not part of Keras.", hint=hint)


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("class_name"), str):
                yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value
