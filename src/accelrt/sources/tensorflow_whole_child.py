"""What runs in the child process when a TensorFlow file is taken whole: it is opened, and saved if it must be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, SourceError
from accelrt.sources.request import SourceRequest
from accelrt.sources.tensorflow_inputs import described


def describe(
    *,
    path: str,
    kind: str,
    saved: str,
    source: str,
    signature: str | None = None,
    inputs: Sequence[str] | Mapping[str, str] | None = None,
    outputs: Sequence[str] | Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Describe a SavedModel, or write a Keras file or frozen graph to one at ``saved`` and describe that.

    Returns:
        What `accelrt.sources.tensorflow_live.describe` does.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    try:
        with tf.device("/cpu:0"):
            if kind == "saved-model":
                return _of_folder(saved, signature, source)
            if kind == "keras":
                return _of_keras(path, saved, source)
            return _of_graph(path, saved, inputs, outputs, source)
    except AccelrtError:
        raise
    except Exception as error:
        raise SourceError(
            f"{source} cannot be opened: {described(error)}",
            hint="The file may be damaged, or of another TensorFlow version.",
        ) from error


def _of_folder(saved: str, asked: str | None, source: str) -> dict[str, Any]:
    import tensorflow as tf

    from accelrt.sources.tensorflow_live import bytes_of, choose_signature, port_of

    model = tf.saved_model.load(saved)  # held: its variables go with it
    signatures = model.signatures
    choice = choose_signature(signatures, asked, source)
    function = signatures[choice]
    arguments = sorted(function.structured_input_signature[1].items())
    results = sorted(function.structured_outputs.items())
    return {
        "signature": choice,
        "inputs": [port_of(name, name, spec) for name, spec in arguments],
        "outputs": [port_of(name, name, spec) for name, spec in results],
        "batch": False,
        "weight_bytes": bytes_of(function),
    }


def _of_keras(path: str, saved: str, source: str) -> dict[str, Any]:
    import keras

    from accelrt.sources.tensorflow_live import describe, export

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    return describe(export(model, SourceRequest(), source, Path(saved)))


def _of_graph(path: str, saved: str, inputs: Any, outputs: Any, source: str) -> dict[str, Any]:
    import tensorflow as tf

    from accelrt.sources.tensorflow_frozen import open_graph
    from accelrt.sources.tensorflow_live import Traced, describe, save

    frozen = open_graph(Path(path), inputs, outputs, source)

    def whole() -> None:
        tf.import_graph_def(frozen["graph_def"], name="")

    wrapped = tf.compat.v1.wrap_function(whole, [])
    tensors = [
        [wrapped.graph.get_tensor_by_name(port["tensor"]) for port in frozen[side]] for side in ("inputs", "outputs")
    ]
    inputs, outputs = ([port["name"] for port in frozen[side]] for side in ("inputs", "outputs"))
    traced = Traced(wrapped.prune(*tensors), inputs, outputs)
    save(traced, Path(saved))
    return describe(traced)
