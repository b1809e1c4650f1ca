"""The engine `neuron/torch-neuron`: Inf1 through ``torch.neuron.trace``. The vendor ended support for it in 2026."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accelrt.backend import Device, Executable, Precision, Program
from accelrt.errors import CoresUnavailable, OptionError
from accelrt.graph.node import Node
from accelrt_neuron import nrt, support
from accelrt_neuron.catalogue import Generation
from accelrt_neuron.cores import PLACEMENT, core_range
from accelrt_neuron.flags import (
    CastMode,
    cast_mode,
    check_cast_options,
    check_data_parallel,
    check_limits,
    neuron_cc_args,
)
from accelrt_neuron.sdk import TORCH_NEURON, Sdk
from accelrt_neuron.torch_child import PROGRAM
from accelrt_neuron.torch_engines import TorchEngine
from accelrt_neuron.torch_values import TorchProgram

MAX_PIPELINE = 64
"""Cores of the largest Inf1."""


@dataclass(frozen=True, slots=True)
class TorchNeuronOptions:
    """Options of the engine.

    Attributes:
        auto_cast: What is cast in bf16 and fp16: ``all`` or ``matmult``; None for ``all``.
        pipeline_cores: Cores over which the compiler spreads one program as a pipeline.
        dynamic_batch: Let the vendor split other batches into ones of the size compiled for.
        data_parallel_cores: Cores of a copy of the program, among which the vendor's ``DataParallel`` splits
            each batch; needs ``dynamic_batch``. Copies that take calls in turn are `accelrt.load`'s ``replicas``.
        separate_weights: Keep constants apart from the program, as those beyond 1.9 GB must be.
        minimum_segment_size: Of a whole model: smaller parts stay on the CPU; None for the vendor's default of 2.
        partition: Of a whole model: let the vendor's partitioner leave on the CPU what the compiler cannot take.
        min_coverage: Of a whole model: the least share of operators on the device.
        timeout_s: Seconds until the compiler is stopped.
    """

    auto_cast: str | None = None
    pipeline_cores: int = 1
    dynamic_batch: bool = False
    data_parallel_cores: int = 1
    separate_weights: bool = False
    minimum_segment_size: int | None = None
    partition: bool = True
    min_coverage: float = 0.3
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_cast_options(self.auto_cast, None)
        if not 1 <= self.pipeline_cores <= MAX_PIPELINE:
            raise OptionError(f"pipeline_cores must be 1 to {MAX_PIPELINE}, not {self.pipeline_cores}.")
        check_data_parallel(self.data_parallel_cores, self.dynamic_batch)
        if self.pipeline_cores > 1 and self.data_parallel_cores > 1:
            raise OptionError("The vendor's DataParallel takes no programs that are pipelines; choose one of the two.")
        check_limits(self.min_coverage, self.timeout_s)


class TorchNeuronEngine(TorchEngine):
    """torch-neuron with neuron-cc. Compiles on any machine; runs where there is an Inf1."""

    name: ClassVar[str] = "torch-neuron"
    options: ClassVar[type] = TorchNeuronOptions
    requires: ClassVar[str] = TORCH_NEURON.install
    sdk: ClassVar[Sdk] = TORCH_NEURON

    def generation(self) -> Generation:
        return "v1"

    def mode(self, precision: Precision) -> CastMode:
        return cast_mode(precision, "v1", self._options.auto_cast)

    def listed(self, node: Node, precision: Precision) -> str | None:
        if precision == "fp32" and node.op_type in support.PRODUCTS:
            return support.NO_FLOAT32_PRODUCT
        # A list exists, is complete for its last release, and what is not in it would silently stay on the CPU.
        verdict = support.verdict(node, "v1", (support.TORCH_NEURON,))
        return None if verdict.supported else verdict.reason

    def compiler_args(self, mode: CastMode) -> Sequence[str]:
        return neuron_cc_args(mode, self._options.pipeline_cores)

    def compiled_for(self) -> Mapping[str, str]:
        chosen = self._options
        return {"target": "inf1", "flags": f"auto_cast={chosen.auto_cast} pipeline_cores={chosen.pipeline_cores}"}

    def child_function(self) -> str:
        return "build_neuron"

    def plan(self, arguments: Sequence[str], options: Any, *, whole: bool) -> dict[str, Any]:
        return {
            "compiler_args": list(arguments),
            "compiler_timeout": int(options.timeout_s),
            "dynamic_batch": options.dynamic_batch,
            "separate_weights": options.separate_weights,
            "minimum_segment_size": options.minimum_segment_size if whole else 1,
            "fallback": whole and options.partition,
        }

    def devices_needed(self, options: Any) -> int:
        return int(max(options.pipeline_cores, options.data_parallel_cores))

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        cores = core_range(devices, self.name)
        options = program.options
        if cores.count < options.pipeline_cores:
            raise CoresUnavailable(
                f"The program is a pipeline over {options.pipeline_cores} cores; it was given {cores.count}.",
                hint=f"Name that many cores in a row: devices='0-{options.pipeline_cores - 1}'.",
                backend=self.name,
            )
        torch = importlib.import_module("torch")
        sdk = importlib.import_module("torch_neuron")  # before torch.jit.load: it registers the operators of programs
        path = str(program.files[PROGRAM])
        with PLACEMENT:
            try:
                if options.data_parallel_cores > 1:
                    model = sdk.DataParallel(torch.jit.load(path), device_ids=cores.ids, dim=0)
                else:
                    with sdk.experimental.neuron_cores_context(start_nc=cores.start, nc_count=cores.count):
                        model = torch.jit.load(path)
            except (RuntimeError, ValueError) as error:
                raise nrt.typed(error, "Loading the program", self.name) from error
        return TorchProgram(model, program.signature, torch, self.name)
