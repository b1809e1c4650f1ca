"""The engine `cpu/tensorflow`: TensorFlow itself, for SavedModels as they are.

It takes sources whole: models that tf2onnx cannot write as ONNX, and others by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

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

_CHILD = "accelrt_cpu.tensorflow_child"
_TRIAL_S = 600.0
_FORMAT = "saved_model"
MAX_THREADS = 256


@dataclass(frozen=True, slots=True)
class TensorFlowOptions:
    """Options of the engine.

    Attributes:
        threads: Threads that share one operator; 0 leaves TensorFlow's own number, all cores unless the program has
            set another. TensorFlow takes the number once a process: a second one is an error.
    """

    threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MAX_THREADS:
            raise OptionError(f"threads must be 0 to {MAX_THREADS}, not {self.threads}.")


class TensorFlowEngine(Engine):
    """TensorFlow on the CPU."""

    name: ClassVar[str] = "tensorflow"
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, executes_code=True)
    options: ClassVar[type] = TensorFlowOptions
    requires: ClassVar[str] = "pip install 'accelrt[tensorflow]'"

    def status(self) -> Status:
        return status_of("tensorflow", f"{_CHILD}:probe", self.requires)

    def fingerprint(self) -> Mapping[str, str]:
        return {"tensorflow": _version(), "cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        return Verdict.refuse("cpu/tensorflow takes whole models only")

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        if format not in self.formats:
            return Verdict.refuse(f"it takes {', '.join(self.formats)}, and the source is {format}")
        if precision != "fp32":
            return Verdict.refuse(f"it computes in fp32, not in {precision}")
        for port in (*signature.inputs, *signature.outputs):
            if not isinstance(port.type, TensorType):
                return Verdict.refuse(f"{port.name!r} is a {port.type}, and it takes tensors")
        return SUPPORTED

    def compile(self, job: CompileJob, out: Path) -> Program:
        verdict = self.supports_source(job.format, job.signature, job.precision)
        if not verdict.supported:
            raise CompileError(f"cpu/tensorflow refuses: {verdict.reason}.", backend=self.name)
        isolation.call(f"{_CHILD}:try_out", timeout_s=_TRIAL_S, model=str(job.model))
        files = {WHOLE_FILES[_FORMAT]: keep(job.model, out)}
        return Program(files, self.fingerprint(), job.signature, job.options, job.precision)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            from accelrt_cpu.tensorflow_runtime import Resident, open_saved_model, set_threads

            set_threads(program.options.threads)
            return Resident(open_saved_model(program.files[WHOLE_FILES[_FORMAT]]), program.signature)
        except MemoryError as error:
            raise OutOfDeviceMemory(f"tensorflow: {error}", backend=self.name) from error
        except CompileError as error:
            raise IncompatibleProgram(f"tensorflow: {error.message}", backend=self.name) from error
        except AccelrtError:
            raise
        except Exception as error:
            raise IncompatibleProgram(f"tensorflow: {first_line(error)}", backend=self.name) from error


def _version() -> str:
    """Return the version; the wheel has several names."""
    for name in ("tensorflow-cpu", "tensorflow", "tensorflow-intel"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    import tensorflow as tf

    return str(tf.__version__)
