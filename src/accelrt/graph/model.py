"""The graph that everything works on: ONNX structure with its weights beside it, seen as plain nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper, shape_inference

from accelrt.errors import GraphError
from accelrt.graph.convert import attribute_value, dtype_name, from_type_proto, to_type_proto
from accelrt.graph.node import Node
from accelrt.graph.types import Port, Signature, TensorType, ValueType
from accelrt.graph.weights import WeightFile, is_external, lies_outside, point_at, tensor_bytes


class Graph:
    """A model in its one intermediate form.

    ``proto`` is the structure: nodes in topological order, small constants as initialisers, and for each large one an
    initialiser without data (a stub). ``weights`` holds the tensors that the stubs stand for; they are read lazily.
    Made by `accelrt.graph.load.load_graph`; treat both as immutable.
    """

    def __init__(
        self, proto: onnx.ModelProto, weights: Mapping[str, Any], digests: dict[str, bytes] | None = None
    ) -> None:
        self.proto = proto
        self.weights = weights
        # The SHA-256 of weights already read, shared with the graphs cut out of this one: reading is most of the work.
        self._digests: dict[str, bytes] = {} if digests is None else digests

    @cached_property
    def opsets(self) -> dict[str, int]:
        """The opset version of each domain that the model imports."""
        return {_domain(entry.domain): entry.version for entry in self.proto.opset_import}

    @cached_property
    def signature(self) -> Signature:
        """Inputs and outputs with their types.

        Raises:
            GraphError: An input has no type, or an output none that can be inferred.
        """
        return Signature(
            tuple(Port(value.name, self._typed(value.name)) for value in self.proto.graph.input),
            tuple(Port(value.name, self._typed(value.name)) for value in self.proto.graph.output),
        )

    def _typed(self, name: str) -> ValueType:
        if (type_ := self.types.get(name)) is None:
            raise GraphError(
                f"The type of {name!r} is not declared and cannot be inferred.",
                hint="Declare it in the model, for inner values as `value_info`.",
            )
        return type_

    @cached_property
    def types(self) -> dict[str, ValueType]:
        """The type of every value whose type is declared or can be inferred; names inside bodies excluded."""
        graph = infer(self.proto).graph
        types: dict[str, ValueType] = {}
        for value in (*graph.value_info, *graph.input, *graph.output):
            if (type_ := from_type_proto(value.type)) is not None:
                types[value.name] = type_
        for tensor in self.proto.graph.initializer:
            if (dtype := dtype_name(tensor.data_type)) is not None:
                types[tensor.name] = TensorType(dtype, tuple(tensor.dims))
        for node in self.proto.graph.node:
            _spread_dtypes(node, self.opsets, types)
        return types

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Initialisers by name; those in ``weights`` carry no data."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The values of small initialisers as numpy arrays."""
        return {
            name: numpy_helper.to_array(tensor) for name, tensor in self.initializers.items() if not is_external(tensor)
        }

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node in topological order, as engines see it; names are unique."""
        view = _View(self.opsets, self.types, self.constants)
        taken: set[str] = set()
        return tuple(
            view.node(proto, _unique(proto, index, taken)) for index, proto in enumerate(self.proto.graph.node)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over structure and weights: equal for equal models, wherever they lie."""
        total = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for name in sorted(self.weights):
            total.update(name.encode() + self._weight_digest(name))
        return total.hexdigest()

    @property
    def has_weights_outside(self) -> bool:
        """Whether weights lie in files beside the one that holds the structure."""
        return any(lies_outside(tensor) for tensor in self.weights.values())

    def _weight_digest(self, name: str) -> bytes:
        if (digest := self._digests.get(name)) is None:
            digest = self._digests[name] = hashlib.sha256(tensor_bytes(self.weights[name])).digest()
        return digest

    def weight_bytes(self, node: Node) -> dict[str, int]:
        """Return the bytes of each initialiser that a node reads."""
        return {
            name: self.weights[name].nbytes if name in self.weights else len(self.initializers[name].raw_data)
            for name in node.reads
            if name in self.initializers
        }

    def extract(self, indices: Sequence[int]) -> Graph:
        """Return the nodes at ``indices`` as a graph of its own, with the initialisers they read.

        Its inputs are the values that come from outside, in order of first use; its outputs the outputs of the whole
        that it computes, in their order, then what others read.

        Raises:
            GraphError: A value at the border has no known type.
        """
        chosen = sorted(indices)
        inside = set(chosen)
        produced = {name for index in chosen for name in self.nodes[index].writes}
        reads = dict.fromkeys(name for index in chosen for name in self.nodes[index].reads)
        sparse = {tensor.values.name for tensor in self.proto.graph.sparse_initializer}
        inputs = [n for n in reads if n not in produced and n not in self.initializers and n not in sparse]
        outputs = [value.name for value in self.proto.graph.output if value.name in produced]
        outside = {n for i, node in enumerate(self.nodes) if i not in inside for n in node.reads}.difference(outputs)
        outputs += [n for i in chosen for n in self.nodes[i].writes if n in outside]

        segment = onnx.GraphProto(name=self.proto.graph.name or "graph")
        segment.node.extend(self.proto.graph.node[index] for index in chosen)
        segment.input.extend(self._value_info(name) for name in inputs)
        segment.output.extend(self._value_info(name) for name in outputs)
        segment.initializer.extend(tensor for name, tensor in self.initializers.items() if name in reads)
        segment.sparse_initializer.extend(
            tensor for tensor in self.proto.graph.sparse_initializer if tensor.values.name in reads
        )
        # Types that a model declares for inner values matter where an operator's own inference is unknown.
        segment.value_info.extend(
            v for v in self.proto.graph.value_info if v.name in produced and v.name not in outputs
        )
        model = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        model.graph.CopyFrom(segment)
        weights = {name: tensor for name, tensor in self.weights.items() if name in reads}
        return Graph(model, weights, self._digests)

    def expose(self, names: Iterable[str]) -> Graph:
        """Return the graph with inner values as outputs too, in order, after its own; unknown names are left out.

        Raises:
            GraphError: A value has no known type.
        """
        own = {value.name for value in (*self.proto.graph.input, *self.proto.graph.output)}
        inner = {name for node in self.nodes for name in node.writes} - own
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        proto.graph.output.extend(self._value_info(name) for name in dict.fromkeys(names) if name in inner)
        added = {value.name for value in proto.graph.output}
        declared = [value for value in proto.graph.value_info if value.name not in added]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(declared)
        return Graph(proto, self.weights, self._digests)

    def with_proto(self, proto: onnx.ModelProto) -> Graph:
        """Return a graph of another structure over the same weights."""
        return Graph(proto, self.weights, self._digests)

    def _value_info(self, name: str) -> onnx.ValueInfoProto:
        return onnx.ValueInfoProto(name=name, type=to_type_proto(self._typed(name)))

    def write(self, path: Path, weights: WeightFile) -> None:
        """Write the structure to ``path``, pointing at a weights file in the same folder."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            if tensor.name in self.weights:
                data, digest = tensor_bytes(self.weights[tensor.name]), self._weight_digest(tensor.name)
                point_at(tensor, weights.add(data, digest), weights.path.name)
        path.write_bytes(proto.SerializeToString())

    def rename(self, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Graph:
        """Return the graph with its inputs and outputs renamed, in order."""
        names = dict(zip(self.signature.input_names, inputs or (), strict=False))
        names.update(zip(self.signature.output_names, outputs or (), strict=False))
        names = {old: new for old, new in names.items() if old != new}
        if not names:
            return self
        if len(set(names.values())) != len(names):
            raise GraphError(f"Names of inputs and outputs must differ: {sorted(names.values())}.")
        if clash := set(names.values()) & (names_in(self.proto.graph) - set(names)):
            raise GraphError(f"{sorted(clash)[0]!r} already names another value of the model.")
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        _rename_values(proto.graph, names)
        return Graph(proto, self.weights, self._digests)


def with_nodes(graph: Graph, nodes: Sequence[onnx.NodeProto], tensors: Sequence[onnx.TensorProto]) -> Graph:
    """Return a graph with other nodes, in topological order, and with more small initialisers."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    del proto.graph.node[:]
    del proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    read = {name for node in nodes for name in (*node.input, *captures_of(node))}
    read.update(value.name for value in proto.graph.output)
    kept = [tensor for tensor in (*proto.graph.initializer, *tensors) if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return Graph(proto, {name: tensor for name, tensor in graph.weights.items() if name in read})


def _rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for body in bodies_of(node):
            _rename_values(body, names)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _unique(proto: onnx.NodeProto, index: int, taken: set[str]) -> str:
    name = proto.name or f"{proto.op_type}_{index}"
    if name in taken:
        name = f"{name}#{index}"
    taken.add(name)
    return name


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Return every name that a value has in a graph or in the bodies inside it."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)}
    for node in graph.node:
        names.update(node.input, node.output, *(names_in(body) for body in bodies_of(node)))
    return names


def bodies_of(proto: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node carries as attributes."""
    for attribute in proto.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def captures_of(proto: onnx.NodeProto) -> dict[str, None]:
    """Return, in order, the names that a node's bodies read from outside."""
    free: dict[str, None] = {}
    for body in bodies_of(proto):
        bound = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        bound |= {tensor.values.name for tensor in body.sparse_initializer}
        for node in body.node:
            free.update((name, None) for name in (*node.input, *captures_of(node)) if name and name not in bound)
            bound.update(node.output)
        free.update((value.name, None) for value in body.output if value.name not in bound)
    return free


def without_stubs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which stubs have become typed inputs: what onnx's own tools can digest."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    stubs = [tensor for tensor in copy.graph.initializer if is_external(tensor)]
    for tensor in stubs:
        type_ = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        copy.graph.input.append(onnx.ValueInfoProto(name=tensor.name, type=type_))
        copy.graph.initializer.remove(tensor)
    return copy


def infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the types of inner values filled in as far as onnx can tell.

    Raises:
        GraphError: Declared and inferred types contradict each other.
    """
    try:
        return shape_inference.infer_shapes(without_stubs(proto), data_prop=True)
    except shape_inference.InferenceError as error:
        raise GraphError(f"The types of the model's values contradict each other: {error}") from error


def since_version(domain: str, op_type: str, opset: int) -> int:
    """Return the version at which an operator took its present form; the opset's own where onnx does not know it."""
    try:
        return int(onnx.defs.get_schema(op_type, opset, domain).since_version)
    except onnx.defs.SchemaError:
        return opset


def _spread_dtypes(node: onnx.NodeProto, opsets: Mapping[str, int], types: dict[str, ValueType]) -> None:
    """Give outputs that inference left without a type that of the input they share a type variable with.

    onnx gives up on a node whose shapes it cannot follow; which engine may run it hangs on the data type alone.
    """
    if all(name in types for name in node.output if name):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(_domain(node.domain), 1), _domain(node.domain))
    except onnx.defs.SchemaError:
        return
    bound: dict[str, str] = {}
    for parameters, names, produced in (
        (schema.inputs, node.input, False),
        (schema.outputs, node.output, True),
    ):
        for index, name in enumerate(names):
            variable = parameters[min(index, len(parameters) - 1)].type_str if parameters else ""
            type_ = types.get(name)
            if isinstance(type_, TensorType):
                bound.setdefault(variable, type_.dtype)
            elif produced and name and name not in types and variable in bound:
                types[name] = TensorType(bound[variable])


class _View:
    """Makes `Node`s out of protos, given what is known of the values around them."""

    def __init__(self, opsets: Mapping[str, int], types: Mapping[str, ValueType], constants: Mapping[str, Any]) -> None:
        self.opsets, self.types, self.constants = opsets, types, constants

    def node(self, proto: onnx.NodeProto, name: str) -> Node:
        domain = _domain(proto.domain)
        opset = self.opsets.get(domain, 1)
        return Node(
            name=name,
            domain=domain,
            op_type=proto.op_type,
            version=since_version(domain, proto.op_type, opset),
            opset=opset,
            inputs=tuple(proto.input),
            outputs=tuple(proto.output),
            input_types=tuple(self.types.get(n) for n in proto.input),
            output_types=tuple(self.types.get(n) for n in proto.output),
            attributes={a.name: attribute_value(a) for a in proto.attribute if not _is_graph(a)},
            constants={i: self.constants[n] for i, n in enumerate(proto.input) if n in self.constants},
            bodies=tuple(self._body(body, self._handed_in(proto)) for body in bodies_of(proto)),
            captures=(captures := tuple(captures_of(proto))),
            capture_types=tuple(self.types.get(n) for n in captures),
            proto=proto,
        )

    def _handed_in(self, proto: onnx.NodeProto) -> list[ValueType | None]:
        """Return what is known of a body's inputs from the loop around it; sizes may change from trip to trip."""
        types = [self.types.get(name) for name in proto.input]
        if proto.op_type == "Loop":
            return [TensorType("int64", ()), TensorType("bool", ()), *map(_of_any_shape, types[2:])]
        return list(map(_of_any_shape, types))

    def _body(self, graph: onnx.GraphProto, handed_in: Sequence[ValueType | None]) -> tuple[Node, ...]:
        view = _View(self.opsets, {**self.types, **self._body_types(graph, handed_in)}, self._body_constants(graph))
        return tuple(view.node(node, node.name or f"{node.op_type}_{index}") for index, node in enumerate(graph.node))

    def _body_constants(self, graph: onnx.GraphProto) -> dict[str, Any]:
        own = {t.name: numpy_helper.to_array(t) for t in graph.initializer if not is_external(t)}
        return {**self.constants, **own}

    def _body_types(self, graph: onnx.GraphProto, handed_in: Sequence[ValueType | None]) -> dict[str, ValueType]:
        """Infer inside a body as if it were a model whose captures are inputs: onnx does not report types there."""
        outer = dict.fromkeys(_free_names(graph))
        model = onnx.ModelProto(ir_version=onnx.IR_VERSION)
        for domain, version in self.opsets.items():
            model.opset_import.add(domain=domain, version=version)
        model.graph.CopyFrom(graph)
        for value, known in zip(model.graph.input, handed_in, strict=False):
            if known is not None and from_type_proto(value.type) is None:
                value.type.CopyFrom(to_type_proto(known))
        for name in outer:
            if (type_ := self.types.get(name)) is not None:
                model.graph.input.append(onnx.ValueInfoProto(name=name, type=to_type_proto(type_)))
        try:
            inferred = shape_inference.infer_shapes(model).graph
        except shape_inference.InferenceError:
            inferred = graph
        found: dict[str, ValueType] = {}
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            if (type_ := from_type_proto(value.type)) is not None:
                found[value.name] = type_
        return found


def _of_any_shape(type_: ValueType | None) -> ValueType | None:
    return TensorType(type_.dtype) if isinstance(type_, TensorType) else type_


def _free_names(graph: onnx.GraphProto) -> Iterable[str]:
    node = onnx.NodeProto()
    node.attribute.append(onnx.AttributeProto(name="body", type=onnx.AttributeProto.GRAPH, g=graph))
    return captures_of(node)


def _is_graph(attribute: onnx.AttributeProto) -> bool:
    return attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
