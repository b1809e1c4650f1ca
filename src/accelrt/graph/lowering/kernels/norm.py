"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor


def batch_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5,
    momentum: float = 0.9, training_mode: int = 0, is_test: int = 1, spatial: int = 1, outputs: int,
) -> Sequence[Tensor]:  # fmt: skip
    if x.dim() == 1:
        raise ValueError("BatchNormalization of one dimension")
    same = all(item.dtype == x.dtype for item in (scale, bias, mean, var))
    if not training_mode:
        if same:
            return (F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon),)
        wide = torch.float64 if any(i.dtype == torch.float64 for i in (x, scale, mean)) else torch.float32
        y = F.batch_norm(x.to(wide), mean.to(wide), var.to(wide), scale.to(wide), bias.to(wide), False, 0.0, epsilon)
        return (y.to(x.dtype),)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.double() if x.dtype == torch.float64 else x.float()
    here, spread = wide.mean(axes), wide.var(axes, correction=0)
    shape = [1, -1] + [1] * (x.dim() - 2)
    normal = (wide - here.reshape(shape)) * torch.rsqrt(spread + epsilon).reshape(shape)
    y = normal * scale.to(wide.dtype).reshape(shape) + bias.to(wide.dtype).reshape(shape)
    running = mean * momentum + (here * (1 - momentum)).to(mean.dtype)
    running_var = var * momentum + (spread * (1 - momentum)).to(var.dtype)
    return (y.to(x.dtype), running, running_var)[:outputs]


def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, epsilon)


def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = 1, version: int
) -> Tensor:
    if version < 21:
        # One scale a group, not one a channel.
        each = x.shape[1] // num_groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


def layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5,
    stash_type: int = 1, outputs: int,
) -> Sequence[Tensor]:  # fmt: skip
    shape = list(x.shape)[axis:] if axis else list(x.shape)
    fits = list(scale.shape) == shape and (bias is None or list(bias.shape) == shape) and scale.dtype == x.dtype
    if outputs == 1 and fits:
        return (F.layer_norm(x, shape, scale, bias, epsilon),)
    wide = x if x.dtype == torch.float64 else x.float()
    axes = list(range(x.dim()))[axis:]
    mean = wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt(wide.var(axes, correction=0, keepdim=True) + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    y = y if bias is None else y + bias
    return (y.to(scale.dtype), mean.float(), inverse.float())[:outputs]


def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    axes = list(range(x.dim()))[axis:]
    normal = wide * torch.rsqrt((wide * wide).mean(axes, keepdim=True) + epsilon)
    return normal.to(x.dtype).to(scale.dtype) * scale


def lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """LRN: squares are summed over ``size`` channels around each, one more above it than below if that is even."""
    below, above = (size - 1) // 2, size // 2
    squares = x * x
    flat = F.pad(squares.reshape(x.shape[0], 1, x.shape[1], -1), (0, 0, below, above))
    sums: Any = sum(flat.narrow(2, i, x.shape[1]) for i in range(size))
    return x / (bias + alpha / size * sums.reshape(x.shape)) ** beta
