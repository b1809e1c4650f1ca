"""The backend over the stand-ins: it says of itself that it is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from accelrt.backend import Caps, DeviceTensor, Engine
from accelrt_cuda import CudaBackend
from accelrt_cuda.onnxruntime import OnnxRuntimeCudaEngine


class StandInEngine(OnnxRuntimeCudaEngine):
    caps: ClassVar[Caps] = replace(OnnxRuntimeCudaEngine.caps, nature="stand-in")
    module: ClassVar[str] = "onnxruntime_cuda_stand_in"


class StandInCudaBackend(CudaBackend):
    # The name cuda belongs to the real one, wherever accelrt is installed.
    name: ClassVar[str] = "cuda-stand-in"

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (StandInEngine(),)

    def settle(self, tensors: Sequence[DeviceTensor]) -> None:
        # The real one exports each tensor for the legacy stream, 1, and then waits for that through the driver. There
        # is no driver here, and memory of the stand-ins is complete once it is written.
        for tensor in tensors:
            tensor.__dlpack__(stream=1)
