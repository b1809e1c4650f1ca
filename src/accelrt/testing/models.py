"""Well-known networks as ONNX, built from their papers with seeded random weights; no framework, no download.

The structure and the parameter counts are those of the originals, so compilers, partitioners and benchmarks
see what they would see in production. The weights are random but scaled so that activations keep their size
from layer to layer: outputs are finite, differ between inputs, and tell a wrong kernel from a right one. They
classify nothing.

The same arguments give the same bytes. A size may be given as a number, or as text for a symbolic dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod, sqrt
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array: TypeAlias = np.ndarray[Any, Any]
Size: TypeAlias = int | str | None

OPSET = 17
IR_VERSION = 8
"""The pair of ONNX 1.12: the oldest with LayerNormalization, so that most runtimes can read it."""


class Builder:
    """A graph under construction: every method that adds a value returns its name.

    ``random`` draws the weights; nodes are named after the `scope` they are added in: ``layer1.0/Conv_3``.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        # Filled in place: the helpers of onnx copy the whole graph twice, and BERT's weights take 440 MB.
        self._model = onnx.ModelProto(
            ir_version=IR_VERSION,
            producer_name="accelrt.testing",
            opset_import=[helper.make_opsetid("", OPSET)],
        )
        self._graph = self._model.graph
        self._graph.name = name
        self._scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Name what is added inside after ``name``."""
        outer, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = outer

    def input(self, name: str, shape: Sequence[Size], dtype: str = "float32") -> str:
        """Add an input of the model."""
        self._graph.input.append(_value_info(name, shape, dtype))
        return name

    def output(self, name: str, shape: Sequence[Size], dtype: str = "float32") -> str:
        """Declare the value ``name``, which a node has computed, an output of the model."""
        self._graph.output.append(_value_info(name, shape, dtype))
        return name

    def weight(self, array: Array, name: str = "weight") -> str:
        """Add an initialiser."""
        name = f"{self._scope}{name}_{len(self._graph.initializer)}"
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def normal(self, *shape: int, std: float, mean: float = 0.0, name: str = "weight") -> str:
        """Add a float32 initialiser drawn from a normal distribution."""
        array = self.random.standard_normal(shape, dtype=np.float32)
        array *= np.float32(std)
        if mean:
            array += np.float32(mean)
        return self.weight(array, name)

    def uniform(self, size: int, low: float, high: float, name: str) -> str:
        """Add a float32 initialiser of shape [size] drawn from ``low`` to ``high``."""
        array = self.random.random(size, dtype=np.float32)
        return self.weight(array * np.float32(high - low) + np.float32(low), name)

    def constant(self, value: float | int | Sequence[int]) -> str:
        """Add a float32 or int64 scalar, or an int64 vector, as a Constant node; equal ones are one node."""
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.node("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, both called ``name`` if given, else numbered."""
        name = name or f"{self._scope}{op}_{len(self._graph.node)}"
        self._graph.node.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def model(self) -> onnx.ModelProto:
        """Return the model; the builder must not be used again."""
        return self._model


def parameter_count(model: onnx.ModelProto) -> int:
    """Return the number of trained values, as papers count them: running statistics are left out."""
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
    return sum(
        prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in statistics
    )


def resnet50(*, batch: Size = "batch", seed: int = 0, classes: int = 1000, image: int = 224) -> onnx.ModelProto:
    """Build ResNet-50 v1.5: 25,557,032 parameters, 4.1 G multiply-adds an image of 224 by 224.

    He et al., *Deep Residual Learning for Image Recognition*, 2015 (arXiv:1512.03385), table 1. "v1.5" has
    the stride of a downsampling block in its 3x3 convolution, not in the first 1x1, as torchvision and MLPerf
    have it.

    Input ``image`` float32 [batch, 3, image, image], normalised to mean 0 and deviation 1; output ``scores``
    float32 [batch, classes].
    """
    net = Builder("resnet50", seed)
    x = net.input("image", (batch, 3, image, image))
    with net.scope("stem"):
        x = _relu(net, _normalise(net, _convolve(net, x, 3, 64, kernel=7, stride=2), 64))
        x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            with net.scope(f"layer{stage + 1}.{block}"):
                x = _bottleneck(net, x, channels, width, stride=2 if stage and not block else 1)
            channels = 4 * width
    return _classify(net, x, channels, classes, batch)


def _bottleneck(net: Builder, x: str, channels: int, width: int, stride: int) -> str:
    """1x1 down, 3x3, 1x1 up to four times the width, beside a shortcut, projected where shapes differ."""
    y = _relu(net, _normalise(net, _convolve(net, x, channels, width), width))
    y = _relu(net, _normalise(net, _convolve(net, y, width, width, kernel=3, stride=stride), width))
    # A branch weaker than its shortcut, or the sums of sixteen blocks would grow without bound.
    y = _normalise(net, _convolve(net, y, width, 4 * width), 4 * width, gain=0.2)
    if channels != 4 * width:
        x = _normalise(net, _convolve(net, x, channels, 4 * width, stride=stride), 4 * width)
    return _relu(net, net.node("Add", y, x))


def densenet121(*, batch: Size = "batch", seed: int = 0, classes: int = 1000, image: int = 224) -> onnx.ModelProto:
    """Build DenseNet-121: 7,978,856 parameters, 2.8 G multiply-adds an image of 224 by 224.

    Huang et al., *Densely Connected Convolutional Networks*, 2016 (arXiv:1608.06993), table 1: DenseNet-BC
    with growth rate 32, bottlenecks of 128 channels and transitions that halve the channels.

    Input ``image`` float32 [batch, 3, image, image], normalised to mean 0 and deviation 1; output ``scores``
    float32 [batch, classes].
    """
    growth = 32
    net = Builder("densenet121", seed)
    x = net.input("image", (batch, 3, image, image))
    with net.scope("stem"):
        x = _relu(net, _normalise(net, _convolve(net, x, 3, 2 * growth, kernel=7, stride=2), 2 * growth))
        x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 2 * growth
    for stage, layers in enumerate((6, 12, 24, 16)):
        if stage:
            with net.scope(f"transition{stage}"):
                x = _relu(net, _normalise(net, x, channels))
                x = _convolve(net, x, channels, channels // 2)
                x = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            channels //= 2
        for layer in range(layers):
            with net.scope(f"dense{stage + 1}.{layer}"):
                y = _convolve(net, _relu(net, _normalise(net, x, channels)), channels, 4 * growth)
                y = _relu(net, _normalise(net, y, 4 * growth))
                y = _convolve(net, y, 4 * growth, growth, kernel=3)
                x = net.node("Concat", x, y, axis=1)
            channels += growth
    with net.scope("head"):
        x = _relu(net, _normalise(net, x, channels))
    return _classify(net, x, channels, classes, batch)


def bert_base(
    *,
    batch: Size = "batch",
    sequence: int | str = "sequence",
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
    vocabulary: int = 30522,
    seed: int = 0,
) -> onnx.ModelProto:
    """Build the BERT-base encoder with its pooler: 109,482,240 parameters.

    Devlin et al., *BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding*, 2018
    (arXiv:1810.04805): layers normalised after the sum, a feed-forward of four times ``hidden``, 512 learned
    positions. GELU is spelt out with Erf, as exporters write it for opsets below 20.

    Inputs ``input_ids``, ``attention_mask`` (1 for a token, 0 for padding) and ``token_type_ids`` (0 or 1),
    int64 [batch, sequence]; outputs ``last_hidden_state`` float32 [batch, sequence, hidden] and
    ``pooler_output`` float32 [batch, hidden].

    Raises:
        ValueError: ``heads`` does not divide ``hidden``, or ``sequence`` is more than 512.
    """
    positions = 512
    if hidden % heads:
        raise ValueError(f"hidden={hidden} cannot be divided among heads={heads}")
    if isinstance(sequence, int) and sequence > positions:
        raise ValueError(f"sequence={sequence} is more than BERT's {positions} positions")
    net = Builder("bert", seed)
    ids, attention, types = (
        net.input(name, (batch, sequence), "int64") for name in ("input_ids", "attention_mask", "token_type_ids")
    )

    with net.scope("embeddings"):
        words = net.node("Gather", net.normal(vocabulary, hidden, std=1.0, name="words"), ids)
        segments = net.node("Gather", net.normal(2, hidden, std=0.5, name="types"), types)
        table = net.normal(positions, hidden, std=0.5, name="positions")
        length = net.node("Shape", ids, start=1, end=2)
        places = net.node("Slice", table, net.constant([0]), length, net.constant([0]))
        x = net.node("Add", net.node("Add", words, segments), places)
        x = _layer_norm(net, x, hidden)
        # Added to attention scores: 0 for a token, -10,000 for padding, as in the original.
        absent = net.node("Sub", net.constant(1.0), net.node("Cast", attention, to=onnx.TensorProto.FLOAT))
        mask = net.node("Mul", absent, net.constant(-10000.0))
        mask = net.node("Unsqueeze", mask, net.constant([1, 2]))

    for layer in range(layers):
        with net.scope(f"encoder.{layer}"):
            name = "last_hidden_state" if layer == layers - 1 else ""
            x = _encoder_layer(net, x, mask, hidden, heads, name)
    net.output(x, (batch, sequence, hidden))

    with net.scope("pooler"):
        first = net.node("Gather", x, net.constant(0), axis=1)
        first = _linear(net, first, hidden, hidden)
    net.output(net.node("Tanh", first, name="pooler_output"), (batch, hidden))
    return net.model()


def _encoder_layer(net: Builder, x: str, mask: str, hidden: int, heads: int, name: str) -> str:
    """Self-attention and feed-forward, each added to its input and normalised; ``name`` is the output."""
    width = hidden // heads
    split = net.constant([0, 0, heads, width])

    def project(*axes: int) -> str:
        return net.node("Transpose", net.node("Reshape", _linear(net, x, hidden, hidden), split), perm=axes)

    query, key, value = project(0, 2, 1, 3), project(0, 2, 3, 1), project(0, 2, 1, 3)
    scores = net.node("Div", net.node("MatMul", query, key), net.constant(sqrt(width)))
    weights = net.node("Softmax", net.node("Add", scores, mask), axis=-1)
    mixed = net.node("Transpose", net.node("MatMul", weights, value), perm=[0, 2, 1, 3])
    mixed = net.node("Reshape", mixed, net.constant([0, 0, hidden]))
    x = _layer_norm(net, net.node("Add", _linear(net, mixed, hidden, hidden), x), hidden)

    y = _linear(net, _gelu(net, _linear(net, x, hidden, 4 * hidden)), 4 * hidden, hidden)
    return _layer_norm(net, net.node("Add", y, x), hidden, name)


def mlp(
    *,
    batch: Size = "batch",
    features: int = 16,
    hidden: Sequence[int] = (32, 32),
    outputs: int = 4,
    seed: int = 0,
) -> onnx.ModelProto:
    """Build a perceptron: Gemm and Relu for each hidden size, then Gemm.

    Input ``x`` float32 [batch, features]; output ``y`` float32 [batch, outputs].
    """
    net = Builder("mlp", seed)
    x = net.input("x", (batch, features))
    sizes = (features, *hidden, outputs)
    for layer, (rows, columns) in enumerate(pairwise(sizes)):
        last = layer == len(sizes) - 2
        weight = net.normal(columns, rows, std=sqrt((1 if last else 2) / rows))
        x = net.node("Gemm", x, weight, net.normal(columns, std=0.1, name="bias"), transB=1, name="y" if last else "")
        if not last:
            x = _relu(net, x)
    net.output(x, (batch, outputs))
    return net.model()


def small_cnn(
    *,
    batch: Size = "batch",
    channels: int = 3,
    image: int = 16,
    widths: Sequence[int] = (8, 16),
    classes: int = 10,
    seed: int = 0,
) -> onnx.ModelProto:
    """Build a small image classifier: convolution, normalisation, Relu and a halving MaxPool for each width.

    Input ``image`` float32 [batch, channels, image, image]; output ``scores`` float32 [batch, classes].
    """
    net = Builder("small_cnn", seed)
    x = net.input("image", (batch, channels, image, image))
    for layer, width in enumerate(widths):
        with net.scope(f"layer{layer + 1}"):
            x = _relu(net, _normalise(net, _convolve(net, x, channels, width, kernel=3), width))
            x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        channels = width
    return _classify(net, x, channels, classes, batch)


def _convolve(net: Builder, x: str, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1) -> str:
    """A convolution without bias that keeps the image size but for its stride.

    He et al., arXiv:1502.01852: a deviation of sqrt(2 / fan-in) makes up for the half that a Relu before it
    removes.
    """
    weight = net.normal(outputs, inputs, kernel, kernel, std=sqrt(2 / (inputs * kernel * kernel)))
    return net.node("Conv", x, weight, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4)


def _normalise(net: Builder, x: str, channels: int, *, gain: float = 1.0) -> str:
    """A batch normalisation whose statistics are near those of its input, yet no identity."""
    return net.node(
        "BatchNormalization",
        x,
        net.uniform(channels, 0.75 * gain, 1.25 * gain, "scale"),
        net.normal(channels, std=0.1, name="shift"),
        net.normal(channels, std=0.1, name="mean"),
        net.uniform(channels, 0.75, 1.25, "variance"),
        epsilon=1e-5,
    )


def _relu(net: Builder, x: str) -> str:
    return net.node("Relu", x)


def _classify(net: Builder, x: str, channels: int, classes: int, batch: Size) -> onnx.ModelProto:
    """Average over the image, one linear layer, and the model is done."""
    with net.scope("head"):
        x = net.node("Flatten", net.node("GlobalAveragePool", x))
        weight = net.normal(classes, channels, std=sqrt(1 / channels))
        bias = net.normal(classes, std=0.1, name="bias")
        x = net.node("Gemm", x, weight, bias, transB=1, name="scores")
    net.output(x, (batch, classes))
    return net.model()


def _linear(net: Builder, x: str, inputs: int, outputs: int) -> str:
    """A linear layer over the last axis; its variance is equation 12 of Glorot and Bengio, 2010."""
    product = net.node("MatMul", x, net.normal(inputs, outputs, std=sqrt(2 / (inputs + outputs))))
    return net.node("Add", product, net.normal(outputs, std=0.02, name="bias"))


def _layer_norm(net: Builder, x: str, size: int, name: str = "") -> str:
    scale = net.normal(size, std=0.1, mean=1.0, name="scale")
    shift = net.normal(size, std=0.1, name="shift")
    return net.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-12, name=name)


def _gelu(net: Builder, x: str) -> str:
    """Hendrycks and Gimpel, arXiv:1606.08415: x / 2 * (1 + erf(x / sqrt(2)))."""
    erf = net.node("Erf", net.node("Div", x, net.constant(sqrt(2))))
    return net.node("Mul", net.node("Mul", x, net.node("Add", erf, net.constant(1.0))), net.constant(0.5))


def _value_info(name: str, shape: Sequence[Size], dtype: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
