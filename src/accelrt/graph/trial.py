"""Models of one node, for engines that can only tell by trying; and the lowering of versions for older runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import numpy_helper

from accelrt.graph.convert import to_type_proto
from accelrt.graph.model import bodies_of, since_version
from accelrt.graph.node import Node
from accelrt.graph.types import ValueType


def single_node_model(node: Node, opsets: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """Return a model of one node: what it reads are inputs of the types known, small constants initialisers."""
    model = onnx.ModelProto(ir_version=onnx.IR_VERSION)
    for domain, version in {**_domains(node), **(opsets or {})}.items():
        model.opset_import.add(domain=domain, version=version)
    graph = model.graph
    graph.name = "trial"
    graph.node.append(node.proto)
    constants = {node.inputs[index]: value for index, value in node.constants.items()}
    types = dict(zip((*node.inputs, *node.captures), (*node.input_types, *node.capture_types), strict=False))
    for name in dict.fromkeys(node.reads):
        if name in constants:
            graph.initializer.append(numpy_helper.from_array(constants[name], name))
        else:
            graph.input.append(_value_info(name, types.get(name)))
    for name, type_ in zip(node.outputs, node.output_types, strict=True):
        if name:
            graph.output.append(_value_info(name, type_))
    return model


def _value_info(name: str, type_: ValueType | None) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name, type=None if type_ is None else to_type_proto(type_))


def _domains(node: Node) -> dict[str, int]:
    domains = {node.domain: node.opset}
    for body in node.bodies:
        for inner in body:
            domains.update(_domains(inner))
    return domains


def lower_versions(proto: onnx.ModelProto, opsets: Mapping[str, int], ir_version: int) -> str | None:
    """Stamp a model, in place, with versions that a runtime knows, where that does not change its meaning.

    An opset may be lowered as far as the newest since-version among the operators used.

    Returns:
        None, or the reason why it cannot be done, in which case the model is unchanged.
    """
    limits: dict[str, int] = {}
    imports = {("" if i.domain == "ai.onnx" else i.domain): i.version for i in proto.opset_import}
    for domain, version in imports.items():
        limit = opsets.get(domain, version)
        if version > limit:
            for node in _all_nodes(proto.graph):
                own = "" if node.domain == "ai.onnx" else node.domain
                if own == domain and since_version(domain, node.op_type, version) > limit:
                    since = since_version(domain, node.op_type, version)
                    return f"{node.op_type} is of version {since} of domain {domain or 'ai.onnx'!r}; {limit} is known"
            limits[domain] = limit
    for entry in proto.opset_import:
        entry.version = limits.get("" if entry.domain == "ai.onnx" else entry.domain, entry.version)
    proto.ir_version = min(proto.ir_version, ir_version)
    return None


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in bodies_of(node):
            yield from _all_nodes(body)


def malformed(node: Node) -> str | None:
    """Return how a node breaks the rules of its operator, None if it keeps them or they are not known.

    Runtimes check this when they load a model; whoever computes without checking would answer for nonsense.
    """
    types = (*node.input_types, *node.capture_types)
    names = (*node.inputs, *node.captures)
    if any(name and type_ is None for name, type_ in zip(names, types, strict=True)):
        return None
    model = single_node_model(node)
    outputs = [value for value in model.graph.output if value.type.HasField("tensor_type")]
    for value in outputs:
        # Exporters are often wrong about sizes, which runtimes forgive; about the kind of a value they are not.
        value.type.tensor_type.ClearField("shape")
    del model.graph.output[:]  # the checker wants sizes
    try:
        onnx.checker.check_model(model)
        model.graph.output.extend(outputs)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())
        return text if len(text) <= 300 else text[:297] + "..."
    return None
