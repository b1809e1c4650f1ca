"""The runtime and the compilers under the stand-ins for torch-neuron and torch-neuronx.

A compiled program is TorchScript whose graph calls ``neuron::forward_v2_1`` with the program's bytes, as the vendor's
is: loading one without this operator registered fails, and what stayed on the CPU is in the graph for all to see.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_HEADER = 4096

CALLS: list[tuple[str, dict[str, Any]]] = []
"""What was asked of the runtime, for tests to look at."""


def cores() -> int:
    return int(os.environ.get("STAND_IN_CORES", "4"))


def unsupported() -> set[str]:
    return set(filter(None, os.environ.get("STAND_IN_UNSUPPORTED", "").split(",")))


# Programs


def pack(header: dict[str, Any], script: bytes) -> torch.Tensor:
    text = json.dumps(header).encode().ljust(_HEADER)
    return torch.frombuffer(bytearray(text + script), dtype=torch.uint8).clone()


def header_of(neff: torch.Tensor) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(neff[:_HEADER].tolist()))
    return found


def change_header(script: Any, **facts: Any) -> Any:
    """Change what is written at the head of every program in a traced module, in place."""
    for module in script.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if "neff" in buffers:
            neff = buffers["neff"]
            text = json.dumps({**header_of(neff), **facts}).encode().ljust(_HEADER)
            neff[:_HEADER] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return script


class Compiled(torch.nn.Module):
    def __init__(self, neff: torch.Tensor, single: bool) -> None:
        super().__init__()
        self.register_buffer("neff", neff)
        self.single = single

    def forward(self, *inputs: torch.Tensor) -> Any:
        outputs = torch.ops.neuron.forward_v2_1(list(inputs), self.neff)
        return outputs[0] if self.single else tuple(outputs)


def compile_module(module: Any, inputs: tuple[torch.Tensor, ...], workdir: str | None, **facts: Any) -> Any:
    """Compile one module as a whole."""
    _misbehave(workdir)
    plain = torch.jit.trace(module, inputs, check_trace=False, strict=False)
    refused = sorted({node.kind() for node in plain.inlined_graph.nodes()} & unsupported())
    write_log(workdir, f"[NCC_EVRF001] not supported: {', '.join(refused)}" if refused else "Compiler status PASS")
    if refused:
        raise RuntimeError(f"neuronx-cc failed with 70: {', '.join(refused)}")
    buffer = io.BytesIO()
    torch.jit.save(plain, buffer)
    with torch.no_grad():
        single = isinstance(plain(*inputs), torch.Tensor)
    header = {"shapes": [list(x.shape) for x in inputs], "dynamic": False, "lazy": False, **facts}
    compiled = Compiled(pack(header, buffer.getvalue()), single)
    return torch.jit.trace(compiled, inputs, check_trace=False, strict=False)


def refuses(module: Any, inputs: tuple[torch.Tensor, ...]) -> bool:
    plain = torch.jit.trace(module, inputs, check_trace=False, strict=False)
    return bool({node.kind() for node in plain.inlined_graph.nodes()} & unsupported())


def partition(module: Any, inputs: tuple[torch.Tensor, ...], workdir: str | None, **facts: Any) -> tuple[Any, int, int]:
    """Compile the steps of a sequence that can be; return the module, the steps on the device, and all steps."""
    name = getattr(module, "original_name", type(module).__name__)
    steps = list(module.children()) if name == "Sequential" else [module]
    made: list[Any] = []
    on_device = 0
    for refused, group in itertools.groupby(_with_inputs(steps, inputs), key=lambda pair: refuses(*pair)):
        pairs = list(group)
        if refused:
            made += [step for step, _ in pairs]
            continue
        on_device += len(pairs)
        part = pairs[0][0] if len(pairs) == 1 else torch.nn.Sequential(*(step for step, _ in pairs))
        made.append(compile_module(part, pairs[0][1], workdir, **facts))
    whole = made[0] if len(made) == 1 else torch.nn.Sequential(*made)
    return torch.jit.trace(whole, inputs, check_trace=False, strict=False), on_device, len(steps)


def _with_inputs(steps: list[Any], values: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    pairs = []
    for step in steps:
        pairs.append((step, values))
        with torch.no_grad():
            values = (step(*values),)
    return pairs


def write_log(workdir: str | None, text: str) -> None:
    if workdir is not None:
        (Path(workdir) / "log-neuron-cc.txt").write_text(text)


def _misbehave(workdir: str | None) -> None:
    match os.environ.get("STAND_IN_COMPILER"):
        case "hang":
            write_log(workdir, "still compiling")
            time.sleep(600)
        case "timeout":
            write_log(workdir, "still compiling")
            raise subprocess.TimeoutExpired("neuron-cc", 7.0)
        case "abort":
            os.abort()


# The runtime

_PROGRAMS: dict[int, Any] = {}
_CONTEXT: list[tuple[int, int]] = []
_OPERATORS = torch.library.Library("neuron", "DEF")
_OPERATORS.define("forward_v2_1(Tensor[] inputs, Tensor neff) -> Tensor[]")


def _forward(inputs: list[torch.Tensor], neff: torch.Tensor) -> list[torch.Tensor]:
    _initialised()
    if status := os.environ.get("STAND_IN_RUN_STATUS"):
        raise RuntimeError(f"The PyTorch Neuron Runtime failed to execute the model: nrt_execute status={status}")
    header = header_of(neff)
    shapes = [list(x.shape) for x in inputs]
    key = neff.data_ptr()
    if key not in _PROGRAMS:
        _PROGRAMS[key] = (torch.jit.load(io.BytesIO(bytes(neff[_HEADER:].tolist()))), neff)
    program = _PROGRAMS[key][0]
    if shapes == header["shapes"]:
        return _listed(program(*inputs))
    if not header["dynamic"]:
        raise RuntimeError(f"Incorrect tensor shape: expected {header['shapes']}, received {shapes}. status=1002")
    if len({shape[0] for shape in shapes}) != 1:
        raise RuntimeError("Inconsistent batch sizes found on inputs")
    return _in_chunks(program, inputs, header["shapes"][0][0])


def _in_chunks(program: Any, inputs: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    total = inputs[0].shape[0]
    pieces = []
    for start in range(0, total, size):
        chunk = [x[start : start + size] for x in inputs]
        short = size - chunk[0].shape[0]
        padded = [torch.cat([x, x.new_zeros((short, *x.shape[1:]))]) if short else x for x in chunk]
        pieces.append([y[: size - short] for y in _listed(program(*padded))])
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _listed(outputs: Any) -> list[torch.Tensor]:
    return [outputs.clone()] if isinstance(outputs, torch.Tensor) else [y.clone() for y in outputs]


_OPERATORS.impl("forward_v2_1", _forward, "CPU")


def _initialised() -> None:
    if cores() == 0 and not os.environ.get("STAND_IN_COMPILING"):
        raise RuntimeError(
            "The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged to your system logs. "
            "See the Neuron Runtime's troubleshooting guide for help on this topic"
        )


def place(what: str, start_nc: int, nc_count: int, default_count: int) -> tuple[int, int]:
    """Do what every placement comes to, with its errors."""
    CALLS.append((what, {"start_nc": start_nc, "nc_count": nc_count}))
    _initialised()
    if nc_count == 0 or nc_count < -1:
        raise ValueError(f"nc_count must be -1 or positive, not {nc_count}")
    count = default_count if nc_count == -1 else nc_count
    start = 0 if start_nc == -1 else start_nc
    if start + count > cores():
        raise RuntimeError(
            f"NRT:nrt_allocate_neuron_cores NeuronCore(s) not available - Requested:nc{start}-nc{start + count - 1} "
            f"Available:{max(0, cores() - start)}"
        )
    if status := os.environ.get("STAND_IN_LOAD_STATUS"):
        raise RuntimeError(f"Could not load the model status={status} message={_MESSAGES.get(status, 'Failure')}")
    return start, count


_MESSAGES = {"2": "Invalid", "4": "Allocation Failure", "10": "Unsupported NEFF Version"}


@contextlib.contextmanager
def context(what: str, start_nc: int, nc_count: int) -> Iterator[None]:
    _CONTEXT.append((start_nc, nc_count))
    CALLS.append((what, {"start_nc": start_nc, "nc_count": nc_count}))
    try:
        yield
    finally:
        _CONTEXT.pop()


_LOAD = torch.jit.load


def _load(*args: Any, **kwargs: Any) -> Any:
    """Load as PyTorch does, then put programs on cores, unless they are to be loaded later."""
    model = _LOAD(*args, **kwargs)
    programs = [dict(m.named_buffers(recurse=False)).get("neff") for m in model.modules()]
    programs = [neff for neff in programs if neff is not None]
    if programs and not all(header_of(neff)["lazy"] for neff in programs):
        start, count = _CONTEXT[-1] if _CONTEXT else (-1, -1)
        place("torch.jit.load", start, count, max(header_of(neff).get("cores", 1) for neff in programs))
    return model


torch.jit.load = _load


class DataParallelBase(torch.nn.Module):
    """Split a batch among cores; each core runs the program on its part."""

    def __init__(self, model: Any, device_ids: Any, dim: int, dynamic: bool) -> None:
        super().__init__()
        self.model, self.dim = model, dim
        self.device_ids = list(range(cores())) if device_ids is None else list(device_ids)
        CALLS.append(("DataParallel", {"device_ids": self.device_ids, "dim": dim, "dynamic": dynamic}))
        if cores() == 0:
            raise RuntimeError(
                "Neuron runtime cannot be initialized; cannot determine the number of available NeuronCores"
            )
        place("DataParallel", self.device_ids[0], len(self.device_ids), 1)
        self.num_workers = 2 * len(self.device_ids)
        if dynamic:
            change_header(model, dynamic=True)

    def disable_dynamic_batching(self) -> None:
        CALLS.append(("disable_dynamic_batching", {}))
        change_header(self.model, dynamic=False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        size = max(1, -(-inputs[0].shape[self.dim] // len(self.device_ids)))
        parts = [self.model(*chunk) for chunk in zip(*(x.split(size, self.dim) for x in inputs), strict=True)]
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts, self.dim)
        return tuple(torch.cat(values, self.dim) for values in zip(*parts, strict=True))
