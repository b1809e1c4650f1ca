"""The lowering as a whole: real networks, what can be traced, what is refused, and what must stay untouched."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper

from accelrt.errors import CompileError
from accelrt.graph.load import load_graph
from accelrt.graph.lowering import lower, lowerable
from accelrt.testing import models

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.torch

NETWORKS = {
    "resnet50": lambda: models.resnet50(image=32),
    "densenet121": lambda: models.densenet121(image=32),
    "bert_base": lambda: models.bert_base(layers=2),
    "small_cnn": models.small_cnn,
}


def _feeds(signature: Any, batch: int = 2, sequence: int = 9) -> dict[str, Any]:
    random = np.random.default_rng(7)
    sizes = {"batch": batch, "sequence": sequence}
    feeds = {}
    for port in signature.inputs:
        shape = [sizes.get(dim, dim) for dim in port.type.shape]
        integers = port.type.dtype == "int64"
        feeds[port.name] = random.integers(0, 2, shape) if integers else random.standard_normal(shape).astype("float32")
    return feeds


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], opset: int = 21, **constants: Any) -> Any:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, type_, shape) for name, type_, shape in inputs],
        [helper.make_tensor_value_info(name, type_, shape) for name, type_, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_equal_to_onnxruntime_and_can_be_traced_and_exported(name: str) -> None:
    model = NETWORKS[name]()
    lowered = lower(model)
    feeds = _feeds(lowered.signature)
    expected = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    for value, array in zip(lowered.run(feeds).values(), expected, strict=True):
        assert abs(value - array).max() <= 1e-4 * abs(array).max()
    assert lowered.static and not lowered.depends
    arguments = tuple(torch.from_numpy(feeds[key]) for key in lowered.signature.input_names)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = lowered.module(*arguments)
        assert isinstance(here, tuple)
        for other in (
            torch.jit.trace(lowered.module, arguments, check_trace=False),
            torch.export.export(lowered.module, arguments).module(),
        ):
            for a, b in zip(other(*arguments), here, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_symbolic_batch_and_sequence_survive_export() -> None:
    lowered = lower(models.bert_base(layers=1, hidden=48, heads=4, vocabulary=50))
    arguments = tuple(torch.from_numpy(value) for value in _feeds(lowered.signature).values())
    dynamic = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in arguments)
    program = torch.export.export(lowered.module, arguments, dynamic_shapes=dynamic)
    other = tuple(torch.from_numpy(v) for v in _feeds(lowered.signature, batch=3, sequence=17).values())
    with torch.no_grad():
        for a, b in zip(program.module()(*other), lowered.module(*other), strict=True):
            torch.testing.assert_close(a, b)


def test_sizes_are_python_numbers_and_leave_no_tensors_behind() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Gather", ["s", "one"], ["m"]),
        helper.make_node("Mul", ["n", "m"], ["nm"]),
        helper.make_node("Unsqueeze", ["nm", "axis"], ["u"]),
        helper.make_node("Concat", ["u", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = {"zero": np.array(0), "one": np.array(1), "axis": np.array([0]), "rest": np.array([-1])}
    model = _model(nodes, [("x", 1, ["a", "b", 4])], [("y", 1, None)], **constants)
    lowered = lower(model)
    assert lowered.static
    assert "tolist" not in lowered.module.code and "as_tensor" not in lowered.module.code
    assert lowered.run({"x": np.zeros((2, 3, 4), np.float32)})["y"].shape == (6, 4)


def test_choices_between_sizes_are_python_too() -> None:
    """What PyTorch's exporter writes for an expand that keeps sizes marked -1."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Concat", ["two", "s"], ["wanted"], axis=0),
        helper.make_node("Equal", ["wanted", "marks"], ["is_mark"]),
        helper.make_node("Not", ["is_mark"], ["kept"]),
        helper.make_node("Mod", ["wanted", "three"], ["rest"]),
        helper.make_node("Where", ["kept", "rest", "wanted"], ["to"]),
        helper.make_node("ConstantOfShape", ["to"], ["y"]),
    ]
    constants = {"two": np.array([2]), "marks": np.array([2, 5]), "three": np.array([3])}
    lowered = lower(_model(nodes, [("x", 1, ["a"])], [("y", 1, None)], **constants))
    assert lowered.static
    assert lowered.run({"x": np.zeros(5, np.float32)})["y"].shape == (2, 5)
    assert lowered.run({"x": np.zeros(4, np.float32)})["y"].shape == (2, 1)


def test_attention_with_a_cache_can_be_traced() -> None:
    node = helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"], is_causal=1)
    shapes = {"q": 3, "k": 3, "v": 3, "pk": 5, "pv": 5}
    model = _model(
        [node], [(name, 1, [1, 2, size, 4]) for name, size in shapes.items()],
        [("y", 1, [1, 2, 3, 4]), ("nk", 1, [1, 2, 8, 4]), ("nv", 1, [1, 2, 8, 4])], opset=23,
    )  # fmt: skip
    lowered = lower(model)
    assert lowered.static
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal((1, 2, size, 4)).astype(np.float32) for name, size in shapes.items()}
    expected = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    for value, array in zip(lowered.run(feeds).values(), expected, strict=True):
        np.testing.assert_allclose(value, array, rtol=1e-4, atol=1e-5)
    arguments = tuple(torch.from_numpy(feeds[name]) for name in shapes)
    traced = torch.jit.trace(lowered.module, arguments, check_trace=False)
    torch.testing.assert_close(traced(*arguments)[0], lowered.module(*arguments)[0])


def test_unsigned_types_can_be_traced() -> None:
    nodes = [helper.make_node("Max", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "w"], ["y"])]
    large = np.array([(1 << 64) - 1, 1, 1 << 63], np.uint64)
    model = _model(nodes, [("x", 13, [3])], [("y", 13, [3])], w=np.array([1, 2, 3], np.uint64))
    lowered = lower(model)
    assert lowered.run({"x": large})["y"].tolist() == [0, 4, (1 << 63) + 3]
    argument = torch.from_numpy(large)
    traced = torch.jit.trace(lowered.module, (argument,), check_trace=False)
    assert traced(argument)[0].tolist() == [0, 4, (1 << 63) + 3]


def test_what_depends_on_data_says_so() -> None:
    reshape = _model([helper.make_node("Reshape", ["x", "s"], ["y"])], [("x", 1, [6]), ("s", 7, [2])], [("y", 1, None)])
    lowered = lower(reshape)
    assert not lowered.static and "'s'" in lowered.depends[0]
    assert lowered.run({"x": np.arange(6, dtype=np.float32), "s": np.array([2, 3])})["y"].shape == (2, 3)
    nonzero = _model([helper.make_node("NonZero", ["x"], ["y"])], [("x", 1, [6])], [("y", 7, None)])
    assert "NonZero" in lower(nonzero).depends[0]


def test_importing_and_asking_need_no_torch() -> None:
    code = (
        "import sys; from accelrt.graph.lowering import lowerable; from accelrt.graph.load import load_graph;"
        "from accelrt.testing import models;"
        "assert all(lowerable(n) is None for n in load_graph(models.small_cnn()).nodes); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_lowering_changes_nothing() -> None:
    graph = load_graph(models.small_cnn())
    before, digest = graph.proto.SerializeToString(deterministic=True), graph.digest
    lowered = lower(graph)
    lowered.run(_feeds(lowered.signature))
    assert graph.proto.SerializeToString(deterministic=True) == before
    assert graph.digest == digest


def test_external_weights_are_mapped_not_read(tmp_path: Path) -> None:
    model = models.mlp(features=64, hidden=(128,))
    (tmp_path / "whole.onnx").write_bytes(model.SerializeToString())
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    graph = load_graph(tmp_path / "m.onnx")
    lowered = lower(graph)
    addresses = {buffer.data_ptr() for buffer in lowered.module.buffers()}
    assert graph.weights
    assert all(tensor.numpy().ctypes.data in addresses for tensor in graph.weights.values())
    feeds = _feeds(lowered.signature)
    expected = ort.InferenceSession(tmp_path / "whole.onnx").run(None, feeds)[0]
    np.testing.assert_allclose(lowered.run(feeds)["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "type_", "reason"),
    [
        (helper.make_node("RandomUniformLike", ["x"], ["y"]), TensorProto.FLOAT, "random"),
        (helper.make_node("StringNormalizer", ["x"], ["y"]), TensorProto.STRING, "text"),
        (helper.make_node("Div", ["x", "x"], ["y"]), TensorProto.UINT64, "uint64"),
        (helper.make_node("Mod", ["x", "x"], ["y"]), TensorProto.FLOAT, "fmod"),
        (helper.make_node("Identity", ["x"], ["y"]), TensorProto.STRING, "text"),
        (helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example"), TensorProto.FLOAT, "no operator"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[1] * 4), TensorProto.FLOAT, "spatial dimensions"),
        (
            helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2], auto_pad="SAME_UPPER", dilations=[2]),
            TensorProto.FLOAT,
            "dilations",
        ),
        (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E8M0), TensorProto.FLOAT, "e8m0"),
    ],
)
def test_refusals_say_why(node: Any, type_: int, reason: str) -> None:
    rank = 6 if len(helper.get_node_attr_value(node, "kernel_shape") if node.op_type == "MaxPool" else ()) == 4 else 3
    output = onnx.ValueInfoProto(name="y", type=helper.make_tensor_type_proto(type_, None))
    model = _model([node], [("x", type_, [2] * rank)], [], opset=21)
    if node.domain:
        model.opset_import.add(domain=node.domain, version=1)
    model.graph.output.append(output)
    if "e8m0" in reason:
        model.opset_import[0].version = 24
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT8E8M0
    graph = load_graph(model)
    answer = lowerable(graph.nodes[0])
    assert answer is not None and reason in answer
    with pytest.raises(CompileError, match="cannot be lowered to torch"):
        lower(graph)


def test_a_body_with_a_refused_node_is_refused() -> None:
    body = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["b"])], "then", [], [helper.make_tensor_value_info("b", 1, [2])]
    )
    model = _model(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)],
        [("c", 9, []), ("x", 1, [2])], [("y", 1, [2])],
    )  # fmt: skip
    answer = lowerable(load_graph(model).nodes[0])
    assert answer is not None and answer.startswith("in the body of If: random")


def test_branches_and_loops_run_with_captures_and_no_trip() -> None:
    def branch(op: str) -> Any:
        return helper.make_graph(
            [helper.make_node(op, ["x", "w"], ["b"])], op, [], [helper.make_tensor_value_info("b", 1, [2])]
        )

    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch("Add"), else_branch=branch("Mul"))]
    model = _model(nodes, [("c", 9, []), ("x", 1, [2])], [("y", 1, [2])], w=np.array([3, 4], np.float32))
    lowered = lower(model)
    assert not lowered.static
    x = np.array([1, 2], np.float32)
    assert lowered.run({"c": np.array(True), "x": x})["y"].tolist() == [4, 6]
    assert lowered.run({"c": np.array(False), "x": x})["y"].tolist() == [3, 8]

    body = helper.make_graph(
        [
            helper.make_node("Add", ["s", "x"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["next"], ["scan"]),
        ],
        "body",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in (("i", 7, []), ("go", 9, []), ("s", 1, [2]))],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in (("on", 9, []), ("next", 1, [2]), ("scan", 1, [2]))],
    )
    loop = helper.make_node("Loop", ["n", "", "x"], ["last", "all"], body=body)
    model = _model([loop], [("n", 7, []), ("x", 1, [2])], [("last", 1, [2]), ("all", 1, [None, 2])])
    lowered = lower(model)
    outputs = lowered.run({"n": np.array(3), "x": x})
    assert outputs["last"].tolist() == [4, 8] and outputs["all"].tolist() == [[2, 4], [3, 6], [4, 8]]
    assert lowered.run({"n": np.array(0), "x": x})["all"].shape == (0, 2)


def test_a_constant_condition_leaves_no_branch() -> None:
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["b"])], "t", [], [helper.make_tensor_value_info("b", 1, [2])]
    )
    model = _model(
        [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then)],
        [("x", 1, [2])], [("y", 1, [2])], c=np.array(True),
    )  # fmt: skip
    lowered = lower(model)
    assert lowered.static and not list(lowered.module.children())
    assert lowered.run({"x": np.array([1, -2], np.float32)})["y"].tolist() == [-1, 2]


def test_outputs_that_are_left_out_and_values_used_twice() -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["", "places"]),
        helper.make_node("Identity", ["places"], ["again"]),
    ]
    model = _model(nodes, [("x", 1, [5])], [("places", 7, [2]), ("again", 7, [2])], k=np.array([2]))
    outputs = lower(model).run({"x": np.array([1, 5, 3, 5, 2], np.float32)})
    assert outputs["places"].tolist() == outputs["again"].tolist() == [1, 3]


@pytest.mark.parametrize(
    "target", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"]
)
@pytest.mark.parametrize("saturate", [0, 1])
def test_small_floats_round_as_ml_dtypes_does(target: str, saturate: int) -> None:
    import ml_dtypes

    from accelrt.graph.lowering.kernels.cast import cast

    # Every float16: all values of the small types, all ties between them, and what lies beyond.
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    dtype = np.dtype(getattr(ml_dtypes, target))
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(invalid="ignore"):
        clipped = np.clip(halves, -largest, largest) if saturate or target.startswith("float4") else halves
        wanted = clipped.astype(dtype).astype(np.float32)
    got = cast(torch.from_numpy(halves), onnx_dtype=target, saturate=saturate).float().numpy()
    if target.startswith("float4"):
        wanted, got = wanted[~np.isnan(halves)], got[~np.isnan(halves)]
    np.testing.assert_array_equal(got, wanted)


def test_values_of_every_type_survive_the_way_in_and_out() -> None:
    from accelrt.graph.lowering.dtypes import to_numpy, to_torch
    from accelrt.graph.types import numpy_dtype

    names = (
        "float32 float16 bfloat16 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 bool complex64 "
        "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz int4 uint4 int2 uint2 float4_e2m1fn"
    )
    for name in names.split():
        array = np.array([[0, 1], [1, 0]]).astype(numpy_dtype(name))
        back = to_numpy(to_torch(array), name)
        assert back.dtype == array.dtype and back.tobytes() == array.tobytes(), name


def test_the_table_names_kernels_that_are_there() -> None:
    from accelrt.graph.lowering.build import _kernel
    from accelrt.graph.lowering.table import TABLE

    for (domain, operator), entries in TABLE.items():
        assert onnx.defs.has(operator, domain), operator
        for entry in entries:
            assert callable(_kernel(entry.kernel)), entry.kernel
