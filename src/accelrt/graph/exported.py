"""Exported PyTorch programs: what they tell without being run, and what to check before compiled ones are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelrt.graph.types import Signature, Value


def writes(program: Any) -> bool:
    """Tell whether an exported program has an operator that works in place, and so might write to an input."""
    if any(result.kind.name == "USER_INPUT_MUTATION" for result in program.graph_signature.output_specs):
        return True
    graphs = (module.graph for module in program.graph_module.modules() if hasattr(module, "graph"))
    schemas = (getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def arguments(program: Any) -> list[tuple[bool, Any]]:
    """Return for each leaf of the arguments whether it is an input, and else its value, which the export fixed."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return [(False, s.arg.value) if type(s.arg).__name__ == "ConstantArgument" else (True, None) for s in specs]


def results(program: Any) -> list[bool]:
    """Return for each leaf of what a program returns whether it is an output, and no constant such as None."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    return [type(spec.arg).__name__ != "ConstantArgument" for spec in specs]


class Sizes:
    """Whether symbolic dimensions agree with each other and with their limits, which compiled code does not ask.

    Args:
        signature: Of the model.
        facts: ``shapes``: for each input its sizes, a name for each that is open; ``limits``: for each name the least
            and the greatest size, None for no limit.
    """

    def __init__(self, signature: Signature, facts: Mapping[str, Any]) -> None:
        self._limits = {name: (low or 0, high) for name, (low, high) in facts["limits"].items()}
        self._axes = [
            (port.name, axis, dim)
            for port, shape in zip(signature.inputs, facts["shapes"], strict=True)
            for axis, dim in enumerate(shape)
            if isinstance(dim, str)
        ]

    def problem(self, inputs: Mapping[str, Value]) -> str | None:
        """Return what does not agree, None if all does."""
        seen: dict[str, tuple[int, str, int]] = {}
        for name, axis, dim in self._axes:
            size = inputs[name].shape[axis]
            other, where, place = seen.setdefault(dim, (size, name, axis))
            if other != size:
                return (
                    f"dimension {axis} of {name!r} is {size}; the model takes what dimension {place} of {where!r} is, "
                    f"{other}"
                )
            low, high = self._limits.get(dim, (0, None))
            if size < low or (high is not None and size > high):
                upper = "any size" if high is None else high
                return f"dimension {axis} of {name!r} is {size}; the model takes {low} to {upper}"
        return None
