"""What a tensor is, told from its DLPack capsule: dtype, shape and layout, without touching its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelrt.graph.dlpack import CODES, Exported, exported

_NAMES = {code: name for name, code in CODES.items() if name != "bool"}


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
    found = exported(tensor)
    return Layout(_dtype(found), found.shape, found.contiguous)


def _dtype(found: Exported) -> str:
    if found.code == CODES["bool"] and found.bits == 8 and found.lanes == 1:
        return "bool"
    name = f"{_NAMES.get(found.code, f'kind {found.code} of bits ')}{found.bits}"
    return name if found.lanes == 1 else f"{name} in vectors of {found.lanes}"
