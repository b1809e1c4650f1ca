"""The backend over the stand-ins: it says of itself that it is one."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from accelrt.backend import Caps, Engine
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
