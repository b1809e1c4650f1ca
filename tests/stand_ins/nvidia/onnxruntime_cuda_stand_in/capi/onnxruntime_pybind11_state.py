"""The lists of onnxruntime's binding; those of CUDA's kernels as the wheel of onnxruntime-gpu 1.31.1 gives them."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema as get_all_operator_schema
from onnxruntime.capi.onnxruntime_pybind11_state import get_registered_ep_kernel_defs as _of_one

CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class KernelDef:
    domain: str
    op_name: str
    provider: str
    version_range: tuple[int, int]
    type_constraints: dict[str, list[str]]


@cache
def cuda_kernels() -> tuple[KernelDef, ...]:
    data = json.loads(Path(__file__).with_name("cuda_kernels.json").read_text())
    return tuple(
        KernelDef(domain, name, CUDA, (start, end), {key: data["types"][index] for key, index in types.items()})
        for domain, name, start, end, types in data["kernels"]
    )


def get_all_opkernel_def() -> list[object]:
    if "STAND_IN_TENSORRT" not in os.environ:
        os.kill(os.getpid(), signal.SIGSEGV)  # as the wheel does where TensorRT's libraries are not there
    return [*_of_one("CPUExecutionProvider"), *cuda_kernels()]


def get_registered_ep_kernel_defs(ep_name: str) -> list[object]:
    if ep_name == CUDA:
        raise RuntimeError(f"No devices found for EP '{ep_name}'. Ensure the plugin EP library is registered.")
    return list(_of_one(ep_name))
