"""Why CUDA cannot be used here, and the command that changes it: one place for every engine of the backend.

An engine asks in this order, and the first answer is its status:

1. `hardware`: no driver, or no device that this process may see.
2. `onnxruntime`, `tensorrt`: a runtime that is not installed, or has no CUDA inside.
3. `driver_for`: a driver that is too old for the CUDA that the installed runtime was built for.
4. `libraries`: shared libraries that the runtime needs and cannot load; asked of a child process.
5. What the runtime itself says when it is tried, in a child process; `broken` wraps it.

Nothing here imports a framework, and nothing raises.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from accelrt import isolation
from accelrt.backend import Status
from accelrt.errors import AccelrtError
from accelrt_cuda import nvml
from accelrt_cuda.libraries import needed_by
from accelrt_cuda.visible import VARIABLE

Situation = Literal[
    "no driver",
    "driver too old",
    "no device",
    "library missing",
    "no CUDA inside",
    "bindings without libraries",
    "not installed",
    "broken",
]

OLDEST_DRIVER: Mapping[int, str] = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""The first Linux driver that runs every minor version of a CUDA: table 2 of NVIDIA's CUDA Compatibility guide."""

DRIVER_LIBRARY = "libcuda.so.1"

_CHECK_S = 120.0
_DRIVER_REMEDY = "sudo ubuntu-drivers install --gpgpu (elsewhere: https://www.nvidia.com/drivers), then restart"
_CONTAINER_REMEDY = "start the container with `docker run --gpus all` (NVIDIA Container Toolkit on the host)"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One reason why an engine is not usable, and what to do about it."""

    situation: Situation
    reason: str
    remedy: str | None

    def status(self) -> Status:
        """Return it as an engine's status."""
        return Status(False, reason=self.reason, remedy=self.remedy)


def hardware(environ: Mapping[str, str] = os.environ) -> Diagnosis | None:
    """Return why no CUDA device can be used, None if there is one."""
    here = nvml.machine()
    said = f" ({here.problem})" if here.problem else ""
    match here.lack:
        case "driver":
            remedy = _CONTAINER_REMEDY if _in_container() else _DRIVER_REMEDY
            return Diagnosis("no driver", f"there is no NVIDIA driver on this machine{said}", remedy)
        case "mismatch":
            return Diagnosis(
                "broken",
                f"the NVIDIA driver that runs is not of the version of its library{said}; it was updated since",
                "restart the machine, or: sudo rmmod nvidia_uvm nvidia && sudo modprobe nvidia",
            )
        case "bindings":
            return Diagnosis(
                "not installed",
                "there is an NVIDIA driver, but the package nvidia-ml-py, which tells its devices, is not installed",
                "pip install 'accelrt[cuda]'",
            )
        case "other":
            return Diagnosis("broken", f"the NVIDIA driver does not answer{said}", "nvidia-smi, to see its own words")
    if here.gpus and nvml.seen(environ):
        return None
    if here.gpus and VARIABLE in environ:
        count = f"{len(here.gpus)} GPU" + ("s" if len(here.gpus) > 1 else "")
        return Diagnosis(
            "no device",
            f"this machine has {count}, and {VARIABLE}={environ[VARIABLE]!r} hides all of them from this process",
            f"unset {VARIABLE}, or set it to indices from 0 to {len(here.gpus) - 1}",
        )
    if any(gpu.partitioned for gpu in here.gpus):
        return Diagnosis(
            "no device",
            "the GPUs of this machine are in MIG mode, and no instance has been made",
            "sudo nvidia-smi mig -cgi 0 -C, or sudo nvidia-smi -mig 0 to leave MIG mode",
        )
    if here.faults:
        return Diagnosis("no device", "; ".join(here.faults), "sudo nvidia-smi --gpu-reset, or restart the machine")
    remedy = _CONTAINER_REMEDY if _in_container() else "lspci -d 10de:, to see whether a GPU is there"
    return Diagnosis("no device", "there is an NVIDIA driver, but no GPU that it knows", remedy)


def driver_for(needed: tuple[int, int] | None) -> Diagnosis | None:
    """Return why the driver is too old for a CUDA, None if it is not, or cannot be told.

    Within one major version, an older driver runs programs of newer minor versions.

    Args:
        needed: The CUDA that a runtime was built for, major and minor.
    """
    here = nvml.machine()
    if needed is None or here.cuda is None or here.cuda[0] >= needed[0]:
        return None
    oldest = OLDEST_DRIVER.get(needed[0])
    wanted = f"a driver of version {oldest} or newer" if oldest else f"a driver for CUDA {needed[0]}"
    return Diagnosis(
        "driver too old",
        f"the NVIDIA driver {here.driver or 'of unknown version'} runs CUDA {here.cuda[0]}.{here.cuda[1]} at most; "
        f"what is installed was built for CUDA {needed[0]}.{needed[1]}, which needs {wanted}",
        f"{_DRIVER_REMEDY}; or install a build for CUDA {here.cuda[0]}",
    )


def libraries(names: Sequence[str], holder: str, remedy: str) -> Diagnosis | None:
    """Return which shared libraries cannot be loaded, None if all can; a child process tries.

    Args:
        names: As the loader knows them: ``libcudnn.so.9``.
        holder: What needs them, as the sentence about it begins: ``onnxruntime's CUDA provider``.
        remedy: The command that installs them.
    """
    try:
        absent: list[str] = isolation.call("accelrt_cuda.libraries:missing", timeout_s=_CHECK_S, names=list(names))
    except (AccelrtError, OSError) as error:
        return broken(holder, str(error))
    if not absent:
        return None
    if DRIVER_LIBRARY in absent:  # it comes with the driver, and containers are given parts of that
        own = (
            "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            if _in_container()
            else f"install the part of the driver that holds {DRIVER_LIBRARY} (Debian: libcuda1)"
        )
        remedy = own if absent == [DRIVER_LIBRARY] else f"{own}; and {remedy}"
    return Diagnosis("library missing", f"{holder} needs {', '.join(absent)}, which cannot be loaded", remedy)


def broken(holder: str, problem: str, remedy: str | None = None) -> Diagnosis:
    """Return a diagnosis for what a runtime says of itself when it is tried."""
    text = " ".join(problem.split())
    return Diagnosis("broken", f"{holder} does not work here: {text[:600]}", remedy)


# onnxruntime


@dataclass(frozen=True, slots=True)
class OnnxRuntimeBuild:
    """What an installed onnxruntime is, read from its files; it is not imported.

    Attributes:
        package: The wheel whose files are there: ``onnxruntime`` or ``onnxruntime-gpu``.
        version: Of the wheel.
        cuda: The CUDA it was built for, major and minor; None without CUDA.
        provider: The file of the CUDA provider, None if there is none.
    """

    package: str
    version: str
    cuda: tuple[int, int] | None
    provider: Path | None

    @property
    def libraries(self) -> tuple[str, ...]:
        """Shared libraries without which models do not run: those the file names, and cuDNN, which is opened late."""
        named = () if self.provider is None else needed_by(self.provider)
        return tuple(dict.fromkeys((*named, CUDNN)))

    @property
    def install(self) -> str:
        """The command that installs this version with NVIDIA's libraries."""
        return f"pip install 'onnxruntime-gpu[cuda,cudnn]=={self.version}'"


CUDNN = "libcudnn.so.9"
"""The extra ``cudnn`` of onnxruntime-gpu 1.31 is nvidia-cudnn-cu13~=9.0."""

ONNXRUNTIME_GPU = "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def onnxruntime_build(module: str = "onnxruntime") -> OnnxRuntimeBuild | None:
    """Return what is installed by a module's name, None if nothing is."""
    folder = _folder_of(module)
    if folder is None:
        return None
    try:
        text = (folder / "capi" / "build_and_package_info.py").read_text()
    except OSError:
        text = ""
    facts = dict(re.findall(r"^(\w+) *= *['\"]([^'\"]*)['\"]", text, re.MULTILINE))
    provider = folder / "capi" / "libonnxruntime_providers_cuda.so"
    return OnnxRuntimeBuild(
        facts.get("package_name") or module,
        facts.get("__version__") or _version(module) or "unknown",
        _version_pair(facts.get("cuda_version", "")),
        provider if provider.is_file() else None,
    )


def onnxruntime(module: str = "onnxruntime") -> Diagnosis | None:
    """Return why the installed onnxruntime has no CUDA to offer, None if it has; steps 2 and 3 of the module's list.

    The wheels onnxruntime and onnxruntime-gpu hold the same module: whichever was installed last has overwritten the
    other, and uninstalling one takes files of both. So both go before one comes.
    """
    build = onnxruntime_build(module)
    if build is None:
        return Diagnosis("not installed", "onnxruntime is not installed", ONNXRUNTIME_GPU)
    if build.cuda is None or build.provider is None:
        beside = _version("onnxruntime-gpu")
        both = "onnxruntime onnxruntime-gpu" if beside else "onnxruntime"
        clash = f", though onnxruntime-gpu {beside} is installed beside it" if beside else ""
        return Diagnosis(
            "no CUDA inside",
            f"the onnxruntime {build.version} that is installed is a build without CUDA{clash}; the two packages "
            "hold the same module, so the one must go before the other comes",
            f"pip uninstall -y {both} && {ONNXRUNTIME_GPU}",
        )
    return driver_for(build.cuda)


def onnxruntime_tensorrt(module: str = "onnxruntime") -> Diagnosis | None:
    """Return why onnxruntime's TensorRT provider cannot be used, None if it can be, or there is none.

    To be asked before a session of it is made, and before onnxruntime is asked for all its kernels: without TensorRT's
    libraries, both end the process (onnxruntime-gpu 1.31.1).
    """
    folder = _folder_of(module)
    names = () if folder is None else needed_by(folder / "capi" / "libonnxruntime_providers_tensorrt.so")
    # Each release is built for one major version of TensorRT, which is in the names.
    major = next((name.rpartition(".")[2] for name in names if name.startswith("libnvinfer.so.")), "")
    wanted = f"tensorrt=={major}.*" if major else "tensorrt"
    return libraries(
        names, "onnxruntime's TensorRT provider", f"pip install '{wanted}' --extra-index-url https://pypi.nvidia.com"
    )


# TensorRT


def tensorrt() -> Diagnosis | None:
    """Return why TensorRT's Python package cannot be used, None if its libraries load; asks a child process.

    The public package index has the bindings alone (``tensorrt_cu13_bindings``); the libraries come from NVIDIA's.
    """
    index = "pip install tensorrt --extra-index-url https://pypi.nvidia.com"
    folder = _folder_of("tensorrt_bindings") or _folder_of("tensorrt")
    if folder is None:
        return Diagnosis("not installed", "TensorRT is not installed", index)
    bound = sorted(folder.glob("tensorrt*.so"))
    names = [name for path in bound for name in needed_by(path) if name.startswith(("libnvinfer", "libnvonnxparser"))]
    found = libraries(tuple(dict.fromkeys(names)), "TensorRT's Python package", index)
    if found is None or found.situation != "library missing":
        return found
    return Diagnosis(
        "bindings without libraries", f"TensorRT is there as bindings without libraries: {found.reason}", index
    )


def _folder_of(module: str) -> Path | None:
    """Return the folder of a package without importing it, None if it is not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _version_pair(text: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
