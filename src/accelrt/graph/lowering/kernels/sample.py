"""Sampling of images at computed places, and the boxes around what was found in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor

_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


def grid_sample(
    x: Tensor, grid: Tensor, *, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0
) -> Tensor:
    return F.grid_sample(x, grid.to(x.dtype), _MODES[mode], padding_mode, bool(align_corners))


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample images [..., H, W] at places [..., P]; outside lies zero."""
    height, width = image.shape[-2:]
    flat = image.flatten(-2)
    top, left = y.floor(), x.floor()
    total = torch.zeros_like(flat[..., :1].expand([*flat.shape[:-1], y.shape[-1]]))
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = top + dy, left + dx
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            value = torch.gather(flat, -1, place.expand(total.shape))
            total = total + torch.where(inside, weight, torch.zeros_like(weight)) * value
    return total


def deformable(
    x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *,
    kernel_shape: Sequence[int] | None = None, strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, group: int = 1, offset_group: int = 1,
) -> Tensor:  # fmt: skip
    """DeformConv: each element of the kernel looks where an offset tells it."""
    (n, channels), (filters, _, kh, kw) = x.shape[:2], weight.shape
    oh, ow = offset.shape[2:]
    steps, gaps, edges = strides or [1, 1], dilations or [1, 1], pads or [0, 0, 0, 0]

    def base(size: int, count: int, axis: int) -> Tensor:
        """Where the kernel's elements are before any offset: [count, size]."""
        starts = torch.arange(size, device=x.device, dtype=x.dtype) * steps[axis] - edges[axis]
        return torch.arange(count, device=x.device, dtype=x.dtype)[:, None] * gaps[axis] + starts

    moves = offset.reshape(n, offset_group, kh, kw, 2, oh, ow)
    y = base(oh, kh, 0)[:, None, :, None] + moves[:, :, :, :, 0]
    z = base(ow, kw, 1)[None, :, None, :] + moves[:, :, :, :, 1]
    images = x.reshape(n, offset_group, channels // offset_group, *x.shape[2:])
    samples = _bilinear(images, y.reshape(n, offset_group, 1, -1), z.reshape(n, offset_group, 1, -1))
    if mask is not None:
        samples = samples * mask.reshape(n, offset_group, 1, -1)
    columns = samples.reshape(n, group, channels // group * kh * kw, oh * ow)
    filters_ = weight.reshape(group, filters // group, -1)
    result = torch.matmul(filters_, columns).reshape(n, filters, oh, ow)
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


def roi_align(
    x: Tensor, rois: Tensor, batch_indices: Tensor, *, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
    coordinate_transformation_mode: str | None = None, version: int,
) -> Tensor:  # fmt: skip
    """RoiAlign by averages; how many samples a region has may depend on its size."""
    half = (coordinate_transformation_mode or ("half_pixel" if version >= 16 else "output_half_pixel")) == "half_pixel"
    results = []
    for (left, top, right, bottom), image in zip(rois.double().tolist(), batch_indices.tolist(), strict=True):
        shift = 0.5 if half else 0.0
        top, left, bottom, right = (edge * spatial_scale - shift for edge in (top, left, bottom, right))
        height, width = bottom - top, right - left
        if not half:
            height, width = max(height, 1.0), max(width, 1.0)
        rows = _samples(top, height / output_height, output_height, sampling_ratio, x)
        columns = _samples(left, width / output_width, output_width, sampling_ratio, x)
        sampled = _clamped(x[image], rows.reshape(-1), columns.reshape(-1))
        sampled = sampled.reshape(x.shape[1], *rows.shape, *columns.shape)
        results.append(sampled.mean((2, 4)))
    shape = [0, x.shape[1], output_height, output_width]
    return torch.stack(results) if results else x.new_zeros(shape)


def _samples(start: float, bin_size: float, bins: int, ratio: int, like: Tensor) -> Tensor:
    """Return the places of samples along one side of a region: [bins, samples a bin]."""
    count = ratio if ratio > 0 else max(-int(-bin_size // 1), 1)
    inner = (torch.arange(count, dtype=torch.float64) + 0.5) * bin_size / count
    places = start + torch.arange(bins, dtype=torch.float64)[:, None] * bin_size + inner
    return places.to(dtype=like.dtype, device=like.device)


def _clamped(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample one image [C, H, W] on a lattice; up to one pixel outside lies the edge, then zero."""
    height, width = image.shape[-2:]

    def matrix(places: Tensor, size: int) -> Tensor:
        known = ((places >= -1) & (places <= size)).to(places.dtype)
        at = places.clamp(0, size - 1)
        weights = (1 - (at[:, None] - torch.arange(size, device=at.device, dtype=at.dtype)).abs()).clamp(min=0)
        return weights * known[:, None]

    return torch.matmul(torch.matmul(matrix(rows, height), image), matrix(columns, width).t())


def non_max_suppression(
    boxes: Tensor, scores: Tensor, limit: Any = None, iou_threshold: Any = None, score_threshold: Any = None, *,
    center_point_box: int = 0,
) -> Tensor:  # fmt: skip
    """NonMaxSuppression: for each class the best boxes that do not overlap a better one too much."""
    count, overlap, least = (i[0] if isinstance(i, list) else i for i in (limit, iou_threshold, score_threshold))
    overlap = 0.0 if overlap is None else overlap
    if center_point_box:
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        low, high = centre - half, centre + half
    else:
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
    picked = []
    for batch in range(scores.shape[0]):
        apart = _overlaps(low[batch], high[batch])
        for kind in range(scores.shape[1]):
            row = scores[batch, kind]
            order = torch.argsort(row, descending=True, stable=True)
            candidates = [i for i in order.tolist() if least is None or row[i] > least]
            kept: list[int] = []
            for i in candidates:
                if len(kept) >= (count or 0):
                    break
                if all(apart[i, j] <= overlap for j in kept):
                    kept.append(i)
            picked += [[batch, kind, i] for i in kept]
    return torch.tensor(picked, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _overlaps(low: Tensor, high: Tensor) -> Tensor:
    """Return intersection over union of all pairs of boxes."""
    sides = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0)
    shared = sides.prod(-1)
    area = (high - low).prod(-1)
    union = area[:, None] + area - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))
