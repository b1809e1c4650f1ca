"""``torch_neuronx`` (Inf2, Trn1, Trn2) on whatever ``ACCELRT_BACKEND`` says.

Import it before ``torch.jit.load`` reads a traced module, as with the vendor's package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from accelrt.compat.neuron import compiling, residents
from accelrt.compat.neuron.analysis import analysed
from accelrt.compat.neuron.buckets import BucketModelConfig
from accelrt.compat.neuron.calling import check_dynamic
from accelrt.compat.neuron.flags import neuronx_flags
from accelrt.compat.neuron.parallel import DataParallel
from accelrt.compat.neuron.placing import multicore_context, neuron_cores_context, set_multicore, set_neuron_cores
from accelrt.compat.neuron.program import numbers_in, programs_in, signature_of
from accelrt.compat.neuron.residents import Placement
from accelrt.compat.neuron.tracing import Traced, bucketed
from accelrt.compat.neuron.weights import replace_weights

__all__ = [
    "BucketModelConfig",
    "DataParallel",
    "PartitionerConfig",
    "analyze",
    "async_load",
    "bucket_model_trace",
    "dynamic_batch",
    "experimental",
    "lazy_load",
    "move_trace_to_device",
    "multicore_context",
    "neuron_cores_context",
    "replace_weights",
    "set_multicore",
    "set_neuron_cores",
    "trace",
]

__version__ = version("accelrt")

experimental = SimpleNamespace(
    multicore_context=multicore_context,
    neuron_cores_context=neuron_cores_context,
    set_multicore=set_multicore,
    set_neuron_cores=set_neuron_cores,
)
"""Where releases before SDK 2.25 had the placement functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionerConfig:
    """What may stay on the CPU.

    Attributes:
        trace_kwargs: ``compiler_args`` and ``compiler_workdir`` for the parts.
        model_support_percentage_threshold: The least share of operators on the device, 0 to 1.
        min_subgraph_size: The fewest operators of a part; -1 for any.
        max_subgraph_count: The most parts; -1 for any.
        ops_to_partition: Operators to keep on the CPU; has no effect here.
        analyze_parameters: Arguments of `analyze`; has no effect here.
    """

    trace_kwargs: Mapping[str, Any] | None = None
    model_support_percentage_threshold: float = 0.5
    min_subgraph_size: int = -1
    max_subgraph_count: int = -1
    ops_to_partition: set[str] | None = None
    analyze_parameters: Mapping[str, Any] | None = None


def trace(
    func: Callable[..., Any],
    example_inputs: Any,
    *_: Any,
    input_output_aliases: Mapping[Any, Any] = {},
    compiler_workdir: str | None = None,
    compiler_args: str | Sequence[str] | None = None,
    partitioner_config: PartitionerConfig | None = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> Any:
    """Compile a module or function for its example inputs' shapes.

    Args:
        func: What to compile; in eval mode, whichever it is in.
        example_inputs: A tensor, or a tuple of tensors.
        input_output_aliases: State that stays on the device; refused where there is any.
        compiler_workdir: Has no effect; accelrt cleans up after compilers.
        compiler_args: Flags of neuronx-cc. Casts and targets count on the backend ``neuron``.
        partitioner_config: Limits to what may stay on the CPU; without one there are none.
        inline_weights_to_neff: False keeps a module's weights out of the program, for `replace_weights`; they go to it
            with each call.
        cpu_backend: Has no effect: compiling needs no device.

    Returns:
        TorchScript: positional CPU tensors in, what ``func`` returns out.

    Raises:
        ValueError: A limit of the partitioner was passed, or a flag has a value that is not known.
        RuntimeError: It cannot be compiled, or nothing of it for the target.
        NotImplementedError: There are aliases.
    """
    if _:
        warnings.warn("Arguments of trace after the second are passed by name.", DeprecationWarning, stacklevel=2)
    if input_output_aliases:
        raise NotImplementedError("input_output_aliases: accelrt's programs keep no state from call to call.")
    limits = partitioner_config
    if limits is not None:
        within = dict(limits.trace_kwargs or {})
        compiler_args = within.pop("compiler_args", compiler_args)
        compiler_workdir = within.pop("compiler_workdir", compiler_workdir)
        within |= {"ops_to_partition": limits.ops_to_partition, "analyze_parameters": limits.analyze_parameters}
        compiling.note_ignored(within)
    compiling.note_ignored({"compiler_workdir": compiler_workdir})
    flags = neuronx_flags(compiler_args)
    traced = Traced(func, example_inputs, held=not inline_weights_to_neff)
    with compiling.vendors_errors():
        artifact = traced.compile(flags)
        share = compiling.share_on_target(artifact)
        parts = [one for one in artifact.placement.segments if one.engine == artifact.placement.primary]
    if share == 0:
        raise RuntimeError(f"Nothing of the model can run on {artifact.placement.primary}: {artifact.explain()}")
    if limits is not None:
        _hold(limits, share, [len(one.nodes) for one in parts], whole=artifact.placement.whole is not None)
    return traced.script(artifact, strict=False)


def bucket_model_trace(
    func: Callable[..., Any],
    example_inputs: Sequence[Any],
    bucket_config: BucketModelConfig,
    compiler_workdir: str | None = None,
    compiler_args: str | Sequence[str] | None = None,
) -> Any:
    """Compile a model for several shapes, as one module that chooses among them at each call.

    Args:
        func: Returns a module and its aliases, once for each bucket; called with ``func_kwargs`` of the configuration.
        example_inputs: For each bucket what `trace` takes.
        bucket_config: How calls find their bucket.
        compiler_workdir: Has no effect; accelrt cleans up after compilers.
        compiler_args: As for `trace`.

    Returns:
        TorchScript: positional CPU tensors in, of any shape that the kernel takes; what the models return out.

    Raises:
        TypeError: An argument that is not what it must be.
        ValueError: There are no buckets, or models that return different nests.
        RuntimeError: A bucket cannot be compiled, or nothing of it for the target.
        NotImplementedError: There are aliases, or a shared state.
    """
    if not isinstance(bucket_config, BucketModelConfig):
        raise TypeError(f"bucket_config is a BucketModelConfig, not a {type(bucket_config).__name__}")
    if bucket_config.shared_state_buffer or bucket_config.shared_state_buffer_preprocessor is not None:
        raise NotImplementedError("shared_state_buffer: accelrt's programs keep no state from call to call.")
    if not isinstance(example_inputs, list | tuple) or not example_inputs:
        raise ValueError("example_inputs is a list with the example inputs of each bucket")
    compiling.note_ignored({"compiler_workdir": compiler_workdir})
    flags, parts = neuronx_flags(compiler_args), []
    for arguments, examples in zip(bucket_config.arguments(len(example_inputs)), example_inputs, strict=True):
        made = func(**arguments)
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError("func returns a module and a dictionary of its aliases")
        module, aliases = made
        if aliases:
            raise NotImplementedError("input_output_aliases: accelrt's programs keep no state from call to call.")
        traced = Traced(module, examples)
        with compiling.vendors_errors():
            artifact = traced.compile(flags)
        if compiling.share_on_target(artifact) == 0:
            raise RuntimeError(f"Nothing of the model can run on {artifact.placement.primary}: {artifact.explain()}")
        parts.append((traced, artifact))
    return bucketed(parts, bucket_config.kernel())


def _hold(limits: PartitionerConfig, share: float, sizes: Sequence[int], *, whole: bool) -> None:
    """Hold what was compiled against limits; what runs whole was cut by its own framework's partitioner."""
    if share < limits.model_support_percentage_threshold:
        raise ValueError(
            f"{share:.2%} of the model's operators are supported, which is less than "
            f"model_support_percentage_threshold={limits.model_support_percentage_threshold}."
        )
    if 0 <= limits.max_subgraph_count < len(sizes):
        raise ValueError(f"{len(sizes)} subgraphs are more than max_subgraph_count={limits.max_subgraph_count}.")
    if not whole and sizes and min(sizes) < limits.min_subgraph_size:
        raise ValueError(
            f"A subgraph has {min(sizes)} operators, less than min_subgraph_size={limits.min_subgraph_size}."
        )


def dynamic_batch(neuron_script: Any) -> Any:
    """Let a traced module take any batch: in parts of the size that was traced, the last filled up. In place.

    Raises:
        ValueError: Dimension 0 is not one size that all inputs and outputs have in common.
    """
    for number in numbers_in(neuron_script):
        check_dynamic(signature_of(number))
    for program in programs_in(neuron_script):
        program.dynamic = True
    return neuron_script


def lazy_load(trace: Any, enable_lazy_load: bool = True) -> None:
    """Have ``torch.jit.load`` leave a program where it is until it is called or placed; call it before saving."""
    for program in programs_in(trace):
        program.lazy = enable_lazy_load


def async_load(trace: Any, enable_async_load: bool = True) -> None:
    """Have a program loaded in the background; here, when it is called."""
    lazy_load(trace, enable_async_load)


def move_trace_to_device(trace: Any, device_id: int) -> None:
    """Load the programs of a traced module on one core.

    Raises:
        RuntimeError: It is not there, or not to be had.
    """
    for number in numbers_in(trace):
        with compiling.vendors_errors():
            residents.put(number, Placement(device_id, -1))


def analyze(
    func: Callable[..., Any],
    example_inputs: Any,
    compiler_workdir: str | None = None,
    additional_ignored_ops: set[str] = set(),  # noqa: B006 - the vendor's default, which nobody writes to
    max_workers: int = 4,
    is_hf_transformers: bool = False,
    cleanup: bool = False,
) -> dict[str, Any]:
    """Return which operators of a module the target takes, by their names in ONNX.

    Args:
        func: As for `trace`.
        example_inputs: As for `trace`.
        compiler_workdir: Has no effect, as all that follow.
        additional_ignored_ops: Has no effect.
        max_workers: Has no effect.
        is_hf_transformers: Has no effect.
        cleanup: Has no effect.

    Returns:
        ``support_percentage`` (text such as ``97.50%``), ``supported_operators`` (``{"onnx": {kind: count}}``) and
        ``unsupported_operators`` (``kind``, ``failureAt``, ``call``, ``opGraph`` of each), with versions.

    Raises:
        RuntimeError: It cannot be compiled.
    """
    with compiling.vendors_errors():
        found = analysed(Traced(func, example_inputs).compile(neuronx_flags(None), fallback="allow"))
    return {
        "torch_neuronx_version": __version__,
        "neuronx_cc_version": __version__,
        "support_percentage": f"{found.share:.2%}",
        "supported_operators": {"onnx": dict(found.supported)},
        "unsupported_operators": [
            {"kind": f"onnx::{one.kind}", "failureAt": one.where, "call": one.name, "opGraph": one.reason}
            for one in found.refused
        ],
    }
