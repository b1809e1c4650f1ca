"""What cuda/torch does to a graph before it runs: the same numbers, in fewer and faster kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from accelrt.graph.fold_norms import fold_batch_norms
from accelrt.graph.load import load_graph
from accelrt.testing.models import Array, Builder, bert_base, densenet121, resnet50, small_cnn

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from accelrt_cuda.torch_half import in_halves  # noqa: E402 - they need torch
from accelrt_cuda.torch_prepare import prepare  # noqa: E402

pytestmark = pytest.mark.torch


def reference(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


def computed(model: onnx.ModelProto, feeds: dict[str, Array], precision: Any = "fp32", last: bool = False) -> Any:
    """Return what the prepared module gives, and the module."""
    prepared = prepare(load_graph(model), precision, "cpu", channels_last=last)
    with torch.no_grad():
        results = prepared.module(*(torch.from_numpy(feeds[name]) for name in prepared.signature.input_names))
    return [result.numpy() for result in results], prepared


def drawn(model: onnx.ModelProto, batch: int = 2, sequence: int = 7, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    feeds = {}
    for port in load_graph(model).signature.inputs:
        sizes = {"batch": batch, "sequence": sequence}
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in port.type.shape]  # type: ignore[union-attr, index, misc]
        if port.type.dtype == "int64":  # type: ignore[union-attr]
            feeds[port.name] = generator.integers(0, 2, shape)
        else:
            feeds[port.name] = generator.standard_normal(shape).astype(np.float32)
    return feeds


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


# Batch normalisations


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    dimensions=st.integers(1, 3),
    biased=st.booleans(),
    epsilon=st.sampled_from([None, 1e-5, 1e-2]),
    seed=st.integers(0, 1000),
)
def test_a_norm_after_a_convolution_is_folded(
    channels: int, groups: int, width: int, dimensions: int, biased: bool, epsilon: float | None, seed: int
) -> None:
    net = Builder("conv", seed)
    x = net.input("x", (2, channels * groups, *[5] * dimensions))
    inputs = [x, net.normal(width * groups, channels, *[3] * dimensions, std=0.5)]
    inputs += [net.normal(width * groups, std=0.5)] if biased else []
    y = net.node("Conv", *inputs, kernel_shape=[3] * dimensions, pads=[1] * 2 * dimensions, group=groups)
    size = width * groups
    statistics = [net.normal(size, std=1.0), net.normal(size, std=1.0), net.normal(size, std=1.0)]
    variance = net.uniform(size, 0.1, 2.0, "variance")
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    y = net.node("BatchNormalization", y, *statistics, variance, name="y", **attributes)
    net.output(y, (2, size, *[5] * dimensions))
    model = net.model()
    folded = fold_batch_norms(load_graph(model))
    assert operators(folded) == ["Conv"]
    feeds = drawn(model)
    found, _ = computed(model, feeds)
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-4)


def test_networks_lose_all_the_norms_that_follow_a_convolution() -> None:
    assert "BatchNormalization" not in operators(fold_batch_norms(load_graph(resnet50(image=32))))
    left = operators(fold_batch_norms(load_graph(densenet121(image=32))))
    assert 0 < left.count("BatchNormalization") < 121


@pytest.mark.parametrize("case", ["read twice", "an output", "statistics from outside", "training"])
def test_a_norm_that_is_not_the_convolutions_alone_stays(case: str) -> None:
    net = Builder("conv")
    y = net.node("Conv", net.input("x", (1, 2, 4, 4)), net.normal(3, 2, 1, 1, std=1.0))
    mean = net.input("mean", (3,)) if case == "statistics from outside" else net.normal(3, std=1.0)
    extra = {"training_mode": 1} if case == "training" else {}
    z = net.node("BatchNormalization", y, *[net.normal(3, std=1.0) for _ in range(2)], mean,
                 net.uniform(3, 0.5, 1.0, "v"), name="z", **extra)  # fmt: skip
    net.output(net.node("Add", z, y, name="sum") if case == "read twice" else z, (1, 3, 4, 4))
    if case == "an output":
        net.output(y, (1, 3, 4, 4))
    graph = load_graph(net.model())
    assert fold_batch_norms(graph) is graph


# Halves


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 3e-2), ("fp16", 5e-3)])
@pytest.mark.parametrize(
    "build", [small_cnn, lambda: bert_base(layers=2, hidden=64, heads=4), lambda: resnet50(image=32, classes=10)]
)
def test_networks_in_halves_are_near_and_keep_their_types(build: Any, precision: Any, bound: float) -> None:
    model = build()
    feeds = drawn(model)
    found, prepared = computed(model, feeds, precision)
    for name, one, other in zip(prepared.signature.output_names, found, reference(model, feeds), strict=True):
        assert one.dtype == other.dtype == np.float32, name
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert 1e-7 < error < bound, (name, error)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    large = [buffer for buffer in prepared.module.buffers() if buffer.dim() >= 2 and buffer.numel() > 40000]
    assert all(buffer.dtype == half for buffer in large[:1])


def test_positions_are_counted_in_float32() -> None:
    """257 is none of bfloat16's numbers, and 70000 is none of float16's."""
    net = Builder("positions")
    x = net.input("x", (4,), "int64")
    y = net.node("Cast", net.node("Mul", net.node("Cast", x, to=TensorProto.FLOAT), net.constant(1.0)),
                 to=TensorProto.INT64, name="y")  # fmt: skip
    net.output(y, (4,), "int64")
    model, feeds = net.model(), {"x": np.array([257, 511, 70001, -3])}
    for precision in ("bf16", "fp16"):
        found, _ = computed(model, feeds, precision)
        np.testing.assert_array_equal(found[0], feeds["x"])


def test_a_normalisation_spelt_out_does_not_overflow_in_float16() -> None:
    """Squares of 400 exceed float16's 65504; powers and their means are computed in float32."""
    net = Builder("spelt out")
    x = net.node("MatMul", net.input("x", (2, 16)), net.weight(np.eye(16, dtype=np.float32) * 400))
    centred = net.node("Sub", x, net.node("ReduceMean", x, axes=[-1]))
    variance = net.node("ReduceMean", net.node("Pow", centred, net.constant(2.0)), axes=[-1])
    root = net.node("Sqrt", net.node("Add", variance, net.constant(1e-5)))
    net.output(net.node("Div", centred, root, name="y"), (2, 16))
    model, feeds = net.model(), {"x": np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)}
    found, prepared = computed(model, feeds, "fp16")
    assert prepared.rewrites["powers"] == 1
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-2, atol=1e-2)


def test_graphs_in_halves_are_valid_and_leave_the_argument_alone() -> None:
    model = bert_base(layers=1, hidden=32, heads=2)
    graph = load_graph(model)
    before = graph.proto.SerializeToString(deterministic=True)
    halved = in_halves(graph, "bfloat16")
    assert graph.proto.SerializeToString(deterministic=True) == before
    products = [node for node in halved.nodes if node.op_type == "MatMul"]
    assert products
    assert {node.input_dtype(0) for node in products} == {"bfloat16"}
    assert {str(port.type.dtype) for port in halved.signature.outputs} == {"float32"}  # type: ignore[union-attr]


# Attention


def _attention(
    batch: int, heads: int, rows: int, columns: int, width: int, scale: str, mask: str, axis: int = -1, rank: int = 4
) -> onnx.ModelProto:
    net = Builder("attention")
    lead = (batch, heads) if rank == 4 else (batch,)
    query, value = net.input("q", (*lead, rows, width)), net.input("v", (*lead, columns, width))
    scores = net.node("MatMul", query, net.input("k", (*lead, width, columns)))
    if scale == "div":
        scores = net.node("Div", scores, net.constant(width**0.5))
    elif scale == "mul":
        scores = net.node("Mul", net.constant(width**-0.5), scores)
    if mask != "none":
        shapes = {"row": (1, 1, 1, columns), "each": (batch, heads, rows, columns), "batch": (batch, 1, 1, columns),
                  "flat": (columns,)}  # fmt: skip
        scores = net.node("Add", scores, net.input("m", shapes[mask]))
    weights = net.node("Softmax", scores, axis=axis)
    net.output(net.node("MatMul", weights, value, name="y"), (*lead, rows, width))
    return net.model()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    width=st.sampled_from([1, 3, 8]),
    scale=st.sampled_from(["div", "mul", "none"]),
    mask=st.sampled_from(["none", "row", "each", "batch", "flat"]),
)
def test_attention_becomes_one_kernel(sizes: tuple[int, int, int, int], width: int, scale: str, mask: str) -> None:
    model = _attention(*sizes, width, scale, mask)
    feeds = drawn(model)
    if "m" in feeds:
        feeds["m"][..., 0] = -1e4
    found, prepared = computed(model, feeds)
    assert prepared.rewrites["attention"] == 1
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_attention_of_another_rank_is_computed_as_it_is_written() -> None:
    model = _attention(2, 1, 3, 4, 5, "div", "none", rank=3)
    feeds = drawn(model)
    found, _ = computed(model, feeds)
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_a_softmax_along_another_axis_is_no_attention() -> None:
    model = _attention(2, 2, 3, 3, 4, "div", "none", axis=1)
    feeds = drawn(model)
    found, _ = computed(model, feeds)
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_weights_of_attention_that_are_read_elsewhere_stay() -> None:
    model = _attention(1, 2, 3, 3, 4, "div", "row")
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT, (1, 2, 3, 3)))
    feeds = drawn(model)
    found, prepared = computed(model, feeds)
    assert prepared.rewrites["attention"] == 0
    for one, other in zip(found, reference(model, feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_mask_that_enlarges_the_scores_is_not_handed_to_the_kernel() -> None:
    net = Builder("wide mask")
    q, k, v = (net.input(name, (1, 1, 3, 3)) for name in "qkv")
    weights = net.node("Softmax", net.node("Add", net.node("MatMul", q, k), net.input("m", (4, 1, 3, 3))), axis=-1)
    net.output(net.node("MatMul", weights, v, name="y"), (4, 1, 3, 3))
    model = net.model()
    feeds = drawn(model)
    found, _ = computed(model, feeds)
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-5)


# Linear layers, powers, sizes, layout


def test_query_key_and_value_are_one_product() -> None:
    model = bert_base(layers=3, hidden=32, heads=2)
    feeds = drawn(model)
    found, prepared = computed(model, feeds)
    assert prepared.rewrites["joined"] == 9
    assert prepared.rewrites["attention"] == 3
    for one, other in zip(found, reference(model, feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0])
def test_powers(exponent: float) -> None:
    net = Builder("powers")
    net.output(net.node("Pow", net.input("x", (3, 5)), net.constant(exponent), name="y"), (3, 5))
    model = net.model()
    feeds = {"x": np.random.default_rng(0).uniform(0.1, 3, (3, 5)).astype(np.float32)}
    found, prepared = computed(model, feeds)
    assert prepared.rewrites["powers"] == (exponent in (2.0, 3.0))
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-5)


def test_sizes_become_tensors_without_a_copy_from_the_host() -> None:
    net = Builder("sizes")
    x = net.input("x", ("batch", 3))
    size = net.node("Cast", net.node("Shape", x), to=TensorProto.FLOAT)
    first = net.node("Gather", size, net.constant(0), axis=0)
    net.output(net.node("Div", x, first, name="y"), ("batch", 3))
    model = net.model()
    feeds = drawn(model, batch=5)
    found, prepared = computed(model, feeds)
    assert prepared.rewrites["sizes"] >= 1
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-6)


def test_channels_last_changes_strides_and_no_number() -> None:
    model = small_cnn()
    feeds = drawn(model)
    found, prepared = computed(model, feeds, last=True)
    assert prepared.rewrites["channels_last"] == 2
    weights = [buffer for buffer in prepared.module.buffers() if buffer.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_inputs_that_count_places_have_bounds() -> None:
    prepared = prepare(load_graph(bert_base(layers=1, hidden=32, heads=2)), "fp32", "cpu", channels_last=False)
    assert prepared.bounds == {"input_ids": 30522, "token_type_ids": 2}


def test_float32_weights_are_let_go_where_halves_take_their_place() -> None:
    net = Builder("large")
    weight = net.weight(np.random.default_rng(0).standard_normal((768, 768)).astype(np.float32))
    net.output(net.node("MatMul", net.input("x", (2, 768)), weight, name="y"), (2, 768))
    prepared = prepare(load_graph(net.model()), "bf16", "cpu", channels_last=False)
    assert {buffer.dtype for buffer in prepared.module.buffers()} == {torch.bfloat16}
    assert prepared.rewrites["constants"] == 1


def test_a_constant_node_is_a_weight_too() -> None:
    """Some exporters write weights as Constant nodes."""
    net = Builder("constant")
    weight = net.node("Constant", value=numpy_helper.from_array(np.ones((4, 3), np.float32) / 3))
    net.output(net.node("MatMul", net.input("x", (2, 4)), weight, name="y"), (2, 3))
    model = net.model()
    feeds = drawn(model)
    found, _ = computed(model, feeds, "bf16")
    np.testing.assert_allclose(found[0], reference(model, feeds)[0], rtol=2e-2, atol=2e-2)
