"""Frozen graphs of TensorFlow, and which of their tensors are inputs and outputs. Runs in the child process."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from accelrt.errors import SourceError

Names: TypeAlias = Sequence[str] | Mapping[str, str]
"""Tensors, or tensors by the name that they are to have."""

_VARIABLES = {"Variable", "VariableV2", "VarHandleOp"}


def open_graph(path: Path, inputs: Names | None, outputs: Names | None, source: str) -> dict[str, Any]:
    """Open a frozen graph and cut it at the tensors asked for, or at its placeholders and ends.

    Raises:
        SourceError: It is not frozen, or has no such tensors.
    """
    import tensorflow as tf
    from tf2onnx import tf_loader

    graph_def = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
    operations = graph.get_operations()
    if variables := [op.name for op in operations if op.type in _VARIABLES]:
        raise SourceError(
            f"{source} is a graph that is not frozen: it has the variables {_listed(variables)} without their values.",
            hint="Pass the SavedModel, or freeze the graph with convert_variables_to_constants_v2.",
        )
    given = _tensors(graph, "input", inputs, [op for op in operations if op.type == "Placeholder"], source)
    ends = [op for op in operations if op.outputs and not any(t.consumers() for t in op.outputs)]
    wanted = _tensors(graph, "output", outputs, [op for op in ends if op.type not in ("Const", "Placeholder")], source)
    with tf.Graph().as_default() as cut:
        fed = {
            name: tf.compat.v1.placeholder(tensor.dtype, tensor.shape, f"accelrt_input_{i}")
            for i, (name, tensor) in enumerate(given.items())
        }
        mapped = {tensor.name: fed[name] for name, tensor in given.items() if tensor.consumers()}
        found = tf.import_graph_def(
            graph_def, input_map=mapped, return_elements=[t.name for t in wanted.values()], name=""
        )
        of_input = {tensor.name: fed[name] for name, tensor in given.items()}
        results = [
            tf.identity(of_input.get(tensor.name, result), f"accelrt_output_{i}")
            for i, (tensor, result) in enumerate(zip(wanted.values(), found, strict=True))
        ]
        names = [tensor.name for tensor in fed.values()], [tensor.name for tensor in results]
        frozen = tf_loader.tf_optimize(*names, cut.as_graph_def(add_shapes=True))
    stray = [node.name for node in frozen.node if node.op == "Placeholder" and f"{node.name}:0" not in names[0]]
    stray = [name for name in stray if name in _needed(frozen, names[1])]
    if stray:
        raise SourceError(
            f"The outputs of {source} depend on {_listed(stray)}, which the input names lack.",
            hint="Add it, e.g. input_names={'x': '" + stray[0] + ":0'}.",
        )
    return {
        "graph_def": frozen,
        "tables": None,
        "large": False,
        "inputs": [port(name, tensor) for name, tensor in fed.items()],
        "outputs": [port(name, tensor) for name, tensor in zip(wanted, results, strict=True)],
        "batch": False,
    }


def _needed(graph_def: Any, outputs: Iterable[str]) -> set[str]:
    nodes = {node.name: node for node in graph_def.node}
    needed: set[str] = set()
    pending = [name.partition(":")[0] for name in outputs]
    while pending:
        name = pending.pop()
        if name in nodes and name not in needed:
            needed.add(name)
            pending += [item.lstrip("^").partition(":")[0] for item in nodes[name].input]
    return needed


def _tensors(graph: Any, side: str, asked: Names | None, found: Sequence[Any], source: str) -> dict[str, Any]:
    """Return the tensors that were asked for, by alias; those that the graph offers where none were."""
    if asked is None:
        asked = [f"{op.name}:0" for op in found]
        if not asked:
            raise SourceError(f"{source} shows no {side}s.", hint=f"Name them: {side}_names={{'x': 'tensor:0'}}.")
    if not asked:
        raise SourceError(f"No {side} names were given; {source} has {_listed(op.name for op in found)}.")
    pairs = asked.items() if isinstance(asked, Mapping) else [(_alias(name), name) for name in asked]
    tensors: dict[str, Any] = {}
    for alias, name in pairs:
        full = name if ":" in name else f"{name}:0"
        try:
            tensor = graph.get_tensor_by_name(full)
        except (KeyError, ValueError) as error:
            close = difflib.get_close_matches(name.partition(":")[0], [op.name for op in graph.get_operations()], 3)
            guess = f" Did you mean {' or '.join(repr(f'{item}:0') for item in close)}?" if close else ""
            raise SourceError(
                f"{source} has no tensor {full!r}, which is asked for as an {side}.{guess}",
                hint=f"By its looks its {side}s are {_listed(f'{op.name}:0' for op in found)}.",
            ) from error
        if alias in tensors:
            raise SourceError(f"The {side} names must differ: {alias!r} is given twice.")
        tensors[alias] = tensor
    return tensors


def _alias(tensor: str) -> str:
    name, _, index = tensor.partition(":")
    return name if index in ("", "0") else f"{name}_{index}"


def port(name: str, tensor: Any) -> dict[str, Any]:
    """Describe an input or output in JSON's terms."""
    import numpy as np
    import onnx

    kind = tensor.dtype.as_numpy_dtype
    dtype = onnx.TensorProto.STRING if kind is object else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    rank = tensor.shape.rank
    shape = None if rank is None else list(tensor.shape.as_list())
    return {"name": name, "tensor": tensor.name, "dtype": dtype, "shape": shape}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
