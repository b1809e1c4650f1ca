"""Values on their way in and out of a model: files, random numbers, JSON. No file is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelrt.cli.common import number_or_text
from accelrt.errors import AccelrtError, InputError

if TYPE_CHECKING:
    import numpy as np

    from accelrt.graph.types import Signature, Value

_SUFFIXES = (".npy", ".npz", ".json")


def read_arrays(path: Path) -> dict[str, Value]:
    """Read named values from an ``.npz``, or from a ``.json`` that holds an object.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    content = read_file(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds one value without a name.", hint="Write NAME=FILE, or use an .npz file.")
    return content


def read_file(path: Path) -> Any:
    """Read what an ``.npy`` (an array), ``.npz`` (arrays by name) or ``.json`` file holds.

    Raises:
        InputError: The file cannot be read as what its name says.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} is not an input file.", hint=f"Inputs are read from {', '.join(_SUFFIXES)} files.")
    try:
        return json.loads(path.read_bytes()) if path.suffix == ".json" else _read_numpy(path)
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"The input file {path} cannot be read: {reason}") from error


def _read_numpy(path: Path) -> Any:
    import numpy as np

    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        with loaded:
            return {name: _array(loaded[name], name) for name in loaded.files}
    return loaded


def _array(content: Any, name: str) -> np.ndarray[Any, Any]:
    """Return an array of an ``.npz``; numpy hands over what is none as bytes."""
    if isinstance(content, bytes):
        raise ValueError(f"{name!r} is not an array")
    return cast("np.ndarray[Any, Any]", content)


def read_inputs(texts: Sequence[str], signature: Signature) -> dict[str, Value]:
    """Read ``--input`` texts: ``NAME=FILE``, or ``FILE`` for all inputs, or for the only one.

    Raises:
        InputError: A file cannot be read, or it is not clear which input it is for.
    """
    found: dict[str, Value] = {}
    for text in texts:
        for name, value in _read_input(text, signature).items():
            if name in found:
                raise InputError(f"The input {name!r} is given twice.")
            found[name] = value
    return found


def _read_input(text: str, signature: Signature) -> dict[str, Value]:
    name, equals, file = text.partition("=")
    # A path may hold an equals sign itself.
    if equals and (name in signature.input_names or not Path(text).exists()):
        content = read_file(Path(file))
        return {name: _only(content, file) if Path(file).suffix == ".npz" else content}
    content = read_file(Path(text))
    if isinstance(content, dict):
        return content
    if len(signature.inputs) != 1:
        names = ", ".join(signature.input_names) or "none"
        raise InputError(f"{text} holds one value; the model's inputs are {names}.", hint=f"Write NAME={text}.")
    return {signature.input_names[0]: content}


def _only(content: Mapping[str, Value], file: str) -> Value:
    if len(content) != 1:
        raise InputError(f"{file} holds {len(content)} arrays, not one.", hint="Leave NAME= out to use all by name.")
    return next(iter(content.values()))


def random_inputs(signature: Signature, sizes: Mapping[str, int], seed: int) -> dict[str, Value]:
    """Draw a value for every input; imports what that needs."""
    from accelrt.runtime import draw

    return draw.random_inputs(signature, sizes, seed)


def to_json(value: Value) -> Any:
    """Return an output as plain data: dtype, shape and nested lists for a tensor, a list for a sequence."""
    if value is None:
        return None
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return {"dtype": dtype_name(value), "shape": list(value.shape), "values": _plain(plain_array(value).tolist())}


def dtype_name(array: np.ndarray[Any, Any]) -> str:
    """Return the name of an array's data type as signatures have it."""
    return "string" if array.dtype.kind in "OUT" else array.dtype.name


def _plain(item: Any) -> Any:
    if isinstance(item, list):
        return [_plain(each) for each in item]
    if isinstance(item, float):
        return number_or_text(item)
    if isinstance(item, complex):
        return [number_or_text(item.real), number_or_text(item.imag)]
    return item


def plain_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same values in a type of numpy's own: text as text, bfloat16 and its like as float32, int4 as int8."""
    import numpy as np

    array = np.asarray(array)
    if array.dtype.kind == "O":
        return array.astype(np.str_)
    if array.dtype.isbuiltin == 1:
        return array
    return array.astype(np.int8 if "int" in array.dtype.name else np.float32)


def write_npz(path: Path, outputs: Mapping[str, Value]) -> None:
    """Write outputs to an ``.npz``: elements of a sequence as ``name.0``, ``name.1``; an empty optional is left out.

    Raises:
        AccelrtError: The file cannot be written.
    """
    import zipfile

    from numpy.lib.format import write_array

    arrays: dict[str, Any] = {}
    for name, value in outputs.items():
        _flatten(name, value, arrays)
    try:
        # Not numpy.savez: it takes names as keyword arguments, and some are its own.
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    write_array(member, array, allow_pickle=False)
    except OSError as error:
        raise AccelrtError(f"The outputs cannot be written to {path}: {error.strerror or error}") from error


def _flatten(name: str, value: Value, arrays: dict[str, Any]) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _flatten(f"{name}.{index}", item, arrays)
    elif value is not None:
        arrays[name] = plain_array(value)
