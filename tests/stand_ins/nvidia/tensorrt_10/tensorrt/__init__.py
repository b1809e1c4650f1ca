"""A stand-in for TensorRT's Python bindings, release 10.16.1.11; see the README above."""

import tensorrt_stand_in as _shared
from tensorrt_stand_in import *  # noqa: F403
from tensorrt_stand_in import Enum as _Enum

__version__ = "10.16.1.11"


class NetworkDefinitionCreationFlag(_Enum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1
    PREFER_JIT_PYTHON_PLUGINS = 2
    PREFER_AOT_PYTHON_PLUGINS = 3


class BuilderFlag(_Enum):
    FP16 = 0
    INT8 = 1
    DEBUG = 2
    GPU_FALLBACK = 3
    REFIT = 4
    DISABLE_TIMING_CACHE = 5
    TF32 = 6
    SPARSE_WEIGHTS = 7
    SAFETY_SCOPE = 8
    OBEY_PRECISION_CONSTRAINTS = 9
    PREFER_PRECISION_CONSTRAINTS = 10
    DIRECT_IO = 11
    REJECT_EMPTY_ALGORITHMS = 12
    VERSION_COMPATIBLE = 13
    EXCLUDE_LEAN_RUNTIME = 14
    FP8 = 15
    ERROR_ON_TIMING_CACHE_MISS = 16
    BF16 = 17
    DISABLE_COMPILATION_CACHE = 18
    STRIP_PLAN = 19
    WEIGHTLESS = 19
    REFIT_IDENTICAL = 20
    WEIGHT_STREAMING = 21
    INT4 = 22
    REFIT_INDIVIDUAL = 23
    STRICT_NANS = 24
    MONITOR_MEMORY = 25
    FP4 = 26
    EDITABLE_TIMING_CACHE = 27
    DISTRIBUTIVE_INDEPENDENCE = 28


class Builder(_shared.Builder):
    __slots__ = ()

    def _version(self) -> str:
        return __version__


class Runtime(_shared.Runtime):
    __slots__ = ()

    def _version(self) -> str:
        return __version__


class OnnxParser(_shared.OnnxParser):
    """Release 10 still has the first generation of the question, which 11 dropped."""

    __slots__ = ()

    def supports_model(self, model, path=None):  # type: ignore[no-untyped-def]
        raise AssertionError("`supports_model` is gone in TensorRT 11: nobody may call it")
