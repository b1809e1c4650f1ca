"""``torch.jit`` with the ``optimized_execution`` of PyTorch-EI 1.3.1."""

from __future__ import annotations

from typing import Any

import torch.jit as _jit

from accelrt.compat.eia.scripts import optimized_execution as optimized_execution


def __getattr__(name: str) -> Any:
    return getattr(_jit, name)


def __dir__() -> list[str]:
    return dir(_jit)
