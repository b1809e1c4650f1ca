"""The engine `cuda/torch`: PyTorch on an NVIDIA GPU, its launches recorded as CUDA graphs.

Segments of ONNX are lowered to torch, folded and rewritten, and compiled by AOTInductor in a child process; where that
cannot be, torch's own kernels are recorded as they are. Exported programs and TorchScript are taken whole.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

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
from accelrt.errors import (
    AccelrtError,
    CompileError,
    DeviceError,
    IncompatibleProgram,
    OptionError,
    OutOfDeviceMemory,
)
from accelrt.graph.node import WEIGHTS_FILE, Node
from accelrt.graph.types import Signature, TensorType
from accelrt.isolation import Child
from accelrt.programs import first_line, instruction_set, keep
from accelrt_cuda.torch_settings import (
    FACTS,
    PACKAGE,
    SEGMENT,
    TorchCudaOptions,
    inductor_cache,
    inductor_settings,
    lays_channels_last,
)

logger = logging.getLogger("accelrt")

_CHILD = "accelrt_cuda.torch_child"
_PROBE_S, _COMPILE_S = 300.0, 3600.0
_EXPORT, _SCRIPT = "torch.export", "torchscript"
_TYPES = frozenset({"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"})
"""What torch's kernels for CUDA compute with throughout."""
_PRECISIONS = ("fp32", "bf16", "fp16")
_NO_INT8 = (
    "it would compute what QuantizeLinear and DequantizeLinear say in floats, slower than without them; "
    "cuda/tensorrt and cuda/onnxruntime have integer kernels"
)


class TorchCudaEngine(Engine):
    """PyTorch on a GPU."""

    name: ClassVar[str] = "torch"
    formats: ClassVar[tuple[str, ...]] = ("onnx", _EXPORT, _SCRIPT)
    # A package of AOTInductor's is a shared library.
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, executes_code=True, device_tensors=True)
    options: ClassVar[type] = TorchCudaOptions
    requires: ClassVar[str] = "pip install torch, in a build for CUDA"
    device_type: ClassVar[str] = "cuda"
    """What torch calls the devices; tests without a GPU compute on ``cpu``."""

    def status(self) -> Status:
        try:
            installed = version("torch") if find_spec("torch") is not None else None
        except (ImportError, ValueError, PackageNotFoundError):
            installed = None
        if installed is None:
            return Status(False, reason="torch is not installed", remedy=self.requires)
        if self.device_type == "cuda" and installed.endswith("+cpu"):
            return Status(False, reason=f"torch {installed} is built without CUDA", remedy=self.requires)
        found = _probe(self.device_type)
        if (problem := found.get("problem")) is not None:
            return Status(False, reason=str(problem), remedy=str(found.get("remedy", self.requires)))
        return Status(True, version=f"{found['torch']} (CUDA {found['cuda']}, capability {found['capability']})")

    def fingerprint(self) -> Mapping[str, str]:
        found = _probe(self.device_type)
        return {name: str(found.get(name)) for name in ("torch", "cuda", "capability")} | {"cpu": instruction_set()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        from accelrt.graph.lowering import lowerable
        from accelrt.graph.lowering.table import CONTROL, entry_for

        if precision not in _PRECISIONS:
            return Verdict.refuse(_NO_INT8)
        for name, type_ in (
            *zip(node.inputs, node.input_types, strict=True),
            *zip(node.outputs, node.output_types, strict=True),
        ):
            if name and not isinstance(type_, TensorType):
                return Verdict.refuse(f"{name!r} is {type_ or 'of unknown type'}, and it takes tensors")
            if name and isinstance(type_, TensorType) and type_.dtype not in _TYPES:
                return Verdict.refuse(f"{name!r} is {type_.dtype}, and torch has few kernels for that on a GPU")
        if not node.domain and node.op_type in CONTROL:
            return Verdict.refuse(f"{node.op_type} chooses by a value, for which the host would wait at each turn")
        if (reason := lowerable(node)) is not None:
            return Verdict.refuse(reason)
        entry = entry_for(node)
        if entry is not None and entry.depends:
            return Verdict.refuse(f"{entry.depends}, for which the host would wait")
        if precision != "fp32" and (problem := _half_problem(node, precision)) is not None:
            return Verdict.refuse(problem)
        return SUPPORTED

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        if format == "onnx" or format not in self.formats:
            return Verdict.refuse(f"it takes {', '.join(self.formats[1:])} whole, and the source is {format}")
        if precision not in _PRECISIONS:
            return Verdict.refuse(f"it computes whole models in {', '.join(_PRECISIONS)}, not in {precision}")
        for port in (*signature.inputs, *signature.outputs):
            if not isinstance(port.type, TensorType) or port.type.dtype not in _TYPES:
                return Verdict.refuse(f"{port.name!r} is a {port.type}, and it takes tensors of numbers")
        return SUPPORTED

    def compile(self, job: CompileJob, out: Path) -> Program:
        whole = job.format != "onnx"
        if whole:
            verdict = self.supports_source(job.format, job.signature, job.precision)
            if not verdict.supported:
                raise CompileError(f"cuda/torch refuses: {verdict.reason}.", backend=self.name)
        files = {WHOLE_FILES[job.format]: keep(job.model, out)} if whole else {}
        mode: str = job.options.mode
        remark = _REMARKS.get(mode, "")
        if mode in ("auto", "aot"):
            if (reason := self._package(job, out)) is None:
                files |= {name: out / name for name in (PACKAGE, FACTS)}
                remark = "compiled by AOTInductor, launches recorded as CUDA graphs"
            elif mode == "aot":
                raise CompileError(
                    f"cuda/torch cannot compile ahead of time: {reason}.",
                    hint="mode='auto' takes other ways where it cannot.",
                    backend=self.name,
                )
            else:
                run = "compile" if job.format != _SCRIPT and _is_static(job.signature) else "graph"
                (out / FACTS).write_text(json.dumps({"run": run}))
                files[FACTS] = out / FACTS
                remark = f"{_REMARKS[run]}; not compiled ahead of time: {reason}"
                logger.warning("cuda/torch does not compile ahead of time: %s", reason)
        elif mode == "compile" and job.format == _SCRIPT:
            raise CompileError("inductor takes no TorchScript.", hint="mode='graph', or 'auto'.", backend=self.name)
        if not whole and PACKAGE not in files:
            files[SEGMENT] = self._segment(job, out)
        return Program(files, self.fingerprint(), job.signature, job.options, job.precision, remark)

    def _package(self, job: CompileJob, out: Path) -> str | None:
        """Compile by AOTInductor; return why not, None if it was done."""
        if job.format == _SCRIPT:
            return "AOTInductor takes no TorchScript"
        if job.format == _EXPORT and job.precision != "fp32":
            return f"a whole model is computed in {job.precision} under autocast, which its exported form cannot say"
        channels_last = lays_channels_last(job.precision, job.options)
        try:
            # In a process of its own: another's memory on the device would be held for as long as it lives.
            with Child(inductor_cache()) as child:
                facts = child.call(
                    f"{_CHILD}:package",
                    timeout_s=_COMPILE_S,
                    model=str(job.model),
                    format=job.format,
                    signature=job.signature.to_json(),
                    precision=job.precision,
                    settings=inductor_settings(job.options, channels_last=channels_last),
                    device=self.device_type,
                    channels_last=channels_last,
                    allow_tf32=job.options.allow_tf32,
                    target=str(out / PACKAGE),
                )
        except AccelrtError as error:
            (out / PACKAGE).unlink(missing_ok=True)
            return error.message.rstrip(".")
        if "refused" in facts:
            return str(facts["refused"])
        (out / FACTS).write_text(json.dumps(facts))
        return None

    def _segment(self, job: CompileJob, out: Path) -> Path:
        """Keep a segment as it came, once it has been found that it can be lowered."""
        from accelrt.graph.load import load_graph
        from accelrt.graph.lowering import lower
        from accelrt.graph.weights import WeightFile

        graph = load_graph(job.model)
        depends = lower(graph).depends
        if depends and job.options.mode == "graph":
            raise CompileError(
                f"The segment cannot be recorded, for what it does depends on values: {'; '.join(depends)}.",
                hint="mode='eager', or 'auto'.",
                backend=self.name,
            )
        weights = WeightFile(out / WEIGHTS_FILE)
        graph.write(out / SEGMENT, weights)
        weights.close()
        return out / SEGMENT

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        from accelrt_cuda import torch_runtime
        from accelrt_cuda.torch_place import HostPlace, Place, place_of

        place: Place = HostPlace() if self.device_type == "cpu" else place_of(devices[0])
        options, signature, precision = program.options, program.signature, program.precision
        mode = "graph" if options.mode in ("auto", "aot") else options.mode
        try:
            if options.mode == "auto" and FACTS in program.files and PACKAGE not in program.files:
                mode = torch_runtime.read_way(program.files[FACTS])
            if mode == "compile":
                os.environ |= inductor_cache()
            if PACKAGE in program.files:
                facts = torch_runtime.read_facts(program.files[FACTS])
                self._check_capability(facts, place)
                return torch_runtime.open_package(program.files[PACKAGE], facts, signature, options, place)
            for name, opened in (
                (SEGMENT, torch_runtime.open_segment),
                (WHOLE_FILES[_EXPORT], torch_runtime.open_program),
                (WHOLE_FILES[_SCRIPT], torch_runtime.open_script),
            ):
                if name in program.files:
                    return opened(program.files[name], signature, precision, options, mode, place)
        except (DeviceError, IncompatibleProgram, OptionError):
            raise
        except MemoryError as error:
            raise OutOfDeviceMemory(f"torch: {error}", backend=self.name) from error
        except Exception as error:
            found = place.translated(error, sum(path.stat().st_size for path in program.files.values()))
            if isinstance(found, OutOfDeviceMemory):
                # What was loaded so far hangs on the frames that the error came through; others may want the memory.
                error.__traceback__ = None
                gc.collect()
                place.trim()
            if found is not error:
                raise found from error
            raise IncompatibleProgram(f"torch: {first_line(error)}", backend=self.name) from error
        raise IncompatibleProgram(
            f"The program holds {', '.join(program.files) or 'nothing'}, and nothing that cuda/torch wrote.",
            backend=self.name,
        )

    def _check_capability(self, facts: Mapping[str, Any], place: Any) -> None:
        if self.device_type == "cpu":
            return
        import torch

        found = ".".join(map(str, torch.cuda.get_device_capability(place.device)))
        if facts.get("capability") != found:
            raise IncompatibleProgram(
                f"The program was compiled for capability {facts.get('capability')}, and {place.device} has {found}.",
                backend=self.name,
            )


_REMARKS = {
    "eager": "operator by operator, mode='eager'",
    "graph": "torch's own kernels, launches recorded as CUDA graphs",
    "compile": "compiled by inductor when it is loaded, launches recorded as CUDA graphs",
}


def _is_static(signature: Signature) -> bool:
    shapes = [port.type.shape if isinstance(port.type, TensorType) else None for port in signature.inputs]
    return all(shape is not None and all(isinstance(size, int) for size in shape) for shape in shapes)


def _half_problem(node: Node, precision: Precision) -> str | None:
    from accelrt_cuda.torch_half import half_problem
    from accelrt_cuda.torch_prepare import HALVES

    return half_problem(node.opset, HALVES[precision]) if not node.domain else None


@cache
def _probe(device: str) -> Mapping[str, Any]:
    """Return what a child process found; asked once a process. It is not kept: it holds memory of the device."""
    try:
        with Child() as child:
            found: Mapping[str, Any] = child.call(f"{_CHILD}:probe", timeout_s=_PROBE_S, device=device)
    except (AccelrtError, OSError) as error:
        return {"problem": f"torch does not work here: {error}"}
    return found
