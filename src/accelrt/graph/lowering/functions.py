"""Operators that ONNX defines by others, expanded so that their parts can be lowered."""

from __future__ import annotations

import onnx
from onnx import inliner

from accelrt.errors import GraphError
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.node import Node
from accelrt.graph.trial import single_node_model


def expansion(node: Node) -> Graph | str:
    """Return the graph that an operator stands for, its inputs and outputs named as the node's; else a reason."""
    name = f"{node.domain + '.' if node.domain else ''}{node.op_type}"
    try:
        schema = onnx.defs.get_schema(node.op_type, node.opset, node.domain)
    except onnx.defs.SchemaError:
        return f"{name} is no operator that ONNX {onnx.__version__} knows at opset {node.opset}"
    if not (schema.has_function or schema.has_context_dependent_function):
        return f"{name}-{node.version} is not lowered to torch, and ONNX does not define it by other operators"
    model = single_node_model(node)
    if node.domain and not any(not entry.domain for entry in model.opset_import):
        model.opset_import.add(domain="", version=onnx.defs.onnx_opset_version())
    try:
        inlined = inliner.inline_selected_functions(
            model, [(node.domain, node.op_type)], exclude=False, inline_schema_functions=True
        )
        if any((n.domain, n.op_type) == (node.domain, node.op_type) for n in inlined.graph.node):
            return f"ONNX's definition of {name}-{node.version} cannot be expanded for these types"
        return load_graph(inlined)
    except (GraphError, RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        return f"ONNX's definition of {name} cannot be expanded: {' '.join(str(error).split())[:200]}"
