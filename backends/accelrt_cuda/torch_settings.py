"""The options of cuda/torch and what they mean to inductor: data, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.backend import Precision
from accelrt.errors import OptionError

MODES = ("auto", "eager", "graph", "compile", "aot")
MAX_STREAMS, MAX_GRAPHS = 8, 64
PACKAGE, FACTS = "compiled.pt2", "compiled.json"
PACKAGE_FACTS = frozenset({"shapes", "limits", "bounds"})
SEGMENT = "segment.onnx"


@dataclass(frozen=True, slots=True)
class TorchCudaOptions:
    """Options of the engine.

    Attributes:
        mode: ``aot`` compiles by AOTInductor when the model is compiled, ``compile`` by inductor when it is loaded,
            ``graph`` does not compile; the launches of all three are recorded as CUDA graphs. ``eager`` launches
            operator by operator. ``auto`` is ``aot``; where that cannot be, ``compile`` if the shapes are known and
            inductor takes the model, else ``graph``, saying why.
        allow_tf32: Multiply float32 by TensorFloat-32, which keeps 10 bits after the point.
        channels_last: Lay out two-dimensional convolutions with channels last; None where the precision uses tensor
            cores: bf16, fp16, or fp32 with ``allow_tf32``.
        autotune: Have inductor try many kernels for each product and convolution; takes minutes.
        streams: Calls under way at once on a device, each with buffers of its own.
        graphs: CUDA graphs that each of them keeps, one for each shapes of the inputs.
    """

    mode: str = "auto"
    allow_tf32: bool = False
    channels_last: bool | None = None
    autotune: bool = False
    streams: int = 2
    graphs: int = 8

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}.")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise OptionError(f"streams must be 1 to {MAX_STREAMS}, not {self.streams}.")
        if not 1 <= self.graphs <= MAX_GRAPHS:
            raise OptionError(f"graphs must be 1 to {MAX_GRAPHS}, not {self.graphs}.")


def lays_channels_last(precision: Precision, options: TorchCudaOptions) -> bool:
    """Tell whether convolutions get channels last: tensor cores want it, units of float32 do not."""
    if options.channels_last is not None:
        return options.channels_last
    return precision in ("bf16", "fp16") or options.allow_tf32


def inductor_settings(options: TorchCudaOptions, *, channels_last: bool) -> dict[str, Any]:
    """Return the settings of inductor's that are ours; they hold for one compilation."""
    settings: dict[str, Any] = {"layout_optimization": channels_last}
    if options.autotune:
        settings |= {"max_autotune": True, "coordinate_descent_tuning": True}
    return settings


def inductor_cache() -> dict[str, str]:
    """Return the variables that put inductor's own cache beside accelrt's, unless the user has put it elsewhere."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return {}
    own = os.environ.get("ACCELRT_CACHE_DIR")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accelrt"
    return {"TORCHINDUCTOR_CACHE_DIR": str(base / "inductor")}
