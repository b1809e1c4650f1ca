"""Turn any form of ONNX into a `Graph`: lazily, so that a model larger than memory's comfort is never held twice."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner, numpy_helper

from accelrt.errors import AccelrtError, GraphError
from accelrt.graph.model import Graph, bodies_of, captures_of, names_in
from accelrt.graph.node import INLINE_BYTES, WEIGHTS_FILE
from accelrt.graph.weights import stub

MAX_NODES = 5_000_000
"""More than any model has; functions that call each other reach more with a few hundred bytes."""


def load_graph(source: Path | bytes | onnx.ModelProto | ir.Model) -> Graph:
    """Load an ONNX model and bring it into the form that accelrt works on.

    Local functions are inlined, constants become initialisers, initialisers leave the list of inputs, gradients become
    ordinary operators, and nodes that nothing reads are dropped. Weights stay where they are until they are needed.

    Args:
        source: A path (external data is looked for beside it), serialised bytes, a ModelProto or an onnx-ir model.

    Raises:
        GraphError: Not ONNX, not a valid graph, or external data that is missing or outside the model's folder.
    """
    try:
        graph = _load(source)
        # What else could be wrong comes to light here, before anything is built on it.
        for tensor in graph.weights.values():
            _check_held(tensor)
        _ = graph.constants, graph.nodes
    except AccelrtError:
        raise
    except OSError as error:
        raise GraphError(f"{_describe(source)} cannot be read: {error}") from error
    except Exception as error:
        # onnx, onnx-ir and protobuf raise what they like on models made to be wrong; each text format has its own.
        raise GraphError(
            f"{_describe(source)} is not an ONNX model that can be used: {_root_cause(error)}",
            hint="Check that the file is complete; `onnx.checker.check_model` names the fault.",
        ) from error
    return graph


def _load(source: Path | bytes | onnx.ModelProto | ir.Model) -> Graph:
    proto, weights = _split(_to_ir(source))
    if proto.functions:
        _check_functions(proto)
        proto = inliner.inline_local_functions(proto)
    if any(node.op_type == "Gradient" for node in proto.graph.node):
        from accelrt.graph.gradient import lower_gradients  # of use to a handful of models

        proto = lower_gradients(proto)
    weights.update(_lift_constants(proto.graph))
    _free_initializer_outputs(proto.graph, weights)
    _drop_initializer_inputs(proto.graph)
    # Before version 4 an initialiser had to be an input as well, and onnx's inference still insists.
    proto.ir_version = max(proto.ir_version, 4)
    _sort(proto.graph)
    _drop_unused(proto.graph)
    kept = {tensor.name for tensor in proto.graph.initializer}
    return Graph(proto, {name: tensor for name, tensor in weights.items() if name in kept})


def _to_ir(source: Path | bytes | onnx.ModelProto | ir.Model) -> ir.Model:
    if isinstance(source, ir.Model):
        return source.clone()
    if isinstance(source, Path):
        proto = onnx.load(source, load_external_data=False)
    else:
        proto = onnx.ModelProto.FromString(source) if isinstance(source, bytes) else source
    if not proto.HasField("graph"):
        raise GraphError(f"{_describe(source)} holds no graph.", hint="Is this really a serialised ONNX ModelProto?")
    _check_opsets(proto)
    _check_names(proto.graph)
    model = ir.from_proto(proto)
    if isinstance(source, Path):
        # Absolute, because onnx-ir takes a model in the current folder for one without a folder.
        ir.external_data.set_base_dir(model.graph, source.absolute().parent)
        if (real := source.resolve()) != source.absolute():
            _follow_links(model.graph, source.absolute().parent, real.parent)
    return model


def _follow_links(graph: ir.Graph, folder: Path, real: Path) -> None:
    """Find data where hubs keep it: model and data are links into one folder, ``real``, which holds both."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or ".." in Path(tensor.location).parts:
            continue
        target = (folder / tensor.location).resolve()
        if target.parent == real:
            value.const_value = ir.ExternalTensor(
                target.name, tensor.offset, tensor.length, tensor.dtype,
                shape=tensor.shape, name=str(value.name), base_dir=real,
            )  # fmt: skip


def _check_names(graph: onnx.GraphProto) -> None:
    """Refuse names given twice, of which onnx-ir would keep the last."""
    for what, items in (("input", graph.input), ("output", graph.output), ("initialiser", graph.initializer)):
        names = [item.name for item in items]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise GraphError(f"The model has more than one {what} named {twice!r}.")
        if "" in names:
            raise GraphError(f"The model has an {what} without a name.")


def _check_opsets(proto: onnx.ModelProto) -> None:
    if not any(entry.domain in ("", "ai.onnx") for entry in proto.opset_import) and proto.graph.node:
        domains = {node.domain for node in proto.graph.node}
        if domains & {"", "ai.onnx"}:
            raise GraphError("The model says no version of the operator set that it uses (opset_import).")
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        name = domain or "ai.onnx"
        if not 1 <= entry.version < 1 << 31:
            raise GraphError(f"The model imports version {entry.version} of {name!r}.")
        if versions.setdefault(domain, entry.version) != entry.version:
            raise GraphError(f"The model imports {name!r} in two versions: {versions[domain]} and {entry.version}.")
    if versions.get("", 0) > (known := onnx.defs.onnx_opset_version()):
        raise GraphError(
            f"The model is of opset {versions['']}; ONNX {onnx.__version__} knows up to {known}.",
            hint="Upgrade the onnx package, or export the model to an older opset.",
        )


def _check_functions(proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, and those that would grow beyond all bounds when inlined."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    open_calls: set[tuple[str, str, str]] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        return sum(
            1 + function_size((n.domain, n.op_type, n.overload)) + sum(size(body.node) for body in bodies_of(n))
            for n in nodes
        )

    def function_size(key: tuple[str, str, str]) -> int:
        if key in functions and key not in sizes:
            if key in open_calls:
                raise GraphError(f"The function {key[1]!r} of domain {key[0]!r} calls itself.")
            open_calls.add(key)
            sizes[key] = size(functions[key].node)
            open_calls.discard(key)
        return sizes.get(key, 0)

    if (total := size(proto.graph.node)) > MAX_NODES:
        raise GraphError(f"The model has {total} nodes once its functions are inlined; {MAX_NODES} is the most.")


def _check_held(tensor: ir.TensorProtocol) -> None:
    """Refuse a weight whose data is not as long as its dims say; one that lies in a file was checked before."""
    if not isinstance(tensor, ir.ExternalTensor) and tensor.numpy().nbytes == 0:
        raise GraphError(f"The weight {tensor.name!r} has no data.")


def _check_dims(name: str, tensor: ir.TensorProtocol) -> None:
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise GraphError(f"The tensor {name!r} has no element type.")
    if any(dim < 0 for dim in tensor.shape.numpy()):
        raise GraphError(f"The tensor {name!r} has the dims {list(tensor.shape.numpy())}.")


def _describe(source: object) -> str:
    return str(source) if isinstance(source, Path) else f"The given {type(source).__name__}"


def _root_cause(error: BaseException) -> str:
    """Return the first line of the error at the bottom: onnx-ir wraps it once for each part of the model."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _split(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Part structure from weights: a small ModelProto with stubs, and the tensors that they stand for."""
    weights: dict[str, Any] = {}
    _internalise_attributes(model)
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                raise GraphError(f"Initialiser {name!r} has no data.")
            _check_dims(name, tensor)
            external = tensor if isinstance(tensor, ir.ExternalTensor) else None
            if external is not None:
                _check_extent(external)
            if graph is model.graph and tensor.nbytes > INLINE_BYTES and tensor.dtype != ir.DataType.STRING:
                weights[name] = tensor
                value.const_value = _placeholder(name, tensor)
            elif external is not None:
                # Inside bodies, and for small tensors, the data joins the structure.
                value.const_value = _internal(external)
    return ir.to_proto(model), weights


def _placeholder(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(WEIGHTS_FILE, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)


def _internalise_attributes(model: ir.Model) -> None:
    """Read tensors of attributes that lie in other files: weights of initialisers alone stay where they are."""
    bodies = [*model.graphs(), *model.functions.values()]
    bodies += [graph for function in model.functions.values() for graph in function.subgraphs()]
    for node in (node for body in bodies for node in body):
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or attribute.type not in (
                ir.AttributeType.TENSOR,
                ir.AttributeType.TENSORS,
            ):
                continue
            several = attribute.type == ir.AttributeType.TENSORS
            tensors = list(attribute.value) if several else [attribute.value]
            if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
                held = [_internal(t) if isinstance(t, ir.ExternalTensor) else t for t in tensors]
                node.attributes[name] = ir.Attr(name, attribute.type, held if several else held[0])


def _internal(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    _check_extent(tensor)
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _check_extent(tensor: ir.ExternalTensor) -> None:
    """Refuse external data outside the folder, missing, or shorter than the tensor, before anything reads it."""
    if not tensor.base_dir:
        raise GraphError(
            f"The tensor {tensor.name!r} keeps its data in the file {str(tensor.location)!r}, "
            "but the model was not given as a path, so there is no folder to find it in.",
            hint="Pass the path of the model.",
        )
    path, folder = Path(tensor.path), Path(tensor.base_dir)
    try:
        size = path.stat().st_size
        inside = path.resolve().is_relative_to(folder.resolve()) and ".." not in Path(tensor.location).parts
    except (OSError, ValueError) as error:
        raise GraphError(f"The external data of initialiser {tensor.name!r} cannot be opened: {error}") from error
    if not inside:
        raise GraphError(
            f"Initialiser {tensor.name!r} names external data at {str(tensor.location)!r}, outside the model's folder.",
            hint="External data must be a file inside the folder of the model.",
        )
    offset, length = tensor.offset or 0, tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length < tensor.nbytes or offset + length > size or not path.is_file():
        raise GraphError(
            f"Initialiser {tensor.name!r} needs {tensor.nbytes} bytes at offset {offset} of {path.name!r}, "
            f"which has {size} bytes and declares {length}.",
            hint="The external data file is truncated or belongs to another model.",
        )


def _lift_constants(graph: onnx.GraphProto) -> dict[str, Any]:
    """Turn Constant nodes of the main graph into initialisers, so that constants travel with whoever reads them."""
    weights: dict[str, Any] = {}
    outputs = {value.name for value in graph.output}
    taken = {item.name for item in (*graph.input, *graph.initializer)}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None or node.output[0] in outputs:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        if tensor.name in taken:
            raise GraphError(f"The value {tensor.name!r} is produced more than once.")
        taken.add(tensor.name)
        held = ir.serde.deserialize_tensor(tensor)
        _check_dims(tensor.name, held)
        if held.nbytes > INLINE_BYTES and tensor.data_type != onnx.TensorProto.STRING:
            weights[tensor.name] = held
            tensor = stub(tensor.name, held)
        graph.initializer.append(tensor)
    if len(kept) != len(graph.node):
        _replace_nodes(graph, kept)
    return weights


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the value of a Constant node as a tensor; None for sparse ones, which stay nodes."""
    if len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]

    match attribute.name:
        case "value":
            proto = onnx.TensorProto()
            proto.CopyFrom(attribute.t)
            return proto
        case "value_int":
            return numpy_helper.from_array(np.array(attribute.i, np.int64))
        case "value_ints":
            return numpy_helper.from_array(np.array(attribute.ints, np.int64))
        case "value_float":
            return numpy_helper.from_array(np.array(attribute.f, np.float32))
        case "value_floats":
            return numpy_helper.from_array(np.array(attribute.floats, np.float32))
        case "value_string":
            return onnx.helper.make_tensor("", onnx.TensorProto.STRING, [], [attribute.s])
        case "value_strings":
            strings = list(attribute.strings)
            return onnx.helper.make_tensor("", onnx.TensorProto.STRING, [len(strings)], strings)
    return None


def _free_initializer_outputs(graph: onnx.GraphProto, weights: dict[str, Any]) -> None:
    """Give each graph output that is an initialiser a node to come from, so that every output is computed."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] | None = None
    for output in graph.output:
        if (tensor := initializers.get(output.name)) is None:
            continue
        taken = names_in(graph) if taken is None else taken
        inner = f"{output.name}__value"
        while inner in taken:
            inner += "_"
        taken.add(inner)
        for node in graph.node:
            _rename_reads(node, output.name, inner)
        tensor.name = inner
        if output.name in weights:
            weights[inner] = weights.pop(output.name)
        graph.node.append(onnx.helper.make_node("Identity", [inner], [output.name], name=f"{output.name}__copy"))


def _rename_reads(node: onnx.NodeProto, old: str, new: str) -> None:
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                _rename_reads(inner, old, new)
            for output in body.output:
                if output.name == old:
                    output.name = new


def _drop_initializer_inputs(graph: onnx.GraphProto) -> None:
    """An initialiser that is also an input (all were, before IR version 4) is a default that nobody overrides here."""
    initializers = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in initializers]
    if len(kept) != len(graph.input):
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del graph.input[:]
        graph.input.extend(kept)


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _reads(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.input if name] + list(captures_of(node))


def _sort(graph: onnx.GraphProto) -> None:
    """Check single assignment and that every value has a source; order nodes by dependency, stably.

    Raises:
        GraphError: A value is produced twice, comes from nowhere, or depends on itself.
    """
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    producer: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and (name in producer or name in known):
                raise GraphError(f"The value {name!r} is produced more than once.")
            if name:
                producer[name] = index
    for output in graph.output:
        if output.name not in producer and output.name not in known:
            raise GraphError(f"The graph output {output.name!r} is produced by no node.")

    consumers: dict[int, list[int]] = {}
    waiting: list[int] = []
    for index, node in enumerate(graph.node):
        needs = set()
        for name in _reads(node):
            if name in producer:
                needs.add(producer[name])
            elif name not in known:
                raise GraphError(f"Node {node.name!r} ({node.op_type}) reads {name!r}, which nothing produces.")
        waiting.append(len(needs))
        for need in needs:
            consumers.setdefault(need, []).append(index)

    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for consumer in consumers.get(index, ()):
            waiting[consumer] -= 1
            if waiting[consumer] == 0:
                heapq.heappush(ready, consumer)
    if len(order) != len(graph.node):
        stuck = next(node for index, node in enumerate(graph.node) if waiting[index])
        raise GraphError(f"The graph has a cycle through node {stuck.name!r} ({stuck.op_type}).")
    if order != sorted(order):
        _replace_nodes(graph, [graph.node[index] for index in order])


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Drop nodes and initialisers that no output depends on."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            kept.append(node)
    if len(kept) != len(graph.node):
        _replace_nodes(graph, kept[::-1])
    unused = [tensor for tensor in graph.initializer if tensor.name not in needed]
    for tensor in unused:
        graph.initializer.remove(tensor)
