"""The engine `eia/torcheia`: Elastic Inference through PyTorch's EI builds. Amazon has closed the service.

PyTorch-EI 1.3.1 takes the accelerator as a second argument of ``torch.jit.optimized_execution``; 1.5.1 binds a module
to it with ``torcheia.jit.attach_eia``. Which of the two is here is found out by looking at them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from accelrt.backend import WHOLE_FILES, Program
from accelrt.errors import OptionError
from accelrt_eia.discovery import Sdk
from accelrt_eia.vendor_engine import VendorEngine

_FORMAT = "torchscript"
PYTHON = "ACCELRT_EIA_TORCHEIA_PYTHON"
_LAST = (1, 5)
"""The last PyTorch that there was an EI build of; later ones need not be imported to know that they are none."""


@dataclass(frozen=True, slots=True)
class TorchEiaOptions:
    """Options of the engine.

    Attributes:
        timeout_s: Seconds that one call may take; the first puts the model on the accelerator.
    """

    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise OptionError(f"timeout_s must be more than 0, not {self.timeout_s}.")


class TorchEiaEngine(VendorEngine):
    """PyTorch-EI 1.3.1 or 1.5.1, in a process of the vendor's Python for each program."""

    name: ClassVar[str] = "torcheia"
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)
    options: ClassVar[type] = TorchEiaOptions
    sdk: ClassVar[Sdk] = Sdk("torcheia", "Amazon's PyTorch for Elastic Inference (torcheia)", PYTHON)
    requires: ClassVar[str] = (
        "Amazon's PyTorch 1.3.1 or 1.5.1 for Elastic Inference, and an accelerator; the service has been closed. "
        f"{PYTHON} names the Python that it is installed for"
    )

    def installed(self) -> bool:
        if self.sdk.interpreter() is not None:
            return True
        with contextlib.suppress(ImportError, ValueError):
            if importlib.util.find_spec("torcheia") is not None:
                return True
        return _is_old_torch()

    def plan(self, program: Program, ordinal: int) -> tuple[dict[str, Any], Path | None]:
        return {
            "path": str(program.files[WHOLE_FILES[_FORMAT]]),
            "inputs": list(program.signature.input_names),
            "outputs": list(program.signature.output_names),
            "ordinal": ordinal,
        }, None


def _is_old_torch() -> bool:
    try:
        parts = version("torch").split(".")
        return (int(parts[0]), int(parts[1])) <= _LAST
    except (PackageNotFoundError, ValueError, IndexError):
        return False
