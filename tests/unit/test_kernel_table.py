"""What onnxruntime's list of kernels says, with that of the CUDA provider of onnxruntime-gpu 1.31.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import helper

from accelrt.graph.kernel_table import Kernel, KernelTable, newest_versions
from accelrt.graph.load import load_graph
from accelrt.graph.node import Node

_LISTED = (
    Path(__file__).parents[1] / "stand_ins" / "nvidia" / "onnxruntime_cuda_stand_in" / "capi" / "cuda_kernels.json"
)


@pytest.fixture(scope="module")
def table() -> KernelTable:
    data = json.loads(_LISTED.read_text())
    assert len(data["kernels"]) == 1565
    return KernelTable(
        (
            Kernel(domain, name, (start, end), {key: data["types"][index] for key, index in types.items()})
            for domain, name, start, end, types in data["kernels"]
        ),
        "CUDA",
    )


def node(operator: str, dtype: str = "float32", opset: int = 21, **attributes: Any) -> Node:
    elem = {"float32": 1, "float16": 10, "int32": 6, "bfloat16": 16, "uint8": 2, "float64": 11}[dtype]
    made = helper.make_node(operator, ["x"], ["y"], name="n", **attributes)
    ports = [helper.make_tensor_value_info(name, elem, [2, 3]) for name in "xy"]
    graph = helper.make_graph([made], "g", ports[:1], ports[1:])
    (found,) = load_graph(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])).nodes
    return found


@pytest.mark.parametrize(
    ("operator", "dtype", "reason"),
    [
        ("Relu", "float32", None),
        ("Relu", "float16", None),
        ("Erf", "float32", None),
        ("Acos", "float32", "no CUDA kernel for Acos-7"),
        ("Tan", "float64", "no CUDA kernel for Tan-7"),
        ("Round", "bfloat16", "no CUDA kernel for Round-22"),
        ("Mish", "float32", None),  # a function of operators that have kernels: a trial tells
    ],
)
def test_a_missing_kernel_is_named(table: KernelTable, operator: str, dtype: str, reason: str | None) -> None:
    found = table.missing(node(operator, dtype, opset=22 if dtype == "bfloat16" else 21))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(reason), found


def test_versions_count(table: KernelTable) -> None:
    only = KernelTable([Kernel("", "Acos", (6, 6), {})], "CUDA")
    assert only.missing(node("Acos")) == "no CUDA kernel for Acos-7; kernels cover versions 6-6"
    open_ended = KernelTable([Kernel("", "Acos", (7, 2**31 - 1), {})], "CUDA")
    assert open_ended.missing(node("Acos")) is None
    # An open end means the operator as it was then: a newer form of it wants a kernel of its own.
    assert open_ended.missing(node("Acos", opset=22)) is not None


def test_data_types_that_an_operator_has_a_place_for(table: KernelTable) -> None:
    assert table.takes(node("Relu"), "float16")
    assert not table.takes(node("Acos"), "float16")


def test_the_newest_versions_are_found_by_trying() -> None:
    state = onnxruntime.capi.onnxruntime_pybind11_state
    asked = []

    def accepts(model: onnx.ModelProto) -> bool:
        asked.append((model.opset_import[0].version, model.ir_version))
        return model.opset_import[0].version <= 19 and model.ir_version <= 9

    opsets, ir_version = newest_versions(accepts, state.get_all_operator_schema())
    assert (opsets[""], ir_version) == (19, 9)
    assert opsets["ai.onnx.ml"] >= 5
    assert asked == sorted(asked[: asked.index((19, 8)) + 1], reverse=True) + asked[asked.index((19, 8)) + 1 :]
