"""Attention without caches: what torch has as one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: int = 0,
    q_num_heads: int | None = None, kv_num_heads: int | None = None, scale: float | None = None,
    qk_matmul_output_mode: int = 0, softmax_precision: int = 1, softcap: float = 0.0,
    left_window_size: int = -1, right_window_size: int = -1,
) -> Sequence[Tensor]:  # fmt: skip
    flat = query.dim() == 3
    if flat:
        query, key, value = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(query, key, value, _mask(query, key, mask, is_causal), scale=scale)
    return (y.transpose(1, 2).flatten(2) if flat else y,)


def _mask(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: int) -> Tensor | None:
    length, total = query.shape[2], key.shape[2]
    if not is_causal:
        return mask
    causal = torch.ones(length, total, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))
