"""What the authors need to see of a machine with NVIDIA GPUs: no secrets, and of variables CUDA's alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from accelrt_cuda import diagnosis, nvml

_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_PATH", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING", "CUDA_MPS_PIPE_DIRECTORY", "LD_LIBRARY_PATH", "NVIDIA_TF32_OVERRIDE",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
)  # fmt: skip


def facts_of() -> Mapping[str, Any]:
    """Return the machine as the management library tells of it, what of it is visible, and what is installed."""
    here = nvml.machine()
    build = diagnosis.onnxruntime_build()
    return {
        "machine": asdict(here),
        "order_is_sure": here.order_is_sure(os.environ),
        "visible": [{"index": d.index, **d.properties, "free_bytes": nvml.free_bytes(d)} for d in nvml.devices()],
        "problem": None if (found := diagnosis.hardware()) is None else asdict(found),
        "onnxruntime": None if build is None else {**asdict(build), "provider": str(build.provider or "")},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
