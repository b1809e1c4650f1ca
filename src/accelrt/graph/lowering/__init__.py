"""Lowers an ONNX graph to a ``torch.nn.Module``, for engines whose compiler takes torch.

``lowerable`` answers from a table about one node, without torch; ``lower`` makes the module. What the table admits is
computed as ONNX defines it; the rest is refused with a reason, so that the partitioner sends it to the CPU.

``table`` says which operators, versions and data types are lowered and by which kernel; ``kernels`` holds the
functions on tensors; ``build`` strings them together as a ``torch.fx.GraphModule``; ``host`` keeps arithmetic on
shapes out of tensors, so that nothing static depends on data; ``functions`` expands operators that ONNX defines by
others. torch is imported when `lower` is called, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelrt.graph.lowering.table import lowerable

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from accelrt.graph.lowering.build import Lowered
    from accelrt.graph.model import Graph

__all__ = ["lower", "lowerable"]


def lower(source: Graph | Path | onnx.ModelProto, *, device: Any = "cpu") -> Lowered:
    """Lower a graph to torch; the graph is not changed.

    Args:
        source: A graph, or what `accelrt.graph.load.load_graph` takes.
        device: Where weights and constants go: a name or a ``torch.device``.

    Returns:
        The module with its signature. Weights on the CPU share memory with the graph's, which may be files mapped
        into memory: copy them (``module.to(...)``, ``copy.deepcopy``) before writing to them.

    Raises:
        CompileError: A node is not lowerable; every distinct reason is named.
        GraphError: The source is no valid graph.
    """
    from accelrt.graph.lowering.build import lower_graph
    from accelrt.graph.model import Graph

    if not isinstance(source, Graph):
        from accelrt.graph.load import load_graph

        source = load_graph(source)
    return lower_graph(source, device)
