"""What onnxruntime's CPU provider supports, from its own lists of kernels and, where they cannot tell, by trial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx

from accelrt.backend import SUPPORTED, Verdict
from accelrt.graph.kernel_table import KernelTable, newest_versions
from accelrt.graph.node import Node
from accelrt.graph.trial import lower_versions, single_node_model
from accelrt_cpu.deviations import deviation

_PROVIDER = "CPUExecutionProvider"


class Knowledge:
    """The answers for one installed onnxruntime, remembered by signature of the node."""

    def __init__(self, ort: Any) -> None:
        self._ort = ort
        state = ort.capi.onnxruntime_pybind11_state
        self._table = KernelTable(_listed(state), "CPU")
        self._opsets, self._ir_version = newest_versions(self._accepts, state.get_all_operator_schema())
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
        if not self._table.takes(node, dtype):
            return f"no CPU kernel for {node.kind} with {dtype}"
        return (
            f"onnxruntime's CPU kernels for {dtype} compute no products, so {node.op_type} stays in float32 beside them"
        )

    def _refusal(self, node: Node) -> str | None:
        if node.domain in self._opsets and node.version > self._opsets[node.domain]:
            return f"{node.kind} is newer than opset {self._opsets[node.domain]}, the newest that onnxruntime knows"
        if (reason := self._table.missing(node)) is not None:
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

    def _trial(self, node: Node) -> str | None:
        model = single_node_model(node)
        if (problem := self.lower(model)) is not None:
            return problem
        try:
            self._session(model)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen classes that share no base
            return f"refused on trial: {_short(error)}"
        return None

    def _accepts(self, model: onnx.ModelProto) -> bool:
        try:
            self._session(model)
        except Exception:  # noqa: BLE001 - an unknown version is what is being looked for
            return False
        return True

    def _session(self, model: onnx.ModelProto) -> None:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._ort.InferenceSession(model.SerializeToString(), options, providers=[_PROVIDER])


def _listed(state: Any) -> Iterable[Any]:
    """Return the CPU's kernels.

    The list of all providers' is asked last: a build for CUDA whose libraries are not all there, TensorRT's included,
    ends the process that asks it (segmentation fault, onnxruntime-gpu 1.31.1).
    """
    listed: Iterable[Any]
    if (of_one := getattr(state, "get_registered_ep_kernel_defs", None)) is not None:
        listed = of_one(_PROVIDER)
    else:
        listed = state.get_all_opkernel_def()
    return [kernel for kernel in listed if kernel.provider == _PROVIDER]


def _in_body(node: Node, reason: str) -> str:
    return f"its body holds {node.name!r} ({node.kind}): {reason}"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
