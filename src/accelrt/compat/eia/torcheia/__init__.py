"""The ``torcheia`` of PyTorch-EI 1.5.1: ``from accelrt.compat.eia import torcheia``."""

from __future__ import annotations

from accelrt.compat.eia.torcheia import jit as jit
