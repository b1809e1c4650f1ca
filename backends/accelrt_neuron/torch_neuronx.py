"""The engine `neuron/torch-neuronx`: Inf2, Trn1 and Trn2 through ``torch_neuronx.trace``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accelrt.backend import Device, Executable, Precision, Program
from accelrt.errors import OptionError
from accelrt_neuron import nrt
from accelrt_neuron.catalogue import Generation
from accelrt_neuron.cores import PLACEMENT, core_range
from accelrt_neuron.discovery import chips
from accelrt_neuron.flags import (
    MODEL_TYPES,
    TARGETS,
    CastMode,
    cast_mode,
    check_cast_options,
    check_data_parallel,
    check_limits,
    neuronx_cc_args,
)
from accelrt_neuron.sdk import TORCH_NEURONX, Sdk
from accelrt_neuron.torch_child import PROGRAM
from accelrt_neuron.torch_engines import TorchEngine
from accelrt_neuron.torch_values import TorchProgram

OVERRIDE = "NEURON_PLATFORM_TARGET_OVERRIDE"
DEFAULT_TARGET = "inf2"


@dataclass(frozen=True, slots=True)
class TorchNeuronxOptions:
    """Options of the engine.

    Attributes:
        target: The chip to compile for: inf2, trn1, trn1n or trn2. None for the one at hand, else that of
            NEURON_PLATFORM_TARGET_OVERRIDE, else inf2.
        auto_cast: What is cast in bf16 and fp16: ``all`` or ``matmult``; None for ``all``.
        auto_cast_type: To what: ``tf32`` or ``fp8_e4m3`` in place of bf16.
        optlevel: How hard the compiler tries, 1 to 3.
        model_type: ``generic``, ``transformer`` or ``unet-inference``.
        lnc: Physical cores of a logical one, on trn2; None for the compiler's default.
        dynamic_batch: Let the vendor split other batches into ones of the size compiled for, padding the last.
        data_parallel_cores: Cores of a copy of the program, among which the vendor's ``DataParallel`` splits
            each batch; needs ``dynamic_batch``. Copies that take calls in turn are `accelrt.load`'s ``replicas``.
        inline_weights: Keep weights inside the compiled program; else they are moved to the device when it is loaded.
        partition: Of a whole model: let the vendor's partitioner leave on the CPU what the compiler cannot take.
        min_coverage: Of a whole model: the least share of operators on the device; 0.3 is where the vendor's
            TensorFlow begins to call a conversion successful.
        min_subgraph_size, max_subgraph_count: Limits of the vendor's partitioner; None for none.
        timeout_s: Seconds until the compiler is stopped.
    """

    target: str | None = None
    auto_cast: str | None = None
    auto_cast_type: str | None = None
    optlevel: int = 2
    model_type: str = "generic"
    lnc: int | None = None
    dynamic_batch: bool = False
    data_parallel_cores: int = 1
    inline_weights: bool = True
    partition: bool = True
    min_coverage: float = 0.3
    min_subgraph_size: int | None = None
    max_subgraph_count: int | None = None
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in TARGETS:
            raise OptionError(f"target must be one of {', '.join(TARGETS)}, not {self.target!r}.")
        check_cast_options(self.auto_cast, self.auto_cast_type)
        if self.optlevel not in (1, 2, 3):
            raise OptionError(f"optlevel must be 1, 2 or 3, not {self.optlevel}.")
        if self.model_type not in MODEL_TYPES:
            raise OptionError(f"model_type must be one of {', '.join(MODEL_TYPES)}, not {self.model_type!r}.")
        if self.lnc not in (None, 1, 2):
            raise OptionError(f"lnc must be 1 or 2, not {self.lnc}.")
        check_data_parallel(self.data_parallel_cores, self.dynamic_batch)
        check_limits(self.min_coverage, self.timeout_s)


class TorchNeuronxEngine(TorchEngine):
    """torch-neuronx with neuronx-cc. Compiles without a device; runs where there is one."""

    name: ClassVar[str] = "torch-neuronx"
    options: ClassVar[type] = TorchNeuronxOptions
    requires: ClassVar[str] = TORCH_NEURONX.install
    sdk: ClassVar[Sdk] = TORCH_NEURONX

    def target(self) -> str:
        """Return the chip that is compiled for."""
        if self._options.target is not None:
            return str(self._options.target)
        if (kind := self._chip_here()) in TARGETS:
            return kind
        return os.environ.get(OVERRIDE) or DEFAULT_TARGET

    def generation(self) -> Generation:
        return "v3" if self.target() == "trn2" else "v2"

    def mode(self, precision: Precision) -> CastMode:
        return cast_mode(precision, self.generation(), self._options.auto_cast, self._options.auto_cast_type)

    def compiler_args(self, mode: CastMode) -> Sequence[str]:
        chosen = self._options
        return neuronx_cc_args(
            mode, self.target(), optlevel=chosen.optlevel, model_type=chosen.model_type, lnc=chosen.lnc
        )

    def compiled_for(self) -> Mapping[str, str]:
        chosen = self._options
        names = ("auto_cast", "auto_cast_type", "optlevel", "model_type", "lnc")
        flags = {name: getattr(chosen, name) for name in names}
        return {"target": self.target(), "flags": " ".join(f"{name}={value}" for name, value in flags.items())}

    def environment(self) -> Mapping[str, str]:
        # Without a device the package wants to know before it is imported which chip it is to pretend.
        return {} if self._chip_here() else {OVERRIDE: self.target()}

    def _chip_here(self) -> str:
        found = chips(self._root)
        return found[0].kind if found else ""

    def child_function(self) -> str:
        return "build_neuronx"

    def plan(self, arguments: Sequence[str], options: Any, *, whole: bool) -> dict[str, Any]:
        partitioner = {
            "model_support_percentage_threshold": options.min_coverage,
            "min_subgraph_size": options.min_subgraph_size,
            "max_subgraph_count": options.max_subgraph_count,
        }
        return {
            "compiler_args": list(arguments),
            "offline": not self._chip_here(),
            "dynamic_batch": options.dynamic_batch,
            "inline_weights": options.inline_weights,
            "partitioner": partitioner if whole and options.partition else None,
        }

    def devices_needed(self, options: Any) -> int:
        return int(options.data_parallel_cores)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        cores = core_range(devices, self.name)
        options = program.options
        torch = importlib.import_module("torch")
        sdk = importlib.import_module("torch_neuronx")  # before torch.jit.load: it registers the operators of programs
        with PLACEMENT:
            try:
                model = torch.jit.load(str(program.files[PROGRAM]))
                if options.data_parallel_cores > 1:
                    # It places the program itself, with the placement functions, on each of the cores.
                    model = sdk.DataParallel(model, device_ids=cores.ids, dim=0, set_dynamic_batching=True)
                else:
                    _placement(sdk, "set_neuron_cores")(model, start_nc=cores.start, nc_count=cores.count)
                if not options.inline_weights:
                    sdk.move_trace_to_device(model, cores.start)
            except (RuntimeError, ValueError) as error:
                raise nrt.typed(error, "Loading the program", self.name) from error
        return TorchProgram(model, program.signature, torch, self.name)


def _placement(sdk: Any, name: str) -> Any:
    """Return a placement function, from where releases before SDK 2.25 had it too."""
    found = getattr(sdk, name, None)
    return getattr(sdk.experimental, name) if found is None else found
