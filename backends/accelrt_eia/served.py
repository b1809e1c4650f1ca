"""The engine `eia/served`: models that a server holds already, called where they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from accelrt.backend import (
    WHOLE_FILES,
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
from accelrt.errors import AccelrtError, CompileError, CoresUnavailable, IncompatibleProgram, ModelNotFound, OptionError
from accelrt.graph.node import Node
from accelrt.protocol.address import parse_address
from accelrt.protocol.datatypes import DATATYPES
from accelrt_eia.accelerators import Accelerators
from accelrt_eia.calls import Caller, Model, carriable
from accelrt_eia.remote import RemoteExecutable, status

FORMAT = "open-inference"
_LOAD_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServedOptions:
    """Options of the engine.

    Attributes:
        timeout_s: How long one call may take, trying again included.
        shared_memory: Let tensors travel in shared memory where the server is on this machine.
        local_socket: Let calls go over the server's Unix socket there, in place of gRPC.
    """

    timeout_s: float = 30.0
    shared_memory: bool = True
    local_socket: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= 86400:
            raise OptionError("timeout_s must be above 0 and at most a day.")


class ServedEngine(Engine):
    """Models on servers of the Open Inference Protocol. A program is where the model is.

    There is no graph of such a model, so that nothing takes its calls over: one that fails raises, and the next one
    tries the server again.
    """

    name: ClassVar[str] = "served"
    formats: ClassVar[tuple[str, ...]] = (FORMAT,)
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=4)
    options: ClassVar[type] = ServedOptions
    requires: ClassVar[str] = "pip install 'accelrt[eia]'"

    def __init__(self, accelerators: Accelerators | None = None) -> None:
        self._accelerators = accelerators or Accelerators()

    def status(self) -> Status:
        return status()

    def devices(self) -> Sequence[Device]:
        return (Device("eia", 0, "the server that the model names"),)

    def fingerprint(self) -> Mapping[str, str]:
        return {"protocol": "open-inference/2"}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return Verdict.refuse("it calls models that a server holds, and compiles nothing")

    def compile(self, job: CompileJob, out: Path) -> Program:
        if job.format != FORMAT:
            raise CompileError(f"eia/served takes {FORMAT}, not {job.format}.", backend=self.name)
        if problem := carriable(job.signature):
            raise CompileError(f"The model cannot be called: {problem}.", backend=self.name)
        file = WHOLE_FILES[FORMAT]
        shutil.copyfile(job.model, out / file)
        remark = f"called at {json.loads(job.model.read_text())['address']}"
        return Program({file: out / file}, self.fingerprint(), job.signature, job.options, job.precision, remark)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            address = parse_address(json.loads(program.files[WHOLE_FILES[FORMAT]].read_text())["address"])
        except (OSError, ValueError, KeyError, TypeError, OptionError) as error:
            raise IncompatibleProgram(f"The program does not say where the model is: {error!r}") from error
        endpoint = self._accelerators.endpoint(address)
        try:
            told = endpoint.ask(
                "ModelMetadata", _LOAD_TIMEOUT_S, patient=True, name=address.model, version=address.version
            )
        except ModelNotFound as error:
            raise IncompatibleProgram(f"{address} is not there: {error.message}", backend=self.name) from error
        except AccelrtError as error:
            raise CoresUnavailable(f"{address} cannot be used: {error.message}", backend=self.name) from error
        signature = program.signature
        for side, tensors, ports in (
            ("inputs", told.inputs, signature.inputs),
            ("outputs", told.outputs, signature.outputs),
        ):
            expected = [(port.name, DATATYPES.get(getattr(port.type, "dtype", ""), "")) for port in ports]
            found = [(tensor.name, tensor.datatype) for tensor in tensors]
            if found != expected:
                raise IncompatibleProgram(
                    f"The {side} of {address} are {found}, and were {expected}.",
                    hint="Compile it again.",
                    backend=self.name,
                )
        options = program.options
        share = options.shared_memory and self._accelerators.shares_memory(address)
        model = Model(address.model, address.version, signature)
        caller = Caller(endpoint, model, share=share, local_socket=options.local_socket)
        return RemoteExecutable(endpoint, caller, options.timeout_s)
