"""Calls and answers in a file, for the child processes that try a candidate: arrays as raw bytes, the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.graph.types import Value, numpy_dtype


def write_values(path: Path, calls: Sequence[Mapping[str, Value]]) -> None:
    """Write what `read_values` reads."""
    with path.open("wb") as file:
        header = json.dumps([{name: _pack(value, file) for name, value in call.items()} for call in calls]).encode()
        file.write(header)
        file.write(len(header).to_bytes(8, "little"))


def read_values(path: Path) -> list[dict[str, Value]]:
    """Read calls; arrays are views of one mapping of the file that may be written to without changing it."""
    data = np.memmap(path, np.uint8, mode="c")
    length = int.from_bytes(data[-8:].tobytes(), "little")
    calls = json.loads(data[-8 - length : -8].tobytes())
    return [{name: _unpack(item, data) for name, item in call.items()} for call in calls]


def _pack(value: Value, file: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return {"items": [_pack(item, file) for item in value]}
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return {"text": array.astype(object).ravel().tolist(), "shape": array.shape}
    file.write(bytes(-file.tell() % 64))  # aligned, as engines like their inputs
    offset = file.tell()
    file.write(np.ascontiguousarray(array).tobytes())
    return {"dtype": array.dtype.name, "shape": array.shape, "offset": offset}


def _unpack(item: Any, data: np.ndarray[Any, Any]) -> Value:
    if item is None:
        return None
    if "items" in item:
        return [_unpack(inner, data) for inner in item["items"]]
    shape = tuple(item["shape"])
    if "text" in item:
        array = np.empty(len(item["text"]), object)
        array[:] = item["text"]
        return array.reshape(shape)
    dtype = numpy_dtype(item["dtype"])
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    start = item["offset"]
    return np.asarray(data[start : start + size]).view(dtype).reshape(shape)
