"""DLPack's structures in memory, and the tensor in a capsule: where it lies and how, without touching its data.

The structures are those of ``dlpack.h``, before version 1 (``dltensor``) and since (``dltensor_versioned``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

CPU, CUDA = 1, 2
"""Kinds of devices: ``kDLCPU``, ``kDLCUDA``."""

CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}
"""Kinds of elements: ``DLDataTypeCode``."""

DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    """``DLTensor``; the same in every version."""

    _fields_: ClassVar = [
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
    ]


class Managed(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_: ClassVar = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned``, since version 1."""

    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


FORMS: dict[bytes, type[Managed | Versioned]] = {b"dltensor": Managed, b"dltensor_versioned": Versioned}
"""What a capsule points at, by its name."""

_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Exported:
    """What a tensor's capsule says, which is alive as long as this is.

    ``code``, ``bits`` and ``lanes`` are those of its elements; ``contiguous`` says whether it lies in C order, without
    gaps.
    """

    address: int
    shape: tuple[int, ...]
    code: int
    bits: int
    lanes: int
    device: tuple[int, int]
    contiguous: bool
    capsule: Any


def exported(tensor: Any) -> Exported:
    """Read a tensor's capsule, which is left unconsumed: its own destructor lets the tensor go.

    Raises:
        Exception: Whatever the tensor raises, which may refuse to be exported.
        TypeError: What it gives is no capsule of a tensor.
    """
    # -1 asks the producer not to order any stream after another: the tensor is complete, or is not read.
    capsule = tensor.__dlpack__(stream=-1)
    try:
        name = _name_of(capsule)
    except ValueError as error:
        raise TypeError("its __dlpack__ gives no capsule") from error
    if name not in FORMS:
        raise TypeError(f"its __dlpack__ gives a capsule named {name!r}")
    held = FORMS[name].from_address(pointer_of(capsule, name)).tensor
    shape = tuple(held.shape[axis] for axis in range(held.ndim))
    return Exported(
        (held.data or 0) + held.byte_offset,
        shape,
        held.code,
        held.bits,
        held.lanes,
        (held.device_type, held.device_id),
        not held.strides or _packed(shape, [held.strides[axis] for axis in range(held.ndim)]),
        capsule,
    )


def _packed(shape: tuple[int, ...], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True
