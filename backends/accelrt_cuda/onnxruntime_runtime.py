"""A program of onnxruntime on a GPU: values by IO binding, from the host or where they are already."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any, cast

import numpy as np

from accelrt.backend import Device, DeviceTensor, Executable
from accelrt.errors import ExecutionError
from accelrt.graph.convert import elem_type
from accelrt.graph.dlpack import CODES, CPU, CUDA, Managed, pointer_of
from accelrt.graph.ort_values import Feeder, from_ort, needs_bits
from accelrt.graph.types import Port, Signature, TensorType, Value
from accelrt_cuda.failures import device_lost, lost, no_room, out_of_memory, short

NAME = "cuda/onnxruntime"


class ResidentTensor:
    """An output that stays on the device: `accelrt.backend.DeviceTensor` over onnxruntime's own buffer.

    onnxruntime's arena gets the buffer back when this object and everything that was made of it by DLPack are gone.
    """

    def __init__(self, value: Any, session: Any, dtype: str) -> None:
        self._value = value
        self._session = session  # whose allocator the buffer belongs to
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self._value.shape())

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """Return a capsule; whatever the stream, the tensor is complete, for `run_resident` has waited for it."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("this tensor is handed over where it is, and not copied")
        capsule = self._value.__dlpack__()
        # onnxruntime says that truth values are whole numbers; others take its word for it.
        return _retyped(capsule, "bool") if self.dtype == "bool" else capsule

    def copied(self) -> np.ndarray[Any, Any]:
        """Return a copy in the host's memory."""
        return cast("np.ndarray[Any, Any]", self._value.numpy())

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._value.__dlpack_device__()
        return int(kind), int(index)


class _Handed:
    """Somebody's tensor as onnxruntime can read it: it knows truth values by ``dtype`` alone."""

    def __init__(self, tensor: DeviceTensor, dtype: str) -> None:
        self._tensor, self.dtype = tensor, dtype

    def __dlpack__(self, *, stream: Any = None) -> Any:
        capsule = self._tensor.__dlpack__()
        return _retyped(capsule, "uint") if self.dtype == "bool" else capsule


class Resident(Executable):
    """A session on a device; every call has a binding of its own, so calls may come from several threads."""

    def __init__(self, ort: Any, session: Any, signature: Signature, device: Device) -> None:
        self._ort, self._session, self._signature, self._device = ort, session, signature, device
        self._feeder = Feeder(ort)
        self._ports = {port.name: port for port in signature.inputs}

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        return self._compute({name: self._from_host(inputs[name], port) for name, port in self._ports.items()}, ())

    def run_resident(self, inputs: Mapping[str, Value | DeviceTensor], keep: Collection[str]) -> dict[str, Any]:
        return self._compute(
            {name: self._from_anywhere(inputs[name], port) for name, port in self._ports.items()}, keep
        )

    def to_host(self, tensor: DeviceTensor) -> np.ndarray[Any, Any]:
        assert isinstance(tensor, ResidentTensor)  # the contract: one that `run_resident` returned
        with _Failures(self._device):
            return tensor.copied()

    def _from_host(self, value: Value, port: Port) -> Any:
        return self._feeder.to_ort(value, port.type)

    def _from_anywhere(self, value: Value | DeviceTensor, port: Port) -> Any:
        if isinstance(value, np.ndarray):
            return self._from_host(value, port)
        dtype = port.type.dtype if isinstance(port.type, TensorType) else ""
        kind, index = value.__dlpack_device__()
        if int(kind) != CPU and (int(kind), int(index)) != (CUDA, self._device.index):
            raise ExecutionError(
                f"The input {port.name!r} is on DLPack device {(int(kind), int(index))}, the program on CUDA device "
                f"{self._device.index}.",
                hint="Hand tensors on between engines of one device only.",
                backend=NAME,
            )
        try:
            return self._ort.OrtValue.from_dlpack(_Handed(value, dtype))
        except (RuntimeError, TypeError) as error:
            raise ExecutionError(
                f"onnxruntime cannot read the input {port.name!r} through DLPack: {short(error)}.",
                hint="It takes dense tensors in row-major order.",
                backend=NAME,
            ) from error

    def _compute(self, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        if self._session is None:
            raise RuntimeError("the executable was closed")
        session = self._session
        with _Failures(self._device):
            binding = session.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for port in self._signature.outputs:
                if port.name in keep:
                    binding.bind_output(port.name, "cuda", self._device.index)
                else:
                    binding.bind_output(port.name, "cpu")
            # Returns when the device has finished: onnxruntime waits for its streams unless it is told not to.
            session.run_with_iobinding(binding)
            values = binding.get_outputs()
        return {
            port.name: ResidentTensor(value, session, _dtype(port)) if port.name in keep else from_ort(value, port.type)
            for port, value in zip(self._signature.outputs, values, strict=True)
        }

    def close(self) -> None:
        self._session = None


class Captured(Resident):
    """A run recorded as a CUDA graph: it reads and writes fixed addresses, so calls take turns."""

    def __init__(self, ort: Any, session: Any, signature: Signature, device: Device) -> None:
        super().__init__(ort, session, signature, device)
        self._turn = threading.Lock()
        with _Failures(device):
            self._inputs = {port.name: self._buffer(port) for port in signature.inputs}
            self._outputs = {port.name: self._buffer(port) for port in signature.outputs}
            self._binding = session.io_binding()
            for name, value in self._inputs.items():
                self._binding.bind_ortvalue_input(name, value)
            for name, value in self._outputs.items():
                self._binding.bind_ortvalue_output(name, value)

    def _buffer(self, port: Port) -> Any:
        assert isinstance(port.type, TensorType)
        assert port.type.shape is not None
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        return make(list(port.type.shape), elem_type(port.type.dtype), "cuda", self._device.index)

    def _compute(self, feeds: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        with self._turn, _Failures(self._device):
            if self._session is None:
                raise RuntimeError("the executable was closed")
            for name, value in feeds.items():
                self._inputs[name].update_inplace(value)
            self._session.run_with_iobinding(self._binding)
            # The next call writes to the same addresses, so what stays on the device is a copy as well.
            return {
                port.name: self._kept(port) if port.name in keep else self._outputs[port.name].numpy()
                for port in self._signature.outputs
            }

    def _kept(self, port: Port) -> ResidentTensor:
        copy = self._buffer(port)
        copy.update_inplace(self._outputs[port.name])
        return ResidentTensor(copy, self._session, _dtype(port))

    def close(self) -> None:
        with self._turn:
            self._inputs, self._outputs, self._binding = {}, {}, None
            self._session = None


def cannot_capture(signature: Signature) -> str | None:
    """Return why a program cannot be recorded as a CUDA graph, None if its signature does not speak against it."""
    for port in (*signature.inputs, *signature.outputs):
        type_ = port.type
        if not isinstance(type_, TensorType) or type_.shape is None or not all(isinstance(d, int) for d in type_.shape):
            return f"{port.name!r} is a {type_}, and a graph's addresses and sizes are fixed"
        if needs_bits(type_):
            return f"{port.name!r} is a {type_}, which onnxruntime's Python cannot copy to a fixed address"
    return None


class _Failures:
    """Turns what onnxruntime raises on a device into the errors of the contract."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        text = str(error)
        if (what := lost(text)) is not None:
            raise device_lost(what, self._device, NAME) from error
        if out_of_memory(text):
            raise no_room(error, self._device, NAME) from error


def _dtype(port: Port) -> str:
    return port.type.dtype if isinstance(port.type, TensorType) else ""


def _retyped(capsule: Any, kind: str) -> Any:
    """Return a capsule of bytes as another kind of elements: truth values are bytes of 0 and 1 either way."""
    Managed.from_address(pointer_of(capsule, b"dltensor")).tensor.code = CODES[kind]
    return capsule
