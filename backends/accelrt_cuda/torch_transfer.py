"""Arrays to the device and back, through memory that the device reaches by itself."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch

from accelrt.graph.types import numpy_dtype
from accelrt_cuda.torch_place import Place

CARRIERS = {torch.bfloat16: torch.int16}
"""How types that torch does not exchange with numpy travel: with the same bits."""

SMALL_BYTES = 1 << 16
"""Results up to this size are copied once more on the host; beyond, the copy costs more than memory of their own."""
CHUNK_BYTES = 8 << 20
"""Large inputs are handed over in pieces, so that one is on its way while the next is copied."""
LENT_BYTES = 1 << 30
"""Pinned memory that callers may hold as results of one program; beyond, results are copied into ordinary memory."""


def carried(tensor: Any) -> Any:
    """Return a tensor as one of a type that numpy has."""
    carrier = CARRIERS.get(tensor.dtype)
    return tensor if carrier is None else tensor.view(carrier)


class Upload:
    """One input's way to the device: pinned memory and a tensor there, both of one shape."""

    def __init__(self, place: Place, shape: tuple[int, ...], dtype: Any) -> None:
        self.tensor = torch.empty(shape, dtype=dtype, device=place.device)
        self._pinned = place.pinned(shape, dtype)
        self._view = carried(self._pinned).numpy()
        self._carried = dtype in CARRIERS
        self._large = self._view.nbytes > CHUNK_BYTES

    def send(self, array: np.ndarray[Any, Any]) -> None:
        """Begin to copy an array; it may be changed when this returns, though the device may not have it yet."""
        source = array.view(self._view.dtype) if self._carried else array
        if self._large:
            self._in_pieces(source)
            return
        np.copyto(self._view, source)
        self.tensor.copy_(self._pinned, non_blocking=True)

    def _in_pieces(self, source: np.ndarray[Any, Any]) -> None:
        flat = np.ascontiguousarray(source).reshape(-1)
        view, pinned, target = self._view.reshape(-1), self._pinned.view(-1), self.tensor.view(-1)
        # torch copies with several threads, but takes no array that must not be written to.
        tensors = (carried(pinned), torch.from_numpy(flat)) if flat.flags.writeable else None
        step = CHUNK_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            end = start + step
            if tensors is None:
                np.copyto(view[start:end], flat[start:end])
            else:
                tensors[0][start:end].copy_(tensors[1][start:end])
            target[start:end].copy_(pinned[start:end], non_blocking=True)


class Lent:
    """Counts pinned memory that callers hold as results."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def take(self, array: np.ndarray[Any, Any]) -> bool:
        """Count an array until it and all views of it are gone; False if that would be too much."""
        size = array.nbytes
        with self._lock:
            if self._bytes + size > LENT_BYTES:
                return False
            self._bytes += size
        weakref.finalize(array, self._give_back, size).atexit = False
        return True

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._bytes -= size


class Download:
    """One result's way to the host, from tensors of one shape and type.

    Args:
        place: Where they are.
        shape, dtype: Of the tensors.
        onnx_dtype: The type that arrays have.
        lent: Counts what callers hold.
    """

    def __init__(self, place: Place, shape: tuple[int, ...], dtype: Any, onnx_dtype: str, lent: Lent) -> None:
        self._place, self._shape, self._dtype, self._lent = place, shape, dtype, lent
        self._numpy = numpy_dtype(onnx_dtype) if dtype in CARRIERS else None
        self._size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._kept = place.pinned(shape, dtype) if self._size <= SMALL_BYTES else None
        self._view: np.ndarray[Any, Any] | None = None
        if self._kept is not None:
            self._view = carried(self._kept).numpy()
            if self._numpy is not None:
                self._view = self._view.view(self._numpy)

    def begin(self, tensor: Any) -> Any:
        """Begin to copy a tensor; return what `end` takes when the device is done."""
        pinned = self._kept
        if pinned is None:
            pinned = self._place.pinned(self._shape, self._dtype)
        pinned.copy_(tensor, non_blocking=True)
        return pinned

    def end(self, pinned: Any) -> np.ndarray[Any, Any]:
        """Return the array, which is the caller's."""
        if self._view is not None:
            return self._view.copy()
        array: np.ndarray[Any, Any] = carried(pinned).numpy()
        if not self._lent.take(array):
            array = array.copy()
        return array if self._numpy is None else array.view(self._numpy)
