"""NVIDIA GPUs through CUDA: TensorRT, onnxruntime and PyTorch, in this order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from accelrt.backend import Backend, Device, DeviceTensor, Engine
from accelrt.graph.dlpack import CUDA
from accelrt_cuda import caller_tensors, nvml
from accelrt_cuda.onnxruntime import OnnxRuntimeCudaEngine
from accelrt_cuda.report import facts_of
from accelrt_cuda.tensorrt import TensorRtEngine
from accelrt_cuda.torch import TorchCudaEngine


class CudaBackend(Backend):
    """The GPUs that CUDA shows to this process, numbered as CUDA numbers them."""

    name: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        # In order of preference.
        self.engines: tuple[Engine, ...] = (TensorRtEngine(), OnnxRuntimeCudaEngine(), TorchCudaEngine())

    def devices(self) -> Sequence[Device]:
        return nvml.devices(backend=self.name)

    def dlpack_device(self, device: Device) -> tuple[int, int] | None:
        return CUDA, device.index

    def settle(self, tensors: Sequence[DeviceTensor]) -> None:
        caller_tensors.settle(tensors)

    def occupants(self) -> Mapping[int, Sequence[str]]:
        found: dict[int, tuple[str, ...]] = {}
        for device in self.devices():
            others = [pid for pid in nvml.processes(int(device.properties["gpu"])) if pid != os.getpid()]
            if others:
                found[device.index] = tuple(f"process {pid}" for pid in others)
        return found

    def report(self) -> Mapping[str, Any]:
        tensorrt = next(engine for engine in self.engines if isinstance(engine, TensorRtEngine))
        return {**facts_of(), "tensorrt": tensorrt.report()}
