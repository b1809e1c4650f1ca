"""What the inputs and outputs of an exported PyTorch model are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import onnx_ir as ir

from accelrt.errors import SourceError
from accelrt.sources.request import SourceRequest


def name_ports(graph: ir.Graph, outputs: Sequence[str] | None, request: SourceRequest) -> None:
    """Give inputs and outputs the names asked for, else the inputs their own and the outputs ``outputs``.

    Raises:
        SourceError: The names asked for are too many, too few, or not distinct.
    """
    _detach_outputs(graph)
    inputs = [value.name or f"input_{i}" for i, value in enumerate(graph.inputs)]
    if outputs is None or len(outputs) != len(graph.outputs):
        count = len(graph.outputs)
        outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    inputs, outputs = port_names(inputs, outputs, request)
    rename(graph, dict(zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True)))


def port_names(inputs: list[str], outputs: Sequence[str], request: SourceRequest) -> tuple[list[str], list[str]]:
    """Return the names of inputs and outputs: those asked for, else their own, none of them on both sides.

    Raises:
        SourceError: The names asked for are too many, too few, or not distinct.
    """
    found = [f"{name}_output" if name in inputs else name for name in outputs]
    inputs = _chosen("input", request.input_names, inputs)
    found = _chosen("output", request.output_names, found)
    if both := sorted({*inputs} & {*found}):
        raise SourceError(f"{', '.join(both)} is asked for as an input's name and as an output's.")
    return inputs, found


def leaf_names(program: Any) -> list[str]:
    """Name outputs after the keys or fields of what the model returns, else ``output``, ``output_0``..."""
    import torch.utils._pytree as pytree
    from torch.export.graph_signature import ConstantArgument

    outputs = [o.arg for o in program.graph_signature.output_specs if o.kind.name == "USER_OUTPUT"]
    # A constant, None above all, is returned by Python alone; it is no output of the graph.
    leaves = [None if isinstance(argument, ConstantArgument) else argument.name for argument in outputs]
    return output_names(pytree.tree_unflatten(leaves, program.call_spec.out_spec))


def output_names(result: Any) -> list[str]:
    """Name the leaves of what a model returns after its keys or fields, else ``output``, ``output_0``..."""
    names = names_of(result, "")
    if len(names) == 1 and not names[0]:
        return ["output"]
    names = [f"output{name}" if name.startswith("_") or not name else name for name in names]
    if names == ["output_0"]:
        return ["output"]
    return names if len({*names}) == len(names) else [f"output_{i}" for i in range(len(names))]


def names_of(value: Any, name: str) -> list[str]:
    """Return a name for each leaf of a nest, in order: its path, joined by underscores. None is no leaf."""
    if value is None:
        return []
    items: list[tuple[object, Any]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, list | tuple):
        items = [(f"_{i}", item) for i, item in enumerate(value)]
    else:
        return [name]
    return [leaf for key, item in items for leaf in names_of(item, _join(name, str(key)))]


def _join(name: str, key: str) -> str:
    return f"{name}{key}" if not name or key.startswith("_") else f"{name}_{key}"


def _detach_outputs(graph: ir.Graph) -> None:
    """Give each output a value of its own, no weight, input or other output, so that it can be renamed."""
    seen: set[int] = set()
    for i, value in enumerate(list(graph.outputs)):
        if value.producer() is None or id(value) in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            copy.outputs[0].name = f"{value.name}_copy_{i}"
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
        seen.add(id(value))


def _chosen(side: str, asked: Sequence[str] | Mapping[str, str] | None, found: list[str]) -> list[str]:
    if asked is None:
        return found
    if len(asked) != len(found):
        raise SourceError(
            f"{len(asked)} {side} names were given ({', '.join(asked)}), and the model has "
            f"{len(found)} {side}s ({', '.join(found)}).",
            hint=f"Give {len(found)} names, in this order.",
        )
    if len({*asked}) < len(asked):
        raise SourceError(f"the {side} names must differ: {', '.join(asked)}.")
    return list(asked)


def rename(graph: ir.Graph, names: Mapping[ir.Value, str]) -> None:
    """Rename values, and first move aside any other that holds one of the names."""
    everything = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        everything += node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                everything += [*attribute.as_graph().inputs, *attribute.as_graph().initializers.values()]
    taken = {value.name for value in everything} | {*names.values()}
    wanted = {*names.values()}
    for value in everything:
        if value not in names and value.name in wanted:
            number = next(i for i in range(len(taken) + 1) if f"{value.name}_{i}" not in taken)
            value.name = f"{value.name}_{number}"
            taken.add(value.name)
    for value, name in names.items():
        value.name = name
