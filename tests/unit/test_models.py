"""The model builders: the structure of the originals, valid ONNX, finite outputs, bytes by the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from accelrt.testing import models

Build = Callable[..., onnx.ModelProto]

SMALL: dict[str, Build] = {
    "resnet50": lambda **options: models.resnet50(image=64, classes=10, **options),
    "densenet121": lambda **options: models.densenet121(image=64, classes=10, **options),
    "bert_base": lambda **options: models.bert_base(
        **{"layers": 2, "hidden": 64, "heads": 4, "vocabulary": 100, "sequence": 12} | options
    ),
    "mlp": models.mlp,
    "small_cnn": models.small_cnn,
}

each_model = pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(model: onnx.ModelProto, seed: int = 0, **sizes: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for port in model.graph.input:
        type_ = port.type.tensor_type
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in type_.shape.dim]
        if type_.elem_type == onnx.TensorProto.FLOAT:
            arrays[port.name] = random.standard_normal(shape, dtype=np.float32)
        else:
            arrays[port.name] = random.integers(0, 100 if port.name == "input_ids" else 2, shape)
    return arrays


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        # As torchvision's resnet50 and densenet121 and Hugging Face's BertModel count them.
        (models.resnet50, 25_557_032),
        (models.densenet121, 7_978_856),
        (models.bert_base, 109_482_240),
        (models.mlp, 16 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4),
        (models.small_cnn, 8 * 27 + 16 + 16 * 72 + 32 + 16 * 10 + 10),
    ],
)
def test_parameters_are_those_of_the_original(build: Build, parameters: int) -> None:
    assert models.parameter_count(build()) == parameters


def test_layers_are_those_of_the_original() -> None:
    def count(model: onnx.ModelProto, op: str) -> int:
        return sum(node.op_type == op for node in model.graph.node)

    resnet, densenet, bert = SMALL["resnet50"](), SMALL["densenet121"](), SMALL["bert_base"](layers=12)
    assert [count(resnet, op) for op in ("Conv", "BatchNormalization", "Add", "Gemm")] == [53, 53, 16, 1]
    assert [count(densenet, op) for op in ("Conv", "BatchNormalization", "Concat", "Gemm")] == [
        120,
        121,
        58,
        1,
    ]
    assert [count(bert, op) for op in ("LayerNormalization", "Softmax", "Erf", "Tanh")] == [25, 12, 12, 1]


def test_resnet_halves_the_image_in_its_3x3_convolutions() -> None:
    kernels = []
    for node in SMALL["resnet50"]().graph.node:
        options = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        if options.get("strides") == [2, 2]:
            kernels.append(options["kernel_shape"][0])
    # The stem's convolution and pool, then in each of three stages a 3x3 and the projection of its shortcut.
    assert kernels == [7, 3, 3, 1, 3, 1, 3, 1]


@each_model
def test_checks_in_full(build: Build) -> None:
    model = build()
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [port.name for port in inferred.graph.output] == [port.name for port in model.graph.output]
    names = [node.name for node in model.graph.node] + [weight.name for weight in model.graph.initializer]
    assert len(set(names)) == len(names)


@each_model
def test_runs_at_any_batch(build: Build) -> None:
    model = build()
    run = session(model).run
    two = inputs(model, batch=2)
    both = run(None, two)
    for row in range(2):
        alone = run(None, {name: array[row : row + 1] for name, array in two.items()})
        for whole, part in zip(both, alone, strict=True):
            assert part.dtype == np.float32
            assert part.shape == (1, *whole.shape[1:])
            assert np.isfinite(part).all()
            np.testing.assert_allclose(part[0], whole[row], rtol=1e-3, atol=1e-3)


@each_model
def test_outputs_tell_inputs_apart(build: Build) -> None:
    model = build()
    for array in session(model).run(None, inputs(model, batch=2)):
        assert 0.1 < array.std() < 20
        assert np.abs(array[0] - array[1]).max() > 0.02 * array.std()


@each_model
def test_seed_decides_every_byte(build: Build) -> None:
    first, again, other = (build(seed=seed).SerializeToString(deterministic=True) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == len(other)


@each_model
@pytest.mark.parametrize(("batch", "expected"), [(3, 3), ("n", "n"), (None, None)])
def test_batch_is_a_number_a_name_or_unknown(build: Build, batch: models.Size, expected: object) -> None:
    graph = build(batch=batch).graph
    for port in (*graph.input, *graph.output):
        dim = port.type.tensor_type.shape.dim[0]
        kind = dim.WhichOneof("value")
        assert (getattr(dim, kind) if kind else None) == expected


def test_bert_takes_any_length() -> None:
    model = SMALL["bert_base"](sequence="sequence")
    run = session(model).run
    for length in (1, 7, 512):
        hidden, pooled = run(None, inputs(model, batch=1, sequence=length))
        assert hidden.shape == (1, length, 64)
        assert pooled.shape == (1, 64)


def test_bert_does_not_see_padding() -> None:
    model = SMALL["bert_base"](sequence="sequence")
    run = session(model).run
    padded = inputs(model, batch=1, sequence=9)
    padded["attention_mask"] = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
    short = {name: array[:, :5] for name, array in padded.items()}
    with_padding, without = run(None, padded), run(None, short)
    np.testing.assert_allclose(with_padding[0][:, :5], without[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(with_padding[1], without[1], rtol=1e-4, atol=1e-5)


def test_bert_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="hidden=64 cannot be divided among heads=5"):
        models.bert_base(hidden=64, heads=5)
    with pytest.raises(ValueError, match="512 positions"):
        models.bert_base(sequence=513)


def test_builder_names_values_after_scopes_and_shares_constants() -> None:
    net = models.Builder("tiny")
    x = net.input("x", ("n", 2))
    with net.scope("outer"), net.scope("inner"):
        half = net.constant(0.5)
        y = net.node("Mul", x, half)
    assert (half, y) == ("outer/inner/Constant_0", "outer/inner/Mul_1")
    assert net.constant(0.5) == half
    net.output(net.node("Add", y, net.weight(np.ones(2, np.float32)), name="y"), ("n", 2))
    model = net.model()
    onnx.checker.check_model(model, full_check=True)
    (result,) = session(model).run(["y"], {"x": np.full((3, 2), 4, np.float32)})
    np.testing.assert_array_equal(result, np.full((3, 2), 3, np.float32))
