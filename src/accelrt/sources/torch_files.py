"""What a PyTorch file is, told by its content, and how it is opened without running a pickle."""

from __future__ import annotations

import itertools
import json
import os
import pickletools
import re
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from accelrt.errors import SourceError

FileKind: TypeAlias = Literal["torchscript", "exported-program", "aoti-package", "pickle"]
"""``aoti-package``: machine code of AOTInductor, which no other engine can read."""

_ENVIRON = threading.Lock()


def recognises_file(path: Path) -> FileKind | None:
    """Tell which kind of PyTorch file this is, or None. Needs no torch and trusts no suffix."""
    if not path.is_file():
        return None
    if not zipfile.is_zipfile(path):
        return "pickle" if _is_plain_pickle(path) else None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return None
    return _kind_of(names)


def _kind_of(names: Sequence[str]) -> FileKind | None:
    # torch puts every member under one folder, named after the file; programs before 2.8 had none.
    inside = {name.partition("/")[2] for name in names}
    if any(name.startswith("data/aotinductor/") for name in inside):
        return "aoti-package"  # first: torch would load its machine code even where a program lies beside it
    if "serialized_exported_program.json" in names:
        return "exported-program"
    if "archive_format" in inside and any(name.startswith("models/") for name in inside):
        return "exported-program"
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return "torchscript"
    return "pickle" if "data.pkl" in inside else None


def _is_plain_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
        if len(head) < 2 or head[0] != 0x80 or not 2 <= head[1] <= 5:
            return False
        file.seek(0)
        try:  # a few operations tell a pickle from other bytes; genops only reads, it runs nothing
            list(itertools.islice(pickletools.genops(file), 3))
        except Exception:  # noqa: BLE001 - genops raises whatever the bytes provoke; none of it is a pickle
            return False
    return True


def load_script(path: Path) -> Any:
    """Load a TorchScript file onto the CPU."""
    import torch

    return torch.jit.load(str(path), map_location="cpu")


def load_program(path: Path) -> Any:
    """Load a ``.pt2`` file without letting it unpickle objects or evaluate expressions of its own making.

    `torch.export.load` falls back to full pickles and evaluates the symbolic sizes in the file. Both are
    refused here; the rest relies on torch's own reader, so a file from an unknown source stays a risk.

    Raises:
        SourceError: The file asks for one of these.
    """
    import torch

    _vet(path)
    with _weights_only():
        return torch.export.load(str(path))


def _vet(path: Path) -> None:
    for name, read in _records(path):
        if re.search(r"(custom|opaque)_obj_", name, re.IGNORECASE):
            raise SourceError(
                f"{path} holds a pickled object ({name}), and pickles are never loaded.",
                hint="Export the model to ONNX where it was made, and pass the .onnx file.",
            )
        if name.lower().endswith(".json"):
            for expression in _expressions(json.loads(read())):
                if not _is_harmless(expression):
                    raise SourceError(
                        f"{path} holds a symbolic size that is not plain arithmetic: {expression[:80]!r}.",
                        hint="The file may be hostile; export the model again with torch.export.save.",
                    )


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    # By torch's own reader where it can: two zip readers may see different members in one file.
    import torch

    try:
        reader = torch._C.PyTorchFileReader(str(path))
    except RuntimeError:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, lambda name=name: archive.read(name)
    else:
        for name in reader.get_all_records():
            yield name, lambda name=name: reader.get_record(name)


def _expressions(data: object) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            if key == "expr_str":
                yield str(value)
            else:
                yield from _expressions(value)
    elif isinstance(data, list):
        for value in data:
            yield from _expressions(value)


def _is_harmless(expression: str) -> bool:
    """Sizes are arithmetic over symbols, and functions of sympy and torch, all of which are capitalised."""
    expression = re.sub(r"\bSymbol\('\w+'", "Symbol(x", expression)
    if not re.fullmatch(r"[\w\s+\-*/%(),.<>=!&|~]*", expression, re.ASCII) or "__" in expression:
        return False
    called = re.findall(r"([A-Za-z_]\w*)\s*\(", expression)
    attributes = re.search(r"[A-Za-z_)]\s*\.|\.\s*[A-Za-z_]", expression)
    return attributes is None and all(name[0].isupper() for name in called)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make `torch.load` refuse objects: the one switch that reaches the calls inside `torch.export.load`."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _ENVIRON:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
