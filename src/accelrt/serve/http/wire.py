"""Requests and replies of inference: JSON, and raw tensors after it (the extension ``binary_tensor_data``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np
import orjson

from accelrt.errors import RequestError, RequestTooLarge
from accelrt.graph.types import Value
from accelrt.protocol.datatypes import datatype_of, dtype_of, from_raw, shown, to_raw
from accelrt.serve.http.bodies import guard_depth, quote_not_finite
from accelrt.serve.http.replies import BINARY, Reply
from accelrt.serve.interface import InferRequest, InferResponse, ModelMetadata
from accelrt.serve.settings import Limits
from accelrt.serve.shared_memory import SharedMemoryRegistry
from accelrt.serve.tensors import from_json, numbers_of, to_json

HEADER_LENGTH = "inference-header-content-length"
JOINED_BYTES = 64 * 2**10
"""Raw tensors up to this size are copied behind the JSON, which is quicker than a second write."""

_ABSENT = b""


class _InputParameters(msgspec.Struct, gc=False):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: int = 0
    shared_memory_byte_size: int | None = None


class _Input(msgspec.Struct, gc=False):
    name: str
    shape: list[int]
    datatype: str
    parameters: _InputParameters | None = None
    data: msgspec.Raw = msgspec.Raw(_ABSENT)


class _OutputParameters(msgspec.Struct, gc=False):
    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: int = 0
    shared_memory_byte_size: int | None = None


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: _OutputParameters | None = None


class _Request(msgspec.Struct, gc=False):
    inputs: list[_Input]
    outputs: list[_Output] | None = None
    id: str = ""
    parameters: dict[str, str | int | float | bool] | None = None


_DECODER = msgspec.json.Decoder(_Request)


@dataclass(slots=True)
class Wishes:
    """How a client wants its outputs.

    Attributes:
        binary: Raw rather than as JSON.
        exceptions: Outputs that are wanted the other way round.
        placed: Outputs that go to shared memory: region, offset and bytes that there are for it.
    """

    binary: bool = False
    exceptions: frozenset[str] = frozenset()
    placed: Mapping[str, tuple[str, int, int]] | None = None


Reach = Callable[[], SharedMemoryRegistry]
"""Returns shared memory if the client may use it, and raises `NotAllowed` if not."""


def header_length(value: str | None) -> int | None:
    """Return what the header ``Inference-Header-Content-Length`` says, None where it is not there.

    Raises:
        RequestError: It is no number.
    """
    if value is None:
        return None
    if not value.isdecimal() or not value.isascii() or len(value) > 18:
        raise RequestError(f"Inference-Header-Content-Length must be a number of bytes, not {shown(value)}.")
    return int(value)


def read_request(
    body: bytes | memoryview,
    json_length: int | None,
    limits: Limits,
    arrived_ns: int = 0,
    reach: Reach | None = None,
) -> tuple[InferRequest, Wishes]:
    """Return the request that a body holds.

    Args:
        body: All of it; arrays are views of it where they can be.
        json_length: Bytes of JSON at its beginning, None if it is nothing else.
        limits: What is taken.
        arrived_ns: When its last byte came.
        reach: Asked for shared memory where tensors lie in it; None where there is none.

    Raises:
        RequestError: It is not what the protocol says.
        NotAllowed: It names shared memory, and the client may not.
    """
    if json_length is not None and json_length > len(body):
        raise RequestError(
            f"Inference-Header-Content-Length says {json_length} bytes of JSON; the body has {len(body)}."
        )
    if (len(body) if json_length is None else json_length) > limits.json_bytes:
        raise RequestTooLarge(
            f"The JSON has more than {limits.json_bytes} bytes.", hint="Send large tensors as binary data."
        )
    text = bytes(body if json_length is None else body[:json_length])
    asked = _parse(text, limits)
    if len(asked.inputs) > limits.tensors or (asked.outputs is not None and len(asked.outputs) > limits.tensors):
        raise RequestTooLarge(f"A request may name {limits.tensors} inputs and as many outputs.")
    inputs: dict[str, Value] = {}
    at = len(text)
    for tensor in asked.inputs:
        name, parameters = tensor.name, tensor.parameters
        size = None if parameters is None else parameters.binary_data_size
        if name in inputs:
            raise RequestError(f"The input {shown(name)} is there twice.")
        if size is not None:
            if json_length is None or len(tensor.data):
                raise RequestError(
                    f"The input {shown(name)} says that its data is binary; "
                    + ("it has JSON data too." if len(tensor.data) else "Inference-Header-Content-Length is missing.")
                )
            inputs[name] = from_raw(name, tensor.datatype, tensor.shape, body, at, size)
            at += size
        elif len(tensor.data):
            inputs[name] = from_json(name, tensor.datatype, tensor.shape, tensor.data)
        elif parameters is not None and parameters.shared_memory_region is not None:
            region, offset, size = _place(name, parameters)
            inputs[name] = from_raw(name, tensor.datatype, tensor.shape, _reached(reach).read(region, offset, size))
        else:
            raise RequestError(f"The input {shown(name)} has no data.")
    if at != len(body):
        raise RequestError(f"{len(body) - at} bytes are left over after the last input.")
    return _request(asked, inputs, arrived_ns, reach)


def _place(name: str, parameters: _InputParameters | _OutputParameters) -> tuple[str, int, int]:
    """Return region, offset and bytes of a tensor in shared memory."""
    region, offset, size = (
        parameters.shared_memory_region,
        parameters.shared_memory_offset,
        parameters.shared_memory_byte_size,
    )
    if region is None or size is None or offset < 0 or size < 0:
        raise RequestError(
            f"The tensor {shown(name)} in shared memory needs shared_memory_region, shared_memory_byte_size and, if it "
            "is not 0, shared_memory_offset."
        )
    return region, offset, size


def _reached(reach: Reach | None) -> SharedMemoryRegistry:
    if reach is None:
        raise RequestError("Shared memory is not among this server's extensions.")
    return reach()


def _parse(text: bytes, limits: Limits) -> _Request:
    guard_depth(text, limits.json_depth)
    try:
        return _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        quoted = quote_not_finite(text)
        reason = str(error)
    if quoted is not None:
        try:
            return _DECODER.decode(quoted)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error)
    raise RequestError(f"The request is not what the protocol says: {reason}.")


def _request(
    asked: _Request, inputs: dict[str, Value], arrived_ns: int, reach: Reach | None
) -> tuple[InferRequest, Wishes]:
    request = InferRequest(inputs, None, asked.id, arrived_ns=arrived_ns)
    binary = False
    if asked.parameters:
        binary = _take_parameters(request, dict(asked.parameters))
    if not asked.outputs:
        return request, _BINARY if binary else _PLAIN
    names, exceptions, placed = [], set(), {}
    for output in asked.outputs:
        if output.name in names:
            raise RequestError(f"The output {shown(output.name)} is asked for twice.")
        names.append(output.name)
        if (parameters := output.parameters) is None:
            continue
        if parameters.classification:
            raise RequestError("Classification is not among this server's extensions.")
        if parameters.shared_memory_region is not None:
            _reached(reach)
            placed[output.name] = _place(output.name, parameters)
            continue
        if parameters.binary_data is not None and parameters.binary_data is not binary:
            exceptions.add(output.name)
    request.outputs = names
    if exceptions or placed:
        return request, Wishes(binary, frozenset(exceptions), placed or None)
    return request, _BINARY if binary else _PLAIN


_PLAIN, _BINARY = Wishes(), Wishes(binary=True)


def _take_parameters(request: InferRequest, parameters: dict[str, Any]) -> bool:
    """Set what the parameters of a request say, and return whether outputs are wanted raw."""
    binary = parameters.pop("binary_data_output", False)
    if type(binary) is not bool:
        raise RequestError("The parameter binary_data_output must be true or false.")
    request.priority = _whole(parameters, "priority")
    request.timeout_us = _whole(parameters, "timeout")
    if parameters.get("sequence_id") or parameters.get("sequence_start") or parameters.get("sequence_end"):
        raise RequestError("Sequences are not among this server's extensions: each request stands for itself.")
    request.parameters = parameters
    return binary


def _whole(parameters: dict[str, Any], name: str) -> int:
    value = parameters.pop(name, 0)
    if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise RequestError(f"The parameter {name} must be a whole number from 0, not {shown(value)}.")
    return value


def read_raw_request(
    body: bytes | memoryview, metadata: ModelMetadata, arrived_ns: int = 0
) -> tuple[InferRequest, Wishes]:
    """Return the request of a body that is the raw data of a model's only input, and nothing else.

    One size may be open; it follows from the body's length. An input of BYTES is one element, the whole body.

    Raises:
        RequestError: The model or the body does not allow it.
    """
    if len(metadata.inputs) != 1:
        raise RequestError(
            f"A raw body is for models with one input; {metadata.name} has {len(metadata.inputs)}.",
            hint="Send JSON before the tensors, and its length in Inference-Header-Content-Length.",
        )
    port = metadata.inputs[0]
    shape = list(port.shape)
    if port.datatype == "BYTES":
        if any(size not in (1, -1) for size in shape):
            raise RequestError(f"A raw body is one element; the input {shown(port.name)} has the shape {shape}.")
        array = np.empty([1] * len(shape), object)
        array[...] = bytes(body)
        return InferRequest({port.name: array}, arrived_ns=arrived_ns), _BINARY
    if shape.count(-1) > 1:
        raise RequestError(f"A raw body leaves open which of the sizes {shape} of {shown(port.name)} it has.")
    if -1 in shape:
        row = dtype_of(port.datatype).itemsize
        for size in shape:
            row *= size if size != -1 else 1
        if row == 0 or len(body) % row:
            raise RequestError(
                f"{len(body)} bytes are no whole number of rows of {shown(port.name)}, {row} bytes each."
            )
        shape[shape.index(-1)] = len(body) // row
    array = from_raw(port.name, port.datatype, shape, body)
    return InferRequest({port.name: array}, arrived_ns=arrived_ns), _BINARY


def write_response(response: InferResponse, wishes: Wishes, regions: SharedMemoryRegistry | None = None) -> Reply:
    """Return the reply for an answer.

    Args:
        response: The answer.
        wishes: How the client wants it.
        regions: Shared memory, for outputs that go there.

    Raises:
        RequestError: An output has no form in JSON, and was not asked for as binary data; or the protocol carries no
            such thing.
    """
    outputs: list[dict[str, Any]] = []
    raw: list[bytes | memoryview] = []
    numbers: list[tuple[dict[str, Any], str, np.ndarray[Any, Any]]] = []
    exceptions = wishes.exceptions
    for name, value in response.outputs.items():
        array = value if type(value) is np.ndarray else _array(name, value)
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": array.shape}
        if wishes.placed is not None and regions is not None and (place := wishes.placed.get(name)) is not None:
            region, offset, room = place
            data = to_raw(array)
            regions.write(region, offset, room, data)
            entry["parameters"] = {
                "shared_memory_region": region,
                "shared_memory_offset": offset,
                "shared_memory_byte_size": len(data),
            }
        elif wishes.binary is (name not in exceptions):
            data = to_raw(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        elif (flat := numbers_of(array)) is not None:
            entry["data"] = flat
            numbers.append((entry, name, array))
        else:
            entry["data"] = to_json(name, array)
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = _plain(response.parameters)
    document["outputs"] = outputs
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if numbers and b"null" in text:  # a number that is not finite, most likely; looking for them first takes longer
        for entry, name, array in numbers:
            entry["data"] = to_json(name, array)
        text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raw:
        return Reply(200, text)
    headers = {HEADER_LENGTH: str(len(text))}
    if sum(map(len, raw)) <= JOINED_BYTES:
        return Reply(200, b"".join((text, *raw)), BINARY, headers)
    return Reply(200, text, BINARY, headers, tuple(raw))


def _array(name: str, value: Value) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    kind = "an empty optional" if value is None else f"a {type(value).__name__}"
    raise RequestError(
        f"The output {shown(name)} is {kind}; the protocol has tensors only.",
        hint="Name the other outputs.",
    )


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", dict(parameters))
