"""Conversions between data types, those that torch does not have among them."""

from __future__ import annotations

from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor, same_bits, torch_dtype

_SMALL = {"int4": (4, True), "uint4": (4, False), "int2": (2, True), "uint2": (2, False)}
_LARGEST = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
    torch.float8_e5m2fnuz: 57344.0,
}
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of float4_e2m1fn, from its code."""


def cast(x: Tensor, *, onnx_dtype: str, saturate: int = 1, round_mode: str = "up", to: Any = None) -> Tensor:
    """Cast to an ONNX type; what no type of torch is, comes in the type that holds it."""
    target = torch_dtype(onnx_dtype)
    if onnx_dtype == "bool":
        return x != 0
    if onnx_dtype in _SMALL:
        return _small_integer(x, *_SMALL[onnx_dtype])
    if onnx_dtype == "float4_e2m1fn":
        return float4(x)
    if target in _LARGEST:
        return float8(x, target, bool(saturate))
    if x.dtype.is_floating_point and not target.is_floating_point:
        # Straight from a half to an unsigned type is undefined below zero on some machines; through int64 it wraps.
        return x if x.dtype == target else x.to(torch.int64).to(target) if target.itemsize < 8 else x.to(target)
    return x.to(target)


def cast_like(
    x: Tensor, like: Tensor | None = None, *, onnx_dtype: str, saturate: int = 1, round_mode: str = "up"
) -> Tensor:
    return cast(x, onnx_dtype=onnx_dtype, saturate=saturate)


def _small_integer(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Keep the low bits; floats are rounded towards zero first."""
    low = x.to(torch.int32) & ((1 << bits) - 1)
    if signed:
        low = torch.where(low >= 1 << (bits - 1), low - (1 << bits), low)
    return low.to(torch.int8 if signed else torch.uint8)


def float8(x: Tensor, target: Any, saturate: bool) -> Tensor:
    """Round to an 8-bit float; what is too large becomes the largest value, or what the type has instead."""
    x = x.float()
    if saturate:
        largest = _LARGEST[target]
        return torch.where(x.isnan(), x, x.clamp(-largest, largest)).to(target)
    if target == torch.float8_e4m3fn:
        # torch saturates here; 464 lies halfway to what would be the next value, and goes to the even one below.
        return torch.where(x.abs() > 464, torch.full_like(x, torch.nan), x).to(target)
    return x.to(target)


def float4(x: Tensor) -> Tensor:
    """Round to the nearest of float4's sixteen values, ties to the even code; too large saturates, in float32."""
    table = torch.tensor(_FLOAT4, device=x.device)
    x = x.float()
    # The type has no NaN; ONNX's own conversion makes it zero.
    size = torch.where(x.isnan(), torch.zeros_like(x), x.abs().clamp(max=_FLOAT4[-1]))
    above = torch.bucketize(size, table).clamp(max=7)
    below = (above - 1).clamp(min=0)
    to_above, to_below = table[above] - size, size - table[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.copysign(table[torch.where(up, above, below)], x)


def bit_cast(x: Tensor, *, to: int, onnx_dtype: str) -> Tensor:
    return same_bits(x, torch_dtype(onnx_dtype))
