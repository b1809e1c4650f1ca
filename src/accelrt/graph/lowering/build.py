"""Strings kernels together as a ``torch.fx.GraphModule``: straight Python code without an interpreter."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from accelrt.errors import CompileError
from accelrt.graph.convert import from_type_proto
from accelrt.graph.lowering import host
from accelrt.graph.lowering.dtypes import Tensor, same_bits, to_numpy, to_torch, torch_dtype
from accelrt.graph.lowering.functions import expansion
from accelrt.graph.lowering.kernels import control
from accelrt.graph.lowering.table import CONTROL, Entry, entry_for, lowerable
from accelrt.graph.model import Graph, bodies_of
from accelrt.graph.node import Node
from accelrt.graph.types import OptionalType, SequenceType, Signature, TensorType, ValueType, static_bytes

FOLD_BYTES = 1 << 20
"""Constants are computed at lowering up to this size; beyond, the weights they come from are the smaller thing."""


@dataclass(frozen=True, eq=False)
class Lowered:
    """A lowered graph.

    Attributes:
        module: Takes the inputs in signature order, returns a tuple of the outputs in signature order: tensors of
            `accelrt.graph.lowering.dtypes.torch_dtype` of the declared type, lists for sequences, None for an empty
            optional.
        signature: Inputs and outputs of the graph.
        depends: Why ``torch.jit.trace`` or ``torch.export`` would not see all that the module does: the places where
            what it does depends on the values of tensors. Empty if there are none.
    """

    module: Any
    signature: Signature
    depends: tuple[str, ...]

    @property
    def static(self) -> bool:
        """Whether the module does the same for all values of its inputs, so that it can be traced."""
        return not self.depends

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Compute outputs by name from arrays by name, on the device of the weights."""
        device = next(iter(self.module.buffers()), torch.empty(0)).device
        arguments = [_fed(feeds.get(port.name), device) for port in self.signature.inputs]
        with torch.inference_mode():
            results = self.module(*arguments)
        return {
            port.name: _fetched(value, port.type) for port, value in zip(self.signature.outputs, results, strict=True)
        }


def _fed(value: Any, device: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [_fed(item, device) for item in value]
    return to_torch(np.asarray(value)).to(device)


def _fetched(value: Any, type_: ValueType) -> Any:
    if isinstance(type_, OptionalType):
        return None if value is None else _fetched(value, type_.element)
    if isinstance(type_, SequenceType):
        return [_fetched(item, type_.element) for item in value]
    return to_numpy(value, type_.dtype)


def lower_graph(graph: Graph, device: Any) -> Lowered:
    """Lower a graph; see `accelrt.graph.lowering.lower`."""
    problems = dict.fromkeys(problem for node in graph.nodes if (problem := lowerable(node)) is not None)
    problems.update(dict.fromkeys(_port_problems(graph)))
    if problems:
        raise CompileError(
            f"The graph cannot be lowered to torch: {'; '.join(problems)}.",
            hint="Partition it first: what `lowerable` refuses goes to another engine.",
        )
    writer = _Writer(torch.device(device))
    scope = writer.scope()
    for port in graph.signature.inputs:
        scope[port.name] = _Value(writer.placeholder(port.name))
    for name in graph.initializers:
        scope[name] = writer.weight(graph, name)
    writer.nodes(graph.nodes, scope)
    module = writer.finish([scope[value.name] for value in graph.proto.graph.output])
    return Lowered(module, graph.signature, tuple(dict.fromkeys(writer.depends)))


def _port_problems(graph: Graph) -> list[str]:
    problems = []
    if graph.proto.graph.sparse_initializer:
        problems.append("sparse initialisers are not lowered")
    for port in (*graph.signature.inputs, *graph.signature.outputs):
        if "string" in str(port.type):
            problems.append(f"{port.name!r} is text, which torch does not have")
    return problems


@dataclass(eq=False)
class _Value:
    """What is known of a value: a node of the torch graph, a constant, sizes on the host, or several of these.

    ``constant`` is the value itself, as a tensor; ``sizes`` a torch graph node that yields Python numbers, or the
    numbers; ``node`` the torch graph node that yields the tensor, made when it is first asked for.
    """

    node: Any = None
    constant: Tensor | None = None
    sizes: Any = None
    dtype: str | None = None

    @property
    def folds(self) -> bool:
        return self.constant is not None and self.constant.numel() * self.constant.element_size() <= FOLD_BYTES

    @property
    def is_sizes(self) -> bool:
        """Whether arithmetic on it can be done with Python numbers."""
        if self.sizes is not None:
            return True
        constant = self.constant
        return constant is not None and constant.dtype in (torch.int64, torch.int32, torch.bool) and constant.dim() <= 1


_NOTHING = _Value()


class _Writer:
    """Writes one torch graph; bodies of control flow get writers of their own."""

    def __init__(self, device: Any, depends: list[str] | None = None) -> None:
        self.device = device
        self.depends: list[str] = [] if depends is None else depends
        self.graph = torch.fx.Graph()
        self.root = torch.nn.Module()
        self._names: set[str] = set()

    def scope(self) -> dict[str, _Value]:
        return {"": _NOTHING}

    def placeholder(self, name: str) -> Any:
        return self.graph.placeholder(self._unique(name))

    def _unique(self, name: str) -> str:
        base = re.sub(r"\W", "_", name) or "value"
        base = f"v_{base}" if base[0].isdigit() or base[0] == "_" else base
        unique, count = base, 1
        while unique in self._names or hasattr(self.root, unique):
            unique, count = f"{base}_{count}", count + 1
        self._names.add(unique)
        return unique

    def weight(self, graph: Graph, name: str) -> _Value:
        array = graph.weights[name].numpy() if name in graph.weights else graph.constants[name]
        return _Value(constant=to_torch(array), dtype=array.dtype.name, node=_Lazy(name))

    def finish(self, outputs: Sequence[_Value]) -> Any:
        self.graph.output(tuple(self.tensor(value) for value in outputs))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = torch.fx.GraphModule(self.root, self.graph, "Lowered")
        return module.eval()

    # Values as arguments

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return self.graph.call_function(function, args, kwargs or {})

    def tensor(self, value: _Value) -> Any:
        """Return what stands for a value as a tensor (or list, or None) in the torch graph."""
        if value is _NOTHING:
            return None
        if value.constant is not None and (value.node is None or isinstance(value.node, _Lazy)):
            value.node = self.buffer(value.constant, value.node.name if value.node else "constant")
        elif value.node is None:
            dtype = torch_dtype(value.dtype or "int64")
            value.node = self.call(host.as_tensor, (value.sizes,), {"dtype": dtype, "device": self.device})
        return value.node

    def buffer(self, tensor: Tensor, name: str) -> Any:
        name = self._unique(name)
        self.root.register_buffer(name, tensor.to(self.device))
        return self.graph.get_attr(name)

    def numbers(self, value: _Value, reason: str) -> Any:
        """Return what stands for a value as Python numbers."""
        if value is _NOTHING:
            return None
        if value.constant is not None:
            return value.constant.tolist()
        if value.sizes is None:
            self.depends.append(reason)
            value.sizes = self.call(host.as_numbers, (value.node,))
        return value.sizes

    # Nodes

    def nodes(self, nodes: Sequence[Node], scope: dict[str, _Value]) -> None:
        for node in nodes:
            results = self.node(node, scope)
            for name, value in zip(node.outputs, results, strict=False):
                if name:
                    scope[name] = value

    def node(self, node: Node, scope: dict[str, _Value]) -> Sequence[_Value]:
        inputs = [scope[name] for name in node.inputs]
        if not node.domain and node.op_type == "CastLike":
            inputs = inputs[:1]  # of the second, the type alone matters, and that is known
        if not node.domain and node.op_type in CONTROL:
            return _Control(self, node, inputs, scope).write()
        if not node.domain and node.op_type == "Constant":
            return [self._constant(node)]
        if (sizes := self._on_host(node, inputs)) is not None:
            return [_Value(sizes=sizes, dtype=node.output_dtype(0) or "int64")]
        entry = entry_for(node)
        if entry is None:
            return self._expanded(node, inputs)
        if self._foldable(node, entry, inputs):
            return self._folded(node, entry, inputs)
        if entry.depends:
            self.depends.append(entry.depends)
        return self._called(node, entry, inputs)

    def _constant(self, node: Node) -> _Value:
        attributes = dict(node.attributes)
        name, value = next(iter(attributes.items()))
        kind = np.float32 if "float" in name else np.int64
        array = value if name == "value" else np.array(value, kind)
        return _Value(constant=to_torch(array, copy=True), dtype=array.dtype.name, node=_Lazy(node.outputs[0]))

    def _expanded(self, node: Node, inputs: Sequence[_Value]) -> Sequence[_Value]:
        graph = expansion(node)
        if isinstance(graph, str):
            raise CompileError(f"{node.name!r} ({node.op_type}) cannot be lowered to torch: {graph}.")
        inner = self.scope()
        inner.update(zip(node.inputs, inputs, strict=True))
        inner[""] = _NOTHING
        for name in graph.initializers:
            if name not in inner:
                inner[name] = self.weight(graph, name)
        self.nodes(graph.nodes, inner)
        return [inner[name] if name else _NOTHING for name in node.outputs]

    # Folding

    def _foldable(self, node: Node, entry: Entry, inputs: Sequence[_Value]) -> bool:
        present = [value for value in inputs if value is not _NOTHING]
        if not all(value.folds for value in present) or not node.outputs or entry.kernel.startswith("sequence"):
            return False
        sizes = [static_bytes(type_) for type_ in node.output_types if type_ is not None]
        grows = node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range", "EyeLike", "Pad", "Resize", "Upsample")
        return all(size <= FOLD_BYTES if size is not None else not grows for size in sizes)

    def _folded(self, node: Node, entry: Entry, inputs: Sequence[_Value]) -> Sequence[_Value]:
        """Compute a node now: all its inputs are constants."""
        inner = _Writer(torch.device("cpu"))
        copies = [v if v is _NOTHING else _Value(constant=v.constant, dtype=v.dtype) for v in inputs]
        outputs = inner._called(node, entry, copies)[: len(node.outputs)]
        with torch.no_grad():
            results = inner.finish(outputs)()
        names = [self._dtype(node, index) for index in range(len(node.outputs))]
        return [
            _Value(constant=result.clone(), dtype=name) if isinstance(result, torch.Tensor) else _NOTHING
            for result, name in zip(results, names, strict=False)
        ]

    @staticmethod
    def _dtype(node: Node, index: int) -> str | None:
        type_ = node.output_types[index]
        return type_.dtype if isinstance(type_, TensorType) else None

    # Sizes

    def _on_host(self, node: Node, inputs: Sequence[_Value]) -> Any:
        """Return the torch graph node that computes sizes with Python numbers, None if this is no such node."""
        if node.domain or node.op_type not in _HOST:
            return None
        if node.op_type in ("Shape", "Size", "SequenceLength"):
            if inputs[0].constant is not None:
                return None
            arguments = {k: v for k, v in node.attributes.items() if k in ("start", "end")}
            return self.call(_HOST[node.op_type], (self.tensor(inputs[0]),), arguments)
        present = [value for value in inputs if value is not _NOTHING]
        if not any(value.sizes is not None for value in present) or not all(value.is_sizes for value in present):
            return None
        if not _stays_on_host(node):
            return None
        arguments = {}
        if node.op_type in _ARITHMETIC:
            arguments["op"] = node.op_type
        args = [self.numbers(value, "") for value in inputs]
        if node.op_type == "Slice" and node.version < 10:
            args += [list(node.attributes["starts"]), list(node.attributes["ends"])]
        return self.call(_HOST[node.op_type], tuple(args), arguments)

    # Calls

    def _called(self, node: Node, entry: Entry, inputs: Sequence[_Value]) -> list[_Value]:
        kernel = _kernel(entry.kernel)
        args = [self._argument(node, entry, index, value) for index, value in enumerate(inputs)]
        while args and args[-1] is None:
            args.pop()
        result = self.call(kernel, tuple(args), self._keywords(node, entry, kernel))
        if not entry.several:
            return [self._back(node, entry, 0, result)]
        return [
            self._back(node, entry, index, self.call(operator.getitem, (result, index))) if name else _NOTHING
            for index, name in enumerate(node.outputs)
        ]

    def _argument(self, node: Node, entry: Entry, index: int, value: _Value) -> Any:
        if value is _NOTHING:
            return None
        if index in entry.numbers:
            return self.numbers(value, f"{node.op_type} takes input {index} ({node.inputs[index]!r}) as numbers")
        if entry.kernel in _TAKES_NUMBERS and index in _TAKES_NUMBERS[entry.kernel]:
            if (number := _scalar(value)) is not None:
                return number
            if entry.kernel.startswith("sequence."):
                self.depends.append(f"{node.op_type} takes input {index} ({node.inputs[index]!r}) as a number")
        treatment = entry.types.get(node.input_dtype(index) or "", "")
        tensor = self.tensor(value)
        return self.call(_TREAT[treatment.partition(":")[0]], (tensor, _target(treatment))) if treatment else tensor

    def _back(self, node: Node, entry: Entry, index: int, result: Any) -> _Value:
        dtype = self._dtype(node, index)
        treatment = entry.types.get(dtype or "", "")
        if treatment:
            back = {"cast": _cast, "view": _view, "order": _unorder}[treatment.partition(":")[0]]
            result = self.call(back, (result, torch_dtype(str(dtype))))
        return _Value(node=result, dtype=dtype)

    def _keywords(self, node: Node, entry: Entry, kernel: Callable[..., Any]) -> dict[str, Any]:
        wanted, open_ended = _parameters(kernel)
        if wanted is None:
            return {}
        keywords = {**entry.extra}
        for name, value in node.attributes.items():
            if name in wanted or (open_ended and name in _CONVOLUTION):
                keywords[name] = self._attribute(value)
            elif not open_ended and name not in _IGNORED:
                raise CompileError(f"{node.name!r} ({node.op_type}) has the attribute {name!r}, which is not lowered.")
        context: dict[str, Any] = {
            "onnx_dtype": self._dtype(node, 0),
            "device": self.device,
            "version": node.version,
            "outputs": len(node.outputs) if node.op_type == "Split" else _last_output(node),
        }
        if "dtype" in wanted:
            context["dtype"] = torch_dtype(str(self._dtype(node, 0)))
        keywords.update({name: value for name, value in context.items() if name in wanted})
        return keywords

    def _attribute(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.reshape(-1).astype(np.float64 if value.dtype.kind not in "biu" else value.dtype).tolist()[0]
        if isinstance(value, tuple):
            return list(value)
        return value


@dataclass(frozen=True, slots=True)
class _Lazy:
    """The name under which a constant becomes a buffer when a tensor of it is wanted."""

    name: str


def _last_output(node: Node) -> int:
    return max((index + 1 for index, name in enumerate(node.outputs) if name), default=0)


_IGNORED = frozenset({"consumed_inputs", "to", "output_datatype", "dtype", "seed", "round_mode"})
"""Attributes without a bearing on the result, or told by the type of the output."""

_CONVOLUTION = frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"})

_TAKES_NUMBERS = {
    "index.gather": (1,),
    "sequence.sequence_at": (1,),
    "sequence.sequence_insert": (2,),
    "sequence.sequence_erase": (1,),
}
"""Inputs that kernels take as a Python number where it is a known scalar, else as a tensor."""


def _scalar(value: _Value) -> int | None:
    constant = value.constant
    if constant is not None and constant.dim() == 0 and not constant.is_floating_point():
        return int(constant)
    return None


@cache
def _kernel(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    if module.startswith("torch"):
        found: Any = torch
        for part in (*module.split(".")[1:], function):
            found = getattr(found, part)
        return cast("Callable[..., Any]", found)
    found = getattr(import_module(f"accelrt.graph.lowering.kernels.{module}"), function)
    return cast("Callable[..., Any]", found)


@cache
def _parameters(kernel: Callable[..., Any]) -> tuple[frozenset[str] | None, bool]:
    """Return the names of a kernel's parameters, None for torch's own, and whether it takes others."""
    if not getattr(kernel, "__module__", "").startswith("accelrt."):
        return None, False
    parameters = inspect.signature(kernel).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


# Data types on the way in and out of kernels


def _cast(x: Tensor, dtype: Any) -> Tensor:
    return x.to(dtype)


def _view(x: Tensor, dtype: Any) -> Tensor:
    return same_bits(x, dtype)


def _order(x: Tensor, dtype: Any) -> Tensor:
    """Bring uint64 to the int64 of the same place in order."""
    return same_bits(x, dtype) ^ torch.iinfo(dtype).min


def _unorder(x: Tensor, dtype: Any) -> Tensor:
    return same_bits(x ^ torch.iinfo(x.dtype).min, dtype)


_TREAT = {"cast": _cast, "view": _view, "order": _order}


def _target(treatment: str) -> Any:
    return torch_dtype(treatment.partition(":")[2])


# Sizes


_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Equal", "Less", "Greater", "And", "Or"})
_HOST: dict[str, Callable[..., Any]] = {
    "Shape": host.shape,
    "Size": host.size,
    "SequenceLength": host.length,
    "Gather": host.gather,
    "Slice": host.slice_,
    "Concat": host.concat,
    "Unsqueeze": host.unsqueeze,
    "Squeeze": host.squeeze,
    "Identity": host.identity,
    "Cast": host.identity,
    "Not": host.negate,
    "Where": host.where,
    **dict.fromkeys(_ARITHMETIC, host.elementwise),
}


_LOGIC = frozenset({"Equal", "Less", "Greater", "And", "Or", "Not"})


def _stays_on_host(node: Node) -> bool:
    """Whether Python numbers can take the node: integers of rank 0 and 1 throughout."""
    output = node.output_types[0]
    if not isinstance(output, TensorType) or output.shape is None or len(output.shape) > 1:
        return False
    if output.dtype != ("bool" if node.op_type in _LOGIC else "int64"):
        return False
    if node.op_type == "Cast" and node.input_dtype(0) == "bool":
        return False
    if node.op_type == "Mod" and node.attributes.get("fmod", 0):
        return False
    shapes = [node.input_shape(index) for index in range(len(node.inputs)) if node.has_input(index)]
    if any(shape is None or len(shape) > 1 for shape in shapes):
        return False
    ranks = [len(shape) for shape in shapes if shape is not None]
    if node.op_type in _ARITHMETIC:
        return node.version >= 7
    if node.op_type == "Unsqueeze":
        return ranks[0] == 0
    if node.op_type == "Squeeze":
        return ranks[0] == 1 and len(output.shape) == 0
    if node.op_type == "Concat":
        return all(rank == 1 for rank in ranks)
    if node.op_type == "Gather":
        return ranks[0] == 1 and all(not k.startswith("axis") or v in (0, -1) for k, v in node.attributes.items())
    if node.op_type == "Slice":
        return ranks[0] == 1
    return True


# Control flow


class _Control:
    """Writes an If, Loop or Scan: each body becomes a module, called with what it captures."""

    def __init__(self, writer: _Writer, node: Node, inputs: Sequence[_Value], scope: Mapping[str, _Value]) -> None:
        self.writer, self.node, self.inputs, self.scope = writer, node, inputs, scope
        names = (attribute.name for attribute in node.proto.attribute if attribute.HasField("g"))
        self.graphs = dict(zip(names, bodies_of(node.proto), strict=True))
        self.views = dict(zip(self.graphs, node.bodies, strict=True))
        self.captures = [name for name in node.captures if scope[name].constant is None]

    def write(self) -> Sequence[_Value]:
        return {"If": self._if, "Loop": self._loop, "Scan": self._scan}[self.node.op_type]()

    def _results(self, result: Any) -> list[_Value]:
        return [
            _Value(node=self.writer.call(operator.getitem, (result, index)), dtype=_Writer._dtype(self.node, index))
            if name
            else _NOTHING
            for index, name in enumerate(self.node.outputs)
        ]

    def _captured(self) -> list[Any]:
        return [self.writer.tensor(self.scope[name]) for name in self.captures]

    def _if(self) -> Sequence[_Value]:
        condition = self.inputs[0]
        if condition.constant is not None:
            chosen = "then_branch" if bool(condition.constant.reshape(-1)[0]) else "else_branch"
            return self._inlined(chosen)
        self.writer.depends.append(f"If {self.node.name!r} chooses by a value")
        branches = [self._body(name) for name in ("then_branch", "else_branch")]
        return self._results(
            self.writer.call(control.if_, (self.writer.tensor(condition), *branches, self._captured()))
        )

    def _inlined(self, name: str) -> Sequence[_Value]:
        graph = self.graphs[name]
        inner = dict(self.scope)
        for tensor in graph.initializer:
            inner[tensor.name] = _initializer(tensor)
        self.writer.nodes(self.views[name], inner)
        return [inner[value.name] for value in graph.output]

    def _body(self, name: str, inputs: Sequence[str] = ()) -> Any:
        """Lower a body to a module of its inputs and the captures; return what stands for it."""
        graph = self.graphs[name]
        inner = _Writer(self.writer.device, self.writer.depends)
        scope = {"": _NOTHING}
        for capture in self.node.captures:
            outer = self.scope[capture]
            if outer.constant is not None:
                scope[capture] = _Value(constant=outer.constant, dtype=outer.dtype, node=_Lazy(capture))
        for value in graph.input:
            scope[value.name] = _Value(inner.placeholder(value.name))
        for capture in self.captures:
            scope[capture] = _Value(inner.placeholder(capture), dtype=self.scope[capture].dtype)
        for tensor in graph.initializer:
            scope[tensor.name] = _initializer(tensor)
        inner.nodes(self.views[name], scope)
        module = inner.finish([scope[value.name] for value in graph.output])
        attribute = self.writer._unique(f"{self.node.op_type}_{name}")
        self.writer.root.add_module(attribute, module)
        return self.writer.graph.get_attr(attribute)

    def _empty(self, start: int) -> list[Any]:
        """Return what scan outputs are without a single trip, of the declared type; unknown sizes are 0."""
        body = self.graphs["body"]
        results = []
        for value in list(body.output)[start:]:
            type_ = from_type_proto(value.type) or _inferred(self.node, value.name)
            dtype = type_.dtype if isinstance(type_, TensorType) else "float32"
            shape = (type_.shape or ()) if isinstance(type_, TensorType) else ()
            sizes = [0, *(size if isinstance(size, int) else 0 for size in shape)]
            results.append(self.writer.buffer(torch.zeros(sizes, dtype=torch_dtype(dtype)), "empty"))
        return results

    def _loop(self) -> Sequence[_Value]:
        trips, condition, states = self.inputs[0], self.inputs[1], self.inputs[2:]
        self.writer.depends.append(f"Loop {self.node.name!r} ends by a value")
        trip_count = None if trips is _NOTHING else self.writer.tensor(trips)
        scans = len(self.graphs["body"].output) - 1 - len(states)
        result = self.writer.call(
            control.loop,
            (
                trip_count,
                None if condition is _NOTHING else self.writer.tensor(condition),
                [self.writer.tensor(state) for state in states],
                self._body("body"),
                self._captured(),
            ),
            {"scans": scans, "empty": self._empty(1 + len(states)), "device": self.writer.device},
        )
        return self._results(result)

    def _scan(self) -> Sequence[_Value]:
        attributes = self.node.attributes
        count = int(attributes["num_scan_inputs"])
        states, inputs = self.inputs[:-count], self.inputs[-count:]
        scans = len(self.graphs["body"].output) - len(states)
        result = self.writer.call(
            control.scan,
            (
                [self.writer.tensor(state) for state in states],
                [self.writer.tensor(value) for value in inputs],
                self._body("body"),
                self._captured(),
            ),
            {
                "input_axes": list(attributes.get("scan_input_axes", [0] * count)),
                "input_directions": list(attributes.get("scan_input_directions", [0] * count)),
                "output_axes": list(attributes.get("scan_output_axes", [0] * scans)),
                "output_directions": list(attributes.get("scan_output_directions", [0] * scans)),
                "empty": self._empty(len(states)),
            },
        )
        return self._results(result)


def _initializer(tensor: onnx.TensorProto) -> _Value:
    array = numpy_helper.to_array(tensor)
    return _Value(constant=to_torch(array, copy=True), dtype=array.dtype.name, node=_Lazy(tensor.name))


def _inferred(node: Node, name: str) -> ValueType | None:
    for body in node.bodies:
        for inner in body:
            for output, type_ in zip(inner.outputs, inner.output_types, strict=True):
                if output == name:
                    return type_
    return None
