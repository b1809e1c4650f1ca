"""Resize and Upsample: along each axis a choice of elements, or a product with a matrix of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor


@dataclass(frozen=True, slots=True)
class _Method:
    mode: str
    coordinates: str
    nearest_mode: str
    cubic: float
    exclude_outside: bool
    antialias: bool
    extrapolation: float


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis: its size, the size wanted, their ratio as given (not always that of the sizes), the region."""

    size: int
    wanted: int
    scale: float
    start: float
    end: float


def upsample(x: Tensor, scales: Any = None, *, mode: str = "nearest", version: int) -> Tensor:
    """Upsample, and Resize before version 11: places are scaled, and the nearest is the one below."""
    mode = "linear" if mode == "bilinear" else mode
    method = _Method(mode, "asymmetric", "floor", -0.75, False, False, 0.0)
    axes = [_Axis(int(n), math.floor(n * s), s, 0.0, 1.0) for n, s in zip(x.shape, scales, strict=True)]
    return _resized(x, axes, method)


def resize(
    x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None, *, mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0, antialias: int = 0,
    axes: Sequence[int] | None = None, keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:  # fmt: skip
    chosen = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    method = _Method(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), bool(antialias),
        extrapolation_value,
    )  # fmt: skip
    lengths = [int(x.shape[axis]) for axis in chosen]
    if sizes:
        wanted, ratios = list(sizes), [m / n for m, n in zip(sizes, lengths, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            ratio = min(ratios) if keep_aspect_ratio_policy == "not_larger" else max(ratios)
            ratios = [ratio] * len(chosen)
            wanted = [math.floor(ratio * n + 0.5) for n in lengths]
    else:
        ratios = list(scales)
        wanted = [math.floor(n * s) for n, s in zip(lengths, ratios, strict=True)]
    plan = [_Axis(int(n), int(n), 1.0, 0.0, 1.0) for n in x.shape]
    for i, axis in enumerate(chosen):
        region = (roi[i], roi[i + len(chosen)]) if roi else (0.0, 1.0)
        plan[axis] = _Axis(lengths[i], int(wanted[i]), ratios[i], *region)
    return _resized(x, plan, method)


def _resized(x: Tensor, plan: Sequence[_Axis], method: _Method) -> Tensor:
    crops = method.coordinates == "tf_crop_and_resize"
    changed = [i for i, a in enumerate(plan) if a.size != a.wanted or a.scale != 1.0 or crops]
    if _is_plain_bilinear(x, plan, method, changed):
        wanted = [plan[2].wanted, plan[3].wanted]
        return F.interpolate(x, size=wanted, mode="bilinear", align_corners=False)
    if any(plan[axis].wanted == 0 or plan[axis].size == 0 for axis in changed):
        return x.new_zeros([a.wanted for a in plan])
    outside = None
    y = x if method.mode == "nearest" or x.dtype in (torch.float32, torch.float64) else x.float()
    for axis in changed:
        if method.mode == "nearest":
            y = y.index_select(axis, torch.tensor(_nearest(plan[axis], method), device=x.device))
        else:
            matrix = torch.from_numpy(_weights(plan[axis], method)).to(device=x.device, dtype=y.dtype)
            y = _along(y, axis, matrix)
        if crops:
            here = torch.tensor(_beyond(plan[axis], method), device=x.device)
            here = here.reshape([-1 if i == axis else 1 for i in range(x.dim())])
            outside = here if outside is None else outside | here
    if outside is not None:
        y = torch.where(outside, torch.full_like(y, method.extrapolation), y)
    return y.to(x.dtype)


def _is_plain_bilinear(x: Tensor, plan: Sequence[_Axis], method: _Method, changed: Sequence[int]) -> bool:
    """Whether torch has the very operation: images, half pixels, ratios that are those of the sizes."""
    return (
        x.dim() == 4
        and set(changed) <= {2, 3}
        and method.mode == "linear"
        and not method.antialias
        and not method.exclude_outside
        and method.coordinates in ("half_pixel", "pytorch_half_pixel")
        and all(a.wanted > 1 and a.size > 0 and a.size * a.scale == a.wanted for a in plan[2:])
    )


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    if axis == x.dim() - 1:
        return torch.matmul(x, matrix.t())
    if axis == x.dim() - 2:
        return torch.matmul(matrix, x)
    return torch.matmul(x.movedim(axis, -1), matrix.t()).movedim(-1, axis)


def _origins(axis: _Axis, method: _Method) -> np.ndarray[Any, Any]:
    """Return where in the original each element of the resized axis lies."""
    i, n, m, s = np.arange(axis.wanted, dtype=np.float64), axis.size, axis.wanted, axis.scale
    match method.coordinates:
        case "half_pixel":
            return (i + 0.5) / s - 0.5
        case "half_pixel_symmetric":
            return n / 2 * (1 - m / (s * n)) + (i + 0.5) / s - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / s - 0.5 if m > 1 else i * 0
        case "align_corners":
            return i * (n - 1) / (m - 1) if m > 1 else i * 0
        case "asymmetric":
            return i / s
        case "tf_half_pixel_for_nn":
            return (i + 0.5) / s
        case "tf_crop_and_resize":
            if m == 1:
                return np.array([0.5 * (axis.start + axis.end) * (n - 1)])
            return axis.start * (n - 1) + i * (axis.end - axis.start) * (n - 1) / (m - 1)
    raise ValueError(f"Resize with coordinate_transformation_mode {method.coordinates!r}")


@lru_cache(maxsize=256)
def _beyond(axis: _Axis, method: _Method) -> list[bool]:
    places = _origins(axis, method)
    return [bool(p) for p in (places < 0) | (places > axis.size - 1)]


@lru_cache(maxsize=256)
def _nearest(axis: _Axis, method: _Method) -> list[int]:
    places = _origins(axis, method)
    match method.nearest_mode:
        case "round_prefer_floor":
            rounded = np.ceil(places - 0.5)
        case "round_prefer_ceil":
            rounded = np.floor(places + 0.5)
        case "floor":
            rounded = np.floor(places)
        case _:
            rounded = np.ceil(places)
    return [int(p) for p in np.clip(rounded, 0, axis.size - 1)]


@lru_cache(maxsize=256)
def _weights(axis: _Axis, method: _Method) -> np.ndarray[Any, Any]:
    """Return the matrix [wanted, size] that resizes an axis linearly or cubically; beyond the edge lies the edge."""
    places = _origins(axis, method)
    shrink = min(axis.scale, 1.0) if method.antialias else 1.0
    reach = 1 if method.mode == "linear" else 2
    first = math.floor(-reach / shrink) + 1
    offsets = np.arange(first, 2 - first)
    matrix = np.zeros((axis.wanted, axis.size))
    for row, place in enumerate(places):
        below = math.floor(place)
        distance = np.abs(offsets - (place - below)) * shrink
        taps = np.clip(1 - distance, 0, 1) if method.mode == "linear" else _cubic(distance, method.cubic)
        columns = below + offsets
        if method.exclude_outside:
            taps = np.where((columns < 0) | (columns >= axis.size), 0, taps)
        if method.antialias or method.exclude_outside:
            taps = taps / taps.sum()
        np.add.at(matrix[row], np.clip(columns, 0, axis.size - 1), taps)
    return matrix


def _cubic(distance: np.ndarray[Any, Any], a: float) -> np.ndarray[Any, Any]:
    """Keys' kernel with parameter ``a``, as ONNX and torch have it."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))
