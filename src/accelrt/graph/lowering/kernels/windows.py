"""The windows of convolutions and pools: attributes filled in, and padding that torch's own cannot express."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812 - its usual name

from accelrt.graph.lowering.dtypes import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """What slides over an image: one item for each spatial axis.

    ``before`` and ``after`` are padding as the operator defines it; ``extra`` is what ceil_mode adds beyond, so that
    the last windows fit.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[Any]
    after: list[Any]
    extra: list[Any]

    @property
    def symmetric(self) -> bool:
        """Whether torch's own padding, the same on both sides, will do."""
        return self.before == self.after and not any(self.extra)

    @property
    def dense(self) -> bool:
        """Whether no element of the kernel is skipped."""
        return all(step == 1 for step in self.dilations)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Pad explicitly, on both sides, with what ceil_mode adds."""
        amounts = [(b, a + e) for b, a, e in zip(self.before, self.after, self.extra, strict=True)]
        flat = [amount for pair in reversed(amounts) for amount in pair]
        return F.pad(x, flat, value=value) if any(flat) else x


def window(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int] | None, dilations: Sequence[int] | None,
    pads: Sequence[int] | None, auto_pad: str, ceil_mode: int = 0,
) -> Window:  # fmt: skip
    """Fill in defaults, resolve ``auto_pad`` for the sizes of ``x``, and find what ceil_mode needs."""
    rank = len(kernel)
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, gaps, strict=True)]
    before, after = ([0] * rank, [0] * rank) if not pads else (list(pads[:rank]), list(pads[rank:]))
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-size // step) - 1) * step + span - size, 0)
            for size, step, span in zip(x.shape[2:], steps, spans, strict=True)
        ]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    elif auto_pad == "VALID":
        before, after = [0] * rank, [0] * rank
    extra: list[Any] = [0] * rank
    if ceil_mode:
        for i, size in enumerate(x.shape[2:]):
            room = size + before[i] + after[i]
            count = -(-(room - spans[i]) // steps[i]) + 1
            if (count - 1) * steps[i] >= size + before[i]:
                count = count - 1  # a window that begins in the padding on the right is none
            extra[i] = max((count - 1) * steps[i] + spans[i] - room, 0)
    return Window(list(kernel), steps, gaps, before, after, extra)
