"""What a tensor is, told from its DLPack capsule: dtype, shape and layout, without touching its data."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_NAMES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_BOOL = 6


class _Tensor(ctypes.Structure):
    """``DLTensor`` of ``dlpack.h``; the same in every version."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned``, since version 1; before, the tensor came first."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tensor is; ``dtype`` is a data type's name as the graph has it, or a description if it is none of those.

    ``contiguous`` says whether it lies in C order, without gaps.
    """

    dtype: str
    shape: tuple[int, ...]
    contiguous: bool


def layout_of(tensor: Any) -> Layout:
    """Read a tensor's capsule, which is left unconsumed.

    Raises:
        Exception: Whatever the tensor raises, which may refuse to be exported.
        TypeError: What it gives is no capsule of a tensor.
    """
    # -1 asks the producer not to order any stream, since nothing is read.
    capsule = tensor.__dlpack__(stream=-1)
    try:
        name = _name_of(capsule)
    except ValueError as error:
        raise TypeError("its __dlpack__ gives no capsule") from error
    if name not in (b"dltensor", b"dltensor_versioned"):
        raise TypeError(f"its __dlpack__ gives a capsule named {name!r}")
    address = _pointer_of(capsule, name)
    versioned = name == b"dltensor_versioned"
    found = _Versioned.from_address(address).tensor if versioned else _Tensor.from_address(address)
    shape = tuple(found.shape[axis] for axis in range(found.ndim))
    strides = tuple(found.strides[axis] for axis in range(found.ndim)) if found.strides else None
    return Layout(_dtype(found), shape, strides is None or _packed(shape, strides))


def _dtype(tensor: _Tensor) -> str:
    if tensor.code == _BOOL and tensor.bits == 8 and tensor.lanes == 1:
        return "bool"
    name = f"{_NAMES.get(tensor.code, f'kind {tensor.code} of bits ')}{tensor.bits}"
    return name if tensor.lanes == 1 else f"{name} in vectors of {tensor.lanes}"


def _packed(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True
