"""From a ``ModelInferRequest`` to what models take, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from accelrt.errors import RequestError
from accelrt.protocol.datatypes import TYPED, Array, datatype_of, from_contents, from_raw, to_contents, to_raw
from accelrt.protocol.wire import (
    BYTE_SIZE,
    OFFSET,
    REGION,
    Parameters,
    Parts,
    WireInfer,
    WireTensor,
    write_response,
)
from accelrt.serve.interface import InferRequest, InferResponse
from accelrt.serve.shared_memory import SharedMemoryRegistry


@dataclass(slots=True)
class Answering:
    """How a request wants its answer: what lies in shared memory, and whether tensors are to be typed."""

    placed: dict[str, Parameters] = field(default_factory=dict)
    typed: bool = False
    final_flag: bool = False


def uses_shared_memory(wire: WireInfer) -> bool:
    """Tell whether a tensor of a request lies in shared memory, or is to be put there."""
    return any(REGION in tensor.parameters for tensor in wire.tensors) or any(REGION in told for _, told in wire.asked)


def request_of(wire: WireInfer, regions: SharedMemoryRegistry, arrived_ns: int) -> tuple[InferRequest, Answering]:
    """Return a request as models take it, and how it is to be answered.

    Raises:
        RequestError: Its tensors are not what it says they are, or sent in two ways at once.
    """
    inputs: dict[str, Array] = {}
    raw = iter(wire.raw)
    for tensor in wire.tensors:
        if tensor.name in inputs:
            raise RequestError(f"The request has two inputs {tensor.name!r}.")
        inputs[tensor.name] = _input(tensor, raw, bool(wire.raw), regions)
    if next(raw, None) is not None:
        raise RequestError(f"The request has {len(wire.raw)} raw_input_contents, more than it has inputs for.")
    answering = Answering(typed=not wire.raw and any(tensor.contents is not None for tensor in wire.tensors))
    names = [name for name, _ in wire.asked]
    if len(set(names)) != len(names):
        raise RequestError("The request asks for an output twice.")
    for name, told in wire.asked:
        if told:
            if "classification" in told:
                raise RequestError(f"Output {name!r} is asked for as a classification, which this server does not do.")
            if REGION in told:
                answering.placed[name] = told
    parameters: Mapping[str, Any] = wire.parameters
    priority = timeout = 0
    if parameters:
        rest = dict(parameters)
        priority, timeout = _count(rest, "priority"), _count(rest, "timeout")
        if rest.get("sequence_id") or rest.get("sequence_start") or rest.get("sequence_end"):
            raise RequestError("Sequences are not among this server's extensions: each request stands for itself.")
        answering.final_flag = rest.pop("triton_enable_empty_final_response", False) is True
        parameters = rest
    return InferRequest(inputs, names or None, wire.id, priority, timeout, parameters, arrived_ns), answering


def response_of(
    response: InferResponse, answering: Answering, regions: SharedMemoryRegistry, *, streamed: bool = False
) -> Parts:
    """Return a response as parts of a message to be joined, with what belongs there in shared memory.

    Raises:
        RequestError: An output does not fit its place, or the protocol has no name for its type.
    """
    outputs: dict[str, Array] = {}
    for name, value in response.outputs.items():
        if isinstance(value, list) or value is None:
            raise RequestError(
                f"Output {name!r} is no tensor, and the protocol carries nothing else.",
                hint="Name the other outputs in the request.",
            )
        outputs[name] = np.asarray(value)
    placed: dict[str, Parameters] = {}
    for name, told in answering.placed.items():
        if name in outputs:
            data = to_raw(outputs[name])
            region, offset, room = _place(name, told)
            regions.write(region, offset, room, data)
            placed[name] = {REGION: region, OFFSET: offset, BYTE_SIZE: len(data)}
    typed: dict[str, bytes] | None = None
    if answering.typed and all(datatype_of(array) in TYPED for array in outputs.values()):
        typed = {name: to_contents(array) for name, array in outputs.items() if name not in placed}
    parameters = response.parameters
    if streamed and answering.final_flag:
        parameters = {**parameters, "triton_final_response": True}
    return write_response(
        response.model_name,
        response.model_version,
        outputs,
        placed=placed,
        typed=typed,
        parameters=parameters,
        id=response.id,
    )


def _input(tensor: WireTensor, raw: Any, any_raw: bool, regions: SharedMemoryRegistry) -> Array:
    name, parameters = tensor.name, tensor.parameters
    if REGION in parameters:
        if tensor.contents is not None:
            raise RequestError(f"Input {name!r} has contents and lies in shared memory.")
        region, offset, size = _place(name, parameters)
        return from_raw(name, tensor.datatype, tensor.shape, regions.read(region, offset, size))
    if any_raw:
        if tensor.contents is not None:
            raise RequestError(
                f"Input {name!r} has typed contents, and the request has raw_input_contents.",
                hint="A request sends all of its tensors in one of the two ways.",
            )
        data = next(raw, None)
        if data is None:
            raise RequestError(f"Input {name!r} has no raw_input_contents: there are fewer of them than inputs.")
        return from_raw(name, tensor.datatype, tensor.shape, data)
    return from_contents(name, tensor.datatype, tensor.shape, tensor.contents or b"")


def _place(name: str, parameters: Parameters) -> tuple[str, int, int]:
    region, offset, size = parameters[REGION], parameters.get(OFFSET, 0), parameters.get(BYTE_SIZE)
    if not isinstance(region, str) or type(offset) is not int or type(size) is not int or offset < 0 or size < 0:
        raise RequestError(f"Tensor {name!r} needs {REGION}, {BYTE_SIZE} and {OFFSET}: a text and two counts.")
    return region, offset, size


def _count(parameters: dict[str, Any], name: str) -> int:
    value = parameters.pop(name, 0)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise RequestError(f"The parameter {name} must be a count, not {str(value)[:40]!r}.")
    return value
