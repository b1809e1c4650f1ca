"""A stand-in for TensorRT's Python bindings, release 11.4.0.106; see the README above."""

import tensorrt_stand_in as _shared
from tensorrt_stand_in import *  # noqa: F403
from tensorrt_stand_in import Enum as _Enum

__version__ = "11.4.0.106"


class NetworkDefinitionCreationFlag(_Enum):
    STRONGLY_TYPED = 0
    PREFER_JIT_PYTHON_PLUGINS = 1
    PREFER_AOT_PYTHON_PLUGINS = 2


class BuilderFlag(_Enum):
    DEBUG = 2
    GPU_FALLBACK = 3
    REFIT = 4
    DISABLE_TIMING_CACHE = 5
    TF32 = 6
    SPARSE_WEIGHTS = 7
    SAFETY_SCOPE = 8
    DIRECT_IO = 11
    VERSION_COMPATIBLE = 12
    EXCLUDE_LEAN_RUNTIME = 13
    ERROR_ON_TIMING_CACHE_MISS = 15
    DISABLE_COMPILATION_CACHE = 17
    STRIP_PLAN = 18
    REFIT_IDENTICAL = 19
    WEIGHT_STREAMING = 20
    REFIT_INDIVIDUAL = 22
    STRICT_NANS = 23
    MONITOR_MEMORY = 24
    EDITABLE_TIMING_CACHE = 26
    DISTRIBUTIVE_INDEPENDENCE = 27


class Builder(_shared.Builder):
    __slots__ = ()

    def _version(self) -> str:
        return __version__


class Runtime(_shared.Runtime):
    __slots__ = ()

    def _version(self) -> str:
        return __version__
