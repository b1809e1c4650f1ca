"""PyTorch as PyTorch-EI 1.3.1 had it: ``from accelrt.compat.eia import torch``.

Everything is the installed PyTorch's own, but for ``torch.jit.optimized_execution``, which takes a target device.
Nothing of PyTorch's is replaced.
"""

from __future__ import annotations

from typing import Any

import torch as _torch

from accelrt.compat.eia.torch import jit as jit


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return dir(_torch)
