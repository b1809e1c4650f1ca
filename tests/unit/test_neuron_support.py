"""The vendor's operator lists, and ONNX's operators in their words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from accelrt.graph.load import load_graph
from accelrt_neuron import support
from accelrt_neuron.support import LISTS, TORCH_NEURON, VendorList, mapped_operators, verdict

ALL_LISTS = sorted({one for lists in LISTS.values() for one in lists}, key=lambda one: one.file)


def one_node(op: str, shapes: list[Any], out: Any, consts: Mapping[int, Any] | None = None, dtype: int = 1,
             out_dtype: int | None = None, opset: int = 20, dtypes: Mapping[int, int] | None = None,
             outputs: int = 1, **attributes: Any) -> Any:  # fmt: skip
    """Return the one node of a model as engines see it."""
    names = [f"i{index}" for index in range(len(shapes) + len(consts or {}))]
    values, tensors, open_shapes = [], [], iter(shapes)
    for index, name in enumerate(names):
        if index in (consts or {}):
            tensors.append(numpy_helper.from_array(np.asarray((consts or {})[index]), name))
        else:
            values.append(helper.make_tensor_value_info(name, (dtypes or {}).get(index, dtype), next(open_shapes)))
    results = [f"o{index}" for index in range(outputs)]
    node = helper.make_node(op, names, results, "n", **attributes)
    kinds = [out_dtype or dtype] + [TensorProto.INT64] * (outputs - 1)
    ports = [helper.make_tensor_value_info(n, k, out) for n, k in zip(results, kinds, strict=True)]
    graph = helper.make_graph([node], "g", values, ports, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return load_graph(model).nodes[0]


def test_lists_have_as_many_operators_as_the_vendors() -> None:
    assert {one.file: len(one.operators) for one in ALL_LISTS} == {
        "torch_neuron_inf1.txt": 173,
        "tf1_neuron_inf1.txt": 116,
        "tf2_neuron.txt": 75,
        "torch_neuronx_aten.txt": 41,
        "xla_neuron_cc.txt": 59,
    }


def test_the_table_names_operators_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert mapped_operators() <= known


@pytest.mark.parametrize("one", ALL_LISTS, ids=lambda one: one.file)
def test_every_list_is_of_use(one: VendorList) -> None:
    """A column of the table in the wrong language would find nothing in its list."""
    spoken = {name for row in support._table().values() for way in support._ways(row[one.column], 2) for name in way}
    assert len(spoken & one.operators) >= min(20, len(one.operators) // 3)


def test_an_embedding_stays_on_the_cpu_of_an_inf1() -> None:
    node = one_node("Gather", [(100, 16), (1, 8)], (1, 8, 16), dtypes={1: TensorProto.INT64})
    refused = verdict(node, "v1")
    assert not refused.supported
    assert "aten::embedding not in the list of torch-neuron (Inf1)" in refused.reason
    assert "neuron-cc-ops-pytorch.rst" in refused.reason
    assert "by the vendor's design" in refused.reason
    assert verdict(node, "v2").supported
    vector = one_node("Gather", [(100, 16), (8,)], (8, 16), dtypes={1: TensorProto.INT64})
    assert verdict(vector, "v1").supported, "aten::index_select is in the list"


@pytest.mark.parametrize("generation", ["v1", "v2", "v3"])
def test_what_every_network_is_made_of_is_taken(generation: Any) -> None:
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    for node in (
        one_node("MatMul", [(2, 3, 4), (2, 4, 5)], (2, 3, 5)),
        one_node("Conv", [(1, 4, 8, 8), (6, 4, 3, 3)], (1, 6, 8, 8), **conv),
        one_node("Conv", [(1, 4, 8, 8), (4, 1, 3, 3)], (1, 4, 8, 8), group=4, **conv),
        one_node("MaxPool", [(1, 4, 8, 8)], (1, 4, 4, 4), kernel_shape=[2, 2], strides=[2, 2]),
        one_node("Softmax", [(2, 8)], (2, 8)),
        one_node("LayerNormalization", [(2, 8), (8,)], (2, 8)),
        one_node("Reshape", [(2, 8)], (4, 4), {1: np.int64([4, 4])}),
        one_node("Gelu", [(2, 8)], (2, 8)),
    ):
        found = verdict(node, generation)
        assert found.supported, (node.kind, found.reason)


@pytest.mark.parametrize(
    "generation, node, text",
    [
        ("v1", one_node("Relu", [("n", 4)], ("n", 4)), "static shapes, every size and the batch included"),
        ("v2", one_node("Relu", [(None, 4)], (None, 4)), "NCC_EMOD025"),
        ("v2", one_node("Relu", [(2, 4)], (2, 4), dtype=TensorProto.DOUBLE), "float64, not a data type"),
        ("v1", one_node("Reshape", [(2, 8), (2,)], (4, 4), dtypes={1: 7}), "decides a shape and is no constant"),
        ("v2", one_node("TopK", [(2, 8)], (2, 3), {1: np.int64([3])}, outputs=2), "aten::topk not in the list"),
        ("v1", one_node("CumSum", [(2, 8)], (2, 8), {1: np.int64(1)}), "aten::cumsum not in the list"),
        ("v2", one_node("NonZero", [(2, 8)], (2, 3), out_dtype=7), "aten::nonzero not in the list"),
        ("v1", one_node("Atan", [(2,)], (2,)), "aten::atan not in the list of torch-neuron (Inf1)"),
        ("v2", one_node("StringNormalizer", [(2,)], (2,), dtype=8), "string, not a data type"),
        ("v2", one_node("DFT", [(1, 8, 2), ()], (1, 8, 2), dtypes={1: 7}, opset=17), "has no counterpart"),
        ("v1", one_node("Resize", [(1, 2, 4, 4)], (1, 2, 8, 8), {1: np.float32([]), 2: np.float32([1, 1, 2, 2])}),
         "asymmetric with floor"),
        ("v1", one_node("Dropout", [(2, 4)], (2, 4), {1: np.float32(0.5), 2: np.bool_(True)}), "training"),
        ("v2", one_node("Conv", [(1, 4, 8, 8), (6, 2, 3, 3)], (1, 6, 6, 6), group=2), "nothing for it in the list"),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else None,
)  # fmt: skip
def test_refusals_name_what_they_rest_on(generation: Any, node: Any, text: str) -> None:
    found = verdict(node, generation)
    assert not found.supported
    assert text in found.reason


def test_a_list_can_be_asked_alone() -> None:
    node = one_node("LRN", [(1, 4, 4, 4)], (1, 4, 4, 4), size=3)
    assert verdict(node, "v1").supported, "TensorFlow's list has it"
    assert not verdict(node, "v1", (TORCH_NEURON,)).supported


def test_an_operator_of_another_domain_is_refused() -> None:
    from dataclasses import replace

    node = replace(one_node("Relu", [(2,)], (2,)), domain="ai.onnx.ml")
    assert "not of ONNX's own domain" in verdict(node, "v1").reason
