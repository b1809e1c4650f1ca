"""What runs in the child process: TensorFlow files are opened, frozen and handed to tf2onnx."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, ConversionError, SourceError
from accelrt.sources.tensorflow_frozen import open_graph, port
from accelrt.sources.tensorflow_inputs import described

OPSET = 18
"""The newest that tf2onnx 1.17 writes."""

LARGE_BYTES = 1_900_000_000
"""Weights from here on lie beside the graph: a protocol buffer ends at 2 GiB."""


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
            frozen = open_graph(Path(path), inputs, outputs, source)
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
        "inputs": [port(name, tensor) for name, tensor in zip(traced.inputs, tensors, strict=True)],
        "outputs": [port(name, tensor) for name, tensor in zip(traced.outputs, concrete.outputs, strict=True)],
        "batch": traced.batch,
    }


def _write(frozen: dict[str, Any], target: Path, opset: int | None, source: str) -> None:
    import tensorflow as tf
    import tf2onnx.utils
    from tf2onnx import convert as tf2onnx_convert

    from accelrt.sources import tensorflow_ops  # noqa: F401 - adds what tf2onnx lacks

    tf2onnx.utils.INTERNAL_NAME = 1  # the same model gets the same names, and is found in the cache
    if _compares_strings(frozen["graph_def"]):
        raise _no_form(source, ["Equal of strings"])
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
        raise ConversionError(f"{source} cannot be converted by tf2onnx: {described(error)}") from error
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


def _no_form(source: str, operators: Iterable[str]) -> ConversionError:
    return ConversionError(
        f"{source} uses TensorFlow operators that tf2onnx cannot write as ONNX: {', '.join(sorted(operators))}.",
        hint="Move them out of the model, before or after it, or write that part with other operators.",
    )


def _compares_strings(graph_def: Any) -> bool:
    """Tell what tf2onnx would write as a comparison of numbers, which fails when the model runs."""
    import tensorflow as tf

    bodies = [graph_def.node, *(function.node_def for function in graph_def.library.function)]
    return any(
        node.op in ("Equal", "NotEqual") and node.attr["T"].type == tf.string.as_datatype_enum
        for body in bodies
        for node in body
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
        raise SourceError(f"{what}: {described(error)}", hint=hint) from error
