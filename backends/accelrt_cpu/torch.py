"""The engine `cpu/torch`: PyTorch itself, for exported programs and TorchScript as they are.

It takes sources whole: models that no exporter writes as ONNX, and others by name. An exported program is compiled by
AOTInductor, in a child process, where a C++ compiler is at hand and the compiled form is safe; else torch runs it
operator by operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from accelrt import isolation
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
from accelrt.errors import AccelrtError, CompileError, IncompatibleProgram, OptionError, OutOfDeviceMemory
from accelrt.graph.node import Node
from accelrt.graph.types import Signature, TensorType
from accelrt.programs import first_line, instruction_set, keep
from accelrt_cpu.whole_files import status_of

_CHILD = "accelrt_cpu.torch_child"
_COMPILE_S = 1800.0
_PACKAGE, _SIZES = "compiled.pt2", "compiled.json"
_EXPORT, _SCRIPT = "torch.export", "torchscript"
MAX_THREADS = 256

# What autocast computes in bfloat16 on a CPU: "CPU Ops that can autocast to bfloat16" in PyTorch's documentation of
# torch.amp, by the names of the operators.
_ROUNDED = frozenset(
    "conv1d conv2d conv3d bmm mm linalg_vecdot baddbmm addmm addbmm linear matmul _convolution conv_tbc "  # noqa: SIM905
    "mkldnn_rnn_layer conv_transpose1d conv_transpose2d conv_transpose3d prelu scaled_dot_product_attention "
    "_native_multi_head_attention".split()
)


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """Options of the engine.

    Attributes:
        threads: Threads that share one operator; 0 leaves torch's own number, all cores unless the program has set
            another. torch has one number for the process: it is set for each call, and set back afterwards.
        inductor: Compile by AOTInductor: True or it is an error, False not at all, None where a C++ compiler is at
            hand and the compiled form is safe. Exported programs in fp32 only.
    """

    threads: int = 0
    inductor: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MAX_THREADS:
            raise OptionError(f"threads must be 0 to {MAX_THREADS}, not {self.threads}.")


class TorchEngine(Engine):
    """PyTorch on the CPU."""

    name: ClassVar[str] = "torch"
    formats: ClassVar[tuple[str, ...]] = (_EXPORT, _SCRIPT)
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, executes_code=True)
    options: ClassVar[type] = TorchOptions
    requires: ClassVar[str] = "pip install 'accelrt[torch]'"

    def status(self) -> Status:
        return status_of("torch", f"{_CHILD}:probe", self.requires)

    def fingerprint(self) -> Mapping[str, str]:
        return {"torch": version("torch"), "cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return Verdict.refuse("cpu/torch takes whole models only")

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        if format not in self.formats:
            return Verdict.refuse(f"it takes {', '.join(self.formats)}, and the source is {format}")
        if precision not in ("fp32", "bf16"):
            return Verdict.refuse(f"it computes in fp32 or bf16, not in {precision}")
        for port in (*signature.inputs, *signature.outputs):
            if not isinstance(port.type, TensorType) or port.type.dtype == "string":
                return Verdict.refuse(f"{port.name!r} is a {port.type}, and it takes tensors of numbers")
        return SUPPORTED

    def compile(self, job: CompileJob, out: Path) -> Program:
        verdict = self.supports_source(job.format, job.signature, job.precision)
        if not verdict.supported:
            raise CompileError(f"cpu/torch refuses: {verdict.reason}.", backend=self.name)
        if job.precision == "bf16":
            _check_rounded(job)
        files = {WHOLE_FILES[job.format]: keep(job.model, out)}
        remark = "compiled by AOTInductor"
        if (reason := self._package(job, out)) is None:
            files |= {name: out / name for name in (_PACKAGE, _SIZES)}
        elif job.options.inductor:
            raise CompileError(f"cpu/torch cannot compile by AOTInductor: {reason}.", backend=self.name)
        else:
            remark = f"operator by operator: {reason}"
        return Program(files, self.fingerprint(), job.signature, job.options, job.precision, remark)

    def _package(self, job: CompileJob, out: Path) -> str | None:
        """Compile a program to machine code; return why not, None if it was done."""
        if job.options.inductor is False:
            return "inductor=False"
        if job.format != _EXPORT or job.precision != "fp32":
            return f"AOTInductor takes exported programs in fp32, and this is {job.format} in {job.precision}"
        try:
            facts = isolation.call(
                f"{_CHILD}:package", timeout_s=_COMPILE_S, model=str(job.model), target=str(out / _PACKAGE)
            )
        except AccelrtError as error:
            (out / _PACKAGE).unlink(missing_ok=True)
            return error.message.rstrip(".")
        if "refused" in facts:
            return str(facts["refused"])
        (out / _SIZES).write_text(json.dumps(facts))
        return None

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        from accelrt_cpu.torch_runtime import open_package, open_program, open_script

        threads, bf16 = program.options.threads, program.precision == "bf16"
        try:
            if _PACKAGE in program.files:
                sizes = json.loads(program.files[_SIZES].read_bytes())
                return open_package(program.files[_PACKAGE], program.signature, threads, sizes)
            if (path := program.files.get(WHOLE_FILES[_EXPORT])) is not None:
                return open_program(path, program.signature, threads, bf16)
            return open_script(program.files[WHOLE_FILES[_SCRIPT]], program.signature, threads, bf16)
        except MemoryError as error:
            raise OutOfDeviceMemory(f"torch: {error}", backend=self.name) from error
        except Exception as error:
            raise IncompatibleProgram(f"torch: {first_line(error)}", backend=self.name) from error


def _check_rounded(job: CompileJob) -> None:
    """Refuse bf16 where it would be a word only.

    Raises:
        CompileError: The model has no operator that autocast computes in bfloat16.
    """
    import torch

    try:
        if job.format == _EXPORT:
            graphs = [module.graph for module in torch.export.load(job.model).graph_module.modules()]
            found = {str(getattr(node.target, "__name__", "")) for graph in graphs for node in graph.nodes}
            found = {name.partition(".")[0] for name in found}
        else:
            found = {name.partition("::")[2] for name in _kinds(torch.jit.load(str(job.model)).inlined_graph)}
    except Exception as error:
        raise CompileError(f"torch: {first_line(error)}", backend="torch") from error
    if not found & _ROUNDED:
        raise CompileError(
            "cpu/torch computes products and convolutions in bf16, and the model has none.",
            hint="Leave the precision out.",
            backend="torch",
        )


def _kinds(graph: Any) -> set[str]:
    kinds = set()
    for node in graph.nodes():
        kinds.add(node.kind())
        for block in node.blocks():
            kinds |= _kinds(block)
    return kinds
