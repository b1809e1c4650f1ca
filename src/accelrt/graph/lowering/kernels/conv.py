"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor
from accelrt.graph.lowering.kernels.windows import window

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernel_shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET", group: int = 1,
) -> Tensor:  # fmt: skip
    w = window(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    function = _CONVOLVE[weight.dim() - 2]
    if w.symmetric:
        return function(x, weight, bias, w.strides, w.before, w.dilations, group)
    return function(w.pad(x), weight, bias, w.strides, 0, w.dilations, group)


def transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernel_shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None, output_shape: Sequence[int] | None = None, auto_pad: str = "NOTSET",
    group: int = 1,
) -> Tensor:  # fmt: skip
    rank = weight.dim() - 2
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    added = list(output_padding or [0] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], gaps, strict=True)]
    full = [(size - 1) * step + span for size, step, span in zip(x.shape[2:], steps, spans, strict=True)]
    before, after = ([0] * rank, [0] * rank) if not pads else (list(pads[:rank]), list(pads[rank:]))
    if output_shape is not None or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * step for size, step in zip(x.shape[2:], steps, strict=True)]
        wanted = wanted if output_shape is None else list(output_shape)[-rank:]
        totals = [f + a - n for f, a, n in zip(full, added, wanted, strict=True)]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    function = _TRANSPOSED[rank]
    if before == after and all(p >= 0 and a < max(s, d) for p, a, s, d in zip(before, added, steps, gaps, strict=True)):
        return function(x, weight, bias, steps, before, added, group, gaps)
    # Compute all there is, then cut at both ends; what is added beyond the end is empty but for the bias.
    y = function(x, weight, None, steps, 0, 0, group, gaps)
    flat = [item for b, a, o in reversed(list(zip(before, after, added, strict=True))) for item in (-b, o - a)]
    y = F.pad(y, flat)
    return y if bias is None else y + bias.reshape([1, -1] + [1] * rank)


def col2im(
    x: Tensor, image_shape: Any, block_shape: Any, *, dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Col2Im in any number of dimensions: each block is added where it was taken from."""
    image, block, rank = list(image_shape), list(block_shape), len(image_shape)
    gaps, steps, edges = dilations or [1] * rank, strides or [1] * rank, pads or [0] * (2 * rank)
    padded = [size + edges[i] + edges[i + rank] for i, size in enumerate(image)]
    place = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=x.device)
    for i in range(rank):
        count = (padded[i] - gaps[i] * (block[i] - 1) - 1) // steps[i] + 1
        inside = (torch.arange(block[i], device=x.device) * gaps[i]).reshape(
            [-1 if a == i else 1 for a in range(2 * rank)]
        )
        start = (torch.arange(count, device=x.device) * steps[i]).reshape(
            [-1 if a == rank + i else 1 for a in range(2 * rank)]
        )
        place = place * padded[i] + inside + start
    batch, area = x.shape[0], 1
    for size in block:
        area = area * size
    channels = x.shape[1] // area
    total = 1
    for size in padded:
        total = total * size
    values = x.reshape(batch, channels, -1)
    out = torch.zeros([batch, channels, total], dtype=x.dtype, device=x.device)
    out = out.index_add(2, place.reshape(-1), values).reshape([batch, channels, *padded])
    for i in range(rank):
        out = out.narrow(2 + i, edges[i], image[i])
    return out
