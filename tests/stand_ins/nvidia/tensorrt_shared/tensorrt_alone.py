"""The engine `cuda/tensorrt` under a backend of its own, and the putting of stand-ins in the place of its packages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from accelrt import isolation
from accelrt.backend import Backend, Device, Engine
from accelrt_cuda import tensorrt_api, tensorrt_cuda, tensorrt_runtime
from accelrt_cuda.tensorrt import TensorRtEngine

STAND_INS = Path(__file__).parents[1]
_PACKAGES = {"tensorrt", "tensorrt_bindings", "tensorrt_stand_in", "cuda"}


class TensorRtAlone(Backend):
    """One device, which the stand-in for CUDA counts as its first."""

    name: ClassVar[str] = "tensorrt-alone"

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (TensorRtEngine(),)

    def devices(self) -> Sequence[Device]:
        return (Device(self.name, 0, "stand-in", 8 << 30),)


def folders(release: str) -> list[Path]:
    """Return what must be on the import path for the stand-ins of a release: ``10`` or ``11``."""
    return [STAND_INS / name for name in ("cuda_bindings", "tensorrt_shared", f"tensorrt_{release}")]


def forget() -> None:
    """Forget the packages, and what the engine keeps of them in this process."""
    for name in [name for name in sys.modules if name.split(".")[0] in _PACKAGES]:
        del sys.modules[name]
    for kept in (
        tensorrt_api.bindings, tensorrt_api.trt_logger, tensorrt_cuda.runtime, tensorrt_runtime._runtime,
        tensorrt_runtime._allocator_class,
    ):  # fmt: skip
        kept.cache_clear()


@contextlib.contextmanager
def in_place(*paths: Path) -> Iterator[None]:
    """Put folders on the import path, of this process and of the child that compiles, and no other stand-ins."""
    forget()
    before = list(sys.path)
    others = [path for path in before if not path.startswith(str(STAND_INS))]
    sys.path[:] = [*map(str, paths), *others]
    isolation.restart()
    try:
        yield
    finally:
        sys.path[:] = before
        forget()
        isolation.restart()
