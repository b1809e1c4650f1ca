"""A stand-in for torch-neuron 1.13: parameters as its documentation gives them, and as a user's traceback showed."""

from __future__ import annotations

import argparse
import sys
from enum import Enum
from typing import Any

import neuron_stand_in as runtime
import torch

from . import experimental as experimental

__version__ = "1.13.1.2.9.74.0"


class Optimization(Enum):
    FLOAT32_TO_FLOAT16 = 1


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RuntimeError(f"neuron-cc: error: {message}")


_FAST_MATH = {
    "all", "none", "fp32-cast-all", "fp32-cast-all-fp16", "fp32-cast-matmult", "fp32-cast-matmult-bf16",
    "fp32-cast-matmult-fp16", "fast-relayout", "no-fast-relayout",
}  # fmt: skip


def _parse(compiler_args: Any) -> argparse.Namespace:
    if not isinstance(compiler_args, list) or not all(isinstance(one, str) for one in compiler_args):
        raise TypeError("compiler_args must be a list of strings")
    parser = _Arguments(add_help=False)
    parser.add_argument("--fast-math", nargs="+", choices=sorted(_FAST_MATH))
    parser.add_argument("--neuroncore-pipeline-cores", type=int, default=1)
    return parser.parse_args(compiler_args)


def trace(
    func,
    example_inputs,
    fallback=True,
    op_whitelist=None,
    minimum_segment_size=2,
    subgraph_builder_function=None,
    subgraph_inputs_pruning=True,
    skip_compiler=False,
    debug_must_trace=False,
    allow_no_ops_on_neuron=False,
    compiler_workdir=None,
    dynamic_batch_size=False,
    compiler_timeout=None,
    _neuron_trace=True,
    compiler_args=None,
    optimizations=None,
    single_fusion_ratio_threshold=0.6,
    separate_weights=False,
    verbose=None,
    **kwargs,
):
    if kwargs:
        torch.jit.trace(func, example_inputs, **kwargs)  # which refuses what it does not know
    parsed = _parse(compiler_args or [])
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    facts = {"args": compiler_args, "dynamic": dynamic_batch_size, "cores": parsed.neuroncore_pipeline_cores,
             "timeout": compiler_timeout, "minimum_segment_size": minimum_segment_size,
             "separate_weights": separate_weights}  # fmt: skip
    import os

    os.environ["STAND_IN_COMPILING"] = "1"
    try:
        script, on_device, _ = runtime.partition(func, inputs, compiler_workdir, **facts)
        refused = runtime.refuses(func, inputs)
    finally:
        del os.environ["STAND_IN_COMPILING"]
    if refused and not fallback:
        raise AttributeError(f"The operators {sorted(runtime.unsupported())} are not supported")
    if not on_device:
        raise RuntimeError(
            "No operations were successfully partitioned and compiled to neuron for this model - aborting trace!"
        )
    return script


def analyze_model(func, example_inputs=None):
    return {"percent_supported": 100.0}


def get_supported_operations():
    return []


def is_available():
    return runtime.cores() > 0


class DataParallel(runtime.DataParallelBase):
    def __init__(self, model, device_ids=None, dim=0):
        if any(runtime.header_of(b).get("cores", 1) > 1 for n, b in model.named_buffers() if n.endswith("neff")):
            raise RuntimeError("DataParallel does not support models that have been compiled with neuroncore-pipeline")
        super().__init__(model, device_ids, dim, dim == 0)


torch.neuron = sys.modules[__name__]
