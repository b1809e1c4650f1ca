"""Operators that work on each element."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor


def identity(x: Any) -> Any:
    return x


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not detect_negative and not detect_positive:
        return torch.zeros_like(x, dtype=torch.bool)
    return x == (float("inf") if detect_positive else float("-inf"))


def sign(x: Tensor) -> Tensor:
    # torch's sign of NaN is 0; numpy and the runtimes pass NaN on.
    return torch.where(x.isnan(), x, x.sign()) if x.is_floating_point() else x.sign()


def softplus(x: Tensor) -> Tensor:
    # Beyond the threshold torch returns x: at 80 that is exact in every type, and exp(80) is still finite.
    return F.softplus(x, threshold=80.0) if x.dtype != torch.float16 else F.softplus(x.float(), threshold=80.0).half()


def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return F.elu(x, alpha) * gamma


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (x * alpha + beta).clamp(0, 1)


def hard_swish(x: Tensor) -> Tensor:
    return x * (x * (1 / 6) + 0.5).clamp(0, 1)


def mish(x: Tensor) -> Tensor:
    return F.mish(x)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    if not x.is_floating_point():
        bias, lambd = int(bias), int(lambd)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def prelu_per_channel(x: Tensor, slope: Tensor) -> Tensor:
    """PRelu before version 7: one slope a channel, or one for all."""
    shape = [-1] + [1] * (x.dim() - 2) if slope.numel() > 1 and x.dim() > 1 else [-1]
    return torch.where(x < 0, x * slope.reshape(shape), x)


def clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return x if min is None and max is None else torch.clamp(x, min, max)


def divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def power(a: Tensor, b: Tensor, *, dtype: Any) -> Tensor:
    """Pow; where the exponent is of another kind than the base, no digit of either is lost on the way."""
    if a.dtype == b.dtype or (not a.is_floating_point() and not b.is_floating_point()):
        return torch.pow(a, b).to(dtype)
    return torch.pow(a.double(), b.double()).to(dtype)


_ALIGNED = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": divide,
    "Pow": torch.pow,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "Less": torch.lt,
}


def aligned(a: Tensor, b: Tensor, *, op: str, axis: int | None = None, broadcast: int = 0) -> Tensor:
    """A binary operator before version 7: the second shape lies anywhere in the first, from ``axis`` on."""
    if broadcast and axis is not None:
        start = axis % a.dim() if a.dim() else 0
        b = b.reshape(list(b.shape) + [1] * (a.dim() - start - b.dim()))
    return _ALIGNED[op](a, b)


def maximum(*xs: Tensor) -> Tensor:
    return reduce(torch.maximum, xs)


def minimum(*xs: Tensor) -> Tensor:
    return reduce(torch.minimum, xs)


def sum(*xs: Tensor) -> Tensor:
    return reduce(torch.add, xs)


def mean(*xs: Tensor) -> Tensor:
    return reduce(torch.add, xs) / len(xs)


def bit_shift(x: Tensor, y: Tensor, *, direction: str, onnx_dtype: str) -> Tensor:
    """BitShift; shifts by a negative number or by more than the width leave nothing but the sign."""
    bits = int(onnx_dtype.removeprefix("u").removeprefix("int"))
    signed = not onnx_dtype.startswith("u")
    outside = (y < 0) | (y >= bits)
    amount = torch.where(outside, torch.zeros_like(y), y)
    if direction == "LEFT":
        shifted, rest = x << amount, torch.zeros_like(x)
    else:
        shifted = x >> amount
        rest = torch.where(x < 0, -1, 0).to(x.dtype) if signed else torch.zeros_like(x)
        if onnx_dtype == "uint64":
            # The bits are those of an int64, whose sign came in from the left: the mask takes it away again.
            mask = torch.where(amount == 0, -1, (1 << (64 - amount.clamp(min=1))) - 1)
            shifted = shifted & mask
    return torch.where(outside, rest, shifted)


def dropout(
    x: Tensor, ratio: Any = None, training_mode: Any = None, *, outputs: int, version: int, is_test: int = 1,
    seed: int = 0,
) -> Sequence[Tensor]:  # fmt: skip
    """Dropout at inference: everything passes."""
    if outputs == 1:
        return (x,)
    return x, torch.ones_like(x, dtype=torch.bool if version >= 10 else x.dtype)
