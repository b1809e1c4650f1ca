"""What the two engines for PyTorch have in common: probe, check, compile in the child, keep what landed where."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from accelrt import isolation
from accelrt.backend import (
    SUPPORTED,
    WHOLE_FILES,
    Caps,
    CompileJob,
    Engine,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.errors import CompileError
from accelrt.graph.node import Node
from accelrt.graph.types import Signature
from accelrt_neuron import support
from accelrt_neuron.archive import keep
from accelrt_neuron.catalogue import Generation
from accelrt_neuron.flags import CastMode
from accelrt_neuron.lowered import lowerable
from accelrt_neuron.sdk import Sdk
from accelrt_neuron.torch_child import PROGRAM

FACTS = "neuron.json"
SPARE_S = 120.0
"""Seconds beyond the compiler's own limit until its process is killed: it gets to say which part took so long."""


class TorchEngine(Engine):
    """An engine that traces a PyTorch module with one of the vendor's packages."""

    formats: ClassVar[tuple[str, ...]] = ("onnx", "torch.export", "torchscript")
    # neuronperf, the vendor's own benchmark, keeps two workers on each program. Programs are TorchScript, in which
    # operators of any library may be called.
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, default_precision="bf16", executes_code=True)
    sdk: ClassVar[Sdk]

    def __init__(self, options: Any = None, facts: dict[str, Any] | None = None, root: Path = Path("/")) -> None:
        self._options = self.options() if options is None else options
        self._root = root
        self._facts = {} if facts is None else facts  # of the child's probe, shared by the engine's variants

    def with_options(self, options: Any) -> Engine:
        return self if options == self._options else type(self)(options, self._facts, self._root)

    def status(self) -> Status:
        return self.sdk.status(self.facts())

    def facts(self) -> Mapping[str, Any] | None:
        """Return what the child found out about the vendor's package, None if there is none; asked once."""
        if not self.sdk.installed():
            return None
        if not self._facts:
            self._facts.update(self.sdk.probe())
        return self._facts

    def fingerprint(self) -> Mapping[str, str]:
        versions = (self.facts() or {}).get("versions", {})
        return {**versions, **self.compiled_for()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        try:
            self.mode(precision)
        except CompileError as error:
            return Verdict.refuse(error.message.rstrip("."))
        if (refusal := self.listed(node, precision)) is not None:
            return Verdict.refuse(refusal)
        reason = lowerable(node)
        return SUPPORTED if reason is None else Verdict.refuse(reason)

    def listed(self, node: Node, precision: Precision) -> str | None:
        """Return why the compiler would refuse a node as far as that is known before it is asked."""
        return support.unusual(node)

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        """Tell whether a model can be compiled as a whole: its form, its types and sizes, the precision."""
        if format == "onnx" or format not in self.formats:
            return Verdict.refuse(f"it takes {', '.join(self.formats)}, and the source is {format}")
        try:
            self.mode(precision)
        except CompileError as error:
            return Verdict.refuse(error.message.rstrip("."))
        reason = support.unusual_signature(signature)
        return SUPPORTED if reason is None else Verdict.refuse(reason)

    def compile(self, job: CompileJob, out: Path) -> Program:
        program = self.compile_source(job.model, job.format, job.signature, job.precision, job.options, out)
        if job.format == "onnx":
            return program
        name = WHOLE_FILES[job.format]
        files = {**program.files, name: keep(job.model, out / name)}
        return replace(program, files=files, remark=remark_of(coverage_of(program)))

    def compile_source(
        self, source: Path, format: str, signature: Signature, precision: Precision, options: Any, out: Path
    ) -> Program:
        """Compile a segment of ONNX, or a PyTorch model as a whole, into the empty folder ``out``.

        A segment lands on the device as a whole or not at all. A whole model is cut by the vendor's own partitioner if
        the options say so; what it left on the CPU is in the program's ``neuron.json``.

        Raises:
            CompileError: The compiler refused or failed, with the end of its log; or too little landed on the device.
        """
        mode = self.mode(precision)
        whole = format != "onnx"
        arguments = self.compiler_args(mode)
        found = isolation.call(
            f"accelrt_neuron.torch_child:{self.child_function()}",
            timeout_s=options.timeout_s + SPARE_S,
            environment=self.environment(),
            source=str(source),
            format=format,
            signature=signature.to_json(),
            plan=self.plan(arguments, options, whole=whole),
            out=str(out),
        )
        check_coverage(found, options.min_coverage if whole else 1.0, self.name)
        facts = {
            "engine": self.name,
            "compiler_args": arguments,
            "auto_cast": mode.what,
            "auto_cast_type": None if mode.what == "none" else mode.type,
            "coverage": found,
        }
        (out / FACTS).write_text(json.dumps(facts))
        files = {PROGRAM: out / PROGRAM, FACTS: out / FACTS}
        return Program(files, self.fingerprint(), signature, options, precision)

    def environment(self) -> Mapping[str, str]:
        """Return variables that the compiling process must have before it imports the vendor's package."""
        return {}

    @abstractmethod
    def generation(self) -> Generation:
        """Return the generation of cores that is compiled for."""

    @abstractmethod
    def mode(self, precision: Precision) -> CastMode:
        """Return what is cast; raises `CompileError` where the precision is not to be had."""

    @abstractmethod
    def compiler_args(self, mode: CastMode) -> Sequence[str]:
        """Return the compiler's arguments."""

    @abstractmethod
    def compiled_for(self) -> Mapping[str, str]:
        """Return what a program depends on besides versions."""

    @abstractmethod
    def child_function(self) -> str:
        """Return the function of `torch_child` that compiles."""

    @abstractmethod
    def plan(self, arguments: Sequence[str], options: Any, *, whole: bool) -> dict[str, Any]:
        """Return the plan that the child's function takes."""


def check_coverage(found: Mapping[str, Any], least: float, engine: str) -> None:
    """Hold what landed on the device against what was asked for.

    Raises:
        CompileError: It is less, or nothing.
    """
    total, on_device = int(found["total"]), int(found["on_device"])
    share = on_device / total if total else float(bool(found["programs"]))
    if found["programs"] and share >= least:
        return
    left = ", ".join(f"{kind} ({count})" for kind, count in sorted(found["on_cpu"].items())) or "none"
    raise CompileError(
        f"{on_device} of {total} operators landed on the device, {share:.0%} where at least {least:.0%} were asked "
        f"for; on the CPU: {left}.",
        hint="The option min_coverage says how many must; of a segment, all must.",
        backend=engine,
    )


def remark_of(coverage: Mapping[str, Any]) -> str:
    """Return what the vendor's partitioner did with a whole model, in words."""
    programs = int(coverage["programs"])
    text = (
        f"{coverage['on_device']} of {coverage['total']} operators on the device, "
        f"in {programs} program{'' if programs == 1 else 's'}"
    )
    left = ", ".join(f"{kind} ({count})" for kind, count in sorted(coverage["on_cpu"].items()))
    return f"{text}; on the CPU: {left}" if left else text


def coverage_of(program: Program) -> Mapping[str, Any]:
    """Return what of a program landed on the device: ``total``, ``on_device``, ``programs``, ``on_cpu`` by kind."""
    found: Mapping[str, Any] = json.loads(program.files[FACTS].read_text())["coverage"]
    return found
