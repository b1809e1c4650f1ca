"""The options of `cuda/tensorrt`, and the range of sizes that they give each open dimension of a segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from accelrt.errors import CompileError, OptionError
from accelrt.graph.types import Signature, TensorType

Sizes: TypeAlias = tuple[int, ...]
Range: TypeAlias = tuple[Sizes, Sizes, Sizes]
"""The least, the best and the greatest sizes of one input; of a shape tensor, its values."""

HARDWARE = ("none", "ampere_plus", "same_compute_capability")
_PARTS = ("min_shape", "opt_shape", "max_shape")


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """Options of the engine.

    Attributes:
        profiles: For inputs with open dimensions, the sizes to build for: ``{"x": ((1, 3, 64, 64), (8, 3, 224, 224),
            (32, 3, 512, 512))}``, least, best and greatest, as Torch-TensorRT's ``Input`` has them; also as a mapping
            with the keys ``min_shape``, ``opt_shape`` and ``max_shape``. For an input that TensorRT reads as a shape,
            its values. A size given for a named dimension holds for every input that has it; under the name of a
            dimension, ``{"sequence": (1, 128, 512)}``, it holds in every segment, whatever its inputs are called.
        batch: The same for the open first dimension of inputs that ``profiles`` does not name.
        optimization_level: How long the builder looks for better kernels, 0 to 5.
        workspace_bytes: What a layer may use as scratch memory; None for all of the device.
        tf32: Let float32 products be computed in TF32, with 10 bits of mantissa in place of 23.
        hardware_compatibility: ``none``: for the model of GPU that it is built on; ``same_compute_capability``: for
            all of that compute capability; ``ampere_plus``: for Ampere and whatever follows. Plans may be slower.
        version_compatible: Let later releases of the same major version of TensorRT load the plan.
        timing_cache: Keep the timings of kernels from build to build.
        timeout_s: Seconds until a build is given up.
        memory_bytes: Resident bytes of the building process at which it is stopped; None for no limit.
    """

    profiles: Any = ()
    batch: Any = (1, 8, 32)
    optimization_level: int = 3
    workspace_bytes: int | None = None
    tf32: bool = False
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    timing_cache: bool = True
    timeout_s: float = 1800.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "profiles", _profiles(self.profiles))
        object.__setattr__(self, "batch", _batch(self.batch))
        if not 0 <= self.optimization_level <= 5:
            raise OptionError(f"optimization_level must be 0 to 5, not {self.optimization_level}.")
        if self.hardware_compatibility not in HARDWARE:
            raise OptionError(
                f"hardware_compatibility must be one of {', '.join(HARDWARE)}, not {self.hardware_compatibility!r}."
            )
        for name in ("workspace_bytes", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(f"{name} must be more than 0, or None for no limit, not {value}.")
        if not self.timeout_s > 0:
            raise OptionError(f"timeout_s must be more than 0, not {self.timeout_s}.")


def _profiles(given: Any) -> tuple[tuple[str, Range], ...]:
    pairs = given.items() if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping | Sequence) or isinstance(given, str):
        raise OptionError(f"profiles must map names of inputs to (least, best, greatest) sizes, not {given!r}.")
    found: dict[str, Range] = {}
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str):
            raise OptionError(f"profiles must map names of inputs to (least, best, greatest) sizes, not {given!r}.")
        found[pair[0]] = _range(*pair)
    return tuple(sorted(found.items()))


def _range(name: str, given: Any) -> Range:
    if isinstance(given, Mapping):
        if set(given) != set(_PARTS):
            raise OptionError(f"The profile of {name!r} must have {', '.join(_PARTS)}, not {sorted(given)}.")
        given = [given[part] for part in _PARTS]
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 3:
        raise OptionError(
            f"The profile of {name!r} must be three lists of sizes (least, best, greatest), not {given!r}."
        )
    sizes = [tuple(part) if isinstance(part, Sequence) and not isinstance(part, str) else (part,) for part in given]
    if not all(type(size) is int and size >= 0 for part in sizes for size in part):
        raise OptionError(f"The profile of {name!r} must hold whole numbers of at least 0, not {given!r}.")
    least, best, greatest = sizes
    if not len(least) == len(best) == len(greatest):
        raise OptionError(f"The three parts of the profile of {name!r} differ in length: {given!r}.")
    if not all(low <= middle <= high for low, middle, high in zip(least, best, greatest, strict=True)):
        raise OptionError(f"The profile of {name!r} must rise from least to best to greatest: {given!r}.")
    return least, best, greatest


def _batch(given: Any) -> tuple[int, int, int]:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 3:
        raise OptionError(f"batch must be three sizes (least, best, greatest), not {given!r}.")
    least, best, greatest = _range("batch", given)
    return least[0], best[0], greatest[0]


def ranges(signature: Signature, options: TensorRtOptions) -> dict[str, Range]:
    """Return least, best and greatest sizes for every input of a segment that has open dimensions.

    Raises:
        CompileError: A size is open and nobody said what it may be; or what was said does not fit the input.
    """
    given: dict[str, Range] = dict(options.profiles)
    open_inputs = {
        port.name: port.type.shape
        for port in signature.inputs
        if isinstance(port.type, TensorType) and port.type.shape is not None and not _is_static(port.type.shape)
    }
    # An input comes before a dimension of its name.
    named: dict[str, Sizes] = {
        name: (chosen[0][0], chosen[1][0], chosen[2][0])
        for name, chosen in given.items()
        if name not in signature.input_names and len(chosen[0]) == 1
    }
    for name, shape in open_inputs.items():
        if (chosen := given.get(name)) is None:
            continue
        if len(chosen[0]) != len(shape):
            raise CompileError(
                f"The profile of input {name!r} has {len(chosen[0])} sizes, the input {len(shape)} dimensions.",
                hint=f"Give three lists of {len(shape)} sizes each.",
                backend="tensorrt",
            )
        for dim, sizes in zip(shape, zip(*chosen, strict=True), strict=True):
            if isinstance(dim, int) and set(sizes) != {dim}:
                raise CompileError(
                    f"The profile of input {name!r} says {sizes} for a dimension that is always {dim}.",
                    hint=f"Put {dim} there in all three lists.",
                    backend="tensorrt",
                )
            if isinstance(dim, str):
                named.setdefault(dim, sizes)
    return {name: given.get(name) or _filled(name, shape, named, options.batch) for name, shape in open_inputs.items()}


def _is_static(shape: Sequence[Any]) -> bool:
    return all(isinstance(dim, int) for dim in shape)


def _filled(name: str, shape: Sequence[Any], named: Mapping[str, Sizes], batch: Sizes) -> Range:
    columns: list[Sizes] = []
    for axis, dim in enumerate(shape):
        if isinstance(dim, int):
            columns.append((dim, dim, dim))
        elif isinstance(dim, str) and dim in named:
            columns.append(named[dim])
        elif axis == 0:
            columns.append(batch)
        else:
            shown = ", ".join("?" if d is None else str(d) for d in shape)
            raise CompileError(
                f"The sizes of input {name!r}, [{shown}], are open past the first dimension, and TensorRT builds for a "
                f"range of sizes.",
                hint=f"Pass options={{'profiles': {{{name!r}: (least, best, greatest)}}}}, each {len(shape)} sizes.",
                backend="tensorrt",
            )
    least, best, greatest = zip(*columns, strict=True)
    return tuple(least), tuple(best), tuple(greatest)
