"""OpenVINO on the CPU: not built yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from accelrt.backend import CompileJob, Device, Engine, Executable, Precision, Program, Status, Verdict
from accelrt.errors import CompileError


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plug-in."""

    name: ClassVar[str] = "openvino"
    requires: ClassVar[str] = "pip install accelrt[openvino]"

    def status(self) -> Status:
        return Status(False, None, "not built yet")

    def fingerprint(self) -> Mapping[str, str]:
        return {}

    def supports(self, node: "Node", precision: Precision) -> Verdict:  # noqa
        return Verdict.refuse("not built yet")

    def compile(self, job: CompileJob, out: Path) -> Program:
        raise CompileError("not built yet")

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        raise CompileError("not built yet")
