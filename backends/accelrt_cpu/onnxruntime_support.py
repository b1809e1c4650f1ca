"""What onnxruntime's CPU provider supports, from its own lists of kernels and, where they cannot tell, by trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import onnx

from accelrt.backend import SUPPORTED, Verdict
from accelrt.graph.node import Node
from accelrt.graph.trial import lower_versions, single_node_model
from accelrt.graph.types import OptionalType, SequenceType, TensorType, ValueType
from accelrt_cpu.deviations import deviation

_OPEN_ENDED = 2**31 - 1

_NAMES = {
    "float32": "float", "float64": "double", "float8_e4m3fn": "float8e4m3fn", "float8_e4m3fnuz": "float8e4m3fnuz",
    "float8_e5m2": "float8e5m2", "float8_e5m2fnuz": "float8e5m2fnuz", "float8_e8m0fnu": "float8e8m0",
    "float4_e2m1fn": "float4e2m1",
}  # fmt: skip


class Knowledge:
    """The answers for one installed onnxruntime, remembered by signature of the node."""

    def __init__(self, ort: Any) -> None:
        self._ort = ort
        state = ort.capi.onnxruntime_pybind11_state
        self._kernels: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for kernel in state.get_all_opkernel_def():
            if kernel.provider == "CPUExecutionProvider":
                self._kernels[kernel.domain, kernel.op_name].append(kernel)
        self._opsets: dict[str, int] = {}
        for schema in state.get_all_operator_schema():
            self._opsets[schema.domain] = max(self._opsets.get(schema.domain, 0), schema.since_version)
        # Schemas of an opset that is still being drafted are listed as well, but models of it are refused.
        self._opsets[""] = self._newest(lambda version: _identity_model(version, 8), self._opsets[""])
        self._ir_version = self._newest(lambda version: _identity_model(13, version), onnx.IR_VERSION)
        self._verdicts: dict[tuple[object, ...], Verdict] = {}

    def lower(self, proto: onnx.ModelProto) -> str | None:
        """Stamp a model with versions that this onnxruntime knows; return the reason if that cannot be done."""
        return lower_versions(proto, self._opsets, self._ir_version)

    def verdict(self, node: Node) -> Verdict:
        """Tell whether onnxruntime runs a node, and rightly."""
        # Deviations may depend on sizes, which the signature leaves out; asking takes a microsecond.
        if (reason := self._deviation(node)) is not None:
            return Verdict.refuse(reason)
        key = node.signature
        if (known := self._verdicts.get(key)) is None:
            reason = self._refusal(node)
            known = self._verdicts[key] = SUPPORTED if reason is None else Verdict.refuse(reason)
        return known

    def lacking(self, node: Node, dtype: str) -> str:
        """Tell why a node is not computed in a float type of 16 bits.

        The kernels that take it carry values about and normalise; products, which are what takes time, have none. To
        cast for the sake of a Reshape would cost more than it could save, so that is refused as well.
        """
        kernels = self._kernels.get((node.domain, node.op_type), [])
        wanted = f"tensor({dtype})"
        if not any(wanted in types for kernel in kernels for types in kernel.type_constraints.values()):
            return f"no CPU kernel for {node.kind} with {dtype}"
        return (
            f"onnxruntime's CPU kernels for {dtype} compute no products, so {node.op_type} stays in float32 beside them"
        )

    def _refusal(self, node: Node) -> str | None:
        if node.domain in self._opsets and node.version > self._opsets[node.domain]:
            return f"{node.kind} is newer than opset {self._opsets[node.domain]}, the newest that onnxruntime knows"
        if (reason := self._missing_kernel(node)) is not None:
            return reason
        for body in node.bodies:
            for inner in body:
                if not (verdict := self.verdict(inner)).supported:
                    return _in_body(inner, verdict.reason)
        return self._trial(node)

    def _deviation(self, node: Node) -> str | None:
        if (reason := deviation(node)) is not None:
            return reason
        for body in node.bodies:
            for inner in body:
                if (reason := self._deviation(inner)) is not None:
                    return _in_body(inner, reason)
        return None

    def _missing_kernel(self, node: Node) -> str | None:
        if node.op_type == "Constant" and not node.domain:
            return None  # made an initialiser before kernels are looked for
        kernels = self._kernels.get((node.domain, node.op_type), [])
        fitting = [kernel for kernel in kernels if _version_fits(kernel.version_range, node.version)]
        if not fitting:
            # An operator without a kernel may still be a function of operators that have one: the trial tells.
            if _is_function(node):
                return None
            versions = ", ".join(f"{a}-{b if b != _OPEN_ENDED else ''}" for a, b in (k.version_range for k in kernels))
            return f"no CPU kernel for {node.kind}" + (f"; kernels cover versions {versions}" if versions else "")
        bound = _bound_types(node)
        problems = [problem for kernel in fitting if (problem := _type_problem(kernel.type_constraints, bound))]
        if len(problems) == len(fitting) and not _is_function(node):
            return f"no CPU kernel for {node.kind} with {problems[0]}"
        return None

    def _trial(self, node: Node) -> str | None:
        model = single_node_model(node)
        if (problem := self.lower(model)) is not None:
            return problem
        try:
            self._session(model)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen classes that share no base
            return f"refused on trial: {_short(error)}"
        return None

    def _session(self, model: onnx.ModelProto) -> None:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _newest(self, model_of: Callable[[int], onnx.ModelProto], limit: int) -> int:
        """Find the newest version that a session takes, by trying downwards: onnxruntime does not tell."""
        for version in range(limit, 7, -1):
            try:
                self._session(model_of(version))
            except Exception:  # noqa: BLE001 - an unknown version is what is being looked for
                continue
            return version
        return 7


def _identity_model(opset: int, ir_version: int) -> onnx.ModelProto:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "trial", ports[:1], ports[1:])
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, ir_version=ir_version, opset_imports=opsets)


def _in_body(node: Node, reason: str) -> str:
    return f"its body holds {node.name!r} ({node.kind}): {reason}"


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


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
