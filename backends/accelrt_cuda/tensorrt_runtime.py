"""A plan that runs: one context and one stream a lane, each with buffers of its own, and lanes taken by turns."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.backend import HOST, DeviceTensor, Executable
from accelrt.errors import AccelrtError, DeviceLost, ExecutionError, IncompatibleProgram, OutOfDeviceMemory
from accelrt.graph.dlpack import CUDA
from accelrt.graph.types import Signature, TensorType, Value, bits_of, numpy_dtype
from accelrt_cuda import tensorrt_dlpack
from accelrt_cuda.tensorrt_api import LOG, bindings, dtype_of, trt_logger
from accelrt_cuda.tensorrt_cuda import LEAST, DeviceBlock, Gpu, PinnedBlock, Stream
from accelrt_cuda.tensorrt_errors import NAME, CudaFailure, from_log, lost, typed

LANES = 2
"""Contexts of one executable: while one computes, the other moves inputs and outputs."""

_LOOK_AGAIN_S = 0.5

_SPARE_BLOCKS = 16
"""Blocks of device memory kept for outputs that stay there; one that is let go beyond that is freed."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a plan; ``open`` says that its sizes are told at run time, ``on_host`` where it lies."""

    name: str
    dtype: str
    open: bool
    on_host: bool


_LOADING = threading.Lock()


@cache
def _runtime() -> Any:
    trt = bindings()
    found = trt.Runtime(trt_logger())
    # A plan may hold code for the host's processor, a runtime of its own. It is data from a file: it is never run.
    found.engine_host_code_allowed = False
    return found


def load(plan: Path, signature: Signature, gpu: Gpu) -> Resident:
    """Make a plan resident on a device.

    Raises:
        IncompatibleProgram: TensorRT does not take it here.
        OutOfDeviceMemory: It does not fit.
        DeviceLost: The device does not answer.
    """
    mark = LOG.mark()
    try:
        data = plan.read_bytes()
        with _LOADING:  # the runtime loads onto the device that is in use, one plan at a time
            gpu.use()
            engine = _runtime().deserialize_cuda_engine(data)
        if engine is None:
            raise from_log(LOG.since(mark), "Loading the plan", gpu.memory(), IncompatibleProgram)
        return Resident(engine, signature, gpu)
    except CudaFailure as error:
        raise typed(error, "Loading the plan", gpu.memory()) from error
    except TypeError as error:  # what pybind11 raises where TensorRT makes no runtime
        raise from_log([*LOG.since(mark), str(error)], "Starting TensorRT", None, IncompatibleProgram) from error


def _tensors(engine: Any, signature: Signature) -> tuple[list[Tensor], list[Tensor]]:
    trt = bindings()
    wanted = {port.name: port.type for port in (*signature.inputs, *signature.outputs)}
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype, type_ = dtype_of(engine.get_tensor_dtype(name)), wanted.get(name)
        if not isinstance(type_, TensorType) or dtype != type_.dtype:
            raise IncompatibleProgram(
                f"The plan has {name!r} of {dtype}, the segment has it as {type_ or 'nothing'}.", backend=NAME
            )
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
        sides[0 if is_input else 1].append(Tensor(name, dtype, -1 in tuple(engine.get_tensor_shape(name)), on_host))
    if missing := set(signature.output_names) - {tensor.name for tensor in sides[1]}:
        raise IncompatibleProgram(f"The plan lacks the output {sorted(missing)[0]!r}.", backend=NAME)
    return sides


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor as TensorRT holds it: elements of 4 bits share bytes."""
    return (math.prod(shape) * bits_of(dtype) + 7) // 8


class Resident(Executable):
    """A plan on a device. Calls may come from any thread; each takes a lane, or waits for one."""

    def __init__(self, engine: Any, signature: Signature, gpu: Gpu) -> None:
        self._engine, self._gpu = engine, gpu
        self._inputs, self._outputs = _tensors(engine, signature)
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._permits = deque(range(LANES))  # of lanes that are not made yet; append and pop are atomic
        self._making = threading.Lock()
        self._spare = _Spare()
        self._lost: str | None = None
        self._closed = False
        self._permits.pop()
        self._idle.put(self._made())

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        return self.run_resident(inputs, ())

    def run_resident(self, inputs: Mapping[str, Value | DeviceTensor], keep: Collection[str]) -> dict[str, Any]:
        if self._closed:
            raise ExecutionError("The plan is no longer on the device.", backend=NAME)
        if self._lost is not None:
            raise lost(self._lost)
        mark = LOG.mark()
        try:
            self._gpu.use()
            lane = self._take()
        except CudaFailure as error:
            raise self._failed(typed(error, "Running the plan", None)) from error
        try:
            outputs = lane.run(inputs, keep)
        except CudaFailure as error:
            self._retire(lane)
            raise self._failed(typed(error, "Running the plan", self._gpu.memory())) from error
        except _Refused as error:
            self._retire(lane)
            failure = from_log(LOG.since(mark), f"Running the plan ({error})", self._gpu.memory(), ExecutionError)
            raise self._failed(failure) from error
        except BaseException:
            self._retire(lane)
            raise
        self._idle.put(lane)
        return outputs

    def _take(self) -> _Lane:
        """Return a lane that is idle, a new one if there may be more, else the next that becomes idle."""
        while not self._closed:
            if self._lost is not None:
                raise lost(self._lost)
            with contextlib.suppress(queue.Empty):
                return self._idle.get_nowait()
            with contextlib.suppress(IndexError):
                permit = self._permits.pop()
                try:
                    return self._made()
                except OutOfDeviceMemory:
                    if len(self._permits) >= LANES - 1:  # there is no other lane to wait for
                        self._permits.append(permit)
                        raise
            # A lane that fails is not put back: whoever waits looks from time to time whether there may be a new one.
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=_LOOK_AGAIN_S)
        raise ExecutionError("The plan is no longer on the device.", backend=NAME)

    def _made(self) -> _Lane:
        mark = LOG.mark()
        with self._making:
            try:
                return _Lane(self._engine, self._inputs, self._outputs, self._gpu, self._spare)
            except CudaFailure as error:
                raise typed(error, "Making room for the plan", self._gpu.memory()) from error
            except _Refused as error:
                free = self._gpu.memory()
                raise from_log(LOG.since(mark), "Making a context for the plan", free, OutOfDeviceMemory) from error

    def _retire(self, lane: _Lane) -> None:
        """Put a lane back if the call failed before it reached the device; else a new one may be made."""
        if not lane.spoilt:
            self._idle.put(lane)
            return
        lane.close()
        self._permits.append(0)

    def _failed(self, error: AccelrtError) -> AccelrtError:
        if isinstance(error, DeviceLost):
            self._lost = error.message.rstrip(".")
        return error

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(CudaFailure):
            self._gpu.use()
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()
        self._spare.close()
        self._engine = None


class _Refused(Exception):
    """TensorRT said no, and why in its log."""


class _Spare:
    """Blocks of device memory for outputs that stay there; they come back when nobody refers to the output."""

    def __init__(self) -> None:
        self._blocks: deque[DeviceBlock] = deque()
        self._open = True

    def take(self) -> DeviceBlock:
        try:
            return self._blocks.pop()
        except IndexError:
            return DeviceBlock()

    def give(self, block: DeviceBlock) -> None:
        if self._open and len(self._blocks) < _SPARE_BLOCKS:
            self._blocks.append(block)
        else:
            block.free()

    def close(self) -> None:
        self._open = False
        with contextlib.suppress(IndexError):
            while True:
                self._blocks.pop().free()


class _Kept:
    """Owns a block until the last reference is gone."""

    def __init__(self, block: DeviceBlock, spare: _Spare) -> None:
        self._block, self._spare = block, spare

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process there may be nothing left to give it to
            self._spare.give(self._block)


@cache
def _allocator_class() -> type:
    trt = bindings()

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined]
        """Makes room for an output whose sizes TensorRT knows only when it has computed them.

        TensorRT calls whichever of the two ``reallocate`` functions its release has.
        """

        def __init__(self, output: _Output) -> None:
            trt.IOutputAllocator.__init__(self)
            self._output = output
            self.failure: CudaFailure | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            try:
                place = self._output.pinned if self._output.tensor.on_host else self._output.block
                return place.fit(size)
            except CudaFailure as error:  # an exception cannot pass through TensorRT; a null address says it
                self.failure = error
                return 0

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self._output.told = tuple(shape)

    return Allocator


class _Output:
    """An output of one lane: where it is computed, and where it is copied to on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.block, self.pinned = DeviceBlock(), PinnedBlock()
        self.allocator: Any = None
        self.told: tuple[int, ...] | None = None
        self.shape: tuple[int, ...] | None = ()


class _Lane:
    """A context, its stream and its buffers: what one call needs, and nobody else uses meanwhile."""

    def __init__(self, engine: Any, inputs: list[Tensor], outputs: list[Tensor], gpu: Gpu, spare: _Spare) -> None:
        self._gpu, self._spare, self._engine = gpu, spare, engine
        self._stream = Stream()
        self.spoilt = False
        self._context = engine.create_execution_context()
        if self._context is None:
            self._stream.close()
            raise _Refused("no context")
        self._inputs = [(tensor, DeviceBlock(), PinnedBlock()) for tensor in inputs]
        self._outputs = [_Output(tensor) for tensor in outputs]

    def run(self, inputs: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
        """Compute; all that is given is complete, and so is all that is returned.

        Raises:
            ExecutionError: An input does not fit; nothing was begun.
            CudaFailure, _Refused: It failed on the device.
        """
        try:
            alive = [self._bind(*place, inputs[place[0].name]) for place in self._inputs]
            for output in self._outputs:
                self._make_room(output)
        except BaseException:
            self._settle()
            raise
        self.spoilt = True
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._why()
        results: dict[str, Any] = {}
        kept = set(keep)
        sizes = [self._size(output) for output in self._outputs]
        for output, (_, size) in zip(self._outputs, sizes, strict=True):
            if not output.tensor.on_host and output.tensor.name not in kept:
                self._stream.to_host(output.pinned.fit(size), output.block.address, size)
        self._stream.wait()
        del alive
        self.spoilt = False
        for output, (shape, size) in zip(self._outputs, sizes, strict=True):
            name = output.tensor.name
            stays = name in kept and not output.tensor.on_host
            results[name] = self._hand_over(output, shape) if stays else _array(output, shape, size)
        return results

    def _bind(self, tensor: Tensor, block: DeviceBlock, pinned: PinnedBlock, value: Any) -> Any:
        """Put an input where the context reads it; return what must live until it has been read."""
        resident = None
        if not isinstance(value, np.ndarray):
            resident = self._resident(tensor, value)
            if resident is None:
                value = np.from_dlpack(value)
        shape = resident.shape if resident is not None else value.shape
        if tensor.open and not self._context.set_input_shape(tensor.name, shape):
            raise ExecutionError(
                f"The input {tensor.name!r} of shape {list(shape)} is outside the sizes that the plan was built for, "
                f"{self._built_for(tensor)}.",
                hint="Compile with `profiles` or `batch` that take it in.",
                backend=NAME,
            )
        size = bytes_of(tensor.dtype, shape)
        if resident is None:
            data = _packed(value, tensor.dtype)
            pinned.view(size)[...] = data
            address = pinned.address if tensor.on_host else block.fit(size)
            if not tensor.on_host:
                self._stream.to_device(address, pinned.address, size)
        elif tensor.on_host:
            address = pinned.fit(size)
            self._stream.to_host(address, resident.address, size)
            self._stream.wait()
        elif resident.address % LEAST or not resident.address:
            # Kernels may assume the alignment of whole blocks, which a view into a larger tensor lacks.
            address = block.fit(size)
            self._stream.on_device(address, resident.address, size)
        else:
            address = resident.address
        self._context.set_tensor_address(tensor.name, address)
        return resident

    def _resident(self, tensor: Tensor, value: Any) -> Any:
        kind, ordinal = value.__dlpack_device__()
        if (int(kind), int(ordinal)) == HOST:
            return None
        try:
            found = tensorrt_dlpack.read(value)
        except (TypeError, ValueError, BufferError) as error:
            raise ExecutionError(
                f"The input {tensor.name!r} cannot be read from the device: {error}.", backend=NAME
            ) from error
        if found.device != (CUDA, self._gpu.ordinal) or found.dtype != tensor.dtype:
            raise ExecutionError(
                f"The input {tensor.name!r} is {found.dtype} on device {found.device}; the plan takes "
                f"{tensor.dtype} on {(CUDA, self._gpu.ordinal)}.",
                backend=NAME,
            )
        return found

    def _built_for(self, tensor: Tensor) -> str:
        with contextlib.suppress(Exception):  # only a message hangs on it
            least, _, greatest = self._engine.get_tensor_profile_shape(tensor.name, 0)
            return f"{list(least)} to {list(greatest)}"
        return "those of its profile"

    def _make_room(self, output: _Output) -> None:
        tensor = output.tensor
        shape = tuple(self._context.get_tensor_shape(tensor.name))
        if any(size < 0 for size in shape):
            output.shape = output.told = None
            if output.allocator is None:
                output.allocator = _allocator_class()(output)
            output.allocator.failure = None
            self._context.set_output_allocator(tensor.name, output.allocator)
            return
        output.shape = shape
        size = bytes_of(tensor.dtype, shape)
        address = output.pinned.fit(size) if tensor.on_host else output.block.fit(size)
        self._context.set_tensor_address(tensor.name, address)

    def _size(self, output: _Output) -> tuple[tuple[int, ...], int]:
        shape = output.told if output.shape is None else output.shape
        if shape is None:
            raise _Refused(f"the shape of {output.tensor.name!r} was not told")
        return shape, bytes_of(output.tensor.dtype, shape)

    def _hand_over(self, output: _Output, shape: tuple[int, ...]) -> Any:
        """Give an output its block for good; the next run computes into another."""
        block, output.block = output.block, self._spare.take()
        owner = _Kept(block, self._spare)
        gpu = self._gpu
        return tensorrt_dlpack.DeviceArray(
            block.address,
            shape,
            output.tensor.dtype,
            gpu.ordinal,
            owner,
            lambda source, target: _fetch(gpu, source, target),
        )

    def _why(self) -> Exception:
        failed = next((o.allocator.failure for o in self._outputs if o.allocator and o.allocator.failure), None)
        return failed or _Refused("the work was not taken")

    def _settle(self) -> None:
        """Wait for copies that were begun: they read buffers that the next call writes."""
        try:
            self._stream.wait()
        except CudaFailure:
            self.spoilt = True

    def close(self) -> None:
        self._context = None  # before its memory, and before the engine
        for _, block, pinned in self._inputs:
            block.free()
            pinned.free()
        for output in self._outputs:
            output.block.free()
            output.pinned.free()
            output.allocator = None
        self._stream.close()


def _fetch(gpu: Gpu, source: int, target: np.ndarray[Any, Any]) -> None:
    """Copy from the device into an array, on a stream of its own, since the lane may be busy."""
    try:
        gpu.use()
        stream = Stream()
        try:
            stream.to_host(target.ctypes.data, source, target.nbytes)
            stream.wait()
        finally:
            stream.close()
    except CudaFailure as error:
        raise typed(error, "Copying a tensor to the host", None) from error


def _packed(value: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Return an array's bytes as TensorRT reads them: two elements of 4 bits share a byte, the first below."""
    flat = np.ascontiguousarray(value).reshape(-1)
    if bits_of(dtype) != 4:
        return flat.view(np.uint8)
    nibbles = flat.view(np.uint8) & 0xF
    nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _array(output: _Output, shape: tuple[int, ...], size: int) -> Value:
    """Return an output as an array of its own: the lane writes into the same memory next time."""
    data, dtype = output.pinned.view(size), output.tensor.dtype
    if bits_of(dtype) != 4:
        return data.copy().view(numpy_dtype(dtype)).reshape(shape)
    nibbles = np.stack((data & 0xF, data >> 4), axis=1).reshape(-1)[: math.prod(shape)]
    if dtype == "int4":
        nibbles = (nibbles.astype(np.int8) ^ 8) - 8  # spread the sign
        return nibbles.astype(numpy_dtype(dtype)).reshape(shape)
    return nibbles.view(numpy_dtype(dtype)).reshape(shape)
