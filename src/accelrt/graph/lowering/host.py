"""Arithmetic on shapes, on Python numbers instead of tensors.

Exporters compute shapes with operators: Shape, Gather, Mul, Concat, Reshape. As tensors these would tie the module to
data: `torch.export` and compilers for accelerators would not see that a size is a size. So values that come from
shapes alone are Python numbers (symbolic ones under `torch.export`): an ``int`` for rank 0, a list for rank 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from accelrt.graph.lowering.dtypes import Tensor

Sizes: TypeAlias = Any
"""An integer, or a list of them."""


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Sizes:
    """Shape: the sizes of the axes from ``start`` to ``end``, both clamped."""
    return list(x.shape)[start:end]


def size(x: Tensor) -> Sizes:
    """Size: the number of elements."""
    return x.numel()


def length(x: Sequence[Any]) -> Sizes:
    """SequenceLength."""
    return len(x)


def as_tensor(x: Sizes, *, dtype: Any, device: Any) -> Tensor:
    """Make a tensor of sizes, where something that is no size wants them."""
    if torch.jit.is_tracing() and isinstance(x, list) and x:
        # While tracing, sizes are tensors; torch.tensor would forget where they come from.
        return torch.stack([torch.as_tensor(item, dtype=dtype, device=device) for item in x])
    if torch.jit.is_tracing():
        return torch.as_tensor(x, dtype=dtype, device=device)
    return torch.tensor(x, dtype=dtype, device=device)


def as_numbers(x: Tensor) -> Any:
    """Read a tensor back as Python numbers: the one place where the lowered module depends on data."""
    return x.tolist()


def gather(x: Sizes, indices: Sizes, *, axis: int = 0) -> Sizes:
    """Gather on a list."""
    return [x[i] for i in indices] if isinstance(indices, list) else x[indices]


def slice_(x: Sizes, starts: Sizes, ends: Sizes, axes: Sizes = None, steps: Sizes = None) -> Sizes:
    """Slice of a list."""
    first = [item[0] if isinstance(item, list) else item for item in (starts, ends, 1 if steps is None else steps)]
    start, end, step = first
    return [x[i] for i in backwards(start, end, step, len(x))] if step < 0 else x[start:end:step]


def backwards(start: int, end: int, step: int, size: int) -> range:
    """Return the places of a slice against the direction of an axis, clamped as ONNX says, not as Python does."""
    start, end = (place + size if place < 0 else place for place in (start, end))
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


def concat(*xs: Sizes, axis: int = 0) -> Sizes:
    """Concat of lists."""
    return [item for x in xs for item in x]


def unsqueeze(x: Sizes, axes: Sizes = None) -> Sizes:
    """Unsqueeze of a number."""
    return [x]


def squeeze(x: Sizes, axes: Sizes = None) -> Sizes:
    """Squeeze of a list of one."""
    return x[0]


def identity(x: Sizes, **_: Any) -> Sizes:
    """Identity, and Cast from one integer type to another."""
    return x


def elementwise(x: Sizes, y: Sizes, *, op: str) -> Sizes:
    """A binary operator on sizes, or on what was found of them; one may be a single number."""
    return _spread(_ELEMENTWISE[op], x, y)


def negate(x: Sizes) -> Sizes:
    """Not."""
    return [not item for item in x] if isinstance(x, list) else not x


def where(condition: Sizes, x: Sizes, y: Sizes) -> Sizes:
    """Where, of three numbers or lists that broadcast."""
    pairs = _spread(lambda a, b: (a, b), x, y)
    return _spread(lambda c, pair: pair[0] if c else pair[1], condition, pairs)


def _spread(function: Callable[[Any, Any], Any], x: Sizes, y: Sizes) -> Sizes:
    """Apply a function to numbers, or along lists; a list of one, or a number, goes with all of the other."""
    if not isinstance(x, list) and not isinstance(y, list):
        return function(x, y)
    xs, ys = x if isinstance(x, list) else [x], y if isinstance(y, list) else [y]
    count = len(ys) if len(xs) == 1 else len(xs)
    xs, ys = (item * count if len(item) == 1 else item for item in (xs, ys))
    return [function(a, b) for a, b in zip(xs, ys, strict=True)]


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # symbolic, so a size: never negative


_ELEMENTWISE: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": lambda a, b: a % b,
    "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b,
    "Greater": lambda a, b: a > b,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
}
