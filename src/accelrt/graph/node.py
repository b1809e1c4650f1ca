"""A node as engines see it: plain data, so that ``supports`` needs no graph library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from accelrt.graph.types import Dim, TensorType, ValueType

INLINE_BYTES = 1024
"""Constants up to this size travel inside a node's view and inside ONNX files; larger ones are weights."""

WEIGHTS_FILE = "weights.bin"
"""Where weights lie, beside the ONNX files that refer to them."""


@dataclass(frozen=True, eq=False)
class Node:
    """One operator of a graph, with everything an engine may ask about it.

    ``version`` is the opset version at which the operator took the form it has here (its *since version*), so two
    nodes of different opsets but equal version mean the same. ``inputs`` and ``outputs`` are value names, empty
    where an optional one is absent. ``captures`` are values of the enclosing graph that control-flow bodies read.
    ``constants`` holds the value of each input that is a small constant. ``proto`` is the NodeProto behind all this,
    for `accelrt.graph.trial`; engines have no need of it.
    """

    name: str
    domain: str
    op_type: str
    version: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_types: tuple[ValueType | None, ...]
    output_types: tuple[ValueType | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[int, Any] = field(default_factory=dict)
    bodies: tuple[tuple[Node, ...], ...] = ()
    captures: tuple[str, ...] = ()
    capture_types: tuple[ValueType | None, ...] = ()
    proto: Any = None

    @property
    def kind(self) -> str:
        """The operator with its domain and version: ``Conv-11``, ``ai.onnx.ml.Scaler-1``."""
        return f"{self.domain + '.' if self.domain else ''}{self.op_type}-{self.version}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Every value that the node needs: inputs that are present, then captures."""
        return tuple(name for name in self.inputs if name) + self.captures

    @property
    def writes(self) -> tuple[str, ...]:
        """Outputs that are present."""
        return tuple(name for name in self.outputs if name)

    @property
    def is_control_flow(self) -> bool:
        """Whether the node carries graphs of its own."""
        return bool(self.bodies)

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """A hashable summary by which trials of an operator are remembered: all but names and tensor sizes."""
        return (
            self.kind,
            tuple(_summary(t) for t in self.input_types),
            tuple(_summary(t) for t in self.output_types),
            tuple((bool(i), i_ in self.constants) for i_, i in enumerate(self.inputs)),
            tuple(bool(o) for o in self.outputs),
            tuple(sorted((key, _freeze(value)) for key, value in self.attributes.items())),
            tuple(sorted((key, _freeze(value)) for key, value in self.constants.items())),
            tuple(tuple(node.signature for node in body) for body in self.bodies),
        )

    def input_dtype(self, index: int) -> str | None:
        """Return the data type of an input, None if absent, unknown or no tensor."""
        type_ = self.input_types[index] if index < len(self.input_types) else None
        return type_.dtype if isinstance(type_, TensorType) else None

    def has_input(self, index: int) -> bool:
        """Tell whether an input is there."""
        return index < len(self.inputs) and bool(self.inputs[index])

    def has_output(self, index: int) -> bool:
        """Tell whether an output is there."""
        return index < len(self.outputs) and bool(self.outputs[index])

    def input_shape(self, index: int) -> tuple[Dim, ...] | None:
        """Return the shape of an input, None if absent, of unknown rank or no tensor."""
        type_ = self.input_types[index] if index < len(self.input_types) else None
        return type_.shape if isinstance(type_, TensorType) else None

    def input_size(self, index: int, axis: int) -> int | None:
        """Return one static size of an input, None where it is not known."""
        shape = self.input_shape(index)
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        dim = shape[axis]
        return dim if isinstance(dim, int) else None

    def output_dtype(self, index: int) -> str | None:
        """Return the data type of an output, None if absent, unknown or no tensor."""
        type_ = self.output_types[index] if index < len(self.output_types) else None
        return type_.dtype if isinstance(type_, TensorType) else None


def _summary(type_: ValueType | None) -> object:
    if isinstance(type_, TensorType):
        return type_.dtype, None if type_.shape is None else len(type_.shape)
    return str(type_)


def _freeze(value: object) -> object:
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        return str(getattr(value, "dtype", "")), getattr(value, "shape", ()), repr(tolist())
    return repr(value)
