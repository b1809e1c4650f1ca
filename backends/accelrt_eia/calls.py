"""Calls of one model on one endpoint: tensors out, tensors back, by message or in shared memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from accelrt.errors import ExecutionError, InputError, RequestError, RequestTooLarge
from accelrt.graph.types import Signature, TensorType, Value, numpy_dtype
from accelrt.protocol.client import Endpoint
from accelrt.protocol.datatypes import DATATYPES, DTYPES, Array, from_contents, from_raw, to_raw
from accelrt.protocol.wire import (
    BYTE_SIZE,
    MOST_MESSAGE_BYTES,
    OFFSET,
    REGION,
    Buffer,
    Parameters,
    WireInfer,
    WireTensor,
    read_response,
    write_request,
)
from accelrt_eia.slots import Region, Slots, aligned

WORTH_SHARING = 32 << 10
"""Bytes of a tensor from which on shared memory is quicker than a message."""

_MOST_WRITTEN = 256


def carriable(signature: Signature) -> str | None:
    """Return why the protocol cannot carry a signature's values, None if it can."""
    for port in (*signature.inputs, *signature.outputs):
        if not isinstance(port.type, TensorType):
            return f"{port.name!r} is no tensor, and the protocol carries nothing else"
        if port.type.dtype not in DATATYPES:
            return f"{port.name!r} is of {port.type.dtype}, for which the protocol has no name"
    return None


@dataclass(frozen=True, slots=True)
class Model:
    """A model as its server knows it."""

    name: str
    version: str
    signature: Signature


class Caller:
    """Calls one model. Thread-safe: calls from several threads travel on one connection.

    Args:
        endpoint: The server.
        model: The model on it.
        share: Whether tensors may travel in shared memory.
        local_socket: Whether calls may go over the server's Unix socket.
    """

    def __init__(self, endpoint: Endpoint, model: Model, *, share: bool, local_socket: bool = True) -> None:
        self._endpoint, self._model, self._local_socket = endpoint, model, local_socket
        self._dtypes = {
            port.name: port.type.dtype for port in model.signature.outputs if isinstance(port.type, TensorType)
        }
        self._slots = Slots(endpoint) if share else None
        self._sizes: dict[tuple[tuple[int, ...], ...], dict[str, int]] = {}
        self._written: dict[tuple[object, ...], bytes] = {}

    def call(self, inputs: Mapping[str, Value], timeout_s: float) -> dict[str, Value]:
        """Return the outputs by name.

        Raises:
            DeviceError, RequestTimeout, ServingError: What `Endpoint.call` raises.
            RequestTooLarge: The inputs are more than one message can hold.
            ExecutionError: The server answered with something else than the model's outputs.
        """
        deadline = time.monotonic() + timeout_s
        arrays: dict[str, Array] = {name: np.asarray(value) for name, value in inputs.items()}
        if self._slots is not None and self._slots.refused == "":
            large = {n: a for n, a in arrays.items() if a.nbytes >= WORTH_SHARING and not a.dtype.hasobject}
            outputs = self._sizes.get(tuple(a.shape for a in arrays.values()), {})
            size = sum(aligned(a.nbytes) for a in large.values()) + sum(map(aligned, outputs.values()))
            if size:
                with self._slots.take(size, timeout_s / 2) as slot:
                    if slot is not None:
                        found = self._shared(arrays, large, outputs, self._slots, *slot, deadline)
                        if found is not None:
                            return found
        if sum(array.nbytes for array in arrays.values()) > MOST_MESSAGE_BYTES - (1 << 16):
            raise RequestTooLarge(
                f"The inputs take {sum(array.nbytes for array in arrays.values())} bytes; a message holds "
                f"{MOST_MESSAGE_BYTES}.",
                hint="Predict fewer rows at a time.",
            )
        data = write_request(self._model.name, self._model.version, arrays)
        reply = self._endpoint.infer(data, deadline - time.monotonic(), local_socket=self._local_socket)
        return self._answer(arrays, reply, None)

    def close(self) -> None:
        """Let go of shared memory; no call is under way any more."""
        if self._slots is not None:
            self._slots.close()

    def _shared(
        self,
        arrays: dict[str, Array],
        large: dict[str, Array],
        outputs: dict[str, int],
        slots: Slots,
        region: Region,
        start: int,
        deadline: float,
    ) -> dict[str, Value] | None:
        """Call with tensors in a slot; None if the server does not know the region any more."""
        at = start
        placed: dict[str, Parameters] = {}
        for name, array in large.items():
            raw = to_raw(array)
            region.memory[at : at + len(raw)] = raw
            placed[name] = {REGION: region.name, BYTE_SIZE: len(raw), OFFSET: at}
            at += aligned(len(raw))
        key = (region.name, start, tuple(a.shape for a in arrays.values()), tuple(outputs.items()))
        data = self._written.get(key) if len(large) == len(arrays) else None
        if data is None:
            data = self._request(arrays, placed, outputs, region, at)
            if len(large) == len(arrays):
                # Nothing of the tensors is in it, so that it is the same each time a slot is used.
                if len(self._written) >= _MOST_WRITTEN:
                    self._written.clear()
                self._written[key] = data
        try:
            reply = self._endpoint.infer(data, deadline - time.monotonic(), local_socket=self._local_socket)
        except RequestError:
            # A server that was started anew has forgotten the region; if the inputs are wrong, it will say so again.
            slots.lost(region)
            self._sizes.pop(tuple(a.shape for a in arrays.values()), None)
            return None
        return self._answer(arrays, reply, region)

    def _request(
        self,
        arrays: dict[str, Array],
        placed: dict[str, Parameters],
        outputs: dict[str, int],
        region: Region,
        at: int,
    ) -> bytes:
        """Write a request whose large inputs lie in a slot, and whose large outputs are to lie there from ``at`` on."""
        asked: list[tuple[str, Parameters]] = []
        for name in self._model.signature.output_names if outputs else ():
            size = outputs.get(name, 0)
            asked.append((name, {REGION: region.name, BYTE_SIZE: size, OFFSET: at} if size else {}))
            at += aligned(size)
        return write_request(self._model.name, self._model.version, arrays, placed=placed, outputs=asked)

    def _answer(self, arrays: Mapping[str, Array], reply: Buffer, region: Region | None) -> dict[str, Value]:
        try:
            return self._outputs(arrays, read_response(reply), region)
        except (RequestError, InputError) as error:
            raise ExecutionError(
                f"{self._endpoint.address.endpoint} answered with something else than the outputs of "
                f"{self._model.name!r}: {error.message}"
            ) from error

    def _outputs(self, arrays: Mapping[str, Array], wire: WireInfer, region: Region | None) -> dict[str, Value]:
        # Some servers leave tensors in shared memory out of the raw contents, some have an empty entry for them.
        by_place = len(wire.raw) == len(wire.tensors)
        others = iter(wire.raw)
        found: dict[str, Value] = {}
        sizes: dict[str, int] = {}
        for index, tensor in enumerate(wire.tensors):
            if REGION in tensor.parameters and region is not None:
                raw = self._in_region(tensor, region)
                if by_place:
                    next(others, None)
            elif tensor.contents is not None and not wire.raw:
                found[tensor.name] = _text(from_contents(tensor.name, tensor.datatype, tensor.shape, tensor.contents))
                continue
            else:
                maybe = next(others, None)
                if maybe is None:
                    raise RequestError(f"Output {index} has no contents.")
                raw = maybe
            array = from_raw(tensor.name, tensor.datatype, tensor.shape, raw)
            # A copy, for the message's bytes and the slot are not the caller's to keep or to write to.
            found[tensor.name] = _text(array) if tensor.datatype == "BYTES" else np.array(array)
            if len(raw) >= WORTH_SHARING and tensor.datatype != "BYTES":
                sizes[tensor.name] = len(raw)
            self._check(tensor)
        if missing := set(self._dtypes) - set(found):
            raise RequestError(f"{', '.join(sorted(missing))} did not come.")
        if sizes and self._slots is not None and len(self._sizes) < 64:
            self._sizes[tuple(a.shape for a in arrays.values())] = sizes
        return {name: found[name] for name in self._dtypes}

    def _in_region(self, tensor: WireTensor, region: Region) -> memoryview:
        size, at = tensor.parameters.get(BYTE_SIZE), tensor.parameters.get(OFFSET, 0)
        if (
            type(size) is not int
            or type(at) is not int
            or not 0 <= at <= at + size <= len(region.memory)
            or tensor.parameters[REGION] != region.name
        ):
            raise RequestError(f"{tensor.name!r} lies where it was not asked to be.")
        return region.memory[at : at + size]

    def _check(self, tensor: WireTensor) -> None:
        expected = self._dtypes.get(tensor.name)
        if expected is not None and DTYPES[tensor.datatype] != expected:
            raise RequestError(f"{tensor.name!r} is of {tensor.datatype}, not of {DATATYPES[expected]}.")


def _text(array: Array) -> Array:
    """Return texts as the rest of accelrt has them: ``str`` in an object array."""
    if array.dtype != numpy_dtype("string"):
        return array
    found = np.empty(array.shape, object)
    found.reshape(-1)[:] = [
        one.decode("utf-8", "surrogateescape") if isinstance(one, bytes) else one for one in array.reshape(-1).tolist()
    ]
    return found
