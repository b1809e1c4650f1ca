"""Operators that ONNX defines by others, expanded so that their parts can be lowered."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import inliner

from accelrt.errors import GraphError
from accelrt.graph.convert import to_type_proto
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.node import Node
from accelrt.graph.trial import single_node_model

_DOMAIN = "accelrt.expansion"
"""Where a definition lives while it is inlined, so that it is not taken for the operator itself."""


def expansion(node: Node) -> Graph | str:
    """Return the graph that an operator stands for, its inputs and outputs named as the node's; else a reason."""
    name = f"{node.domain + '.' if node.domain else ''}{node.op_type}"
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, node.opset, node.domain)
    except onnx.defs.SchemaError:
        return f"{name} is no operator that ONNX {onnx.__version__} knows at opset {node.opset}"
    if not (schema.has_function or schema.has_context_dependent_function):
        return f"{name}-{node.version} is not lowered to torch, and ONNX does not define it by other operators"
    try:
        model = single_node_model(node)
        definition = _definition(schema, model.graph.node[0], node)
        if definition is None:
            return f"ONNX does not define {name}-{node.version} by other operators for these types"
        # The graph is of the opset that the definition is written in, whatever that of the model.
        del model.opset_import[:]
        model.opset_import.extend(definition.opset_import)
        model.opset_import.add(domain=_DOMAIN, version=1)
        model.functions.append(definition)
        return load_graph(inliner.inline_local_functions(model))
    except (GraphError, RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        return f"ONNX's definition of {name} cannot be expanded: {' '.join(str(error).split())[:200]}"


def _definition(schema: Any, call: onnx.NodeProto, node: Node) -> onnx.FunctionProto | None:
    """Return an operator as a function of a domain of its own, and make ``call`` a call of it."""
    given = {attribute.name for attribute in call.attribute}
    for attribute in schema.attributes.values():
        # A definition refers to attributes; where one is left out, ONNX's inliner knows no default.
        if attribute.name not in given and attribute.default_value.type:
            call.attribute.append(attribute.default_value)
    if schema.has_function:
        version = _nearest(schema.function_opset_versions, node.opset)
        data = schema.get_function_with_opset_version(version)
    else:
        version = _nearest(schema.context_dependent_function_opset_versions, node.opset)
        types = [b"" if type_ is None else to_type_proto(type_).SerializeToString() for type_ in node.input_types]
        data = schema.get_context_dependent_function_with_opset_version(version, call.SerializeToString(), types)
    if not data:
        return None
    definition: onnx.FunctionProto = onnx.FunctionProto.FromString(data)
    definition.domain = call.domain = _DOMAIN
    if not any(entry.domain in ("", "ai.onnx") for entry in definition.opset_import):
        definition.opset_import.add(domain="", version=version if not node.domain else onnx.defs.onnx_opset_version())
    return definition


def _nearest(versions: list[int], opset: int) -> int:
    """Return the newest version up to an opset, or the oldest there is."""
    return max((version for version in versions if version <= opset), default=min(versions))
