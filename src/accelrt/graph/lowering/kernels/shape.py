"""Operators that move, cut and make values without computing on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor
from accelrt.graph.lowering.host import backwards


def reshape(x: Tensor, shape: Sequence[Any], *, allowzero: int = 0) -> Tensor:
    """Reshape: 0 keeps a size, unless ``allowzero``; one -1 takes what is left."""
    if not allowzero:
        shape = [x.shape[axis] if _is(size, 0) else size for axis, size in enumerate(shape)]
    if any(_is(size, -1) for size in shape) and any(_is(size, 0) for size in shape):
        # torch cannot tell -1 beside a size of 0; ONNX takes it for what makes both sides empty.
        shape = [0 if _is(size, -1) else size for size in shape]
    return x.reshape(list(shape))


def _is(size: Any, value: int) -> bool:
    """Compare only what is a number: to ask a symbolic size would narrow it. While tracing, sizes are tensors."""
    if isinstance(size, torch.Tensor):
        return int(size) == value
    return isinstance(size, int) and size == value


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    rows = math.prod(x.shape[:axis])
    return x.reshape([rows, math.prod(x.shape[axis:])])


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(perm) if perm is not None else list(range(x.dim()))[::-1])


def squeeze(x: Tensor, axes: Any = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(axes) if isinstance(axes, Sequence) else axes)


def unsqueeze(x: Tensor, axes: Any) -> Tensor:
    axes = axes if isinstance(axes, Sequence) else [axes]
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """Expand: broadcasting both ways, so 1 keeps a size."""
    shape = list(shape)
    rank = max(x.dim(), len(shape))
    wanted = [1] * (rank - len(shape)) + shape
    own = [1] * (rank - x.dim()) + list(x.shape)
    return x.expand([o if _is(w, 1) else w for w, o in zip(wanted, own, strict=True)])


def tile(x: Tensor, repeats: Sequence[Any]) -> Tensor:
    return x.repeat(list(repeats))


def concat(*xs: Tensor, axis: int) -> Tensor:
    return torch.cat(xs, axis)


def concat_by_default(*xs: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(xs, axis)


def split(
    x: Tensor, split: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> Sequence[Tensor]:
    """Split into the sizes given, else evenly, the last part being smaller where it must."""
    if split is not None:
        return tuple(torch.split(x, list(split), axis))
    count = num_outputs or outputs
    total = x.shape[axis]
    part = -(-total // count)
    return tuple(torch.split(x, [part] * (count - 1) + [total - part * (count - 1)], axis))


def slice_(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    """Slice as numpy does, backwards too."""
    starts, ends = _list(starts), _list(ends)
    axes = range(len(starts)) if axes is None else _list(axes)
    steps = [1] * len(starts) if steps is None else _list(steps)
    forward = [slice(None)] * x.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            forward[axis] = slice(_within(start), _within(end), step)
    x = x[tuple(forward)]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            places = list(backwards(start, end, step, int(x.shape[axis])))
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


def _within(place: Any) -> Any:
    """Bring a bound that stands for "all the way" to what torch takes without a warning."""
    return max(min(place, 1 << 62), -(1 << 62)) if isinstance(place, int) else place


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def pad(x: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    """Pad or, where negative, crop."""
    pads = _list(pads)
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in _list(axes)]
    half = len(pads) // 2
    amounts = {axis: (pads[i], pads[i + half]) for i, axis in enumerate(axes)}
    if mode != "constant":
        for axis, (before, after) in amounts.items():
            if not (_is(before, 0) and _is(after, 0)):
                x = x.index_select(axis, _border(int(x.shape[axis]), before, after, mode, x.device))
        return x
    fill = value[0] if isinstance(value, list) else 0 if value is None else value
    if not x.is_floating_point() and x.dtype != torch.bool and abs(fill) >= 1 << 53:
        raise ValueError(f"Pad of {x.dtype} with {fill}, which torch would round")
    flat = [amount for axis in reversed(range(x.dim())) for amount in amounts.get(axis, (0, 0))]
    return F.pad(x, flat, value=fill)


def _border(size: int, before: int, after: int, mode: str, device: Any) -> Tensor:
    """Return which elements of an axis make up the padded one."""
    places = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    period = max(2 * (size - 1), 1)
    folded = places % period
    return torch.where(folded >= size, period - folded, folded)


def trilu(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    diagonal = k[0] if isinstance(k, list) else 0 if k is None else k
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def constant_of_shape(shape: Any, *, value: Any = None, dtype: Any, device: Any) -> Tensor:
    return torch.full(_list(shape), 0 if value is None else value, dtype=dtype, device=device)


def eye_like(x: Tensor, *, k: int = 0, dtype: Any, device: Any) -> Tensor:
    rows, columns = x.shape
    on_diagonal = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None] == k
    return on_diagonal.to(dtype)


def range_(start: Any, limit: Any, delta: Any, *, stash_type: int = 1, dtype: Any, device: Any) -> Tensor:
    """Range: start + i * delta, in float32 for halves."""
    start, limit, delta = (item[0] if isinstance(item, list) else item for item in (start, limit, delta))
    if all(isinstance(item, (int, float)) for item in (start, limit, delta)):
        count = max(math.ceil((limit - start) / delta), 0)
    else:
        count = (limit - start + delta - 1) // delta
    inner = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return (torch.arange(count, device=device).to(inner) * delta + start).to(dtype)


def shape_tensor(x: Tensor, *, start: int = 0, end: int | None = None, device: Any) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device=device)


def size_tensor(x: Tensor, *, device: Any) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=device)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b, c, h, w = x.shape
    n = blocksize
    if mode == "DCR":
        parts = x.reshape(b, n, n, c // (n * n), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(b, c // (n * n), n, n, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(b, c // (n * n), h * n, w * n)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b, c, h, w = x.shape
    n = blocksize
    parts = x.reshape(b, c, h // n, n, w // n, n)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(*order).reshape(b, c * n * n, h // n, w // n)
