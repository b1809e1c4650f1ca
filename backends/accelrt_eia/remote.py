"""The engine `eia/remote`: segments that a server of the Open Inference Protocol compiles and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from accelrt.backend import Caps, CompileJob, Device, Engine, Executable, Precision, Program, Status, Verdict
from accelrt.errors import CompileError, IncompatibleProgram
from accelrt.graph.node import Node


class RemoteEngine(Engine):
    """Endpoints of the Open Inference Protocol over gRPC."""

    name: ClassVar[str] = "remote"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=4)
    requires: ClassVar[str] = "pip install 'accelrt[eia]'"

    def endpoints(self) -> Sequence[Device]:
        """Return the endpoints that the environment names."""
        return ()

    def status(self) -> Status:
        return Status(False, reason="it is being written", remedy=self.requires)

    def fingerprint(self) -> Mapping[str, str]:
        return {"protocol": "open-inference-protocol/2"}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return Verdict.refuse("it is being written")

    def compile(self, job: CompileJob, out: Path) -> Program:
        raise CompileError("eia/remote is being written.", backend=self.name)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        raise IncompatibleProgram("eia/remote is being written.", backend=self.name)
