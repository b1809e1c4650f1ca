"""``torch_neuron`` (Inf1) on whatever ``ACCELRT_BACKEND`` says; as the vendor's package it is ``torch.neuron`` as well.

Import it before ``torch.jit.load`` reads a traced module, as with the vendor's package.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelrt.compat.neuron import compiling, parallel
from accelrt.compat.neuron.analysis import analysed
from accelrt.compat.neuron.flags import neuron_cc_flags
from accelrt.compat.neuron.residents import cores_of
from accelrt.compat.neuron.torch_neuron import experimental
from accelrt.compat.neuron.torch_neuronx import dynamic_batch as _dynamic_batch
from accelrt.compat.neuron.tracing import Traced
from accelrt.errors import AccelrtError, UnsupportedNodes

__all__ = ["DataParallel", "Optimization", "analyze_model", "experimental", "is_available", "trace"]

_SEGMENT, _RATIO = 2, 0.6
_OF_TORCH = frozenset({"strict", "check_inputs", "check_trace", "check_tolerance", "optimize"})
NOTHING = "No operations were successfully partitioned and compiled to neuron for this model - aborting trace!"


class Optimization(enum.Enum):
    """Optimisations by name; the types of inputs and outputs are the model's here."""

    FLOAT32_TO_FLOAT16 = "float32-to-float16"


class DataParallel(parallel.DataParallel):
    """As `accelrt.compat.neuron.parallel.DataParallel`, with dynamic batching wherever ``dim`` is 0."""

    def __init__(self, model: Any, device_ids: Sequence[int | str] | None = None, dim: int = 0) -> None:
        super().__init__(model, device_ids, dim)


def trace(
    model: Callable[..., Any],
    example_inputs: Any,
    *,
    compiler_args: Sequence[str] | None = None,
    compiler_timeout: int | None = None,
    compiler_workdir: str | None = None,
    subgraph_builder_function: Callable[[Any], bool] | None = None,
    minimum_segment_size: int = _SEGMENT,
    single_fusion_ratio_threshold: float = _RATIO,
    fallback: bool = True,
    dynamic_batch_size: bool = False,
    optimizations: Sequence[Optimization] | None = None,
    separate_weights: bool = False,
    verbose: Any = None,
    **kwargs: Any,
) -> Any:
    """Compile a module or function for its example inputs' shapes.

    Args:
        model: What to compile; in eval mode, whichever it is in.
        example_inputs: A tensor, or a tuple or list of tensors.
        compiler_args: Flags of neuron-cc. Casts and pipelines count on the backend ``neuron``.
        compiler_timeout: Seconds until the compiler is stopped, where there is one.
        compiler_workdir: Has no effect; accelrt cleans up after compilers.
        subgraph_builder_function: Has no effect.
        minimum_segment_size: Parts of fewer operators run on the CPU.
        single_fusion_ratio_threshold: Has no effect.
        fallback: Whether operators that the target does not take may run on the CPU.
        dynamic_batch_size: Take any batch, in parts of the size that was traced.
        optimizations: Has no effect.
        separate_weights: Keep constants apart from the program, where the engine can.
        verbose: Has no effect.
        kwargs: Those of ``torch.jit.trace``: ``strict=False`` for a function that returns a dictionary.

    Returns:
        TorchScript: positional CPU tensors in, what ``model`` returns out.

    Raises:
        AttributeError: ``fallback=False``, and an operator is not supported.
        RuntimeError: It cannot be compiled, or nothing of it for the target.
        TypeError: An argument that neither the vendor nor ``torch.jit.trace`` has.
        ValueError: A flag has a value that is not known.
    """
    if unknown := sorted(set(kwargs) - _OF_TORCH):
        raise TypeError(f"trace() got an unexpected keyword argument {unknown[0]!r}")
    compiling.note_ignored(
        {
            "compiler_workdir": compiler_workdir,
            "subgraph_builder_function": subgraph_builder_function,
            "single_fusion_ratio_threshold": single_fusion_ratio_threshold != _RATIO,
            "optimizations": optimizations,
            "verbose": verbose,
        }
    )
    options: dict[str, Any] = {}
    if minimum_segment_size != _SEGMENT:
        options |= {"min_segment_nodes": minimum_segment_size, "minimum_segment_size": minimum_segment_size}
    if compiler_timeout is not None:
        options["timeout_s"] = float(compiler_timeout)
    if separate_weights:
        options["separate_weights"] = True
    flags = neuron_cc_flags(compiler_args)
    traced = Traced(model, example_inputs)
    with compiling.vendors_errors():
        try:
            artifact = traced.compile(flags, fallback="warn" if fallback else "error", options=options)
        except UnsupportedNodes as error:
            raise AttributeError(str(error)) from error
    if compiling.share_on_target(artifact) == 0:
        raise RuntimeError(NOTHING)
    kwargs.pop("check_trace", None)  # traces are not run: that would take a core
    script = traced.script(artifact, **kwargs)
    return _dynamic_batch(script) if dynamic_batch_size else script


def analyze_model(model: Callable[..., Any], example_inputs: Any) -> OrderedDict[str, Any]:
    """Return which operators of a module the target takes, by their names in ONNX.

    Returns:
        ``percent_supported`` (0 to 100), ``supported_count``, ``total_count``, ``supported_operators`` (a set),
        ``unsupported_operators`` and ``operators`` (lists), ``operator_count`` (by name).

    Raises:
        RuntimeError: It cannot be compiled.
    """
    with compiling.vendors_errors():
        found = analysed(Traced(model, example_inputs).compile(neuron_cc_flags(None), fallback="allow"))
    total, supported = sum(found.counts.values()), sum(found.supported.values())
    return OrderedDict(
        percent_supported=100.0 * found.share,
        supported_count=supported,
        total_count=total,
        supported_operators=set(found.supported),
        unsupported_operators=sorted({one.kind for one in found.refused}),
        operators=sorted(found.counts),
        operator_count=OrderedDict(sorted(found.counts.items())),
    )


def is_available() -> bool:
    """Tell whether there is a core for programs to run on."""
    try:
        found = compiling.first_candidate()
        return found is None or bool(cores_of(found))
    except AccelrtError:
        return False


torch.neuron = sys.modules[__name__]  # the vendor's alias: torch.neuron.trace
