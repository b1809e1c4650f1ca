"""How a precision becomes the vendor's casts, and its compilers' arguments.

Every default of a compiler that changes numbers is passed explicitly: neuronx-cc's ``--auto-cast`` meant ``matmult``
until SDK 2.26 and means ``none`` since 2.27, and torch-neuron and tensorflow-neuron differ in theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from accelrt.backend import Precision
from accelrt.errors import CompileError, OptionError
from accelrt_neuron.catalogue import Generation

if TYPE_CHECKING:
    from accelrt.graph.rounding import FloatKind

AutoCast: TypeAlias = Literal["none", "matmult", "all"]
AUTO_CAST = ("none", "matmult", "all")
AUTO_CAST_TYPE = ("bf16", "fp16", "tf32", "fp8_e4m3")
TARGETS = ("inf2", "trn1", "trn1n", "trn2")
MOST_PARALLEL = 128
"""Cores of the largest instance, trn2.48xlarge, with one physical core a logical one."""
MODEL_TYPES = ("generic", "transformer", "unet-inference")

_KINDS: dict[str, FloatKind] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "tf32": "tf32",
    "fp8_e4m3": "float8_e4m3fn",
}


@dataclass(frozen=True, slots=True)
class CastMode:
    """What is cast: nothing, the operands of matrix products, or what every operator reads and writes; and to what."""

    what: AutoCast
    type: str = "bf16"

    @property
    def kind(self) -> FloatKind:
        """The type by the name that the rest of accelrt has for it."""
        return _KINDS[self.type]


def check_cast_options(auto_cast: str | None, auto_cast_type: str | None) -> None:
    """Check the values of two options.

    Raises:
        OptionError: One of them is none of the compiler's.
    """
    if auto_cast is not None and auto_cast not in AUTO_CAST:
        raise OptionError(f"auto_cast must be one of {', '.join(AUTO_CAST)}, not {auto_cast!r}.")
    if auto_cast_type is not None and auto_cast_type not in AUTO_CAST_TYPE:
        raise OptionError(f"auto_cast_type must be one of {', '.join(AUTO_CAST_TYPE)}, not {auto_cast_type!r}.")


def check_limits(min_coverage: float, timeout_s: float) -> None:
    """Check two options that all engines have.

    Raises:
        OptionError: One of them is out of its range.
    """
    if not 0 <= min_coverage <= 1:
        raise OptionError(f"min_coverage must be 0 to 1, not {min_coverage}.")
    if timeout_s <= 0:
        raise OptionError(f"timeout_s must be more than 0, not {timeout_s}.")


def check_data_parallel(cores: int, dynamic_batch: bool) -> None:
    """Check the option ``data_parallel_cores`` against ``dynamic_batch``.

    Raises:
        OptionError: It is out of its range, or the cores' shares would not fit the size compiled for.
    """
    if not 1 <= cores <= MOST_PARALLEL:
        raise OptionError(f"data_parallel_cores must be 1 to {MOST_PARALLEL}, not {cores}.")
    if cores > 1 and not dynamic_batch:
        raise OptionError(
            f"data_parallel_cores={cores} gives each core a share of the batch, which a program for the whole of it "
            "does not take.",
            hint="Set dynamic_batch=True too.",
        )


def cast_mode(
    precision: Precision, generation: Generation, auto_cast: str | None = None, auto_cast_type: str | None = None
) -> CastMode:
    """Return what is cast for a precision, as far as the two options leave it open.

    ``fp32`` casts nothing, except that NeuronCore-v1 has no float32 matrix product and casts its operands whatever it
    is told: a `CastMode` of ``matmult``. ``bf16`` and ``fp16`` cast everything unless ``auto_cast`` says ``matmult``.

    Raises:
        CompileError: The precision and the options contradict each other, or the chip has not got it.
    """
    if precision == "int8":
        raise CompileError(
            "The Neuron compilers take no quantised models: their matrix products are of bf16, fp16 and, from "
            "NeuronCore-v2 on, fp32 (SDK documentation, mixed-precision application note)."
        )
    if precision == "fp32":
        if auto_cast not in (None, "none") or auto_cast_type is not None:
            raise CompileError(
                f"precision='fp32' casts nothing, and auto_cast={auto_cast!r}, auto_cast_type={auto_cast_type!r} ask "
                f"for casts; ask for precision='bf16' or 'fp16' with them."
            )
        return CastMode("matmult", "bf16") if generation == "v1" else CastMode("none")
    if auto_cast == "none":
        raise CompileError(f"auto_cast='none' computes in fp32; it contradicts precision={precision!r}.")
    type_ = auto_cast_type or precision
    if type_ in ("bf16", "fp16") and type_ != precision:
        raise CompileError(f"auto_cast_type={type_!r} contradicts precision={precision!r}.")
    if type_ in ("tf32", "fp8_e4m3") and (generation == "v1" or precision != "bf16"):
        raise CompileError(
            f"auto_cast_type={type_!r} goes with precision='bf16' on NeuronCore-v2 and later (neuronx-cc); "
            f"this is precision={precision!r} on NeuronCore-{generation}."
        )
    return CastMode("matmult" if auto_cast == "matmult" else "all", type_)


def neuron_cc_args(mode: CastMode, pipeline_cores: int = 1) -> list[str]:
    """Return the arguments of neuron-cc (Inf1), option and value as separate strings, as torch-neuron wants them."""
    fast_math = {
        ("all", "bf16"): ["all"],
        ("all", "fp16"): ["fp32-cast-all-fp16"],
        ("matmult", "bf16"): ["none"],
        ("matmult", "fp16"): ["fp32-cast-matmult-fp16", "no-fast-relayout"],
    }[mode.what, mode.type]
    arguments = ["--fast-math", *fast_math]
    return [*arguments, "--neuroncore-pipeline-cores", str(pipeline_cores)] if pipeline_cores > 1 else arguments


def neuron_cc_environment(mode: CastMode, pipeline_cores: int = 1, dynamic_batch: bool = False) -> str:
    """Return the value of NEURON_CC_FLAGS for tensorflow-neuron 2, whose ``trace`` takes no options of the compiler.

    ``--fp32-cast`` is the older spelling and wins over ``--fast-math``, which tensorflow-neuron adds by itself.
    """
    cast = {
        ("all", "bf16"): "all",
        ("all", "fp16"): "all-fp16",
        ("matmult", "bf16"): "matmult-bf16",
        ("matmult", "fp16"): "matmult-fp16",
    }[mode.what, mode.type]
    flags = [f"--fp32-cast={cast}"]
    if pipeline_cores > 1:
        flags.append(f"--neuroncore-pipeline-cores={pipeline_cores}")
    if dynamic_batch:
        flags.append("--dynamic-batch-size")
    return " ".join(flags)


def neuronx_cc_args(mode: CastMode, target: str, *, optlevel: int, model_type: str, lnc: int | None) -> list[str]:
    """Return the arguments of neuronx-cc (Inf2, Trn1, Trn2)."""
    arguments = ["--target", target, "--auto-cast", mode.what]
    if mode.what != "none":
        arguments += ["--auto-cast-type", mode.type]
    arguments += ["--optlevel", str(optlevel), "--model-type", model_type]
    return arguments if lnc is None else [*arguments, "--logical-nc-config", str(lnc)]
