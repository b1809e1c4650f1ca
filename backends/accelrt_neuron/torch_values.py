"""Values on their way between numpy and the vendor's PyTorch programs, which take and give CPU tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from accelrt.backend import Executable
from accelrt.errors import ExecutionError
from accelrt.graph.types import Port, Signature, TensorType, Value, numpy_dtype
from accelrt_neuron import nrt

_SEED = 0


def examples(signature: Signature, torch: Any) -> tuple[Any, ...]:
    """Return inputs to trace with: of the signature's shapes and types, zeros where they are indices.

    Raises:
        ValueError: An input is no tensor, or has an open size.
    """
    generator = np.random.default_rng(_SEED)
    return tuple(_example(port, generator, torch) for port in signature.inputs)


def _example(port: Port, generator: np.random.Generator, torch: Any) -> Any:
    if not isinstance(port.type, TensorType) or port.type.shape is None:
        raise ValueError(f"{port.name!r} is {port.type}; Neuron traces tensors of known rank")
    shape = tuple(dim for dim in port.type.shape if isinstance(dim, int))
    if len(shape) != len(port.type.shape):
        raise ValueError(f"{port.name!r} is {port.type}; Neuron traces static shapes, the batch included")
    dtype = numpy_dtype(port.type.dtype)
    floats = port.type.dtype in ("float32", "float16", "bfloat16")
    array = generator.standard_normal(shape) if floats else np.zeros(shape)
    return to_tensor(array.astype(dtype), port.type.dtype, torch)


def to_tensor(array: Value, dtype: str, torch: Any) -> Any:
    """Return an array as a tensor; memory is shared where torch may write to it."""
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()  # torch knows no read-only tensors, and the vendor's runtime may pin what it is given
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Any, dtype: str, torch: Any) -> Value:
    """Return a tensor as an array of its own."""
    tensor = tensor.detach().contiguous()
    if dtype == "bfloat16":
        return tensor.view(torch.int16).numpy().view(numpy_dtype(dtype)).copy()
    return np.array(tensor.numpy(), dtype=numpy_dtype(dtype), copy=True)


class TorchProgram(Executable):
    """A compiled TorchScript module on its cores, or several under the vendor's DataParallel."""

    def __init__(self, model: Any, signature: Signature, torch: Any, engine: str) -> None:
        self._model, self._torch, self._engine = model, torch, engine
        self._inputs = [(port.name, _dtype(port)) for port in signature.inputs]
        self._outputs = [(port.name, _dtype(port)) for port in signature.outputs]

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        model, torch = self._model, self._torch
        if model is None:
            raise RuntimeError("the executable was closed")
        tensors = [to_tensor(inputs[name], dtype, torch) for name, dtype in self._inputs]
        try:
            with torch.no_grad():
                results = model(*tensors)
        except (RuntimeError, ValueError) as error:
            raise nrt.typed(error, "Running the program", self._engine) from error
        values = _flat(results)
        if len(values) != len(self._outputs):
            raise ExecutionError(
                f"The program returned {len(values)} values where {len(self._outputs)} were expected.",
                backend=self._engine,
            )
        return {name: to_array(value, dtype, torch) for value, (name, dtype) in zip(values, self._outputs, strict=True)}

    def close(self) -> None:
        self._model = None  # the vendor unloads a program when its module is freed


def _flat(results: Any) -> Sequence[Any]:
    if isinstance(results, Mapping):
        return list(results.values())
    return list(results) if isinstance(results, tuple | list) else [results]


def _dtype(port: Port) -> str:
    return port.type.dtype if isinstance(port.type, TensorType) else ""
