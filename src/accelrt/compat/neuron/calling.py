"""Call a program with arrays: of the sizes it was traced with, or in parts of that size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from accelrt.compat.neuron import residents
from accelrt.graph.types import Signature, TensorType


def call(number: int, arrays: Sequence[Any], *, dynamic: bool) -> list[Any]:
    """Compute a program's outputs, in order.

    Args:
        number: Under which `residents` knows the program.
        arrays: Its inputs, in order.
        dynamic: Split a batch into ones of the size compiled for; the last is filled up with its last row.

    Raises:
        RuntimeError: Shapes do not fit, in the words of the vendor's runtime.
        AccelrtError: Whatever `Session.predict` raises.
    """
    signature = residents.resident(number).artifact.signature
    if len(arrays) != len(signature.inputs):
        raise RuntimeError(f"The program takes {len(signature.inputs)} tensors, not {len(arrays)}: {signature}")
    return _in_parts(number, signature, arrays) if dynamic else _exactly(number, signature, arrays)


def check_dynamic(signature: Signature) -> int:
    """Return the batch that a program was traced with.

    Raises:
        ValueError: Dimension 0 is not one size that all inputs and outputs have in common.
    """
    shapes = [_shape(port.type) for port in (*signature.inputs, *signature.outputs)]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"Dynamic batching needs one size of dimension 0 in all inputs and outputs: {signature}.")
    return shapes[0][0]


def _in_parts(number: int, signature: Signature, arrays: Sequence[Any]) -> list[Any]:
    size, rows = check_dynamic(signature), {array.shape[0] if array.ndim else 0 for array in arrays}
    if len(rows) != 1:
        raise RuntimeError(f"Inconsistent batch sizes found on inputs: {sorted(rows)}")
    if not (count := rows.pop()):
        raise RuntimeError("The batch is empty.")
    parts = []
    for start in range(0, count, size):
        part = [array[start : start + size] for array in arrays]
        if (missing := size - len(part[0])) > 0:
            part = [np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for array in part]
        parts.append(_exactly(number, signature, part))
    return [np.concatenate(pieces)[:count] for pieces in zip(*parts, strict=True)]


def _exactly(number: int, signature: Signature, arrays: Sequence[Any]) -> list[Any]:
    for index, (array, port) in enumerate(zip(arrays, signature.inputs, strict=True)):
        if (expected := _shape(port.type)) != array.shape:
            raise RuntimeError(
                f"Incorrect tensor shape at input tensor #{index}: received {' '.join(map(str, array.shape))}, "
                f"expected {' '.join(map(str, expected))}."
            )
    with residents.running(number) as session:
        found = session.predict(dict(zip(signature.input_names, arrays, strict=True)))
    return [found[name] for name in signature.output_names]


def _shape(type_: Any) -> tuple[int, ...]:
    """Return a type's sizes, which are all fixed: programs are traced."""
    shape = type_.shape if isinstance(type_, TensorType) else None
    return tuple(dim for dim in shape or () if isinstance(dim, int))
