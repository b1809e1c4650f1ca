"""What the child process does for `EIPredictor`: look into TensorFlow's files, and cut a graph at named tensors.

Called by name through `accelrt.isolation`, with plain data: importing TensorFlow takes seconds, and a script that only
predicts needs it nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import SourceError


def describe(*, path: str, tags: Sequence[str]) -> dict[str, Any]:
    """Return the signatures of a SavedModel folder: ``inputs`` and ``outputs`` by alias, each a tensor.

    A tensor is ``name``, ``dtype`` (None for one that numpy has not) and ``shape`` (None for any rank).

    Raises:
        SourceError: There is no SavedModel with these tags.
    """
    meta = _meta_graph(path, tags)
    return {key: _sides(definition) for key, definition in meta.signature_def.items() if not key.startswith("__")}


def read_signature(*, definition: str) -> dict[str, Any]:
    """Return a SignatureDef, the hexadecimal digits of its bytes, as `describe` would."""
    _quiet()
    from tensorflow.core.protobuf import meta_graph_pb2

    return _sides(meta_graph_pb2.SignatureDef.FromString(bytes.fromhex(definition)))


def tensors(*, path: str, tags: Sequence[str], inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    """Return tensors of a SavedModel or a frozen graph, by their aliases, as `describe` has them.

    ``missing`` instead names one that it has not.

    Raises:
        SourceError: The file cannot be read.
    """
    _quiet()
    import tensorflow as tf

    graph = tf.Graph()
    with graph.as_default(), tf.device("/cpu:0"):
        definition = _meta_graph(path, tags).graph_def if Path(path).is_dir() else _graph_def(path)
        tf.import_graph_def(definition, name="")
    try:
        found = {
            side: {alias: graph.get_tensor_by_name(name) for alias, name in names.items()}
            for side, names in (("inputs", inputs), ("outputs", outputs))
        }
    except (KeyError, ValueError):
        return {"missing": next(name for name in (*inputs.values(), *outputs.values()) if not _has(graph, name))}
    return {
        side: {alias: _plain(tensor.name, tensor.dtype, tensor.shape) for alias, tensor in tensors.items()}
        for side, tensors in found.items()
    }


def _has(graph: Any, name: str) -> bool:
    try:
        graph.get_tensor_by_name(name)
    except (KeyError, ValueError):
        return False
    return True


def freeze(*, path: str, tags: Sequence[str], outputs: Sequence[str], target: str) -> None:
    """Write the graph of a SavedModel with its variables as constants, as far as these tensors need it.

    Raises:
        SourceError: It cannot be loaded.
    """
    _quiet()
    import tensorflow as tf

    v1 = tf.compat.v1
    graph = v1.Graph()
    try:
        with graph.as_default(), v1.Session(graph=graph) as session, tf.device("/cpu:0"):
            v1.saved_model.load(session, list(tags), path)
            operations = [name.partition(":")[0] for name in outputs]
            frozen = v1.graph_util.convert_variables_to_constants(session, _inlined(graph, operations), operations)
    except (RuntimeError, ValueError, tf.errors.OpError) as error:
        raise SourceError(f"The SavedModel {path} cannot be loaded as a graph: {error}") from error
    Path(target).write_bytes(frozen.SerializeToString())


def _inlined(graph: Any, operations: Sequence[str]) -> Any:
    """Return a graph with the bodies of its functions in their place; TensorFlow 2 calls a function a signature."""
    from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
    from tensorflow.python.grappler import tf_optimizer
    from tensorflow.python.training.saver import export_meta_graph

    definition = graph.as_graph_def(add_shapes=True)
    meta = export_meta_graph(graph_def=definition, graph=graph)
    kept = meta_graph_pb2.CollectionDef()
    kept.node_list.value.extend(operations)
    meta.collection_def["train_op"].CopyFrom(kept)
    config = config_pb2.ConfigProto()
    rewriting = config.graph_options.rewrite_options
    rewriting.min_graph_nodes = -1
    rewriting.optimizers.append("function")
    return tf_optimizer.OptimizeGraph(config, meta)


def _quiet() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _meta_graph(path: str, tags: Sequence[str]) -> Any:
    _quiet()
    from tensorflow.core.protobuf import saved_model_pb2

    try:
        found = saved_model_pb2.SavedModel.FromString((Path(path) / "saved_model.pb").read_bytes())
    except Exception as error:  # the parser's own kind of error lies deep in protobuf
        raise SourceError(f"{path} holds no SavedModel that can be read: {error}") from error
    for meta in found.meta_graphs:
        if set(meta.meta_info_def.tags) == set(tags):
            return meta
    known = [",".join(meta.meta_info_def.tags) for meta in found.meta_graphs]
    raise SourceError(f"The SavedModel {path} has no graph with the tags {','.join(tags)}; it has {known}.")


def _graph_def(path: str) -> Any:
    from tensorflow.core.framework import graph_pb2

    try:
        return graph_pb2.GraphDef.FromString(Path(path).read_bytes())
    except Exception as error:
        raise SourceError(f"{path} is no frozen graph: {error}") from error


def _sides(definition: Any) -> dict[str, Any]:
    return {
        "inputs": {alias: _info(info) for alias, info in sorted(definition.inputs.items())},
        "outputs": {alias: _info(info) for alias, info in sorted(definition.outputs.items())},
    }


def _info(info: Any) -> dict[str, Any]:
    import tensorflow as tf

    shape = tf.TensorShape(info.tensor_shape)
    return _plain(info.name, tf.as_dtype(info.dtype), shape)


def _plain(name: str, dtype: Any, shape: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype.base_dtype.name, "shape": None if shape.rank is None else shape.as_list()}
