"""Inputs without datatypes: JSON, CSV and npy become what a model's inputs want, and outputs become these again."""

from __future__ import annotations

import csv
import io
import math
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import orjson

from accelrt.errors import RequestError, RequestTooLarge, ServingError
from accelrt.graph.types import Value
from accelrt.protocol.datatypes import datatype_of, dtype_of, shown
from accelrt.serve.http.bodies import guard_depth, quote_not_finite
from accelrt.serve.http.replies import HttpError, Reply
from accelrt.serve.interface import InferResponse, TensorMetadata
from accelrt.serve.settings import Limits
from accelrt.serve.tensors import BINARY_ONLY, from_json, to_json

Array: TypeAlias = np.ndarray[Any, Any]

CSV, NPY = "text/csv", "application/x-npy"
JSON_KINDS = frozenset({"", "application/json", "application/x-www-form-urlencoded"})
"""Content types that are read as JSON: also none, and what ``curl -d`` says if it is not told."""

_MAGIC = b"\x93NUMPY"
_LONGEST_NPY_HEADER = 4096


def parse(text: bytes, limits: Limits) -> Any:
    """Return what a JSON text says, as plain Python.

    Raises:
        RequestError: It is no JSON, or nested too deeply.
    """
    guard_depth(text, limits.json_depth)
    reason = "it is empty"
    for candidate in (text, quote_not_finite(text)):
        if candidate:
            try:
                return msgspec.json.decode(candidate)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                reason = str(error)
    raise RequestError(f"The body is no JSON: {reason}.")


def inputs_of_json(document: Any, ports: Sequence[TensorMetadata]) -> dict[str, Value]:
    """Return a model's inputs from JSON.

    Args:
        document: ``{"instances": [...]}`` with a row of data, or an object of them by name, for each instance;
            ``{"inputs": ...}``, an object of data by name, or such an object itself; or the data of the only input.
        ports: What the model takes.

    Raises:
        RequestError: It does not fit.
    """
    if isinstance(document, dict):
        if "instances" in document:
            return inputs_of_json(_columns(document["instances"]), ports)
        if "inputs" in document and not any(port.name == "inputs" for port in ports):
            return inputs_of_json(document["inputs"], ports)
        return _named(document, ports)
    if len(ports) != 1:
        raise RequestError(
            f"The model has the inputs {', '.join(port.name for port in ports)}: send an object with data for each."
        )
    return _named({ports[0].name: document}, ports)


def _columns(instances: Any) -> Any:
    """Turn a list of objects by name into an object of lists by name."""
    if not isinstance(instances, list):
        raise RequestError('"instances" must be a list.')
    if not instances or not all(isinstance(instance, dict) for instance in instances):
        return instances
    names = instances[0].keys()
    if any(instance.keys() != names for instance in instances):
        raise RequestError("All instances must name the same inputs.")
    return {name: [instance[name] for instance in instances] for name in names}


def _named(data: Mapping[str, Any], ports: Sequence[TensorMetadata]) -> dict[str, Value]:
    known = {port.name: port for port in ports}
    unknown = [name for name in data if name not in known]
    if unknown:
        raise RequestError(f"The model has no input {shown(unknown[0])}; it has {', '.join(known)}.")
    return {name: tensor(known[name], _text(items)) for name, items in data.items()}


def _text(items: Any) -> bytes:
    try:
        return orjson.dumps(items)
    except orjson.JSONEncodeError:  # a whole number of more than 64 bits is all that JSON can hold and orjson cannot
        raise RequestError("A number has more than 64 bits.") from None


def tensor(port: TensorMetadata, text: bytes) -> Array:
    """Return the array that nested JSON is for an input; a row alone becomes a batch of one.

    FP16 and BF16, which the protocol has no JSON for, are rounded from numbers here.

    Raises:
        RequestError: It does not fit.
    """
    if port.datatype in BINARY_ONLY:
        return batched(_narrowed(from_json(port.name, "FP32", None, text), dtype_of(port.datatype), port), port)
    return batched(from_json(port.name, port.datatype, None, text), port)


def batched(array: Array, port: TensorMetadata) -> Array:
    """Return an array with a first dimension of one added where only that is missing."""
    return array[np.newaxis] if array.ndim == len(port.shape) - 1 else array


def _narrowed(array: Array, dtype: np.dtype[Any], port: TensorMetadata) -> Array:
    """Return an array as another dtype.

    Raises:
        RequestError: It holds a number that the dtype cannot hold, or is of another kind.
    """
    if array.dtype == dtype:
        return array
    floating = dtype.kind == "f" or port.datatype == "BF16"
    if array.dtype.kind not in ("iuf" if floating else "iu") or dtype.kind in "bO":
        raise RequestError(f"The input {shown(port.name)} is {port.datatype}; {array.dtype} came.")
    if not floating and array.size:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if not (least <= int(array.min()) and int(array.max()) <= most):
            raise RequestError(f"The input {shown(port.name)} is {port.datatype}; a number is out of its range.")
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if floating and (np.isinf(narrow.astype(np.float64)) & np.isfinite(array)).any():
        raise RequestError(f"The input {shown(port.name)} is {port.datatype}; a number is out of its range.")
    return narrow


def inputs_of_csv(text: bytes, ports: Sequence[TensorMetadata]) -> dict[str, Value]:
    """Return a model's only input from lines of numbers, or of text, a row each.

    Raises:
        RequestError: It does not fit.
    """
    port = _only(ports, CSV)
    try:
        rows = [row for row in csv.reader(io.StringIO(text.decode("utf-8-sig"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"The body is no CSV: {error}.") from None
    if not rows:
        raise RequestError("The CSV holds no rows.")
    if port.datatype == "BYTES":
        items: Any = rows
    else:
        items = [[_number(cell) for cell in row] for row in rows]
    if port.datatype == "BOOL":
        items = [[{0: False, 1: True}.get(cell, cell) for cell in row] for row in items]
    array = tensor(port, _text(items))
    inner = port.shape[1:]
    if len(port.shape) == 1 and array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    elif len(inner) > 1 and -1 not in inner and math.prod(inner) * len(rows) == array.size:
        array = array.reshape(len(rows), *inner)  # a line holds a row's elements, whatever shape they have
    return {port.name: array}


def _number(cell: str) -> int | float | str:
    text = cell.strip()
    try:
        return int(text) if text.lstrip("+-").isdecimal() and len(text) < 40 else _float(text)
    except ValueError:
        raise RequestError(f"The CSV holds {shown(cell)}, which is no number.") from None


def _float(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def inputs_of_npy(body: bytes | memoryview, ports: Sequence[TensorMetadata]) -> dict[str, Value]:
    """Return a model's only input from an array in numpy's format. Nothing is unpickled.

    Raises:
        RequestError: It does not fit.
    """
    port = _only(ports, NPY)
    return {port.name: batched(_narrowed(read_npy(body), dtype_of(port.datatype), port), port)}


def read_npy(body: bytes | memoryview) -> Array:
    """Return the array that numpy's format holds: a view where it is in C order.

    Raises:
        RequestError: It is not numpy's format, its header and its bytes do not agree, or it holds objects.
    """
    stream = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise RequestError(f"The npy format {version} is not read.")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_LONGEST_NPY_HEADER)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise RequestError(f"The body is no npy: {str(error)[:100]}.") from None
    if dtype.kind not in "biuf" or dtype.hasobject:
        raise RequestError(f"An npy of {str(dtype)[:40]} is not taken.")
    start = stream.tell()
    if any(type(size) is not int or size < 0 for size in shape) or len(shape) > 32:
        raise RequestError(f"The npy has the shape {shown(shape)}.")
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise RequestError(f"An npy of {dtype} and shape {shown(shape)} takes other than {len(body) - start} bytes.")
    try:
        array: Array = np.ndarray(shape, dtype, bytes(body), start, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:
        raise RequestError(f"The npy has the shape {shown(shape)}: {error}.") from None
    return np.require(array, dtype.newbyteorder("="), ["C", "A"])


def _only(ports: Sequence[TensorMetadata], kind: str) -> TensorMetadata:
    if len(ports) != 1:
        raise RequestError(f"{kind} is for models with one input; this one has {len(ports)}. Send JSON.")
    return ports[0]


def write_json(response: InferResponse) -> Any:
    """Return outputs as plain data: nested lists, by name where there are several."""
    outputs = {name: _nested(name, value) for name, value in response.outputs.items()}
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def _nested(name: str, value: Value) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise ServingError(f"The output {shown(name)} is a {type(value).__name__}; JSON is made of tensors only.")
    array = np.asarray(value)
    if datatype_of(array) in BINARY_ONLY:
        array = array.astype(np.float32)
    flat = to_json(name, array)
    if isinstance(flat, np.ndarray):
        return flat.reshape(array.shape)
    items = np.empty(len(flat), object)
    items[:] = flat
    return items.reshape(array.shape).tolist()


def write(response: InferResponse, accept: str, wrap: str) -> Reply:
    """Return the reply in the first format of an ``Accept`` header that is known: JSON, CSV or npy.

    Args:
        response: The model's answer.
        accept: The header; JSON if it is empty.
        wrap: The name that JSON gives the outputs.

    Raises:
        HttpError: None of the formats is known, or several outputs were asked for in a format for one.
    """
    for item in (accept or "*/*").split(","):
        kind = item.partition(";")[0].strip().lower()
        if kind in ("*/*", "application/*", "application/json", "application/jsonlines", ""):
            document = {wrap: write_json(response)}
            return Reply(200, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
        if kind in (CSV, "text/*", NPY):
            if len(response.outputs) != 1:
                raise HttpError(406, f"{kind} is for models with one output; accept application/json.")
            ((name, value),) = response.outputs.items()
            return _npy(value) if kind == NPY else _csv(name, value)
    raise HttpError(406, f"None of {accept[:100]!r} is made here: application/json, {CSV}, {NPY}.")


def _npy(value: Value) -> Reply:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise HttpError(406, f"{NPY} holds numbers; accept application/json.")
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return Reply(200, stream.getvalue(), NPY)


def _csv(name: str, value: Value) -> Reply:
    array = np.asarray(value)
    if datatype_of(array) in BINARY_ONLY:
        array = array.astype(np.float32)
    flat = to_json(name, array)
    items = flat.tolist() if isinstance(flat, np.ndarray) and flat.dtype.itemsize != 4 else list(flat)
    width = math.prod(array.shape[1:]) if array.ndim > 1 else 1
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    if width:
        writer.writerows(items[start : start + width] for start in range(0, len(items), width))
    return Reply(200, stream.getvalue().encode(), "text/csv; charset=utf-8")


def body_inputs(
    kind: str, body: bytes | memoryview, ports: Sequence[TensorMetadata], limits: Limits
) -> dict[str, Value]:
    """Return a model's inputs from a body of a content type.

    Raises:
        HttpError: The content type is not known.
        RequestError: The body does not fit the model.
    """
    if len(body) > limits.body_bytes:
        raise RequestTooLarge(f"The body is larger than {limits.body_bytes} bytes.")
    kind = kind.partition(";")[0].strip().lower()
    if kind in JSON_KINDS | {CSV} and len(body) > limits.json_bytes:
        raise RequestTooLarge(f"The body has more than {limits.json_bytes} bytes of text.", hint=f"Send {NPY}.")
    if kind == CSV:
        return inputs_of_csv(bytes(body), ports)
    if kind == NPY or (kind == "application/octet-stream" and bytes(body[:6]) == _MAGIC):
        return inputs_of_npy(body, ports)
    if kind in JSON_KINDS:
        return inputs_of_json(parse(bytes(body), limits), ports)
    raise HttpError(415, f"The content type {kind[:60]!r} is not read here: application/json, {CSV}, {NPY}.")
