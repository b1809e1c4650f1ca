"""A stand-in for torch-neuronx 2.x of SDK 2.25 and later: signatures as its API reference gives them."""

from __future__ import annotations

import argparse
import os
import warnings
from typing import Any

import neuron_stand_in as runtime
import torch

from . import experimental as experimental

__version__ = "2.7.0.2.10.0"
_TARGET_AT_IMPORT = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RuntimeError(f"neuronx-cc: error: {message}")


def _parse(compiler_args: Any) -> argparse.Namespace:
    parser = _Arguments(add_help=False)
    parser.add_argument("--target", choices=["inf2", "trn1", "trn1n", "trn2"])
    parser.add_argument("--auto-cast", choices=["none", "matmult", "all"])
    parser.add_argument("--auto-cast-type", choices=["bf16", "fp16", "tf32", "fp8_e4m3"])
    parser.add_argument("--optlevel", "-O", choices=["1", "2", "3"])
    parser.add_argument("--model-type", choices=["generic", "transformer", "unet-inference"])
    parser.add_argument("--logical-nc-config", "-lnc", choices=["1", "2"])
    if isinstance(compiler_args, str):
        compiler_args = compiler_args.split()
    return parser.parse_args(list(compiler_args or []))


class PartitionerConfig:
    def __init__(
        self,
        *,
        trace_kwargs=None,
        model_support_percentage_threshold=0.5,
        min_subgraph_size=-1,
        max_subgraph_count=-1,
        ops_to_partition=None,
        analyze_parameters=None,
    ):
        self.trace_kwargs = trace_kwargs or {}
        self.threshold = model_support_percentage_threshold
        self.max_subgraph_count = max_subgraph_count


def trace(
    func,
    example_inputs,
    *_,
    input_output_aliases={},  # noqa: B006 - the vendor's default
    compiler_workdir=None,
    compiler_args=None,
    partitioner_config=None,
    inline_weights_to_neff=True,
    cpu_backend=False,
):
    if _:
        warnings.warn("positional arguments of trace are deprecated", DeprecationWarning, stacklevel=2)
    arguments = compiler_args
    if partitioner_config is not None:
        arguments = partitioner_config.trace_kwargs.get("compiler_args", compiler_args)
    parsed = _parse(arguments)
    if cpu_backend:
        if parsed.target is None:
            raise RuntimeError(
                "If you want to compile on CPU, please supply compiler argument target, with one of options trn1, inf2, "
                'trn1n, or trn2. Ex: "--target trn1"'
            )
        if parsed.target != _TARGET_AT_IMPORT:
            raise RuntimeError(f"NEURON_PLATFORM_TARGET_OVERRIDE was {_TARGET_AT_IMPORT} when this was imported")
    elif runtime.cores() == 0:
        raise RuntimeError(
            "Bad StatusOr access: INVALID_ARGUMENT: PJRT_Client_Create: error condition nullptr != pjrt_client: Init: "
            "error condition !(num_devices > 0)"
        )
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    facts = {"args": list(arguments or []), "inline": inline_weights_to_neff, "cpu_backend": cpu_backend}
    os.environ["STAND_IN_COMPILING"] = "1"
    try:
        if partitioner_config is None:
            return runtime.compile_module(func, inputs, compiler_workdir, **facts)
        script, on_device, total = runtime.partition(func, inputs, compiler_workdir, **facts)
    finally:
        del os.environ["STAND_IN_COMPILING"]
    if on_device / total < partitioner_config.threshold:
        raise ValueError(
            f"{on_device / total:.0%} of the model is supported; {partitioner_config.threshold:.0%} wanted"
        )
    if 0 <= partitioner_config.max_subgraph_count < on_device:
        raise ValueError(f"{on_device} subgraphs are more than {partitioner_config.max_subgraph_count}")
    return script


def dynamic_batch(neuron_script):
    return runtime.change_header(neuron_script, dynamic=True)


def lazy_load(trace, enable_lazy_load=True):
    return runtime.change_header(trace, lazy=enable_lazy_load)


def async_load(trace, enable_async_load=True):
    return runtime.change_header(trace, asynchronous=enable_async_load)


def move_trace_to_device(trace, device_id):
    runtime.CALLS.append(("move_trace_to_device", {"device_id": device_id}))


def replace_weights(neuron_model, weights):
    runtime.CALLS.append(("replace_weights", {}))


def analyze(
    func,
    example_inputs,
    compiler_workdir=None,
    additional_ignored_ops=set(),  # noqa: B006 - the vendor's default
    max_workers=4,
    is_hf_transformers=False,
    cleanup=False,
):
    return {"torch_neuronx_version": __version__, "support_percentage": "100.00%", "unsupported_operators": []}


def set_neuron_cores(trace, start_nc=-1, nc_count=-1):
    runtime.place("set_neuron_cores", start_nc, nc_count, 1)


def set_multicore(trace):
    runtime.place("set_multicore", 0, runtime.cores(), 1)


def neuron_cores_context(start_nc=-1, nc_count=-1):
    return runtime.context("neuron_cores_context", start_nc, nc_count)


def multicore_context():
    return runtime.context("multicore_context", 0, runtime.cores())


class DataParallel(runtime.DataParallelBase):
    def __init__(self, model, device_ids=None, dim=0, set_dynamic_batching=True):
        super().__init__(model, device_ids, dim, set_dynamic_batching)
