"""The contestants of `gpu.py`: each is one network made ready on the GPU by one runtime, as that runtime's users do it.

All take float32 images or int64 tokens and give float32, whatever they compute in between; conversions are part of a
call. TF32 is off for all. A call ends when its outputs are complete on the GPU, or on the host if its name says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch._inductor.config as inductor_config
from gpu_networks import with_weights_of
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import accelrt
from accelrt.backend import copy_to_host
from accelrt.registry import REGISTRY, status_of
from accelrt.runtime.session import Session
from accelrt.testing.fake import FakeBackend, FakeTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ONNX = {
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
}
DRY_BACKEND = "dry"


@dataclass(frozen=True, slots=True)
class Ground:
    """Where it is measured: on a GPU, or dry, where the CPU plays its part and figures mean nothing."""

    dry: bool

    @property
    def device(self) -> str:
        """The name of the device for torch and onnxruntime."""
        return "cpu" if self.dry else "cuda"

    @property
    def backend(self) -> str:
        """The backend of accelrt."""
        return DRY_BACKEND if self.dry else "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def put(self, array: np.ndarray[Any, Any]) -> Any:
        """Copy an array to where `Session.predict` takes it without a copy."""
        return FakeTensor(array.copy()) if self.dry else torch.from_numpy(array).cuda()

    def fetch(self, tensor: Any) -> np.ndarray[Any, Any]:
        """Copy a tensor to the host."""
        if isinstance(tensor, np.ndarray):
            return tensor
        if self.dry and not isinstance(tensor, torch.Tensor):
            return copy_to_host(tensor)
        found = tensor if isinstance(tensor, torch.Tensor) else torch.from_dlpack(tensor)
        return np.asarray(found.float().cpu().numpy())

    def engines(self) -> list[str]:
        """Return the usable engines of accelrt's backend that take graphs, as targets."""
        backend = REGISTRY.backend(self.backend)
        return [f"{backend.name}/{e.name}" for e in backend.engines if "onnx" in e.formats and status_of(e).usable]

    def clear(self) -> None:
        """Free what past contestants held."""
        torch.compiler.reset()
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()


@contextmanager
def ground(*, dry: bool) -> Iterator[Ground]:
    """Prepare for measuring: TF32 off, and for a dry run a stand-in that leaves tensors on its device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if dry:
        accelrt.register(
            FakeBackend.configured(
                DRY_BACKEND,
                operators=lambda node: node.op_type != "Cast",
                device_tensors=True,
                precisions=("fp32", "bf16", "fp16"),
            )
        )
    try:
        yield Ground(dry)
    finally:
        if dry:
            REGISTRY.unregister(DRY_BACKEND)


@dataclass(frozen=True, slots=True)
class Task:
    """What all contestants of one table compute: a network of a batch size, its inputs, and where its file is."""

    model: onnx.ModelProto
    path: Path
    module: Callable[[], nn.Module]
    feeds: Mapping[str, np.ndarray[Any, Any]]
    precision: str

    @property
    def batch(self) -> int:
        """How many images or sentences a call computes."""
        return len(next(iter(self.feeds.values())))

    @property
    def images(self) -> bool:
        """Whether the network takes images, which PyTorch computes best with channels last."""
        return any(array.ndim == 4 for array in self.feeds.values())


@dataclass(frozen=True, slots=True)
class Contestant:
    """A network made ready: ``run`` is what is timed, ``fetch`` brings what it returned to the host.

    ``remark`` tells what a reader of its figures must know.
    """

    run: Callable[[], Any]
    fetch: Callable[[Any], Sequence[np.ndarray[Any, Any]]]
    close: Callable[[], None] = lambda: None
    remark: str = ""


def accelrt_on(ground: Ground, task: Task, target: str) -> dict[str, Contestant]:
    """Compile for one engine of accelrt, or for ``auto``; calls on the device, and from host to host."""
    wishes: dict[str, Any] = {"fallback": "allow", "precision": task.precision}
    if target == "auto":
        # A tolerance is what allows `auto` fewer bits.
        wishes = {"example_inputs": dict(task.feeds), "tolerance": {"fp32": 1e-3}.get(task.precision, 5e-2)}
    artifact = accelrt.compile(task.path, target, **wishes)
    remark = f"chose {artifact.placement.primary}" if target == "auto" else ""
    if elsewhere := artifact.placement.fallen_back:
        total = sum(artifact.placement.nodes_by_engine.values())
        if 2 * elsewhere > total:
            raise RuntimeError(f"{elsewhere} of {total} nodes would run elsewhere: {artifact.placement.refusals[:1]}")
        remark = f"{elsewhere} nodes run elsewhere"
    session = accelrt.load(artifact, fallback="error")
    there = {name: ground.put(array) for name, array in task.feeds.items()}
    host = dict(task.feeds)
    name = f"accelrt {target}"
    return {
        name: Contestant(
            lambda: session.predict(there, outputs="device"),
            lambda found: [ground.fetch(value) for value in found.values()],
            session.close,
            remark,
        ),
        f"{name}, host to host": Contestant(
            lambda: session.predict(host), lambda found: [np.asarray(value) for value in found.values()]
        ),
    }


class _Converted(nn.Module):
    """A network that computes in another type than its inputs and outputs are of."""

    def __init__(self, module: nn.Module, task: Task, device: str) -> None:
        super().__init__()
        self.dtype = DTYPES[task.precision]
        self.last = task.images and task.precision != "fp32"
        self.module = module.to(device, self.dtype)
        if self.last:
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute in the type, and return float32."""
        given = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        if self.last:
            given = [x.to(memory_format=torch.channels_last) for x in given]
        found = self.module(*given)
        return tuple(one.float() for one in (found if isinstance(found, tuple) else (found,)))


def torch_as(ground: Ground, task: Task, way: str) -> dict[str, Contestant]:
    """Run PyTorch eagerly, as a CUDA graph of that, compiled in a mode of `torch.compile`, or compiled with weights
    frozen into the program and recorded as a CUDA graph, which takes no copy of the inputs and is the fastest it has.
    """
    module: Any = _Converted(with_weights_of(task.module(), task.model), task, ground.device)
    inputs = [torch.from_numpy(array).to(ground.device) for array in task.feeds.values()]
    fetch = lambda found: [ground.fetch(one) for one in found]  # noqa: E731 - one line, used twice
    if way == "CUDA graph":
        return {"torch CUDA graph": Contestant(_captured(ground, module, inputs), fetch)}
    if way == "compile frozen and CUDA graph":
        with inductor_config.patch(freezing=True):
            run = _captured(ground, _compiled(ground, module, None), inputs)
        return {f"torch {way}": Contestant(run, fetch)}
    if way != "eager":
        module = _compiled(ground, module, None if way == "compile" else way.removeprefix("compile "))

    def call() -> Any:
        with torch.no_grad():
            found = module(*inputs)
        ground.synchronize()
        return found

    return {f"torch {way}": Contestant(call, fetch)}


def _compiled(ground: Ground, module: nn.Module, mode: str | None) -> Any:
    # The compiler proper takes long, and a dry run tests this code, not PyTorch.
    return torch.compile(module, backend="eager") if ground.dry else torch.compile(module, mode=mode)


def _captured(ground: Ground, module: Any, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    if ground.dry:

        def compute() -> Any:
            with torch.no_grad():
                return module(*inputs)

        return compute
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = module(*inputs)

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return found

    return replay


def onnxruntime_as(ground: Ground, task: Task, way: str) -> dict[str, Contestant]:
    """Run onnxruntime's CUDA provider: plainly from host to host, bound to the device, or so as a CUDA graph."""
    providers: list[Any] = ["CPUExecutionProvider"]
    if not ground.dry:
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise RuntimeError(f"this onnxruntime has no CUDA provider, only {ort.get_available_providers()}")
        graph = "1" if way == "CUDA graph" else "0"
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": graph}))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = task.model if task.precision == "fp32" else converted(task.model, task.precision)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    if not ground.dry and session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(f"onnxruntime fell back to {session.get_providers()}")
    names = [output.name for output in session.get_outputs()]
    if way == "host to host":
        return {
            "onnxruntime, host to host": Contestant(
                lambda: session.run(None, dict(task.feeds)), lambda found: [np.asarray(value) for value in found]
            )
        }
    binding = session.io_binding()
    for name, array in task.feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, ground.device, 0))
    # A CUDA graph writes to the addresses that it was captured with, so outputs are made once.
    kept = [ort.OrtValue.ortvalue_from_numpy(np.asarray(value), ground.device, 0) for value in _once(session, task)]
    for name, value in zip(names, kept, strict=True):
        binding.bind_ortvalue_output(name, value)

    def run() -> Any:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        ground.synchronize()
        return kept

    label = "IO binding" if way == "bound" else "IO binding and CUDA graph"
    return {f"onnxruntime, {label}": Contestant(run, lambda found: [value.numpy() for value in found])}


def _once(session: ort.InferenceSession, task: Task) -> list[np.ndarray[Any, Any]]:
    """Return arrays of the outputs' shapes, which are static."""
    return [np.zeros(output.shape, np.float32) for output in session.get_outputs()]


def converted(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a float32 model whose weights and values are of another type, but for its inputs and outputs."""
    kind, dtype = _ONNX[precision]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    for tensor in (*graph.initializer, *constants):
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(dtype)
            name = tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.raw_data = name, kind, array.tobytes()
            tensor.dims.extend(array.shape)
    before, after, renamed = [], [], {}
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            renamed[value.name] = f"{value.name}:converted"
            before.append(helper.make_node("Cast", [value.name], [renamed[value.name]], to=kind))
    for value in graph.output:
        renamed[value.name] = f"{value.name}:converted"
        after.append(helper.make_node("Cast", [renamed[value.name]], [value.name], to=TensorProto.FLOAT))
    nodes = list(graph.node)
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend([*before, *nodes, *after])
    return made


def reference(task: Task) -> list[np.ndarray[Any, Any]]:
    """Compute the outputs in float32 on the CPU."""
    session = ort.InferenceSession(str(task.path), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, dict(task.feeds))]


def relative_l2(found: Sequence[np.ndarray[Any, Any]], truth: Sequence[np.ndarray[Any, Any]]) -> float:
    """Return the norm of the deviation over that of the truth, the worst of all outputs."""
    return max(
        float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)) / np.linalg.norm(b.astype(np.float64)))
        for a, b in zip(found, truth, strict=True)
    )


def soaked(ground: Ground, task: Task) -> Session:
    """Load a model for the soak."""
    artifact = accelrt.compile(task.path, ground.backend, precision=task.precision, fallback="allow")
    return accelrt.load(artifact, fallback="error")
