"""Gather, scatter, and what picks elements by their place or value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _places(indices: Tensor, size: Any) -> Tensor:
    """Return indices as int64 from 0 on; negative ones count from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def gather(x: Tensor, indices: Any, *, axis: int = 0) -> Tensor:
    axis = axis % x.dim()
    if isinstance(indices, int):
        return x.select(axis, indices)
    if indices.dim() == 1:
        return x.index_select(axis, _places(indices, x.shape[axis]))
    places = _places(indices, x.shape[axis])
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, places.reshape(-1)).reshape(shape)


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _places(indices, x.shape[axis]))


def _flat_places(shape: Sequence[Any], indices: Tensor) -> Tensor:
    """Return where tuples of indices into the leading axes lie, in a tensor with these axes made one."""
    flat = torch.zeros_like(indices[..., 0], dtype=torch.int64)
    for position in range(indices.shape[-1]):
        flat = flat * shape[position] + _places(indices[..., position], shape[position])
    return flat


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    depth = indices.shape[-1]
    inner = list(x.shape[batch_dims + depth :])
    outer = list(indices.shape[:-1])
    batch = list(x.shape[:batch_dims])
    flat = _flat_places(list(x.shape[batch_dims:]), indices)
    span = 1
    for size in x.shape[batch_dims : batch_dims + depth]:
        span = span * size
    if batch_dims:
        count = 1
        for size in batch:
            count = count * size
        offsets = torch.arange(count, device=x.device).reshape(batch + [1] * (len(outer) - batch_dims)) * span
        flat = flat + offsets
    rows = x.reshape([-1, *inner]) if x.numel() else x.reshape([0, *inner])
    return rows.index_select(0, flat.reshape(-1)).reshape(outer + inner)


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    places = _places(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction], include_self=True)


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    inner = list(x.shape[depth:])
    flat = _flat_places(list(x.shape), indices).reshape(-1)
    width = 1
    for size in inner:
        width = width * size
    count = 1
    for size in x.shape[:depth]:
        count = count * size
    rows, values = x.reshape([count, width]), updates.reshape([flat.numel(), width])
    if reduction == "none":
        return rows.index_put((flat,), values).reshape(x.shape)
    places = flat[:, None].expand(flat.numel(), width)
    return rows.scatter_reduce(0, places, values, _REDUCTIONS[reduction], include_self=True).reshape(x.shape)


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition.reshape(-1))[:, 0])


def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> Sequence[Tensor]:
    """Unique with the place of each value's first occurrence, which torch does not tell."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    axis = axis % x.dim()
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    size = inverse.numel()
    first = torch.full((counts.numel(),), size, device=x.device).scatter_reduce(
        0, inverse, torch.arange(size, device=x.device), "amin", include_self=True
    )
    if not sorted:
        order = torch.argsort(first)
        rank = torch.argsort(order)
        values, first, counts, inverse = values.index_select(axis, order), first[order], counts[order], rank[inverse]
    return values, first, inverse, counts


def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth[0] if isinstance(depth, list) else depth)
    indices = indices.long()
    indices = torch.where(indices < 0, indices + count, indices)
    axis = axis % (indices.dim() + 1)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = count
    hot = indices.unsqueeze(axis) == torch.arange(count, device=indices.device).reshape(shape)
    return torch.where(hot, values[1], values[0])


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """ReverseSequence: the first ``lengths[b]`` steps of each batch element back to front, the rest as they are."""
    steps = x.shape[time_axis]
    time = torch.arange(steps, device=x.device)[:, None]
    lengths = lengths.long()[None, :]
    source = torch.where(time < lengths, lengths - 1 - time, time)
    source = source if time_axis < batch_axis else source.t()
    shape = [1] * x.dim()
    shape[time_axis], shape[batch_axis] = steps, x.shape[batch_axis]
    return torch.gather(x, time_axis, source.reshape(shape).expand(x.shape))


def tensor_scatter(
    past: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    axis = axis % past.dim()
    places = torch.arange(update.shape[axis], device=past.device)[None, :]
    if write_indices is not None:
        places = places + write_indices.long()[:, None]
    if mode == "circular":
        places = places % past.shape[axis]
    shape = [1] * past.dim()
    shape[0], shape[axis] = places.shape
    return past.scatter(axis, places.reshape(shape).expand(update.shape), update)
