"""Optimisers: one step each, as ONNX's preview of training defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accelrt.graph.lowering.dtypes import Tensor


def adagrad(
    rate: Tensor, count: Tensor, *xs: Tensor, decay_factor: float = 0.0, epsilon: float = 0.0,
    norm_coefficient: float = 0.0,
) -> Sequence[Tensor]:  # fmt: skip
    n = len(xs) // 3
    step = rate / (1 + count.to(rate.dtype) * decay_factor)
    new_x, new_h = [], []
    for x, g, h in zip(xs[:n], xs[n : 2 * n], xs[2 * n :], strict=True):
        g = norm_coefficient * x + g
        h = h + g * g
        new_x.append(x - step.to(x.dtype) * g / (torch.sqrt(h) + epsilon))
        new_h.append(h)
    return (*new_x, *new_h)


def adam(
    rate: Tensor, count: Tensor, *xs: Tensor, alpha: float = 0.9, beta: float = 0.999, epsilon: float = 0.0,
    norm_coefficient: float = 0.0, norm_coefficient_post: float = 0.0,
) -> Sequence[Tensor]:  # fmt: skip
    n = len(xs) // 4
    t = count.to(rate.dtype)
    corrected = rate * torch.sqrt(1 - beta**t) / (1 - alpha**t)
    step = torch.where(count > 0, corrected, rate)
    outputs: tuple[list[Tensor], ...] = ([], [], [])
    for x, g, v, h in zip(xs[:n], xs[n : 2 * n], xs[2 * n : 3 * n], xs[3 * n :], strict=True):
        g = norm_coefficient * x + g
        v = alpha * v + (1 - alpha) * g
        h = beta * h + (1 - beta) * g * g
        x = x - step.to(x.dtype) * v / (torch.sqrt(h) + epsilon)
        for group, value in zip(outputs, ((1 - norm_coefficient_post) * x, v, h), strict=True):
            group.append(value)
    return (*outputs[0], *outputs[1], *outputs[2])


def momentum(
    rate: Tensor, count: Tensor, *xs: Tensor, alpha: float, beta: float, mode: str, norm_coefficient: float
) -> Sequence[Tensor]:
    n = len(xs) // 3
    new_x, new_v = [], []
    for x, g, v in zip(xs[:n], xs[n : 2 * n], xs[2 * n :], strict=True):
        g = norm_coefficient * x + g
        adjusted = torch.where(count > 0, torch.full_like(rate, beta), torch.ones_like(rate)).to(x.dtype)
        v = alpha * v + adjusted * g
        new_x.append(x - rate.to(x.dtype) * (g + alpha * v if mode == "nesterov" else v))
        new_v.append(v)
    return (*new_x, *new_v)
