"""Backends with the engine `cuda/torch` alone, for its tests.

On the CPU, everything is the engine's own but the GPU, whose part `accelrt_cuda.torch_place.HostPlace` plays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from accelrt.backend import Backend, Caps, Device, Engine
from accelrt_cuda.torch import TorchCudaEngine
from accelrt_cuda.torch_settings import TorchCudaOptions


@dataclass(frozen=True, slots=True)
class GraphOptions(TorchCudaOptions):
    """The options, with a default that needs no compiler: the suite compiles a hundred programs."""

    mode: str = "graph"


@dataclass(frozen=True, slots=True)
class EagerOptions(TorchCudaOptions):
    """The options, for operator by operator."""

    mode: str = "eager"


class OnCpu(TorchCudaEngine):
    """Computes on the CPU with the engine's own code."""

    caps: ClassVar[Caps] = replace(TorchCudaEngine.caps, nature="stand-in")
    device_type: ClassVar[str] = "cpu"


class RecordedOnCpu(OnCpu):
    options: ClassVar[type] = GraphOptions


class EagerOnCpu(OnCpu):
    options: ClassVar[type] = EagerOptions


class _OneEngine(Backend):
    engine_class: ClassVar[type[Engine]] = OnCpu

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (self.engine_class(),)

    def devices(self) -> Sequence[Device]:
        return (Device(self.name, 0, "the CPU in the place of a GPU"),)


class OnCpuBackend(_OneEngine):
    """With the engine's own defaults: AOTInductor."""

    name: ClassVar[str] = "torchoncpu"


class RecordedBackend(_OneEngine):
    """Without a compiler, recorded."""

    name: ClassVar[str] = "torchrecorded"
    engine_class: ClassVar[type[Engine]] = RecordedOnCpu


class EagerBackend(_OneEngine):
    """Without a compiler, operator by operator."""

    name: ClassVar[str] = "torcheager"
    engine_class: ClassVar[type[Engine]] = EagerOnCpu


class RecordedOnGpu(TorchCudaEngine):
    """On a GPU, without a compiler unless asked: the suite compiles a hundred programs."""

    options: ClassVar[type] = GraphOptions


class GpuBackend(_OneEngine):
    """The first GPU."""

    name: ClassVar[str] = "torchgpu"
    engine_class: ClassVar[type[Engine]] = RecordedOnGpu

    def devices(self) -> Sequence[Device]:
        return (Device(self.name, 0, "the first GPU"),)
