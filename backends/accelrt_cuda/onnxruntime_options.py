"""The options of `cuda/onnxruntime`, and what they say to onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from accelrt.errors import OptionError

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"

ConvSearch = Literal["exhaustive", "heuristic", "default"]
Arena = Literal["next_power_of_two", "same_as_requested"]
OnCpu = Literal["shapes", "none", "any"]

_ARENAS = {"next_power_of_two": "kNextPowerOfTwo", "same_as_requested": "kSameAsRequested"}
_MOST_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class CudaOnnxRuntimeOptions:
    """Options of the engine.

    Attributes:
        execution_provider: ``cuda``, or ``tensorrt`` for TensorRT as onnxruntime drives it, with CUDA for what
            TensorRT does not take. It computes float32 products in TF32 and cannot be told otherwise, so it wants
            ``use_tf32``.
        use_tf32: Compute products of float32 in TensorFloat-32: 10 bits of mantissa instead of 23, but faster.
        gpu_mem_limit: Bytes that the arena of one program may take; 0 for no limit.
        arena: How the arena grows: by powers of two, or by what is asked for.
        cudnn_conv_algo_search: How cuDNN's algorithm for a convolution is chosen: ``exhaustive`` measures all when a
            shape is first seen, ``heuristic`` asks cuDNN, ``default`` takes its first.
        prefer_nhwc: Lay images out with channels last where kernels for it exist; tensor cores want that.
        enable_cuda_graph: Record a run as a CUDA graph and replay it: launches cost next to nothing. For static shapes,
            and for programs of which nothing is on the CPU; calls take turns.
        cpu_nodes: What onnxruntime may keep on the CPU inside a program: ``shapes``, nodes that compute shapes, which
            it moves there on purpose; ``none``; or ``any``. Whatever it is, the placement says so.
    """

    execution_provider: Literal["cuda", "tensorrt"] = "cuda"
    use_tf32: bool = False
    gpu_mem_limit: int = 0
    arena: Arena = "next_power_of_two"
    cudnn_conv_algo_search: ConvSearch = "exhaustive"
    prefer_nhwc: bool = False
    enable_cuda_graph: bool = False
    cpu_nodes: OnCpu = "shapes"

    def __post_init__(self) -> None:
        for name, choices in (
            ("execution_provider", ("cuda", "tensorrt")),
            ("arena", get_args(Arena)),
            ("cudnn_conv_algo_search", get_args(ConvSearch)),
            ("cpu_nodes", get_args(OnCpu)),
        ):
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if not 0 <= self.gpu_mem_limit <= _MOST_BYTES:
            raise OptionError(f"gpu_mem_limit must be 0 to {_MOST_BYTES} bytes, not {self.gpu_mem_limit}.")
        if self.execution_provider == "tensorrt" and not self.use_tf32:
            raise OptionError(
                "execution_provider='tensorrt' computes products of float32 in TF32, and onnxruntime has no way to "
                "forbid it.",
                hint="Pass use_tf32=True as well, or take the engine cuda/tensorrt.",
            )
        if self.execution_provider == "tensorrt" and self.enable_cuda_graph:
            raise OptionError("enable_cuda_graph goes with execution_provider='cuda' only.")


def providers_of(options: CudaOnnxRuntimeOptions, device_id: int) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a session; the CPU is not among them, so that nothing is given to it silently.

    Every option that changes numbers is said: no default of a release decides.
    """
    cuda = {
        "device_id": str(device_id),
        "use_tf32": "1" if options.use_tf32 else "0",
        "arena_extend_strategy": _ARENAS[options.arena],
        "cudnn_conv_algo_search": options.cudnn_conv_algo_search.upper(),
        "prefer_nhwc": "1" if options.prefer_nhwc else "0",
        "enable_cuda_graph": "1" if options.enable_cuda_graph else "0",
    }
    if options.gpu_mem_limit:
        cuda["gpu_mem_limit"] = str(options.gpu_mem_limit)
    if options.execution_provider == "cuda":
        return [(CUDA, cuda)]
    return [(TENSORRT, {"device_id": str(device_id)}), (CUDA, cuda)]
