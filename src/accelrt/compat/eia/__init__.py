"""The interfaces of Amazon's Elastic Inference on any backend, for TensorFlow, Keras and PyTorch.

A script written for Elastic Inference runs on what ``ACCELRT_BACKEND`` says once its import line names this package:

    from accelrt.compat.eia import EIPredictor, EIKerasModel     # was ei_for_tf or tensorflow.contrib.ei
    from accelrt.compat.eia import torch                         # was PyTorch-EI 1.3.1's torch
    from accelrt.compat.eia import torcheia                      # was PyTorch-EI 1.5.1's torcheia

Nothing of the vendor's is imported, and nothing heavy until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelrt.compat.eia.keras import EIKerasModel as EIKerasModel
    from accelrt.compat.eia.predictor import EIPredictor as EIPredictor
    from accelrt.compat.eia.scripts import attach_eia as attach_eia
    from accelrt.compat.eia.scripts import optimized_execution as optimized_execution

__all__ = ["EIKerasModel", "EIPredictor", "attach_eia", "optimized_execution"]

_HOMES = {
    "EIKerasModel": "keras",
    "EIPredictor": "predictor",
    "attach_eia": "scripts",
    "optimized_execution": "scripts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
