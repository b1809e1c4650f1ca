"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor
from accelrt.graph.lowering.kernels.windows import Window, window

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def max_pool(
    x: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, auto_pad: str = "NOTSET",
    ceil_mode: int = 0, storage_order: int = 0, outputs: int,
) -> Sequence[Tensor]:  # fmt: skip
    w = window(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    function = _MAX[len(w.kernel)]
    if outputs == 1 and _within_half(w):
        return (function(x, w.kernel, w.strides, w.before, w.dilations),)
    padded = w.pad(x, float("-inf"))
    if outputs == 1:
        return (function(padded, w.kernel, w.strides, 0, w.dilations),)
    values, places = function(padded, w.kernel, w.strides, 0, w.dilations, return_indices=True)
    return values, _unpadded(places, x, padded, w, bool(storage_order))


def _within_half(w: Window) -> bool:
    """Whether torch takes the padding: the same on both sides, and no more than half the kernel."""
    return w.symmetric and all(2 * b <= k for b, k in zip(w.before, w.kernel, strict=True))


def _unpadded(places: Tensor, x: Tensor, padded: Tensor, w: Window, by_columns: bool) -> Tensor:
    """Turn places in one padded image into places in the whole tensor."""
    coordinates, rest = [], places
    for size in reversed(padded.shape[2:]):
        coordinates.append(rest % size)
        rest = rest // size
    coordinates = [c - b for c, b in zip(reversed(coordinates), w.before, strict=True)]
    flat = torch.zeros_like(places)
    pairs = list(zip(coordinates, x.shape[2:], strict=True))
    for coordinate, size in reversed(pairs) if by_columns else pairs:
        flat = flat * size + coordinate
    area = x[0, 0].numel()
    images = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape([*x.shape[:2]] + [1] * (x.dim() - 2))
    return flat + images * area


def average_pool(
    x: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, auto_pad: str = "NOTSET",
    ceil_mode: int = 0, count_include_pad: int = 0,
) -> Tensor:  # fmt: skip
    w = window(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if w.dense and _within_half(w):
        function = _AVERAGE[len(w.kernel)]
        return function(x, w.kernel, w.strides, w.before, False, bool(count_include_pad))
    ones = torch.ones_like(x[:1, :1])
    if count_include_pad:
        # What ceil_mode adds is not counted, padding is.
        inner = [item for b, a in reversed(list(zip(w.before, w.after, strict=True))) for item in (b, a)]
        ones = F.pad(ones, inner, value=1.0)
        ones = F.pad(ones, [item for e in reversed(w.extra) for item in (0, e)])
    else:
        ones = w.pad(ones)
    return _sums(w.pad(x), w) / _sums(ones, w)


def _sums(x: Tensor, w: Window) -> Tensor:
    """Add up each window of what is padded already: a convolution with ones."""
    ones = torch.ones([1, 1, *w.kernel], dtype=x.dtype, device=x.device)
    single = x.reshape([-1, 1, *x.shape[2:]])
    y = _CONVOLVE[len(w.kernel)](single, ones, None, w.strides, 0, w.dilations)
    return y.reshape([*x.shape[:2], *y.shape[2:]])


def lp_pool(
    x: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, auto_pad: str = "NOTSET",
    ceil_mode: int = 0, p: int = 2,
) -> Tensor:  # fmt: skip
    w = window(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _sums(w.pad(x).abs() ** p, w) ** (1.0 / p)


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    return torch.linalg.vector_norm(x, ord=p, dim=list(range(2, x.dim())), keepdim=True)


def max_unpool(
    x: Tensor, indices: Tensor, output_shape: Any = None, *, kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None, pads: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """MaxUnpool: values go back to where MaxPool found them, in a tensor of the size that it had.

    The places count in that size even if ``output_shape`` asks for a larger one, where they keep their coordinates.
    """
    rank = len(kernel_shape)
    steps, edges = list(strides or [1] * rank), list(pads or [0] * (2 * rank))
    natural = [
        (size - 1) * step + kernel - edges[i] - edges[i + rank]
        for i, (size, step, kernel) in enumerate(zip(x.shape[2:], steps, kernel_shape, strict=True))
    ]
    shape = [*x.shape[:2], *natural]
    total = 1
    for size in shape:
        total = total * size
    flat = torch.zeros(total, dtype=x.dtype, device=x.device).scatter(0, indices.reshape(-1), x.reshape(-1))
    y = flat.reshape(shape)
    if output_shape is None:
        return y
    wanted = list(output_shape)
    return F.pad(y, [item for axis in reversed(range(y.dim())) for item in (0, wanted[axis] - y.shape[axis])])
