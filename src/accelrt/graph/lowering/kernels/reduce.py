"""Reductions, cumulative sums, softmax and the largest of an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor


def _axes(x: Tensor, axes: Any, noop: int) -> list[int]:
    """Return the axes to reduce, not negative: all where none are given, unless that means none."""
    if axes is None or (isinstance(axes, Sequence) and not axes):
        return [] if noop else list(range(x.dim()))
    given = axes if isinstance(axes, Sequence) else [axes]
    return sorted({axis % x.dim() if x.dim() else 0 for axis in given})


def _reduce(
    x: Tensor, axes: Any, keepdims: int, noop: int, function: Callable[[Tensor, list[int], bool], Tensor]
) -> Tensor:
    chosen = _axes(x, axes, noop)
    if not chosen and x.dim():
        return x
    if not x.dim():
        # A scalar reduces to itself, by the function of one element.
        return function(x.reshape(1), [0], False)
    return function(x, chosen, bool(keepdims))


def total(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduce(x, axes, keepdims, noop_with_empty_axes, lambda t, a, k: t.sum(a, keepdim=k, dtype=t.dtype))


def product(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    def function(t: Tensor, chosen: list[int], keep: bool) -> Tensor:
        for axis in reversed(chosen):
            t = t.prod(axis, keepdim=keep, dtype=t.dtype)
        return t

    return _reduce(x, axes, keepdims, noop_with_empty_axes, function)


def mean(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    def function(t: Tensor, chosen: list[int], keep: bool) -> Tensor:
        if t.is_floating_point():
            return t.mean(chosen, keepdim=keep)
        count = 1
        for axis in chosen:
            count = count * t.shape[axis]
        return torch.div(t.sum(chosen, keepdim=keep), count, rounding_mode="trunc").to(t.dtype)

    return _reduce(x, axes, keepdims, noop_with_empty_axes, function)


def _extreme(x: Tensor, axes: Any, keepdims: int, noop: int, name: str) -> Tensor:
    def function(t: Tensor, chosen: list[int], keep: bool) -> Tensor:
        if any(t.shape[axis] == 0 for axis in chosen):
            # The largest of nothing is the least there is, and the other way round.
            shape = [1 if a in chosen else n for a, n in enumerate(t.shape) if keep or a not in chosen]
            return torch.full(shape, _identity(t.dtype, name), dtype=t.dtype, device=t.device)
        return getattr(torch, name)(t, chosen, keepdim=keep)

    return _reduce(x, axes, keepdims, noop, function)


def _identity(dtype: Any, name: str) -> Any:
    if dtype == torch.bool:
        return name == "amin"
    if dtype.is_floating_point:
        return float("-inf" if name == "amax" else "inf")
    info = torch.iinfo(dtype)
    return info.min if name == "amax" else info.max


def largest(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _extreme(x, axes, keepdims, noop_with_empty_axes, "amax")


def smallest(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _extreme(x, axes, keepdims, noop_with_empty_axes, "amin")


def reduce_l1(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduce(x, axes, keepdims, 0, lambda t, a, k: t.abs().sum(a, keepdim=k, dtype=t.dtype))


def reduce_l2(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduce(x, axes, keepdims, 0, lambda t, a, k: torch.linalg.vector_norm(t, dim=a, keepdim=k))


def reduce_sum_square(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduce(x, axes, keepdims, 0, lambda t, a, k: (t * t).sum(a, keepdim=k, dtype=t.dtype))


def reduce_log_sum(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduce(x, axes, keepdims, 0, lambda t, a, k: t.sum(a, keepdim=k).log())


def reduce_log_sum_exp(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    return _reduce(x, axes, keepdims, 0, lambda t, a, k: torch.logsumexp(t, a, keepdim=k))


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, torch.argmax, axis, keepdims, select_last_index)


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, torch.argmin, axis, keepdims, select_last_index)


def _arg(x: Tensor, function: Any, axis: int, keepdims: int, last: int) -> Tensor:
    if last:
        return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=bool(keepdims))
    return function(x, dim=axis, keepdim=bool(keepdims))


def cum_sum(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _cumulate(x, axis, exclusive, reverse, torch.cumsum, 0)


def cum_prod(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _cumulate(x, axis, exclusive, reverse, torch.cumprod, 1)


def _cumulate(x: Tensor, axis: Any, exclusive: int, reverse: int, function: Any, neutral: int) -> Tensor:
    axis = axis[0] if isinstance(axis, list) else axis
    if reverse:
        x = x.flip(axis)
    if exclusive:
        first = torch.full_like(x.narrow(axis, 0, 1), neutral)
        x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    result = function(x, axis, dtype=x.dtype)
    return result.flip(axis) if reverse else result


def softmax(x: Tensor, *, axis: int | None = None, version: int) -> Tensor:
    return _along(x, axis, version, torch.softmax)


def log_softmax(x: Tensor, *, axis: int | None = None, version: int) -> Tensor:
    return _along(x, axis, version, torch.log_softmax)


def hardmax(x: Tensor, *, axis: int | None = None, version: int) -> Tensor:
    return _along(x, axis, version, _one_at_largest)


def _one_at_largest(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _along(x: Tensor, axis: int | None, version: int, function: Any) -> Tensor:
    """Since version 13 along one axis; before, along all from it on, taken as one."""
    if version >= 13:
        return function(x, -1 if axis is None else axis)
    axis = (1 if axis is None else axis) % (x.dim() or 1)
    if axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


def top_k(x: Tensor, k: Any = None, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Sequence[Tensor]:
    """TopK: equal values keep their order, which torch's own topk does not promise."""
    count = k[0] if isinstance(k, (list, tuple)) else k
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)
