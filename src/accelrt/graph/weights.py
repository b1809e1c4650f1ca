"""Weights: tensors too large to travel inside an ONNX file, read lazily and stored once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from accelrt.errors import GraphError
from accelrt.graph.node import WEIGHTS_FILE

ALIGNMENT = 64
"""A cache line, and what vector loads of every current CPU want."""

_PACKED = frozenset(
    {
        ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1,
        ir.DataType.INT2, ir.DataType.UINT2,
        ir.DataType.FLOAT6E2M3, ir.DataType.FLOAT6E3M2,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes lie in a weights file."""

    offset: int
    length: int


def tensor_bytes(tensor: ir.TensorProtocol) -> memoryview:
    """Return a tensor's little-endian, row-major bytes as ONNX stores them, without a copy where it can be had.

    Raises:
        GraphError: The data is missing, cut short, or lies outside the model's folder.
    """
    try:
        if tensor.dtype in _PACKED:
            return memoryview(tensor.tobytes())
        array = np.ascontiguousarray(tensor.numpy())
    except (OSError, ValueError) as error:
        raise GraphError(
            f"The data of weight {tensor.name!r} cannot be read: {error}",
            hint="Keep external data files inside the folder of the model, complete, and pass the model's path.",
        ) from error
    return array.reshape(-1).view(np.uint8).data


def lies_outside(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor's data is in a file of its own."""
    return isinstance(tensor, ir.ExternalTensor)


class WeightFile:
    """An append-only file of weights in which equal bytes are stored once.

    Args:
        path: The file; created when the first tensor is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[bytes, Extent] = {}
        self._file: BinaryIO | None = None

    def add(self, data: memoryview, digest: bytes | None = None) -> Extent:
        """Store bytes, or find them, and tell where they are; ``digest`` is their SHA-256 where it is known already."""
        digest = digest or hashlib.sha256(data).digest()
        if (extent := self._known.get(digest)) is not None:
            return extent
        if self._file is None:
            self._file = self.path.open("ab")
        offset = self._file.tell()
        if padding := -offset % ALIGNMENT:
            self._file.write(bytes(padding))
            offset += padding
        self._file.write(data)
        extent = self._known[digest] = Extent(offset, len(data))
        return extent

    def flush(self) -> None:
        """Let readers of the file see what was added."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Finish the file; more can still be added."""
        if self._file is not None:
            self._file.close()
            self._file = None


def stub(name: str, tensor: ir.TensorProtocol, extent: Extent | None = None) -> onnx.TensorProto:
    """Return an initialiser that says dtype and dims and points at a weights file instead of holding data."""
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    point_at(proto, extent or Extent(0, tensor.nbytes))
    return proto


def point_at(proto: onnx.TensorProto, extent: Extent, location: str = WEIGHTS_FILE) -> None:
    """Make an initialiser refer to a place in a weights file."""
    proto.data_location = onnx.TensorProto.EXTERNAL
    del proto.external_data[:]
    for key, value in (("location", location), ("offset", extent.offset), ("length", extent.length)):
        proto.external_data.add(key=key, value=str(value))


def is_external(proto: onnx.TensorProto) -> bool:
    """Whether an initialiser's data lies in another file."""
    return bool(proto.data_location == onnx.TensorProto.EXTERNAL)
