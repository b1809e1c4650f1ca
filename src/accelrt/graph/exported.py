"""Exported PyTorch programs: what their graphs tell without running them."""

from __future__ import annotations

from typing import Any


def writes(program: Any) -> bool:
    """Tell whether an exported program has an operator that works in place, and so might write to an input."""
    if any(result.kind.name == "USER_INPUT_MUTATION" for result in program.graph_signature.output_specs):
        return True
    graphs = (module.graph for module in program.graph_module.modules() if hasattr(module, "graph"))
    schemas = (getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)
