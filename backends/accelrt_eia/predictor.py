"""The engine `eia/predictor`: Elastic Inference through TensorFlow's ``EIPredictor``. Amazon has closed the service."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from accelrt.backend import SAVED_MODEL_BINDING, WHOLE_FILES, Program
from accelrt.errors import IncompatibleProgram, OptionError
from accelrt_eia.discovery import Sdk
from accelrt_eia.vendor_engine import VendorEngine

_FORMAT = "saved_model"
PYTHON = "ACCELRT_EIA_PREDICTOR_PYTHON"


@dataclass(frozen=True, slots=True)
class PredictorOptions:
    """Options of the engine.

    Attributes:
        use_ei: False lets the vendor's predictor compute on the host's CPU; no accelerator is needed then.
        timeout_s: Seconds that one call may take; the first puts the model on the accelerator.
    """

    use_ei: bool = True
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise OptionError(f"timeout_s must be more than 0, not {self.timeout_s}.")


class PredictorEngine(VendorEngine):
    """``EIPredictor`` of the vendor's TensorFlow 1.12 to 2.0, in a process of the vendor's Python for each program."""

    name: ClassVar[str] = "predictor"
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)
    options: ClassVar[type] = PredictorOptions
    sdk: ClassVar[Sdk] = Sdk("predictor", "Amazon's TensorFlow for Elastic Inference (ei_for_tf)", PYTHON)
    requires: ClassVar[str] = (
        "Amazon's TensorFlow for Elastic Inference, and an accelerator; the service has been closed. "
        f"{PYTHON} names the Python that it is installed for"
    )

    def installed(self) -> bool:
        return (
            self.sdk.interpreter() is not None
            or _is_here("ei_for_tf", "python")
            or _is_here("tensorflow", "contrib/ei")
        )

    def needs_accelerator(self) -> bool:
        return bool(self._options.use_ei)

    def plan(self, program: Program, ordinal: int) -> tuple[dict[str, Any], Path | None]:
        folder = Path(tempfile.mkdtemp(prefix="accelrt-eia-"))
        try:
            binding = _unpacked(program.files[WHOLE_FILES[_FORMAT]], folder)
            return {
                "path": str(folder),
                "signature": binding["signature"],
                "inputs": binding["inputs"],
                "outputs": binding["outputs"],
                "use_ei": program.options.use_ei,
                "ordinal": ordinal,
            }, folder
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | ValueError | KeyError | zipfile.BadZipFile):
                raise IncompatibleProgram(
                    f"The packed SavedModel cannot be read: {error}", backend=self.name
                ) from error
            raise


def _is_here(package: str, folder: str) -> bool:
    """Look for a folder in a package: asking for the spec of a submodule would import the package."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [] if found is None else list(found.submodule_search_locations or ())
    return any((Path(place) / folder).is_dir() for place in places)


def _unpacked(file: Path, folder: Path) -> dict[str, Any]:
    """Unpack a SavedModel and return how its signature is called."""
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
                raise ValueError(f"it holds {name!r}, which lies outside its folder")
        archive.extractall(folder)
    binding = json.loads((folder / SAVED_MODEL_BINDING).read_bytes())
    if not isinstance(binding, dict) or not {"signature", "inputs", "outputs"} <= set(binding):
        raise ValueError(f"{SAVED_MODEL_BINDING} lacks what it must say")
    (folder / SAVED_MODEL_BINDING).unlink()
    return binding
