"""What runs in the child process: TensorFlow files are opened, frozen and handed to tf2onnx."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, SourceError

OPSET = 18
"""The newest that tf2onnx 1.17 writes."""

LARGE_BYTES = 1_900_000_000
"""Weights from here on lie beside the graph: a protocol buffer ends at 2 GiB."""

_VARIABLES = {"Variable", "VariableV2", "VarHandleOp"}


def convert(
    *,
    path: str,
    kind: str,
    target: str,
    source: str,
    signature: str | None = None,
    inputs: Sequence[str] | Mapping[str, str] | None = None,
    outputs: Sequence[str] | Mapping[str, str] | None = None,
    opset: int | None = None,
    large_bytes: int = LARGE_BYTES,
) -> dict[str, Any]:
    """Convert a SavedModel, Keras file or frozen graph to ONNX at ``target``.

    Returns:
        ``inputs`` and ``outputs``: for each its name and the name of its tensor in the file; ``batch``: whether the
        first dimension of each is known to be the batch.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    with contextlib.suppress(RuntimeError, ValueError):
        tf.config.set_visible_devices([], "GPU")  # devices are for those who compute
    with _explained(f"{source} cannot be opened", "The file may be damaged, or of another TensorFlow version."):
        if kind == "graph-def":
            frozen = _from_graph_def(Path(path), inputs, outputs, source)
        else:
            frozen = _from_functions(path, kind, signature, source, large_bytes)
    _write(frozen, Path(target), opset, source)
    return {key: frozen[key] for key in ("inputs", "outputs", "batch")}


def _from_functions(path: str, kind: str, signature: str | None, source: str, large_bytes: int) -> dict[str, Any]:
    import tensorflow as tf
    from tf2onnx import tf_loader

    from accelrt.sources.request import SourceRequest
    from accelrt.sources.tensorflow_live import trace, trace_signature

    if kind == "keras":
        import keras

        model = keras.saving.load_model(path, compile=False, safe_mode=True)
        traced = trace(model, SourceRequest(), source)
    else:
        model = tf.saved_model.load(path)
        traced = trace_signature(model.signatures, signature, source)
    concrete = traced.function
    tensors = concrete.inputs[: len(traced.inputs)]
    results = list(dict.fromkeys(tensor.name for tensor in concrete.outputs))
    held = sum(v.shape.num_elements() * v.dtype.size for v in concrete.graph.variables if v.dtype.size)
    large = held > large_bytes
    with tf.device("/cpu:0"):
        graph_def, tables = tf_loader.from_trackable(model, concrete, [t.name for t in tensors], results, large)
    return {
        "graph_def": graph_def,
        "tables": tables,
        "large": large,
        "inputs": [_port(name, tensor) for name, tensor in zip(traced.inputs, tensors, strict=True)],
        "outputs": [_port(name, tensor) for name, tensor in zip(traced.outputs, concrete.outputs, strict=True)],
        "batch": traced.batch,
    }


def _from_graph_def(path: Path, inputs: Any, outputs: Any, source: str) -> dict[str, Any]:
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
    given = {
        **_tensors(graph, "input", inputs, [op for op in operations if op.type == "Placeholder"], source),
    }
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
        "inputs": [_port(name, tensor) for name, tensor in fed.items()],
        "outputs": [_port(name, tensor) for name, tensor in zip(wanted, results, strict=True)],
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


def _tensors(graph: Any, side: str, asked: Any, found: Sequence[Any], source: str) -> dict[str, Any]:
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


def _port(name: str, tensor: Any) -> dict[str, Any]:
    import numpy as np
    import onnx

    kind = tensor.dtype.as_numpy_dtype
    dtype = onnx.TensorProto.STRING if kind is object else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    rank = tensor.shape.rank
    shape = None if rank is None else list(tensor.shape.as_list())
    return {"name": name, "tensor": tensor.name, "dtype": dtype, "shape": shape}


def _write(frozen: dict[str, Any], target: Path, opset: int | None, source: str) -> None:
    import tensorflow as tf
    import tf2onnx.utils
    from tf2onnx import convert as tf2onnx_convert

    from accelrt.sources import tensorflow_ops  # noqa: F401 - adds what tf2onnx lacks

    tf2onnx.utils.INTERNAL_NAME = 1  # the same model gets the same names, and is found in the cache
    outputs = list(dict.fromkeys(port["tensor"] for port in frozen["outputs"]))
    log = _Unsupported()
    logging.getLogger("tf2onnx").addHandler(log)
    try:
        with _numpy_1(), tf.device("/cpu:0"):
            proto, storage = tf2onnx_convert._convert_common(
                frozen["graph_def"],
                name="tensorflow",
                continue_on_error=False,
                opset=opset or OPSET,
                input_names=[port["tensor"] for port in frozen["inputs"]],
                output_names=outputs,
                large_model=frozen["large"],
                initialized_tables=frozen["tables"],
            )
        unsupported = _foreign(proto)
    except Exception as error:
        if log.operators:
            raise _no_form(source, log.operators) from error
        with _explained(f"{source} cannot be converted by tf2onnx", None):
            raise
    finally:
        logging.getLogger("tf2onnx").removeHandler(log)
    if unsupported:
        raise _no_form(source, unsupported)
    target.write_bytes(proto.SerializeToString())
    for name, data in (storage.name_to_tensor_data if storage else {}).items():
        (target.parent / name).write_bytes(data)


class _Unsupported(logging.Handler):
    """Collects the operators that tf2onnx knows no form for; it only logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if "is not supported" in str(record.msg) and isinstance(record.args, tuple) and len(record.args) == 2:
            self.operators.add(str(record.args[1]))


def _no_form(source: str, operators: Iterable[str]) -> SourceError:
    return SourceError(
        f"{source} uses TensorFlow operators that tf2onnx cannot write as ONNX: {', '.join(sorted(operators))}.",
        hint="Move them out of the model, before or after it, or write that part with other operators.",
    )


def _foreign(proto: Any) -> set[str]:
    """Return the operators of a converted model that are none of ONNX's."""
    import onnx

    found: set[str] = set()
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            if not onnx.defs.has(node.op_type, node.domain):
                found.add(node.op_type)
            pending += [attribute.g.node for attribute in node.attribute if attribute.HasField("g")]
    return found


@contextlib.contextmanager
def _numpy_1() -> Iterator[None]:
    """Lend numpy the name that tf2onnx's large models still call it by."""
    import numpy as np

    missing = not hasattr(np, "product")
    if missing:
        np.product = np.prod  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if missing:
            del np.product  # type: ignore[attr-defined]


@contextlib.contextmanager
def _explained(what: str, hint: str | None) -> Iterator[None]:
    try:
        yield
    except AccelrtError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = " ".join(lines[:3])[:500].rstrip(".")
        raise SourceError(f"{what}: {type(error).__name__}: {message}.", hint=hint) from error


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
