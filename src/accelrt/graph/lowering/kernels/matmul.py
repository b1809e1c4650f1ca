"""Products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,  # noqa: N803 - ONNX's names
    transB: int = 0, broadcast: int = 0,  # noqa: N803
) -> Tensor:  # fmt: skip
    a, b = a.t() if transA else a, b.t() if transB else b
    if c is not None and c.dim() == 1 and alpha == beta == 1.0 and a.is_floating_point() and c.shape[0] == b.shape[1]:
        return F.linear(a, b.t(), c)
    y = torch.matmul(a, b)
    y = y if alpha == 1.0 else y * alpha
    return y if c is None else y + (c if beta == 1.0 else c * beta)


def einsum(*xs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *xs)
