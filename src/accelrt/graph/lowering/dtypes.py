"""Data types of ONNX as torch has them, and values on their way in and out.

torch computes with no type of fewer than eight bits. Values of those types are held in a wider one, which has each of
them exactly: integers of 4 and 2 bits in 8, ``float4_e2m1fn`` in float32.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

from accelrt.graph.types import numpy_dtype

Tensor: TypeAlias = Any
"""A ``torch.Tensor``."""

HELD_IN = {
    "int4": "int8",
    "uint4": "uint8",
    "int2": "int8",
    "uint2": "uint8",
    "float4_e2m1fn": "float32",
}

_VIEWED = {1: np.uint8, 2: np.int16}
"""numpy's carriers of the types that numpy itself does not have, by bytes."""


@cache
def torch_dtype(name: str) -> Any:
    """Return the torch type that holds a data type.

    Raises:
        KeyError: torch has none (text).
    """
    try:
        return getattr(torch, HELD_IN.get(name, name))
    except AttributeError:
        raise KeyError(name) from None


def to_torch(array: np.ndarray[Any, Any], *, copy: bool = False) -> Tensor:
    """Return an array as a tensor that shares its memory where torch can, of ``torch_dtype`` of its type.

    Raises:
        KeyError: torch has no such type.
    """
    name = array.dtype.name
    wanted = torch_dtype(name)
    if name in HELD_IN:
        return torch.from_numpy(array.astype(HELD_IN[name]))
    array = np.ascontiguousarray(array).reshape(array.shape)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    native = array if _native(name) else array.view(_VIEWED[array.dtype.itemsize])
    with warnings.catch_warnings():
        # Weights are mapped read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(native.copy() if copy else native)
    return tensor if _native(name) else tensor.view(wanted)


def to_numpy(tensor: Tensor, dtype: str | None = None) -> np.ndarray[Any, Any]:
    """Return a tensor as an array of ONNX type ``dtype``, by default the tensor's own; no copy on the CPU."""
    tensor = tensor.detach().cpu()
    array: np.ndarray[Any, Any]
    name = str(tensor.dtype).removeprefix("torch.")
    if not _native(name):
        carrier = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
        array = tensor.contiguous().view(carrier).numpy().view(numpy_dtype(name))
    else:
        array = tensor.numpy()
    return array if dtype in (None, name) else array.astype(numpy_dtype(str(dtype)))


def same_bits(x: Tensor, dtype: Any) -> Tensor:
    """Return a tensor's bits as another type of the same size."""
    # torch.jit.trace cannot write a view as another type; it can write the copy.
    return torch.ops.aten.view_copy.dtype(x, dtype) if torch.jit.is_tracing() else x.view(dtype)


def _native(name: str) -> bool:
    return name in _NUMPY


_NUMPY = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)
