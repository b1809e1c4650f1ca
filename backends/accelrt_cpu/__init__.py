"""The CPU: onnxruntime by default, OpenVINO by name, PyTorch and TensorFlow for whole models, ONNX's evaluator last."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from accelrt.backend import Backend, Device, Engine
from accelrt_cpu.onnxruntime import OnnxRuntimeEngine
from accelrt_cpu.openvino import OpenVinoEngine
from accelrt_cpu.reference import ReferenceEngine
from accelrt_cpu.tensorflow import TensorFlowEngine
from accelrt_cpu.torch import TorchEngine


class CpuBackend(Backend):
    """One device: all cores that this process may use."""

    name: ClassVar[str] = "cpu"
    fallback: ClassVar[tuple[str, ...]] = ("onnxruntime", "reference")

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (
            OnnxRuntimeEngine(),
            OpenVinoEngine(),
            TorchEngine(),
            TensorFlowEngine(),
            ReferenceEngine(),
        )

    def devices(self) -> Sequence[Device]:
        return (_device(),)


@cache
def _device() -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device("cpu", 0, f"{_model()}, {cores} cores", memory, {"cores": str(cores), "machine": platform.machine()})


def _model() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
