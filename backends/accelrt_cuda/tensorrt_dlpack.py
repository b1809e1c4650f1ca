"""Tensors on the device as DLPack has them: read from any library without a copy, and handed to any."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelrt.backend import HOST
from accelrt.graph.dlpack import CODES, CUDA, DELETER, FORMS, Exported, Managed, Tensor, Versioned, exported
from accelrt.graph.types import bits_of, numpy_dtype

_MAJOR, _MINOR = 1, 0
_NAMES = {name: ctypes.c_char_p(name) for name in FORMS}  # a capsule keeps the pointer, so it must stay

_CAPSULE_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_python = ctypes.pythonapi
_new = _python.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _CAPSULE_DESTRUCTOR)
# The destructor gets a capsule that is being destroyed: as an address, so that nobody counts a reference to it.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_raw_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor of somebody's on a device; ``capsule`` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    capsule: Any


def read(tensor: Any) -> Found:
    """Return where a tensor lies, without a copy. It must be complete: no stream is ordered after another.

    Raises:
        TypeError: It gives no capsule of a tensor, or of elements that accelrt does not know.
        ValueError: It is not in C order.
    """
    found = exported(tensor)
    if not found.contiguous:
        raise ValueError("it is not in C order")
    return Found(found.address, found.shape, _dtype(found), found.device, found.capsule)


def _dtype(found: Exported) -> str:
    kind = next((name for name, code in CODES.items() if code == found.code), None)
    if kind is None or found.lanes != 1:
        raise TypeError(f"its elements are of kind {found.code} with {found.bits} bits and {found.lanes} lanes")
    return "bool" if kind == "bool" else f"{kind}{found.bits}"


class DeviceArray:
    """An output that stays on the device, in C order; its memory is its own until nobody refers to it.

    Args:
        address: Where it lies.
        shape: Its sizes.
        dtype: A data type's name.
        ordinal: The device, as CUDA numbers it.
        memory: What owns the memory.
        to_host: Copies so many bytes from an address on the device into an array of bytes, and waits for it.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: str,
        ordinal: int,
        memory: Any,
        to_host: Callable[[int, np.ndarray[Any, Any]], None],
    ) -> None:
        self.address, self.shape, self.dtype, self.ordinal = address, shape, dtype, ordinal
        self._memory, self._to_host = memory, to_host

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.ordinal

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a capsule; it is complete, so that ``stream`` has nothing to wait for.

        Raises:
            BufferError: Another device than this one or the host is asked for, or a copy on the device; or the elements
                are of a type that DLPack does not have.
        """
        if dl_device is not None and tuple(map(int, dl_device)) == HOST:
            return self.numpy().__dlpack__(max_version=max_version)
        if (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()) or copy:
            raise BufferError("A tensor of TensorRT's is handed over where it is, or copied to the host.")
        versioned = max_version is not None and max_version[0] >= 1
        return _capsule(self, versioned)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a copy in the host's memory."""
        array = np.empty(self.shape, numpy_dtype(self.dtype))
        if array.size:
            self._to_host(self.address, array.reshape(-1).view(np.uint8))
        return array


_exported: dict[int, tuple[Any, ...]] = {}
"""What C code points at, by address, until it says that it is done."""


def _capsule(array: DeviceArray, versioned: bool) -> Any:
    form, name = (Versioned, b"dltensor_versioned") if versioned else (Managed, b"dltensor")
    managed: Any = form()
    rank = len(array.shape)
    shape = (ctypes.c_int64 * max(rank, 1))(*array.shape)
    steps = np.cumprod((1, *array.shape[:0:-1]))[::-1] if rank else ()
    strides = (ctypes.c_int64 * max(rank, 1))(*map(int, steps))
    code, bits = _code(array.dtype)
    managed.tensor = Tensor(
        array.address, CUDA, array.ordinal, rank, code, bits, 1,
        ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)), 0,
    )  # fmt: skip
    managed.deleter = _let_go
    if versioned:
        managed.major, managed.minor, managed.flags = _MAJOR, _MINOR, 0
    address = ctypes.addressof(managed)
    _exported[address] = (managed, shape, strides, array)
    return _new(address, _NAMES[name], _unread)


def _code(dtype: str) -> tuple[int, int]:
    kind = dtype.rstrip("0123456789")
    if kind not in CODES or (kind == "float" and not dtype[5:].isdecimal()):
        raise BufferError(f"DLPack has no name for elements of {dtype}.")
    return CODES[kind], bits_of(dtype)


def _forget(address: int) -> None:
    _exported.pop(address, None)


_let_go = DELETER(_forget)


def _drop(capsule: int) -> None:
    """Let go of a tensor whose capsule nobody consumed; whoever does renames it."""
    with contextlib.suppress(Exception):  # nothing may leave a destructor
        for name in FORMS:
            if _is_valid(capsule, name):
                _forget(_raw_pointer(capsule, name))
                return


_unread = _CAPSULE_DESTRUCTOR(_drop)
