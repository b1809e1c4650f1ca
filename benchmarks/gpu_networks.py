"""ResNet-50 and BERT-base as PyTorch users write them, with the weights of the ONNX models, and what work they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.types import TensorType


class Convolution(nn.Sequential):
    """A convolution without bias and its batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs, eps=1e-5)
        )


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, beside a shortcut; modules are in the order of the ONNX model's nodes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.down, self.middle = Convolution(channels, width), Convolution(width, width, 3, stride)
        self.up = Convolution(width, 4 * width)
        self.shortcut = Convolution(channels, 4 * width, stride=stride) if channels != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        y = self.up(functional.relu(self.middle(functional.relu(self.down(x)))))
        return functional.relu(y + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 v1.5; ``blocks`` fewer for a dry run."""

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.stem = Convolution(3, 64, 7, 2)
        stages: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                stages.append(Bottleneck(channels, 64 << stage, 2 if stage and not block else 1))
                channels = 4 * (64 << stage)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the scores of images [batch, 3, height, width]."""
        x = functional.max_pool2d(functional.relu(self.stem(image)), 3, 2, 1)
        return self.head(self.stages(x).mean((2, 3)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """An encoder layer of BERT: attention and feed-forward, each added to its input and normalised."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mixed = (nn.Linear(hidden, hidden) for _ in range(4))
        self.first = nn.LayerNorm(hidden, eps=1e-12)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.second = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute the layer for [batch, sequence, hidden]."""
        query, key, value = (
            one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.first(self.mixed(attended.transpose(1, 2).flatten(2)) + x)
        return self.second(self.narrow(functional.gelu(self.wide(x))) + x)  # type: ignore[no-any-return]


class Bert(nn.Module):
    """The BERT encoder with its pooler."""

    def __init__(self, layers: int = 12, hidden: int = 768, heads: int = 12, vocabulary: int = 30522) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(vocabulary, hidden), nn.Embedding(2, hidden)
        self.positions = nn.Embedding(512, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers))
        self.pooler = nn.Linear(hidden, hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden state and the pooler's output."""
        x = self.words(input_ids) + self.types(token_type_ids) + self.positions.weight[: input_ids.shape[1]]
        x = self.norm(x)
        mask = ((1 - attention_mask.to(x.dtype)) * -10000.0)[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


def with_weights_of(module: nn.Module, model: onnx.ModelProto) -> nn.Module:
    """Return a module in inference mode with the weights of the ONNX model that it is written after.

    Raises:
        ValueError: Their parameters do not match, in number or shape.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    given = [torch.from_numpy(numpy_helper.to_array(weights[name]).copy()) for name in _parameters(model)]
    wanted = list(_slots(module))
    if len(given) != len(wanted):
        raise ValueError(f"the ONNX model has {len(given)} parameters, the module {len(wanted)}")
    with torch.no_grad():
        for (name, slot, turned), tensor in zip(wanted, given, strict=True):
            value = tensor.T if turned else tensor
            if slot.shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(slot.shape)}, its weight {tuple(value.shape)}")
            slot.copy_(value)
    return module.eval().requires_grad_(False)


def _parameters(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the parameters of an ONNX model in the order of its nodes; small constants are none."""
    weights = {tensor.name: prod(tensor.dims) for tensor in model.graph.initializer}
    kinds = {"Conv", "BatchNormalization", "Gemm", "LayerNormalization", "MatMul", "Add", "Gather", "Slice"}
    for node in model.graph.node:
        if node.op_type in kinds:
            yield from (name for name in node.input if weights.get(name, 0) > 1 and len(name) and _floats(model, name))


def _floats(model: onnx.ModelProto, name: str) -> bool:
    return any(t.name == name and t.data_type == onnx.TensorProto.FLOAT for t in model.graph.initializer)


def _slots(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the parameters of a module in the same order; True with those that ONNX's MatMul has transposed."""
    transposed = isinstance(module, Bert)
    for name, part in module.named_modules():
        match part:
            case nn.Conv2d() | nn.Embedding():
                yield name, part.weight, False
            case nn.BatchNorm2d():
                assert part.running_mean is not None
                assert part.running_var is not None
                yield from ((name, one, False) for one in (part.weight, part.bias, part.running_mean, part.running_var))
            case nn.Linear():
                yield name, part.weight, transposed
                yield name, part.bias, False
            case nn.LayerNorm():
                yield name, part.weight, False
                yield name, part.bias, False


def matrix_flops(source: onnx.ModelProto) -> int:
    """Count the operations of a model's convolutions and matrix products, two for each multiply-add.

    Raises:
        ValueError: A shape is open.
    """
    graph = load_graph(source)
    total = 0
    for node in graph.nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            first, second = (_sizes(graph, name) for name in node.inputs[:2])
            # Products for each element of the output: a filter's size, or the inner dimension.
            inner = prod(second[1:]) if node.op_type == "Conv" else first[-1]
            total += 2 * inner * prod(_sizes(graph, node.outputs[0]))
    return total


def _sizes(graph: Graph, name: str) -> tuple[int, ...]:
    type_: Any = graph.types.get(name)
    if not isinstance(type_, TensorType) or type_.shape is None or not all(isinstance(d, int) for d in type_.shape):
        raise ValueError(f"the shape of {name} is not known: {type_}")
    return tuple(int(size) for size in type_.shape)  # type: ignore[arg-type]
