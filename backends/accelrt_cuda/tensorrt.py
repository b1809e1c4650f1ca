"""The engine `cuda/tensorrt`: NVIDIA's compiler for its GPUs, of TensorRT 10.1 and later, and of 11.

All that parses or builds runs in a child process. This one loads plans that came out of it, and never lets a plan run
code on the host's processor: what a plan holds besides is machine code for the GPU.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from accelrt import isolation
from accelrt.backend import (
    SUPPORTED,
    Caps,
    CompileJob,
    Device,
    Engine,
    Executable,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.errors import AccelrtError, CompileError, IncompatibleProgram, IsolatedError
from accelrt.graph.node import Node
from accelrt_cuda.tensorrt_api import MODULES
from accelrt_cuda.tensorrt_errors import NAME
from accelrt_cuda.tensorrt_options import TensorRtOptions

PLAN = "engine.plan"
_CHILD = "accelrt_cuda.tensorrt_child"
_PROBE_S, _TRIAL_S = 120.0, 600.0
_SPARE_S = 60.0
"""Seconds beyond a build's own limit until its process is killed: it gets to say how far it came."""

INSTALL = "pip install tensorrt cuda-bindings --extra-index-url https://pypi.nvidia.com"
"""The libraries are on the vendor's index; the public one has their bindings only."""

_REMEDIES = {
    "bindings": INSTALL,
    "libraries": INSTALL,
    "old": "pip install --upgrade 'tensorrt>=10.1' --extra-index-url https://pypi.nvidia.com",
    "cuda-bindings": "pip install cuda-bindings",
    "device": "nvidia-smi -L  # lists devices; CUDA_VISIBLE_DEVICES may hide them",
    "driver": "install NVIDIA's driver; nvidia-smi says whether it is loaded",
    "old-driver": "update NVIDIA's driver, or install TensorRT and cuda-bindings for the CUDA version it has",
}
_REASONS = {
    "bindings": "TensorRT is not installed",
    "libraries": "TensorRT's Python bindings are installed, its libraries are not, or not found",
    "old": "this TensorRT is older than 10.1",
    "cuda-bindings": "cuda-bindings, by which memory of the device is had, does not work",
    "device": "there is no CUDA device",
    "driver": "there is no NVIDIA driver that works",
    "old-driver": "NVIDIA's driver is too old",
}


class TensorRtEngine(Engine):
    """TensorRT. It builds and runs on devices only: without one it is not usable at all."""

    name: ClassVar[str] = NAME
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, device_tensors=True)
    options: ClassVar[type] = TensorRtOptions
    requires: ClassVar[str] = INSTALL

    def __init__(self, options: Any = None, shared: tuple[dict[str, Any], dict[Any, str | None]] | None = None) -> None:
        self._options = TensorRtOptions() if options is None else options
        # What the child found out, and verdicts: common to all variants of the engine.
        self._facts, self._verdicts = shared or ({}, {})

    def with_options(self, options: Any) -> Engine:
        return self if options == self._options else type(self)(options, (self._facts, self._verdicts))

    def status(self) -> Status:
        facts = self.facts()
        version, kind = facts.get("version"), facts.get("kind")
        if kind is None:
            return Status(True, version=version)
        reason = _REASONS.get(kind, "TensorRT does not work here")
        return Status(False, version, f"{reason}: {facts['problem']}", _REMEDIES.get(kind, INSTALL))

    def facts(self) -> Mapping[str, Any]:
        """Return version and devices as the child sees them, or the ``kind`` of ``problem`` that it has; asked once."""
        if not self._facts:
            self._facts.update(_probe() if _is_installed() else {"kind": "bindings", "problem": "no package tensorrt"})
        return self._facts

    def report(self) -> Mapping[str, Any]:
        """Return what somebody far away needs to see: JSON, for the report of the backend. Never raises."""
        facts = dict(self.facts())
        if facts.get("kind") in ("bindings", "libraries", "crash"):
            return facts
        try:
            return {**facts, **isolation.call(f"{_CHILD}:describe", timeout_s=_PROBE_S)}
        except (AccelrtError, OSError) as error:
            return {**facts, "undescribed": str(error)}

    def fingerprint(self) -> Mapping[str, str]:
        """Return what a plan depends on.

        By default the release of TensorRT, the compute capability and the model of the GPU. A plan of
        ``hardware_compatibility`` ``same_compute_capability`` goes to other models, one of ``ampere_plus`` to every
        capability from 8.0; one that is ``version_compatible`` to releases of the same major version: one older than
        its own refuses it when it is loaded.
        """
        facts, chosen = self.facts(), self._options
        device = facts["devices"][0]
        version, capability = str(facts["version"]), str(device["compute_capability"])
        found = {"tensorrt": version.partition(".")[0] + ".x" if chosen.version_compatible else version}
        if chosen.hardware_compatibility == "ampere_plus" and int(capability.partition(".")[0]) >= 8:
            return {**found, "compute_capability": "8.0+"}
        found["compute_capability"] = capability
        return (
            found if chosen.hardware_compatibility == "same_compute_capability" else {**found, "device": device["name"]}
        )

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return self.supports_all([node], precision)[0]

    def supports_all(self, nodes: Sequence[Node], precision: Precision) -> list[Verdict]:
        if not nodes:
            return []
        from accelrt_cuda.tensorrt_model import key_of, unusual

        refusals = [unusual(node) for node in nodes]
        asked = {(precision, *key_of(node)): node for node, told in zip(nodes, refusals, strict=True) if told is None}
        untried = {key: node for key, node in asked.items() if key not in self._verdicts}
        self._verdicts.update(zip(untried, _judge(list(untried.values()), precision), strict=True))
        reasons = (
            self._verdicts[precision, *key_of(node)] if told is None else told
            for node, told in zip(nodes, refusals, strict=True)
        )
        return [SUPPORTED if reason is None else Verdict.refuse(reason) for reason in reasons]

    def compile(self, job: CompileJob, out: Path) -> Program:
        cache = self._timings() if job.options.timing_cache else None
        isolation.call(
            f"{_CHILD}:build",
            timeout_s=job.options.timeout_s + _SPARE_S,
            memory_bytes=job.options.memory_bytes,
            model=str(job.model),
            plan=str(out / PLAN),
            signature=job.signature.to_json(),
            precision=job.precision,
            options=asdict(job.options),
            cache=None if cache is None else str(cache),
        )
        fingerprint = self.with_options(job.options).fingerprint()
        return Program({PLAN: out / PLAN}, fingerprint, job.signature, job.options, job.precision)

    def _timings(self) -> Path | None:
        from accelrt_cuda.tensorrt_timing_cache import file_for, folder

        facts = self.facts()
        device = facts["devices"][0]
        try:
            return folder() / file_for(facts["version"], device["name"], device["compute_capability"])
        except RuntimeError:
            return None

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        from accelrt_cuda.tensorrt_cuda import Gpu
        from accelrt_cuda.tensorrt_runtime import load

        try:
            # A backend of CUDA devices numbers them as the CUDA runtime of this process does.
            return load(program.files[PLAN], program.signature, Gpu(devices[0].index))
        except (ImportError, OSError) as error:
            raise IncompatibleProgram(f"TensorRT cannot be used here: {error}", hint=INSTALL, backend=NAME) from error


def _is_installed() -> bool:
    for name in MODULES:
        try:
            if importlib.util.find_spec(name) is not None:
                return True
        except (ImportError, ValueError, AttributeError):
            return True  # something of the name is there, and broken: the child says how
    return False


def _probe() -> dict[str, Any]:
    try:
        facts: dict[str, Any] = isolation.call(f"{_CHILD}:probe", timeout_s=_PROBE_S)
        return facts
    except (AccelrtError, OSError) as error:
        return {"kind": "crash", "problem": error.message if isinstance(error, AccelrtError) else str(error)}


def _judge(nodes: Sequence[Node], precision: Precision) -> list[str | None]:
    """Ask the child about nodes; where one takes the child down, halve them until it stands alone."""
    if not nodes:
        return []
    from accelrt_cuda.tensorrt_model import trial_of

    trials = [{"model": base64.b64encode(data).decode(), "weights": weights} for data, weights in map(trial_of, nodes)]
    try:
        reasons: list[str | None] = isolation.call(
            f"{_CHILD}:judge", timeout_s=_TRIAL_S, trials=trials, precision=precision
        )
        return reasons
    except IsolatedError as error:
        if len(nodes) == 1:
            return [f"TensorRT did not survive the trial: {error.message}"]
        middle = len(nodes) // 2
        return _judge(nodes[:middle], precision) + _judge(nodes[middle:], precision)
    except CompileError as error:
        return [f"TensorRT could not be asked: {error.message}"] * len(nodes)
