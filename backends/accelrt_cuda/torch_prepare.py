"""From a segment of ONNX to a module on a device: folded, in the precision asked for, rewritten for speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.backend import Precision
from accelrt.errors import CompileError
from accelrt.graph.fold_norms import fold_batch_norms
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.types import Signature, TensorType
from accelrt_cuda.torch_half import Half, half_problem, in_halves

HALVES: dict[str, Half] = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A segment ready to run.

    Attributes:
        module: A ``torch.fx.GraphModule`` with its weights on the device: tensors in, a tuple of tensors out.
        signature: That of the segment.
        depends: Why it does not do the same for all values of its inputs; empty if it does.
        bounds: By name of an input that holds places in an axis: the axis' size. A kernel of CUDA that is sent a place
            outside ends the process' whole context.
        rewrites: How often each rewrite did something.
    """

    module: Any
    signature: Signature
    depends: tuple[str, ...]
    bounds: dict[str, int]
    rewrites: dict[str, int]


def prepare(source: Path | Graph, precision: Precision, device: Any, *, channels_last: bool) -> Prepared:
    """Lower a segment for ``device``.

    Args:
        source: The segment, or the file that holds it.
        precision: fp32, bf16 or fp16.
        device: Of torch's.
        channels_last: Whether weights of two-dimensional convolutions are laid out so.

    Raises:
        CompileError: A node is not lowered to torch, or the precision cannot be said in its opset.
    """
    from accelrt.graph.lowering import lower
    from accelrt_cuda.torch_rewrites import rewrite

    graph = load_graph(source) if isinstance(source, Path) else source
    signature, bounds = graph.signature, _bounds(graph)
    graph = fold_batch_norms(graph)
    if (half := HALVES.get(precision)) is not None:
        if (problem := half_problem(graph.opsets.get("", 1), half)) is not None:
            raise CompileError(f"The segment cannot be computed in {precision}: {problem}.", backend="torch")
        graph = in_halves(graph, half)
    # Weights are rounded and turned on the CPU, where their files are mapped, and only then moved.
    lowered = lower(graph)
    counts = rewrite(lowered.module, channels_last=channels_last)
    module = to_device(lowered.module, device)
    return Prepared(module, signature, lowered.depends, bounds, counts)


def to_device(module: Any, device: Any) -> Any:
    """Move a lowered module, with the devices that its kernels name."""
    import torch

    place = torch.device(device)
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in part.graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": place}
        part.recompile()
    # Weights may still be the bytes of a file mapped into memory; on the CPU they stay so, for nothing writes to them.
    return module.to(place)


def _bounds(graph: Graph) -> dict[str, int]:
    """Find inputs that Gather takes for places as they are, with the size of the axis they are places of."""
    integers = {
        port.name
        for port in graph.signature.inputs
        if isinstance(port.type, TensorType) and port.type.dtype in ("int32", "int64")
    }
    origin = {name: name for name in integers}
    bounds: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain or not node.inputs:
            continue
        if node.op_type in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"):
            if node.inputs[0] in origin and node.output_dtype(0) in ("int32", "int64"):
                origin[node.outputs[0]] = origin[node.inputs[0]]
        elif node.op_type == "Gather" and node.inputs[1] in origin:
            size = node.input_size(0, int(node.attributes.get("axis", 0)))
            if size is not None:
                name = origin[node.inputs[1]]
                bounds[name] = min(size, bounds.get(name, size))
    return bounds
