"""What the engines for Amazon's Elastic Inference have in common: a source whole, one model a process."""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelrt.backend import (
    SUPPORTED,
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
from accelrt.errors import AccelrtError, CompileError, CoresUnavailable, ExecutionError
from accelrt.graph.node import Node
from accelrt.graph.types import Signature, TensorType, Value, numpy_dtype
from accelrt_eia.discovery import CLOSED, INSTEAD, Found, Sdk, status_of
from accelrt_eia.failures import typed
from accelrt_eia.vendor_process import VendorDied, VendorError, VendorProcess

_TYPES = frozenset(
    {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"}
)
"""What numpy has by itself: the vendor's numpy of 2019 knows no others."""


class VendorEngine(Engine):
    """An engine that hands a source whole to one of the vendor's frameworks, in a process for each program.

    Several models in one process get mixed up in PyTorch's builds, and a lost accelerator takes its process down, so
    each program has one. The same accelerator may serve several.

    Args:
        options: As `with_options` gives them.
        facts: What was found out about the vendor's framework, shared by the engine's variants.
        root: Where the file system with the vendor's tool begins.
    """

    caps: ClassVar[Caps] = Caps(concurrent=False, parallelism=1, executes_code=True)
    sdk: ClassVar[Sdk]

    def __init__(self, options: Any = None, facts: dict[str, Any] | None = None, root: Path = Path("/")) -> None:
        self._options = self.options() if options is None else options
        self._root = root
        self._known = {} if facts is None else facts

    def with_options(self, options: Any) -> Engine:
        return self if options == self._options else type(self)(options, self._known, self._root)

    def status(self) -> Status:
        facts = self.facts()
        working = facts is not None and "problem" not in facts
        return status_of(self.sdk, facts, self.found() if working and self.needs_accelerator() else None)

    def facts(self) -> Mapping[str, Any] | None:
        """Return what a child process found out about the vendor's framework, None if there is none; asked once."""
        if not self.installed():
            return None
        if "facts" not in self._known:
            self._known["facts"], self._known["found"] = self.sdk.probe(self._root)
        facts: Mapping[str, Any] = self._known["facts"]
        return facts

    def found(self) -> Found:
        """Return the accelerators that the vendor's client finds; asked once."""
        found: Found = Found() if self.facts() is None else self._known["found"]
        return found

    def devices(self) -> Sequence[Device]:
        """Return the vendor's accelerators: the backend's other devices are none of this engine's."""
        facts = self.facts()
        if facts is None or "problem" in facts:
            return ()
        if not self.needs_accelerator():
            return (Device("eia", 0, f"the host's CPU, by {self.sdk.what}", None, {"nature": "host"}),)
        return tuple(accelerator.device() for accelerator in self.found().accelerators)

    def fingerprint(self) -> Mapping[str, str]:
        return dict((self.facts() or {}).get("versions", {}))

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return Verdict.refuse(f"eia/{self.name} takes whole models only")

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        verdict = super().supports_source(format, signature, precision)
        if not verdict.supported:
            return verdict
        for port in (*signature.inputs, *signature.outputs):
            if not isinstance(port.type, TensorType) or port.type.dtype not in _TYPES:
                return Verdict.refuse(f"{port.name!r} is a {port.type}, and it takes tensors of numpy's own types")
        return SUPPORTED

    def compile(self, job: CompileJob, out: Path) -> Program:
        """Keep the source: the accelerator compiles it when it is called for the first time."""
        verdict = self.supports_source(job.format, job.signature, job.precision)
        if not verdict.supported:
            raise CompileError(f"eia/{self.name} refuses: {verdict.reason}.", backend=self.name)
        name = WHOLE_FILES[job.format]
        files = {name: _kept(job.model, out / name)}
        remark = "as it is; the vendor's client compiles it for the accelerator at the first call"
        return Program(files, self.fingerprint(), job.signature, job.options, job.precision, remark)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        if not devices:
            raise CoresUnavailable(
                f"There is no Elastic Inference accelerator here. {CLOSED}.",
                hint=INSTEAD[0].upper() + INSTEAD[1:] + ".",
                backend=self.name,
            )
        options, what = program.options, "Loading the program"
        plan, scratch = self.plan(program, devices[0].index)
        process: VendorProcess | None = None
        try:
            process = VendorProcess(self.sdk.interpreter())
            process.call("open", options.timeout_s, kind=self.sdk.kind, **plan)
            return VendorProgram(process, program.signature, plan, options.timeout_s, self.name, scratch)
        except BaseException as error:
            if process is not None:
                process.close()
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, VendorError | VendorDied):
                raise typed(error, what, self.name, loading=True) from error
            raise

    @abstractmethod
    def installed(self) -> bool:
        """Tell by looking at files alone whether the vendor's framework may be there."""

    def needs_accelerator(self) -> bool:
        """Whether programs run on an accelerator, as the options have it."""
        return True

    @abstractmethod
    def plan(self, program: Program, ordinal: int) -> tuple[dict[str, Any], Path | None]:
        """Return what opens a program, ``inputs`` and ``outputs`` with the vendor's names, and a folder to remove."""


class VendorProgram(Executable):
    """A program in its process."""

    def __init__(
        self,
        process: VendorProcess,
        signature: Signature,
        plan: Mapping[str, Any],
        timeout_s: float,
        engine: str,
        scratch: Path | None,
    ) -> None:
        self._process: VendorProcess | None = process
        self._timeout_s, self._engine, self._scratch = timeout_s, engine, scratch
        self._inputs = list(zip(signature.input_names, plan["inputs"], strict=True))
        self._outputs = [
            (port.name, theirs, numpy_dtype(port.type.dtype))
            for port, theirs in zip(signature.outputs, plan["outputs"], strict=True)
            if isinstance(port.type, TensorType)
        ]

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        if self._process is None:
            raise RuntimeError("the executable was closed")
        try:
            _, found = self._process.call(
                "run", self._timeout_s, {theirs: inputs[name] for name, theirs in self._inputs}
            )
        except (VendorError, VendorDied) as error:
            raise typed(error, "Running the program", self._engine, loading=False) from error
        if missing := [theirs for _, theirs, _ in self._outputs if theirs not in found]:
            raise ExecutionError(
                f"The program returned {', '.join(found) or 'nothing'}, and not {missing[0]!r}.", backend=self._engine
            )
        return {name: np.asarray(found[theirs], dtype) for name, theirs, dtype in self._outputs}

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _kept(source: Path, target: Path) -> Path:
    """Put a source among a program's files, as a link to the same bytes where the file system can."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return target
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise _uncopied(source, error) from error
    return target


def _uncopied(source: Path, error: OSError) -> AccelrtError:
    return CompileError(f"{source} cannot be copied: {error}")
