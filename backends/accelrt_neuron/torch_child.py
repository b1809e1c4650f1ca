"""What drives the vendor's PyTorch compilers, in a child process: trace, see what landed on the device, save.

Called by name through `accelrt.isolation`, with plain data. The functions named ``trace_*`` take a module and example
inputs, so that whole PyTorch models and segments of ONNX go the same way.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, CompileError
from accelrt.graph.types import Signature
from accelrt_neuron.lowered import module_from_onnx
from accelrt_neuron.sdk import accepts
from accelrt_neuron.torch_values import examples

PROGRAM = "neuron.pt"
"""Not the name of a source that is TorchScript: both are among the files of a program."""
_LOG_CHARACTERS = 4000
_NO_WORK = ("prim::", "aten::Int", "aten::size", "aten::ScalarImplicit")
"""Kinds of a graph's nodes that compute nothing of weight."""


def build_neuronx(
    source: str, format: str, signature: Mapping[str, Any], plan: Mapping[str, Any], out: str
) -> dict[str, Any]:
    """Compile a source for Inf2, Trn1 or Trn2 into the folder ``out`` and return the coverage.

    Args:
        source: The file.
        format: ``onnx``, ``torch.export`` or ``torchscript``.
        signature: Its inputs and outputs as JSON.
        plan: ``compiler_args``, ``offline`` (no device here), ``dynamic_batch``, ``inline_weights``, and for whole
            sources ``partitioner``: the arguments of PartitionerConfig, None where all must land on the device.
        out: An empty folder.
    """
    import torch

    torch_neuronx = importlib.import_module("torch_neuronx")
    module, inputs = _load(source, format, signature, torch)
    with tempfile.TemporaryDirectory(prefix="accelrt-neuronx-") as workdir, Logged(workdir, "torch_neuronx.trace"):
        script = trace_neuronx(torch_neuronx, module, inputs, plan, workdir)
        if plan["dynamic_batch"]:
            script = torch_neuronx.dynamic_batch(script)
        # Programs are placed when they are loaded; without this they would go to some core first.
        torch_neuronx.lazy_load(script)
        found = coverage(module, script, inputs, torch)
        torch.jit.save(script, str(Path(out) / PROGRAM))
    return found


def trace_neuronx(sdk: Any, module: Any, inputs: tuple[Any, ...], plan: Mapping[str, Any], workdir: str) -> Any:
    """Call ``torch_neuronx.trace``; arguments of later releases are passed only where they change anything."""
    arguments: dict[str, Any] = {"compiler_workdir": workdir, "compiler_args": list(plan["compiler_args"])}
    if plan["partitioner"] is not None:
        config = {name: value for name, value in plan["partitioner"].items() if value is not None}
        arguments["partitioner_config"] = sdk.PartitionerConfig(trace_kwargs=dict(arguments), **config)
    if not plan["inline_weights"]:
        arguments["inline_weights_to_neff"] = False
    if plan["offline"] and accepts(sdk.trace, "cpu_backend"):
        arguments["cpu_backend"] = True
    return sdk.trace(module, inputs, **arguments)


def build_neuron(
    source: str, format: str, signature: Mapping[str, Any], plan: Mapping[str, Any], out: str
) -> dict[str, Any]:
    """Compile a source for Inf1 into the folder ``out`` and return the coverage; arguments as of `build_neuronx`.

    ``plan`` holds ``compiler_args``, ``compiler_timeout`` (seconds), ``dynamic_batch``, ``separate_weights``,
    ``minimum_segment_size`` and ``fallback``.
    """
    import torch

    torch_neuron = importlib.import_module("torch_neuron")
    module, inputs = _load(source, format, signature, torch)
    with tempfile.TemporaryDirectory(prefix="accelrt-neuron-") as workdir, Logged(workdir, "torch.neuron.trace"):
        script = trace_neuron(torch_neuron, module, inputs, plan, workdir)
        found = coverage(module, script, inputs, torch)
        torch.jit.save(script, str(Path(out) / PROGRAM))
    return found


def trace_neuron(sdk: Any, module: Any, inputs: tuple[Any, ...], plan: Mapping[str, Any], workdir: str) -> Any:
    """Call ``torch.neuron.trace``: the first two by position, since code and docs name them differently."""
    arguments: dict[str, Any] = {
        "compiler_args": list(plan["compiler_args"]),
        "compiler_timeout": plan["compiler_timeout"],
        "compiler_workdir": workdir,
        "fallback": plan["fallback"],
    }
    if plan["minimum_segment_size"] is not None:
        arguments["minimum_segment_size"] = plan["minimum_segment_size"]
    if plan["dynamic_batch"]:
        arguments["dynamic_batch_size"] = True
    if plan["separate_weights"]:
        arguments["separate_weights"] = True
    return sdk.trace(module, inputs, **arguments)


def coverage(module: Any, script: Any, inputs: tuple[Any, ...], torch: Any) -> dict[str, Any]:
    """Return what of a traced module landed on the device.

    ``total`` counts the operators of the plain trace, ``on_cpu`` those that the compiled module still has by kind, and
    ``programs`` the calls of the device. torch-neuron leaves a part on the CPU without an error when it cannot compile
    it, so the graph is looked at, not the log.
    """
    plain = torch.jit.trace(module, inputs, check_trace=False, strict=False)
    total = sum(_operators(plain).values())
    left = _operators(script)
    programs = sum(count for kind, count in left.items() if kind.startswith("neuron::"))
    on_cpu = {kind: count for kind, count in sorted(left.items()) if not kind.startswith("neuron::")}
    if not programs:
        return {"total": total, "programs": 0, "on_device": 0, "on_cpu": on_cpu}
    return {"total": total, "programs": programs, "on_device": max(0, total - sum(on_cpu.values())), "on_cpu": on_cpu}


def _operators(script: Any) -> Counter[str]:
    kinds: Counter[str] = Counter()
    pending = [script.inlined_graph]
    while pending:
        block = pending.pop()
        for node in block.nodes():
            kind = node.kind()
            pending.extend(node.blocks())
            if not kind.startswith(_NO_WORK):
                kinds[kind] += 1
    return kinds


def _load(source: str, format: str, signature: Mapping[str, Any], torch: Any) -> tuple[Any, tuple[Any, ...]]:
    match format:
        case "onnx":
            module = module_from_onnx(Path(source))
        case "torch.export":
            module = torch.export.load(source).module()
        case "torchscript":
            module = torch.jit.load(source, map_location="cpu")
        case _:
            raise CompileError(f"The Neuron engines for PyTorch take no {format!r}.")
    if format != "torch.export":
        module.eval()  # an exported program is in the mode it was exported in, and says so
    return module, examples(Signature.from_json(signature), torch)


class Logged:
    """Turns what a compiler raises into a `CompileError` with the end of the compiler's log."""

    def __init__(self, workdir: str, what: str) -> None:
        self._workdir, self._what = workdir, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, AccelrtError) or not isinstance(error, Exception):
            return
        if isinstance(error, subprocess.TimeoutExpired):
            text = f"{self._what} passed its limit of {error.timeout:g} s"
        else:
            text = f"{self._what} raised {type(error).__name__}: {' '.join(str(error).split())}"
        raise CompileError(f"{text}.{compiler_log(Path(self._workdir))}") from error


def compiler_log(folder: Path) -> str:
    """Return the end of the newest log that a compiler left in its work folder, empty if it left none."""
    logs = [path for path in folder.rglob("*") if path.is_file() and _is_log(path)]
    if not logs:
        return ""
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    text = newest.read_text(errors="replace").strip()
    return f" The end of {os.path.relpath(newest, folder)}: {text[-_LOG_CHARACTERS:]}" if text else ""


def _is_log(path: Path) -> bool:
    return path.suffix == ".log" or path.name.startswith(("log-neuron", "graph_def.neuron-cc"))
