"""How float32 is multiplied: torch has one setting for the process, and this engine's programs have their own.

A program that is recorded needs the setting while it is warmed up and recorded, no longer; one that is not needs it at
each call. Programs that want the same go together, and others wait. What was set before is set again afterwards. Code
of the user's that computes with torch in another thread meanwhile sees our setting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CONDITION = threading.Condition()
_STATE: dict[str, Any] = {"users": 0, "tf32": False, "before": None}


@contextmanager
def float32_math(*, allow_tf32: bool) -> Iterator[None]:
    """Multiply float32 by TensorFloat-32 or not, and let cuDNN try which of its kernels is fastest, in this context."""
    with _CONDITION:
        while _STATE["users"] and _STATE["tf32"] != allow_tf32:
            _CONDITION.wait()
        if not _STATE["users"]:
            _STATE["before"] = _set(allow_tf32)
            _STATE["tf32"] = allow_tf32
        _STATE["users"] += 1
    try:
        yield
    finally:
        with _CONDITION:
            _STATE["users"] -= 1
            if not _STATE["users"]:
                _restore(_STATE["before"])
                _STATE["before"] = None
                _CONDITION.notify_all()


def _precisions() -> tuple[Any, ...]:
    """Return the settings that torch has by this name since 2.9; none before."""
    import torch

    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    return places if hasattr(places[0], "fp32_precision") else ()


def _set(allow: bool) -> tuple[Any, ...]:
    """Set what is wanted by the older names, which set the newer ones alike: mixed, torch raises when they are read."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    places = _precisions()
    if places:
        texts = tuple(place.fp32_precision for place in places)
        old = (texts[0] == "tf32", texts[1] == "tf32")
    else:
        texts, old = (), (matmul.allow_tf32, cudnn.allow_tf32)
    before = (old, texts, cudnn.benchmark)
    matmul.allow_tf32 = allow
    cudnn.allow_tf32 = allow
    for place in places:
        if not allow and place.fp32_precision == "tf32":  # from the setting above all of them
            place.fp32_precision = "ieee"
    cudnn.benchmark = True
    return before


def _restore(before: tuple[Any, ...]) -> None:
    import torch

    (matmul_old, cudnn_old), texts, benchmark = before
    torch.backends.cuda.matmul.allow_tf32 = matmul_old
    torch.backends.cudnn.allow_tf32 = cudnn_old
    torch.backends.cudnn.benchmark = benchmark
    for place, text in zip(_precisions(), texts, strict=True):
        if place.fp32_precision != text:
            place.fp32_precision = text
