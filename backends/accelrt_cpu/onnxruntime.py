"""The engine `cpu/onnxruntime`: what runs everything it can, and is the oracle for all other engines."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelrt.backend import (
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
from accelrt.errors import CompileError, IncompatibleProgram, OptionError, OutOfDeviceMemory
from accelrt.graph.node import INLINE_BYTES, WEIGHTS_FILE, Node
from accelrt.graph.ort_values import unreachable, widen_borders
from accelrt.programs import instruction_set
from accelrt_cpu.onnxruntime_values import executable

if TYPE_CHECKING:
    from accelrt_cpu.onnxruntime_support import Knowledge

_PROVIDERS = ["CPUExecutionProvider"]
_MODEL = "model.onnx"
_ERRORS_ONLY = 3
MAX_THREADS = 256


@dataclass(frozen=True, slots=True)
class OnnxRuntimeOptions:
    """Options of the engine.

    Attributes:
        threads: Threads that share one operator; 0 takes all cores.
        inter_threads: Threads that run independent operators side by side; 1 runs them in sequence.
        spinning: Workers wait for the next operator of a run by spinning: faster, at the price of idle cores. Between
            runs they never spin, because the segments of a model, and other models, want the cores then.
        io_binding: Hand values over by IO binding. The plain way copies nothing either, and on a CPU it is quicker by
            some 20 microseconds a call; the option is there for comparison.
    """

    threads: int = 0
    inter_threads: int = 1
    spinning: bool = True
    io_binding: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MAX_THREADS or not 1 <= self.inter_threads <= MAX_THREADS:
            raise OptionError(
                f"threads must be 0 to {MAX_THREADS} and inter_threads 1 to {MAX_THREADS}, "
                f"not {self.threads} and {self.inter_threads}."
            )


class OnnxRuntimeEngine(Engine):
    """onnxruntime's CPU provider."""

    name: ClassVar[str] = "onnxruntime"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2)
    options: ClassVar[type] = OnnxRuntimeOptions
    requires: ClassVar[str] = "pip install onnxruntime"

    def status(self) -> Status:
        try:
            return Status(True, version=str(self._ort.__version__))
        except Exception as error:  # noqa: BLE001 - a broken wheel may raise anything; it is a status, not a crash
            return Status(False, reason=f"onnxruntime cannot be imported: {error}", remedy=self.requires)

    def fingerprint(self) -> Mapping[str, str]:
        return {"onnxruntime": str(self._ort.__version__), "cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        if precision in ("bf16", "fp16"):
            return Verdict.refuse(self._knowledge.lacking(node, "bfloat16" if precision == "bf16" else "float16"))
        return self._knowledge.verdict(node)  # an int8 model says itself where its integers are

    def compile(self, job: CompileJob, out: Path) -> Program:
        import onnx

        if job.precision in ("bf16", "fp16"):
            raise CompileError(f"onnxruntime's CPU kernels do not compute in {job.precision}.", backend=self.name)
        proto = onnx.load(job.model, load_external_data=False)
        if problem := self._knowledge.lower(proto):
            raise CompileError(f"onnxruntime cannot take the segment: {problem}.", backend=self.name)
        if problem := unreachable(job.signature):
            raise CompileError(
                f"onnxruntime's Python binding cannot hand over all values: {problem}.", backend=self.name
            )
        widen_borders(proto, job.signature)
        options = self._session_options(job.options)
        options.optimized_model_filepath = str(out / _MODEL)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS_FILE)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE_BYTES)
        )
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(job.model.parent))
        try:
            self._ort.InferenceSession(proto.SerializeToString(), options, providers=_PROVIDERS)
        except Exception as error:
            raise CompileError(f"onnxruntime: {_first_line(error)}", backend=self.name) from error
        return Program({_MODEL: out / _MODEL}, self.fingerprint(), job.signature, job.options, job.precision)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        options = self._session_options(program.options)
        # The program holds the optimised graph; optimising again would cost ten times the load.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = self._ort.InferenceSession(str(program.files[_MODEL]), options, providers=_PROVIDERS)
        except MemoryError as error:
            raise OutOfDeviceMemory(f"onnxruntime: {error}", backend=self.name) from error
        except Exception as error:
            raise IncompatibleProgram(f"onnxruntime: {_first_line(error)}", backend=self.name) from error
        made = executable(self._ort, session, program.signature, io_binding=program.options.io_binding)
        # Threads of two calls that wait for each other on the same cores make both slower: as many calls as have room.
        made.parallelism = max(1, _cores() // (program.options.threads or _cores()))
        return made

    @cached_property
    def _ort(self) -> Any:
        ort = importlib.import_module("onnxruntime")
        ort.disable_telemetry_events()  # the wheel otherwise keeps a database of events in the user's cache
        return ort

    @cached_property
    def _knowledge(self) -> Knowledge:
        from accelrt_cpu.onnxruntime_support import Knowledge

        return Knowledge(self._ort)

    def _session_options(self, chosen: OnnxRuntimeOptions) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = chosen.threads
        if chosen.inter_threads > 1:
            options.execution_mode = self._ort.ExecutionMode.ORT_PARALLEL
            options.inter_op_num_threads = chosen.inter_threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not chosen.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(StopIteration):
        return next(line.strip() for line in str(error).splitlines() if line.strip())
    return type(error).__name__
