"""What a source is asked for besides the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Options that speak of the source, not of an engine.

    Attributes:
        dynamic_shapes: PyTorch modules only: which dimensions stay open, as ``torch.export.export`` takes it (a
            mapping or tuple of ``{dim: name}``, ``{dim: torch.export.Dim(...)}`` or None, one an input).
        opset: PyTorch and TensorFlow only: the ONNX opset to export to; None leaves it to the exporter.
        signature: TensorFlow only: the signature of a SavedModel, or the method of a tf.Module; None takes
            ``serving_default`` or ``__call__``, else the only one there is.
    """

    dynamic_shapes: Any = None
    opset: int | None = None
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """How a model is to be turned into a graph.

    Attributes:
        example_inputs: Inputs the model accepts: a tuple of positional ones, or a mapping by name.
        input_names: Names for the inputs, in order, where the source has none or others are wanted. For TensorFlow
            also a mapping of names to the model's own; for a frozen graph those are names of tensors.
        output_names: Likewise for the outputs.
        options: Options of the source.
    """

    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None
    input_names: Sequence[str] | Mapping[str, str] | None = None
    output_names: Sequence[str] | Mapping[str, str] | None = None
    options: SourceOptions = field(default_factory=SourceOptions)
