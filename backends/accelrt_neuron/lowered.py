"""Segments of ONNX as PyTorch modules: the one place where this backend meets `accelrt.graph.lowering`."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from accelrt.errors import CompileError
from accelrt.graph.node import Node

_MODULE = "accelrt.graph.lowering"


def lowerable(node: Node) -> str | None:
    """Return why a node cannot become part of a PyTorch module, None if it can."""
    lowering = _lowering()
    if lowering is None:
        return "this accelrt has no lowering of ONNX to PyTorch; hand the PyTorch model over as a whole"
    reason: str | None = lowering.lowerable(node)
    return reason


def module_from_onnx(path: Path) -> Any:
    """Return a ``torch.nn.Module`` that takes a model's inputs by position and returns a tuple of its outputs.

    Raises:
        CompileError: A node cannot be lowered, or what the module does depends on the values of its inputs.
    """
    lowering = _lowering()
    if lowering is None:
        raise CompileError("This accelrt has no lowering of ONNX to PyTorch.")
    lowered = lowering.lower(path)
    if lowered.depends:
        raise CompileError(f"A trace would not see all that the segment does: {'; '.join(lowered.depends)}.")
    return lowered.module


@cache
def _lowering() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None
