"""What onnxruntime's list of kernels says about a node, whatever provider the list is of; it is handed in as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from accelrt.graph.node import Node
from accelrt.graph.types import OptionalType, SequenceType, TensorType, ValueType

_OPEN_ENDED = 2**31 - 1

_NAMES = {
    "float32": "float", "float64": "double", "float8_e4m3fn": "float8e4m3fn", "float8_e4m3fnuz": "float8e4m3fnuz",
    "float8_e5m2": "float8e5m2", "float8_e5m2fnuz": "float8e5m2fnuz", "float8_e8m0fnu": "float8e8m0",
    "float4_e2m1fn": "float4e2m1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel:
    """One entry: an operator, the versions of it that the kernel takes, and the types, by variable or parameter."""

    domain: str
    op_name: str
    version_range: tuple[int, int]
    type_constraints: Mapping[str, Sequence[str]]


class KernelTable:
    """The kernels of one provider.

    Args:
        kernels: As onnxruntime lists them, or as `Kernel`.
        owner: Whose they are, as refusals have it: ``CPU``.
    """

    def __init__(self, kernels: Iterable[Any], owner: str) -> None:
        self._owner = owner
        self._kernels: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for kernel in kernels:
            self._kernels[kernel.domain, kernel.op_name].append(kernel)

    def takes(self, node: Node, dtype: str) -> bool:
        """Whether any kernel of a node's operator has a place for a data type: ``float16``."""
        kernels = self._kernels.get((node.domain, node.op_type), [])
        wanted = f"tensor({_NAMES.get(dtype, dtype)})"
        return any(wanted in types for kernel in kernels for types in kernel.type_constraints.values())

    def missing(self, node: Node) -> str | None:
        """Return why no kernel takes a node; None if one does, or if it may be a function of nodes that have some."""
        if node.op_type == "Constant" and not node.domain:
            return None  # made an initialiser before kernels are looked for
        kernels = self._kernels.get((node.domain, node.op_type), [])
        fitting = [kernel for kernel in kernels if _version_fits(kernel.version_range, node.version)]
        if not fitting:
            # An operator without a kernel may still be a function of operators that have one: the trial tells.
            if _is_function(node):
                return None
            versions = ", ".join(f"{a}-{b if b != _OPEN_ENDED else ''}" for a, b in (k.version_range for k in kernels))
            return f"no {self._owner} kernel for {node.kind}" + (
                f"; kernels cover versions {versions}" if versions else ""
            )
        bound = _bound_types(node)
        problems = [problem for kernel in fitting if (problem := _type_problem(kernel.type_constraints, bound))]
        if len(problems) == len(fitting) and not _is_function(node):
            return f"no {self._owner} kernel for {node.kind} with {problems[0]}"
        return None


def newest_versions(accepts: Callable[[onnx.ModelProto], bool], schemas: Iterable[Any]) -> tuple[dict[str, int], int]:
    """Return the newest opset by domain, and the newest IR version, that onnxruntime takes.

    Schemas of an opset that is still being drafted are listed as well, but models of it are refused; and nothing tells
    the IR version. So both are found by trying downwards.

    Args:
        accepts: Whether a session takes a model.
        schemas: As ``get_all_operator_schema`` lists them.
    """
    opsets: dict[str, int] = {}
    for schema in schemas:
        opsets[schema.domain] = max(opsets.get(schema.domain, 0), schema.since_version)
    limit = opsets.get("", 0)
    opsets[""] = next((v for v in range(limit, 7, -1) if accepts(_identity_model(v, 8))), 7)
    ir_version = next((v for v in range(onnx.IR_VERSION, 7, -1) if accepts(_identity_model(13, v))), 7)
    return opsets, ir_version


def _identity_model(opset: int, ir_version: int) -> onnx.ModelProto:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "trial", ports[:1], ports[1:])
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, ir_version=ir_version, opset_imports=opsets)


def _version_fits(version_range: tuple[int, int], since: int) -> bool:
    start, end = version_range
    # An open end means "as of this version of the operator": a newer form needs a kernel of its own.
    return since == start if end == _OPEN_ENDED else start <= since <= end


def _is_function(node: Node) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, node.opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    # The stubs of onnx 1.23 leave these two out.
    return any(getattr(schema, name) for name in ("has_function", "has_context_dependent_function"))


def _bound_types(node: Node) -> dict[str, str]:
    """Map an operator's type variables, and its parameters' names, to onnxruntime's names of the types they take."""
    try:
        schema = onnx.defs.get_schema(node.op_type, node.opset, node.domain)
    except onnx.defs.SchemaError:
        return {}
    bound: dict[str, str] = {}
    for parameters, types in ((schema.inputs, node.input_types), (schema.outputs, node.output_types)):
        for index, type_ in enumerate(types):
            if type_ is None or not parameters:
                continue
            parameter = parameters[min(index, len(parameters) - 1)]
            name = _ort_name(type_)
            bound[parameter.name] = name
            bound.setdefault(parameter.type_str, name)
    return bound


def _type_problem(constraints: Mapping[str, list[str]], bound: Mapping[str, str]) -> str | None:
    for variable, allowed in constraints.items():
        if (type_ := bound.get(variable)) is not None and allowed and type_ not in allowed:
            return f"{variable} = {type_}"
    return None


def _ort_name(type_: ValueType) -> str:
    match type_:
        case TensorType(dtype):
            return f"tensor({_NAMES.get(dtype, dtype)})"
        case SequenceType(element):
            return f"seq({_ort_name(element)})"
        case OptionalType(element):
            return f"optional({_ort_name(element)})"
