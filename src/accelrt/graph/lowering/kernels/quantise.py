"""Quantised types: to them, from them, and products of them."""

from __future__ import annotations

from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor, torch_dtype
from accelrt.graph.lowering.kernels.cast import cast
from accelrt.graph.lowering.kernels.conv import convolution

_RANGES = {
    "int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535), "int4": (-8, 7),
    "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3),
}  # fmt: skip


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Bring a scale or zero point to where it acts: everywhere, along an axis, or block by block."""
    if parameter.dtype in (torch.uint16, torch.uint32):
        parameter = parameter.to(torch.int32)
    if block_size:
        axis = axis % x.dim()
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if parameter.dim() == 1 and x.dim() and parameter.numel() > 1:
        axis = axis % x.dim()
        return parameter.reshape([-1 if i == axis else 1 for i in range(x.dim())])
    return parameter.reshape([]) if parameter.numel() == 1 else parameter


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, saturate: int = 1,
    block_size: int = 0, output_dtype: int = 0, precision: int = 0, onnx_dtype: str,
) -> Tensor:  # fmt: skip
    by = _spread(scale, x, axis, block_size)
    if precision == 1:
        by = by.float()
    # The scale's type is that of the division.
    ratio = x.to(by.dtype) / by
    if onnx_dtype.startswith("float"):
        if zero_point is not None:
            ratio = ratio + _spread(zero_point.to(torch.float32), x, axis, block_size).to(ratio.dtype)
        return cast(ratio, onnx_dtype=onnx_dtype, saturate=saturate)
    low, high = _RANGES[onnx_dtype]
    # Clamped before it becomes an integer, which would overflow.
    rounded = ratio.double().round().clamp(-(2.0**31), 2.0**31)
    if zero_point is not None:
        rounded = rounded + _spread(zero_point, x, axis, block_size)
    return rounded.clamp(low, high).to(torch.int32).to(torch_dtype(onnx_dtype))


def dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0,
    output_dtype: int = 0, dtype: Any,
) -> Tensor:  # fmt: skip
    by = _spread(scale, x, axis, block_size)
    wide = x.float() if x.is_floating_point() or x.dtype.itemsize < 2 else x.to(torch.int32)
    if zero_point is not None:
        wide = wide - _spread(zero_point.to(wide.dtype), x, axis, block_size)
    inner = torch.float64 if dtype == torch.float64 or not wide.is_floating_point() else torch.float32
    return (wide.to(inner) * by.to(inner)).to(dtype)


def _centred(x: Tensor, zero_point: Tensor | None) -> Tensor:
    """Take the zero point away; in float64, where products of 8-bit integers add up exactly."""
    return x.double() if zero_point is None else x.double() - zero_point.double()


def _saturated(x: Tensor, zero_point: Tensor, like: Any) -> Tensor:
    info = torch.iinfo(like)
    return (x.round() + zero_point.to(x.dtype)).clamp(info.min, info.max).to(like)


def _per_row(parameter: Tensor | None) -> Tensor:
    """Bring one parameter a row of a matrix to its place; one for all stays."""
    if parameter is None or parameter.dim() != 1 or parameter.numel() == 1:
        return parameter
    return parameter[..., None]


def mat_mul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    return torch.matmul(_centred(a, _per_row(a_zero_point)), _centred(b, b_zero_point)).to(torch.int32)


def q_linear_mat_mul(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor,
    y_scale: Tensor, y_zero_point: Tensor,
) -> Tensor:  # fmt: skip
    product = torch.matmul(_centred(a, _per_row(a_zero_point)), _centred(b, b_zero_point))
    factor = (_per_row(a_scale).double() * b_scale.double()) / _per_row(y_scale).double()
    return _saturated(product * factor, _per_row(y_zero_point), y_zero_point.dtype)


def conv_integer(
    x: Tensor, w: Tensor, x_zero_point: Tensor | None = None, w_zero_point: Tensor | None = None, **attributes: Any
) -> Tensor:
    return convolution(_centred(x, x_zero_point), _centred(w, _per_filter(w_zero_point, w)), **attributes).to(
        torch.int32
    )


def _per_filter(parameter: Tensor | None, w: Tensor) -> Tensor | None:
    if parameter is None or parameter.numel() == 1:
        return parameter
    return parameter.reshape([-1] + [1] * (w.dim() - 1))


def q_linear_conv(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor, w_zero_point: Tensor,
    y_scale: Tensor, y_zero_point: Tensor, bias: Tensor | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    bias = None if bias is None else bias.double()
    product = convolution(_centred(x, x_zero_point), _centred(w, _per_filter(w_zero_point, w)), bias, **attributes)
    factor = x_scale.double() * w_scale.double() / y_scale.double()
    factor = factor if factor.numel() == 1 else factor.reshape([1, -1] + [1] * (w.dim() - 2))
    return _saturated(product * factor, y_zero_point, y_zero_point.dtype)
