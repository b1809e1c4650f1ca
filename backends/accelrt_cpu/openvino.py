"""The engine `cpu/openvino`: Intel's runtime, chosen by name.

OpenVINO has crashed in its compiler on CPUs that it does not know (openvino#35943), so everything that compiles
runs in a child process; only programs that have come out of one are imported into this one.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

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
from accelrt.errors import AccelrtError, CompileError, IncompatibleProgram, IsolatedError, OutOfDeviceMemory
from accelrt.graph.node import Node
from accelrt.graph.types import TensorType
from accelrt.programs import instruction_set
from accelrt_cpu.openvino_deviations import deviation
from accelrt_cpu.openvino_runtime import DEVICE, HINTS, OpenVinoOptions, Resident, core, mapped, properties_of, short

_BLOB = "model.blob"
_CHILD = "accelrt_cpu.openvino_child"
_PROBE_S, _TRIAL_S = 120.0, 300.0


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plug-in."""

    name: ClassVar[str] = "openvino"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2)
    options: ClassVar[type] = OpenVinoOptions
    requires: ClassVar[str] = "pip install 'accelrt[openvino]'"

    def __init__(self) -> None:
        self._trials: dict[tuple[object, ...], str | None] = {}

    def status(self) -> Status:
        try:
            found = importlib.util.find_spec("openvino") is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            return Status(False, reason="openvino is not installed", remedy=self.requires)
        facts = _facts()
        if "problem" in facts:
            return Status(False, reason=f"openvino does not work here: {facts['problem']}", remedy=self.requires)
        return Status(True, version=facts["version"])

    def fingerprint(self) -> Mapping[str, str]:
        facts = _facts()
        return {"openvino": facts["version"], "device": facts["device"], "cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return self.supports_all([node], precision)[0]

    def supports_all(self, nodes: Sequence[Node], precision: Precision) -> list[Verdict]:
        if (lacking := _lacking(precision)) is not None:
            return [Verdict.refuse(lacking)] * len(nodes)
        # Rules look at sizes, so they are asked each time; trials do not tell sizes apart and are remembered.
        refusals = [deviation(node, precision) for node in nodes]
        hint = HINTS[precision]
        untold = {(hint, *_key(node)): node for node, reason in zip(nodes, refusals, strict=True) if reason is None}
        untried = {key: node for key, node in untold.items() if key not in self._trials}
        answers = _try_out([_trial_model(node) for node in untried.values()], precision)
        self._trials.update(zip(untried, answers, strict=True))
        reasons = (
            self._trials[hint, *_key(node)] if reason is None else reason
            for node, reason in zip(nodes, refusals, strict=True)
        )
        return [SUPPORTED if reason is None else Verdict.refuse(reason) for reason in reasons]

    def compile(self, job: CompileJob, out: Path) -> Program:
        if (lacking := _lacking(job.precision)) is not None:
            raise CompileError(f"OpenVINO cannot take the segment: {lacking}.", backend=self.name)
        isolation.call(
            f"{_CHILD}:build",
            model=str(job.model),
            blob=str(out / _BLOB),
            signature=job.signature.to_json(),
            properties=properties_of(job.options, job.precision),
        )
        return Program({_BLOB: out / _BLOB}, self.fingerprint(), job.signature, job.options, job.precision)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            blob = mapped(program.files[_BLOB])
            compiled = core().import_model(blob, DEVICE, properties_of(program.options, program.precision))
        except MemoryError as error:
            raise OutOfDeviceMemory(f"openvino: {error}", backend=self.name) from error
        except Exception as error:
            raise IncompatibleProgram(f"openvino: {short(error)}", backend=self.name) from error
        return Resident(compiled, blob, program.signature)


def _key(node: Node) -> tuple[object, ...]:
    """Return what a trial depends on: the signature and, as kernels go by it, which sizes are open, 0 or 1."""
    types = (*node.input_types, *node.capture_types, *node.output_types)
    shapes = (type_.shape for type_ in types if isinstance(type_, TensorType))
    sizes = tuple(
        None if shape is None else tuple(min(dim, 2) if isinstance(dim, int) else None for dim in shape)
        for shape in shapes
    )
    captures = tuple(type_.dtype if isinstance(type_, TensorType) else str(type_) for type_ in node.capture_types)
    return (node.signature, sizes, captures)


def _trial_model(node: Node) -> bytes:
    from accelrt.graph.trial import single_node_model

    return bytes(single_node_model(node).SerializeToString())


def _try_out(models: Sequence[bytes], precision: Precision) -> list[str | None]:
    """Ask the child about models; where one takes the child down, halve the batch until it stands alone."""
    if not models:
        return []
    try:
        texts = [base64.b64encode(model).decode() for model in models]
        reasons: list[str | None] = isolation.call(
            f"{_CHILD}:try_out", timeout_s=_TRIAL_S, models=texts, precision=precision
        )
        return reasons
    except IsolatedError as error:
        if len(models) == 1:
            return [f"OpenVINO did not survive the trial: {error.message}"]
        middle = len(models) // 2
        return _try_out(models[:middle], precision) + _try_out(models[middle:], precision)


def _lacking(precision: Precision) -> str | None:
    """Return why OpenVINO does not compute in a precision here, None if it does.

    It takes any hint and computes in what it likes: float16 in bfloat16 where the CPU has but that, or in float32.
    """
    if precision in ("fp32", "int8"):
        return None
    computed, wanted = _facts().get(f"computes_{precision}", "unknown"), HINTS[precision]
    return None if computed == wanted else f"asked for {wanted}, OpenVINO computes in {computed} on this CPU"


@cache
def _facts() -> dict[str, str]:
    """Return version and device as the child sees them, or the problem that it has with them; asked once."""
    try:
        facts: dict[str, str] = isolation.call(f"{_CHILD}:probe", timeout_s=_PROBE_S)
        return facts
    except (AccelrtError, OSError) as error:
        return {"problem": str(error)}
